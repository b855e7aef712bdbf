"""Checkpoints that Orbax wrote, with and without OCDBT, zarr version 2 and 3, compressed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.bits import as_words
from ckptflip.checkpoints.crc import checksum
from ckptflip.checkpoints.orbax import ocdbt, open_checkpoint, recognises
from ckptflip.errors import CheckpointError, MissingExtraError
from ckptflip.testing import CheckpointContract

pytest.importorskip("tensorstore")
ocp = pytest.importorskip("orbax.checkpoint")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tensorstore  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype("float32")


def big() -> dict:
    """Each array is longer than what OCDBT keeps in its tree (1,024 bytes)."""
    return {
        "params": {"dense": {"kernel": jnp.asarray(normal(30, 40)), "bias": jnp.ones(700, jnp.bfloat16)}},
        "opt_state": [{"mu": jnp.asarray(normal(30, 40)), "nu": normal(400)}, (), None],
    }


def whole() -> dict:
    """A training's state: parameters, optimizer, a step, keys of a random generator."""
    return {**big(), "step": jnp.int32(7), "rng": jax.random.PRNGKey(3), "epoch": 2, "scale": np.float64(1.5)}


def save(path: Path, tree: dict, **options: bool) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)
    return path


def flat(tree: object, prefix: str = "") -> dict[str, np.ndarray]:
    """The words of a tree's leaves, by their keys joined by slashes."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {n: w for k, v in items for n, w in flat(v, f"{prefix}{k}/").items()}
    return {} if tree is None else {prefix[:-1]: as_words(np.ascontiguousarray(np.asarray(tree)))}


class _Orbax(CheckpointContract):
    options: ClassVar[dict] = {}
    tree = staticmethod(whole)

    def write(self, folder: Path) -> Path:
        return save(folder / "ckpt", self.tree(), **self.options)

    def load(self, path: Path):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return flat(checkpointer.restore(path))


class TestFolders(_Orbax):
    options: ClassVar[dict] = {"use_ocdbt": False, "use_compression": False}


class TestFoldersOfVersion3(_Orbax):
    options: ClassVar[dict] = {"use_ocdbt": False, "use_compression": False, "use_zarr3": True}


class TestCompressedFolders(_Orbax):
    options: ClassVar[dict] = {"use_ocdbt": False}
    patched = False
    exact = False


class TestDatabase(_Orbax):
    options: ClassVar[dict] = {"use_compression": False}
    tree = staticmethod(big)


class TestDatabaseOfVersion3(_Orbax):
    options: ClassVar[dict] = {"use_compression": False, "use_zarr3": True}
    tree = staticmethod(big)


class TestDatabaseWithSmallValues(_Orbax):
    options: ClassVar[dict] = {"use_compression": False}
    patched = False
    exact = False


class TestCompressedDatabase(_Orbax):
    patched = False
    exact = False


class TestCompressedDatabaseOfVersion3(_Orbax):
    options: ClassVar[dict] = {"use_zarr3": True}
    patched = False
    exact = False


class TestOneItemOfAManager(_Orbax):
    patched = False
    exact = False

    def write(self, folder: Path) -> Path:
        with ocp.CheckpointManager(folder.with_name("managed")) as manager:
            manager.save(5, args=ocp.args.StandardSave(whole()))
        folder.rmdir()
        folder.with_name("managed").rename(folder)
        return folder / "5"

    def load(self, path: Path):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return flat(checkpointer.restore(path / "default"))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Checkpoints to be looked at, not to be altered."""
    folder = tmp_path_factory.mktemp("orbax")
    save(folder / "raw", big(), use_compression=False)
    save(folder / "full", {**whole(), "note": "text", "nothing": None})
    return folder


def names(path: Path) -> list[str]:
    with ckptflip.opened(path) as target:
        return [t.name for t in target.tensors]


def test_several_items_keep_their_names_apart(tmp_path):
    state, extra = {"w": jnp.ones((3, 4))}, {"w": jnp.zeros(3)}
    with ocp.CheckpointManager(tmp_path, item_names=("state", "extra", "said", "lone")) as manager:
        items = {"state": ocp.args.StandardSave(state), "extra": ocp.args.PyTreeSave(extra)}
        items |= {"said": ocp.args.JsonSave({"a": 1}), "lone": ocp.args.ArraySave(jnp.arange(5.0))}
        manager.save(12, args=ocp.args.Composite(**items))
    assert names(tmp_path / "12") == ["extra/w", "lone/checkpoint", "state/w"]
    assert names(tmp_path / "12" / "state") == ["w"]
    out = tmp_path / "13"
    record = ckptflip.inject(tmp_path / "12", out=out, count=3, tensors="state/w", seed=1)
    assert record.bits_effective == 3
    with ocp.CheckpointManager(tmp_path, item_names=("state",)) as manager:
        found = manager.restore(13, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]["w"]
    assert int((np.asarray(found) != 1).sum()) == len(record)
    assert not recognises(tmp_path)
    with pytest.raises(CheckpointError, match="name the folder of one step"):
        open_checkpoint(tmp_path)


def test_the_interface_of_version_1(tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    v1.save(tmp_path / "a", big())
    ckptflip.inject(tmp_path / "a", out=tmp_path / "b", count=9, seed=1)
    before, after = (flat(v1.load(tmp_path / p)) for p in "ab")
    assert set(names(tmp_path / "a")) == set(before)
    assert sum(int((before[n] != after[n]).sum()) for n in before) == 9


def test_arrays_in_several_parts(tmp_path):
    devices = np.array(jax.devices() * 4)[:1]
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.sharding.PartitionSpec("x"))
    array = jax.device_put(normal(50, 60), sharding)
    save_args = {"w": ocp.SaveArgs(chunk_byte_size=3000)}
    for version3 in (False, True):
        path = tmp_path / f"p{version3}"
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=version3, use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave({"w": array}, save_args=save_args))
        with ckptflip.opened(path) as target:
            assert len(target.layouts[0].pieces) > 1
            np.testing.assert_array_equal(np.concatenate([*target.blocks(0)]), as_words(np.asarray(array)))


DTYPES = (
    *("bool", "int2", "int4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "bfloat16", "float16"),
    *("float32", "complex64", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@pytest.mark.parametrize("options", [{}, {"use_zarr3": True}, {"use_ocdbt": False, "use_compression": False}])
def test_every_dtype_of_jax(tmp_path, options):
    tree = {d: jnp.asarray([1, 0, 1, 1, 0], d) for d in DTYPES}
    save(tmp_path / "a", tree, **options)
    with ckptflip.opened(tmp_path / "a") as target:
        assert {t.name: t.number.name for t in target.tensors} == {d: d for d in DTYPES}
        for i, tensor in enumerate(target.tensors):
            expected = as_words(np.asarray(tree[tensor.name]))
            np.testing.assert_array_equal(target.read(i, np.arange(expected.size)), expected, tensor.name)
    # The highest bit that each dtype has.
    record = ckptflip.inject(
        tmp_path / "a",
        out=tmp_path / "b",
        bits="sign,msb",
        tensors=["!bool", "!float8_e8m0fnu"],
        count=50,
        seed=3,
    )
    before, after = (_Orbax().load(tmp_path / p) for p in "ab")
    assert sum(int((before[n] != after[n]).sum()) for n in before) == record.bits_effective == 50


@pytest.mark.parametrize("bit", [0, 3])
def test_truth_values_have_one_bit_that_loads(tmp_path, bit):
    """TensorStore refuses a truth value that is neither 0 nor 1; zarr does not."""
    save(tmp_path / "a", {"b": np.zeros(9, bool)}, use_ocdbt=False, use_compression=False)
    ckptflip.inject(tmp_path / "a", out=tmp_path / "b", bits=str(bit), count=1, seed=1)
    if bit:
        with pytest.raises(ValueError, match="Invalid bool value: 8"):
            _Orbax().load(tmp_path / "b")
    else:
        assert _Orbax().load(tmp_path / "b")["b"].sum() == 1


def test_names_and_what_is_left_out(written):
    with ckptflip.opened(written / "full") as target:
        roles = {t.name: t.role for t in target.tensors}
        skipped = {s.name: s.reason for s in target.skipped}
    assert set(roles) == {
        *("params/dense/kernel", "params/dense/bias", "opt_state/0/mu", "opt_state/0/nu"),
        *("step", "rng", "epoch", "scale"),
    }
    assert roles["params/dense/kernel"] == "weight" and roles["step"] == "counter"
    assert skipped == {"note": "a string"}


def test_layers_and_roles_of_a_training(tmp_path):
    layers = [{"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2))}]
    tree = {
        "params": {"layers": layers, "BatchNorm_0": {"scale": jnp.ones(2), "bias": jnp.ones(2)}},
        "batch_stats": {"BatchNorm_0": {"mean": jnp.ones(2), "var": jnp.ones(2)}},
        "opt_state": [{"count": jnp.int32(3), "mu": {"layers": layers}}, {"trace": {"layers": layers}}],
    }
    with ckptflip.opened(save(tmp_path / "a", tree)) as target:
        found = {t.name: (t.layer, t.role) for t in target.tensors}
    assert found == {
        **{f"params/layers/{i}/kernel": (f"layers/{i}", "weight") for i in range(2)},
        **{f"params/BatchNorm_0/{n}": ("BatchNorm_0", "norm") for n in ("scale", "bias")},
        **{f"batch_stats/BatchNorm_0/{n}": ("BatchNorm_0", "statistic") for n in ("mean", "var")},
        "opt_state/0/count": ("", "counter"),
        **{f"opt_state/0/mu/layers/{i}/kernel": (f"layers/{i}", "optimizer") for i in range(2)},
        **{f"opt_state/1/trace/layers/{i}/kernel": (f"layers/{i}", "optimizer") for i in range(2)},
    }


def test_keys_with_dots_and_slashes(tmp_path):
    tree = {"a.b": {"c": jnp.ones(3)}, "x/y": jnp.ones(4), "a": {"d.e": jnp.ones(5)}}
    for ocdbt_too in (False, True):
        path = save(tmp_path / str(ocdbt_too), tree, use_ocdbt=ocdbt_too)
        assert sorted(names(path)) == ["a.b/c", "a/d.e", "x/y"]


def test_without_metadata_names_are_those_of_the_arrays(written, tmp_path):
    shutil.copytree(written / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "_METADATA").unlink()
    assert "params/dense/kernel" in names(tmp_path / "raw")


def test_a_database_that_tensorstore_alone_wrote(tmp_path):
    """Many small nodes, so that the tree has several levels."""
    base = {"driver": "file", "path": f"{tmp_path}/db/"}
    settings = {"max_decoded_node_bytes": 700, "max_inline_value_bytes": 20}
    spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base, "config": settings}}
    arrays = {f"layer{i}/w": normal(3 + i, 4) for i in range(30)}
    for name, array in arrays.items():
        chunks = {"name": "regular", "configuration": {"chunk_shape": [2, 2]}}
        spec["kvstore"]["path"] = f"{name}/"
        stored = tensorstore.open(
            {**spec, "metadata": {"chunk_grid": chunks}}, create=True, dtype="float32", shape=array.shape
        ).result()
        stored.write(array).result()
    with ckptflip.opened(tmp_path / "db") as target:
        assert {t.name for t in target.tensors} == set(arrays)
        for i, tensor in enumerate(target.tensors):
            np.testing.assert_array_equal(np.concatenate([*target.blocks(i)]), as_words(arrays[tensor.name]))


def test_raw_values_are_altered_in_place(written, tmp_path):
    shutil.copytree(written / "raw", tmp_path / "raw")
    files = {p: p.read_bytes() for p in (tmp_path / "raw").rglob("*") if p.is_file()}
    ckptflip.inject(tmp_path / "raw", in_place=True, count=1, seed=1, record=tmp_path / "r.jsonl")
    changed = [p for p, data in files.items() if p.read_bytes() != data]
    assert len(changed) == 1 and changed[0].parent.name == "d"


# A CRC covers the database's manifest and nodes, and a shard's index; no value.
@pytest.mark.parametrize(("name", "noticed"), [("manifest.ocdbt", True), ("d", True), ("value", False)])
def test_what_the_checksums_cover(written, tmp_path, name, noticed):
    path = tmp_path / "raw"
    shutil.copytree(written / "raw", path)
    file = {"manifest.ocdbt": path / name, "d": next((path / "d").iterdir())}.get(name)
    if file is None:
        file = max((path / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    if noticed:
        with pytest.raises(ValueError, match="DATA_LOSS"):
            _Orbax().load(path)
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(path)
    else:
        assert set(_Orbax().load(path)) == set(names(path))


def test_the_index_of_a_shard_is_checked_by_its_loader(tmp_path):
    path = save(tmp_path / "a", {"w": normal(30)}, use_ocdbt=False, use_zarr3=True, use_compression=False)
    file = path / "w" / "c" / "0"
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="Digest mismatch"):
        _Orbax().load(path)
    with pytest.raises(CheckpointError, match="CRC-32C of a shard's index"):
        open_checkpoint(path)


def test_a_missing_library_is_named(written, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(ocdbt, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"ckptflip\[orbax\]"):
        open_checkpoint(written / "raw")


def test_what_was_never_finished_is_refused(written, tmp_path):
    shutil.copytree(written / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        open_checkpoint(tmp_path / "raw")


def test_links_are_not_followed(written, tmp_path):
    path = tmp_path / "raw"
    shutil.copytree(written / "raw", path)
    data = max((path / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="not in its folder"):
        open_checkpoint(path)
    for name in ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
    (path / "round").symlink_to(path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


METADATA = (b"", b"[]", b"{", b'{"tree_metadata": 3}', b'{"tree_metadata": {"a": {}}}', b"[" * 100_000)
LEAF = {"key_metadata": [{"key": "../../up"}], "value_metadata": {}}


@pytest.mark.parametrize("raw", METADATA)
def test_damaged_metadata_is_refused(written, tmp_path, raw):
    shutil.copytree(written / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "_METADATA").write_bytes(raw)
    if raw:
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(tmp_path / "raw")
    else:
        assert "params/dense/bias" in names(tmp_path / "raw")


def test_names_from_metadata_lead_nowhere(written, tmp_path):
    shutil.copytree(written / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": LEAF}}))
    with ckptflip.opened(tmp_path / "raw") as target:
        assert "../../up" in {s.name for s in target.skipped}


def sealed(data: bytes) -> bytes:
    """A node or manifest with the CRC-32C that TensorStore wants."""
    return data[:-4] + checksum("crc32c", data[:-4]).to_bytes(4, "little")


def attempt(path: Path) -> None:
    """Open and alter: nothing but a CheckpointError may come of it."""
    try:
        with ckptflip.opened(path) as target:
            if not sum(t.words for t in target.tensors):
                return
        ckptflip.inject(path, out=path.with_name("out"), overwrite=True, count=2, seed=1)
    except CheckpointError:
        pass


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    """Two databases: in one, nodes are not compressed, so that altered bytes reach the parser."""
    folder = tmp_path_factory.mktemp("fuzz")
    database(folder / "plain", None)
    database(folder / "packed", {"id": "zstd"})
    return folder


def database(folder: Path, compression: object) -> None:
    base = {"driver": "file", "path": f"{folder}/"}
    kvstore = {
        "driver": "ocdbt",
        "base": base,
        "config": {"compression": compression, "max_inline_value_bytes": 10},
    }
    for name in ("a", "b"):
        spec = {"driver": "zarr3", "kvstore": {**kvstore, "path": f"{name}/"}}
        tensorstore.open(spec, create=True, dtype="int16", shape=[6]).result().write(
            np.arange(6, dtype="int16")
        ).result()


@pytest.mark.parametrize("entries", [b"", b"\x00\xff\xff\xff\xff\x07"])
def test_nodes_that_decode_to_gigabytes_are_refused(written, tmp_path, entries):
    path = tmp_path / "raw"
    shutil.copytree(written / "raw", path)
    node = next((path / "d").iterdir())
    data = node.read_bytes()
    repeated = ((128 << 10 << 3) | 2).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd\x00\x58" + (len(entries) << 3).to_bytes(3, "little") + entries
    body = data[:14] + frame + repeated * 16_000 + b"\x01\0\0" + bytes(4)
    body = body[:4] + len(body).to_bytes(8, "little") + body[12:]
    node.write_bytes(sealed(body))
    version = ocdbt._dumped(ocdbt._opened({"driver": "file", "path": f"{path}/"}), None)["versions"][-1]
    location = version["root"]["location"].rpartition(":")[0] + f":{len(body)}"
    with pytest.MonkeyPatch.context() as patching:
        dumped = {"versions": [{"root": {"location": location}, "root_height": 0}]}
        patching.setattr(ocdbt, "_dumped", lambda base, at: dumped)
        with pytest.raises(CheckpointError, match="more than"):
            open_checkpoint(path)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
    st.floats(0, 1),
    st.booleans(),
    st.sampled_from(["plain", "packed"]),
)
def test_altered_databases_give_clear_errors_only(fuzzed, which, changes, cut, seal, name):
    path = fuzzed / "altered"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(fuzzed / name, path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = files[which % len(files)]
    data = bytearray(file.read_bytes())
    for at, mask in changes:
        data[int(at * (len(data) - 1))] ^= mask
    kept = bytes(data[: int(cut * len(data))]) if cut < 0.2 else bytes(data)
    file.write_bytes(sealed(kept) if seal and len(kept) > 4 else kept)
    attempt(path)
