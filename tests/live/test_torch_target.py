"""Faults in PyTorch tensors in memory: exact to the bit, the same as in files, and without a trace."""

import contextlib
import gc
import tracemalloc
import weakref

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import ckptflip
from ckptflip import record_files, torch_h5
from ckptflip.checkpoints import opened
from ckptflip.errors import LiveError, RecordError, SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.live import Armed, inject, replay, undo
from ckptflip.live.torch_tensors import TorchTarget
from ckptflip.training import find

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
    *(
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
    ),
    *(torch.bool, torch.complex64, torch.complex128, torch.complex32),
]
LAYOUTS = {
    "contiguous": lambda x: x.view(6, 4, 5),
    "permuted": lambda x: x.view(6, 4, 5).permute(2, 0, 1),
    "sliced": lambda x: x.view(6, 4, 5)[1:5, ::2, 1:],
    "scalar": lambda x: x[7],
    "row": lambda x: x.view(24, 5)[:, 3],
}


def raw(dtype, size=120):
    """Every bit pattern there is: NaNs of both kinds, infinities, subnormal numbers."""
    itemsize = torch.empty(0, dtype=dtype).element_size()
    data = np.random.default_rng(0).integers(0, 256, size * itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype)


def bits(tensor):
    """A copy of a tensor's bytes in C order, made without a number."""
    plain = tensor.detach().cpu()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    words = plain.view(sizes[plain.element_size()]).contiguous().numpy()
    return np.frombuffer(words.tobytes(), f"u{words.itemsize}").copy()


def module(**tensors):
    made = torch.nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_change_as_the_record_says_and_nothing_else(dtype, layout):
    storage = raw(dtype)
    view = LAYOUTS[layout](storage)
    target = TorchTarget(module(x=view))
    before, whole = bits(view), bits(storage)
    record = inject(target, Policy(fraction=0.2), seed=3)
    after = bits(view)
    assert np.bitwise_count(before ^ after).sum() == record.bits_hit == record.bits_effective > 0
    hit = record.plan.word
    assert (before[hit] == record.plan.before).all() and (after[hit] == record.plan.after).all()
    # Elements of the storage outside the view stay as they are.
    assert np.bitwise_count(whole ^ bits(storage)).sum() == record.bits_hit
    assert undo(target, record) == len(record)
    assert (bits(storage) == whole).all()
    assert undo(target, record) == 0


def test_strided_tensors_are_hit_like_contiguous_ones():
    plain = raw(torch.float32).view(6, 4, 5)
    channels_last = plain.clone().unsqueeze(0).contiguous(memory_format=torch.channels_last)
    policy = Policy(count=40)
    one = inject(TorchTarget(module(x=plain.unsqueeze(0))), policy, seed=5)
    other = inject(TorchTarget(module(x=channels_last)), policy, seed=5)
    assert (one.plan.word == other.plan.word).all() and (one.plan.after == other.plan.after).all()
    assert (bits(plain) == bits(channels_last)).all()


class Net(torch.nn.Module):
    """Tied weights, a normalisation, buffers in and outside the state dict, more than ten parameters."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.bn1 = torch.nn.BatchNorm2d(2)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x) + self.bn1(self.conv(torch.ones(2, 1, 4, 4))).mean()


def trained(make=torch.optim.Adam):
    torch.manual_seed(0)
    net = Net()
    optimizer = make(list(net.named_parameters()))
    step(net, optimizer)
    return net, optimizer


def step(net, optimizer):
    optimizer.zero_grad()
    net(torch.arange(6)).square().sum().backward()
    optimizer.step()


def saved(net, optimizer, path):
    buffers = {"cache": net.cache}
    torch_h5.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "buffers": buffers}, path)
    return path


def same(one, other):
    return all(row.bits == 0 and not row.note for row in ckptflip.diff(one, other))


POLICIES = {
    "default": Policy(count=60),
    "tied": Policy(tensors=("head",), bits="exponent", count=5),
    "layer": Policy(design="layer", count=30, roles=("model",)),
    "tensor": Policy(design="tensor", count=30),
    "state": Policy(roles=("state",), count=9),
    "slots of a layer": Policy(layers=("blocks.2",), roles=("optimizer",), count=7),
    "ber": Policy(ber=0.01),
    "guarded": Policy(bits="exponent", count=20, forbid=("nan", "inf", "extreme:1e3")),
    "several": [Policy(fault="set0", count=9), Policy(fault="burst:3", count=9), Policy(fault="scale:-2")],
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_policy_and_seed_hit_a_file_and_the_model_alike(name, tmp_path):
    net, optimizer = trained()
    path = saved(net, optimizer, tmp_path / "clean.h5")
    in_file = ckptflip.inject(path, policy=POLICIES[name], seed=11)
    in_memory = inject(TorchTarget(net, optimizer), POLICIES[name], seed=11)
    for column in ("word", "hit", "before", "after", "policies"):
        assert (getattr(in_file.plan, column) == getattr(in_memory.plan, column)).all()
    described = [
        [(t.name, t.shape, t.dtype, t.layer, t.role, t.aliases) for t in record.header.tensors]
        for record in (in_file, in_memory)
    ]
    assert described[0] == described[1]
    assert in_file.header.counts == in_memory.header.counts
    # What the model's state is now is what the altered file holds.
    live = saved(net, optimizer, tmp_path / "live.h5")
    assert same(live, tmp_path / "clean.flipped.h5")


def test_the_same_for_the_checkpoint_of_a_workload(tmp_path):
    workload = find("digits-mlp")
    workload.start(3)
    workload.train_epoch()
    workload.save(tmp_path / "c.h5")
    policy = Policy(tensors=("model/*", "optimizer/*"), count=200)
    in_file = ckptflip.inject(tmp_path / "c.h5", policy=policy, seed=9)
    in_memory = inject(TorchTarget(workload.model, workload._run.optimizer), policy, seed=9)
    assert [t.name for t in in_file.header.tensors] == [t.name for t in in_memory.header.tensors]
    assert (in_file.plan.word == in_memory.plan.word).all()
    workload.save(tmp_path / "live.h5")
    assert same(tmp_path / "live.h5", tmp_path / "c.flipped.h5")


def test_the_catalogue_is_that_of_the_file(tmp_path):
    net, optimizer = trained()
    with opened(saved(net, optimizer, tmp_path / "c.h5")) as checkpoint:
        in_file = [(t.name, t.shape, t.dtype, t.layer, t.role, t.aliases) for t in checkpoint.tensors]
    live = TorchTarget(net, optimizer).tensors
    assert in_file == [(t.name, t.shape, t.dtype, t.layer, t.role, t.aliases) for t in live]
    assert ("model/embed.weight", ("model/head.weight",)) in [(t.name, t.aliases) for t in live]


def test_records_go_from_file_to_model_and_back(tmp_path):
    net, optimizer = trained()
    path = saved(net, optimizer, tmp_path / "clean.h5")
    record = ckptflip.inject(path, count=20, seed=2)
    target = TorchTarget(net, optimizer)
    again = replay(target, record.path, new_record=tmp_path / "again.flips.jsonl")
    assert again.header.replay_of == "clean.flipped.h5.flips.jsonl"
    assert (again.plan.after == record.plan.after).all()
    altered = saved(net, optimizer, tmp_path / "altered.h5")
    ckptflip.undo(altered, tmp_path / "again.flips.jsonl")
    assert same(altered, path)
    assert undo(target, record) == len(record) == 18


def test_a_fault_leaves_no_trace_in_autograd():
    net, optimizer = trained()
    weight = net.blocks[0].weight
    loss = net(torch.arange(6)).sum()
    version = weight._version
    inject(TorchTarget(net), Policy(tensors=("blocks.0.weight",), bits="sign"), seed=1)
    assert weight.is_leaf and weight.requires_grad and weight._version == version
    loss.backward()
    with torch.inference_mode():
        inject(TorchTarget(net, optimizer), Policy(count=5), seed=1)


def test_undo_refuses_when_training_has_gone_on():
    net, optimizer = trained()
    target = TorchTarget(net, optimizer)
    record = inject(target, Policy(tensors=("model/blocks*",), bits="mantissa", count=4), seed=1)
    step(net, optimizer)
    before = bits(net.blocks[0].weight)
    with pytest.raises(RecordError, match="Training has gone on"):
        undo(target, record)
    assert (bits(net.blocks[0].weight) == before).all()


def test_no_tensor_is_copied():
    net = torch.nn.Linear(2048, 2048, bias=False)
    target = TorchTarget(net)
    armed = Armed(target, Policy(count=100))
    tracemalloc.start()
    try:
        undo(target, armed.fire(1))
        transposed = TorchTarget(module(x=net.weight.detach().T))
        inject(transposed, Policy(count=100), seed=1)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def replaced(net):
    net.conv.weight = torch.nn.Parameter(torch.zeros(2, 1, 3, 3))


def another_head(net):
    net.head = torch.nn.Linear(4, 7)


def another_block(net):
    net.blocks.append(torch.nn.Linear(4, 4))


def renamed(net):
    own = net.conv._parameters
    own["shift"] = own.pop("bias")


@pytest.mark.parametrize("change", [replaced, another_head, another_block, renamed])
def test_a_model_that_is_changed_afterwards_is_an_error(change):
    net, _ = trained()
    armed = Armed(TorchTarget(net), Policy())
    change(net)
    with pytest.raises(LiveError, match="replaced, added or removed"):
        armed.fire(1)


def test_a_parameter_that_an_equal_one_replaced_is_an_error():
    net = torch.nn.Linear(1, 1, bias=False)
    armed = Armed(TorchTarget(net), Policy())
    net.weight = torch.nn.Parameter(net.weight.detach().clone())
    with pytest.raises(LiveError, match="'weight' was replaced"):
        armed.fire(1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_another_dtype_in_the_same_place_makes_another_catalogue(dtype):
    net = torch.nn.Linear(4, 4)
    target = TorchTarget(net)
    before = target.tensors
    net.requires_grad_(False).weight.data = net.weight.data.view(dtype)
    assert [t.number.name for t in before if "weight" in t.name] == ["float32"]
    assert [t.dtype for t in target.tensors if "weight" in t.name] == [str(dtype).removeprefix("torch.")]


def test_buffers_may_come_and_go():
    net, _ = trained()
    target = TorchTarget(net)
    before = target.tensors
    net.conv.register_buffer("mask", torch.ones(3))
    net.cache = None
    names = {t.name for t in target.tensors} ^ {t.name for t in before}
    assert names == {"model/conv.mask", "buffers/cache"}
    record = inject(target, Policy(tensors=("conv.mask",), bits="sign"), seed=1)
    assert record.bits_effective == (net.conv.mask == -1).sum() == 1


def test_layers_that_are_not_made_yet_are_left_out():
    net = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    target = TorchTarget(net)
    assert [t.name for t in target.tensors] == ["model/1.bias", "model/1.weight"]
    assert {s.name for s in target.skipped} == {"model/0.bias", "model/0.weight"}


def test_what_moves_or_changes_its_dtype_is_still_found():
    net, _ = trained()
    target = TorchTarget(net)
    armed = Armed(target, Policy(tensors=("conv",), bits="15"))
    assert target.tensors is target.tensors
    net.half()
    record = armed.fire(1)
    assert record.header.tensors[0].dtype == "float16" and record.bits_effective == 1


def test_the_state_an_optimizer_loads_is_hit_and_the_old_one_is_let_go():
    net, optimizer = trained()
    target = TorchTarget(net, optimizer)
    armed = Armed(target, Policy(tensors=("optimizer/state/0/exp_avg",), count=3))
    old = weakref.ref(optimizer.state[net.embed.weight]["exp_avg"])
    state = dict(optimizer.state_dict())
    state["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()}
    optimizer.load_state_dict(state)
    del state
    gc.collect()
    assert old() is None
    before = bits(optimizer.state[net.embed.weight]["exp_avg"])
    record = armed.fire(1)
    after = bits(optimizer.state[net.embed.weight]["exp_avg"])
    assert np.bitwise_count(before ^ after).sum() == record.bits_effective == 3


def test_state_that_appears_later_is_found():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    target = TorchTarget(net, optimizer, gradients=True)
    assert not [t for t in target.tensors if t.role == "optimizer"]
    foreseen, certain = target.foreseen()
    step(net, optimizer)
    # A tied parameter has one gradient and one state; the layer of a state is its parameter's.
    assert certain and [(t.name, t.shape) for t in foreseen] == [(t.name, t.shape) for t in target.tensors]
    assert {t.layer for t in target.tensors if t.role == "optimizer"} >= {"conv", "blocks.2"}
    gradient = next(t for t in target.tensors if t.name == "gradients/conv.weight")
    assert (gradient.layer, gradient.role) == ("conv", "other")


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        torch.optim.Adagrad,
        torch.optim.NAdam,
    ],
)
def test_a_rehearsal_foresees_the_state_and_touches_nothing(make):
    torch.manual_seed(0)
    net = Net()
    optimizer = make(list(net.named_parameters()))
    target = TorchTarget(net, optimizer)
    before, rng = [bits(p) for p in net.parameters()], torch.get_rng_state()
    groups, size = dict(optimizer.param_groups[0]), len(optimizer.state)
    foreseen, certain = target.foreseen()
    assert all((bits(p) == b).all() for p, b in zip(net.parameters(), before, strict=True))
    assert (torch.get_rng_state() == rng).all() and all(p.grad is None for p in net.parameters())
    assert len(optimizer.state) == size and optimizer.param_groups[0] == groups
    step(net, optimizer)
    assert certain and [(t.name, t.shape, t.dtype, t.role) for t in foreseen] == [
        (t.name, t.shape, t.dtype, t.role) for t in target.tensors
    ]


def test_an_optimizer_that_cannot_be_rehearsed_is_said_to_be_uncertain():
    net = Net()
    _, certain = TorchTarget(net, torch.optim.LBFGS(net.parameters())).foreseen()
    assert not certain


def test_lists_in_an_optimizer_are_followed_as_they_grow():
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)
    target = TorchTarget(net, optimizer)
    counts = []
    for _ in range(3):
        optimizer.step(lambda: closure(net))
        counts.append(sum(t.name.startswith("optimizer/state/0/old_dirs/") for t in target.tensors))
    assert counts[0] < counts[1] < counts[2]


def closure(net):
    net.zero_grad()
    loss = (net(torch.arange(12.0).view(4, 3)) - 1).square().mean()
    loss.backward()
    return loss


def test_memory_that_two_tensors_share_is_one_target():
    whole = torch.zeros(4, 6)
    interleaved = torch.zeros(4, 6)
    net = module(
        whole=whole, part=whole[1:3, ::2], turned=whole.T, left=interleaved[:, :2], right=interleaved[:, 2:]
    )
    target = TorchTarget(net)
    listed = {t.name: t.aliases for t in target.tensors}
    # Which of the dense ones comes first is a matter of names.
    assert listed == {
        "model/turned": ("model/whole", "model/part"),
        "model/left": (),
        "model/right": (),
    }
    crossing = module(a=whole[:, :4], b=whole[:, 2:])
    target = TorchTarget(crossing)
    assert [t.name for t in target.tensors] == ["model/a"]
    assert "shares part of its memory with model/a" in target.skipped[0].reason


def test_what_has_no_words_of_its_own_is_left_out_and_why():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    target = TorchTarget(embedding, gradients=True)
    assert [t.name for t in target.tensors] == ["model/weight"]
    assert "sparse" in target.skipped[0].reason
    net = module(wide=torch.ones(3, 1).expand(3, 4), one=torch.ones(2), conj=torch.ones(2).cfloat().conj())
    target = TorchTarget(net)
    assert [t.name for t in target.tensors] == ["model/one"]
    assert {s.name: s.reason.split(":")[0] for s in target.skipped} == {
        "model/conj": "a view that is negated or conjugated when it is read",
        "model/wide": "expanded",
    }
    with pytest.raises(SelectionError, match="holds no tensor"):
        inject(TorchTarget(module(x=torch.ones(2, device="meta"))), Policy(), seed=1)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_what_wraps_a_model_adds_nothing_to_its_names(wrap):
    net, _ = trained()
    names = [t.name for t in TorchTarget(net).tensors]
    assert [t.name for t in TorchTarget(wrap(net)).tensors] == names


class Forgetful:
    """A target that never alters anything."""

    format = "forgetful"

    def __init__(self, inner):
        self._inner = inner
        self.read = inner.read

    @property
    def tensors(self):
        return self._inner.tensors

    def xor(self, tensor, words, masks):
        pass


class Failing(Forgetful):
    def xor(self, tensor, words, masks):
        raise MemoryError


def test_a_fault_that_did_not_take_effect_is_said():
    net, _ = trained()
    with pytest.raises(LiveError, match=r"3 of 3 faults did not take effect; the first is model/"):
        inject(Forgetful(TorchTarget(net)), Policy(count=3), seed=1)


def test_the_record_is_written_first_and_never_over_another(tmp_path):
    net, _ = trained()
    path = tmp_path / "folder" / "r.flips.jsonl"
    with contextlib.suppress(MemoryError):
        inject(Failing(TorchTarget(net)), Policy(count=3), seed=1, record=path)
    before = bits(net.embed.weight)
    assert len(record_files.read(path)) == 3
    with pytest.raises(UsageError, match="exists"):
        inject(TorchTarget(net), Policy(tensors=("embed",)), seed=1, record=path)
    assert (bits(net.embed.weight) == before).all()


def test_an_armed_policy_draws_what_a_fresh_one_draws():
    net, optimizer = trained()
    target = TorchTarget(net, optimizer)
    for policy in (Policy(count=7), [Policy(count=7), Policy(ber=1e-3)]):
        armed = Armed(target, policy)
        for seed in (1, 2):
            one = armed.fire(seed)
            undo(target, one)
            other = inject(target, policy, seed=seed)
            undo(target, other)
            assert (one.plan.word == other.plan.word).all() and (one.plan.hit == other.plan.hit).all()


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy(tensors=("conv9",)), "did you mean"),
        (Policy(tensors=("conv.bias",), count=65), "count 65 is larger than the 64 units"),
        (Policy(ranks="0"), "ranks were named"),
    ],
)
def test_what_cannot_be_drawn_is_refused_when_it_is_armed(policy, said):
    net, _ = trained()
    with pytest.raises(SelectionError, match=said):
        Armed(TorchTarget(net), policy)


def test_arguments_that_make_no_sense():
    net, optimizer = trained()
    with pytest.raises(UsageError, match="a model, an optimizer or both"):
        TorchTarget()
    with pytest.raises(UsageError, match="gradients were asked for without a model"):
        TorchTarget(optimizer=optimizer, gradients=True)
    with pytest.raises(UsageError, match=r"is a torch\.nn\.Module, not OrderedDict"):
        TorchTarget(net.state_dict())
    assert {t.role for t in TorchTarget(optimizer=optimizer).tensors} == {"optimizer", "counter"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_is_hit_like_the_processor(dtype, layout):
    here, there = raw(dtype), raw(dtype).cuda()
    target = TorchTarget(module(x=LAYOUTS[layout](there)))
    one = inject(TorchTarget(module(x=LAYOUTS[layout](here))), Policy(fraction=0.2), seed=3)
    other = inject(target, Policy(fraction=0.2), seed=3)
    assert (one.plan.word == other.plan.word).all() and (bits(here) == bits(there)).all()
    undo(target, other)
    assert (bits(there) == bits(raw(dtype))).all()
