"""HDF5 files of every kind, and a look at them that does not go through ckptflip.

`build` writes one file with everything a checkpoint may hold. `snapshot` reads a file with h5py alone: the
raw bytes of every dataset, every attribute and every link. `expected` says what the bytes must be after a
record's faults.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

BF16_WORDS = np.array([0x3F80, 0x7F81, 0xFF80, 0x0001, 0x8000, 0x4049], "<u2")
SIGNALLING = np.array([0x7F800001, 0xFFBFFFFF, 0x7F812345, 0x3F800000], "<u4")

# name → (shape, dtype, layout); what `build` writes that has bits to alter.
TENSORS = {
    "contiguous": ((30, 4), "float32", "contiguous"),
    "big": ((7, 3), ">float64", "contiguous"),
    "big_int": ((9,), ">int16", "contiguous"),
    "chunked": ((30, 11), "float32", "chunked"),
    "gzip": ((30, 11), "float16", "chunked, gzip"),
    "gzip_shuffle": ((30, 11), "float32", "chunked, shuffle, gzip"),
    "lzf": ((31,), "int64", "chunked, lzf"),
    "scale_offset": ((31,), "int64", "chunked, scale-offset"),
    "fletcher": ((31,), "float32", "chunked, fletcher32"),
    "gzip_fletcher": ((30, 11), "float32", "chunked, gzip, fletcher32"),
    "compact": ((5,), "float32", "compact"),
    "external": ((10,), "float32", "external"),
    "virtual": ((10,), "float32", "virtual"),
    "unallocated": ((5, 6), "float32", "unallocated"),
    "partial": ((50, 6), "float32", "chunked"),
    "scalar": ((), "float32", "contiguous"),
    "empty": ((0, 3), "float64", "unallocated"),
    "compound.a": ((5,), "float32", "contiguous"),
    "compound.b": ((5, 3), ">int16", "contiguous"),
    "compound.n.q": ((5,), "float64", "contiguous"),
    "enum": ((3,), "uint8", "contiguous"),
    "bool": ((2,), "bool", "contiguous"),
    "bits": ((4,), "uint16", "contiguous"),
    "bf16_opaque": ((6,), "bfloat16", "contiguous"),
    "bf16_integer": ((2, 3), "bfloat16", "contiguous"),
    "complex": ((5,), "complex64", "contiguous"),
    "complex_pair": ((3,), "complex128", "contiguous"),
    "signalling": ((4,), "float32", "contiguous"),
    "g/deep/seven": ((2, 1, 2, 1, 2, 1, 2), "float64", "contiguous"),
    "g/conv1.weight": ((2, 2), "float32", "contiguous"),
    "g/conv10.weight": ((2, 2), "float32", "contiguous"),
    "a b": ((2,), "float32", "contiguous"),
    "ü": ((2,), "float32", "contiguous"),
    "x[0]*?": ((2,), "float32", "contiguous"),
    "raw\\xff": ((2,), "float32", "contiguous"),
}
# name → words of the reason.
SKIPPED = {
    "null": "null",
    "text": "strings",
    "texts": "strings",
    "references": "references",
    "ragged": "variable-length",
    "compound_of_text": "strings",
    "compound_of_ragged": "variable-length parts",
    "opaque": "without a dtype attribute",
    "scale_offset_float": "lossy",
    "view": "a view of other datasets in this file",
    "dangling": "dangling",
    "elsewhere": "another file",
    "soft_elsewhere": "another file",
}
ALIASES = {
    "contiguous": {"g/alias", "soft", "gg/alias", "softgroup/alias"},
    "g/deep/seven": {"gg/deep/seven", "softgroup/deep/seven", "softdeep/seven"},
    "g/conv1.weight": {"gg/conv1.weight", "softgroup/conv1.weight"},
    "g/conv10.weight": {"gg/conv10.weight", "softgroup/conv10.weight"},
}


def write_words(parent, name: str | bytes, words: np.ndarray, dtype, **options) -> h5py.Dataset:
    """A dataset of exactly these bytes: no number is made of them on the way."""
    dataset = parent.create_dataset(name, shape=words.shape, dtype=dtype, **options)
    if words.size:
        kind = dataset.id.get_type()
        dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, as_records(words, kind.get_size()), kind)
    return dataset


def as_records(words: np.ndarray, size: int) -> np.ndarray:
    """Any array as opaque records of `size` bytes, in the same shape."""
    return np.ascontiguousarray(words).reshape(-1).view(f"V{size}").reshape(words.shape)


def compact(parent, name: str, words: np.ndarray, dtype) -> None:
    """A dataset in compact layout, which h5py has no option for."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    creation.set_obj_track_times(False)
    space = h5py.h5s.create_simple(words.shape)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    made = h5py.h5d.create(parent.id, name.encode(), kind, space, creation)
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, as_records(words, kind.get_size()), kind)


def build(path: Path, **options) -> Path:
    """One file with everything in it, and the files beside it that it refers to."""
    r = np.random.default_rng(0)
    normal = lambda *shape: r.normal(size=shape).astype("f4")  # noqa: E731
    with h5py.File(path.with_name("other.h5"), "w") as file:
        file["x"] = np.arange(10, dtype="f4")
    with h5py.File(path, "w", **options) as file:
        file.attrs["note"] = "kept"
        file["contiguous"] = normal(30, 4)
        file["contiguous"].attrs["scale"] = np.float64(0.1)
        file["big"] = normal(7, 3).astype(">f8")
        file["big_int"] = np.arange(9, dtype=">i2")
        _chunked(file, normal)
        _unusual_layouts(file, path, normal)
        _unusual_types(file)
        _names_and_links(file, path, normal)
    return path


def _chunked(file, normal) -> None:
    two = {"chunks": (7, 3)}
    file.create_dataset("chunked", data=normal(30, 11), **two)
    file.create_dataset("gzip", data=normal(30, 11).astype("f2"), compression="gzip", **two)
    file.create_dataset("gzip_shuffle", data=normal(30, 11), compression="gzip", shuffle=True, **two)
    file.create_dataset("lzf", data=np.arange(31), chunks=(7,), compression="lzf")
    file.create_dataset("scale_offset", data=np.arange(31) % 9, chunks=(7,), scaleoffset=0)
    file.create_dataset("scale_offset_float", data=normal(31), chunks=(7,), scaleoffset=3)
    file.create_dataset("fletcher", data=normal(31), chunks=(7,), fletcher32=True)
    file.create_dataset("gzip_fletcher", data=normal(30, 11), compression="gzip", fletcher32=True, **two)
    file.create_dataset("partial", shape=(50, 6), dtype="f4", chunks=(10, 6), fillvalue=1.5)[12] = 3


def _unusual_layouts(file, path: Path, normal) -> None:
    compact(file, "compact", normal(5), "f4")
    segments = [(str(path.with_suffix(".raw1")), 4, 12), (str(path.with_suffix(".raw2")), 0, 28)]
    file.create_dataset("external", data=np.arange(10, dtype="f4"), external=segments)
    layout = h5py.VirtualLayout((10,), "f4")
    layout[:] = h5py.VirtualSource(str(path.with_name("other.h5")), "x", (10,))
    file.create_virtual_dataset("virtual", layout)
    layout = h5py.VirtualLayout((30, 4), "f4")
    layout[:] = h5py.VirtualSource(file["contiguous"])
    file.create_virtual_dataset("view", layout)
    file.create_dataset("unallocated", shape=(5, 6), dtype="f4", fillvalue=2.5)
    file["scalar"] = np.float32(3)
    file["empty"] = np.zeros((0, 3))
    file["null"] = h5py.Empty("f4")


def _unusual_types(file) -> None:
    record = np.zeros(5, [("a", "f4"), ("s", "S3"), ("b", ">i2", (3,)), ("n", [("q", "f8")])])
    record["a"], record["s"], record["n"]["q"] = np.arange(5), b"abc", 2.5
    file["compound"] = record
    file["compound_of_text"] = np.zeros(3, [("s", "S3"), ("t", "S9")])
    ragged = np.empty(2, [("v", "f4"), ("s", h5py.string_dtype())])
    ragged["v"], ragged["s"] = 1, ["one", "three"]
    file["compound_of_ragged"] = ragged
    file["enum"] = np.array([1, 2, 1], dtype=h5py.enum_dtype({"A": 1, "B": 2}))
    file["bool"] = np.array([True, False])
    kind = h5py.h5t.STD_B16LE.copy()
    made = h5py.h5d.create(file.id, b"bits", kind, h5py.h5s.create_simple((4,)))
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(4, dtype="<u2").view("V2"), kind)
    write_words(file, "bf16_opaque", BF16_WORDS, "V2").attrs["dtype"] = "bfloat16"
    write_words(file, "bf16_integer", BF16_WORDS.reshape(2, 3), "u2").attrs["dtype"] = "bfloat16"
    write_words(file, "opaque", BF16_WORDS, "V2")
    file["complex"] = (np.arange(5) + 1j).astype("c8")
    file["complex_pair"] = np.array([(1, 2), (3, 4), (5, 6)], [("real", "f8"), ("imag", "f8")])
    write_words(file, "signalling", SIGNALLING, "<f4")
    file["text"] = "hello"
    file["texts"] = np.array(["a", "bb"], dtype=object)
    file["references"] = np.array([file["contiguous"].ref], dtype=h5py.ref_dtype)
    lists = file.create_dataset("ragged", (2,), dtype=h5py.vlen_dtype("f4"))
    lists[0], lists[1] = [1, 2], [3]


def _names_and_links(file, path: Path, normal) -> None:
    file["g/deep/seven"] = normal(2, 1, 2, 1, 2, 1, 2).astype("f8")
    file["g/conv1.weight"] = normal(2, 2)
    file["g/conv10.weight"] = normal(2, 2)
    for name in ("a b", "ü", "x[0]*?", b"raw\xff"):
        file[name] = normal(2)
    file["g/alias"] = file["contiguous"]
    file["gg"] = file["g"]
    file["g/self"] = file["g"]
    file["soft"] = h5py.SoftLink("/contiguous")
    file["softgroup"] = h5py.SoftLink("/g")
    file["softdeep"] = h5py.SoftLink("g/deep")
    file["dangling"] = h5py.SoftLink("/nowhere")
    file["elsewhere"] = h5py.ExternalLink(str(path.with_name("other.h5")), "/x")
    file["soft_elsewhere"] = h5py.SoftLink("/elsewhere")


def snapshot(path: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything in a file, by link: what it points to, what is in it, its attributes. Read by h5py alone."""
    found: dict[bytes, tuple[object, ...]] = {}
    with h5py.File(path, "r", locking=False) as file:
        root = file.id

        def note(name: bytes, info) -> None:
            if info.type == h5py.h5l.TYPE_SOFT:
                found[name] = ("soft", root.links.get_val(name))
            elif info.type == h5py.h5l.TYPE_EXTERNAL:
                found[name] = ("external", *root.links.get_val(name))
            else:
                found[name] = _object(h5py.h5o.open(root, name))

        root.links.visit(note, info=True)
        found[b"/"] = ("root", _attributes(file), file.userblock_size)
    return found


def _object(member) -> tuple[object, ...]:
    if not isinstance(member, h5py.h5d.DatasetID):
        return ("group", _attributes(h5py.Group(member)))
    return ("dataset", member.shape, str(member.dtype), raw_bytes(member), _attributes(h5py.Dataset(member)))


def _attributes(owner) -> str:
    return repr(sorted((name, repr(value)) for name, value in owner.attrs.items()))


def raw_bytes(dataset) -> bytes:
    """A low-level dataset's records as they are stored; text of variable length through h5py."""
    kind = dataset.get_type()
    if dataset.get_space().get_simple_extent_type() == h5py.h5s.NULL or 0 in dataset.shape:
        return b""
    if dataset.dtype.hasobject:
        return repr(h5py.Dataset(dataset)[()]).encode()
    data = np.empty(dataset.shape, f"V{kind.get_size()}")
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, data, kind)
    return data.tobytes()


def expected(path: Path, record) -> dict[str, bytes]:
    """The raw bytes that each dataset a record hits must have afterwards, by name; from the file before."""
    made: dict[str, bytearray] = {}
    with h5py.File(path, "r", locking=False) as file:
        for position, entry in enumerate(record.header.tensors):
            rows = record.plan.tensor == position
            name, field = _dataset_of(file, entry.name)
            kind = file[name].dtype
            raw = made.setdefault(name, bytearray(raw_bytes(file[name].id)))
            _xor(
                raw,
                kind,
                field,
                entry,
                record.plan.word[rows],
                (record.plan.before ^ record.plan.after)[rows],
            )
    return {name: bytes(raw) for name, raw in made.items()}


def _dataset_of(file, name: str) -> tuple[str | bytes, str]:
    """A tensor's name as the dataset and the field in its records."""
    if "\\xff" in name:
        return name.encode().replace(b"\\xff", b"\xff"), ""
    if name in file:
        return name, ""
    base, _, field = name.partition(".")
    return base, field


def _xor(raw: bytearray, kind: np.dtype, field: str, entry, words, masks) -> None:
    offset, size = 0, kind.itemsize
    for part in field.split(".") if field else ():
        kind, offset = kind.fields[part][0], offset + kind.fields[part][1]
    per_record = max(int(np.prod(kind.shape)), 1) * entry.number.parts
    width = entry.number.word_size
    order = "big" if entry.dtype.startswith(">") else "little"
    for word, mask in zip(words.tolist(), masks.tolist(), strict=True):
        at = word // per_record * size + offset + word % per_record * width
        value = int.from_bytes(raw[at : at + width], order) ^ mask
        raw[at : at + width] = value.to_bytes(width, order)


def popcount_between(a: bytes, b: bytes) -> int:
    """Bits that differ between two byte strings of one length."""
    assert len(a) == len(b)
    return int(np.bitwise_count(np.frombuffer(a, "u1") ^ np.frombuffer(b, "u1")).sum())
