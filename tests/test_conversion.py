"""Converting: the same words under the same names in another format, read by that format's own library."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest

import ckptflip
from ckptflip.bits import as_words
from ckptflip.cli.main import run
from ckptflip.errors import CheckpointError, SelectionError, UsageError

SUFFIXES = (".h5", ".safetensors", ".npz", ".pt")
PLAIN = ("bool", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)), "float16", "float32", "float64")


def every_word(dtype: str, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """Random bits of a dtype: signalling NaN among the floats."""
    size = np.dtype(dtype).itemsize if dtype != "bool" else 1
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, (*shape, size), np.uint8)
    return np.ascontiguousarray(raw).view(dtype).reshape(shape)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One tensor of every dtype that all formats have, a scalar, an empty one."""
    with h5py.File(tmp_path / "source.h5", "w") as file:
        for dtype in PLAIN:
            file[f"layer/{dtype}"] = every_word(dtype)
        file["c64"] = every_word("complex64")
        file["scalar"] = np.float32(1.5)
        file["empty"] = np.zeros((0, 4), "f4")
    return tmp_path / "source.h5"


def words_of(path: Path) -> dict[str, np.ndarray]:
    """What the format's own library reads."""
    if path.suffix == ".h5":
        found: dict[str, np.ndarray] = {}
        with h5py.File(path) as file:
            file.visititems(lambda n, o: found.update({n: o[()]}) if isinstance(o, h5py.Dataset) else None)
    elif path.suffix == ".npz":
        with np.load(path) as archive:
            found = {n: archive[n] for n in archive.files}
    elif path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        found = load_file(path)
    else:
        torch = pytest.importorskip("torch")
        found = flat(torch.load(path, weights_only=True))
    return {n: as_words(np.ascontiguousarray(a)) for n, a in found.items()}


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    found = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value.numpy()}
        )
    return found


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_formats_own_library_reads_the_same_words(source: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    out = tmp_path / f"out{suffix}"
    done = ckptflip.convert(source, out)
    expected, found = words_of(source), words_of(out)
    assert set(found) == set(expected) and done.tensors == len(expected)
    for name, words in expected.items():
        np.testing.assert_array_equal(found[name], words, name)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(SUFFIXES, 2)))
def test_there_and_back(source: Path, tmp_path: Path, one: str, other: str) -> None:
    ckptflip.convert(source, tmp_path / f"a{one}")
    ckptflip.convert(tmp_path / f"a{one}", tmp_path / f"b{other}")
    ckptflip.convert(tmp_path / f"b{other}", tmp_path / f"c{one}")
    assert all(r.status == "same" for r in ckptflip.diff(source, tmp_path / f"c{one}"))


@pytest.mark.parametrize("suffix", [".h5", ".pt", ".safetensors"])
def test_dtypes_of_machine_learning(tmp_path: Path, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    state = {
        name: torch.arange(24, dtype=torch.uint8).view(getattr(torch, name)).reshape(2, -1)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16")
    }
    torch.save(state, tmp_path / "a.pt")
    ckptflip.convert(tmp_path / "a.pt", tmp_path / f"b{suffix}")
    ckptflip.convert(tmp_path / f"b{suffix}", tmp_path / "c.pt")
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


def test_what_was_one_storage_stays_one(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(2, 2)
    torch.save({"embedding.weight": weight, "head.weight": weight}, tmp_path / "a.pt")
    assert ckptflip.convert(tmp_path / "a.pt", tmp_path / "b.h5").lost_names == ()
    with h5py.File(tmp_path / "b.h5") as file:
        assert file["embedding.weight"] == file["head.weight"]
    ckptflip.convert(tmp_path / "b.h5", tmp_path / "c.pt")
    back = torch.load(tmp_path / "c.pt", weights_only=True)
    assert back["embedding.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert ckptflip.convert(tmp_path / "c.pt", tmp_path / "d.npz").lost_names == ("head.weight",)


def test_keys_of_a_state_dict_stay_text(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.ParameterList([torch.ones(2), torch.zeros(3)])
    torch.save(module.state_dict(), tmp_path / "a.pt")
    ckptflip.convert(tmp_path / "a.pt", tmp_path / "b.pt")
    module.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    names = {"optimizer/state/0/exp_avg": 0, "007": 1, "7": 2, "9" * 5000: 3}
    np.savez(tmp_path / "n.npz", **{n: np.float32(v) for n, v in names.items()})
    ckptflip.convert(tmp_path / "n.npz", tmp_path / "n.pt")
    back = torch.load(tmp_path / "n.pt", weights_only=True)
    assert float(back["optimizer"]["state"][0]["exp_avg"]) == 0
    assert [float(back[n]) for n in ("007", "7", "9" * 5000)] == [1, 2, 3]


def test_big_endian_words_are_turned(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(5, dtype=">f4")
    ckptflip.convert(tmp_path / "a.h5", tmp_path / "b.npz")
    with np.load(tmp_path / "b.npz") as found:
        assert found["x"].dtype == np.dtype("<f4") and found["x"].tolist() == [0, 1, 2, 3, 4]


def test_only_what_is_selected(source: Path, tmp_path: Path) -> None:
    done = ckptflip.convert(source, tmp_path / "b.npz", tensors=("layer/float*", "!layer/float16"))
    with np.load(tmp_path / "b.npz") as found:
        assert sorted(found.files) == ["layer/float32", "layer/float64"] and done.tensors == 2
    with pytest.raises(SelectionError):
        ckptflip.convert(source, tmp_path / "c.npz", tensors="nothing")
    assert not (tmp_path / "c.npz").exists()


def test_the_same_conversion_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        for name in "ab":
            ckptflip.convert(source, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("name", "dtype", "suffix", "why"),
    [
        ("x", "bfloat16", ".npz", "no bfloat16"),
        ("x", "complex128", ".safetensors", "no complex128"),
        ("x", "float4_e2m1fn", ".pt", "no float4_e2m1fn"),
        ("__metadata__", "float32", ".safetensors", "keeps this name"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, dtype: str, suffix: str, why: str
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kept = np.zeros(4, getattr(ml_dtypes, dtype, dtype))
        data = kept.view(f"V{kept.itemsize}") if hasattr(ml_dtypes, dtype) else kept
        file[name] = data
        file[name].attrs["dtype"] = dtype
        file["y"] = np.ones(2, "f4")
    with pytest.raises(CheckpointError, match=why) as error:
        ckptflip.convert(tmp_path / "a.h5", tmp_path / f"b{suffix}")
    assert f"!{name}" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    ckptflip.convert(tmp_path / "a.h5", tmp_path / f"b{suffix}", tensors=f"!{name}")


def test_names_that_cannot_stand_side_by_side(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"w": np.ones(2), "w/x": np.ones(2)})
    for suffix in (".h5", ".pt"):
        with pytest.raises(CheckpointError, match="cannot"):
            ckptflip.convert(tmp_path / "a.npz", tmp_path / f"b{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_outputs_that_cannot_be(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = source.read_bytes()
    for arguments, hint in (
        ((source, tmp_path / "b.onnx"), "no format is known by '.onnx'"),
        ((source, tmp_path / "b"), "use one of"),
        ((source, source), "exists"),
        ((source, source, "--overwrite"), "is the checkpoint that is read"),
        ((source, tmp_path / "no" / "b.npz"), "cannot be written"),
        ((tmp_path / "no.h5", tmp_path / "b.npz"), "does not exist"),
    ):
        assert run(["convert", *map(str, arguments)]) in (1, 2)
        assert hint in capsys.readouterr().err
    assert source.read_bytes() == before
    with pytest.raises(UsageError):
        ckptflip.convert(source, tmp_path / "b.txt")


def test_the_command_says_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(2, "f4")
        file["y"] = file["x"]
        file["note"] = "text"
    assert run(["convert", str(tmp_path / "a.h5"), str(tmp_path / "b.npz")]) == 0
    said = capsys.readouterr().err
    assert "1 tensor, 8 bytes" in said and "1 other name of" in said and "1 entry left out" in said
