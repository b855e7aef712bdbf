"""When a run is hit follows from the seed and the step alone; what can never fire is refused."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import ckptflip
from ckptflip import torch_h5
from ckptflip.callbacks import InjectionSchedule
from ckptflip.errors import SelectionError, UsageError
from ckptflip.faults import Policy
from ckptflip.live.torch_tensors import TorchTarget

PER_EPOCH = 10


def hits(schedule, epochs=6):
    """The steps that fire in a loop of ten steps an epoch."""
    return [step for step in range(epochs * PER_EPOCH) if schedule.fires(step // PER_EPOCH, step)]


def driven(schedule, start=0, end=60, target=None):
    """The steps that are hit when the schedule drives a loop."""
    target = target or TorchTarget(torch.nn.Linear(3, 2))
    found = []
    for step in range(start, end):
        if schedule.fire(target, epoch=step // PER_EPOCH, step=step) is not None:
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"steps": 7}, [7]),
        ({"steps": [12, 3]}, [3, 12]),
        ({"steps": "3-5,12"}, [3, 4, 5, 12]),
        ({"steps": "57-"}, [57, 58, 59]),
        ({"steps": range(0, 40, 20)}, [0, 20]),
        ({"steps": np.arange(2)}, [0, 1]),
        ({"every": 25}, [24, 49]),
        ({"every": 20, "steps": "20-"}, [39, 59]),
        ({"every": 4, "epochs": [1, 4]}, [11, 15, 19, 43, 47]),
        ({"steps": "8-11", "epochs": 1}, [10, 11]),
        ({"probability": 1.0, "steps": "5-6"}, [5, 6]),
    ],
)
def test_conditions_hold_together(given, expected):
    schedule = InjectionSchedule(Policy(), seed=1, **given)
    assert hits(schedule) == expected
    assert driven(schedule) == expected


def test_epochs_alone_hit_the_first_step_of_each():
    schedule = InjectionSchedule(Policy(), seed=1, epochs="1,3-4")
    assert driven(schedule) == [10, 30, 40]
    # A loop that begins inside an epoch hits it at once.
    assert driven(InjectionSchedule(Policy(), seed=1, epochs="1,3-4"), start=34) == [34, 40]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, [0]), ({"every": 7}, [6]), ({"epochs": "2-"}, [20]), ({"steps": [9, 4]}, [4])],
)
def test_once(given, expected):
    assert driven(InjectionSchedule(Policy(), seed=1, once=True, **given)) == expected


def test_chance_depends_on_seed_and_step_alone():
    one, other = (InjectionSchedule(Policy(), seed=5, probability=0.1) for _ in range(2))
    forwards = [step for step in range(20_000) if one.fires(None, step)]
    backwards = [step for step in reversed(range(20_000)) if other.fires(0, step)]
    assert forwards == backwards[::-1]
    # 2000 expected, with a standard deviation of 42.
    assert 1830 < len(forwards) < 2170
    # Neighbouring steps do not know of each other: 200 pairs expected, standard deviation 14.
    pairs = np.count_nonzero(np.diff(forwards) == 1)
    assert 140 < pairs < 260
    elsewhere = InjectionSchedule(Policy(), seed=6, probability=0.1)
    both = sum(elsewhere.fires(None, step) for step in forwards)
    assert 130 < both < 270
    # What is hit at a step is the same whatever the odds are.
    assert one.seed_at(77) == InjectionSchedule(Policy(), seed=5, steps=77).seed_at(77)
    assert len({one.seed_at(step) for step in range(1000)}) == 1000


def test_global_random_numbers_are_neither_used_nor_moved():
    target = TorchTarget(torch.nn.Linear(3, 2))
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    schedule = InjectionSchedule(Policy(count=3), seed=5, probability=0.5)
    found = driven(schedule, target=target)
    assert (torch.get_rng_state() == state).all()
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    torch.manual_seed(99)
    assert driven(InjectionSchedule(Policy(count=3), seed=5, probability=0.5)) == found


SCHEDULES = {
    "probability": {"probability": 0.2},
    "once": {"probability": 0.2, "once": True},
    "epochs": {"epochs": [1, 2, 4]},
    "every": {"every": 7},
    "open": {"steps": "20-", "epochs": "3-"},
}


@pytest.mark.parametrize("stop", [0, 1, 11, 25, 36])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_schedule_hits_nothing_twice_and_misses_nothing(name, stop):
    def fresh():
        return InjectionSchedule(Policy(), seed=8, **SCHEDULES[name])

    whole = driven(fresh())
    first = fresh()
    before = driven(first, end=stop)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second = fresh()
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert second.fired == first.fired
    assert before + driven(second, start=stop) == whole
    third = fresh()
    third.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + driven(third, start=stop) == whole


def test_a_step_that_was_hit_is_not_hit_again():
    schedule = InjectionSchedule(Policy(), seed=1, steps="3-5")
    target = TorchTarget(torch.nn.Linear(3, 2))
    made = [schedule.fire(target, step=step) is not None for step in (3, 3, 4, 3)]
    assert made == [True, False, True, False]


def test_its_state_is_stored_by_torch_h5(tmp_path):
    schedule = InjectionSchedule(Policy(tensors=("weight",)), seed=2**63, steps=3)
    driven(schedule)
    torch_h5.save({"injection": schedule.state_dict()}, tmp_path / "s.h5")
    assert torch_h5.load(tmp_path / "s.h5")["injection"] == schedule.state_dict()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": 2, "steps": 3}, "differs in its seed"),
        ({"seed": 1, "steps": 4}, "differs in its schedule"),
        ({"seed": 1, "steps": 3, "ranks": 1}, "differs in its schedule"),
    ],
)
def test_the_state_of_another_schedule_is_refused(given, said):
    state = InjectionSchedule(Policy(), seed=1, steps=3).state_dict()
    with pytest.raises(UsageError, match=said):
        InjectionSchedule(Policy(), **given).load_state_dict(state)
    with pytest.raises(UsageError, match="no state of an injection schedule"):
        InjectionSchedule(Policy(), **given).load_state_dict({"epoch": 3})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "does not say when"),
        ({"probability": 0}, "can never fire: its probability is 0"),
        ({"probability": 1.5}, "above 0 and at most 1"),
        ({"probability": float("nan")}, "above 0 and at most 1"),
        ({"probability": "0.5"}, "above 0 and at most 1"),
        ({"every": 0}, "1 or more"),
        ({"every": True}, "1 or more"),
        ({"every": 50, "steps": "50-98"}, r"no step of '50-98' is the last of 50; .* 49, 99"),
        ({"steps": []}, "can never fire: steps is empty"),
        ({"epochs": ()}, "can never fire: epochs is empty"),
        ({"ranks": [], "steps": 1}, "can never fire: ranks is empty"),
        ({"steps": -1}, "whole numbers from 0"),
        ({"steps": [1.5]}, "whole numbers from 0"),
        ({"epochs": True}, "whole numbers from 0"),
        ({"steps": "5-3"}, "runs backwards; write 3-5"),
        ({"steps": "three"}, "'three' is not a number"),
        ({"steps": "1,,2"}, "'' is not a number"),
        ({"steps": 3, "seed": -1}, "seed"),
        ({"steps": 3, "policy": ()}, "between 1 and 16 policies"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(given, said):
    with pytest.raises(UsageError, match=said):
        InjectionSchedule(given.pop("policy", Policy()), **{"seed": 1, **given})


def test_a_policy_that_matches_nothing_is_refused_before_anything_fires():
    target = TorchTarget(torch.nn.Linear(3, 2))
    schedule = InjectionSchedule([Policy(), Policy(tensors=("conv1",))], seed=1, steps=3)
    with pytest.raises(SelectionError, match="conv1"):
        schedule.check(target.tensors)
    state = InjectionSchedule(Policy(roles=("state",)), seed=1, steps=3)
    with pytest.raises(SelectionError, match="state"):
        state.check(target.tensors)
    state.check(target.tensors, certain=False)


def test_an_epoch_has_to_be_told_where_epochs_are_named():
    schedule = InjectionSchedule(Policy(), seed=1, epochs=3)
    with pytest.raises(UsageError, match="which one it is in"):
        schedule.fire(TorchTarget(torch.nn.Linear(3, 2)), step=0)


def test_ranks():
    schedule = InjectionSchedule(Policy(), seed=1, steps=[2, 4], ranks="1-2")
    assert [schedule.hits(rank) for rank in range(4)] == [False, True, True, False]
    target = TorchTarget(torch.nn.Linear(3, 2))
    assert schedule.fire(target, step=2, rank=0, world=4) is None
    # It is noted on all ranks, so that the checkpoint of any of them can be resumed from.
    assert [one.step for one in schedule.fired] == [2]
    with pytest.raises(UsageError, match="hits rank 2, and there is none: the run has 2 processes"):
        schedule.check(target.tensors, world=2)
    InjectionSchedule(Policy(), seed=1, steps=1, ranks="1-").check(target.tensors, world=2)


def test_records_are_files_that_tell_epoch_and_step(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    torch_h5.save({"model": model.state_dict()}, tmp_path / "clean.h5")
    schedule = InjectionSchedule(Policy(count=4), seed=1, steps=[2, 123])
    folder = tmp_path / "records"
    made = schedule.fire(TorchTarget(model), epoch=1, step=2, records=folder)
    assert made.path == str(folder / "step_000002.flips.jsonl")
    read = ckptflip.record_files.read(made.path)
    assert (read.header.output, read.header.format) == ("epoch 1, step 2", "pytorch live")
    # The seed in the record is all that is needed to do the same to a file.
    in_file = ckptflip.inject(tmp_path / "clean.h5", count=4, seed=read.header.seed)
    assert (in_file.plan.word == read.plan.word).all() and (in_file.plan.after == read.plan.after).all()
    # A run that was killed and resumed from before writes the same record again; another run must not.
    resumed = InjectionSchedule(Policy(count=4), seed=1, steps=2)
    resumed.fire(TorchTarget(torch.nn.Linear(3, 2)), step=2, records=folder)
    other = InjectionSchedule(Policy(count=4), seed=2, steps=2)
    with pytest.raises(UsageError, match="exists"):
        other.fire(TorchTarget(torch.nn.Linear(3, 2)), step=2, records=folder)
    assert other.fired == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_alike_and_takes_no_model_along(copied):
    model = torch.nn.Linear(3, 2)
    schedule = InjectionSchedule(Policy(), seed=1, probability=0.3)
    driven(schedule, end=20, target=TorchTarget(model))
    other = copied(schedule)
    gone = weakref.ref(model)
    rest = driven(other, start=20)
    del model
    assert rest == driven(schedule, start=20) and schedule.fired == other.fired
    # The original now holds another target, so the first model is free, unless the copy kept it.
    gc.collect()
    assert gone() is None


def test_a_policy_may_come_from_a_file(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('bits = "sign"\ncount = 2\n')
    schedule = InjectionSchedule(path, seed=1, steps=0)
    assert schedule.policies == (Policy(bits="sign", count=2),)


def test_no_framework_is_imported_with_the_schedule():
    code = (
        "import sys, ckptflip.callbacks, ckptflip.callbacks.schedule, ckptflip.live\n"
        "print([m for m in ('torch', 'keras', 'tensorflow', 'lightning', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
