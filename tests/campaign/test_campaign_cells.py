"""Cells and draws: what a spec expands to, and what the draws of a trial depend on."""

from __future__ import annotations

from typing import Any

import pytest

from ckptflip.campaign import cells, loading
from ckptflip.campaign.cells import CONTROL, expand, run_seed, trial_seed
from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy


def campaign(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "name": "x", "seed": 5, "workload": [{"name": "digits-mlp"}], "clean": {"seeds": [0, 1, 2]},
        "restart": {"epochs": [2, 3], "until": 6},
        "policy": [{"roles": "model", "sweep": {"bits": ["all", "critical"], "count": [1, 10]}}],
        "trials": {"per_cell": 4},
    }  # fmt: skip
    return loading.convert(base | changes)


def test_every_workload_epoch_and_condition_is_a_cell() -> None:
    found = expand(campaign())
    assert [(c.epoch, c.label) for c in found[:5]] == [
        (2, CONTROL), (2, "bits all, 1 fault"), (2, "bits all, 10 faults"),
        (2, "bits critical, 1 fault"), (2, "bits critical, 10 faults"),
    ]  # fmt: skip
    assert len(found) == 10 and len({c.key for c in found}) == 10
    assert found[4].policy == Policy(roles=("model",), bits="critical", count=10)
    assert [c.wanted for c in found[:2]] == [1, 4]


def test_horizon_moves_the_end() -> None:
    assert [c.until for c in expand(campaign(restart={"epochs": [2, 3], "horizon": 4}))][::5] == [6, 7]


def test_lists_of_names_are_swept_as_lists() -> None:
    found = expand(campaign(policy=[{"sweep": {"roles": ["model", ["optimizer", "counter"]]}}]))
    assert [c.policy.roles for c in found if c.policy and c.epoch == 2] == [
        ("model",),
        ("optimizer", "counter"),
    ]


def test_a_longer_sweep_leaves_other_cells_and_draws_alone() -> None:
    small, large = (
        campaign(),
        campaign(
            policy=[{"roles": "model", "sweep": {"bits": ["sign", "critical", "all"], "count": [1, 10, 100]}}]
        ),
    )
    seeds = [{c.key: trial_seed(one, c, None, 3) for c in expand(one)} for one in (small, large)]
    assert seeds[0].items() <= seeds[1].items()


def test_draws_depend_on_campaign_cell_stratum_and_number() -> None:
    one = campaign()
    cell, other = expand(one)[1:3]
    drawn = {
        trial_seed(one, cell, None, 0), trial_seed(one, cell, None, 1), trial_seed(one, other, None, 0),
        trial_seed(one, cell, ("conv1", "sign"), 0), trial_seed(campaign(seed=6), cell, None, 0),
    }  # fmt: skip
    assert len(drawn) == 5


def test_golden_seeds() -> None:
    """Draws are the same on every machine, in every release: these may never change."""
    one = campaign()
    cell = expand(one)[1]
    assert (cell.key, trial_seed(one, cell, None, 0)) == ("7b3ca711ebe65077", 13884286350779906403)


def test_paired_cells_share_their_draws() -> None:
    one = campaign(trials={"per_cell": 4, "paired": ["epoch", "count"]})
    by_label = {(c.epoch, c.label): trial_seed(one, c, None, 0) for c in expand(one)}
    assert by_label[2, "bits all, 1 fault"] == by_label[3, "bits all, 10 faults"]
    assert by_label[2, "bits all, 1 fault"] != by_label[2, "bits critical, 1 fault"]


def test_trials_are_spread_over_the_clean_runs() -> None:
    one = campaign()
    seeds = [run_seed(one, trial_seed(one, expand(one)[1], None, n)) for n in range(300)]
    assert {seeds.count(s) > 70 for s in (0, 1, 2)} == {True}


def test_names_follow_the_framework() -> None:
    names = [
        loading.registered(loading.WorkloadSpec(name=name, framework=framework))
        for name, framework in (("resnet18", "keras"), ("resnet18-keras", "pytorch"), ("my:thing", "keras"))
    ]
    assert names == ["resnet18-keras", "resnet18", "my:thing"]


def test_names_of_folders_hold_no_path() -> None:
    spec = loading.WorkloadSpec(name="a.b:c", label="../../évil name")
    assert cells.workload_key(spec).startswith("------vil-name-") or "/" not in cells.workload_key(spec)
    assert "/" not in cells.workload_key(spec) and "." not in cells.workload_key(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": [{"count": 1, "sweep": {"count": [1, 2]}}]}, "count is given and swept"),
        ({"policy": [{"count": 3}, {"count": 3}]}, "are the same cell"),
        (
            {"policy": [{"count": 3, "label": "x"}, {"count": 4, "label": "x"}]},
            "two conditions are called 'x'",
        ),
        ({"policy": [{"count": 3, "label": CONTROL}]}, "two conditions are called 'restart without change'"),
        ({"policy": [{"bits": "expnent"}]}, "policy[0]: bits 'expnent'"),
        (
            {"policy": [{"count": 5}], "trials": {"per_cell": 2, "strata": ["field"]}},
            "strata are of single flips",
        ),
        ({"policy": [], "trials": {"control": 0}}, "there is nothing to run"),
    ],
)
def test_impossible_cells(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        expand(campaign(**changes))
    assert message in str(raised.value)
