"""TensorFlow's TensorBundle: golden bytes, hostile files, and what TensorFlow itself writes and reads."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckptflip
from ckptflip.bits import as_words
from ckptflip.checkpoints import crc
from ckptflip.checkpoints.target import Changes
from ckptflip.checkpoints.tensorbundle import bundle as bundle_module
from ckptflip.checkpoints.tensorbundle import graph, index_of, naming, open_checkpoint, places, siblings
from ckptflip.checkpoints.tensorbundle.entries import read_index
from ckptflip.checkpoints.tensorbundle.slices import slice_key
from ckptflip.errors import CheckpointError
from ckptflip.testing import CheckpointContract

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
tf = pytest.importorskip("tensorflow")

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# float32 [1.5, -2, 3] called "w", as a table of one data block.
GOLDEN_INDEX = bytes.fromhex(
    "00 00 06 0801 1a020801"  # the empty key: one data file, version 1
    "00 01 0f 77 0801 120412020803 280c 3599c21db1"  # w: float32, [3], 12 bytes, CRC
    "00000000 01000000 00 01b1e4c0"  # one restart point; not compressed, CRC
    "00000000 01000000 00 c0f2a1b0"  # the metaindex block, empty
    "00 01 02 78 0024 00000000 01000000 00 ab30707f"  # the index block: the data block has 36 bytes
    "2908 360e" + 36 * "00" + "57fb808b247547db"
)
GOLDEN_DATA = np.array([1.5, -2, 3], "<f4").tobytes()
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
    *("float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"),
    *("float4_e2m1fn", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"),
    *("int32", "uint32", "int64", "uint64", "qint8", "quint8", "qint16", "quint16", "qint32"),
)
RANDOM = np.random.default_rng(1)


def number(value: int) -> bytes:
    """A varint."""
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of whole numbers and bytes; a negative number stands for 4 bytes, as CRCs are stored."""
    made = b""
    for key, value in fields:
        if isinstance(value, bytes):
            made += number(key << 3 | 2) + number(len(value)) + value
        elif value < 0:
            made += number(key << 3 | 5) + struct.pack("<I", ~value)
        else:
            made += number(key << 3) + number(value)
    return made


def shape_of(*axes: int) -> bytes:
    return message(*((2, message((1, n & (1 << 64) - 1))) for n in axes))


def masked(data: bytes) -> int:
    return crc.mask(crc.checksum("crc32c", data))


def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(number(0) + number(len(k)) + number(len(v)) + k + v for k, v in pairs)
    body += struct.pack("<II", 0, 1) + b"\0"
    return body + struct.pack("<I", masked(body))


def table(*pairs: tuple[bytes, bytes]) -> bytes:
    """An index of one data block, with the CRCs that belong to it."""
    data, meta = block(list(pairs)), block([])
    index = block([(b"x", number(0) + number(len(data) - 5))])
    handles = number(len(data)) + number(len(meta) - 5) + number(len(data + meta)) + number(len(index) - 5)
    return data + meta + index + handles.ljust(40, b"\0") + GOLDEN_INDEX[-8:]


HEADER = (b"", message((1, 1), (3, message((1, 1)))))


def put(folder: Path, index: bytes, data: bytes = GOLDEN_DATA) -> Path:
    """The files of a bundle called ``b``."""
    (folder / "b.index").write_bytes(index)
    (folder / "b.data-00000-of-00001").write_bytes(data)
    return folder / "b.index"


def read_all(checkpoint) -> dict[str, np.ndarray]:
    return {t.name: np.concatenate([[], *checkpoint.blocks(i)]) for i, t in enumerate(checkpoint.tensors)}


def prefix_of(path: Path) -> str:
    if path.is_dir():
        return str(path / "variables" / "variables")
    return str(path).removesuffix(".index")


def loaded(path: Path) -> dict[str, np.ndarray]:
    """The words of all tensors but strings, as TensorFlow reads them."""
    reader = tf.train.load_checkpoint(prefix_of(path))
    return {
        key.removesuffix(VALUE): as_words(np.ascontiguousarray(reader.get_tensor(key)))
        for key, dtype in reader.get_variable_to_dtype_map().items()
        if dtype != tf.string
    }


def save(path: Path, tensors: dict[str, object], slices: list[str] | None = None) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(path),
        tensor_names=list(tensors),
        shape_and_slices=slices or [""] * len(tensors),
        tensors=list(tensors.values()),
    )


def tensor_of(name: str, shape: tuple[int, ...] = (3, 4)):
    dtype = tf.dtypes.as_dtype(name)
    if name.startswith(("q", "complex")):
        plain = name.lstrip("q") if name.startswith("q") else f"float{int(name[7:]) // 2}"
        return tf.bitcast(tensor_of(plain, shape if name[0] == "q" else (*shape, 2)), dtype)
    return tf.constant(RANDOM.integers(0, 2, shape).astype(dtype.as_numpy_dtype), dtype)


def keras_model():
    layers = tf.keras.layers
    model = tf.keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(3, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="out"),
        ],
        name="net",
    )
    model.compile(optimizer="adam", loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def model():
    return keras_model()


@pytest.fixture(scope="module")
def keras_checkpoint(tmp_path_factory, model) -> Path:
    step = tf.Variable(3, dtype=tf.int64)
    path = tmp_path_factory.mktemp("keras") / "ckpt-5"
    tf.train.Checkpoint(model=model, optimizer=model.optimizer, step=step).write(str(path))
    return path


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, model) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net"
    model.export(str(path), verbose=False)
    return path


class TestEveryDtype(CheckpointContract):
    """A checkpoint named by its prefix."""

    leave_error = tf.errors.OpError

    def write(self, folder: Path) -> Path:
        save(folder / "ckpt-5", {name: tensor_of(name) for name in DTYPES})
        return folder / "ckpt-5"

    def load(self, path: Path):
        return loaded(path)


class TestSlicesInSeveralDataFiles(CheckpointContract):
    """What two workers of a distributed training wrote, merged; named by its index."""

    leave_error = tf.errors.OpError

    def write(self, folder: Path) -> Path:
        first = tf.constant(RANDOM.standard_normal((4, 6)), tf.float32)
        parts = {"w": first, "u": tensor_of("complex64", (2, 3)), "bias": tensor_of("float64")}
        save(folder / "0", parts, ["8 6 0,4:-", "5 3 0,2:-", ""])
        save(folder / "1", {"u": tensor_of("complex64", (3, 1))}, ["5 3 2,3:0,1"])
        save(folder / "2", {"u": tensor_of("complex64", (3, 2)), "w": first}, ["5 3 2,3:1,2", "8 6 4,4:0,6"])
        tf.raw_ops.MergeV2Checkpoints(
            checkpoint_prefixes=[str(folder / str(i)) for i in range(3)],
            destination_prefix=str(folder / "ckpt"),
            delete_old_dirs=False,
        )
        return folder / "ckpt.index"

    def load(self, path: Path):
        return loaded(path)

    def test_listing(self, checkpoint):
        with ckptflip.opened(checkpoint) as target:
            assert [f.name for f in target.files] == [
                "ckpt.index",
                *(f"ckpt.data-0000{i}-of-00003" for i in range(3)),
            ]
            assert {t.name: t.layout for t in target.tensors} == {
                "bias": "contiguous",
                "u": "3 slices",
                "w": "2 slices",
            }
        assert siblings(checkpoint) == sorted(
            checkpoint.parent.iterdir(), key=lambda p: (p.suffix != ".index", p.name)
        )


class TestSavedModel(CheckpointContract):
    leave_error = tf.errors.OpError

    def write(self, folder: Path) -> Path:
        module = tf.Module()
        module.kernel = tf.Variable(RANDOM.standard_normal((5, 4)).astype("f4"), name="dense/kernel")
        module.listed = [tf.Variable(RANDOM.standard_normal(7)), tf.Variable([1, 2, 3])]
        tf.saved_model.save(module, str(folder / "net"))
        return folder / "net"

    def load(self, path: Path):
        found = tf.saved_model.load(str(path))
        named = {"dense/kernel": found.kernel, "listed/0": found.listed[0], "listed/1": found.listed[1]}
        return {name: as_words(v.numpy()) for name, v in named.items()}


def test_golden_bytes(tmp_path):
    assert len(GOLDEN_INDEX) == 121
    entry = message((1, 1), (2, shape_of(3)), (5, 12), (6, ~masked(GOLDEN_DATA)))
    assert table(HEADER, (b"w", entry)) == GOLDEN_INDEX
    path = put(tmp_path, GOLDEN_INDEX)
    checkpoint = open_checkpoint(path)
    (tensor,) = checkpoint.tensors
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.offset) == ("w", (3,), "float32", 0)
    assert read_all(checkpoint)["w"].tolist() == [0x3FC00000, 0xC0000000, 0x40400000]
    assert tf.train.load_checkpoint(str(tmp_path / "b")).get_tensor("w").tolist() == [1.5, -2, 3]
    record = ckptflip.inject(path, in_place=True, tensors="w", bits="31", count=3, seed=1)
    assert tf.train.load_checkpoint(str(tmp_path / "b")).get_tensor("w").tolist() == [-1.5, 2, -3]
    assert [(e.file, e.offset) for e in record.header.checksums] == [(0, 24), (0, 37)]


def test_big_endian(tmp_path):
    data = np.array([1.5, -2, 3], ">f4").tobytes()
    header = (b"", message((1, 1), (2, 1), (3, message((1, 1)))))
    entry = message((1, 1), (2, shape_of(3)), (5, 12), (6, ~masked(data)))
    small = message((1, 6), (2, shape_of(2)), (4, 12), (5, 2), (6, ~masked(b"\1\2")))
    path = put(tmp_path, table(header, (b"s", small), (b"w", entry)), data + b"\1\2")
    checkpoint = open_checkpoint(path)
    assert [t.dtype for t in checkpoint.tensors] == ["int8", ">float32"]
    assert read_all(checkpoint)["w"].tolist() == [0x3FC00000, 0xC0000000, 0x40400000]
    ckptflip.inject(path, in_place=True, tensors="w", bits="31", count=3, seed=1)
    assert tf.train.load_checkpoint(str(tmp_path / "b")).get_tensor("w").tolist() == [-1.5, 2, -3]


def test_a_tensor_without_a_checksum_has_none_to_repair(tmp_path):
    path = put(tmp_path, table(HEADER, (b"w", message((1, 1), (2, shape_of(3)), (5, 12)))))
    record = ckptflip.inject(path, in_place=True, count=1, seed=1)
    assert record.header.checksums == ()
    with pytest.raises(tf.errors.OpError, match="Checksum does not match"):
        tf.train.load_checkpoint(str(tmp_path / "b")).get_tensor("w")


class TestNames:
    def test_of_keras(self, keras_checkpoint):
        checkpoint = open_checkpoint(keras_checkpoint)
        found = {t.name: t for t in checkpoint.tensors}
        kernel = found["net/hidden/kernel"]
        assert kernel.aliases == ("optimizer/_trainable_variables/0", "hidden/kernel")
        assert (kernel.layer, kernel.role) == ("net/hidden", "weight")
        mean = found["net/norm/moving_mean"]
        assert mean.aliases == ("model/_functional/_operations/2/moving_mean", "norm/moving_mean")
        assert (mean.layer, mean.role) == ("net/norm", "statistic")
        momentum = found["adam/net_hidden_kernel_momentum"]
        assert momentum.aliases[0] == "optimizer/_variables/2"
        assert "adam/momentum of hidden/kernel" in momentum.aliases
        assert (momentum.layer, momentum.role) == ("net/hidden", "optimizer")
        roles = {name: found[name].role for name in ("save_counter", "step") if name in found}
        assert roles == {"step": "counter"}
        assert found["adam/iteration"].role == "counter"
        assert found["adam/learning_rate"].role == "optimizer"
        assert [(s.name, s.reason) for s in checkpoint.skipped] == [
            ("_CHECKPOINTABLE_OBJECT_GRAPH", "strings")
        ]

    def test_select_what_they_say(self, keras_checkpoint, tmp_path, model):
        out = tmp_path / "flipped"
        record = ckptflip.inject(keras_checkpoint, out=out, tensors="hidden/kernel", bits="sign", count=12)
        assert record.bits_effective == 12
        restored = keras_model()
        reading = tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(str(out))
        reading.expect_partial()
        for one, other in zip(model.variables, restored.variables, strict=True):
            sign = -1 if one.path == "net/hidden/kernel" else 1
            np.testing.assert_array_equal(one.numpy() * sign, other.numpy())

    def test_of_copies_in_an_exported_model(self, saved_model, tmp_path, model, monkeypatch):
        """They are left out, since flips in them change nothing."""
        checkpoint = open_checkpoint(saved_model)
        reasons = {s.reason: s.name for s in checkpoint.skipped}
        copy = reasons["a second copy of net/hidden/kernel that loading does not use"]
        assert copy.startswith("_all_variables/")
        assert sum(" copy of " in r for r in reasons) == len(model.variables)
        names = {t.name for t in checkpoint.tensors}
        assert {v.path for v in model.variables} <= names and not any("_all_" in n for n in names)
        monkeypatch.setattr(naming, "_COPIES", "nothing begins so/")
        x = tf.ones((1, 4))
        for name, is_used in ((copy, False), ("variables/0", True)):
            out = tmp_path / str(is_used)
            ckptflip.inject(saved_model, out=out, tensors=name, bits="24", count=12, seed=1)
            served = tf.saved_model.load(str(out))
            assert bool((served.serve(x).numpy() != model(x).numpy()).any()) == is_used

    @pytest.mark.parametrize("change", [{"shape": (2,)}, {"dtype": tf.int32}, {"name": "net/bias"}, None])
    def test_of_what_only_looks_like_a_copy(self, tmp_path, change):
        kinds = {"name": "net/kernel", "shape": (3,), "dtype": tf.float32}
        real, other = (
            tf.Variable(tf.ones(k["shape"], k["dtype"]), name=k["name"])
            for k in (kinds, kinds | (change or {}))
        )
        tf.train.Checkpoint(_all_variables=[other], real=real).write(str(tmp_path / "c"))
        checkpoint = open_checkpoint(tmp_path / "c")
        left_out = [s.name for s in checkpoint.skipped if " copy of " in s.reason]
        assert left_out == ([] if change else ["_all_variables/0"])
        assert sum("_all_variables/0" in (t.name, *t.aliases) for t in checkpoint.tensors) == bool(change)

    def test_of_layers_without_a_name(self, tmp_path):
        """Keras calls the variables of layers that `fit` built alike: their places tell them apart."""
        net = tf.train.Checkpoint()
        for name in ("first", "second"):
            layer = tf.train.Checkpoint(_kernel=tf.Variable(tf.ones((2, 2)), name="net/kernel"))
            layer.bias = tf.Variable(tf.ones(2), name="net/bias")
            setattr(net, name, layer)
        net.third = tf.train.Checkpoint(embeddings=tf.Variable(tf.ones((2, 2)), name="net/embeddings"))
        net.write(str(tmp_path / "c"))
        found = [(t.name, t.aliases, t.layer, t.role) for t in open_checkpoint(tmp_path / "c").tensors]
        assert found == [
            ("first/_kernel", (), "first", "weight"),
            ("first/bias", (), "first", "bias"),
            ("second/_kernel", (), "second", "weight"),
            ("second/bias", (), "second", "bias"),
            ("third/embeddings", ("net/embeddings",), "third", "embedding"),
        ]

    def test_of_places_in_lists_are_none(self, tmp_path):
        variable = tf.Variable(tf.ones((2, 2)))
        layer = tf.train.Checkpoint(kernel=variable)
        tf.train.Checkpoint(a=[variable], b=[variable], layer=layer).write(str(tmp_path / "c"))
        found = [(t.name, t.aliases, t.layer, t.role) for t in open_checkpoint(tmp_path / "c").tensors]
        assert found == [("a/0", ("layer/kernel",), "layer", "weight")]

    def test_of_an_optimizer_that_holds_what_it_trains(self, tmp_path):
        kernel, memory = (tf.Variable(tf.ones((2, 2)), name=n) for n in ("dense/kernel", "memory"))
        optimizer = tf.train.Checkpoint(_trainable_variables=[kernel], held=[kernel], memories=[memory])
        tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "c"))
        found = [(t.name, t.aliases, t.layer, t.role) for t in open_checkpoint(tmp_path / "c").tensors]
        assert found == [
            ("dense/kernel", ("optimizer/_trainable_variables/0",), "dense", "weight"),
            ("optimizer/memories/0", ("memory",), "dense", "optimizer"),
        ]

    def test_of_slot_variables(self, tmp_path):
        weights = tf.Variable(tf.ones((2, 2)), name="emb/weights")
        optimizer = tf.compat.v1.train.AdamOptimizer(0.1)
        optimizer.minimize(lambda: tf.reduce_sum(weights * weights))
        tf.train.Checkpoint(net=tf.train.Checkpoint(v=weights), optimizer=optimizer).write(
            str(tmp_path / "c")
        )
        found = {t.name: (t.aliases, t.layer, t.role) for t in open_checkpoint(tmp_path / "c").tensors}
        assert found["emb/weights"] == (("net/v",), "emb", "embedding")
        assert found["emb/weights/Adam"] == (("net/v/.OPTIMIZER_SLOT/optimizer/m",), "emb", "optimizer")
        assert found["optimizer/beta1_power"][2] == "optimizer"

    def test_of_tensorflow_1(self, tmp_path):
        names = ["dense/kernel", "dense/kernel/Adam", "dense/kernel/Adam_1", "dense/bias", "global_step"]
        save(tmp_path / "model.ckpt", {n: tf.ones((2, 2) if "kernel" in n else ()) for n in names})
        found = {t.name: (t.layer, t.role) for t in open_checkpoint(tmp_path / "model.ckpt").tensors}
        assert found == {
            "dense/bias": ("dense", "bias"),
            "dense/kernel": ("dense", "weight"),
            "dense/kernel/Adam": ("dense", "optimizer"),
            "dense/kernel/Adam_1": ("dense", "optimizer"),
            "global_step": ("", "counter"),
        }

    def test_are_unique(self, tmp_path):
        entry = message((1, 1), (2, shape_of(1)), (5, 4))
        keys = [b"w", b"w" + VALUE.encode(), b"x" + VALUE.encode(), b"\xff\xfe"]
        entries = [(k, entry + message((4, 4 * i))) for i, k in enumerate(keys)]
        checkpoint = open_checkpoint(put(tmp_path, table(HEADER, *entries), bytes(16)))
        assert [t.name for t in checkpoint.tensors] == ["w", "w" + VALUE, "x", r"\xff\xfe"]

    def test_fall_back_on_keys_where_the_graph_is_damaged(self, keras_checkpoint, tmp_path):
        for file in siblings(keras_checkpoint.with_name("ckpt-5.index")):
            shutil.copy(file, tmp_path)
        strings = next(
            s
            for s in read_index((tmp_path / "ckpt-5.index").read_bytes()).saved
            if s.key.startswith(b"_CHECK")
        )
        for at, why in ((10, "bytes"), (0, "its length is wrong")):
            with (tmp_path / "ckpt-5.data-00000-of-00001").open("r+b") as file:
                file.seek(strings.offset + at)
                file.write(b"\x81" * 2)
            checkpoint = open_checkpoint(tmp_path / "ckpt-5")
            reason = checkpoint.skipped[0].reason
            assert "damaged, so that tensors go by their keys alone" in reason and why in reason
            assert all(not t.aliases for t in checkpoint.tensors)
            assert len(checkpoint.tensors) == len(open_checkpoint(keras_checkpoint).tensors)
            assert {t.name: t.role for t in checkpoint.tensors}["optimizer/_iterations"] == "counter"

    def test_that_are_real_outlive_a_conversion(self, keras_checkpoint, tmp_path):
        """Into a format that keeps one name of each tensor; keys select as names do."""
        ckptflip.convert(keras_checkpoint, tmp_path / "a.safetensors")
        key = "optimizer/_trainable_variables/0"
        with ckptflip.opened(tmp_path / "a.safetensors") as target:
            found = {t.name: (t.layer, t.role) for t in target.tensors}
        assert found["net/hidden/kernel"] == ("net/hidden", "weight")
        assert found["adam/net_hidden_kernel_momentum"][1] == "optimizer"
        assert found["adam/iteration"][1] == "counter"
        assert not any(n.startswith("optimizer/") for n in found)
        hits = [
            ckptflip.inject(keras_checkpoint, tensors=name, count=3, seed=1, dry_run=True).plan.word.tolist()
            for name in (key, "net/hidden/kernel", "hidden/kernel")
        ]
        assert hits[0] == hits[1] == hits[2]


class TestChecksums:
    def test_tensorflow_stored_what_we_compute(self, tmp_path):
        """In several data files and several blocks of the index, which hold 256 KiB each."""
        names = [f"{i:04d}/{'a long name of a layer/' * 6}kernel" for i in range(4000)]
        save(tmp_path / "many", {n: tf.fill((3,), float(i)) for i, n in enumerate(names)})
        checkpoint = open_checkpoint(tmp_path / "many")
        stored = [f.read_bytes() for f in checkpoint.files]
        inner = [s for s in checkpoint.crcs if s.file]
        blocks = [s for s in checkpoint.crcs if not s.file]
        assert (len(inner), len(blocks) > 1) == (4000, True)
        assert checkpoint.crcs == [*inner, *blocks]
        for each in checkpoint.crcs:
            ((file, at),) = each.places
            data = stored[each.file][each.start : each.start + each.length]
            assert struct.unpack_from("<I", stored[file], at)[0] == masked(data)
        hit = [names[0], names[2000], names[-1]]
        ckptflip.inject(tmp_path / "many", in_place=True, tensors=hit, bits="31", count=9)
        read = tf.train.load_checkpoint(str(tmp_path / "many")).get_tensor
        assert [read(n).tolist() for n in (*hit, names[1])] == [[-0.0] * 3, [-2e3] * 3, [-3999] * 3, [1] * 3]

    def test_who_notices_what(self, keras_checkpoint, tmp_path, model):
        """A tensor's CRC fails it when it is read, a block's CRC the whole index when it is opened."""
        out = tmp_path / "c"
        ckptflip.inject(keras_checkpoint, out=out, tensors="hidden/kernel", count=1, checksum="leave")
        reader = tf.train.load_checkpoint(str(out))
        with pytest.raises(tf.errors.OpError, match="Checksum does not match"):
            reader.get_tensor("optimizer/_trainable_variables/0" + VALUE)
        assert reader.get_tensor("optimizer/_trainable_variables/1" + VALUE).shape == (3,)
        restored = keras_model()
        with pytest.raises(tf.errors.DataLossError, match="Checksum does not match"):
            tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(str(out))
        index, data = siblings(out.with_name("c.index"))
        checkpoint = open_checkpoint(out)
        kernel = next(i for i, t in enumerate(checkpoint.tensors) if t.name == "net/hidden/kernel")
        offset = checkpoint.tensors[kernel].offset
        stored = next(s for s in checkpoint.crcs if (s.file, s.start) == (1, offset))
        raw = bytearray(index.read_bytes())
        new = masked(data.read_bytes()[offset : offset + stored.length])
        raw[stored.places[0][1] : stored.places[0][1] + 4] = struct.pack("<I", new)
        index.write_bytes(raw)
        with pytest.raises(tf.errors.OpError, match="block checksum mismatch"):
            tf.train.load_checkpoint(str(out))
        with pytest.raises(tf.errors.OpError, match="block checksum mismatch"):
            tf.train.Checkpoint(model=restored).read(str(out))

    def test_a_saved_model_notices(self, saved_model, tmp_path):
        out = tmp_path / "net"
        ckptflip.inject(saved_model, out=out, tensors="hidden/kernel", count=1, checksum="leave")
        with pytest.raises(tf.errors.DataLossError, match="Checksum does not match"):
            tf.saved_model.load(str(out))


def test_keys_of_slices(tmp_path):
    """Numbers take more bytes from 64, 8192 … on; zero bytes and 0xff in names are escaped."""
    starts = [0, 10, 63, 64, 8191, 8192, 1 << 20, (1 << 27) - 1, 1 << 34, (1 << 41) + 5]
    name = b"a\x00\xff\xfe\x00"
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "c"),
        tensor_names=[name] * len(starts),
        shape_and_slices=[f"{1 << 42} 300 {start},1:{start % 100},200" for start in starts],
        tensors=[tf.zeros((1, 200))] * len(starts),
    )
    keys = {s.key for s in read_index((tmp_path / "c.index").read_bytes()).saved}
    assert keys == {name, *(slice_key(name, ((s, 1), (s % 100, 200))) for s in starts)}


class TestFiles:
    def test_what_a_path_names(self, keras_checkpoint, saved_model, tmp_path):
        index = keras_checkpoint.with_name("ckpt-5.index")
        assert index_of(keras_checkpoint) == index_of(index) == index
        assert index_of(saved_model) == saved_model / "variables" / "variables.index"
        assert index_of(tmp_path) is None
        assert index_of(tmp_path / "nothing") is None
        assert [f.name for f in siblings(index)] == ["ckpt-5.index", "ckpt-5.data-00000-of-00001"]
        for path in (tmp_path, tmp_path / "nothing", tmp_path / "nothing.index"):
            with pytest.raises(CheckpointError):
                open_checkpoint(path)

    def test_a_missing_data_file(self, tmp_path):
        put(tmp_path, GOLDEN_INDEX)
        (tmp_path / "b.data-00000-of-00001").unlink()
        with pytest.raises(
            CheckpointError, match=r"b\.data-00000-of-00001 does not exist, and 'w' lies in it"
        ):
            open_checkpoint(tmp_path / "b")

    def test_a_new_prefix(self, tmp_path):
        path = put(tmp_path, GOLDEN_INDEX)
        for out in ("new", "other.index", "v1.0"):
            ckptflip.inject(path, out=tmp_path / out, count=1)
            assert len(siblings(tmp_path / f"{out.removesuffix('.index')}.index")) == 2

    def test_listing_reads_no_tensor(self, tmp_path):
        """16 GiB that are a hole in a file."""
        size = 1 << 34
        path = put(tmp_path, table(HEADER, (b"w", message((1, 4), (2, shape_of(size)), (5, size), (6, ~7)))))
        os.truncate(tmp_path / "b.data-00000-of-00001", size)
        assert open_checkpoint(path).tensors[0].size == size
        record = ckptflip.inject(path, in_place=True, count=3, seed=1)
        assert (record.bits_effective, len(record.header.checksums)) == (3, 2)
        assert (tmp_path / "b.data-00000-of-00001").stat().st_blocks < 100


def bundle(entry: bytes, key: bytes = b"w") -> bytes:
    return table(HEADER, (key, entry))


HOSTILE = {
    "empty": (b"", "its last 8 bytes are not"),
    "text": (b"x" * 100, "its last 8 bytes are not"),
    "no header": (table((b"w", b"")), "has no header"),
    "no entries": (table(), "has no header"),
    "later version": (table((b"", message((1, 1), (3, message((2, 2)))))), "version 2"),
    "byte order": (table((b"", message((1, 1), (2, 7)))), "byte order is number 7"),
    "data files": (table((b"", message((1, 1 << 30)))), "claims 1073741824 data files"),
    "offset beyond": (bundle(message((1, 1), (2, shape_of(3)), (4, 1 << 40), (5, 12))), "has 12 bytes"),
    "size beyond": (bundle(message((1, 1), (2, shape_of(4)), (5, 16))), "has 12 bytes"),
    "negative offset": (bundle(message((1, 1), (2, shape_of(1)), (4, (1 << 64) - 4), (5, 4))), "at byte -4"),
    "negative size": (bundle(message((1, 1), (2, shape_of(1)), (5, (1 << 64) - 4))), "claims -4 bytes"),
    "size and shape": (bundle(message((1, 1), (2, shape_of(2)), (5, 12))), "8 bytes are needed"),
    "overflow": (bundle(message((1, 1), (2, shape_of(1 << 62, 1 << 62)), (5, 0))), "more elements than"),
    "overflow by 0": (bundle(message((1, 1), (2, shape_of(0, 1 << 62, 4)), (5, 0))), "more elements than"),
    "negative axis": (bundle(message((1, 1), (2, shape_of(-1, -1)), (5, 4))), "negative length"),
    "unknown shape": (bundle(message((1, 1), (2, message((3, 1))), (5, 4))), "no known number of axes"),
    "axes": (bundle(message((1, 1), (2, shape_of(*[1] * 300)), (5, 4))), "more than 254 axes"),
    "shard": (bundle(message((1, 1), (2, shape_of(1)), (3, 5), (5, 4))), "data file 5 of 1"),
    "negative shard": (bundle(message((1, 1), (2, shape_of(1)), (3, (1 << 64) - 1), (5, 4))), "data file -1"),
    "long entry": (bundle(message((1, 1)) + b"\x08\x01" * (1 << 19)), "has 1048578 bytes"),
    "crc": (bundle(message((1, 1), (6, 5))), "is varint, not 4 bytes"),
    "shape": (bundle(message((1, 1), (2, 5))), "is varint, not length-delimited"),
    "order of keys": (table(HEADER, (b"w", b""), (b"v", b"")), "out of order"),
    "a key twice": (table(HEADER, (b"w", b""), (b"w", b"")), "out of order"),
    "overlap": (
        table(
            HEADER,
            (b"v", message((1, 1), (2, shape_of(2)), (5, 8))),
            (b"w", message((1, 1), (2, shape_of(2)), (4, 4), (5, 8))),
        ),
        "'v' and 'w' overlap",
    ),
}


def sliced(*slices: tuple[int, int], axes: tuple[int, ...] = (3,), dtype: int = 1) -> bytes:
    """A tensor in slices of one axis, whose values lie one after the other."""
    extents = [message((1, message((1, start), (2, length)))) for start, length in slices]
    pairs = [(b"w", message((1, 1), (2, shape_of(*axes)), *((7, e) for e in extents)))]
    at = 0
    for start, length in slices:
        entry = message((1, dtype), (2, shape_of(length)), (4, 4 * at), (5, 4 * length))
        pairs.append((slice_key(b"w", ((start, length),)), entry))
        at += length
    return table(HEADER, *sorted(pairs))


HOSTILE |= {
    "slices overlap": (sliced((0, 1), (0, 2)), "two of its slices overlap"),
    "slice of another dtype": (sliced((0, 1), (1, 2), dtype=3), "another dtype"),
    "slice too long": (sliced((1, 2), axes=(2,)), "does not fit an axis of 2"),
    "slice of more axes": (sliced((0, 3), axes=(3, 1)), "a slice has 1 axes, the tensor 2"),
}


class TestHostileFiles:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_are_refused(self, tmp_path, case):
        index, why = HOSTILE[case]
        with pytest.raises(CheckpointError, match=why):
            open_checkpoint(put(tmp_path, index))

    @pytest.mark.parametrize(
        ("at", "value", "why"),
        [
            (0, 1, "the entry at byte 0 claims more than its block holds"),
            (9, 5, "the entry at byte 9 claims more"),
            (11, 200, "the entry at byte 9 claims more"),
            (11, 0x80, "the entry at byte 9 claims more"),
            (32, 9, "claims 9 restart points"),
            (35, 0x7F, "restart points"),
            (36, 1, "is compressed (snappy)"),
            (36, 9, "is compressed (method 9)"),
            (58, 0x7F, "a data block would lie at bytes 127 to 168, not between 0 and 54"),
            (59, 0x7F, "a data block would lie at bytes 0 to 132"),
            (59, 2, "is compressed (method 6)"),
            (59, 1, "the block at byte 0 is too short"),
            (75, 0x7F, "the index block would lie at bytes 127"),
            (76, 0x7F, "the index block would lie at bytes 54 to 186"),
            (120, 0, "its last 8 bytes are not"),
        ],
    )
    def test_altered_bytes_of_the_table(self, tmp_path, at, value, why):
        raw = bytearray(GOLDEN_INDEX)
        raw[at] = value
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(put(tmp_path, bytes(raw)))
        assert why in str(error.value)

    def test_one_block_named_twice(self, tmp_path):
        data, meta = block([HEADER]), block([])
        handle = number(0) + number(len(data) - 5)
        index = block([(b"a", handle), (b"b", handle)])
        handles = b"\0\0" + number(len(data + meta)) + number(len(index) - 5)
        raw = data + meta + index + handles.ljust(40, b"\0") + GOLDEN_INDEX[-8:]
        with pytest.raises(CheckpointError, match="a data block would lie at bytes 0"):
            open_checkpoint(put(tmp_path, raw))

    def test_keys_that_claim_gigabytes(self, tmp_path):
        """Each of these entries repeats a key of a megabyte and adds a byte to it."""
        body = number(0) + number(1 << 20) + b"\0" + bytes(1 << 20)
        body += b"".join(number((1 << 20) + i) + b"\1\0x" for i in range(10_000))
        body += struct.pack("<II", 0, 1) + bytes(5)
        index = block([(b"x", number(0) + number(len(body) - 5))])
        raw = body + index + (b"\0\0" + number(len(body)) + number(len(index) - 5)).ljust(40, b"\0")
        with pytest.raises(CheckpointError, match="more entries, or longer keys, than any index has"):
            open_checkpoint(put(tmp_path, raw + GOLDEN_INDEX[-8:]))

    def test_slices_that_are_not_here_leave_the_tensor_out(self, tmp_path):
        checkpoint = open_checkpoint(put(tmp_path, sliced((0, 1), (2, 1))))
        assert [(s.name, s.reason) for s in checkpoint.skipped] == [
            ("w", "some of its slices were not saved here")
        ]

    def test_too_many_slices_leave_the_tensor_out(self, tmp_path, monkeypatch):
        monkeypatch.setattr(places, "MOST_SLICES", 1)
        checkpoint = open_checkpoint(put(tmp_path, sliced((0, 1), (1, 2))))
        assert [(s.name, s.reason) for s in checkpoint.skipped] == [("w", "it has more than 1 slices")]

    def test_too_large_a_graph(self, keras_checkpoint, monkeypatch):
        for limit in ("_MOST_NODES", "_MOST_ATTRIBUTES"):
            with monkeypatch.context() as patching:
                patching.setattr(graph, limit, 3)
                reason = open_checkpoint(keras_checkpoint).skipped[0].reason
            assert "more objects than any checkpoint" in reason
        monkeypatch.setattr(bundle_module, "_LARGEST_GRAPH", 3)
        assert "too large to look for names" in open_checkpoint(keras_checkpoint).skipped[0].reason

    def test_a_file_cut_anywhere(self, tmp_path, keras_checkpoint):
        raw = keras_checkpoint.with_name("ckpt-5.index").read_bytes()
        for whole in (GOLDEN_INDEX, raw):
            for length in range(len(whole)):
                with pytest.raises(CheckpointError):
                    open_checkpoint(put(tmp_path, whole[:length]))
        for length in range(len(GOLDEN_DATA)):
            why = rf"b\.data-00000-of-00001 is truncated: it has {length} bytes.* 'w' .* 0 to 12\. Copy or"
            with pytest.raises(CheckpointError, match=why):
                open_checkpoint(put(tmp_path, GOLDEN_INDEX, GOLDEN_DATA[:length]))

    @settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(data=st.data())
    def test_altered_anywhere(self, tmp_path, keras_checkpoint, data):
        """Whatever a file says, it is read, altered or refused with one clear error."""
        which = data.draw(st.sampled_from(["golden", "keras", "slices"]))
        index, shard = GOLDEN_INDEX, GOLDEN_DATA
        if which == "keras":
            index, shard = (f.read_bytes() for f in siblings(keras_checkpoint.with_name("ckpt-5.index")))
        elif which == "slices":
            index = sliced((0, 1), (1, 2))
        index, shard = altered(data, index), altered(data, shard)
        path = put(tmp_path, index, shard)
        try:
            checkpoint = open_checkpoint(path)
            try:
                for i, tensor in enumerate(checkpoint.tensors):
                    assert sum(b.size for b in checkpoint.blocks(i)) == tensor.words
                words = [i for i, t in enumerate(checkpoint.tensors) if t.words]
                ones = np.ones(len(words), np.uint64)
                hit = Changes(np.array(words, np.int32), np.zeros(len(words), np.int64), ones, ones)
                checkpoint.prepare(hit, "repair")
            finally:
                checkpoint.close()
        except CheckpointError:
            pass
        assert path.read_bytes() == index


def altered(data, raw: bytes) -> bytes:
    """Some bytes replaced, taken away or put in."""
    made = bytearray(raw)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, max(len(made) - 1, 0)))
        new = data.draw(st.binary(max_size=6))
        made[at : at + data.draw(st.sampled_from([len(new), 0, 4]))] = new
    return bytes(made)
