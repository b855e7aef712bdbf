"""Lightning's callbacks on its real Trainer: exactly the recorded words differ, and never twice."""

import logging
import math
import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

import torch
from torch_runs import X, Y, differing, recorded, small_model, words_of

from ckptflip import record_files
from ckptflip.callbacks.guard import DivergenceGuard
from ckptflip.callbacks.lightning import LightningGuard, LightningInjector, LightningTracker
from ckptflip.callbacks.schedule import InjectionSchedule
from ckptflip.callbacks.tracker import ConvergenceTracker
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.training import track
from ckptflip.training.track import Header, Row, Track

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    def __init__(self, seed=1):
        super().__init__()
        self.net = small_model(seed)

    def training_step(self, batch, index):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, index):
        outputs = self.net(batch[0])
        self.log("val_loss", torch.nn.functional.cross_entropy(outputs, batch[1]))
        self.log("val_acc", (outputs.argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Snapshots(pl.Callback):
    """All words after every batch; list it behind the injector."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, module, *rest):
        self.after.append(words_of(module, trainer.optimizers[0]))


def fitted(*callbacks, epochs=2, module=None, ckpt=None, checkpointing=False, validate=False, **more):
    module = module or Module()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False,
        enable_checkpointing=checkpointing, enable_progress_bar=False, enable_model_summary=False, **more,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer.fit(module, data, data if validate else None, ckpt_path=ckpt)
    return trainer, module


def test_exactly_the_recorded_words_differ_from_the_same_run_without():
    for roles in (("model",), ("optimizer",), ("statistic",)):
        clean, faulty = Snapshots(), Snapshots()
        schedule = InjectionSchedule(Policy(roles=roles, count=5, bits="exponent"), seed=3, steps=4)
        injector = LightningInjector(schedule)
        fitted(clean)
        fitted(injector, faulty)
        (record,) = injector.records
        assert not any(differing(a, b) for a, b in zip(clean.after[:4], faulty.after[:4], strict=True))
        assert differing(clean.after[4], faulty.after[4]) == recorded(record)
        assert record.bits_effective >= 1


def test_records_are_written_and_an_epoch_is_hit_at_its_first_step(tmp_path):
    injector = LightningInjector(
        InjectionSchedule(Policy(roles=("weight",)), seed=3, epochs=1), records=tmp_path
    )
    fitted(injector)
    assert record_files.read(tmp_path / "step_000003.flips.jsonl").header.output == "epoch 1, step 3"


def test_undo_right_after_a_firing_gives_the_clean_run():
    class Undo(pl.Callback):
        done = 0

        def on_train_batch_end(self, *rest):
            if injector.records and not self.done:
                self.done = injector.undo()

    injector = LightningInjector(InjectionSchedule(Policy(roles=("model",), count=6), seed=5, steps=2))
    undo = Undo()
    clean, again = fitted()[1], fitted(injector, undo)[1]
    assert undo.done == 6
    assert not differing(words_of(clean), words_of(again))


def test_accumulated_gradients_fire_once_for_each_step():
    injector = LightningInjector(InjectionSchedule(Policy(), seed=1, every=1))
    trainer, _ = fitted(injector, accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert [r.header.output[-6:] for r in injector.records] == ["step 0", "step 1", "step 2", "step 3"]


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize(
    "when", [{"epochs": "0-1"}, {"probability": 0.5, "once": True}, {"steps": [1, 2, 4]}]
)
def test_a_resumed_run_does_not_inject_twice(tmp_path, when, at):
    policy = Policy(roles=("weight", "optimizer"), count=3, bits="mantissa")

    def injector():
        return LightningInjector(InjectionSchedule(policy, seed=4, **when))

    whole = injector()
    straight = words_of(fitted(whole, epochs=3)[1])
    first = injector()
    save = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=at, filename="{step}", save_top_k=-1)
    fitted(save, first, epochs=1, checkpointing=True)
    second = injector()
    _, resumed = fitted(second, module=Module(seed=9), epochs=3, ckpt=tmp_path / f"step={at}.ckpt")
    done = [r.header.output for r in first.records if int(r.header.output.rpartition(" ")[2]) < at]
    assert done + [r.header.output for r in second.records] == [r.header.output for r in whole.records]
    if at == 3:
        # In the middle of an epoch Lightning itself goes back to the epoch's first batch.
        assert not differing(straight, words_of(resumed))


def test_a_resumed_run_with_another_schedule_is_refused(tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="x")
    fitted(
        LightningInjector(InjectionSchedule(Policy(), seed=4, steps=1)), save, epochs=1, checkpointing=True
    )
    other = LightningInjector(InjectionSchedule(Policy(), seed=4, steps=2))
    with pytest.raises(UsageError, match="differs in its schedule"):
        fitted(other, ckpt=tmp_path / "x.ckpt")


def test_gradients_are_hit_before_the_optimizer_uses_them():
    policy = Policy(tensors=("gradients/net.2.bias",), bits="sign", count=2)
    injector = LightningInjector(InjectionSchedule(policy, seed=1, steps=1), gradients=True)
    clean, faulty = Snapshots(), Snapshots()
    fitted(clean)
    fitted(injector, faulty)
    assert not differing(clean.after[0], faulty.after[0])
    changed = {name for name, _ in differing(clean.after[1], faulty.after[1])}
    assert changed == {"model/net.2.bias", "optimizer/state/5/exp_avg"}
    assert injector.records[0].header.output == "epoch 0, step 1"


def test_several_injectors_keep_their_states_apart(tmp_path):
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="x")
    two = [LightningInjector(InjectionSchedule(Policy(), seed=s, steps=s)) for s in (1, 2)]
    fitted(*two, save, epochs=1, checkpointing=True)
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    fired = [[f["step"] for f in s["fired"]] for k, s in stored.items() if k.startswith("LightningInjector")]
    assert fired == [[1], [2]]


@pytest.mark.parametrize(
    ("policy", "when", "error", "said"),
    [
        (Policy(tensors=("nowhere",)), {"steps": 1}, SelectionError, "matches nothing"),
        (Policy(tensors=("*bias",), count=999999), {"steps": 1}, SelectionError, "larger than"),
        (Policy(), {"epochs": 9}, UsageError, "can never fire in this run"),
        (Policy(), {"steps": 6}, UsageError, "can never fire in this run"),
        (Policy(), {"steps": 1, "ranks": 3}, UsageError, "rank 3"),
    ],
)
def test_what_cannot_work_is_refused_before_training(policy, when, error, said):
    module = Module()
    before = words_of(module)
    with pytest.raises(error, match=said):
        fitted(LightningInjector(InjectionSchedule(policy, seed=1, **when)), module=module)
    assert not differing(before, words_of(module))


def test_a_policy_on_optimizer_state_that_is_not_there_yet_is_let_pass_and_fires():
    policy = Policy(tensors=("optimizer/state/*/exp_avg_sq",), bits="critical")
    injector = LightningInjector(InjectionSchedule(policy, seed=1, steps=1))
    fitted(injector, epochs=1)
    assert injector.records[0].header.tensors[0].name.endswith("exp_avg_sq")


def test_nothing_is_left_behind():
    def hooks(trainer, module):
        owners = [*module.modules(), *trainer.optimizers]
        return [
            (sorted(vars(o)), [len(v) for n, v in sorted(vars(o).items()) if "hook" in n and v])
            for o in owners
        ]

    injector = LightningInjector(InjectionSchedule(Policy(), seed=1, every=1), gradients=True)
    assert hooks(*fitted(injector)) == hooks(*fitted())
    assert len(injector.records) == 6


def test_the_tracker_writes_a_track_of_what_the_module_logs(tmp_path):
    clean = Track(
        Header(workload="l", start_epoch=0, until=2), tuple(Row(epoch=e, accuracy=1.0) for e in (1, 2))
    )
    tracker = ConvergenceTracker(clean, tmp_path / "t.jsonl")
    trainer, _ = fitted(LightningTracker(tracker), validate=True)
    rows = track.read(tmp_path / "t.jsonl").rows
    assert [r.epoch for r in rows] == [1, 2]
    assert rows[-1].accuracy == pytest.approx(float(trainer.callback_metrics["val_acc"]))
    assert rows[-1].train_loss == pytest.approx(float(trainer.callback_metrics["train_loss"]))
    assert tracker.comparisons[-1].difference == pytest.approx(rows[-1].accuracy - 1)


def test_the_guard_stops_or_takes_the_module_back(tmp_path):
    def run(guard):
        policy = Policy(tensors=("model/net.2.weight",), fault="value:nan")
        after = Snapshots()
        fitted(
            LightningInjector(InjectionSchedule(policy, seed=1, steps=4)),
            LightningGuard(guard),
            after,
            epochs=3,
        )
        return after.after

    stopped = DivergenceGuard()
    assert len(run(stopped)) == 6
    assert [(e.step, e.reason) for e in stopped.events] == [(6, "loss is nan")]
    back = DivergenceGuard("rollback", folder=tmp_path)
    after = run(back)
    assert [(e.step, e.restored) for e in back.events] == [(6, 3)]
    assert len(after) == 9
    assert not differing(after[2], after[5])
    assert all(math.isfinite(x) for x in after[-1]["model/net.2.weight"].view("float32"))
