"""Faults in a plain PyTorch loop: in the right step, the same as in a file, and nothing stays behind."""

import contextlib
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import ckptflip
from ckptflip import record_files, torch_h5
from ckptflip.callbacks import InjectionSchedule, Injector
from ckptflip.errors import LiveError, RecordError, SelectionError, UsageError
from ckptflip.faults import Policy

WEIGHTS = Policy(tensors=("model/*",), roles=("weight", "bias"), bits="mantissa,sign", count=3)
SLOTS = Policy(roles=("optimizer",), bits="mantissa", count=3)
GRADIENTS = Policy(tensors=("gradients/*",), bits="all,!critical", count=3)


class Run:
    """Twelve batches an epoch, Adam or SGD, dropout and batch normalisation."""

    def __init__(self, make=None, workers=0):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(),
            torch.nn.Dropout(0.2), torch.nn.Linear(8, 3),
        )  # fmt: skip
        make = make or (lambda p: torch.optim.Adam(p, lr=0.01))
        self.optimizer = make(list(self.model.named_parameters()))
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
        data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
        self.loader = torch.utils.data.DataLoader(data, batch_size=5, num_workers=workers)
        self.steps = 0

    def batches(self):
        while True:
            yield from self.loader

    def train(self, steps, forward=None, step=None, after=None):
        batches = self.batches()
        for _ in range(self.steps % 12):
            next(batches)
        for _ in range(steps):
            torch.manual_seed(self.steps)
            inputs, targets = next(batches)
            self.optimizer.zero_grad()
            torch.nn.functional.cross_entropy((forward or self.model)(inputs), targets).backward()
            (step or self.optimizer.step)()
            if after is not None:
                after(self.steps)
            self.steps += 1

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def bits(self):
        slots = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors = [*self.model.state_dict().values(), *slots]
        return np.concatenate([np.frombuffer(t.detach().numpy().tobytes(), np.uint8) for t in tensors])


def schedule(policy=WEIGHTS, seed=4, **when):
    return InjectionSchedule(policy, seed=seed, **(when or {"steps": 5}))


@pytest.mark.parametrize("policy", [WEIGHTS, SLOTS, Policy(roles=("statistic",), bits="mantissa")])
def test_a_fault_after_a_step_is_that_of_a_file_saved_after_it(policy, tmp_path):
    live = Run()
    plan = schedule(policy)
    with Injector(plan, live.model, live.optimizer, records=tmp_path / "records") as injector:
        live.train(15)
    by_file = Run()
    by_file.train(6)
    torch_h5.save(by_file.state(), tmp_path / "six.h5")
    record = ckptflip.inject(tmp_path / "six.h5", policy=policy, seed=plan.seed_at(5))
    assert (record.plan.after == injector.records[0].plan.after).all()
    altered = torch_h5.load(tmp_path / "six.flipped.h5")
    by_file.model.load_state_dict(altered["model"])
    by_file.optimizer.load_state_dict(altered["optimizer"])
    by_file.train(9)
    assert (live.bits() == by_file.bits()).all()
    clean = Run()
    clean.train(15)
    assert (live.bits() != clean.bits()).any()
    stored = record_files.read(tmp_path / "records" / "step_000005.flips.jsonl")
    assert (stored.plan.after == record.plan.after).all()


def test_a_fault_in_a_gradient_is_seen_by_that_step_alone():
    live, clean = (Run(lambda p: torch.optim.SGD(p, lr=0.5)) for _ in range(2))
    with Injector(schedule(GRADIENTS), live.model, live.optimizer, gradients=True) as injector:
        live.train(5)
        clean.train(5)
        assert (live.bits() == clean.bits()).all() and not injector.records
        before = {n: p.detach().clone() for n, p in clean.model.named_parameters()}
        live.train(1)
        clean.train(1)
    record = injector.records[0]
    for name, parameter in clean.model.named_parameters():
        hit = dict(zip(*words_of(record, f"gradients/{name}"), strict=True))
        gradient = parameter.grad.flatten()
        for element, after in hit.items():
            value = torch.tensor([after], dtype=torch.int64).to(torch.int32).view(torch.float32)
            gradient[element] = value[0]
        expected = before[name].flatten().add(gradient, alpha=-0.5)
        found = dict(live.model.named_parameters())[name].detach().flatten()
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def words_of(record, name):
    for tensor, rows in record.plan.by_tensor():
        if record.header.tensors[tensor].name == name:
            return record.plan.word[rows].tolist(), record.plan.after[rows].astype(np.int64).tolist()
    return [], []


def sgd(momentum):
    return lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)


@contextlib.contextmanager
def pacified():
    """Without warnings: of a schedule that has not fired yet, and of the compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


WHEN = {
    "chance": {"probability": 0.3},
    "once": {"probability": 0.3, "once": True},
    "epochs": {"epochs": [0, 2]},
    "every": {"every": 4, "epochs": "1-"},
}


def told(injector, run):
    """Tells an injector the epoch, in front of each step."""

    def step():
        injector.epoch = run.steps // 12
        run.optimizer.step()

    return step


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("stop", [7, 13, 24])
def test_a_resumed_run_is_the_run_itself(when, stop, tmp_path):
    whole = Run()
    with Injector(schedule(**WHEN[when]), whole.model, whole.optimizer) as injector:
        whole.train(30, step=told(injector, whole))
    fired = [(r.header.output, r.plan.after.tolist()) for r in injector.records]
    assert fired

    first = Run()
    with pacified(), Injector(schedule(**WHEN[when]), first.model, first.optimizer) as injector:
        first.train(stop, step=told(injector, first))
    torch_h5.save(first.state() | {"injector": injector.state_dict()}, tmp_path / "c.h5")
    half = [(r.header.output, r.plan.after.tolist()) for r in injector.records]

    second, state = Run(), torch_h5.load(tmp_path / "c.h5")
    second.model.load_state_dict(state["model"])
    second.optimizer.load_state_dict(state["optimizer"])
    second.steps = stop
    with Injector(schedule(**WHEN[when]), second.model, second.optimizer) as injector:
        injector.load_state_dict(state["injector"])
        second.train(30 - stop, step=told(injector, second))
    assert half + [(r.header.output, r.plan.after.tolist()) for r in injector.records] == fired
    assert (second.bits() == whole.bits()).all()


def test_workers_change_nothing():
    found = []
    for workers in (0, 1):
        run = Run(workers=workers)
        with Injector(schedule(probability=0.4), run.model, run.optimizer) as injector:
            run.train(8)
        found.append((run.bits().tolist(), [r.plan.word.tolist() for r in injector.records]))
    assert found[0] == found[1] and found[0][1]


def test_undo_gives_every_bit_back():
    hit, clean = Run(), Run()
    with Injector(schedule(Policy(count=50)), hit.model, hit.optimizer) as injector:
        with pytest.raises(UsageError, match="nothing has fired"):
            injector.undo()
        hit.train(6)
        clean.train(6)
        assert (hit.bits() != clean.bits()).any()
        assert injector.undo() == len(injector.records[0]) == 48
        assert (hit.bits() == clean.bits()).all()
        hit.train(3)
        with pytest.raises(RecordError, match="Training has gone on"):
            injector.undo(injector.records[0])


@pytest.mark.parametrize("gradients", [False, True])
def test_no_hook_stays_behind(gradients):
    run = Run()
    hooks = [
        *(run.optimizer._optimizer_step_pre_hooks, run.optimizer._optimizer_step_post_hooks),
        *(getattr(m, n) for m in run.model.modules() for n in vars(m) if n.endswith("_hooks")),
    ]
    assert not any(hooks)
    with Injector(schedule(), run.model, run.optimizer, gradients=gradients):
        assert any(hooks[:2]) and not any(hooks[2:])
        run.train(6)
    assert not any(hooks)
    with contextlib.suppress(KeyError), Injector(schedule(), run.model, run.optimizer, gradients=gradients):
        raise KeyError
    assert not any(hooks)
    clean = Run()
    clean.train(3)
    injector = Injector(schedule(steps=3), clean.model, clean.optimizer)
    other = Run()
    other.train(6)
    clean.train(3)
    # Without a with block and without a call, it does nothing.
    assert (clean.bits() == other.bits()).all() and not injector.records


def test_calls_instead_of_hooks():
    hooked, called = Run(), Run()
    with Injector(schedule(steps=[2, 5]), hooked.model, hooked.optimizer) as injector:
        hooked.train(8)
        with pytest.raises(UsageError, match="leave the with block out"):
            injector.step()
    by_hand = Injector(schedule(steps=[2, 5]), called.model, called.optimizer)
    called.train(8, after=lambda step: by_hand.step(0, step))
    assert (hooked.bits() == called.bits()).all()
    counting = Injector(schedule(steps=[2, 5]), Run().model)
    assert [counting.step() is not None for _ in range(7)] == [False, False, True, False, False, True, False]


def test_a_step_that_a_scaler_leaves_out_is_none():
    run = Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    outputs = iter([1.0, float("inf"), 1.0, 1.0, 1.0])

    def step():
        run.model[0].weight.grad *= next(outputs)
        scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()

    with Injector(schedule(steps=2), run.model, run.optimizer) as injector:
        run.train(3, forward=lambda x: scaler.scale(run.model(x)), step=step)
        assert injector.steps == 2 and not injector.records
        run.train(2, forward=lambda x: scaler.scale(run.model(x)), step=step)
    assert injector.steps == 4 and len(injector.records) == 1


@pytest.mark.parametrize("policy", [WEIGHTS, GRADIENTS])
@pytest.mark.parametrize("compiled", ["model", "step"])
@pytest.mark.parametrize("late", [False, True])
def test_what_is_compiled_skips_no_fault(policy, compiled, late):
    """Hooks put on a module after its first compiled call are skipped; none is put there."""
    gradients = policy is GRADIENTS
    plain, other = Run(sgd(0.9)), Run(sgd(0.9))
    plan = schedule(policy, steps=5)
    with Injector(plan, plain.model, plain.optimizer, gradients=gradients) as expected:
        plain.train(8)
    torch.compiler.reset()
    with pacified():
        model, step = other.model, other.optimizer.step
        if compiled == "model":
            model = torch.compile(other.model, backend="eager")
        else:
            step = torch.compile(other.optimizer.step, backend="eager")
        if late:
            other.train(2, forward=model, step=step)
        plan = schedule(policy, steps=5)
        with Injector(plan, model, other.optimizer, gradients=gradients) as injector:
            injector.steps = other.steps
            other.train(8 - other.steps, forward=model, step=step)
    one, same = expected.records[0], injector.records[0]
    assert [t.name for t in one.header.tensors] == [t.name for t in same.header.tensors]
    assert (one.plan.word == same.plan.word).all() and (one.plan.hit == same.plan.hit).all()
    # Compiled code rounds otherwise.
    pairs = zip(plain.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)


def test_an_optimizer_that_accelerate_wraps_is_hooked():
    accelerate = pytest.importorskip("accelerate")
    plain, other = Run(), Run()
    with Injector(schedule([WEIGHTS, SLOTS]), plain.model, plain.optimizer):
        plain.train(8)
    accelerator = accelerate.Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(other.model, other.optimizer)
    with Injector(schedule([WEIGHTS, SLOTS]), model, wrapped) as injector:
        other.train(8, step=wrapped.step)
    assert len(injector.records) == 1 and (plain.bits() == other.bits()).all()


def test_gradients_that_a_closure_computes_are_refused():
    run = Run()
    with Injector(schedule(), run.model, run.optimizer) as injector:
        run.train(6, step=lambda: run.optimizer.step(lambda: torch.zeros(())))
    assert len(injector.records) == 1
    with (
        pytest.raises(UsageError, match="passes a closure"),
        Injector(schedule(GRADIENTS), run.model, run.optimizer, gradients=True),
    ):
        run.train(1, step=lambda: run.optimizer.step(lambda: torch.zeros(())))


def test_a_model_that_is_changed_while_it_trains_is_an_error():
    run = Run()
    said = pytest.raises(LiveError, match="'4' was replaced")
    with said, Injector(schedule(), run.model, run.optimizer):
        run.train(3)
        run.model[4] = torch.nn.Linear(8, 3)
        run.train(2)
        assert run.steps == 5
        run.train(1)
    assert run.steps == 5


@pytest.mark.parametrize(
    ("make", "policy", "said"),
    [
        (None, Policy(tensors=("model/9.weight",)), "matches nothing"),
        (None, Policy(tensors=("optimizer/state/0/momentum_buffer",)), "matches nothing"),
        (sgd(0.0), Policy(roles=("optimizer",)), "no tensor satisfies roles optimizer"),
        (sgd(0.9), Policy(tensors=("gradients/*",)), "matches nothing"),
        (sgd(0.9), Policy(tensors=("model/0.bias",), count=257), "count 257"),
        (
            sgd(0.9),
            Policy(tensors=("model/0.bias",), bits="31-40", fault="burst:9"),
            "no selected tensor has bits",
        ),
    ],
)
def test_a_policy_that_matches_nothing_is_refused_before_training(make, policy, said):
    run = Run(make)
    with pytest.raises(SelectionError, match=said):
        Injector(schedule(policy), run.model, run.optimizer)


def test_state_that_is_not_there_yet_may_be_named():
    for make, policy in ((None, SLOTS), (sgd(0.9), Policy(tensors=("momentum_buffer",)))):
        run = Run(make)
        assert not run.optimizer.state
        with Injector(schedule(policy, steps=0), run.model, run.optimizer) as injector:
            run.train(1)
        assert injector.records[0].bits_effective == injector.records[0].bits_hit > 0


def test_a_schedule_that_did_not_fire_is_said_at_the_end():
    run = Run()
    with (
        pytest.warns(UserWarning, match="fired nothing in the 3 optimizer steps"),
        Injector(schedule(steps=500), run.model, run.optimizer),
    ):
        run.train(3)


def test_what_makes_no_sense():
    run = Run()
    injector = Injector(schedule(), run.model, run.optimizer)
    with pytest.raises(UsageError, match="no state of an injector"):
        injector.load_state_dict(run.model.state_dict())
    with (
        pytest.warns(UserWarning, match="fired nothing"),
        injector,
        pytest.raises(UsageError, match="in use"),
    ):
        injector.__enter__()
    with pytest.raises(UsageError, match="hits rank 1"):
        Injector(schedule(steps=1, ranks=1), run.model, run.optimizer)
    with pytest.raises(UsageError, match="no hooks for its steps"), Injector(schedule(), run.model, Bare()):
        pass


class Bare:
    """An optimizer of another make."""

    param_groups = ()

    def __init__(self):
        self.state = {}
