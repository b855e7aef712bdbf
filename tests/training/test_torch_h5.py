"""torch_h5: what went in comes out, bit for bit; what cannot go in, or was damaged, is named."""

import collections
import math
import random
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from ckptflip import torch_h5  # noqa: E402
from ckptflip.errors import CheckpointError, MissingExtraError  # noqa: E402
from ckptflip.torch_h5 import arrays  # noqa: E402

DTYPES = [*arrays._NATIVE, *arrays._OPAQUE]


def tensor_of(dtype, shape, data: bytes):
    """A tensor of exactly these bytes."""
    if not data:
        return torch.empty(0, dtype=torch.uint8).view(dtype).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor) -> bytes:
    return arrays._tensor_bytes(tensor).tobytes()


def same(a, b) -> bool:
    """Equal in type, order and bits, at every depth."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        kept = ("dtype", "shape", "requires_grad")
        return all(getattr(a, k) == getattr(b, k) for k in kept) and raw(a) == raw(b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, dict):
        return (
            len(a) == len(b)
            and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
            and same(getattr(a, "_metadata", None), getattr(b, "_metadata", None))
        )
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return a == b


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = math.prod(shape) * dtype.itemsize
    return tensor_of(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


@st.composite
def numpy_arrays(draw):
    name = draw(
        st.sampled_from(["<f4", ">f4", "|b1", ">i8", "<u2", "<c8", "<U3", "|S2", "<M8[s]", "bfloat16"])
    )
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)


texts = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["", ".", "..", "a/b", "a\0b", "\udc80", "%2F", "keys", "name", "container", "ckptflip", "x" * 300]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.binary(max_size=4), st.complex_numbers(),
    st.sampled_from([
        10**4000, -(2**9000), struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000123))[0],
        torch.Size([1, 2]), torch.Size([]), torch.bfloat16, torch.device("cuda:1"),
        np.float32(1.5), np.int64(-3), np.bool_(True), ml_dtypes.bfloat16(2), np.str_("é"),
        np.uint32(0x7F800001).view(np.float32),
    ]),
)  # fmt: skip
keys = texts | st.integers(-3, 3) | st.none() | st.booleans() | st.floats(allow_nan=False)
keys = keys | st.tuples(keys, keys)
states = st.dictionaries(
    keys,
    st.recursive(
        scalars | tensors() | numpy_arrays(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys, inner, max_size=3),
            st.dictionaries(keys, inner, max_size=3).map(collections.OrderedDict),
        ),
        max_leaves=8,
    ),
    max_size=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states)
def test_any_state_comes_back(tmp_path, state):
    torch_h5.save(state, tmp_path / "s.h5")
    assert same(torch_h5.load(tmp_path / "s.h5"), state)
    assert list(tmp_path.iterdir()) == [tmp_path / "s.h5"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_pattern_of_every_dtype_comes_back(tmp_path, dtype):
    data = np.random.default_rng(0).permutation(np.arange(4096) % 256).astype(np.uint8).tobytes()
    tensor = tensor_of(dtype, (-1,), data)
    torch_h5.save({"t": tensor, "first": tensor[0]}, tmp_path / "s.h5")
    loaded = torch_h5.load(tmp_path / "s.h5")
    assert (loaded["t"].dtype, raw(loaded["t"])) == (dtype, data)
    assert (loaded["first"].shape, raw(loaded["first"])) == ((), data[: dtype.itemsize])


@pytest.mark.parametrize(
    ("dtype", "word"),
    [
        (torch.float32, 0x7F800001),
        (torch.float16, 0x7C01),
        (torch.bfloat16, 0x7F81),
        (torch.float64, 0x7FF << 52 | 1),
    ],
    ids=str,
)
def test_a_signalling_nan_stays_signalling(tmp_path, dtype, word):
    data = word.to_bytes(dtype.itemsize, "little")
    torch_h5.save({"m": {"w": tensor_of(dtype, (1,), data)}}, tmp_path / "s.h5")
    assert data in (tmp_path / "s.h5").read_bytes()
    assert raw(torch_h5.load(tmp_path / "s.h5")["m"]["w"]) == data


def test_the_file_reads_as_documented(tmp_path):
    state = {
        "model": {"conv1.weight": torch.ones(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {"param_groups": [{"lr": 0.1, "params": [0]}]},
        "epoch": 5,
    }
    torch_h5.save(state, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert file.attrs["ckptflip"] == "torch_h5/1"
        weight = file["model/conv1.weight"]
        assert (weight.dtype.str, weight.chunks, weight.shape) == ("<f4", None, (2, 3))
        assert (file["model/half"].dtype, file["model/half"].attrs["dtype"]) == (np.dtype("V2"), "bfloat16")
        assert file["optimizer/param_groups/0"].attrs["lr"] == "0.1"
        assert file.attrs["epoch"] == "5"


def test_float8_and_complex32_carry_the_names_of_ml_dtypes(tmp_path):
    torch_h5.save(
        {str(dtype): tensor_of(dtype, (1,), bytes(dtype.itemsize)) for dtype in arrays._OPAQUE},
        tmp_path / "s",
    )
    with h5py.File(tmp_path / "s") as file:
        names = {name.removeprefix("torch."): d.attrs["dtype"] for name, d in file.items()}
    assert all(name == stored for name, stored in names.items())
    assert all(hasattr(ml_dtypes, name) for name in names if name.startswith(("float8", "bfloat")))


def test_states_of_an_optimizer_carry_the_names_of_their_parameters(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch_h5.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        names = [file[f"optimizer/state/{i}"].attrs["name"] for i in range(4)]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    loaded = torch_h5.load(tmp_path / "s.h5")
    assert same(loaded["optimizer"], optimizer.state_dict())
    assert loaded["model"]._metadata == model.state_dict()._metadata


def test_tied_tensors_are_one_dataset_and_one_object(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "a": weight,
        "b": [weight.view(2, 3)],
        "c": weight.clone(),
        "d": weight[:1],
        "e": torch.empty(0),
        "f": torch.empty(0),
    }
    torch_h5.save(state, tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["a"] == file["b/0"]
        assert file["a"] != file["c"]
    loaded = torch_h5.load(tmp_path / "s.h5")
    assert loaded["a"] is loaded["b"][0]
    assert loaded["a"] is not loaded["c"]
    assert loaded["e"] is not loaded["f"]
    assert same(loaded, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool], ids=str)
def test_dense_strides_come_back(tmp_path, dtype):
    data = np.random.default_rng(1).integers(0, 256, 120 * dtype.itemsize, dtype=np.uint8).tobytes()
    tensor = tensor_of(dtype, (2, 3, 4, 5), data)
    state = {
        "last": tensor.contiguous(memory_format=torch.channels_last),
        "t": tensor[0, 0].T,
        "cut": tensor[:, ::2],
    }
    torch_h5.save(state, tmp_path / "s.h5")
    loaded = torch_h5.load(tmp_path / "s.h5")
    assert same(loaded, state)
    assert loaded["last"].stride() == state["last"].stride()
    assert loaded["t"].stride() == (1, 5)
    assert loaded["cut"].is_contiguous()
    with h5py.File(tmp_path / "s.h5") as file:
        assert file["last"].shape == (2, 3, 4, 5)


def test_parameters_conjugates_and_generator_states_come_back(tmp_path):
    python, legacy, modern = random.Random(3), np.random.RandomState(3), np.random.PCG64(3)
    conj = torch.tensor([1 + 2j]).conj()
    state = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(1, requires_grad=True), "conj": conj, "counter": collections.Counter({3: 1}),
        "python": python.getstate(), "legacy": legacy.get_state(legacy=False), "modern": modern.state,
        "huge": 10**5000,
        "torch": torch.get_rng_state(),
    }  # fmt: skip
    torch_h5.save(state, tmp_path / "s.h5")
    loaded = torch_h5.load(tmp_path / "s.h5")
    assert same(loaded, state)
    again = random.Random()
    again.setstate(loaded["python"])
    assert again.random() == python.random()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.empty(1, dtype=torch.uint4), "uint4"),
        ({1, 2}, "set"),
        (collections.defaultdict(list), "plain dict"),
        (object(), "object"),
        ({b"x": 1}, "key b'x'"),
        (np.array([None]), "dtype object"),
        (np.zeros(1, "i4,f4"), "dtype"),
        (print, "builtin"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_stored_is_named_by_its_place(tmp_path, value, said):
    with pytest.raises(CheckpointError, match=r"state\['outer'\]\[1\]") as caught:
        torch_h5.save({"outer": [torch.ones(1), value]}, tmp_path / "s.h5")
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointError, match=r"state\['q'\] is a quantised tensor"):
        torch_h5.save({"q": quantised}, tmp_path / "s.h5")


def test_a_state_that_holds_itself_is_refused(tmp_path):
    state: dict = {}
    state["again"] = state
    with pytest.raises(CheckpointError, match="holds itself"):
        torch_h5.save(state, tmp_path / "s.h5")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "s.h5"
    torch_h5.save({"epoch": 1}, path)
    with pytest.raises(CheckpointError):
        torch_h5.save({"epoch": 2, "bad": {1}}, path)
    assert torch_h5.load(path) == {"epoch": 1}
    with pytest.raises(CheckpointError, match="could not be written"):
        torch_h5.save({}, tmp_path / "missing" / "s.h5")


def test_a_full_disk_leaves_nothing(tmp_path):
    code = (
        "import resource, sys, torch; from ckptflip import torch_h5, errors\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: torch_h5.save({'w': torch.ones(1_000_000), 'v': torch.ones(10)}, sys.argv[1])\n"
        "except errors.CheckpointError as error: print('refused:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s.h5")], capture_output=True, text=True
    )
    assert done.stdout.startswith("refused:"), done.stderr
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_any_flip_of_a_dataset_still_loads(tmp_path):
    path = tmp_path / "s.h5"
    state = {str(dtype): tensor_of(dtype, (4,), bytes(4 * dtype.itemsize)) for dtype in DTYPES}
    torch_h5.save(state, path)
    with h5py.File(path) as file:
        places = {name: (d.id.get_offset(), d.id.get_storage_size()) for name, d in file.items()}
    content = bytearray(path.read_bytes())
    for offset, size in places.values():
        content[offset : offset + size] = bytes([9]) * size
    path.write_bytes(content)
    assert all(set(raw(tensor)) == {9} for tensor in torch_h5.load(path).values())


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "s.h5"
    torch_h5.save({"model": {"w": torch.ones(30, 30)}, "rng": random.Random(1).getstate(), "n": 1}, path)
    return path


def test_missing_foreign_and_empty_files_are_named(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        torch_h5.load(tmp_path / "nothing.h5")
    for name, content in {"empty": b"", "text": b"hello", "zip": b"PK\3\4" + bytes(100)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is not an HDF5 file"):
            torch_h5.load(tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(CheckpointError, match="not a training state"):
        torch_h5.load(tmp_path / "other.h5")
    with pytest.raises(CheckpointError, match="not an HDF5 file"):
        torch_h5.load(tmp_path)


def test_every_truncation_is_an_error(saved):
    content = saved.read_bytes()
    for length in range(0, len(content) - 1, 97):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            torch_h5.load(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f["model"].__delitem__("w"),
        lambda f: f["model"].attrs.__delitem__("keys"),
        lambda f: f["model"].attrs.__setitem__("keys", "{not json"),
        lambda f: f["model"].attrs.__setitem__("container", "eval"),
        lambda f: f["model/w"].attrs.__setitem__("dtype", "bfloat16"),
        lambda f: f["model/w"].attrs.__setitem__("dtype", "float99"),
        lambda f: f["model/w"].attrs.__setitem__("stride", [1, 1]),
        lambda f: f.attrs.__setitem__("n", '{"os.system": "true"}'),
        lambda f: f.attrs.__setitem__("n", "[" * 100_000),
        lambda f: (
            f.__delitem__("model/w"),
            f["model"].__setitem__("w", h5py.ExternalLink("/etc/passwd", "/")),
        ),
        lambda f: (f.__delitem__("model/w"), f["model"].__setitem__("w", f["/"])),
        lambda f: (f.__delitem__("model/w"), f["model"].create_dataset("w", (1 << 50,), "f4")),
        lambda f: (f.__delitem__("model/w"), f["model"].__setitem__("w", "text")),
    ],
)
def test_damage_to_the_structure_is_one_clear_error(saved, damage):
    with h5py.File(saved, "r+") as file:
        damage(file)
    with pytest.raises(CheckpointError, match="damaged"):
        torch_h5.load(saved)


def test_random_damage_never_shows_a_traceback(saved):
    rng = np.random.default_rng(0)
    content = saved.read_bytes()
    for _ in range(150):
        altered = bytearray(content)
        altered[rng.integers(len(content))] ^= 1 << rng.integers(8)
        saved.write_bytes(altered)
        try:
            torch_h5.load(saved)
        except CheckpointError as error:
            assert str(saved) in str(error)


def test_missing_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"ckptflip\[torch\]"):
        torch_h5.load(tmp_path / "s.h5")
