"""Merged shards equal the store of one machine; what does not belong together is refused."""

from __future__ import annotations

import itertools
import random
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest
from sample_stores import SPEC, STRATA, attempt, begin, contents, filled, trial, trials

from ckptflip.campaign.store import merge, reading, writing
from ckptflip.errors import CampaignError, UsageError


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    return filled(tmp_path / "alone.db")


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [filled(tmp_path / f"{i}.db", (i, 3)) for i in range(3)]


def test_shards_make_the_undisturbed_store(alone: Path, shards: list[Path], tmp_path: Path) -> None:
    before = [shard.read_bytes() for shard in shards]
    out = tmp_path / "merged.db"
    done = merge(shards, out)
    assert (done.cells, done.trials, done.failed, done.shared) == (3, 18, 0, 0)
    assert contents(out) == contents(alone)
    assert [shard.read_bytes() for shard in shards] == before
    names = {"merged.db", "alone.db", *(shard.name for shard in shards)}
    assert {each.name for each in tmp_path.iterdir()} == names
    with reading(out) as reader, reading(alone) as one:
        (revision,) = {r.fingerprint for r in reader.revisions()}
        assert revision == one.revisions()[-1].fingerprint
        held, attempts = reader.trials(), reader.attempts()
    assert sorted(each.trial or 0 for each in attempts) == sorted(held.id)
    assert [each.ended for each in attempts] == sorted(each.ended for each in attempts)


def test_the_merged_store_goes_on(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged.db"
    merge(shards[:2], out)
    with writing(out) as writer:
        begin(writer)
        done = writer.finished()
        for new in trials():
            if new.number not in done.get(new.cell, {}).get(new.stratum, {}):
                writer.put_trial(new, attempt("later"))
        with pytest.raises(sqlite3.IntegrityError, match="never changes"):
            writer.reader.connection.execute("UPDATE trials SET final = 0")
    assert contents(out) == contents(filled(tmp_path / "alone.db"))
    connection = sqlite3.connect(out)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_any_order_and_grouping_gives_the_same(alone: Path, shards: list[Path], tmp_path: Path) -> None:
    whole = contents(alone)
    for order in itertools.permutations(shards):
        merge(order, tmp_path / "all.db", overwrite=True)
        assert contents(tmp_path / "all.db") == whole
    merge(shards[:2], tmp_path / "two.db")
    done = merge([tmp_path / "two.db", shards[2], shards[0]], tmp_path / "all.db", overwrite=True)
    assert done.shared == 6
    assert contents(tmp_path / "all.db") == whole
    with reading(tmp_path / "all.db") as reader:
        assert len(reader.attempts()) == 18, "an attempt that is in two stores is one"
        assert all(each.trial is not None for each in reader.attempts())


def test_random_overlapping_parts(alone: Path, tmp_path: Path) -> None:
    draw = random.Random(3)
    for _ in range(5):
        parts: list[list[msgspec.Struct]] = [[], [], []]
        for new in trials():
            for part in draw.sample(parts, draw.randint(1, 3)):
                part.append(new)
        paths = []
        for i, part in enumerate(parts):
            draw.shuffle(part)
            paths.append(tmp_path / f"part{i}.db")
            paths[-1].unlink(missing_ok=True)
            with writing(paths[-1]) as writer:
                begin(writer)
                for new in part:
                    if draw.random() < 0.3:
                        writer.put_trial(
                            trial(new.cell, new.number, new.stratum, state="crashed"), attempt("a")
                        )
                    writer.put_trial(new, attempt("b"))
        done = merge(paths, tmp_path / "all.db", overwrite=True)
        assert done.shared == sum(map(len, parts)) - 18
        assert contents(tmp_path / "all.db") == contents(alone)


@pytest.mark.parametrize("first", [0, 1])
def test_a_failed_trial_gives_way_to_one_that_is_done(tmp_path: Path, first: int) -> None:
    paths = [tmp_path / "failed.db", tmp_path / "done.db"]
    with writing(paths[0]) as writer:
        begin(writer)
        writer.put_trial(trial("spec", 0, state="hung"), attempt("hung", "hung"))
        writer.put_trial(trial("spec", 1, state="crashed"), attempt("crashed", "crashed"))
    with writing(paths[1]) as writer:
        begin(writer)
        writer.put_trial(trial("spec", 0), attempt("done"))
    done = merge([paths[first], paths[1 - first]], tmp_path / "all.db")
    assert (done.trials, done.failed) == (2, 1)
    with reading(tmp_path / "all.db") as reader:
        assert dict(zip(reader.trials().number, reader.trials().state, strict=True)) == {
            0: "done",
            1: "crashed",
        }
        assert [a.task for a in reader.attempts()] == ["hung", "crashed", "done"]
        places = [a.trial for a in reader.attempts()]
    assert places[0] is None
    assert None not in places[1:]


@pytest.mark.parametrize(("step", "kept"), [(1, ["old", "f" * 64, "f" * 64]), (0, ["old", "f" * 64])])
def test_all_revisions_are_kept_in_order_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, kept: list[str]
) -> None:
    # Within a millisecond each store's own order holds, and what is the same in both is one.
    times = itertools.count(0, step)
    written = sys.modules["ckptflip.campaign.store.writing"]
    monkeypatch.setattr(written, "_now", lambda: f"2026-01-01T00:00:00.{next(times):03}+00:00")
    paths = [tmp_path / "a.db", tmp_path / "b.db"]
    for i, path in enumerate(paths):
        with writing(path) as writer:
            if i == 0:
                writer.revise({**SPEC, "seed": 3}, "old", "first", {}, {})
            begin(writer)
    merge(paths[::-1], tmp_path / "all.db")
    with reading(tmp_path / "all.db") as reader:
        found = reader.revisions()
        assert [r.fingerprint for r in found] == kept
        assert [r.created for r in found] == sorted(r.created for r in found)
        assert reader.spec() == SPEC


def refused(paths: list[Path], why: str) -> None:
    out = paths[0].with_name("out.db")
    with pytest.raises(CampaignError, match=why):
        merge(paths, out)
    assert not list(out.parent.glob("*out.db*")), "nothing half written is left"


def test_another_machines_clean_runs_are_refused(shards: list[Path], tmp_path: Path) -> None:
    other = filled(tmp_path / "other.db", (1, 3), shift=1e-9)
    refused(
        [shards[0], other],
        r"other\.db and .*0\.db differ: the clean run of 'digits' with seed 0 has accuracy 0\.600000001 at "
        r"epoch 2 in one and 0\.6 in the other\. Other libraries",
    )


def test_another_training_state_is_refused(shards: list[Path]) -> None:
    with writing(shards[1]) as writer:
        writer.put_run("digits", 1, 6, None, {}, (6,), {}, ["one"])
    with writing(shards[2]) as writer:
        writer.put_run("digits", 1, 6, None, {}, (6,), {}, ["other"])
    refused(shards, r"2\.db and those before it differ: .* seed 1 has another training state at epoch 6")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"final": 0.123}, "result"),
        ({"values": ((2,), {"accuracy": (0.5,)})}, "values by epoch"),
        ({"flips": None}, "altered words"),
        ({"spread": ()}, "propagation"),
    ],
)
def test_another_result_of_the_same_trial_is_refused(
    shards: list[Path], tmp_path: Path, change: dict[str, object], what: str
) -> None:
    other = tmp_path / "other.db"
    with writing(other) as writer:
        begin(writer)
        writer.put_trial(msgspec.structs.replace(trial("spec", 3), **change), attempt("x"))
    refused(
        [*shards, other], rf"0\.db and .*other\.db differ: trial 3 of 'cell spec' .* with another {what}\."
    )


def test_another_campaign_is_refused(shards: list[Path], tmp_path: Path) -> None:
    with writing(tmp_path / "other.db") as writer:
        writer.revise(SPEC, "e" * 64, "x", {}, {})
    refused([*shards, tmp_path / "other.db"], "other.db and .*0.db are of different campaigns")


def test_other_strata_are_refused(shards: list[Path], tmp_path: Path) -> None:
    with writing(tmp_path / "other.db") as writer:
        begin(writer)
        writer.reader.connection.execute("UPDATE strata SET bits = bits + 1")
    refused([*shards, tmp_path / "other.db"], f"has {STRATA[0].bits + 1} bits in one and {STRATA[0].bits}")


def test_inputs_that_cannot_be_read(shards: list[Path], tmp_path: Path) -> None:
    refused([shards[0], tmp_path / "no.db"], "no.db does not exist")
    foreign = tmp_path / "foreign.db"
    foreign.write_text("x" * 1000)
    refused([shards[0], foreign], "foreign.db is not the store of a campaign")
    damaged = bytearray(shards[1].read_bytes())
    damaged[8 * 4096 : 16 * 4096] = bytes(8 * 4096)
    shards[1].write_bytes(damaged)
    refused(shards, r"1\.db is damaged")


def test_names_that_make_no_sense(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.db"
    with pytest.raises(UsageError, match="name the stores"):
        merge([], out)
    with pytest.raises(UsageError, match="is named twice"):
        merge([shards[0], tmp_path / "." / "0.db"], out)
    with pytest.raises(UsageError, match="is one of the stores"):
        merge(shards, shards[0], overwrite=True)
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists; name another, or replace it with --overwrite"):
        merge(shards, out)
    assert out.read_text() == "mine"


def test_a_store_that_is_being_written_is_not_replaced(shards: list[Path], alone: Path) -> None:
    with writing(alone), pytest.raises(CampaignError, match="in use"):
        merge(shards, alone, overwrite=True)
    with reading(alone), pytest.raises(CampaignError, match="another program has the store open"):
        merge(shards[:1], alone, overwrite=True)
    assert len(contents(alone)["trials"]) == 18
    merge(shards[:1], alone, overwrite=True)
    assert len(contents(alone)["trials"]) == 6
