"""What belongs together by its name, what a map adds, and everything that is refused."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import ckptflip
from ckptflip.cli import main
from ckptflip.equivalence import Rules, load
from ckptflip.equivalence.rules import Pair
from ckptflip.errors import RecordError, UsageError


def write(path, tensors, dtype="f4", flatten=True):
    """A checkpoint of these shapes; with names of layers without weights, one of Keras 3."""
    rng = np.random.default_rng(1)
    with h5py.File(path, "w") as file:
        for name, shape in tensors.items():
            file[name] = rng.normal(size=shape).astype(dtype)
    return path


def keras(path, layers, extra=("flatten",)):
    """A Keras 3 weights file: layers (class, name, shapes), and layers without weights."""
    seen: dict[str, int] = {}
    with h5py.File(path, "w") as file:
        for klass, name, *shapes in [*layers, *((each, each) for each in extra)]:
            number = seen[klass] = seen.get(klass, -1) + 1
            group = file.create_group(f"layers/{klass}{f'_{number}' if number else ''}/vars")
            group.attrs["name"] = name
            for i, shape in enumerate(shapes):
                group[str(i)] = np.ones(shape, "f4")
    return path


def placed(here, there, tensors=(), **options):
    """The tensors that a fault in each of `tensors` lands in."""
    record = ckptflip.inject(here, tensors=tensors, fraction=0.3, seed=1, dry_run=True)
    became = []
    ckptflip.replay(record, there, dry_run=True, told=became.append, **{"map": "auto", **options})
    return {b.tensor: (b.to_tensor, b.layout) for b in became}


@pytest.mark.parametrize(("here", "there", "layout"), [
    ("model/conv1.weight", "conv1/kernel", "OIHW->HWIO"),
    ("predictor/conv1/W", "conv1/kernel", "OIHW->HWIO"),
    ("state_dict/model.layer1.0.conv1.weight", "layer1-0-conv1/kernel", "OIHW->HWIO"),
    ("module.Block.conv1.weight", "params/block/conv1/kernel", "OIHW->HWIO"),
    ("model/conv1.weight", "predictor/conv1/W", "same"),
    ("conv1/kernel", "model/conv1.weight", "HWIO->OIHW"),
])  # fmt: skip
def test_kernels_are_paired_by_layer_whatever_stands_before(tmp_path, here, there, layout):
    first, last = (8, 4, 3, 3), (3, 3, 4, 8)
    shapes = [last if name.endswith("kernel") else first for name in (here, there)]
    one, other = write(tmp_path / "a.h5", {here: shapes[0]}), write(tmp_path / "b.h5", {there: shapes[1]})
    assert placed(one, other) == {here: (there, layout)}


VECTORS = {
    "bn.weight": ("bn/gamma", "bn/scale"), "bn.bias": ("bn/beta", "bn/bias"),
    "bn.running_mean": ("bn/moving_mean", "bn/avg_mean"),
    "bn.running_var": ("bn/moving_variance", "bn/avg_var"),
}  # fmt: skip


@pytest.mark.parametrize("side", [0, 1])
def test_variables_of_a_normalisation_are_paired_in_every_spelling(tmp_path, side):
    one = write(tmp_path / "a.h5", dict.fromkeys(VECTORS, (6,)))
    other = write(tmp_path / "b.h5", {names[side]: (6,) for names in VECTORS.values()})
    assert placed(one, other) == {a: (names[side], "same") for a, names in VECTORS.items()}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_kernels_of_every_number_of_axes(tmp_path, step):
    one = write(tmp_path / "a.h5", {"c.weight": (6, 4, *range(3, 3 + step))})
    other = write(tmp_path / "b.h5", {"c/kernel": (*range(3, 3 + step), 4, 6)})
    letters = ("OIW->WIO", "OIHW->HWIO", "OIDHW->DHWIO")[step - 1]
    assert placed(one, other) == {"c.weight": ("c/kernel", letters)}


def test_names_of_optimizers_that_are_none_are_left_alone(tmp_path):
    one = write(tmp_path / "a.h5", {"optimizer/state/fc.weight/exp_avg": (3, 2), "fc.weight": (3, 2)})
    other = write(
        tmp_path / "b.h5", {"lion/momentum of fc/kernel": (2, 3), "mine/momentum of fc/kernel": (2, 3)}
    )
    exp_avg = placed(one, other, "optimizer/state/fc.weight/exp_avg")
    assert exp_avg == {"optimizer/state/fc.weight/exp_avg": ("lion/momentum of fc/kernel", "OI->IO")}
    with pytest.raises(RecordError, match=r"mine/momentum of fc/kernel.*no rule tells what it is"):
        placed(other, one, "mine")


TWO_CONVS = {"conv1.weight": (4, 1, 3, 3), "conv2.weight": (8, 4, 3, 3)}


def images(features, extra=("flatten",), between=()):
    """Two convolutions and a dense layer of so many inputs, in Keras."""
    return [
        ("conv2d", "conv1", (3, 3, 1, 4)), ("conv2d", "conv2", (3, 3, 4, 8)), *between,
        ("dense", "fc1", (features, 5)),
    ]  # fmt: skip


def test_flattened_channels_are_those_of_the_last_convolution(tmp_path):
    one = write(tmp_path / "a.h5", {**TWO_CONVS, "fc1.weight": (5, 32)})
    other = keras(tmp_path / "b.h5", images(32))
    assert placed(one, other, "fc1") == {"fc1.weight": ("fc1/kernel", "O(CHW)->(HWC)O")}


def test_pooled_channels_are_not_flattened(tmp_path):
    one = write(tmp_path / "a.h5", {**TWO_CONVS, "fc1.weight": (5, 8)})
    other = keras(tmp_path / "b.h5", images(8), extra=())
    assert placed(one, other, "fc1") == {"fc1.weight": ("fc1/kernel", "OI->IO")}


@pytest.mark.parametrize(("extra", "why"), [
    (("permute", "flatten"), "flattens its channels last"), (("reshape",), "flattens its channels last"),
    ((), "flattens its channels last"),
])  # fmt: skip
def test_what_keras_does_before_a_dense_layer_is_not_guessed(tmp_path, extra, why):
    one = write(tmp_path / "a.h5", {**TWO_CONVS, "fc1.weight": (5, 32)})
    with pytest.raises(RecordError, match=why):
        placed(one, keras(tmp_path / "b.h5", images(32), extra=extra), "fc1")


def test_ambiguous_flattening_is_refused_and_a_map_settles_it(tmp_path):
    """The layers' names give no order: 32 inputs are 8 channels × 4, or 4 × 8."""
    names = {"a.weight": (4, 1, 3, 3), "b.weight": (8, 4, 3, 3), "fc.weight": (5, 32)}
    one = write(tmp_path / "a.h5", names)
    other = write(
        tmp_path / "b.h5", {"a/kernel": (3, 3, 1, 4), "b/kernel": (3, 3, 4, 8), "fc/kernel": (32, 5)}
    )
    with pytest.raises(
        RecordError, match=r"could be 4 channels × 8 positions or 8 channels × 4 positions.*\[flatten\] fc ="
    ):
        placed(one, other, "fc")
    rules = Rules(flatten={"fc": (8, 2, 2)})
    assert placed(one, other, "fc", map=rules) == {"fc.weight": ("fc/kernel", "O(CHW)->(HWC)O")}
    with pytest.raises(RecordError, match=r"32 inputs are not \[5, 2, 2\] flattened"):
        placed(one, other, "fc", map=Rules(flatten={"fc": (5, 2, 2)}))
    with pytest.raises(RecordError, match=r"32 inputs are not \[8, 3, 3\] flattened"):
        placed(one, other, "fc", map=Rules(flatten={"fc": (8, 3, 3)}))
    with pytest.raises(
        UsageError, match="names a layer 'f', which neither checkpoint has; did you mean 'fc'"
    ):
        placed(one, other, "fc", map=Rules(flatten={"f": (8, 2, 2)}))


def test_a_vector_over_flattened_features_is_refused(tmp_path):
    one = write(tmp_path / "a.h5", {**TWO_CONVS, "bn.weight": (32,), "fc1.weight": (5, 32)})
    other = keras(tmp_path / "b.h5", [*images(32), ("batch_normalization", "bn", *[(32,)] * 4)])
    with pytest.raises(RecordError, match="one number for each input of a flattened convolution"):
        placed(one, other, "bn")


def test_everything_without_a_counterpart_is_listed(tmp_path):
    one = write(
        tmp_path / "a.h5", {"conv1.weight": (4, 1, 3, 3), "fc.weight": (2, 3), "fc.bias": (2,), "x": (3,)}
    )
    other = write(tmp_path / "b.h5", {"conv_1/kernel": (3, 3, 1, 4), "fc/kernel": (4, 2), "fc/bias": (2,)})
    with pytest.raises(RecordError) as raised:
        placed(one, other)
    said = str(raised.value)
    assert "3 of the 4 tensors that the record hits cannot be placed" in said
    assert "conv1.weight float32 (4, 1, 3, 3): there is no weight of a layer 'conv1'" in said
    assert "fc.weight float32 (2, 3): its counterpart fc/kernel does not fit" in said
    assert "x float32 (3): no rule tells what it is" in said


def test_two_tensors_that_are_one_thing_are_refused(tmp_path):
    one = write(tmp_path / "a.h5", {"fc.weight": (2, 3)})
    other = write(tmp_path / "b.h5", {"model/fc/kernel": (3, 2), "params/fc/kernel": (3, 2)})
    with pytest.raises(RecordError, match="could be each of model/fc/kernel, params/fc/kernel"):
        placed(one, other)


def test_another_dtype_is_refused_or_hit_by_field(tmp_path):
    one = write(tmp_path / "a.h5", {"fc.weight": (2, 3)})
    other = write(tmp_path / "b.h5", {"fc/kernel": (3, 2)}, "f2")
    with pytest.raises(RecordError, match=r'its counterpart fc/kernel is float16.*dtypes "fields"'):
        placed(one, other)
    record = ckptflip.inject(one, bits="critical", count=3, seed=1, dry_run=True)
    became = []
    made = ckptflip.replay(
        record, other, out=tmp_path / "c.h5", map="auto", dtypes="fields", told=became.append
    )
    assert {b.bits for b in became} == {(30,)} and {b.to_bits for b in became} == {(14,)}
    assert "same place of the same field of float16" in became[0].notes[0]
    assert made.bits_effective == 3 and set((made.plan.before ^ made.plan.after).tolist()) == {1 << 14}
    low = ckptflip.inject(one, bits="0", count=1, seed=1, dry_run=True)
    with pytest.raises(RecordError, match="bit 0 of float32 is 22 below the top of its mantissa"):
        ckptflip.replay(low, other, map="auto", dtypes="fields", dry_run=True)
    with pytest.raises(UsageError, match="dtypes must be same or fields"):
        ckptflip.replay(record, other, map="auto", dtypes="field", dry_run=True)


MAP = """
auto = false
[layers]
"features.0" = "stem"
[tensors]
"head.weight" = {to = "classify/kernel", layout = "OI->IO", flatten = [4, 2, 2]}
"head.bias" = "classify/bias"
"""
FROM = {
    "model/features.0.weight": (4, 1, 3, 3), "model/features.0.bias": (4,), "model/head.weight": (3, 16),
    "model/head.bias": (3,), "optimizer/state/head.weight/momentum_buffer": (3, 16),
}  # fmt: skip
TO = {
    "stem/kernel": (3, 3, 1, 4), "stem/bias": (4,), "classify/kernel": (16, 3), "classify/bias": (3,),
    "sgd/momentum of classify/kernel": (16, 3),
}  # fmt: skip
LAID = ("OIHW->HWIO", "same", "O(CHW)->(HWC)O", "same", "O(CHW)->(HWC)O")


def test_a_map_is_read_both_ways(tmp_path):
    one, other = write(tmp_path / "a.h5", FROM), write(tmp_path / "b.h5", TO)
    (tmp_path / "map.toml").write_text(MAP)
    there = placed(one, other, map=tmp_path / "map.toml")
    assert there == dict(zip(FROM, zip(TO, LAID, strict=True), strict=True))
    back = placed(other, one, map=tmp_path / "map.toml")
    assert {a: b for a, (b, _) in back.items()} == dict(zip(TO, FROM, strict=True))
    array = np.arange(48).reshape(3, 16)
    record = ckptflip.inject(one, tensors="head.weight", count=20, seed=2, dry_run=True)
    became = []
    ckptflip.replay(record, other, map=tmp_path / "map.toml", dry_run=True, told=became.append)
    moved = array.reshape(3, 4, 2, 2).transpose(2, 3, 1, 0).reshape(-1)
    assert [int(moved[b.to_element]) for b in became] == [b.element for b in became]


def test_with_auto_false_only_what_is_listed_is_placed(tmp_path):
    one, other = (
        write(tmp_path / "a.h5", {"fc.weight": (2, 3)}),
        write(tmp_path / "b.h5", {"fc/kernel": (3, 2)}),
    )
    with pytest.raises(RecordError, match="the map does not list it, and says auto = false"):
        placed(one, other, map=Rules(auto=False))


@pytest.mark.parametrize(("text", "why"), [
    ("[tensor]\n", "unknown field `tensor`.*did you mean 'tensors'"),
    ('"conv1.weight" = {to = "conv1/kernel"}\n', r"belong into a table \[tensors\]"),
    ('[tensors]\n"a" = {to = "b", layouts = "OI->IO"}\n', "unknown field `layouts`.*did you mean 'layout'"),
    ('[tensors]\n"a" = {layout = "OI->IO"}\n', "missing required field `to`"),
    ('[tensors]\n"a" = {to = "b", layout = "OIHW->HWI"}\n', "does not name the same axes on both sides"),
    ('[tensors]\n"a" = {to = "b", layout = "sane"}\n', "did you mean 'same'"),
    ('[tensors]\n"a" = {to = "b", flatten = [4]}\n', "the shape before flattening"),
    ('[tensors]\n"a" = 3\n', "Expected `object | str`|Expected"),
    ("[flatten]\nfc1 = [0, 2, 2]\n", "the shape before flattening"),
    ('[flatten]\nfc1 = "64"\n', "Expected `array`"),
    ('auto = "yes"\n', "Expected `bool`"),
    ('dtypes = "all"\n', "dtypes must be same or fields"),
    ("[tensors\n", "is not TOML"),
])  # fmt: skip
def test_a_malformed_map_is_refused(tmp_path, text, why):
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"(?s)map .*{why}"):
        load(path)


@pytest.mark.parametrize(("rules", "why"), [
    (Rules(tensors={"fc.weight": "fc/kernal"}), "'fc/kernal', which the target does not have; did you mean"),
    (Rules(tensors={"a": "fc/kernel", "b": "fc/kernel"}), "two tensors the same counterpart"),
    (Rules(layers={"fc": "fcc"}), "names a layer 'fcc', which the target does not have; did you mean 'fc'"),
    (Rules(tensors={"fc.weight": Pair("fc/bias")}), "fc/bias does not fit"),
    (Rules(tensors={"fc.weight": Pair("fc/kernel", "same")}), r"it would become \(2, 3\) \(same\), but fc/"),
])  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(tmp_path, rules, why):
    one = write(tmp_path / "a.h5", {"fc.weight": (2, 3)})
    other = write(tmp_path / "b.h5", {"fc/kernel": (3, 2), "fc/bias": (2,)})
    with pytest.raises((UsageError, RecordError), match=why):
        placed(one, other, map=rules)


def test_options_of_a_map_need_one(tmp_path):
    one = write(tmp_path / "a.h5", {"fc.weight": (2, 3)})
    record = ckptflip.inject(one, dry_run=True, seed=1)
    with pytest.raises(UsageError, match="belong to a map"):
        ckptflip.replay(record, one, source=one, dry_run=True)


def test_a_source_of_another_architecture_is_refused(tmp_path):
    one, other = (
        write(tmp_path / "a.h5", {"fc.weight": (2, 3)}),
        write(tmp_path / "b.h5", {"fc/kernel": (3, 2)}),
    )
    with pytest.raises(UsageError, match=r"the source has no tensor fc\.weight"):
        placed(one, other, source=other)


def test_messages_reach_the_user_on_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("a.h5", {"fc.weight": (2, 3)})
    write("b.h5", {"gc/kernel": (3, 2)})
    ckptflip.inject("a.h5", out="bad.h5", seed=1)
    assert main.run(["replay", "bad.h5.flips.jsonl", "b.h5", "--map", "none.toml"]) == 2
    assert "map none.toml: No such file" in capsys.readouterr().err
    assert main.run(["replay", "bad.h5.flips.jsonl", "b.h5", "--map", "auto"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "there is no weight of a layer 'fc'" in said.err
