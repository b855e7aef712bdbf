"""Files that Keras wrote: altered, they load in Keras with exactly the planned words changed, bit for bit."""

from __future__ import annotations

import json
import shutil

import keras_backends
import numpy as np
import pytest

import ckptflip
from ckptflip.errors import CheckpointError, UsageError

pytestmark = pytest.mark.skipif(not keras_backends.INSTALLED, reason="Keras is not installed")
FORMS = (".keras", ".weights.h5", ".h5", ".weights.json")
MODELS = [
    pytest.param(backend, name, form, id=f"{backend}-{name}{form}")
    for backend in keras_backends.INSTALLED
    for name in keras_backends.WANTED[backend]
    for form in FORMS
    if form in (".keras", ".weights.h5") or name in ("cnn", "text")
]


def contents(path):
    """The bytes of all tensors of a checkpoint, by name."""
    with ckptflip.opened(path) as target:
        return {
            t.name: b"".join(block.tobytes() for block in target.blocks(i))
            for i, t in enumerate(target.tensors)
        }


def masked(data, record, name):
    """A tensor's bytes with the faults of a record put in."""
    position = [t.name for t in record.header.tensors].index(name)
    rows = record.plan.tensor == position
    entry = record.header.tensors[position]
    words = np.frombuffer(data, entry.number.word_dtype).copy()
    masks = (record.plan.before ^ record.plan.after)[rows]
    words[record.plan.word[rows]] ^= masks.astype(words.dtype)
    return words.tobytes()


@pytest.mark.parametrize(("backend", "name", "form"), MODELS)
def test_keras_loads_exactly_the_planned_words(backend, name, form, tmp_path):
    made = keras_backends.backend(backend)
    source, out = made.folder / f"{name}{form}", tmp_path / f"bad{form}"
    # The second copy that loss scaling keeps is loaded first, and overwritten by the other one.
    tensors = ["*", "!loss_scale_optimizer"] if name == "mixed" else ["*"]
    # Keras 3 does not manage to restore the optimizer of an .h5 file, and says so.
    roles = ["model"] if form == ".h5" else []
    record = ckptflip.inject(source, out=out, tensors=tensors, roles=roles, forbid=["nan"], count=40, seed=2)
    before, hit = contents(source), {t.name for t in record.header.tensors}
    assert record.bits_effective == 40 and len(hit) > 3
    wanted = {n: masked(data, record, n) if n in hit else data for n, data in before.items()}
    assert contents(out) == wanted
    clean, loaded = made.ask("load", str(source), name), made.ask("load", str(out), name)
    paths = {data.hex(): n for n, data in before.items() if not n.startswith("loss_scale_optimizer/adam")}
    found = 0
    for (path, old), (_, new) in zip(clean, loaded, strict=True):
        if "seed" not in path:  # which no file holds
            assert new == (wanted[paths[old]].hex() if old in paths else old), path
            found += old != new
    assert found == len(hit)


@pytest.mark.parametrize("form", FORMS)
def test_in_place_and_undone(form, tmp_path):
    made = keras_backends.fastest()
    for file in made.folder.glob("cnn*"):
        shutil.copy(file, tmp_path)
    path = tmp_path / f"cnn{form}"
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    record = ckptflip.inject(path, in_place=True, count=25, seed=3)
    assert any(f.read_bytes() != data for f, data in before.items())
    undone = ckptflip.undo(path, record)
    assert undone.digest_matches and undone.restored == record.header.counts.words_effective
    assert all(f.read_bytes() == data for f, data in before.items())


def test_records_with_paths_in_the_file_still_replay(tmp_path):
    """As before there were real names, and as plain HDF5 sees the file."""
    source = keras_backends.fastest().folder / "cnn.weights.h5"
    by_name = ckptflip.inject(source, out=tmp_path / "a.h5", tensors="head/kernel", count=5, seed=1)
    by_path = ckptflip.inject(source, out=tmp_path / "b.h5", tensors="layers/dense/vars/0", count=5, seed=1)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    text = (tmp_path / "b.h5.flips.jsonl").read_text()
    assert '"head/kernel"' in text and by_path.header.tensors[0].name == "head/kernel"
    old = tmp_path / "old.flips.jsonl"
    old.write_text(text.replace('"head/kernel"', '"layers/dense/vars/0"'))
    assert ckptflip.undo(tmp_path / "b.h5", old).digest_matches
    assert by_name.header.tensors[0].aliases == ("layers/dense/vars/0",)


def test_one_model_in_all_forms_is_the_same():
    folder = keras_backends.fastest().folder
    whole = folder / "cnn.keras"
    for form in (".weights.h5", ".weights.json"):
        rows = ckptflip.diff(whole, folder / f"cnn{form}")
        assert {r.status for r in rows} == {"same"}, form
    rows = ckptflip.diff(whole, folder / "cnn.h5")
    assert {r.status for r in rows} == {"same"}


@pytest.fixture
def shards(tmp_path):
    for file in keras_backends.fastest().folder.glob("cnn*"):
        if "weights.json" in file.name or "_0" in file.name:
            shutil.copy(file, tmp_path)
    return tmp_path / "cnn.weights.json"


def test_a_new_set_of_shards_has_new_names(shards, tmp_path):
    out = tmp_path / "new" / "bad.weights.json"
    out.parent.mkdir()
    record = ckptflip.inject(shards, out=out, count=9, seed=1)
    index, old = json.loads(out.read_text()), json.loads(shards.read_text())
    names = {n for v in index["weight_map"].values() for n in ([v] if isinstance(v, str) else v)}
    assert len(names) > 1 and names == {f.name for f in out.parent.glob("bad_0*.weights.h5")}
    assert {f.name for f in out.parent.iterdir()} == names | {out.name, f"{out.name}.flips.jsonl"}
    assert index["metadata"] == old["metadata"] and list(index["weight_map"]) == list(old["weight_map"])
    assert out.read_text() == shards.read_text().replace("cnn_0", "bad_0")
    with ckptflip.opened(out) as target:
        assert target.files[0] == out and len(target.files) == 1 + len(names)
    assert sum(r.bits for r in ckptflip.diff(shards, out)) == record.bits_effective


def test_a_set_of_shards_is_named_by_its_index(shards, tmp_path):
    with pytest.raises(UsageError, match=r"another that ends in \.weights\.json"):
        ckptflip.inject(shards, out=tmp_path / "bad.h5", count=1)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {}}, "names no shards"),
        ({"weight_map": {"/vars": "../cnn.h5"}}, "only files beside it"),
        ({"weight_map": {"/vars": "/etc/passwd"}}, "only files beside it"),
        ({"weight_map": {"/vars": "cnn.weights.json"}}, "only files beside it"),
        ({"weight_map": {"/vars": "nowhere.h5"}}, "is missing"),
        ({"weight_map": {"/vars": ["cnn_00000.weights.h5", 3]}}, "no index"),
        ({"weight_map": {"/vars": "x" * 5000}}, "is missing"),
        ({"weight_map": {f"/{i}": f"{i}.h5" for i in range(300)}}, "at most 256"),
        ({}, "no index"),
        ([1], "no checkpoint of a known format"),
    ],
)
def test_a_hostile_index_is_refused(shards, index, message):
    shards.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message), ckptflip.opened(shards):
        pass


def test_groups_that_the_index_does_not_know_are_left_out(shards):
    index = json.loads(shards.read_text())
    index["weight_map"] = {g: f for g, f in index["weight_map"].items() if "dense" not in g}
    shards.write_text(json.dumps(index))
    with ckptflip.opened(shards) as target:
        assert not [t for t in target.tensors if t.name.startswith("head")]
        left_out = {s.name: s.reason for s in target.skipped}
    assert "where the index does not look" in left_out["layers/dense/vars/0"]


def test_an_index_of_other_shards_is_refused(shards):
    index = json.loads(shards.read_text())
    index["weight_map"]["/layers/lstm/cell/vars"] = "cnn_00000.weights.h5"
    shards.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not of one set"), ckptflip.opened(shards):
        pass


@pytest.mark.parametrize("data", [b"{", b"{" * 100_000, b'{"weight_map":' * 50_000, b"{\xff}"])
def test_an_index_that_is_no_json_is_refused(shards, data):
    shards.write_bytes(data)
    with pytest.raises(CheckpointError, match="no index of Keras' shards"), ckptflip.opened(shards):
        pass


def test_a_damaged_shard_is_refused(shards):
    shard = shards.with_name("cnn_00001.weights.h5")
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"cnn_00001.*truncated"), ckptflip.opened(shards):
        pass
