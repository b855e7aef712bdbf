"""Specs: what they may hold, what errors say, when two are the same."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ckptflip.campaign import loading
from ckptflip.campaign.spec import parse_duration, parse_size
from ckptflip.errors import UsageError

ROOT = Path(__file__).parent.parent.parent
SPEC = """
name = "rates"
seed = 3
[[workload]]
name = "digits-cnn"
label = "PyTorch"
[clean]
seeds = [0, 1]
[restart]
epochs = [5]
until = 15
[[policy]]
roles = "model"
sweep = { count = [1, 10] }
[trials]
per_cell = 7
[metric]
tolerance = 0.02
[executor]
time_limit = "90s"
memory_limit = "2G"
"""


def spec() -> dict[str, Any]:
    return tomllib.loads(SPEC)


def test_a_spec_reads_and_writes_itself() -> None:
    campaign = loading.convert(spec())
    assert loading.convert(json.loads(json.dumps(loading.plain_of(campaign)))) == campaign
    assert (campaign.executor.seconds, campaign.executor.memory) == (90.0, 2 << 30)


CASES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("restart", "epoch"), [5], "[restart] has no key 'epoch'; did you mean 'epochs'?"),
    (("policy", 0, "bit"), "all", "[policy[0]] has no key 'bit'; did you mean 'bits'?"),
    (("policy", 0, "sweep", "counts"), [1], "[policy[0].sweep] has no key 'counts'; did you mean 'count'?"),
    (("workload", 0, "nam"), "x", "[workload[0]] has no key 'nam'; did you mean 'name'?"),
    (
        ("trials", "stop"),
        {"half_widht": 0.1},
        "[trials.stop] has no key 'half_widht'; did you mean 'half_width'?",
    ),
    (("titel",), "x", "there is no key 'titel'; did you mean 'title'?"),
    (("policy", 0, "sweep", "count"), ["x"], "policy[0].sweep.count[0]: Expected `int | null`, got `str`"),
    (("trials", "stop"), {"half_width": 0.1}, "trials: give per_cell or stop, not both"),
    (("restart", "horizon"), 3, "give until (an epoch) or horizon"),
    (("restart", "until"), 5, "it must be beyond epoch 5"),
    (("restart", "epochs"), [], "restart.epochs is empty"),
    (("restart", "epochs"), [5, 5], "restart.epochs: 5 stands there twice"),
    (("clean", "seeds"), [1, 1], "clean.seeds: 1 stands there twice"),
    (("clean", "seeds"), [], "clean.seeds is empty"),
    (("metric", "better"), "higer", "metric.better is 'higer'; did you mean 'higher'?"),
    (("executor", "time_limit"), "90 parsecs", "executor: '90 parsecs' is no duration"),
    (("executor", "memory_limit"), "much", "executor: 'much' is no size"),
    (("keras_backend",), "theano", "keras_backend is 'theano'"),
    (("workload", 0, "framework"), "keas", "workload[0].framework is 'keas'; did you mean 'keras'?"),
    (("trials", "paired"), ["epochs"], "trials.paired[0] is 'epochs'; did you mean 'epoch'?"),
    (("trials", "strata"), ["layers"], "trials.strata[0] is 'layers'; did you mean 'layer'?"),
    (("trials", "equivalent"), "pytorch", "trials.equivalent is 'pytorch'; did you mean 'PyTorch'?"),
    (("measure",), {"propagation": [11]}, "measure.propagation: 11 epochs after epoch 5 lie beyond the end"),
    (("policy",), "all", "policy: Expected `array`, got `str`"),
    (("metric", "chance"), float("nan"), "metric.chance: nan is no number that can be used"),
    (("metric", "tolerance"), float("inf"), "metric.tolerance: inf is no number"),
    (("workload", 0, "options"), {"d": float("inf")}, "workload[0].options.d: inf is no number"),
    (("workload", 0, "options"), {"d": 10**30}, "workload[0].options cannot be handed to a worker"),
    (("policy", 0, "sweep"), {"bits": []}, "policy[0].sweep.bits is an empty list"),
    (("trials", "per_cell"), 1 << 40, "trials.per_cell: Expected `int` <= 10000000"),
    (("restart", "until"), 1 << 40, "restart.until: Expected `int` <= 1000000"),
    (("executor", "memory_limit"), "9" * 400 + "T", "is no size"),
    (("trials",), {"stop": {"half_width": 0.1, "confidence": 0.9999999999999999}}, "trials.stop.confidence"),
    (("name",), "", "name: Expected `str` of length >= 1"),
]


@pytest.mark.parametrize(("place", "value", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_an_error_names_the_place_and_the_nearest(place: tuple[Any, ...], value: Any, message: str) -> None:
    data = spec()
    table: Any = data
    for part in place[:-1]:
        table = table.setdefault(part, {}) if isinstance(table, dict) else table[part]
    table[place[-1]] = value
    with pytest.raises(UsageError) as raised:
        loading.convert(data)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"name = ", "is not TOML"), (b"\xff\xfe", "is not TOML"), (b"x = 1\n" * 200_000, "larger than 1 MiB")],
)
def test_a_file_that_is_no_spec(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        loading.load(path)
    with pytest.raises(UsageError, match="No such file"):
        loading.load(tmp_path / "absent.toml")
    with pytest.raises(UsageError, match="not a plain file"):
        loading.load(tmp_path)


def test_the_fingerprint_tells_what_matters() -> None:
    base = loading.fingerprint(loading.convert(spec()))
    free, other = spec(), spec()
    free["executor"]["workers"] = 9
    free["title"] = "another"
    other["metric"]["tolerance"] = 0.03
    assert loading.fingerprint(loading.convert(free)) == base
    assert loading.fingerprint(loading.convert(other)) != base


def test_what_an_extension_may_change() -> None:
    base = loading.core(loading.convert(spec()))
    more = spec()
    more["policy"][0]["sweep"]["count"].append(100)
    more["trials"]["per_cell"] = 70
    more["restart"]["epochs"].append(7)
    assert loading.core(loading.convert(more)) == base
    for change in ({"seed": 4}, {"clean": {"seeds": [0]}}, {"metric": {"tolerance": 0.5}}):
        edited = {**copy.deepcopy(spec()), **change}
        assert loading.core(loading.convert(edited)) != base


def test_strata_hold_what_their_draws_depend_on() -> None:
    cores = []
    for rule in ({"half_width": 0.1}, {"half_width": 0.2}, {"half_width": 0.1, "batch": 30}):
        data = spec() | {"trials": {"strata": ["field"], "stop": rule}, "policy": [{"roles": "model"}]}
        cores.append(loading.core(loading.convert(data)))
    assert cores[0] == cores[1] != cores[2]


def test_a_byte_order_mark_is_no_part_of_a_spec(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + SPEC.encode())
    assert loading.load(tmp_path / "x.toml").name == "rates"


def test_the_schema_in_the_repository_is_current() -> None:
    held = json.loads((ROOT / "campaigns" / "campaign.schema.json").read_text("utf-8"))
    assert held == json.loads(json.dumps(loading.schema())), (
        "ckptflip run --schema > campaigns/campaign.schema.json"
    )


def test_the_schema_knows_every_field_of_a_policy() -> None:
    from ckptflip.faults.policy import Policy

    defined = loading.schema()["$defs"]
    assert set(defined["Condition"]["properties"]) == {*Policy.__struct_fields__, "label", "sweep"}
    assert set(defined["Sweep"]["properties"]) == set(Policy.__struct_fields__)


def test_durations_and_sizes() -> None:
    assert [parse_duration(text) for text in ("250ms", "90", "2h", "1d")] == [0.25, 90.0, 7200.0, 86400.0]
    assert [parse_size(text) for text in ("1", "1k", "1.5 MB", "2TiB")] == [1, 1024, 3 << 19, 2 << 40]
    for text in ("", "0s", "-1s", "s"):
        with pytest.raises(UsageError):
            parse_duration(text)
