"""Distributed checkpoints that PyTorch wrote, from one process and from two."""

import contextlib
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

from torch_words import all_words, nibbles_of, random_bits, words_of  # noqa: E402

import ckptflip  # noqa: E402
from ckptflip.checkpoints.torch_dcp.opening import _check_cover, _LeftOut, open_checkpoint  # noqa: E402
from ckptflip.errors import CheckpointError  # noqa: E402
from ckptflip.faults.catalogue import Shard  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
    *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bool"),
]


def save(state, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(state, folder):
    """The same state as PyTorch reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A checkpoint that two processes wrote."""
    folder = tmp_path_factory.mktemp("dcp") / "step_1"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("dcp_process.py")
    with contextlib.ExitStack() as running:
        processes = [
            running.enter_context(
                subprocess.Popen(
                    [sys.executable, str(script), str(rank), "2", port, str(folder)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                text, _ = process.communicate(timeout=120)
                assert process.returncode == 0, text
        finally:
            for process in processes:
                process.kill()
    return folder


def test_every_dtype(tmp_path):
    state = {d: random_bits(getattr(torch, d), (4, 3), i) for i, d in enumerate(DTYPES)}
    state["nested"] = {"t": random_bits(torch.float32, (4, 6)).t(), "one": torch.tensor(2.5), "n": 1}
    found = open_checkpoint(save(state, tmp_path / "step"))
    by_name = {t.name: t for t in found.tensors}
    for dtype in DTYPES:
        assert (by_name[dtype].dtype, by_name[dtype].shape) == (dtype, (4, 3))
        assert all_words(found, dtype).tolist() == words_of(state[dtype]).tolist()
    for name in ("t", "one"):
        assert by_name[f"nested/{name}"].aliases == (f"nested.{name}",)
        assert all_words(found, f"nested/{name}").tolist() == words_of(state["nested"][name]).tolist()
    assert [(s.name, s.reason) for s in found.skipped] == [("nested/n", "it is no tensor")]


def test_packed_floats(tmp_path):
    raw = random_bits(torch.uint8, (3, 4))
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this PyTorch has no float4")
    found = open_checkpoint(save({"w": raw.view(torch.float4_e2m1fn_x2)}, tmp_path / "step"))
    assert (found.tensors[0].dtype, found.tensors[0].shape) == ("float4_e2m1fn", (3, 8))
    assert all_words(found, "w").tolist() == nibbles_of(raw).tolist()


def test_optimizer_state_belongs_to_its_parameter(tmp_path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        states = get_state_dict(model, optimizer, options=options)
        found = open_checkpoint(
            save(dict(zip(("model", "optim"), states, strict=True)), tmp_path / f"{flat}")
        )
        kinds = {t.name: (t.layer, t.role) for t in found.tensors}
        assert kinds["model/0.weight"] == ("0", "weight")
        assert kinds["model/1.weight"] == ("1", "norm")
        name = "optim/state.1.weight.exp_avg" if flat else "optim/state/1.weight/exp_avg"
        assert kinds[name] == ("1", "optimizer")


class Numbered(torch.nn.Module):
    """A model with layers that have names, and some that are numbered, as parameters are."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 4, 3)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.conv2 = torch.nn.Conv2d(4, 4, 3)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))

    def forward(self, x):
        return self.blocks(self.conv2(self.bn1(self.conv1(x))).mean((2, 3)))


def trained(model, optimizer, shape):
    model(torch.ones(shape)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def adam(model):
    return torch.optim.Adam(model.parameters())


def momentum_by_names(model):
    """Two groups in another order than the model's, told by their names alone."""
    named = list(model.named_parameters())
    groups = [{"params": [p for p in named if p[1].ndim == n]} for n in (1, 2, 4)]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("optimizer", [adam, momentum_by_names])
@pytest.mark.parametrize("frozen", [False, True])
def test_numbered_state_belongs_to_what_it_does_in_a_pytorch_file(tmp_path, optimizer, frozen):
    model = Numbered()
    state = trained(model, optimizer(model), (2, 1, 9, 9))
    if frozen:  # the model has more parameters than the optimizer: only names tell
        state["model"]["extra"] = torch.ones(4)
    torch.save(state, tmp_path / "state.pt")
    folder = save(state, tmp_path / "step")
    with ckptflip.opened(tmp_path / "state.pt") as target:
        expected = {t.name: (t.layer, t.role) for t in target.tensors}
    found = {t.name: (t.layer, t.role) for t in open_checkpoint(folder).tensors}
    assert found == expected
    layers = {layer for name, (layer, _) in found.items() if name.startswith("optimizer/")}
    told = not frozen or optimizer is momentum_by_names
    assert layers == ({"conv1", "bn1", "conv2", "blocks.0", "blocks.2"} if told else {""})
    hit = [
        ckptflip.inject(p, layers="conv*", count=20, seed=1, dry_run=True)
        for p in (folder, tmp_path / "state.pt")
    ]
    assert [t.name for t in hit[0].header.tensors] == [t.name for t in hit[1].header.tensors]
    assert any(t.name.startswith("optimizer/") for t in hit[0].header.tensors) == told


def test_numbers_of_parameters_are_never_layers(tmp_path):
    """Not even where the layers of the model are numbered, or nothing tells what the numbers mean."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    state = trained(model, adam(model), (2, 4))
    found = open_checkpoint(save(state, tmp_path / "whole"))
    layers = {t.name: t.layer for t in found.tensors if t.name.startswith("optimizer")}
    assert [layers[f"optimizer/state/{i}/exp_avg"] for i in range(4)] == ["0", "0", "1", "1"]
    alone = open_checkpoint(save({"optimizer": state["optimizer"]}, tmp_path / "alone"))
    stateless = {"optimizer": {"state": state["optimizer"]["state"]}}
    without_groups = open_checkpoint(save(stateless, tmp_path / "without"))
    for each in (alone, without_groups):
        assert {t.layer for t in each.tensors} == {""}


def test_several_optimizers_know_their_models(tmp_path):
    one, other = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.nn.Sequential(torch.nn.Linear(5, 2))
    one._modules["first"] = one._modules.pop("0")
    state = {"a": trained(one, adam(one), (2, 4)), "b": trained(other, adam(other), (2, 5))}
    found = {t.name: t.layer for t in open_checkpoint(save(state, tmp_path / "step")).tensors}
    assert found["a/optimizer/state/1/exp_avg"] == "first"
    assert found["b/optimizer/state/1/exp_avg"] == "0"


def test_names_that_are_keys_are_not_taken_for_another_order(tmp_path):
    """State that goes by names, of parameters of one shape that the optimizer has in another order."""
    weights = {name: torch.zeros(3) for name in ("a.weight", "b.weight")}
    state = {name: {"exp_avg": torch.zeros(3)} for name in weights}
    groups = [{"params": ["b.weight"], "lr": 0.1}, {"params": ["a.weight"], "lr": 0.1}]
    folder = save({"model": weights, "optim": {"state": state, "param_groups": groups}}, tmp_path / "step")
    found = {t.name: t.layer for t in open_checkpoint(folder).tensors}
    assert [found[f"optim/state/{n}/exp_avg"] for n in weights] == ["a", "b"]


def test_groups_that_cannot_be_read_tell_nothing(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    folder = save(trained(model, adam(model), (2, 4)), tmp_path / "step")
    metadata = described(folder)
    index = next(i for i in metadata.storage_data if i.fqn == "optimizer.param_groups.0.params")
    place = metadata.storage_data[index]
    mark = tmp_path / "executed"
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        raw = file.read(place.length)
        at = raw.index(b"\x80\x02")
        file.seek(place.offset + at)
        file.write(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    assert {t.layer for t in open_checkpoint(folder).tensors if t.name.startswith("optimizer")} == {""}
    assert not mark.exists()
    for change, refused in (({"offset": 1 << 50}, False), ({"relative_path": "../x"}, True)):
        for name, value in change.items():
            setattr(place, name, value)
        write_index(folder, metadata)
        assert attempt(folder) != refused


def test_a_truncated_data_file_is_named(tmp_path):
    folder = save({"a": torch.ones(50), "b": torch.ones(50)}, tmp_path / "step")
    data = folder / "__0_0.distcp"
    raw = data.read_bytes()
    for length in (len(raw) - 1, len(raw) // 2, 0):
        data.write_bytes(raw[:length])
        why = rf"__0_0\.distcp is truncated: it has {length} bytes, and b .* Copy or download it again"
        with pytest.raises(CheckpointError, match=why):
            open_checkpoint(folder)


def test_two_ranks(two_ranks):
    found = open_checkpoint(two_ranks)
    by_name = {t.name: t for t in found.tensors}
    assert {f.name for f in found.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert by_name["columns"].shards == (Shard(0, (0, 0), (4, 3)), Shard(1, (0, 3), (4, 3)))
    assert by_name["model/0.weight"].shards == (Shard(0, (0, 0), (4, 5)), Shard(1, (4, 0), (3, 5)))
    assert (by_name["model/0.weight"].shape, by_name["model/0.weight"].layout) == (
        (7, 5),
        "2 chunks, ranks 0-1",
    )
    assert by_name["model/0.weight"].offset is None
    assert by_name["few"].shards == (Shard(0, (0,), (1,)),)
    assert by_name["few"].layout == "contiguous, rank 0"
    assert len(by_name["replica"].shards) == 1
    expected = {
        "columns": torch.arange(24.0),
        "replica": torch.arange(4.0),
        "half": torch.arange(10, dtype=torch.bfloat16),
        "complex": torch.arange(6.0).to(torch.complex64),
        "few": torch.arange(1.0),
    }
    for name, tensor in expected.items():
        assert all_words(found, name).tolist() == words_of(tensor).tolist()
    assert by_name["optim/state/2.weight/exp_avg"].layer == "2"
    plain = {n: t.layer for n, t in by_name.items() if n.startswith("plain/optimizer/")}
    slots = ("step", "exp_avg", "exp_avg_sq")
    layers = ("conv1", "conv1", "conv2", "conv2", "head", "head")
    assert plain == {f"plain/optimizer/state/{i}/{s}": n for i, n in enumerate(layers) for s in slots}
    loaded = load({"model": {"0.weight": torch.zeros(7, 5)}}, two_ranks)["model"]["0.weight"]
    assert all_words(found, "model/0.weight").tolist() == words_of(loaded).tolist()


@pytest.mark.parametrize("checksum", ["repair", "leave"])
def test_torch_loads_exactly_the_planned_words(two_ranks, tmp_path, checksum):
    out = tmp_path / "flipped"
    record = ckptflip.inject(two_ranks, out=out, tensors="columns", count=9, seed=4, checksum=checksum)
    before = words_of(torch.arange(24.0))
    before[record.plan.word] ^= (record.plan.before ^ record.plan.after).astype("u4")
    after = load({"columns": torch.zeros(4, 6)}, out)["columns"]
    assert words_of(after).tolist() == before.tolist()
    ckptflip.undo(out, record.path)
    for file in two_ranks.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def described(folder):
    """The index as PyTorch has it."""
    return pickle.loads((folder / ".metadata").read_bytes())


def write_index(folder, metadata):
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.fixture
def altered(two_ranks, tmp_path):
    """Opens the checkpoint of two ranks with another index."""

    def alter(change):
        folder = tmp_path / "altered"
        shutil.copytree(two_ranks, folder)
        metadata = described(folder)
        change(metadata)
        write_index(folder, metadata)
        return open_checkpoint(folder)

    return alter


def reason_of(found, name):
    assert name not in {t.name for t in found.tensors}
    return next(s.reason for s in found.skipped if s.name == name)


def test_a_missing_chunk_leaves_the_tensor_out(altered):
    def one_place_less(metadata):
        for index in [i for i in metadata.storage_data if i.fqn == "columns"][1:]:
            del metadata.storage_data[index]

    assert reason_of(altered(one_place_less), "columns") == "a chunk is missing"


def test_chunks_that_do_not_cover_leave_the_tensor_out(altered):
    def one_chunk_less(metadata):
        del metadata.state_dict_metadata["columns"].chunks[1]

    assert reason_of(altered(one_chunk_less), "columns") == "its chunks hold 12 of its 24 elements"


def test_chunks_given_twice_count_once(altered):
    def twice(metadata):
        chunks = metadata.state_dict_metadata["columns"].chunks
        chunks.append(chunks[0])

    found = altered(twice)
    assert all_words(found, "columns").tolist() == words_of(torch.arange(24.0)).tolist()


def test_coded_chunks_leave_the_tensor_out(altered):
    def code(metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn == "columns":
                place.transform_descriptors = ["zstd"]

    assert reason_of(altered(code), "columns") == "it is stored through zstd"


def place_of(metadata, name):
    return next(p for i, p in metadata.storage_data.items() if i.fqn == name)


def chunk_of(metadata, name):
    return metadata.state_dict_metadata[name].chunks[0]


def beyond_the_tensor(metadata):
    chunk_of(metadata, "columns").offsets = torch.Size((3, 3))
    next(i for i in metadata.storage_data if i.fqn == "columns")


def one_item_twice(metadata):
    place_of(metadata, "half").offset = place_of(metadata, "columns").offset
    place_of(metadata, "half").length = place_of(metadata, "columns").length


ATTACKS = {
    "outside": (lambda m: setattr(place_of(m, "columns"), "relative_path", "../x.distcp"), "outside"),
    "absolute": (lambda m: setattr(place_of(m, "columns"), "relative_path", "/etc/passwd"), "outside"),
    "missing": (lambda m: setattr(place_of(m, "columns"), "relative_path", "__9_0.distcp"), "No such file"),
    "a folder": (lambda m: setattr(place_of(m, "columns"), "relative_path", "."), "cannot be read"),
    "beyond the file": (lambda m: setattr(place_of(m, "columns"), "length", 1 << 40), "truncated|overlap"),
    "negative": (lambda m: setattr(place_of(m, "columns"), "offset", -5), "not given"),
    "no number": (lambda m: setattr(place_of(m, "columns"), "offset", "5"), "not given"),
    "beyond the tensor": (beyond_the_tensor, "reaches beyond"),
    "axes": (lambda m: setattr(chunk_of(m, "columns"), "sizes", torch.Size((3,))), "number of axes"),
    "another shape": (lambda m: setattr(chunk_of(m, "columns"), "sizes", torch.Size((4, 2))), "not belong"),
    "one item twice": (one_item_twice, "overlap"),
    "safetensors": (
        lambda m: setattr(place_of(m, "columns"), "relative_path", "a.safetensors"),
        "safetensors",
    ),
    "no tensors": (lambda m: m.state_dict_metadata.update(x=5), "TensorStorageMetadata"),
}


@pytest.mark.parametrize(("change", "why"), ATTACKS.values(), ids=ATTACKS)
def test_attacks_on_the_index(altered, change, why):
    with pytest.raises(CheckpointError, match=why):
        altered(change)


def test_nothing_is_executed(tmp_path):
    folder = save({"w": torch.ones(2)}, tmp_path / "step")
    mark = tmp_path / "executed"
    payload = f"(cos\nsystem\n(S'touch {mark}'\ntR0".encode()
    (folder / ".metadata").write_bytes(payload + (folder / ".metadata").read_bytes())
    assert len(open_checkpoint(folder).tensors) == 1
    assert not mark.exists()


def test_covers():
    halves = [((0, 0), (2, 4)), ((2, 0), (2, 4))]
    _check_cover(halves, (4, 4))
    _check_cover([((0, 0), (4, 1)), ((0, 1), (2, 3)), ((2, 1), (2, 3))], (4, 4))
    _check_cover([((), ())], ())
    for wrong in (
        halves[:1],
        [*halves, halves[0]],
        [halves[0], ((1, 0), (2, 4))],
        [((0, 0), (4, 2)), halves[0]],
    ):
        with pytest.raises(_LeftOut):
            _check_cover(wrong, (4, 4))


def attempt(folder):
    """Whether a checkpoint is read; only clear errors are let through."""
    try:
        found = open_checkpoint(folder)
        for i, tensor in enumerate(found.tensors):
            assert sum(block.size for block in found.blocks(i)) == tensor.words
        found.close()
    except CheckpointError:
        return False
    return True


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = save({"a": torch.ones(2, 3), "b": {"c": torch.ones(2)}}, tmp_path_factory.mktemp("s") / "step")
    return folder, {f.name: f.read_bytes() for f in folder.iterdir()}


def test_truncated_anywhere(small):
    folder, files = small
    index = files[".metadata"]
    for n in range(len(index)):
        (folder / ".metadata").write_bytes(index[:n])
        assert not attempt(folder)
    (folder / ".metadata").write_bytes(index)
    assert attempt(folder)


@settings(max_examples=600)
@given(
    st.sampled_from([".metadata", "__0_0.distcp"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_random_bytes_end_in_clear_errors(small, name, places):
    folder, files = small
    raw = bytearray(files[name])
    for where, value in places:
        raw[int(where * len(raw))] = value
    (folder / name).write_bytes(raw)
    try:
        attempt(folder)
    finally:
        (folder / name).write_bytes(files[name])
