"""The callbacks on Hugging Face's real Trainer: exactly the recorded words differ, and never twice."""

import json
import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from torch_runs import X, Y, differing, recorded, small_model, words_of  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from ckptflip import record_files  # noqa: E402
from ckptflip.callbacks.guard import DivergenceGuard  # noqa: E402
from ckptflip.callbacks.schedule import InjectionSchedule  # noqa: E402
from ckptflip.callbacks.tracker import ConvergenceTracker  # noqa: E402
from ckptflip.callbacks.transformers import TrainerGuard, TrainerInjector, TrainerTracker  # noqa: E402
from ckptflip.errors import SelectionError, UsageError  # noqa: E402
from ckptflip.faults import Policy  # noqa: E402
from ckptflip.training import track  # noqa: E402
from ckptflip.training.track import Header, Row, Track  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Module(torch.nn.Module):
    def __init__(self, seed=1):
        super().__init__()
        self.net = small_model(seed)

    def forward(self, x, labels):
        outputs = self.net(x)
        return {"loss": torch.nn.functional.cross_entropy(outputs, labels), "logits": outputs}


class Snapshots(TrainerCallback):
    """All words after every step; list it behind the injector."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **rest):
        self.after.append(words_of(model, optimizer.optimizer))


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def trained(folder, *callbacks, epochs=2, module=None, resume=None, **more):
    settings = {"save_strategy": "no", "logging_strategy": "no", "lr_scheduler_type": "constant"} | more
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=8, learning_rate=0.01,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=3, dataloader_pin_memory=False, **settings,
    )  # fmt: skip
    trainer = Trainer(
        module or Module(), args, train_dataset=DATA, eval_dataset=DATA, callbacks=list(callbacks),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_exactly_the_recorded_words_differ_from_the_same_run_without(tmp_path):
    for roles in (("model",), ("optimizer",), ("statistic",)):
        clean, faulty = Snapshots(), Snapshots()
        schedule = InjectionSchedule(Policy(roles=roles, count=5, bits="exponent"), seed=3, steps=4)
        injector = TrainerInjector(schedule)
        trained(tmp_path, clean)
        trained(tmp_path, injector, faulty)
        (record,) = injector.records
        assert not any(differing(a, b) for a, b in zip(clean.after[:4], faulty.after[:4], strict=True))
        found = differing(clean.after[4], faulty.after[4])
        assert found == recorded(record)


def test_records_are_written_and_an_epoch_is_hit_at_its_first_step(tmp_path):
    schedule = InjectionSchedule(Policy(roles=("weight",)), seed=3, epochs=1)
    trained(tmp_path / "run", TrainerInjector(schedule, records=tmp_path))
    assert record_files.read(tmp_path / "step_000003.flips.jsonl").header.output == "epoch 1, step 3"


def test_undo_right_after_a_firing_gives_the_clean_run(tmp_path):
    class Undo(TrainerCallback):
        done = 0

        def on_step_end(self, *args, **rest):
            if injector.records and not self.done:
                self.done = injector.undo()

    injector = TrainerInjector(InjectionSchedule(Policy(roles=("model",), count=6), seed=5, steps=2))
    undo = Undo()
    clean = words_of(trained(tmp_path).model)
    again = words_of(trained(tmp_path, injector, undo).model)
    assert undo.done == 6
    assert not differing(clean, again)


def test_accumulated_gradients_fire_once_for_each_step(tmp_path):
    injector = TrainerInjector(InjectionSchedule(Policy(), seed=1, every=1))
    trained(tmp_path, injector, gradient_accumulation_steps=3)
    assert [r.header.output for r in injector.records] == ["epoch 0, step 0", "epoch 1, step 1"]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(
    "when", [{"epochs": "0-1"}, {"probability": 0.5, "once": True}, {"steps": [1, 2, 4]}]
)
def test_a_resumed_run_does_not_inject_twice(tmp_path, when, restore):
    policy = Policy(roles=("weight", "optimizer"), count=3, bits="mantissa")

    def injector():
        return TrainerInjector(InjectionSchedule(policy, seed=4, **when))

    whole = injector()
    straight = words_of(trained(tmp_path / "whole", whole, epochs=3).model)
    first = injector()
    saving = {"save_strategy": "steps", "save_steps": 5}
    trained(tmp_path / "run", first, epochs=3, max_steps=5, **saving)
    stored = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert [len(s["fired"]) for k, s in stored["stateful_callbacks"].items() if "ckptflip" in k] == [
        len(first.records)
    ]
    second = injector()
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    resumed = trained(
        tmp_path / "again", second, module=Module(seed=9), epochs=3, resume=checkpoint,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    done = [r.header.output for r in first.records]
    assert done + [r.header.output for r in second.records] == [r.header.output for r in whole.records]
    assert not differing(straight, words_of(resumed.model))


def test_gradients_are_hit_before_the_optimizer_uses_them(tmp_path):
    policy = Policy(tensors=("gradients/net.2.bias",), bits="sign", count=2)
    injector = TrainerInjector(InjectionSchedule(policy, seed=1, steps=1), gradients=True)
    clean, faulty = Snapshots(), Snapshots()
    trained(tmp_path, clean)
    trained(tmp_path, injector, faulty)
    assert not differing(clean.after[0], faulty.after[0])
    changed = {name for name, _ in differing(clean.after[1], faulty.after[1])}
    assert "model/net.2.bias" in changed and len(changed) == 2
    assert changed - {"model/net.2.bias"} < {f"optimizer/state/{i}/exp_avg" for i in range(6)}


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
def test_what_cannot_work_is_refused_before_training(tmp_path, policy, when, error, said):
    module = Module()
    before = words_of(module)
    with pytest.raises(error, match=said):
        trained(tmp_path, TrainerInjector(InjectionSchedule(policy, seed=1, **when)), module=module)
    assert not differing(before, words_of(module))


def test_another_schedule_than_the_checkpoints_starts_its_own_count(tmp_path):
    """The state of another seed is another injector's; of this seed but another schedule it is refused."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(
        tmp_path / "run", TrainerInjector(InjectionSchedule(Policy(), seed=4, steps=1)), max_steps=3, **saving
    )
    other = TrainerInjector(InjectionSchedule(Policy(), seed=4, steps=5))
    with pytest.raises(UsageError, match="differs in its schedule"):
        trained(tmp_path / "again", other, resume=str(tmp_path / "run" / "checkpoint-3"))


def test_the_tracker_writes_a_track_of_what_is_evaluated(tmp_path):
    clean = Track(
        Header(workload="t", start_epoch=0, until=2), tuple(Row(epoch=e, accuracy=1.0) for e in (1, 2))
    )
    tracker = ConvergenceTracker(clean, tmp_path / "t.jsonl")
    trained(tmp_path / "run", TrainerTracker(tracker), eval_strategy="epoch", logging_strategy="epoch")
    rows = track.read(tmp_path / "t.jsonl").rows
    assert [r.epoch for r in rows] == [1, 2]
    assert all(0 <= r.accuracy <= 1 and r.loss > 0 and r.train_loss > 0 for r in rows)
    assert tracker.comparisons[-1].difference == pytest.approx(rows[-1].accuracy - 1)


def test_the_guard_stops_or_takes_the_model_back(tmp_path):
    def run(guard):
        policy = Policy(tensors=("model/net.2.weight",), fault="value:nan")
        after = Snapshots()
        injector = TrainerInjector(InjectionSchedule(policy, seed=1, steps=4))
        trained(
            tmp_path / "run", injector, TrainerGuard(guard), after, epochs=3, logging_steps=1,
            logging_strategy="steps", logging_nan_inf_filter=False,
        )  # fmt: skip
        return after.after

    stopped = DivergenceGuard()
    assert len(run(stopped)) == 6
    assert [(e.step, e.reason) for e in stopped.events] == [(6, "loss is nan")]
    back = DivergenceGuard("rollback", folder=tmp_path / "good")
    after = run(back)
    assert [(e.step, e.restored) for e in back.events] == [(6, 3)]
    assert len(after) == 9
    assert all(math.isfinite(x) for x in after[-1]["model/net.2.weight"].view("float32"))
