"""Sharded sets: one checkpoint of an index and its shards, under their own names and under others."""

import json
import shutil

import numpy as np
import pytest
from hostile import all_words, check, damaged
from hypothesis import given, settings

import ckptflip
from ckptflip.checkpoints.sharded import open_checkpoint, renamed_index
from ckptflip.errors import CheckpointError, UsageError

pytest.importorskip("safetensors")

from safetensors.numpy import load_file, save_file

INDEX = "model.safetensors.index.json"


def shard(i, stem="model", suffix="safetensors"):
    return f"{stem}-0000{i}-of-00002.{suffix}"


def write(folder, weight_map=None, **more):
    """Two shards of four tensors, and their index."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = {
        f"layer{i}.{n}": rng.normal(size=(3, 4)).astype("f4") for i in (1, 2) for n in ("weight", "bias")
    }
    for i in (1, 2):
        save_file({k: v for k, v in tensors.items() if k.startswith(f"layer{i}")}, folder / shard(i))
    weight_map = weight_map or {name: shard(int(name[5])) for name in tensors}
    index = {"metadata": {"total_size": 192}, "weight_map": weight_map, **more}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder / INDEX


@pytest.fixture
def index(tmp_path):
    return write(tmp_path / "set")


def loaded(path):
    """All words of a set, as safetensors reads them."""
    shards = set(json.loads(path.read_text())["weight_map"].values())
    return {n: a.reshape(-1).view("u4") for s in shards for n, a in load_file(path.with_name(s)).items()}


def test_words_are_those_of_all_shards(index):
    found = open_checkpoint(index)
    assert [f.name for f in found.files] == [INDEX, shard(1), shard(2)]
    words, expected = all_words(found), loaded(index)
    assert set(words) == set(expected)
    assert all(words[n].tolist() == expected[n].tolist() for n in expected)


def test_a_copy_under_another_name_carries_it_in_all_its_files(index):
    out = index.with_name("bad.safetensors.index.json")
    record = ckptflip.inject(index, out=out, count=20, seed=1)
    assert sorted(p.name for p in index.parent.iterdir()) == sorted(
        [INDEX, shard(1), shard(2), out.name, shard(1, "bad"), shard(2, "bad"), f"{out.name}.flips.jsonl"]
    )
    before, after = loaded(index), loaded(out)
    differing = {
        (n, int(w)): int(before[n][w] ^ after[n][w])
        for n in before
        for w in np.flatnonzero(before[n] ^ after[n])
    }
    plan, names = record.plan, [t.name for t in record.header.tensors]
    assert differing == {
        (names[t], w): b ^ a
        for t, w, b, a in zip(
            *(c.tolist() for c in (plan.tensor, plan.word, plan.before, plan.after)), strict=True
        )
    }
    assert record.bits_effective == 20


def test_in_another_folder_all_names_stay(index, tmp_path):
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / INDEX
    ckptflip.inject(index, out=out, count=1, seed=1)
    assert out.read_bytes() == index.read_bytes()
    assert {p.name for p in out.parent.glob("*.safetensors")} == {shard(1), shard(2)}


def test_transformers_writes_and_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "bert", max_shard_size="2KB")
    path = tmp_path / "bert" / INDEX
    found = open_checkpoint(path)
    assert len(found.files) >= 3
    words = all_words(found)
    expected = {n: t.numpy().reshape(-1).view("u4") for n, t in model.state_dict().items()}
    assert {n: w.tolist() for n, w in words.items()} == {n: w.tolist() for n, w in expected.items()}
    assert {t.role for t in found.tensors} == {"weight", "bias", "norm", "embedding"}
    record = ckptflip.inject(path, in_place=True, count=3, seed=1, tensors="encoder")
    again = transformers.BertModel.from_pretrained(tmp_path / "bert").state_dict()
    changed = sum(
        int(np.bitwise_count(t.numpy().reshape(-1).view("u4") ^ expected[n]).sum()) for n, t in again.items()
    )
    assert changed == record.bits_effective == 3


def test_pytorch_shards(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a.weight": torch.randn(3, 4), "b.weight": torch.randn(2, 2)}
    names = {n: shard(i, "pytorch_model", "bin") for i, n in enumerate(state, 1)}
    for name, tensor in state.items():
        torch.save({name: tensor}, tmp_path / names[name])
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    words = all_words(open_checkpoint(path))
    assert {n: w.tolist() for n, w in words.items()} == {
        n: t.numpy().reshape(-1).view("u4").tolist() for n, t in state.items()
    }
    out = tmp_path / "bad.bin.index.json"
    record = ckptflip.inject(path, out=out, tensors="b.weight", count=1, seed=1)
    (word,) = record.plan.word.tolist()
    now = torch.load(tmp_path / shard(2, "bad", "bin"), weights_only=True)["b.weight"]
    assert np.flatnonzero(now.numpy().view("u4") ^ state["b.weight"].numpy().view("u4")).tolist() == [word]
    assert record.header.checksums


def test_shards_may_be_links_as_in_a_cache(index, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i in (1, 2):
        shutil.move(index.with_name(shard(i)), blobs / f"sha{i}")
        index.with_name(shard(i)).symlink_to(blobs / f"sha{i}")
    before = loaded(index)
    out = tmp_path / "out" / INDEX
    out.parent.mkdir()
    ckptflip.inject(index, out=out, count=2, seed=1)
    assert not out.with_name(shard(1)).is_symlink()
    assert all((loaded(index)[n] == before[n]).all() for n in before)
    ckptflip.inject(index, in_place=True, count=2, seed=1)
    assert index.with_name(shard(1)).is_symlink()
    assert all((loaded(index)[n] == loaded(out)[n]).all() for n in before)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", ".", "a\\b", INDEX, "\0"]
)
def test_shards_elsewhere_are_refused(tmp_path, name):
    path = write(tmp_path / "set", {"layer1.weight": name})
    with pytest.raises(CheckpointError, match="only files beside it"):
        open_checkpoint(path)


def test_a_missing_shard(index):
    index.with_name(shard(2)).unlink()
    with pytest.raises(CheckpointError, match=f"{shard(2)}, which is missing"):
        open_checkpoint(index)


def test_a_tensor_that_is_not_in_its_shard(tmp_path):
    path = write(tmp_path / "set", {"layer1.weight": shard(1), "layer1.bias": shard(2)})
    with pytest.raises(CheckpointError, match=f"{shard(2)} holds 'layer1.bias', but it does not"):
        open_checkpoint(path)


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path):
    path = write(tmp_path / "set", {"layer1.weight": shard(1), "layer2.bias": shard(2)})
    found = open_checkpoint(path)
    assert sorted(t.name for t in found.tensors) == ["layer1.weight", "layer2.bias"]
    assert sorted((s.name, s.reason) for s in found.skipped) == [
        (f"layer{i}.{n}", f"in {shard(i)}, which the index does not say")
        for i, n in ((1, "bias"), (2, "weight"))
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{" * 9999, "\xff"]
)
def test_what_is_no_index(tmp_path, text):
    path = tmp_path / INDEX
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=str(path)):
        open_checkpoint(path)


def test_a_name_of_another_kind_is_refused(index):
    with pytest.raises(UsageError, match=r"ends in \.safetensors\.index\.json"):
        ckptflip.inject(index, out=index.with_name("bad.safetensors"), count=1)


def test_shards_of_other_names_than_the_index(index, tmp_path):
    names = {shard(1): "part1", shard(2): "model-part1"}
    for old, new in names.items():
        index.with_name(old).rename(index.with_name(new))
    index.write_bytes(renamed_index(index.read_bytes(), names))
    found = open_checkpoint(index)
    new = [n.path.name for n in found.renamed(tmp_path / "bad.safetensors.index.json")[1:]]
    # bad-part1 would stand for both.
    assert sorted(new) == ["bad-model-part1", "bad-part1"]
    assert [n.path for n in found.renamed(index)] == found.files


@pytest.mark.parametrize("indent", [2, None, 4])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_renamed_index_is_formatted_as_before(indent, end):
    index = {"weight_map": {"b": "m-1", "a": "m-2", "ü": "m-1"}, "metadata": {"total_size": 12}}
    for ascii_only in (True, False):
        data = (json.dumps(index, indent=indent, ensure_ascii=ascii_only) + end).encode()
        assert renamed_index(data, {"m-1": "m-1", "m-2": "m-2"}) == data
        assert renamed_index(data, {"m-1": "new", "m-2": "m-2"}) == data.replace(b"m-1", b"new")


@settings(max_examples=2000)
@given(
    damaged(
        [
            json.dumps({"metadata": {}, "weight_map": {"a": "s.safetensors"}}).encode(),
            json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}, indent=2).encode(),
        ]
    )
)
def test_damaged_indices(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "sharded"
    if not folder.exists():
        folder.mkdir()
        save_file({n: np.zeros(3, "f4") for n in ("a", "b")}, folder / "s.safetensors")
    check(open_checkpoint, folder / INDEX, data)
