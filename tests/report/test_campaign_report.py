"""The page of a report: what it says of stores whose numbers are known; strangers' names; all sizes."""

from __future__ import annotations

import html
import re
from pathlib import Path

import campaign_stores as stores
import numpy as np
import played_campaigns
import pytest
from campaign_stores import ATTEMPT, CLEAN
from click.testing import CliRunner
from damaged_stores import damages

from ckptflip.campaign.estimates import rates
from ckptflip.campaign.statistics.intervals import clopper_pearson, upper_bound
from ckptflip.campaign.store.reading import reading
from ckptflip.campaign.store.writing import writing
from ckptflip.cli.report import command
from ckptflip.errors import CampaignError, UsageError
from ckptflip.report.campaign import write
from ckptflip.report.campaign.gathering import gather
from ckptflip.report.campaign.page import render
from ckptflip.report.campaign.rates import cell_rows
from ckptflip.report.campaign.words import percent
from ckptflip.report.campaign.worst import worst

SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def page(path: Path) -> str:
    return path.read_text("utf-8")


def text(markup: str) -> str:
    """What a reader sees, figures left out: one line."""
    shown = re.sub(r"<style>.*?</style>", "", SVG.sub("", markup), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", shown)))


def row(markup: str, table: str, name: str) -> list[str]:
    """The cells of a table's row, as text."""
    section = re.search(rf'<section id="{table}">.*?</section>', markup, re.DOTALL)
    assert section
    for found in re.findall(r"<tr>(.*?)</tr>", section[0], re.DOTALL):
        cells = [text(cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", found, re.DOTALL)]
        if cells[0] == name:
            return cells
    raise AssertionError(f"no row {name}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    stores.tiny(folder / "runs.db")
    write(folder / "runs.db", folder / "report")
    return folder


@pytest.fixture(scope="module")
def tiny_page(tiny):
    return page(tiny / "report" / "index.html")


def test_the_headline_says_what_was_counted(tiny_page):
    said = text(tiny_page)
    assert "5 altered restarts in 2 cells came to an end. 1 further one did not: 1 crashed." in said
    assert "2 (40 %) absorbed the fault: 1 ended bit for bit as the clean run and 1 stayed within" in said
    assert "1 (20 %) left the tolerance and came back, 1 (20 %) ended outside the tolerance" in said
    assert "Degraded or collapsed were from 0 of 1 (10 flips) to 2 of 4 (1 flip)." in said
    assert "not finished" not in said


def test_the_table_holds_rates_with_exact_intervals(tiny_page):
    cells = row(tiny_page, "cells", "1 flip")
    low, high = clopper_pearson(1, 4)
    quarter = f"1 · 25 % {percent(float(low), unit=False)} – {percent(float(high))}"
    assert quarter == "1 · 25 % 0.63 – 81 %"  # Clopper and Pearson's for 1 of 4: 0.0063 to 0.8059
    assert cells[1] == "4"
    assert [cells[at] for at in (2, 3, 5, 6)] == [quarter] * 4
    assert cells[4] == f"0 ≤ {percent(float(upper_bound(4)))}" == "0 ≤ 53 %"  # 1 − 0.05^(1/4) = 0.527
    assert cells[7] == "2 · 50 % 6.8 – 93 %"
    # Final accuracy of the three that did not collapse: 0, −0.002 and −0.05 below the clean run's.
    assert cells[8].startswith("−0.0173 ") and cells[8].endswith("of 3 trials")
    # Two of four were never outside; the median is right after the restart.
    assert cells[9].split()[0] == "0"


def test_the_other_cell_has_one_trial_and_one_failed(tiny_page):
    cells = row(tiny_page, "cells", "10 flips")
    assert cells[1] == "1 + 1 failed"
    assert cells[4] == "1 · 100 % 2.5 – 100 %"
    assert cells[8] == "−0.004 a single value has no spread"
    assert cells[9] == "3"


def test_failed_trials_are_told_with_signal_and_message(tiny_page):
    assert row(tiny_page, "failed", "10 flips") == ["10 flips", "1", "crashed", "SIGKILL (9)", "killed"]


def test_the_worst_trials_come_with_their_flips(tiny_page):
    said = text(tiny_page)
    collapsed = said.index("1 flip , trial 3")
    assert collapsed < said.index("1 flip , trial 2")
    # 1.5 is 3fc00000; its critical bit makes it a NaN, 7fc00000.
    assert "conv1.weight [1, 2] 30 3fc00000 → 7fc00000 1.5 → nan" in said
    # 0.25 is 3e800000; bit 29 off: 1e800000, 0.25 / 2^64.
    assert "fc1.weight [2, 1] 29 3e800000 → 1e800000 0.25 → 1.35525272e-20" in said
    assert "final accuracy 0.9197, clean 0.9697" in said


def test_the_cells_take_turns_among_the_worst(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec())
        writer.put_cells([stores.cell("a", 0, "many"), stores.cell("b", 1, "few")])
        stores.clean_runs(writer)
        for number in range(12):
            writer.put_trial(stores.trial(number, "collapsed", [0.1], ended="collapsed"), ATTEMPT)
        for number, left in enumerate((0.6, 0.5)):
            writer.put_trial(stores.trial(number, "degraded", [left] * 11, key="b"), ATTEMPT)
    gathered = gather(tmp_path / "runs.db")
    assert [(row.cell, row.number) for row in worst(gathered)] == [
        *(("many", number) for number in range(8)), ("few", 1), ("few", 0),
    ]  # fmt: skip


def test_what_is_only_measured_has_no_columns_of_recovery(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        said = stores.spec() | {"metric": {"name": "auc", "better": "higher", "tolerance": 0.01}}
        writer.revise(said, "abc", "ckptflip run e.toml", {}, {"memory": 25_276_514_304, "name": "x"})
        writer.put_cells([stores.cell("a", 0, "1 flip", until=5)])
        stores.clean_runs(writer)
        writer.put_trial(stores.trial(0, "masked", [0.9], recovered=0), ATTEMPT)
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    head = said[said.index("Condition Trials") :][:120]
    columns = "Condition Trials identical masked degraded collapsed degraded or collapsed final AUC 1 flip"
    assert " ".join(head.split()).startswith(columns)
    assert "epochs to recover" not in said[: said.index("How the numbers are made")]
    assert "memory 23.5 GiB" in said


def test_clean_runs_noise_and_exactness(tiny_page):
    said = text(tiny_page)
    assert "3 of 3 clean runs repeated the next epoch bit for bit" in said
    assert "1 of 1 restart without change ended identical." in said
    cells = row(tiny_page, "clean", "digits-cnn")
    # Finals are 0.002 apart: the standard deviation is 0.002, largest less smallest 0.004.
    assert cells[1:5] == ["3", "0.9697", "0.002", "0.004"]
    assert "So few seeds do not show that their noise stays below the tolerance (0.01)" in said


def test_what_reproduces_it(tiny_page):
    said = text(tiny_page)
    assert "ckptflip run e4.toml --store runs.db" in said
    for what in (
        "0123456789abcdef",
        "python 3.12.3",
        "torch 2.9.0",
        "processor x86-64",
        "cores 8",
        '"seed": 21',
    ):
        assert what in said
    assert "clean runs of digits-cnn 0, 1, 2" in said
    assert "1 revision of the spec" in said


def test_a_tolerance_below_the_noise_is_warned_of(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec(metric={"name": "accuracy", "better": "higher", "tolerance": 0.003}))
        writer.put_cells([stores.cell("a", 0, "1 flip")])
        stores.clean_runs(writer)
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    assert "The tolerance (0.003) is below what the clean runs themselves differ by (0.004)" in said


def test_without_a_trial_the_page_says_so(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec())
        writer.put_cells([stores.cell("a", 0, "1 flip"), stores.cell("b", 1, "10 flips")])
    made = page(write(tmp_path / "runs.db", tmp_path / "report"))
    assert "No trial has finished yet. The campaign is not finished: 200 trials are to come." in text(made)
    assert "<svg" not in made
    assert row(made, "cells", "1 flip")[1:4] == ["0 of 100", "–", "–"]
    assert not list((tmp_path / "report" / "figures").iterdir())


def test_all_trials_failed(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec())
        writer.put_cells([stores.cell("a", 0, "1 flip", wanted=3)])
        stores.clean_runs(writer)
        for number, state in enumerate(("crashed", "hung", "out-of-memory")):
            failed = stores.trial(number, None, [], state=state, counts=None, ended_epoch=None)
            writer.put_trial(failed, ATTEMPT)
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    assert "None of 3 trials came to an end: 1 crashed, 1 hung and 1 ran out of memory." in said


def test_one_trial(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec(clean={"seeds": [1]}))
        writer.put_cells([stores.cell("a", 0, "1 flip", wanted=1)])
        stores.clean_runs(writer, seeds=(1,), exact=None)
        values = [CLEAN[epoch] for epoch in range(5, 16)]
        writer.put_trial(stores.trial(0, "masked", values, recovered=0), ATTEMPT)
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    assert "1 altered restart in 1 cell came to an end. Of these, all absorbed the fault." in said
    assert "None was slowed, degraded or collapsed." in said
    assert "A single clean run says nothing of the noise between seeds" in said


def test_strata_are_weighted(tmp_path):
    """Most trials are drawn where flips do harm; what is said is the rate of a flip drawn uniformly."""
    strata = [("critical", 1 / 32), ("mantissa", 31 / 32)]
    weights = [weight for _, weight in strata]
    spec, cell = played_campaigns.made(strata=["field"], per_cell=200)
    outcomes = played_campaigns.finished(spec, cell, [0.5, 0.0], weights)
    played_campaigns.write(tmp_path / "runs.db", spec, cell, outcomes, strata)
    made = page(write(tmp_path / "runs.db", tmp_path / "report"))
    (found,) = rates(spec, cell, outcomes, weights)
    assert found.low < 0.5 / 32 < found.high and found.rate < found.events / 200 / 2
    ends = f"{percent(found.low, unit=False)} – {percent(found.high)}"
    assert row(made, "cells", "flips")[7] == f"{found.events} · {percent(found.rate)} {ends}"
    assert f"Degraded or collapsed: {percent(found.rate)} of uniformly drawn flips, 95 % interval" in text(
        made
    )
    assert row(made, "strata", "critical")[1:3] == ["100", "3.1 %"]
    # In the bars, too: nearly all absorbed.
    bars = (tmp_path / "report" / "figures" / "outcomes-cells.svg").read_text("utf-8")
    assert any(f">{share}<" in bars for share in (97, 98, 99))


HOSTILE = "<script>alert(1)</script> $x$ _^{ \n\x1b[31m \u202eevil\u202c \"q' {{ 7*7 }} </svg> $"


def test_names_of_strangers_harm_neither_page_nor_figures(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec(title=HOSTILE, about=HOSTILE, name=HOSTILE), command=HOSTILE)
        writer.put_cells(
            [
                stores.cell(f"k{at}", at, f"_{at} {HOSTILE}", workload=HOSTILE, wanted=6, swept={HOSTILE: at},
                            policy={"layers": [f"{HOSTILE}{at}"]})
                for at in range(2)
            ]
        )  # fmt: skip
        stores.clean_runs(writer, HOSTILE)
        values = [CLEAN[epoch] for epoch in range(5, 16)]
        for at in range(2):
            for number in range(5):
                one = stores.trial(
                    number, "degraded" if number else "masked",
                    [value - 0.1 * bool(number) for value in values], key=f"k{at}", workload=HOSTILE,
                    flips=stores.flips((HOSTILE, f"{HOSTILE} {number}", number, 20, 1.0)),
                    spread=(stores._spread(np.random.default_rng(0), (HOSTILE, "$\\frac"), 6),),
                )  # fmt: skip
                writer.put_trial(one, ATTEMPT)
            failed = stores.trial(5, None, [], key=f"k{at}", workload=HOSTILE, message=HOSTILE, counts=None)
            writer.put_trial(failed, ATTEMPT)
    made = page(write(tmp_path / "runs.db", tmp_path / "report"))
    assert "<script" not in made
    assert "&lt;script&gt;alert(1)" in made
    assert "{{ 7*7 }}" in made
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", made)
    assert made.count("<svg") == made.count("</svg>") >= 5
    names = sorted(path.name for path in (tmp_path / "report" / "figures").iterdir())
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|png|pdf)", name) for name in names)
    assert len(names) == 3 * made.count("<svg")


def test_a_name_in_another_script_is_drawn_without_a_warning(tmp_path):
    with writing(tmp_path / "runs.db") as writer:
        stores.begin(writer, stores.spec(title="שלום 模型 🙂"))
        writer.put_cells([stores.cell("a", 0, "模型 שלום 🙂", wanted=1)])
        stores.clean_runs(writer)
        writer.put_trial(stores.trial(0, "masked", [0.9] * 11, recovered=0), ATTEMPT)
    made = page(write(tmp_path / "runs.db", tmp_path / "report"))
    assert "模型 שלום 🙂" in SVG.findall(made)[0]


def test_cells_of_earlier_revisions_are_left_out_and_counted(tmp_path):
    stores.tiny(tmp_path / "runs.db")
    with writing(tmp_path / "runs.db") as writer:
        writer.revise(stores.spec(title="edited"), "fedcba", "ckptflip run e4.toml --extend", {}, {})
        writer.put_cells([stores.cell("a", 0, "1 flip", swept={"count": 1}, wanted=4)])
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    assert "4 altered restarts in 1 cell came to an end." in said
    assert (
        "3 trials of cells that are no longer in the spec are in the store, but not in this report." in said
    )
    assert "2 revisions of the spec" in said
    assert "ckptflip run e4.toml --extend" in said


@pytest.mark.parametrize("numbers", [(0, 2), (0,), (0, 1, 2)])
def test_a_shard_says_that_it_is_one_and_whether_all_of_it_is_there(tmp_path, numbers):
    with writing(tmp_path / "runs.db") as writer:
        writer.revise(stores.spec(), "abc", "ckptflip run e.toml --store runs.db --shard 1/2", {}, {})
        writer.put_cells([stores.cell("a", 0, "1 flip", wanted=4)])
        stores.clean_runs(writer)
        for number in numbers:
            writer.put_trial(stores.trial(number, "masked", [0.9] * 11, recovered=0), ATTEMPT)
    said = text(page(write(tmp_path / "runs.db", tmp_path / "report")))
    if numbers == (0, 2):
        assert "This is shard 1/2, all of it: 2 trials of the campaign are those of the other shards" in said
    assert ("The campaign is not finished" in said) is (numbers != (0, 2))


def test_a_stop_rule_makes_the_intervals_wider(tmp_path):
    for name, trials in (("fixed", {"per_cell": 60}), ("rule", {"stop": {"half_width": 0.1, "at_most": 60}})):
        spec, cell = played_campaigns.made(**trials)
        outcomes = played_campaigns.finished(spec, cell, [0.2])
        assert len(outcomes) == 60
        played_campaigns.write(tmp_path / f"{name}.db", spec, cell, outcomes)
        write(tmp_path / f"{name}.db", tmp_path / name)
    fixed, rule = (page(tmp_path / name / "index.html") for name in ("fixed", "rule"))

    def width(markup: str) -> float:
        cells = row(markup, "cells", "flips")
        low, high = re.findall(r"([\d.]+) – ([\d.]+) %", cells[7])[0]
        return float(high) - float(low)

    assert width(rule) > width(fixed)
    assert "confidence sequences" in text(rule)
    assert "Clopper and Pearson" in text(fixed)


def test_a_thousand_trials(tmp_path):
    stores.drawn(tmp_path / "runs.db", counts_swept=(10,), trials=1000, spread=(), until=7)
    made = page(write(tmp_path / "runs.db", tmp_path / "report"))
    with reading(tmp_path / "runs.db") as reader:
        done = int((reader.trials().state == "done").sum()) - 1  # less the control
    assert f"{done} altered restarts in 1 cell came to an end." in text(made)
    assert len(made) < 1_000_000


class TestCommand:
    def test_it_writes_and_refuses_to_replace(self, tiny, tmp_path):
        run = CliRunner()
        arguments = [str(tiny / "runs.db"), "-o", str(tmp_path / "r")]
        first = run.invoke(command, arguments)
        assert first.exit_code == 0 and first.output.strip() == str(tmp_path / "r" / "index.html")
        again = run.invoke(command, arguments)
        assert isinstance(again.exception, UsageError) and "--overwrite" in str(again.exception)
        assert run.invoke(command, [*arguments, "--overwrite"]).exit_code == 0

    def test_overwriting_takes_away_old_figures_alone(self, tiny, tmp_path):
        figures = tmp_path / "figures"
        figures.mkdir()
        for name in ("convergence-07.png", "mine.png", "outcomes.txt"):
            (figures / name).write_text("")
        write(tiny / "runs.db", tmp_path)
        assert not (figures / "convergence-07.png").exists()
        assert (figures / "mine.png").exists() and (figures / "outcomes.txt").exists()

    def test_another_metric_is_drawn(self, tiny, tmp_path):
        made = page(write(tiny / "runs.db", tmp_path / "r", metric="loss"))
        assert "loss on the test set" in SVG.findall(made)[0]

    def test_a_metric_that_is_not_there(self, tiny, tmp_path):
        with pytest.raises(UsageError, match="no such metric; held are: accuracy, loss"):
            write(tiny / "runs.db", tmp_path / "r", metric="auc")
        assert not (tmp_path / "r").exists()

    def test_no_store(self, tmp_path):
        with pytest.raises(CampaignError, match="does not exist"):
            write(tmp_path / "none.db", tmp_path / "r")

    def test_a_folder_that_cannot_be_made(self, tiny, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="cannot be written"):
            write(tiny / "runs.db", tmp_path / "file" / "r")


def test_a_damaged_store_is_told_as_such(tmp_path: Path) -> None:
    whole, store = tmp_path / "whole.db", tmp_path / "runs.db"
    stores.drawn(whole, counts_swept=(1, 10), trials=20, spread=(1,), strata=True)
    refused = 0
    for what in damages(whole, store, 60, seed=5):
        try:
            gathered = gather(store)
        except CampaignError as why:
            assert str(store) in str(why), what
            refused += 1
            continue
        render(gathered, cell_rows(gathered), {})
    assert 20 < refused < 60
