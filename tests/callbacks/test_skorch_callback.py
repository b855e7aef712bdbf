"""skorch's callbacks on real nets: exactly the recorded words differ, and never twice."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("skorch")

from skorch import NeuralNetClassifier  # noqa: E402
from skorch.callbacks import Callback, Checkpoint, LoadInitState  # noqa: E402
from torch_runs import X, Y, differing, recorded, small_model, words_of  # noqa: E402

from ckptflip import record_files  # noqa: E402
from ckptflip.callbacks.guard import DivergenceGuard  # noqa: E402
from ckptflip.callbacks.schedule import InjectionSchedule  # noqa: E402
from ckptflip.callbacks.skorch import SkorchGuard, SkorchInjector, SkorchTracker  # noqa: E402
from ckptflip.callbacks.tracker import ConvergenceTracker  # noqa: E402
from ckptflip.errors import SelectionError, UsageError  # noqa: E402
from ckptflip.faults import Policy  # noqa: E402
from ckptflip.training import track  # noqa: E402
from ckptflip.training.track import Header, Row, Track  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Snapshots(Callback):
    """All words after every batch; list it behind the injector."""

    def __init__(self):
        self.after_ = []

    def on_batch_end(self, net, training=False, **rest):
        if training:
            self.after_.append(words_of(net.module_, net.optimizer_))


def net_of(*callbacks, epochs=2, seed=1, **more):
    return NeuralNetClassifier(
        small_model(seed), criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=0.01,
        max_epochs=epochs, batch_size=8, callbacks=list(callbacks), verbose=0,
        **({"train_split": None} | more),
    )  # fmt: skip


def fitted(*callbacks, **more):
    return net_of(*callbacks, **more).fit(X, Y)


def test_exactly_the_recorded_words_differ_from_the_same_run_without():
    for roles in (("model",), ("optimizer",), ("statistic",)):
        clean, faulty = Snapshots(), Snapshots()
        schedule = InjectionSchedule(Policy(roles=roles, count=5, bits="exponent"), seed=3, steps=4)
        injector = SkorchInjector(schedule)
        fitted(clean)
        fitted(injector, faulty)
        (record,) = injector.records_
        assert not any(differing(a, b) for a, b in zip(clean.after_[:4], faulty.after_[:4], strict=True))
        assert differing(clean.after_[4], faulty.after_[4]) == recorded(record)


def test_records_are_written_and_the_history_says_which_batches_were_hit(tmp_path):
    schedule = InjectionSchedule(Policy(roles=("weight",), count=2), seed=3, epochs=1)
    net = fitted(SkorchInjector(schedule, records=tmp_path))
    assert record_files.read(tmp_path / "step_000003.flips.jsonl").header.output == "epoch 1, step 3"
    hit = [[batch.get("flips") for batch in row["batches"]] for row in net.history]
    assert hit == [[None, None, None], [2, None, None]]


def test_undo_right_after_a_firing_gives_the_clean_run():
    class Undo(Callback):
        done_ = 0

        def on_batch_end(self, net, **rest):
            if injector.records_ and not self.done_:
                self.done_ = injector.undo()

    injector = SkorchInjector(InjectionSchedule(Policy(roles=("model",), count=6), seed=5, steps=2))
    undo = Undo()
    clean, again = words_of(fitted().module_), words_of(fitted(injector, undo).module_)
    assert undo.done_ == 6
    assert not differing(clean, again)


@pytest.mark.parametrize(
    "when", [{"epochs": "0-1"}, {"probability": 0.5, "once": True}, {"steps": [1, 2, 4]}]
)
def test_a_resumed_run_does_not_inject_twice(tmp_path, when):
    policy = Policy(roles=("weight", "optimizer"), count=3, bits="mantissa")

    def injector():
        return SkorchInjector(InjectionSchedule(policy, seed=4, **when))

    whole = injector()
    straight = words_of(fitted(whole, epochs=3).module_)
    first, second = injector(), injector()
    fitted(first, Checkpoint(dirname=tmp_path, monitor=None), epochs=1)
    load = LoadInitState(Checkpoint(dirname=tmp_path, monitor=None))
    resumed = fitted(load, second, epochs=2, seed=9)
    records = [r.header.output for r in (*first.records_, *second.records_)]
    assert records == [r.header.output for r in whole.records_]
    assert not differing(straight, words_of(resumed.module_))


def test_partial_fit_goes_on_and_fit_begins_anew():
    injector = SkorchInjector(InjectionSchedule(Policy(), seed=1, steps=[1, 4]))
    net = net_of(injector, epochs=1)
    net.initialize()
    net.partial_fit(X, Y)
    assert [r.header.output for r in injector.records_] == ["epoch 0, step 1"]
    net.partial_fit(X, Y)
    assert [r.header.output for r in injector.records_] == ["epoch 1, step 4"]
    again = SkorchInjector(InjectionSchedule(Policy(), seed=1, steps=[1, 4]))
    for _ in range(2):
        fitted(again)
        assert len(again.records_) == 2
    assert again.schedule.fired == []


def test_gradients_are_hit_before_the_optimizer_uses_them():
    policy = Policy(tensors=("gradients/2.bias",), bits="sign", count=2)
    injector = SkorchInjector(InjectionSchedule(policy, seed=1, steps=1), gradients=True)
    clean, faulty = Snapshots(), Snapshots()
    fitted(clean)
    fitted(injector, faulty)
    assert not differing(clean.after_[0], faulty.after_[0])
    changed = {name for name, _ in differing(clean.after_[1], faulty.after_[1])}
    assert changed == {"model/2.bias", "optimizer/state/5/exp_avg"}


def test_validation_batches_are_no_steps():
    from skorch.dataset import ValidSplit

    injector = SkorchInjector(InjectionSchedule(Policy(), seed=1, every=1))
    fitted(injector, train_split=ValidSplit(3))
    assert [r.header.output for r in injector.records_] == [
        f"epoch {e}, step {2 * e + s}" for e in (0, 1) for s in (0, 1)
    ]


@pytest.mark.parametrize(
    ("policy", "when", "error", "said"),
    [
        (Policy(tensors=("nowhere",)), {"steps": 1}, SelectionError, "matches nothing"),
        (Policy(tensors=("*bias",), count=999999), {"steps": 1}, SelectionError, "larger than"),
        (Policy(), {"epochs": 9}, UsageError, "can never fire in this run"),
        (Policy(), {"steps": 1, "ranks": 3}, UsageError, "rank 3"),
    ],
)
def test_what_cannot_work_is_refused_before_training(policy, when, error, said):
    net = net_of(SkorchInjector(InjectionSchedule(policy, seed=1, **when)))
    before = words_of(net.module)
    with pytest.raises(error, match=said):
        net.fit(X, Y)
    assert not differing(before, words_of(net.module_))


def test_nets_with_the_callback_can_be_cloned_and_searched():
    from sklearn.base import clone
    from sklearn.model_selection import GridSearchCV

    injector = SkorchInjector(InjectionSchedule(Policy(count=2), seed=1, steps=1))
    search = GridSearchCV(net_of(injector), {"lr": [0.01, 0.1]}, cv=2, refit=True, scoring="accuracy")
    search.fit(X.numpy(), Y.numpy())
    assert clone(search.best_estimator_).get_params()["callbacks"][0].schedule.seed == 1


def test_the_tracker_writes_a_track_of_the_history(tmp_path):
    from skorch.dataset import ValidSplit

    clean = Track(
        Header(workload="s", start_epoch=0, until=2), tuple(Row(epoch=e, accuracy=1.0) for e in (1, 2))
    )
    tracker = ConvergenceTracker(clean, tmp_path / "t.jsonl")
    net = fitted(SkorchTracker(tracker), train_split=ValidSplit(3))
    rows = track.read(tmp_path / "t.jsonl").rows
    assert [(r.train_loss, r.loss, r.accuracy) for r in rows] == [
        (h["train_loss"], h["valid_loss"], h["valid_acc"]) for h in net.history
    ]
    assert tracker.comparisons[-1].difference == pytest.approx(rows[-1].accuracy - 1)


def test_the_guard_stops_or_takes_the_module_back(tmp_path):
    def run(guard):
        policy = Policy(tensors=("model/2.weight",), fault="value:nan")
        after = Snapshots()
        schedule = InjectionSchedule(policy, seed=1, steps=4)
        fitted(SkorchInjector(schedule), SkorchGuard(guard), after, epochs=3)
        return after.after_

    stopped = DivergenceGuard()
    assert len(run(stopped)) == 5
    assert [(e.step, e.reason) for e in stopped.events] == [(6, "loss is nan")]
    back = DivergenceGuard("rollback", folder=tmp_path)
    after = run(back)
    assert [(e.step, e.restored) for e in back.events] == [(6, 3)]
    assert len(after) == 9
    assert not differing(after[2], after[5])
    assert all(math.isfinite(x) for x in after[-1]["model/2.weight"].view("float32"))
