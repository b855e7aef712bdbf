"""What is put into a store comes out of it, whatever it is; and what is finished stays as it is."""

from __future__ import annotations

import math
import sqlite3
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_stores import INF, NAN, SPEC, STRATA, TENSORS, attempt, begin, cells, filled, flips, trial, trials

from ckptflip.campaign.store import reading, writing
from ckptflip.campaign.store.rows import Cell, NewTrial
from ckptflip.campaign.task import Flips
from ckptflip.errors import CampaignError

WORD = st.integers(0, 2**64 - 1)
# Every float, told apart by its bits; but SQLite keeps no NaN's payload and no sign of zero.
REAL = st.none() | st.floats()
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return filled(tmp_path / "runs.db")


def same(one: float | None, other: float) -> bool:
    return one is not None and (one == other or (math.isnan(one) and math.isnan(other)))


def test_everything_that_was_put_in_comes_out(store: Path) -> None:
    with reading(store) as reader:
        assert reader.spec() == SPEC
        (revision,) = reader.revisions()
        assert (revision.number, revision.versions, revision.machine) == (1, {"numpy": "2"}, {"cores": 2})
        assert [msgspec.structs.replace(cell, id=0) for cell in reader.cells()] == cells()
        assert [(s.layer, s.field, s.bits, s.weight) for s in reader.strata()] == [
            (s.layer, s.field, s.bits, s.weight) for s in STRATA
        ]
        assert [(run.workload, run.seed, run.until, run.exact) for run in reader.runs()] == [
            ("digits", 0, 5, True), ("digits", 1, 5, True),
        ]  # fmt: skip
        assert reader.runs()[1].checkpoints == {2: "1/epoch_002.pt"}
        assert reader.run_states()[reader.runs()[1].id][4] == "state-1-4"
        assert reader.metrics() == ["accuracy", "loss"]
        assert len(reader.attempts()) == 18
        assert reader.attempts(latest=2)[-1].phases == {"train": 0.5}


def test_trials_come_back_as_columns(store: Path) -> None:
    with reading(store) as reader:
        held = reader.trials()
        keys = {cell.id: cell.key for cell in reader.cells()}
        seeds = {run.id: run.seed for run in reader.runs()}
        strata = {s.id: (s.layer, s.field) for s in reader.strata()}
        curves, spread = reader.curves("accuracy"), reader.propagation()
        columns, tensors = reader.flips(), reader.tensors()
    for i, (number, new) in enumerate(zip(held.id, trials(), strict=True)):
        assert (keys[held.cell[i]], held.number[i], seeds[held.run[i]]) == (
            new.cell,
            new.number,
            new.run_seed,
        )
        assert strata.get(held.stratum[i]) == new.stratum
        assert int(held.seed[i]) == new.seed
        assert (held.state[i], held.outcome[i], held.ended[i]) == ("done", new.outcome, "horizon")
        assert held.recovered[i] == (-1 if new.recovered is None else new.recovered)
        assert same(NAN if new.final is None else new.final, held.final[i])
        assert tuple(curves.value[curves.owner == number]) == new.values[1]["accuracy"]
        assert tuple(curves.epoch[curves.owner == number]) == (2, 3, 4, 5)
        mine = columns.trial == number
        assert mine.sum() == (0 if new.flips is None else 5)
        if new.flips is not None:
            assert columns.before[mine].tobytes() == new.flips.before
            assert columns.after[mine].tobytes() == new.flips.after
            assert columns.hit[mine].tobytes() == new.flips.hit
            assert {tensors[t].name for t in columns.tensor[mine]} == {t.name for t in TENSORS}
    assert held.seed.dtype == np.uint64
    assert (held.seed > 2**63).all()
    first = spread[0]
    assert (first.epoch, first.layer, first.minimum, first.changes) == (3, "conv1", -INF, (0.1, 0.2, INF))
    assert math.isnan(first.mean)


def test_what_was_not_measured_has_no_row_and_nan_has_one(store: Path) -> None:
    with reading(store) as reader:
        loss, clean = reader.curves("loss"), reader.clean_curves("loss")
        none = reader.curves("no such metric")
    assert loss.epoch[:3].tolist() == [3, 4, 5]
    assert np.array_equal(loss.value[:3], [0.5, NAN, INF], equal_nan=True)
    assert clean.epoch[:5].tolist() == [1, 2, 3, 4, 5]
    assert [len(column) for column in none] == [0, 0, 0]


def test_counts_per_cell(store: Path) -> None:
    with writing(store) as writer:
        writer.put_trial(trial("spec", 6, state="hung"), attempt("x", "hung"))
        counts = writer.reader.counts()
        ids = {cell.key: cell.id for cell in writer.reader.cells()}
        strata = [s.id for s in writer.reader.strata()]
    spec = counts[ids["spec"]]
    assert spec.states == {"done": 6, "hung": 1}
    assert (spec.trials, spec.done, spec.failed) == (7, 6, 1)
    assert spec.outcomes == {"identical": 2, "masked": 1, "slowed": 1, "degraded": 1, "collapsed": 1}
    assert spec.strata == {}
    assert counts[ids["stratified"]].strata == {s: {"identical": 1, "masked": 1, "slowed": 1} for s in strata}


@settings(max_examples=40)
@given(
    seed=WORD,
    words=st.lists(st.tuples(WORD, WORD, WORD), max_size=8),
    values=st.lists(REAL, min_size=1, max_size=6),
    final=REAL,
    message=TEXT,
)
def test_any_number_survives(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    words: list[tuple[int, int, int]],
    values: list[float | None],
    final: float | None,
    message: str,
) -> None:
    columns = np.array(words, dtype="<u8").reshape(-1, 3)
    hits = Flips(
        tensors=TENSORS[:1], tensor=np.zeros(len(words), "<i4").tobytes(),
        word=(np.arange(len(words), dtype="<i8") << 40).tobytes(),
        hit=columns[:, 0].tobytes(), before=columns[:, 1].tobytes(), after=columns[:, 2].tobytes(),
    )  # fmt: skip
    new = NewTrial(
        cell="spec", number=0, run_seed=0, seed=seed, outcome="masked", final=final, message=message,
        values=(tuple(range(len(values))), {"m": tuple(values)}), flips=hits,
    )  # fmt: skip
    with writing(tmp_path_factory.mktemp("any") / "runs.db") as writer:
        begin(writer)
        writer.put_trial(new, attempt("t"))
        held, curve, back = writer.reader.trials(), writer.reader.curves("m"), writer.reader.flips()
    assert int(held.seed[0]) == seed
    assert held.message[0] == message
    assert same(NAN if final is None else final, held.final[0])
    measured = [(epoch, value) for epoch, value in enumerate(values) if value is not None]
    assert curve.epoch.tolist() == [epoch for epoch, _ in measured]
    assert all(same(value, got) for (_, value), got in zip(measured, curve.value, strict=True))
    assert (back.hit.tobytes(), back.before.tobytes(), back.after.tobytes()) == (
        hits.hit, hits.before, hits.after,
    )  # fmt: skip
    assert back.word.tobytes() == hits.word


def test_flips_of_some_trials(store: Path) -> None:
    with reading(store) as reader:
        ids = reader.trials().id[[0, 2]]
        some = reader.flips(ids)
        assert set(some.trial) == set(ids)
        assert len(reader.flips([])[0]) == 0


def test_the_same_spec_is_one_revision_and_an_edited_one_another(store: Path) -> None:
    with writing(store) as writer:
        assert writer.revise(SPEC, "f" * 64, "again", {}, {}) == 1
        assert writer.revise({**SPEC, "title": "x"}, "f" * 64, "again", {}, {}) == 2
        assert writer.reader.spec()["title"] == "x"
        assert [r.command for r in writer.reader.revisions()] == ["ckptflip run", "again"]


def test_edited_cells_keep_their_trials(store: Path) -> None:
    new = Cell(key="new", position=0, workload="digits", epoch=2, until=5, label="new", wanted=1)
    spec = msgspec.structs.replace(cells(wanted=9)[0], position=1, label="renamed")
    with writing(store) as writer:
        writer.stop_cell("spec", "enough")
        writer.put_cells([new, spec])
        assert [(c.key, c.label, c.wanted, c.stopped) for c in writer.reader.cells()] == [
            ("new", "new", 1, None), ("spec", "renamed", 9, None),
        ]  # fmt: skip
        aside = {cell.key: cell.current for cell in writer.reader.cells(current=False)}
        assert aside == {"new": True, "spec": True, "control": False, "stratified": False}
        assert writer.finished()["control"][None][0] == "done"
        writer.stop_cell("spec", "enough")
        writer.put_cells([new, spec])
        assert writer.reader.cells()[1].stopped == "enough"


def test_other_strata_are_refused(store: Path) -> None:
    with writing(store) as writer:
        writer.put_strata("stratified", STRATA)
        with pytest.raises(CampaignError, match="the clean checkpoint is another one"):
            writer.put_strata("stratified", [msgspec.structs.replace(STRATA[0], bits=1)])
        with pytest.raises(CampaignError, match="has no cell 'nowhere'"):
            writer.put_strata("nowhere", STRATA)


def test_a_clean_run_may_grow_and_never_change(store: Path) -> None:
    before = {"accuracy": (0.7, 0.75, 0.75, 0.8), "loss": (1.0, 0.5, INF, NAN)}
    with writing(store) as writer:
        run = writer.put_run(
            "digits", 0, 6, None, {6: "b"}, (3, 4, 5, 6), before, ["", "", "state-0-5", "new"]
        )
        held = next(each for each in writer.reader.runs() if each.id == run)
        assert (held.until, held.exact) == (6, True)
        assert held.checkpoints == {2: "0/epoch_002.pt", 6: "b"}
        assert writer.reader.run_states()[run][6] == "new"
        values = writer.reader.values()
        with pytest.raises(CampaignError, match=r"seed 0 differs .* first in accuracy at epoch 3"):
            writer.put_run("digits", 0, 7, None, {}, (3, 4), {"accuracy": (0.71, 0.75)})
        with pytest.raises(CampaignError, match="first in loss at epoch 6"):
            writer.put_run("digits", 0, 7, None, {}, (6,), {"loss": (1.0,)})
        with pytest.raises(CampaignError, match="first in the training state at epoch 5"):
            writer.put_run("digits", 0, 7, None, {}, (5,), {}, ["other"])
        assert writer.reader.values() == values


def test_a_finished_trial_is_refused_a_second_time(store: Path) -> None:
    with writing(store) as writer:
        values, attempts = writer.reader.values(), writer.reader.attempts()
        with pytest.raises(CampaignError, match="trial 0 of cell spec is done; it never changes"):
            writer.put_trial(trial("spec", 0), attempt("again"))
        with pytest.raises(CampaignError, match="no clean run with seed 5"):
            writer.put_trial(msgspec.structs.replace(trial("spec", 9), run_seed=5), attempt("x"))
        with pytest.raises(CampaignError, match="has no stratum"):
            writer.put_trial(trial("stratified", 9, ("conv2", "")), attempt("x"))
        assert (writer.reader.values(), writer.reader.attempts()) == (values, attempts)


def test_half_a_trial_is_none(store: Path) -> None:
    doubled = flips(0)
    twice = msgspec.structs.replace(doubled, word=doubled.word[:8] * 5)
    with writing(store) as writer:
        values, attempts = writer.reader.values(), writer.reader.attempts()
        with pytest.raises(CampaignError, match="refused a row, and nothing was changed"):
            writer.put_trial(msgspec.structs.replace(trial("spec", 9), flips=twice), attempt("x"))
        with pytest.raises(CampaignError, match="refused a row"):
            writer.put_trial(msgspec.structs.replace(trial("spec", 9), outcome=None), attempt("x"))
        assert (writer.reader.values(), writer.reader.attempts()) == (values, attempts)
        writer.put_trial(trial("spec", 9), attempt("x"))
        assert writer.finished()["spec"][None][9] == "done"


@pytest.mark.parametrize("state", ["crashed", "hung", "out-of-memory"])
def test_failed_trials_give_way_and_leave_their_attempts(store: Path, state: str) -> None:
    with writing(store) as writer:
        values = writer.reader.values()
        failed = writer.put_trial(trial("spec", 6, state=state), attempt("a", state))
        writer.put_trial(trial("control", 6, state=state), attempt("b", state))
        writer.stop_cell("spec", "enough")
        assert writer.drop_failed(["stratified"]) == 0
        assert writer.drop_failed(["spec"]) == 1
        assert writer.reader.cells()[0].stopped is None
        assert writer.finished()["control"][None][6] == state
        writer.put_trial(trial("control", 6), attempt("c"))
        assert writer.finished()["control"][None][6] == "done"
        assert writer.drop_failed() == 0
        last = writer.reader.attempts()[-3:]
        assert [(a.state, a.trial) for a in last] == [(state, None), (state, None), ("done", failed)]
        assert len(writer.reader.values()["trials"]) == len(values["trials"]) + 1


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE trials SET final = 0.9 WHERE id = 1",
        "DELETE FROM trials WHERE id = 1",
        "DELETE FROM trials",
        "INSERT OR REPLACE INTO trials (id, cell, number, run, seed, state, outcome) "
        "VALUES (1, 1, 0, 1, '0', 'done', 'masked')",
        "UPDATE trial_values SET value = 0 WHERE trial = 1",
        "DELETE FROM trial_values WHERE trial = 1",
        "INSERT INTO trial_values (trial, metric, epoch, value) VALUES (1, 1, 99, 0)",
        "INSERT OR REPLACE INTO trial_values (trial, metric, epoch, value) VALUES (1, 1, 2, 0)",
        "UPDATE flips SET after = 0 WHERE trial = 1",
        "DELETE FROM flips",
        "INSERT INTO flips (trial, tensor, word, hit, before, after) VALUES (1, 1, 99, 0, 0, 0)",
        "UPDATE propagation SET nev = 0",
        "DELETE FROM propagation WHERE trial = 1",
    ],
)
def test_nothing_of_a_finished_trial_changes(store: Path, sql: str) -> None:
    with writing(store) as writer:
        values = writer.reader.values()
        with pytest.raises(
            sqlite3.IntegrityError, match=r"a finished trial (never changes|is never deleted)"
        ):
            writer.reader.connection.execute(sql)
        assert writer.reader.values() == values


def test_a_reader_changes_nothing_and_leaves_nothing_behind(store: Path) -> None:
    before = store.read_bytes()
    with reading(store) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.connection.execute("DELETE FROM attempts")
    assert store.read_bytes() == before
    assert [each.name for each in store.parent.iterdir()] == [store.name]


def test_a_reader_sees_one_moment_while_trials_come_in(store: Path) -> None:
    with writing(store) as writer, reading(store) as early:
        writer.put_trial(trial("spec", 50), attempt("x"))
        with reading(store) as late:
            assert len(late.trials().id) == 19
        assert len(early.trials().id) == 18
        assert len(early.curves("accuracy").owner) == 18 * 4


def test_each_altered_word_stands_beside_what_became_of_its_trial(store: Path) -> None:
    with reading(store) as reader:
        rows = reader.connection.execute(
            "SELECT hit, before, after FROM faults WHERE outcome = 'degraded' AND tensor = 'conv1.weight'"
        ).fetchall()
    new = flips(3)
    expected = zip(
        *(struct.unpack("<5Q", each)[:4] for each in (new.hit, new.before, new.after)), strict=True
    )
    assert rows == [tuple(f"{word:x}" for word in row) for row in expected]
