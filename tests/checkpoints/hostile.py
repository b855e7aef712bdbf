"""Files that lie: mutations of a sound file, and the only thing that may come of opening them."""

import numpy as np
from hypothesis import strategies as st

from ckptflip.errors import CheckpointError

# What sizes, offsets and counts are best made to claim.
CLAIMS = (0, 1, 2, 7, 8, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)


@st.composite
def damaged(draw, sound):
    """One of some sound files with a few of its bytes altered, cut, doubled or made to claim too much."""
    data = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        # Headers stand at the front (or, in archives, at the back); half of the damage goes there.
        if draw(st.booleans()):
            at = min(at, 64) if draw(st.booleans()) else max(at, len(data) - 64)
        kind = draw(st.sampled_from(["flip", "byte", "claim", "cut", "drop", "double", "text"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "claim":
            size, order = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            value = draw(st.sampled_from(CLAIMS) | st.integers(0, 2 * len(data)))
            data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, order)
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        elif kind == "text":
            data[at : at + 1] = draw(
                st.sampled_from([b"-1", b"9" * 25, b"[", b"{", b"'", b'"', b",", b"null"])
            )
    return bytes(data)


def check(open_checkpoint, path, data):
    """Open what lies in a file and read it: it is sound, or a CheckpointError says what is wrong."""
    path.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        try:
            for i, tensor in enumerate(checkpoint.tensors):
                some = np.unique(np.linspace(0, max(tensor.words - 1, 0), 5).astype(np.int64))
                assert checkpoint.read(i, some[: tensor.words]).size == min(some.size, tensor.words)
                if tensor.words < 1 << 20:
                    assert sum(b.size for b in checkpoint.blocks(i)) == tensor.words
        finally:
            checkpoint.close()
    except CheckpointError as why:
        assert str(path) in str(why)
    assert path.read_bytes() == data


def check_truncated(open_checkpoint, path, data, header):
    """Cut a file at every byte of its header: each time a CheckpointError, never a catalogue."""
    for length in range(header):
        path.write_bytes(data[:length])
        try:
            open_checkpoint(path)
        except CheckpointError as why:
            assert str(path) in str(why)
        else:
            raise AssertionError(f"opened with {length} of its {len(data)} bytes")


def all_words(checkpoint):
    """Every word that ckptflip reads, by tensor; read at once and in blocks alike."""
    found = {}
    for i, tensor in enumerate(checkpoint.tensors):
        words = checkpoint.read(i, np.arange(tensor.words, dtype=np.int64))
        blocks = list(checkpoint.blocks(i))
        whole = np.concatenate(blocks) if blocks else words[:0]
        np.testing.assert_array_equal(words, whole, tensor.name)
        found[tensor.name] = words
    return found
