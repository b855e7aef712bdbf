"""Keras' tensors have their real names: checked against what Keras itself calls them, and on small trees."""

from __future__ import annotations

import hashlib
import json

import keras_backends
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ckptflip
from ckptflip.bits import lookup
from ckptflip.checkpoints.keras import config
from ckptflip.checkpoints.keras.marks import Marks
from ckptflip.checkpoints.keras.names import renamed
from ckptflip.faults.catalogue import Tensor

on_each_backend = pytest.mark.parametrize("backend", keras_backends.INSTALLED)


def digests(path):
    """The tensors of a file, each with the digest of its contents."""
    with ckptflip.opened(path) as target:
        for i, tensor in enumerate(target.tensors):
            words = np.concatenate([np.empty(0, tensor.number.word_dtype), *target.blocks(i)])
            yield tensor, hashlib.sha1(words.tobytes()).hexdigest()


def is_real(ours, real, model):
    """Whether a name is the variable's own, perhaps with the names of the models that hold it in front."""
    (kept, _, ours), (slot, _, real) = (n.rpartition(" of ") for n in (ours, real))
    real = real.removeprefix(f"{model}/")
    return (ours == real or ours.endswith(f"/{real}")) and (kept == slot or kept.endswith(f"/{slot}"))


def unreal(path, told):
    """Names that are not the real ones, with those."""
    return {
        t.name: told["truth"][d]
        for t, d in digests(path)
        if not is_real(t.name, told["truth"][d], told["name"])
    }


@on_each_backend
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5", ".weights.json"])
def test_all_names_are_those_of_the_variables(backend, suffix):
    made = keras_backends.backend(backend)
    compared = 0
    for name, told in made.told.items():
        path = made.folder / f"{name}{suffix}"
        if not path.exists() or name == "subclassed":
            continue
        wrong = unreal(path, told)
        # Without a configuration it cannot be told whether a normalisation keeps its scale or its shift.
        if name == "cnn" and ".weights" in suffix:
            assert len([n for n in wrong if n.startswith("batch_normalization")]) == 1
            wrong = {n: r for n, r in wrong.items() if "batch_normalization" not in n or "vars/0" not in n}
        # All layers have one shape, and the models in models no known place.
        if name == "nested" and suffix == ".weights.h5":
            wrong = {n: r for n, r in wrong.items() if "/vars/" not in n}
        assert not wrong, (name, suffix)
        compared += 1
    assert compared >= 1


@on_each_backend
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_a_subclassed_model_has_real_names_or_numbers(backend, suffix):
    made = keras_backends.backend(backend)
    told = made.told["subclassed"]
    wrong = unreal(made.folder / f"subclassed{suffix}", told)
    assert all("/vars/" in n for n in wrong)
    # The weight of the model itself has no name in the file; one layer's name does not tell its place.
    assert {
        r.removeprefix(f"{told['name']}/") for n, r in wrong.items() if "optim" not in n and " of " not in r
    } == {"scale"}
    with ckptflip.opened(made.folder / f"subclassed{suffix}") as target:
        by_attribute = {a: t.name for t in target.tensors for a in t.aliases}
    assert by_attribute["attention/kernel"] == by_attribute["attention/vars/0"] == "alpha/kernel"


@on_each_backend
def test_loss_scaling_keeps_two_copies_and_the_one_that_counts_has_the_plain_name(backend):
    made = keras_backends.backend(backend)
    if "mixed" not in made.told:
        pytest.skip("not saved by this backend")
    with ckptflip.opened(made.folder / "mixed.keras") as target:
        names = {a: t.name for t in target.tensors for a in t.aliases}
    inner, outer = names["optimizer/inner_optimizer/vars/2"], names["optimizer/vars/6"]
    assert inner.startswith("adam") and " of " in inner
    assert outer == f"loss_scale_optimizer/{inner}"


def test_every_kind_of_layer_has_real_names():
    if not keras_backends.INSTALLED:
        pytest.skip("Keras is not installed")
    made, told = keras_backends.sweep()
    assert told["missing"] == []
    wrong = unreal(made.folder / "sweep.keras", told)
    # It keeps the kernel of what it wraps as its own too, in two places of the file.
    assert all("spectral_normalization/kernel" in n for n in wrong)
    wrong = unreal(made.folder / "sweep.weights.h5", told)
    named = {n for n in wrong if "/vars/" not in n}
    assert named <= {"spectral_normalization/kernel"}
    # One scale or shift, of three kinds of layers; one of two scores.
    assert len([n for n in wrong if not n.startswith("adam")]) <= 9


def test_every_optimizer_has_real_names():
    if not keras_backends.INSTALLED:
        pytest.skip("Keras is not installed")
    made = keras_backends.fastest()
    told = made.ask("optimizers", str(made.folder))
    assert len(told) >= 20
    for name, each in told.items():
        for suffix in (".keras", ".weights.h5"):
            wrong = unreal(made.folder / f"by-{name}{suffix}", each)
            # Keras has no names of their own for these.
            wrong = {n: r for n, r in wrong.items() if r != "variable" and not ("/r of" in n or "/c of" in n)}
            if suffix == ".keras" or name not in ("average", "accumulated", "centred"):
                assert not wrong, (name, suffix)
            # A weights file does not tell averages from accumulated gradients, or these from a momentum.
            assert {r.partition(" of ")[0].partition("/")[2] for r in wrong.values()} <= {
                "average",
                "gradient_accumulator",
                "average_gradient",
            }


@on_each_backend
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_layers_and_roles(backend, suffix):
    made = keras_backends.backend(backend)
    with ckptflip.opened(made.folder / f"cnn{suffix}") as target:
        found = {(t.layer, t.role) for t in target.tensors}
        slot = next(t for t in target.tensors if t.name.endswith("momentum of head/kernel"))
    assert {("head", "weight"), ("head", "bias"), ("bn", "norm"), ("bn", "statistic")} <= found
    assert {("", "counter"), ("head", "optimizer"), ("bn", "optimizer")} <= found
    assert (slot.layer, slot.role) == ("head", "optimizer")


@on_each_backend
def test_numbers_are_of_the_kind_that_keras_says(backend):
    made = keras_backends.backend(backend)
    kinds = {}
    for name in made.told:
        with ckptflip.opened(made.folder / f"{name}.weights.h5") as target:
            kinds[name] = {t.name.rpartition("/")[2]: t.dtype for t in target.tensors}
    assert kinds["cnn"]["kernel"] == "float32" and kinds["bfloat16"]["kernel"] == "bfloat16"
    if "int8" in kinds:
        assert (kinds["int8"]["kernel"], kinds["int8"]["kernel_scale"]) == ("int8", "float32")
        assert kinds["int8"]["embeddings"] == "int8"
    if "float16" in kinds:
        assert kinds["float16"]["kernel"] == "float16" and kinds["mixed"]["kernel"] == "float32"


def test_packed_integers_are_listed_as_they_are_stored():
    if "torch" not in keras_backends.INSTALLED:
        pytest.skip("not saved by this backend")
    with ckptflip.opened(keras_backends.backend("torch").folder / "int4.keras") as target:
        kernel = next(t for t in target.tensors if t.name.startswith("dense") and t.name.endswith("/kernel"))
    # Six inputs and four outputs, two of which share a byte.
    assert (kernel.shape, kernel.dtype) == ((6, 2), "int8")


# From here on no Keras is needed.


def tensors(*shapes, **by_name):
    """A catalogue: float32, or int64 where a shape is given as a list."""
    return [
        Tensor(name, tuple(shape), lookup("int64" if isinstance(shape, list) else "float32"))
        for name, shape in (*shapes, *by_name.items())
    ]


def marks(catalogue, **given):
    """Marks as the walker makes them: names by paths of groups, with ``__`` for ``/``."""
    groups = {t.name.rpartition("/")[0]: "" for t in catalogue if "vars/" in t.name}
    return Marks(groups | {f"{k.replace('__', '/')}/vars".lstrip("/"): v for k, v in given.items()})


def names(catalogue, told, model=None):
    return [t.name for t in renamed(catalogue, told, model)]


def test_a_file_that_is_not_keras_keeps_its_names():
    plain = tensors(
        ("model/conv1.weight", (3, 3)), ("x/vars/0", (2,)), ("x/vars/1", (2,)), ("optimizer/state", ())
    )
    assert renamed(plain, marks(plain)) == plain
    assert renamed(plain, Marks()) == plain


def test_the_path_in_the_file_is_an_alias():
    catalogue = tensors(("layers/dense/vars/0", (3, 4)), ("layers/dense/vars/1", (4,)), ("epoch", ()))
    found = renamed(catalogue, marks(catalogue, layers__dense="head"))
    assert [(t.name, t.aliases, t.layer, t.role) for t in found] == [
        ("head/kernel", ("layers/dense/vars/0",), "head", "weight"),
        ("head/bias", ("layers/dense/vars/1",), "head", "bias"),
        ("epoch", (), "", "other"),
    ]


def test_names_are_unique():
    both = [(3, 4), (4,)]
    catalogue = tensors(*((f"{g}/vars/{i}", s) for g in ("a", "b", "same") for i, s in enumerate(both)))
    told = marks(catalogue, a="same", b="same", same="dense")
    found = renamed(catalogue, told)
    assert [t.name for t in found] == [
        *("same/kernel", "same/bias", "same/kernel~2", "same/bias~2", "dense/kernel", "dense/bias")
    ]
    # An attribute's name that is another layer's real one selects that layer alone.
    assert [t.aliases for t in found if t.name == "dense/kernel"] == [("same/vars/0",)]


@pytest.mark.parametrize("name", ["", "a/b", "..", "x\n", "\x1b[31m"])
def test_a_name_that_is_none_is_passed_over(name):
    catalogue = tensors(("layers/dense_3/vars/0", (3, 4)))
    assert names(catalogue, marks(catalogue, layers__dense_3=name)) == ["dense_3/kernel"]


@pytest.mark.parametrize(
    ("klass", "shapes", "found"),
    [
        ("dense", [(3, 4)], ["kernel"]),
        ("batch_normalization", [(4,)] * 4, ["gamma", "beta", "moving_mean", "moving_variance"]),
        ("batch_normalization", [(4,)] * 3, ["vars/0", "moving_mean", "moving_variance"]),
        ("layer_normalization", [(4,)], ["vars/0"]),
        ("linear", [(3, 4), (4,)], ["vars/0", "vars/1"]),
        ("dense", [(3, 4)] * 9, [f"vars/{i}" for i in range(9)]),
        ("lstm_cell", [(3, 8), (2, 8), (8,)], ["kernel", "recurrent_kernel", "bias"]),
        ("separable_conv2d", [(2, 2, 3, 1), (1, 1, 3, 4)], ["depthwise_kernel", "pointwise_kernel"]),
    ],
)
def test_variables_follow_from_the_class(klass, shapes, found):
    catalogue = tensors(*((f"layers/{klass}/vars/{i}", s) for i, s in enumerate(shapes)))
    assert names(catalogue, marks(catalogue)) == [f"{klass}/{n}" for n in found]


def test_gaps_in_the_numbers_leave_them_without_names():
    catalogue = tensors(("layers/dense/vars/0", (3, 4)), ("layers/dense/vars/2", (4,)))
    assert names(catalogue, marks(catalogue)) == ["dense/vars/0", "dense/vars/2"]


def test_an_attribute_of_unknown_class_with_a_kernel_and_a_bias():
    catalogue = tensors(
        ("fc/vars/0", (3, 4)), ("fc/vars/1", (4,)), ("odd/vars/0", (3, 4)), ("odd/vars/1", (3,))
    )
    told = marks(catalogue, fc="fc1", odd="odd1")
    assert names(catalogue, told) == ["fc1/kernel", "fc1/bias", "odd1/vars/0", "odd1/vars/1"]


def test_files_before_keras_3_6_name_no_layers():
    catalogue = tensors(
        ("layers/lstm/cell/vars/0", (3, 8)),
        ("layers/lstm/cell/vars/1", (2, 8)),
        ("layers/multi_head_attention/query_dense/vars/0", (2, 2, 2)),
        ("blocks/dense_1/vars/0", (3, 4)),
    )
    told = Marks(marks(catalogue).vars | {"layers/lstm/vars": "", "layers/multi_head_attention/vars": ""})
    assert names(catalogue, told) == [
        "lstm/lstm_cell/kernel",
        "lstm/lstm_cell/recurrent_kernel",
        "multi_head_attention/query/kernel",
        "blocks/dense_1/kernel",
    ]


def slots(shapes):
    """An optimizer's variables: a count, a rate, and then these shapes."""
    return tensors(
        ("optimizer/vars/0", []),
        ("optimizer/vars/1", ()),
        *((f"optimizer/vars/{i + 2}", s) for i, s in enumerate(shapes)),
    )


DENSE = tensors(("layers/dense/vars/0", (3, 4)), ("layers/dense/vars/1", (4,)))


@pytest.mark.parametrize(
    ("optimizer", "shapes", "found"),
    [
        ("sgd", [], []),
        ("sgd", [(3, 4), (4,)], ["momentum of dense/kernel", "momentum of dense/bias"]),
        ("lion_2", [(3, 4), (4,)], ["momentum of dense/kernel", "momentum of dense/bias"]),
        (
            "adam",
            [(3, 4), (4,), (3, 4), (3, 4), (4,), (4,)],
            # An average or an accumulated gradient: a file does not tell which.
            ["vars/2", "vars/3"]
            + [f"{s} of dense/{v}" for v in ("kernel", "bias") for s in ("momentum", "velocity")],
        ),
        (
            "adafactor",
            [(3,), (4,), (3, 4), [], [], (4,)],
            [f"{s} of dense/{v}" for v in ("kernel", "bias") for s in ("r", "c", "velocity")],
        ),
        (
            "muon",
            [(3, 4), (4,), (4,)],
            ["momentum of dense/kernel", "momentum of dense/bias", "velocity of dense/bias"],
        ),
        ("nadam", [(3, 4), (3, 4), (4,), (4,), ()], None),
        ("adam", [(3, 4), (3, 4), (9,), (9,)], ["vars/2", "vars/3", "vars/4", "vars/5"]),
        ("mine", [(3, 4), (4,)], ["vars/2", "vars/3"]),
    ],
)
def test_slots_follow_from_the_optimizer(optimizer, shapes, found):
    catalogue = [*DENSE, *slots(shapes)]
    got = names(catalogue, marks(catalogue, optimizer=optimizer))[2:]
    if found is None:
        found = [f"{s} of dense/{v}" for v in ("kernel", "bias") for s in ("momentum", "velocity")] + [
            "u_product"
        ]
    assert got == [f"{optimizer}/{n}" for n in ("iteration", "learning_rate", *found)]


def test_an_optimizer_without_a_name_keeps_its_numbers():
    catalogue = [*DENSE, *slots([(3, 4), (4,)])]
    assert names(catalogue, marks(catalogue))[2:] == [
        "optimizer/iteration",
        "optimizer/learning_rate",
        "optimizer/vars/2",
        "optimizer/vars/3",
    ]


def test_frozen_layers_leave_only_shapes_that_occur_once():
    catalogue = [
        *DENSE,
        *tensors(
            ("layers/dense_1/vars/0", (4, 9)),
            ("layers/dense_2/vars/0", (4, 9)),
            ("layers/dense_3/vars/0", (9, 1)),
        ),
        *slots([(4, 9), (9, 1)]),
    ]
    assert names(catalogue, marks(catalogue, optimizer="lion"))[7:] == [
        "lion/vars/2",
        "lion/momentum of dense_3/kernel",
    ]


def test_layers_of_two_classes_and_one_shape_are_told_apart_by_the_configuration_alone():
    catalogue = [
        *tensors(*((f"layers/{k}_normalization/vars/{i}", (4,)) for k in ("group", "layer") for i in (0, 1))),
        *slots([(4,)] * 4),
    ]
    told = marks(catalogue, optimizer="lion")
    assert all("/vars/" in n for n in names(catalogue, told)[6:])
    options = [{"class_name": f"{k}Normalization", "config": {"name": k}} for k in ("Layer", "Group")]
    raw = {"config": {"layers": options}, "compile_config": {"optimizer": "lion"}}
    model = config.parse(json.dumps(raw).encode(), "here")
    assert names(catalogue, told, model)[6:] == [
        f"lion/momentum of {k}/{v}" for k in ("Layer", "Group") for v in ("gamma", "beta")
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model_weights/dense/dense/kernel:0", "dense/kernel"),
        ("model_weights/dense/sequential/dense/kernel", "dense/kernel"),
        ("model_weights/encoder/dense/kernel:0", "encoder/dense/kernel"),
        ("model_weights/top_level_model_weights/mine/scale", "mine/scale"),
        ("model_weights/stray", "model_weights/stray"),
        ("other/x", "other/x"),
    ],
)
def test_legacy_names(path, name):
    catalogue = tensors((path, (3, 4)))
    assert names(catalogue, Marks({}, "model_weights/")) == [name]


@pytest.mark.parametrize(
    ("path", "name", "layer"),
    [
        ("adam/seq_a_b_kernel_momentum", "adam/momentum of a_b/kernel", "a_b"),
        ("Adam/m/seq/a_b/kernel:0", "Adam/m of a_b/kernel", "a_b"),
        ("Adam/seq/a_b/kernel/m:0", "Adam/m of a_b/kernel", "a_b"),
        ("Adam/learning_rate:0", "Adam/learning_rate", ""),
        ("Adam/x/y/z", "Adam/x/y/z", ""),
        ("iteration:0", "optimizer/iteration", ""),
    ],
)
def test_legacy_slots(path, name, layer):
    catalogue = tensors(("model_weights/a_b/seq/a_b/kernel", (3, 4)), (f"optimizer_weights/{path}", ()))
    found = renamed(catalogue, Marks({}, "model_weights/"))[1]
    assert (found.name, found.layer, found.aliases) == (name, layer, (f"optimizer_weights/{path}",))
    assert found.role == ("counter" if "iter" in path else "optimizer")


def test_thousands_of_layers_of_one_shape_take_no_long_time(soon):
    count = 4_000
    catalogue = [
        *tensors(*((f"part{i}/vars/0", (4,)) for i in range(count))),
        *slots([(4,)] * count),
    ]
    told = marks(catalogue, optimizer="lion")
    found = names(catalogue, told)
    assert found[-1] == f"lion/vars/{count + 1}"


def test_thousands_of_configured_layers_take_no_long_time(soon):
    count = 5_000
    catalogue = [
        *tensors(*((f"layers/dense{f'_{i}' if i else ''}/vars/0", (4, 4)) for i in range(count))),
        *slots([(4, 4)] * count),
    ]
    layers = [{"class_name": "Dense", "config": {"name": f"d{i}"}} for i in range(count)]
    raw = {"config": {"layers": layers}, "compile_config": {"optimizer": "lion"}}
    found = names(catalogue, marks(catalogue), config.parse(json.dumps(raw).encode(), "here"))
    assert found[-1] == f"lion/momentum of d{count - 1}/kernel"


@pytest.mark.parametrize("step", ["layers/sequential", "part"])
def test_deep_trees_are_no_matter(step):
    levels = 190 // len(step.split("/"))
    path = "/".join([step] * levels)
    catalogue = [*tensors((f"{path}/vars/0", (4,))), *slots([(4,)])]
    groups = {f"{'/'.join([step] * i)}/vars": "" for i in range(1, levels + 1)}
    found = names(catalogue, Marks(groups | {"optimizer/vars": "lion"}))
    assert found[0] == "/".join([step.rpartition("/")[2]] * levels) + "/vars/0"
    assert found[-1] == f"lion/momentum of {found[0]}"


keys = st.sampled_from(
    ["layers", "dense", "dense_1", "lstm", "cell", "optimizer", "inner_optimizer", "vars", "a", "7"]
)
paths = st.lists(keys, min_size=1, max_size=5).map("/".join)
given_names = st.sampled_from(["", "dense", "dense_1", "adam", "loss_scale_optimizer", "a/b", "x"])
shapes = st.lists(st.sampled_from([(), (4,), (3, 4), (4, 4), []]), max_size=7)
configured = st.recursive(
    st.sampled_from([None, 3, "adam", [], {}]),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(
                ["config", "layers", "name", "class_name", "compile_config", "optimizer", "trainable"]
            ),
            inner,
        )
        | st.lists(inner, max_size=3)
    ),
    max_leaves=20,
)


@given(st.dictionaries(paths, st.tuples(given_names, shapes), max_size=6), configured)
def test_whatever_a_file_says_names_are_unique_and_nothing_is_lost(groups, raw):
    catalogue = tensors(
        *((f"{path}/vars/{i}", s) for path, (_, several) in groups.items() for i, s in enumerate(several))
    )
    told = Marks({f"{path}/vars": name for path, (name, _) in groups.items()})
    model = config.parse(json.dumps(raw).encode(), "here")
    for found in (renamed(catalogue, told, model), renamed(catalogue, Marks({}, ""))):
        assert len({t.name for t in found}) == len(found) == len(catalogue)
        taken = {t.name for t in found}
        for before, after in zip(catalogue, found, strict=True):
            assert (before.shape, before.number) == (after.shape, after.number)
            assert before.name in (after.name, *after.aliases) or before.name in taken
            assert not taken & set(after.aliases)


def test_layers_that_keras_numbered_anew_are_paired_by_their_place(tmp_path):
    """`dense`, `dense_1` of one process are `dense_1`, `dense_2` of another."""
    import h5py

    import ckptflip

    for file_name, first in (("a.weights.h5", 0), ("b.weights.h5", 1)):
        with h5py.File(tmp_path / file_name, "w") as file:
            for i in range(2):
                group = file.create_group(f"layers/dense{'_1' * i}/vars")
                group.attrs["name"] = f"dense_{first + i}" if first + i else "dense"
                group["0"], group["1"] = np.full((3, 3), i, "f4"), np.zeros(3, "f4")
    assert {r.status for r in ckptflip.diff(tmp_path / "a.weights.h5", tmp_path / "b.weights.h5")} == {"same"}
    record = ckptflip.inject(tmp_path / "a.weights.h5", tensors="dense_1/kernel", seed=1)
    replayed = ckptflip.replay(record, tmp_path / "b.weights.h5")
    assert [t.name for t in replayed.header.tensors] == ["dense_2/kernel"]
