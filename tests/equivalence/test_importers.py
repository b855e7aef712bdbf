"""Fault files of other injectors, as those write them, become records that replay."""

from __future__ import annotations

import json
import pickle
import struct
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.cli import main
from ckptflip.equivalence import foreign
from ckptflip.equivalence.importers import import_faults
from ckptflip.errors import CkptflipError, RecordError, UsageError


@pytest.fixture
def chainer(tmp_path, monkeypatch):
    """A checkpoint as Chainer writes it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(2)
    with h5py.File("c.h5", "w") as file:
        file["predictor/conv1/W"] = rng.normal(size=(4, 3, 2, 2))
        file["predictor/conv1/b"] = rng.normal(size=4).astype("f4")
        file["predictor/conv10/b"] = rng.normal(size=4).astype("f4")
        file["predictor/scale"] = np.float32(1.5)
        file["predictor/bn/N"] = np.int64(7)
    return tmp_path


def sequence(**locations):
    """A sequence as hdf5_corrupter saves one (json.dumps with an indent of 2)."""
    named = {f"/{k.replace('__', '/')}": v for k, v in locations.items()}
    Path("s.json").write_text(json.dumps(named, indent=2))
    return "s.json"


def test_a_sequence_hits_the_bits_it_names_from_the_left(chainer):
    made = import_faults(
        sequence(
            predictor__conv1__W=[[[1, 2, 0, 1], [5, 63]], [[0, 0, 0, 0], [0]], [[3, 0, 0, 0], None]],
            predictor__conv1__b=[[[2], [9]]],
            predictor__scale=[[[0], [1]]],
        ),
        "c.h5",
        record="r.jsonl",
    )
    assert made.header.replay_of == "s.json" and made.header.counts.words_hit == 4
    ckptflip.replay("r.jsonl", "c.h5", out="bad.h5")
    with h5py.File("c.h5") as clean, h5py.File("bad.h5") as bad:
        for name, changes in {
            "predictor/conv1/W": {(1, 2, 0, 1): 1 << 58 | 1, (0, 0, 0, 0): 1 << 63},
            "predictor/conv1/b": {(2,): 1 << 22},
            "predictor/scale": {(): 1 << 30},
            "predictor/conv10/b": {},
        }.items():
            kind = f"u{clean[name].dtype.itemsize}"
            changed = np.asarray(clean[name][()]).view(kind) ^ np.asarray(bad[name][()]).view(kind)
            want = np.zeros_like(changed)
            for index, mask in changes.items():
                want[index] = mask
            assert np.array_equal(changed, want)
    # What the injector would have got: the bits of the number, most significant first.
    with h5py.File("c.h5") as clean, h5py.File("bad.h5") as bad:
        text = f"{struct.unpack('>I', struct.pack('>f', clean['predictor/conv1/b'][2]))[0]:032b}"
        turned = text[:9] + "10"[int(text[9])] + text[10:]
        assert bad["predictor/conv1/b"][2] == struct.unpack(">f", struct.pack(">I", int(turned, 2)))[0]


def test_a_bit_that_was_inverted_twice_is_as_it_was(chainer):
    made = import_faults(
        sequence(predictor__conv1__b=[[[0], [3, 3]], [[1], [4]], [[1], [4, 5]]]), "c.h5", record="r.jsonl"
    )
    assert made.bits_effective == 1 and made.plan.hit.tolist() == [1 << 28, 1 << 27 | 1 << 26]
    assert (made.plan.before ^ made.plan.after).tolist() == [0, 1 << 26]


def test_a_prefix_of_one_dataset_alone_stands_for_it(chainer):
    made = import_faults(sequence(predictor__sca=[[[0], [31]]]), "c.h5", record="r.jsonl")
    assert made.header.tensors[0].name == "predictor/scale"
    with pytest.raises(
        RecordError, match="stands for predictor/conv1/W, predictor/conv1/b, predictor/conv10/b"
    ):
        import_faults(sequence(predictor__conv1=[[[0], [31]]]), "c.h5", record="r2.jsonl")


@pytest.mark.parametrize(("injections", "why"), [
    ([[5, 6]], "names no element"), ([3], "names no element"), ([[[], [3]]], "names no element"),
    ([[[0], [-2]]], "scaled the value"), ([[[0], 3]], "altered an integer"),
    ([[[0], [32]]], "another precision"),
    ([[[4], [3]]], r"has no element \(4,\)"), ([[[0, 0], [3]]], r"has no element \(0, 0\)"),
    ([[[0], ["3"]]], "is no index with bits"), ([[[0], [True]]], "is no index with bits"), (7, "no list"),
    ([], "no fault that took place"),
])  # fmt: skip
def test_sequences_that_do_not_tell_are_refused(chainer, injections, why):
    with pytest.raises(RecordError, match=why):
        import_faults(sequence(predictor__conv1__b=injections), "c.h5", record="r.jsonl")
    assert not (chainer / "r.jsonl").exists()


def test_other_files_are_refused(chainer):
    with pytest.raises(RecordError, match="no JSON"):
        (chainer / "s.json").write_text("{")
        import_faults("s.json", "c.h5", record="r.jsonl")
    with pytest.raises(RecordError, match="has no /predictor/fc"):
        import_faults(sequence(predictor__fc=[[[0], [1]]]), "c.h5", record="r.jsonl")
    with pytest.raises(RecordError, match="int64; only floats"):
        import_faults(sequence(predictor__bn__N=[[[0], [1]]]), "c.h5", record="r.jsonl")
    with pytest.raises(RecordError, match=r"none\.bin: No such file"):
        import_faults("none.bin", "c.h5", record="r.jsonl")
    good = sequence(predictor__conv1__b=[[[0], [3]]])
    with pytest.raises(UsageError, match="must be different files"):
        import_faults(good, "c.h5", record="c.h5", overwrite=True)
    with pytest.raises(UsageError, match="PyTorchALFI"):
        import_faults(good, "c.h5", record="r.jsonl", layer_types="fcc")


@pytest.fixture
def network(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("stem", torch.nn.Conv2d(3, 4, 3))
    net.add_module("bn", torch.nn.BatchNorm2d(4))
    net.add_module("body", torch.nn.Conv2d(4, 2, 3))
    net.add_module("volume", torch.nn.Conv3d(2, 2, 2))
    net.add_module("head", torch.nn.Linear(8, 5))
    torch.save(net.state_dict(), "net.pt")
    return net


# layer, filter, channel, depth, height, width, bit, as drawn for conv2d, conv3d and fcc; -1: there is none.
ALFI = [[0, 3, 2, -1, 1, 2, 0], [1, 1, 3, -1, 0, 0, 5], [2, 1, 0, 1, 0, 1, 31], [3, -1, -1, -1, 4, 7, 1]]
WHERE = {"stem.weight": (3, 2, 1, 2), "body.weight": (1, 3, 0, 0), "volume.weight": (1, 0, 1, 0, 1),
         "head.weight": (4, 7)}  # fmt: skip
TYPES = ("conv2d", "conv3d", "fcc")


def runset(columns, rows=()):
    """A run set as PyTorchALFI makes it: 7 rows and more, a column for each fault."""
    made = np.full((7, len(columns)), -1)
    made[:, :] = np.array(columns).T
    return np.vstack([made, *rows]) if rows else made


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("form", ["plain", "fortran", "objects", "floats"])
def test_drawn_faults_of_weights_are_read_without_unpickling(network, protocol, form):
    array = runset(ALFI)
    array = {
        "plain": array,
        "fortran": np.asfortranarray(array),
        "floats": array.astype(float),
        # Beside the drawn faults, what became of them: directions and values, some not known.
        "objects": np.vstack([array.astype(object), [[1, 0, None, 1]], [[0.5, None, 1.5, np.float32(2)]]]),
    }[form]
    Path("f.bin").write_bytes(pickle.dumps(array, protocol))
    made = import_faults("f.bin", "net.pt", record="r.jsonl", layer_types=TYPES)
    hit = {t.name: t.shape for t in made.header.tensors}
    assert list(hit) == list(WHERE)
    for i, (name, index) in enumerate(WHERE.items()):
        assert np.unravel_index(made.plan.word[i], hit[name]) == index
    assert made.plan.hit.tolist() == [1 << 31, 1 << 26, 1, 1 << 30]
    names = import_faults("f.bin", "net.pt", record="r2.jsonl", modules=["stem", "body", "volume", "head"])
    assert np.array_equal(names.plan.word, made.plan.word)


def test_long_lists_of_faults_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    columns = np.tile(np.array(ALFI), (3000, 1))
    Path("f.bin").write_bytes(pickle.dumps(runset(columns)))
    found = foreign.read_alfi(Path("f.bin"))
    assert np.array_equal(found.T, columns)


def test_a_pickle_is_not_run(network, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    Path("f.bin").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(RecordError, match="no pickled numpy array"):
        import_faults("f.bin", "net.pt", record="r.jsonl", layer_types=TYPES)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("options", "why"), [
    ({}, "numbers layers"), ({"layer_types": "conv2d", "modules": "stem"}, "numbers layers"),
    ({"layer_types": "conv"}, "'conv' is no layer type"), ({"modules": ["stem", "neck"]}, "layer 'neck'"),
    ({"layer_types": "conv2d"}, "a fault in layer 2, and 2 are counted"),
    ({"modules": ["head", "stem", "body", "volume"]}, "has no element"),
])  # fmt: skip
def test_layers_that_do_not_fit_are_refused(network, options, why):
    Path("f.bin").write_bytes(pickle.dumps(runset(ALFI)))
    with pytest.raises(CkptflipError, match=why):
        import_faults("f.bin", "net.pt", record="r.jsonl", **options)


def test_layers_of_a_file_in_alphabetical_order_must_be_named(network):
    from ckptflip import torch_h5

    torch_h5.save({"model": network.state_dict()}, "net.h5")
    Path("f.bin").write_bytes(pickle.dumps(runset(ALFI)))
    with pytest.raises(UsageError, match="name them as modules"):
        import_faults("f.bin", "net.h5", record="r.jsonl", layer_types=TYPES)
    assert (
        len(import_faults("f.bin", "net.h5", record="r.jsonl", modules=["stem", "body", "volume", "head"]))
        == 4
    )


@given(st.binary(max_size=300))
@settings(max_examples=150)
def test_any_bytes_are_refused_with_a_message(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("x") / "f.bin"
    path.write_bytes(data)
    for read in (foreign.read_alfi, foreign.read_sequence):
        with pytest.raises(RecordError):
            read(path)


@given(st.data())
@settings(max_examples=200)
def test_a_damaged_array_is_refused_or_read(tmp_path_factory, data):
    whole = bytearray(pickle.dumps(runset(ALFI)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("x") / "f.bin"
    path.write_bytes(bytes(whole))
    with suppress(RecordError):
        assert foreign.read_alfi(path).shape[0] == 7


def test_the_command_writes_a_record_that_replays(chainer, capsys):
    sequence(predictor__conv1__b=[[[2], [9]]])
    assert main.run(["import-faults", "s.json", "c.h5", "-o", "r.jsonl", "--format", "csv"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].startswith("predictor/conv1/b,predictor/conv1,bias,float32,1,1,1,0,0,0,1")
    assert "words hit: 1, bits: 1, tensors: 1 → r.jsonl; c.h5 is as it was" in said.err
    assert main.run(["import-faults", "s.json", "c.h5", "-o", "r.jsonl"]) == 2
    assert main.run(["replay", "r.jsonl", "c.h5", "-o", "bad.h5"]) == 0
    assert main.run(["undo", "bad.h5", "--record", "bad.h5.flips.jsonl"]) == 0
    assert (chainer / "bad.h5").read_bytes() == (chainer / "c.h5").read_bytes()
