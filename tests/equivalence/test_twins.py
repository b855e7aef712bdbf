"""Faults of PyTorch's checkpoints in Keras', and back, on real twin networks that stay equal."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from twins import Twins, moved, words

import ckptflip
from ckptflip.cli import main
from ckptflip.errors import RecordError

pytest.importorskip("torch")
pytest.importorskip("keras")

PARAMETERS = {
    **{f"{layer}.{v}": f"{layer}/{'kernel' if v == 'weight' else v}" for layer in ("conv1", "dw", "conv2")
       for v in ("weight", "bias")},
    **{f"{layer}.{v}": f"{layer}/{'kernel' if v == 'weight' else v}" for layer in ("fc1", "fc2")
       for v in ("weight", "bias")},
    "bn1.weight": "bn1/gamma", "bn1.bias": "bn1/beta",
}  # fmt: skip
STATISTICS = {"bn1.running_mean": "bn1/moving_mean", "bn1.running_var": "bn1/moving_variance"}
SLOTS = {
    "adam": {"exp_avg": "adam/momentum", "exp_avg_sq": "adam/velocity"},
    "sgd": {"momentum_buffer": "sgd/momentum"},
}
ORDER = list(dict.fromkeys(n.partition(".")[0] for n in PARAMETERS))
MODULES = ("conv1", "bn1", "dw", "conv2", "fc1", "fc2")


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    made = Twins(tmp_path_factory.mktemp("twins"))
    yield made
    made.close()


def counterparts(optimizer):
    """Keras' name of every tensor of PyTorch's that has one."""
    found = {f"model/{a}": b for a, b in {**PARAMETERS, **STATISTICS}.items()}
    names = [f"{m}.{v}" for m in MODULES for v in ("weight", "bias")]
    for number, name in enumerate(names):
        for slot, other in SLOTS[optimizer].items():
            found[f"optimizer/state/{number}/{slot}"] = f"{other} of {PARAMETERS[name]}"
    return found


def layer_of(name, optimizer):
    names = [f"{m}.{v}" for m in MODULES for v in ("weight", "bias")]
    return names[int(name.split("/")[2])] if name.startswith("optimizer") else name


def check_same(torch_words, keras_words, optimizer):
    """Every word of the one file is that of the other."""
    for name, other in counterparts(optimizer).items():
        want = moved(layer_of(name, optimizer), torch_words[name])
        assert want.shape == keras_words[other].shape, name
        assert np.array_equal(want, keras_words[other]), name


@pytest.mark.parametrize("kind", ["images", "lstm", "gru"])
def test_the_index_maps_give_equal_networks(twins, kind):
    one, other = (twins.output(twins.folder / f"{kind}_adam{suffix}") for suffix in (".pt", ".keras"))
    assert np.abs(one).max() > 1e-3
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize(("source", "target"), [
    (".pt", ".keras"), (".h5", ".weights.h5"), (".keras", ".h5"), (".weights.h5", ".pt"),
])  # fmt: skip
def test_every_word_becomes_its_counterpart(twins, tmp_path, optimizer, source, target):
    """A fifth of all bits of everything that has a counterpart, optimizer state included."""
    pairs = counterparts(optimizer)
    here, there = (twins.folder / f"images_{optimizer}{suffix}" for suffix in (source, target))
    names = [*pairs.values()] if "weights" in source or "keras" in source else [*pairs]
    bad, became = tmp_path / f"bad{source}", tmp_path / f"became{target}"
    record = ckptflip.inject(here, out=bad, tensors=names, fraction=0.2, seed=3)
    shutil.copy(here, tmp_path)
    made = ckptflip.replay(record, there, out=became, map="auto")
    assert made.header.replay_of and made.bits_effective == record.bits_effective
    assert made.header.counts.tensors == len(pairs)
    torch_file, keras_file = (bad, became) if target in (".keras", ".weights.h5") else (became, bad)
    check_same(words(torch_file), words(keras_file), optimizer)
    ckptflip.undo(became, made)
    before, after = words(there), words(became)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("target", [".keras", ".weights.h5"])
def test_there_and_back_is_the_same_record(twins, tmp_path, target):
    here, there = twins.folder / "images_adam.pt", twins.folder / f"images_adam{target}"
    record = ckptflip.inject(here, tensors=[*counterparts("adam")], count=3000, seed=9, dry_run=True)
    became = ckptflip.replay(record, there, map="auto", source=here, dry_run=True)
    back = ckptflip.replay(became, here, map="auto", source=there, dry_run=True)
    assert back.header.tensors == record.header.tensors
    for column in ("tensor", "word", "hit", "before", "after"):
        assert np.array_equal(getattr(back.plan, column), getattr(record.plan, column))


@pytest.mark.parametrize("bits", ["mantissa", "exponent,!critical"])
@pytest.mark.parametrize(("kind", "target"), [
    ("images", ".keras"), ("images", ".weights.h5"), ("lstm", ".keras"), ("gru", ".weights.h5"),
])  # fmt: skip
def test_the_same_fault_gives_the_same_outputs(twins, tmp_path, kind, target, bits):
    here, there = twins.folder / f"{kind}_sgd.pt", twins.folder / f"{kind}_sgd{target}"
    bad, became = tmp_path / f"{kind}_sgd_bad.pt", tmp_path / f"{kind}_sgd_bad{target}"
    rnn = ("!model/rnn.bias_ih_l0", "!model/rnn.bias_hh_l0") if kind != "images" else ()
    record = ckptflip.inject(
        here, out=bad, roles="model", tensors=rnn, bits=bits, count=25, seed=11,
        forbid=["nan", "inf", "extreme:100"],
    )  # fmt: skip
    ckptflip.replay(record, there, out=became, map="auto")
    clean, faulty, twin = twins.output(here), twins.output(bad), twins.output(became)
    assert np.abs(clean - faulty).max() > 1e-5
    np.testing.assert_allclose(faulty, twin, rtol=1e-4, atol=1e-5)


def test_the_listing_says_what_each_flip_became(twins, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(twins.folder / "images_sgd.pt", "a.pt")
    ckptflip.inject("a.pt", out="bad.pt", tensors=["conv2.weight", "optimizer/state/0"], count=6, seed=2)
    keras = str(twins.folder / "images_sgd.keras")
    assert main.run(["replay", "bad.pt.flips.jsonl", keras, "-o", "b.keras", "--map", "auto",
                     "--format", "json"]) == 0  # fmt: skip
    said = capsys.readouterr()
    rows = json.loads(said.out)
    assert len(rows) == 6
    for row in rows:
        o, i, h, w = row["index"]
        assert row["to_index"] == [h, w, i, o] and row["to_bits"] == row["bits"]
        assert row["layout"] == "OIHW->HWIO"
    assert {r["to_tensor"] for r in rows} == {"conv2/kernel", "sgd/momentum of conv1/kernel"}
    assert "momentum_buffer sums gradients" in said.err


def test_biases_that_keras_keeps_as_a_sum_are_refused(twins, tmp_path):
    here, there = twins.folder / "lstm_adam.h5", twins.folder / "lstm_adam.keras"
    record = ckptflip.inject(here, out=tmp_path / "bad.h5", tensors="rnn.bias_ih_l0", seed=1)
    with pytest.raises(RecordError, match=r"model/rnn\.bias_ih_l0 float32 \(12\): no rule tells what it is"):
        ckptflip.replay(record, there, out=tmp_path / "x.keras", map="auto")
    assert not (tmp_path / "x.keras").exists()


def test_which_parameter_a_number_means_is_read_beside_the_record_or_asked_for(twins, tmp_path):
    here, there = twins.folder / "images_adam.h5", twins.folder / "images_adam.weights.h5"
    bad = tmp_path / "bad.h5"
    record = ckptflip.inject(here, out=bad, tensors="optimizer/state/3/exp_avg", seed=1)
    (tmp_path / "alone").mkdir()
    alone = shutil.copy(record.path, tmp_path / "alone")
    with pytest.raises(RecordError, match=r"its number does not tell which parameter of.*--source"):
        ckptflip.replay(alone, there, map="auto", dry_run=True)
    for made in (
        ckptflip.replay(alone, there, map="auto", source=here, dry_run=True),
        ckptflip.replay(record.path, there, map="auto", dry_run=True),
    ):
        assert [t.name for t in made.header.tensors] == ["adam/momentum of bn1/beta"]
