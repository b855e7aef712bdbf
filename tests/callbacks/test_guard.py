"""The guard stops a training that diverges, or takes it back to the last good state, bit for bit."""

import json
import math

import pytest

torch = pytest.importorskip("torch")

from ckptflip import torch_h5  # noqa: E402
from ckptflip.callbacks.guard import DivergenceGuard  # noqa: E402
from ckptflip.callbacks.recovery import TorchState  # noqa: E402
from ckptflip.errors import UsageError  # noqa: E402


def training(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer


def one_step(model, optimizer, scale=1.0):
    inputs = torch.linspace(-1, 1, 24).reshape(6, 4)
    optimizer.zero_grad()
    loss = (model(inputs) ** 2).mean() * scale
    loss.backward()
    optimizer.step()
    return loss.item()


def words(model, optimizer):
    state = [*model.state_dict().values()]
    state += [v for slots in optimizer.state.values() for v in slots.values()]
    return [v.detach().clone().contiguous().view(-1).view(torch.uint8) for v in state]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_loss_that_is_not_finite_stops_the_training():
    guard = DivergenceGuard()
    assert [guard.step(s, x) for s, x in ((1, 1.0), (2, math.nan), (3, 1.0))] == [False, True, True]
    (event,) = guard.events
    assert (event.step, event.reason, event.action, event.value) == (2, "loss is nan", "stop", None)


def test_a_spike_is_measured_against_the_running_median_once_there_are_enough_losses():
    guard = DivergenceGuard(spike=4, window=5, warmup=3)
    assert not guard.step(1, 1000.0)
    assert not guard.step(2, 1.0)
    assert not guard.step(3, 900.0)
    losses = [1.0, 1.1, 0.9, 1.0, 1.2, 3.9, 5.0]
    assert [guard.step(s, x) for s, x in enumerate(losses, start=4)] == [False] * 6 + [True]
    assert guard.events[0].median == 1.1


def test_without_a_spike_limit_only_what_is_not_finite_counts():
    guard = DivergenceGuard(spike=None, warmup=1)
    assert not any(guard.step(s, 10.0**s) for s in range(50))
    assert guard.step(50, math.inf)


def test_a_rollback_restores_weights_statistics_and_optimizer_bit_for_bit(tmp_path):
    model, optimizer = training()
    guard = DivergenceGuard("rollback", folder=tmp_path, log=tmp_path / "guard.jsonl", warmup=2)
    guard.begin(TorchState(model, [optimizer]))
    for step in range(1, 6):
        assert not guard.step(step, one_step(model, optimizer))
    assert not guard.look(5)
    good = words(model, optimizer)
    one_step(model, optimizer, 1e4)
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, 0] = 0x7F800001
    assert not same(good, words(model, optimizer))
    assert not guard.step(6, math.inf)
    assert same(good, words(model, optimizer))
    assert not guard.step(7, one_step(model, optimizer))
    logged = [json.loads(line) for line in (tmp_path / "guard.jsonl").read_text().splitlines()]
    assert [(e["step"], e["action"], e["restored"]) for e in logged] == [(6, "rollback", 5)]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".h5"] == ["good.h5"]


@pytest.mark.parametrize(("bad", "kind"), [(math.nan, "nan"), (-math.inf, "inf"), (1e11, "extreme")])
def test_wrong_weights_are_found_at_the_end_of_an_epoch_and_never_kept(tmp_path, bad, kind):
    model, optimizer = training()
    guard = DivergenceGuard("rollback", folder=tmp_path)
    guard.begin(TorchState(model, [optimizer]))
    good = words(model, optimizer)
    with torch.no_grad():
        model[2].weight[0, 3] = bad
    assert not guard.look(9)
    assert same(good, words(model, optimizer))
    assert getattr(guard.events[0], kind) == 1
    assert torch_h5.load(tmp_path / "good.h5")["model"]["2.weight"].isfinite().all()


def test_weights_are_looked_at_every_so_many_steps_when_asked():
    model, optimizer = training()
    guard = DivergenceGuard(every=3)
    guard.begin(TorchState(model, [optimizer]))
    with torch.no_grad():
        model[2].bias.fill_(math.nan)
    assert [guard.step(s, 1.0) for s in (1, 2, 3)] == [False, False, True]


def test_rollbacks_that_do_not_help_end_in_a_stop(tmp_path):
    model, optimizer = training()
    guard = DivergenceGuard("rollback", folder=tmp_path, most=2)
    guard.begin(TorchState(model, [optimizer]))
    assert [guard.step(s, math.nan) for s in (1, 2, 3)] == [False, False, True]
    assert [e.action for e in guard.events] == ["rollback", "rollback", "stop"]
    assert "2 rollbacks did not help" in guard.events[-1].reason


def test_a_rollback_without_a_state_is_a_stop(tmp_path):
    guard = DivergenceGuard("rollback", folder=tmp_path)
    assert guard.step(1, math.nan)
    assert "no good state" in guard.events[0].reason


def test_weights_that_are_wrong_from_the_start_are_refused(tmp_path):
    model, optimizer = training()
    with torch.no_grad():
        model[0].bias[0] = math.inf
    with pytest.raises(UsageError, match="1 infinite values before training begins"):
        DivergenceGuard("rollback", folder=tmp_path).begin(TorchState(model, [optimizer]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"action": "explode"}, "not one of stop, rollback"),
        ({"action": "rollback"}, "pass folder="),
        ({"spike": 1.0}, "spike must be above 1"),
        ({"spike": math.nan}, "spike must be above 1"),
        ({"warmup": 0}, "warmup"),
        ({"warmup": 9, "window": 8}, "warmup"),
        ({"every": 0}, "every"),
        ({"most": 0}, "most"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        DivergenceGuard(**settings)
