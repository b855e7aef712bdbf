"""PyTorch zip files that PyTorch wrote: the same words, the same names, one tensor per word."""

import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch_words import all_words, nibbles_of, random_bits, words_of  # noqa: E402

import ckptflip  # noqa: E402
from ckptflip.checkpoints.torch_zip import legacy_reason  # noqa: E402
from ckptflip.checkpoints.torch_zip.archive import open_checkpoint  # noqa: E402
from ckptflip.errors import CheckpointError  # noqa: E402

FLOATS = ["float64", "float32", "float16", "bfloat16"]
FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
COMPLEX = ["complex32", "complex64", "complex128"]
INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool"]


@pytest.fixture
def saved(tmp_path):
    """Saves an object and opens the file."""

    def save(value, **options):
        path = tmp_path / "model.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(value, path, **options)
        return open_checkpoint(path)

    return save


def listed(checkpoint):
    return {t.name: t.aliases for t in checkpoint.tensors}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", FLOATS + FLOAT8 + COMPLEX + INTEGERS)
def test_every_dtype(saved, dtype):
    kind = getattr(torch, dtype)
    state = {
        "w": random_bits(kind, (3, 4)),
        "one": random_bits(kind, ()),
        "none": random_bits(kind, (0, 2)),
        "t": random_bits(kind, (2, 5), 1).t(),
    }
    found = saved(state)
    assert [t.dtype for t in found.tensors] == [dtype] * 4
    assert [t.shape for t in found.tensors] == [(3, 4), (), (0, 2), (5, 2)]
    loaded = torch.load(found.path, weights_only=True)
    for name, tensor in loaded.items():
        assert all_words(found, name).tolist() == words_of(tensor).tolist() == words_of(state[name]).tolist()


def test_packed_floats_are_two_to_a_byte(saved):
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no float4")
    raw = random_bits(torch.uint8, (3, 4))
    found = saved({"w": raw.view(torch.float4_e2m1fn_x2), "t": raw.clone().view(torch.float4_e2m1fn_x2).t()})
    assert [(t.dtype, t.shape, t.layout) for t in found.tensors] == [
        ("float4_e2m1fn", (3, 8), "packed"),
        ("float4_e2m1fn", (4, 6), "packed, strided"),
    ]
    assert all_words(found, "w").tolist() == nibbles_of(raw).tolist()
    assert all_words(found, "t").tolist() == nibbles_of(raw.t()).tolist()


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors(saved):
    x = torch.arange(-4.0, 8.0).reshape(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([0, 1, 2])
    state = {
        "i8": torch.quantize_per_tensor(x, 0.1, 2, torch.qint8),
        "u8": torch.quantize_per_tensor(x, 0.1, 2, torch.quint8),
        "i32": torch.quantize_per_tensor(x, 0.1, 2, torch.qint32),
        "rows": torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8),
    }
    found = saved(state)
    assert [(t.name, t.dtype) for t in found.tensors] == [
        ("i8", "int8"),
        ("u8", "uint8"),
        ("i32", "int32"),
        ("rows", "int8"),
        ("rows/scales", "float64"),
        ("rows/zero_points", "int64"),
    ]
    for name, tensor in state.items():
        assert all_words(found, name).tolist() == words_of(tensor).tolist()
    assert all_words(found, "rows/scales").tolist() == words_of(scales).tolist()


@pytest.mark.filterwarnings("ignore")
def test_quantised_nibbles_are_packed_across_rows(saved):
    x = torch.arange(15.0).reshape(3, 5)
    quantised = torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 0, torch.quint4x2)
    found = saved({"q": quantised})
    assert (found.tensors[0].dtype, found.tensors[0].shape) == ("uint4", (3, 5))
    assert all_words(found, "q").tolist() == list(range(15))


def test_views_of_the_same_words_are_aliases(saved):
    x = random_bits(torch.float32, (4, 6))
    found = saved(
        {"a": x, "b": x.t(), "c": x.reshape(-1), "d": x.view(2, 2, 6), "e": x[None], "same": x.view(4, 6)}
    )
    assert listed(found) == {"a": ("same",)}
    assert all_words(found, "a").tolist() == words_of(x).tolist()
    left_out = {s.name: s.reason for s in found.skipped}
    assert set(left_out) == {"b", "c", "d", "e"}
    assert all("another view of the words of a" in reason for reason in left_out.values())


def test_the_view_in_c_order_names_the_words_whichever_comes_first(saved):
    x = random_bits(torch.int16, (4, 6))
    for state in ({"a": x.t(), "b": x}, {"b": x, "a": x.t()}):
        found = saved(state)
        assert listed(found) == {"b": ()}
        assert all_words(found, "b").tolist() == words_of(x).tolist()


def test_only_the_same_elements_in_the_same_order_are_aliases(saved, tmp_path):
    """`w[0, 1]` is `wt[1, 0]`: a record of the one must never hit the other's element of that number."""
    w = torch.arange(1, 17.0).reshape(4, 4)
    torch.save({"w": w, "wt": w.t()}, tmp_path / "views.pt")
    torch.save({"w": w.clone(), "wt": w.t().contiguous()}, tmp_path / "apart.pt")
    rows = {r.tensor: r.status for r in ckptflip.diff(tmp_path / "apart.pt", tmp_path / "views.pt")}
    assert rows == {"w": "same", "wt": "only in A"}
    record = ckptflip.inject(tmp_path / "apart.pt", tensors="wt", slice="0,1", seed=1)
    with pytest.raises(ckptflip.CkptflipError, match="no tensor 'wt'"):
        ckptflip.replay(record, tmp_path / "views.pt")
    done = ckptflip.convert(tmp_path / "views.pt", tmp_path / "views.h5")
    assert (done.tensors, done.skipped) == (1, ("wt",))


def test_shapes_that_are_not_the_tensors_own_are_not_converted(saved, tmp_path):
    x = torch.arange(10.0)
    for name, state in (("run", {"a": x[:6], "b": x[4:]}), ("wide", {"a": x[:1].expand(5)})):
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=r"save a clone\(\)"):
            ckptflip.convert(tmp_path / f"{name}.pt", tmp_path / f"{name}.h5")


def test_lazily_conjugated_tensors_are_left_out(saved):
    """PyTorch stores what it will conjugate on loading: values in a record would have the wrong sign."""
    x = torch.tensor([1 + 2j, 3 - 4j])
    found = saved(
        {"plain": x, "conj": x.clone().conj(), "neg": x.clone().conj().imag, "done": x.conj().resolve_conj()}
    )
    assert {t.name for t in found.tensors} == {"plain", "done"}
    assert {s.name for s in found.skipped} == {"conj", "neg"}
    assert "resolve_conj" in found.skipped[0].reason


def test_views_that_are_apart_stay_apart(saved):
    x = random_bits(torch.float64, (6, 8))
    parts = {
        "rows": x[:2],
        "left": x[2:, :3],
        "right": x[2:, 3:6],
        "odd": x[2:, 7],
        "even": x[2::2, 6],
        "rest": x[3::2, 6],
    }
    found = saved(parts)
    assert listed(found) == dict.fromkeys(parts, ())
    for name, part in parts.items():
        assert all_words(found, name).tolist() == words_of(part).tolist()
    assert sum(t.words for t in found.tensors) == x.numel()


def test_query_key_and_value_of_one_matrix(saved):
    x = random_bits(torch.float32, (3, 2, 4, 5))
    heads = {f"{n}{h}": x[i, h].t() for i, n in enumerate("qkv") for h in range(2)}
    assert listed(saved(heads)) == dict.fromkeys(heads, ())
    last = random_bits(torch.float32, (5, 4, 6))
    heads = {f"{h}": last[:, h, 2 * n : 2 * n + 2] for h in range(4) for n in range(1)}
    assert listed(saved(heads)) == dict.fromkeys(heads, ())


def test_views_that_overlap_are_one_run_of_words(saved):
    x = random_bits(torch.float32, (10,))
    found = saved({"a": x[:4], "b": x[2:9], "c": x[9:]})
    assert listed(found) == {"b": (), "c": ()}
    assert (found.tensors[0].shape, found.tensors[0].layout) == ((9,), "run of overlapping views")
    assert [s.name for s in found.skipped] == ["a"]
    assert all_words(found, "b").tolist() == words_of(x[:9]).tolist()


def test_a_view_that_holds_the_others_keeps_its_shape(saved):
    x = random_bits(torch.float32, (4, 6))
    found = saved({"part": x[1:, 2:], "whole": x, "row": x[2]})
    assert listed(found) == {"whole": ()}
    assert {s.name for s in found.skipped} == {"part", "row"}
    assert (found.tensors[0].shape, found.tensors[0].layout) == ((4, 6), "views of one storage")


def test_expanded_axes_count_once(saved):
    x = random_bits(torch.float32, (4, 1))
    found = saved({"wide": x.expand(4, 1000), "one": torch.tensor(1.5).expand(7)})
    assert [t.shape for t in found.tensors] == [(4, 1), (1,)]
    assert all_words(found, "wide").tolist() == words_of(x).tolist()


def test_windows_that_meet_words_twice_are_one_run(saved):
    x = random_bits(torch.float32, (10,))
    found = saved({"windows": x.unfold(0, 4, 2)})
    assert found.tensors[0].shape == (10,)
    assert all_words(found, "windows").tolist() == words_of(x).tolist()


def test_views_of_different_types(saved):
    mixed = torch.arange(16, dtype=torch.uint8)
    found = saved({"a": mixed[:8].view(torch.uint16), "b": mixed[3:9]})
    assert [(t.name, t.dtype, t.shape) for t in found.tensors] == [("a", "uint8", (9,))]


def test_words_of_a_storage_that_no_tensor_shows_are_left_out(saved):
    found = saved({"a": random_bits(torch.float32, (100,))[10:20]})
    assert found.tensors[0].words == 10


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 2, 3)
        self.bn = torch.nn.BatchNorm2d(2)
        self.fc = torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 2)
        self.head.weight = self.fc.weight

    def forward(self, x):
        return self.head(self.fc(self.bn(self.conv1(x)).mean((2, 3))))


def trained(named):
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.named_parameters() if named else net.parameters())
    net(torch.randn(4, 1, 5, 5)).sum().backward()
    optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("named", [True, False])
def test_a_training_state(saved, named):
    net, optimizer = trained(named)
    found = saved({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3})
    by_name = {t.name: t for t in found.tensors}
    assert by_name["model/fc.weight"].aliases == ("model/head.weight",)
    assert (by_name["model/conv1.weight"].layer, by_name["model/conv1.weight"].role) == ("conv1", "weight")
    assert by_name["model/bn.running_mean"].role == "statistic"
    moments = {t.name: (t.layer, t.role) for t in found.tensors if t.name.endswith("exp_avg")}
    assert moments == {
        "optimizer/state/0/exp_avg": ("conv1", "optimizer"),
        "optimizer/state/1/exp_avg": ("conv1", "optimizer"),
        "optimizer/state/2/exp_avg": ("bn", "optimizer"),
        "optimizer/state/3/exp_avg": ("bn", "optimizer"),
        "optimizer/state/4/exp_avg": ("fc", "optimizer"),
        "optimizer/state/5/exp_avg": ("head", "optimizer"),
    }
    assert by_name["optimizer/state/0/step"].role == "counter"
    for name, tensor in net.state_dict().items():
        if name != "head.weight":
            assert all_words(found, f"model/{name}").tolist() == words_of(tensor).tolist()


def test_a_model_of_other_shapes_names_no_optimizer_state(saved):
    _, optimizer = trained(named=False)
    other = {f"l{i}.weight": torch.zeros(7) for i in range(6)}
    found = saved({"model": other, "optimizer": optimizer.state_dict()})
    assert {t.layer for t in found.tensors if "exp_avg" in t.name} == {""}


def test_whole_modules_have_the_names_of_their_state_dict(saved):
    net = Net()
    found = saved({"net": net, "extra": torch.ones(1)})
    names = {n for t in found.tensors for n in (t.name, *t.aliases)}
    assert names == {f"net/{n}" for n in net.state_dict()} | {"extra"}
    assert {n for t in saved(net).tensors for n in (t.name, *t.aliases)} == set(net.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("freeze", [False, True])
def test_torchscript(tmp_path, freeze):
    torch.manual_seed(0)
    script = torch.jit.script(Net().eval())
    script = torch.jit.freeze(script) if freeze else script
    path = tmp_path / "script.pt"
    script.save(str(path))
    found = open_checkpoint(path)
    names = {n for t in found.tensors for n in (t.name, *t.aliases)}
    if freeze:
        assert names == {f"constants/{i}" for i in range(len(names))} and len(names) >= 4
        assert words_of(script.code_with_constants[1].c0).tolist() == all_words(found, "constants/0").tolist()
        return
    assert names == set(script.state_dict())
    for name, tensor in script.state_dict().items():
        if name in listed(found):
            assert all_words(found, name).tolist() == words_of(tensor).tolist()


@pytest.mark.filterwarnings("ignore")
def test_sparse_nested_and_other_tensors(saved):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    state = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "meta": torch.empty(3, device="meta"),
        "numpy": np.ones(3),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
        "storage": torch.ones(2).untyped_storage(),
    }
    state["parameter"].note = torch.zeros(1)
    found = saved(state)
    names = [t.name for t in found.tensors]
    assert [n for n in names if not n.startswith(("nested", "jagged"))] == [
        *("coo/indices", "coo/values", "csr/crow_indices", "csr/col_indices", "csr/values"),
        *("csc/ccol_indices", "csc/row_indices", "csc/values", "parameter", "parameter/note"),
        "storage",
    ]
    assert {"nested/buffer", "jagged/values", "jagged/offsets"} <= set(names)
    assert {s.name: s.reason for s in found.skipped} == {
        "meta": "a meta tensor has no data",
        "numpy": "a numpy array lies inside the pickle",
        "conj": "stored before it is conjugated or negated; save tensor.resolve_conj()",
    }
    assert all_words(found, "coo/values").tolist() == words_of(torch.tensor([1.0, 2.0])).tolist()
    assert found.tensors[names.index("storage")].dtype == "uint8"


class Named(torch.Tensor):
    """A subclass with attributes."""


def test_subclasses_and_attributes(saved):
    tensor = torch.ones(2).as_subclass(Named)
    tensor.extra = torch.zeros(1)
    assert listed(saved({"s": tensor})) == {"s": (), "s/extra": ()}


def test_names(saved):
    found = saved({"a": [torch.ones(1), {"b/c": torch.ones(1)}], "b": {0: torch.ones(1), "0": torch.ones(1)},
                   "": torch.ones(1), "\x1b[31m\ud800": torch.ones(1), ("x", 1): torch.ones(1)})  # fmt: skip
    assert [t.name for t in found.tensors] == [
        "a/0", "a/1/b/c", "b/0", "b/0~2", "_", "\\x1b[31m\\ud800", "x,1",
    ]  # fmt: skip
    assert listed(saved(torch.ones(2))) == {"tensor": ()}
    assert listed(saved([torch.ones(2)])) == {"0": ()}


def test_a_container_met_twice_gives_aliases_and_a_cycle_ends(saved):
    inner = {"w": torch.ones(3)}
    outer = {"a": inner, "b": inner}
    outer["self"] = outer
    assert listed(saved(outer)) == {"a/w": ("b/w",)}


def test_all_protocols(saved):
    state = {"w": torch.arange(3.0), "big": 1 << 70, "f": 1.5, "s": {1, 2}, "t": (1, 2, 3, 4), "b": b"x"}
    for protocol in (1, 2, 3, 4, 5):
        found = saved(state, pickle_protocol=protocol)
        assert all_words(found, "w").tolist() == words_of(state["w"]).tolist()


def crcs_match(found):
    """Whether every stored CRC is that of the member it covers."""
    import zlib

    data = found.path.read_bytes()
    return [
        all(
            int.from_bytes(data[at : at + 4], "little") == zlib.crc32(data[s.start : s.start + s.length])
            for _, at in s.places
        )
        for s in found.crcs
    ]


def test_crcs(saved):
    found = saved({"a": torch.ones(3), "b": torch.ones(4)})
    assert crcs_match(found) == [True, True]
    assert [len(s.places) for s in found.crcs] == [2, 2]
    assert all(s.zero_is_none for s in found.crcs)


def test_files_without_crcs(saved):
    torch.serialization.set_crc32_options(False)
    try:
        found = saved({"a": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    data = found.path.read_bytes()
    assert [data[at : at + 4] for s in found.crcs for _, at in s.places] == [bytes(4)] * 2


def rewritten(path: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """The archive again, by zipfile, with members changed."""
    out = path.with_name("again.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out


def test_big_endian_files(saved):
    state = {"w": torch.arange(3.0), "c": torch.tensor([1 + 2j])}

    def swap(name, data):
        if name.endswith("byteorder"):
            return b"big"
        return (
            struct.pack(f">{len(data) // 4}f", *struct.unpack(f"<{len(data) // 4}f", data))
            if ("/data/" in name)
            else data
        )

    path = rewritten(saved(state).path, swap)
    found = open_checkpoint(path)
    assert [t.dtype for t in found.tensors] == [">float32", ">complex64"]
    for name, tensor in torch.load(path).items():
        assert torch.equal(tensor, state[name])
        assert all_words(found, name).tolist() == words_of(tensor).tolist()


def test_compressed_members(saved):
    path = rewritten(saved({"w": torch.zeros(1000)}).path, lambda _, d: d, zipfile.ZIP_DEFLATED)
    found = open_checkpoint(path)
    assert not found.tensors
    assert [(s.name, s.reason) for s in found.skipped] == [
        ("w", "its storage is compressed; torch.load it and torch.save it again")
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda n, d: None if "/data/" in n else d, "holds no member"),
        (lambda n, d: d[:8] if "/data/" in n else d, "needs 12 bytes"),
        (lambda n, d: None if n.endswith("data.pkl") else d, "torch.save did not"),
        (lambda n, d: b"middle" if n.endswith("byteorder") else d, "byte order"),
        (lambda n, d: d[:-20] if n.endswith("data.pkl") else d, "damaged at byte"),
    ],
)
def test_damaged_archives(saved, change, why):
    path = rewritten(saved({"w": torch.ones(3)}).path, change)
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(path)


class Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.head = torch.nn.Linear(3, 2)
        self.head.weight = self.fc.weight
        self.register_buffer("turned", torch.arange(12.0).reshape(3, 4).t()[1:])
        self.fixed = torch.arange(3, dtype=torch.bfloat16)

    def forward(self, x):
        return self.fc(x) + self.head(x) + self.turned.sum() + self.fixed.sum()


@pytest.mark.filterwarnings("ignore")
def test_exported_programs(tmp_path):
    path, out = tmp_path / "model.pt2", tmp_path / "flipped.pt2"
    torch.export.save(torch.export.export(Exported(), (torch.ones(1, 3),)), path)
    found = open_checkpoint(path)
    assert listed(found) == {
        "fc.weight": ("head.weight",), "fc.bias": (), "head.bias": (), "turned": (), "fixed": (),
    }  # fmt: skip
    program = torch.export.load(path)
    tensors = {**program.state_dict, **program.constants}
    for name in listed(found):
        assert all_words(found, name).tolist() == words_of(tensors[name]).tolist()
    data = bytearray(path.read_bytes())
    data[next(t.offset for t in found.tensors if t.name == "fc.bias") + 4] ^= 2
    out.write_bytes(data)
    expected = words_of(tensors["fc.bias"]) ^ np.array([0, 2], "u4")
    assert words_of(torch.export.load(out).state_dict["fc.bias"]).tolist() == expected.tolist()


PAYLOAD = (
    b'{"config": {"w": {"path_name": "x", "tensor_meta": {"dtype": 7, "layout": 7, "sizes": [{"as_int": 3}],'
    b' "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}}}}}'
)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (b"{", "not as it should be"),
        (b'{"config": {"w": {"path_name": "x", "tensor_meta": {}}}}', "not as it should be"),
        (PAYLOAD.replace(b"3", b"-1"), "impossible"),
        (PAYLOAD.replace(b"3", b"9" * 19), "damaged"),
        (PAYLOAD, "holds no member"),
    ],
)
def test_damaged_exported_programs(tmp_path, config, why):
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data/weights/model_weights_config.json", config)
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(path)


def test_old_files_are_recognised(tmp_path):
    old = io.BytesIO()
    torch.save({"w": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    why = legacy_reason(Path("old.pt"), old.getvalue()[:512])
    assert "before version 1.6" in why and "weights_only=True" in why and "stranger" in why
    assert "plain pickle" in legacy_reason(Path("a.pkl"), pickle.dumps({"a": 1}))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "tar archive" in legacy_reason(Path("a.pt"), tar.getvalue()[:512])
    assert legacy_reason(Path("a"), b"something else") is None
    assert legacy_reason(Path("a"), b"") is None


def test_nothing_is_executed(tmp_path, saved):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    found = saved({"w": torch.ones(1), "attack": Attack()})
    assert listed(found) == {"w": ()}
    assert not (tmp_path / "executed").exists()


def flips_of(record):
    """What a record says was XORed: by tensor, the mask of each word."""
    found = {}
    for position, rows in record.plan.by_tensor():
        masks = record.plan.before[rows] ^ record.plan.after[rows]
        found[record.header.tensors[position].name] = dict(
            zip(record.plan.word[rows].tolist(), masks.tolist(), strict=True)
        )
    return found


def damaged_members(path):
    """The first member that zipfile finds damaged."""
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("checksum", ["repair", "leave"])
@pytest.mark.parametrize("dtype", FLOATS + FLOAT8 + COMPLEX + INTEGERS)
def test_torch_loads_exactly_the_planned_words(tmp_path, dtype, checksum):
    kind = getattr(torch, dtype)
    whole = random_bits(kind, (6, 8), 2)
    state = {"w": random_bits(kind, (3, 4)), "t": random_bits(kind, (2, 5), 1).t(), "v": whole[1:, 2:5]}
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(state, path)
    # Bits of a bool other than the lowest are kept by torch, but not by every operation on it.
    bits = "0" if dtype == "bool" else "all"
    record = ckptflip.inject(path, out=out, fraction=0.05, bits=bits, seed=3, checksum=checksum)
    flips = flips_of(record)
    assert len(flips) > 1
    for name, tensor in torch.load(out, weights_only=True).items():
        expected = words_of(state[name])
        for word, mask in flips.get(name, {}).items():
            expected[word] ^= mask
        assert words_of(tensor).tolist() == expected.tolist()
    assert (damaged_members(out) is None) == (checksum == "repair")
    ckptflip.undo(out, record.path)
    assert out.read_bytes() == path.read_bytes()


def test_all_bytes_of_the_file_but_the_words_and_crcs_stay(tmp_path):
    path, out = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"a": torch.ones(100), "b": torch.ones(100)}, path)
    ckptflip.inject(path, out=out, tensors="b", count=1, seed=1)
    before, after = path.read_bytes(), out.read_bytes()
    different = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
    found = open_checkpoint(path)
    allowed = {at + i for _, at in found.crcs[1].places for i in range(4)}
    start = found.tensors[1].offset
    assert [i for i in different if i not in allowed and not start <= i < start + 400] == []
    assert len(different) <= 9


def test_lightning_checkpoints(tmp_path):
    lightning = pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        class Model(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.fc = torch.nn.Linear(3, 2)
                self.bn = torch.nn.BatchNorm1d(2)

            def training_step(self, batch, index):
                return self.bn(self.fc(batch[0])).square().sum()

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())

        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=4)
        trainer = lightning.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        model = Model()
        trainer.fit(model, data)
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
    found = open_checkpoint(path)
    kinds = {t.name: (t.layer, t.role) for t in found.tensors}
    assert kinds["state_dict/fc.weight"] == ("fc", "weight")
    assert kinds["state_dict/bn.weight"] == ("bn", "norm")
    assert kinds["optimizer_states/0/state/0/exp_avg"] == ("fc", "optimizer")
    assert kinds["optimizer_states/0/state/3/exp_avg_sq"] == ("bn", "optimizer")
    for name, tensor in model.state_dict().items():
        assert all_words(found, f"state_dict/{name}").tolist() == words_of(tensor).tolist()


def test_transformers_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=5)
        model = transformers.GPT2LMHeadModel(config)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = open_checkpoint(tmp_path / "pytorch_model.bin")
    tied = next(t for t in found.tensors if t.name == "transformer.wte.weight")
    assert tied.aliases == ("lm_head.weight",) and tied.role == "embedding"
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert all_words(found, name).tolist() == words_of(tensor).tolist()


def attempt(path, data):
    """Whether a file is read; only clear errors are let through. Reading all words finds wrong places too."""
    path.write_bytes(data)
    try:
        found = open_checkpoint(path)
        for i, tensor in enumerate(found.tensors):
            assert sum(block.size for block in found.blocks(i)) == tensor.words
        found.close()
    except CheckpointError:
        return False
    return True


@pytest.fixture(scope="module")
def small():
    out = io.BytesIO()
    x = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": x, "b": x[:, 1:3], "c": [torch.ones(2, dtype=torch.bfloat16).t()], "n": 3}, out)
    return out.getvalue()


def test_truncated_anywhere(small, tmp_path):
    assert attempt(tmp_path / "x.pt", small)
    assert not any(attempt(tmp_path / "x.pt", small[:n]) for n in range(len(small)))


@settings(max_examples=1000)
@given(
    places=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    ),
    part=st.sampled_from(["any", "pickle", "directory"]),
)
def test_random_bytes_end_in_clear_errors(small, tmp_path_factory, places, part):
    raw = bytearray(small)
    start, end = {
        "any": (0, len(raw)),
        "pickle": (64, 64 + raw.index(b"PK\7\x08") - 64),
        "directory": (raw.index(b"PK\1\2"), len(raw)),
    }[part]
    for where, value in places:
        raw[start + int(where * (end - start))] = value
    attempt(tmp_path_factory.getbasetemp() / "hostile.pt", bytes(raw))
