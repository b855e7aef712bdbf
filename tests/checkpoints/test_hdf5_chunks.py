"""Single chunks through HDF5's filters, with filters that were skipped for some of them."""

import zlib

import h5py
import hdf5_zoo as zoo
import numpy as np
import pytest

import ckptflip
from ckptflip.checkpoints.hdf5.chunks import ChunkCodec, write_chunk
from ckptflip.errors import CheckpointError

FILTERS = {
    "lzf": {"compression": "lzf"},
    "gzip": {"compression": "gzip"},
    "lzf after shuffle": {"compression": "lzf", "shuffle": True},
    "lzf and checksum": {"compression": "lzf", "fletcher32": True},
}


def masks(path) -> list[int]:
    with h5py.File(path) as file:
        chunks = file["x"].id
        return [chunks.get_chunk_info(i).filter_mask for i in range(chunks.get_num_chunks())]


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("kind", FILTERS)
def test_chunks_that_stop_and_start_to_compress(tmp_path, libver, kind):
    """lzf leaves a chunk as it is when it cannot make it smaller, and says so in the chunk's mask."""
    with h5py.File(tmp_path / "a.h5", "w", libver=libver) as file:
        data = np.zeros((4, 64), "u1")
        data[2:] = np.random.default_rng(0).integers(0, 256, (2, 64))
        file.create_dataset("x", data=data, chunks=(1, 64), **FILTERS[kind])
    for fault, out in (("flip", "b.h5"), ("value:0", "c.h5")):
        amount = {"fraction": 0.5} if fault == "flip" else {"rows": "1,3", "fraction": 1.0}
        record = ckptflip.inject(tmp_path / "a.h5", out=tmp_path / out, fault=fault, seed=1, **amount)
        wanted = zoo.expected(tmp_path / "a.h5", record)["x"]
        with h5py.File(tmp_path / out) as file:
            assert file["x"][()].tobytes() == wanted
        before = (tmp_path / "a.h5").read_bytes()
        undone = ckptflip.undo(tmp_path / out, record.path, out=tmp_path / f"undone-{out}")
        assert undone.restored == record.header.counts.words_effective
        with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / f"undone-{out}") as b:
            assert a["x"][()].tobytes() == b["x"][()].tobytes()
        assert (tmp_path / "a.h5").read_bytes() == before
    if kind == "lzf":
        assert masks(tmp_path / "a.h5") == [0, 0, 1, 1]
        assert masks(tmp_path / "b.h5") == [1, 1, 1, 1] and masks(tmp_path / "c.h5") == [0, 0, 1, 0]


@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_chunk_of_the_same_size_and_another_mask(tmp_path, libver):
    for first, second in ((0, 1), (1, 0), (1, 1), (0, 0)):
        with h5py.File(tmp_path / "a.h5", "w", libver=libver) as file:
            made = file.create_dataset("x", shape=(20,), dtype="u1", chunks=(9,), compression="lzf")
            made.id.write_direct_chunk((0,), bytes(9), first)
        with h5py.File(tmp_path / "a.h5", "r+") as file:
            write_chunk(file["x"].id, (0,), bytes(range(9)), second)
        with h5py.File(tmp_path / "a.h5") as file:
            assert file["x"].id.read_direct_chunk((0,)) == (second, bytes(range(9)))


def test_a_codec_decodes_chunks_of_different_masks_in_turn(tmp_path):
    """One stored form, with and without the shuffle skipped: two different contents of one size."""
    plain = np.arange(40, dtype="<u2")
    stored = zlib.compress(plain.tobytes())
    shuffled = np.frombuffer(plain.tobytes(), "u1").reshape(2, 40).T.copy().view("<u2")[:, 0]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset(
            "x", shape=(40,), dtype="<u2", chunks=(40,), compression="gzip", shuffle=True
        )
        codec = ChunkCodec(made.id, "x")
        for mask in (0, 1, 0, 1, 1, 0, 0):
            wanted = plain if mask else shuffled
            assert codec.decode(stored, mask).reshape(-1).view("<u2").tolist() == wanted.tolist(), mask


def test_a_chunk_that_no_filter_can_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("x", shape=(40,), dtype="<u2", chunks=(40,), compression="gzip")
        made.id.write_direct_chunk((0,), b"this is not what gzip writes", 0)
        file["y"] = np.ones(3)
    for verb in (
        lambda: ckptflip.inject(tmp_path / "a.h5", tensors="x", seed=1),
        lambda: ckptflip.inject(tmp_path / "a.h5", tensors="x", seed=1, in_place=True),
        lambda: ckptflip.diff(tmp_path / "a.h5", tmp_path / "a.h5"),
    ):
        with pytest.raises(CheckpointError, match="x: a chunk cannot be decoded"):
            verb()
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    assert ckptflip.inject(tmp_path / "a.h5", tensors="y", seed=1).bits_effective == 1


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"fletcher32": True}])
@pytest.mark.parametrize("held", [0, 64, 4096 * 4 + 4, 1 << 24])
def test_a_chunk_that_inflates_to_another_size(tmp_path, options, held):
    """HDF5 would read beyond a short one, and fill the memory with a long one."""
    import zlib

    from ckptflip.checkpoints.hdf5.chunks import with_checksum

    path = tmp_path / "a.h5"
    data = zlib.compress(bytes(held))
    with h5py.File(path, "w") as file:
        made = file.create_dataset("w", (4096,), "f4", chunks=(4096,), compression="gzip", **options)
        made.id.write_direct_chunk((0,), with_checksum(data) if "fletcher32" in options else data)
    for verb in (
        lambda: ckptflip.scan(path),
        lambda: ckptflip.inject(path, seed=1),
        lambda: ckptflip.convert(path, tmp_path / "b.npz"),
    ):
        with pytest.raises(CheckpointError, match="a chunk of 16384 bytes decodes to"):
            verb()
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
