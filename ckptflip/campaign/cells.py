"""From a spec to cells and draws: each workload × checkpoint epoch × policy, and the seed of every trial.

Whatever is drawn is keyed on what is drawn, never on an order of execution: a cell by its contents, a trial
by its cell and its number. A sweep that grows leaves the trials of the other cells as they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import msgspec

from ckptflip.campaign.loading import label_of, registered
from ckptflip.campaign.spec import Campaign
from ckptflip.campaign.task import WorkloadSpec
from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy
from ckptflip.faults.stream import Stream

CONTROL = "restart without change"
MOST_CELLS = 100_000
# Places of the random streams of a trial's seed; a policy's own draws use 0 to 31.
_RUN = 1 << 16
_LISTS = ("tensors", "layers", "roles", "fields", "forbid")


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One cell of a campaign.

    Attributes:
        key: a digest of what defines it.
        position: in the spec.
        workload: what is resumed.
        epoch: of the checkpoint that is altered.
        until: the last epoch.
        policy: what is hit; None: nothing (a restart without change).
        label: the condition, in words.
        swept: the swept fields' values in this cell.
        wanted: trials, at most.
        draws: a digest of what its draws are keyed on.
    """

    key: str
    position: int
    workload: WorkloadSpec
    epoch: int
    until: int
    policy: Policy | None
    label: str
    swept: dict[str, Any]
    wanted: int
    draws: str

    @property
    def workload_label(self) -> str:
        """What the workload is called."""
        return label_of(self.workload)


def expand(campaign: Campaign) -> list[Planned]:
    """All cells of a campaign, in the order of the spec.

    Raises:
        UsageError: a policy that makes no sense, two cells that are the same, or too many.

    Example:
        >>> from ckptflip.campaign import loading
        >>> spec = loading.convert({"name": "x", "workload": [{"name": "digits-mlp"}],
        ...     "restart": {"epochs": [2], "until": 4}, "policy": [{"sweep": {"count": [1, 10]}}]})
        >>> [(cell.label, cell.epoch) for cell in expand(spec)]
        [('restart without change', 2), ('1 fault', 2), ('10 faults', 2)]
    """
    cells: list[Planned] = []
    for workload in campaign.workload:
        for epoch in campaign.restart.epochs:
            for policy, label, swept in _conditions(campaign):
                cells.append(_cell(campaign, len(cells), workload, epoch, policy, label, swept))
                if len(cells) > MOST_CELLS:
                    raise UsageError(f"the sweeps make more than {MOST_CELLS} cells")
    seen: dict[str, Planned] = {}
    for cell in cells:
        if cell.key in seen:
            raise UsageError(f"policy: {cell.label!r} and {seen[cell.key].label!r} are the same cell")
        seen[cell.key] = cell
    _check_names(cells)
    return cells


def _check_names(cells: list[Planned]) -> None:
    """Refuse two conditions of one name: no table could tell them apart."""
    named: set[tuple[str, int, str]] = set()
    for cell in cells:
        name = cell.workload_label, cell.epoch, cell.label
        if name in named:
            raise UsageError(f"policy: two conditions are called {cell.label!r}: give each its own label")
        named.add(name)


def trial_seed(campaign: Campaign, cell: Planned, stratum: tuple[str, str] | None, number: int) -> int:
    """The seed of a trial, 0 … 2^64-1: of its faults, and of the clean run it starts from."""
    return int.from_bytes(_digest([campaign.seed, cell.draws, stratum, number], 8), "big")


def run_seed(campaign: Campaign, seed: int) -> int:
    """The seed of the clean run that a trial starts from, drawn by the trial's seed."""
    seeds = campaign.clean.seeds
    return seeds[int(Stream(seed, _RUN).below(len(seeds), 1)[0])] if len(seeds) > 1 else seeds[0]


def _conditions(campaign: Campaign) -> Iterator[tuple[Policy | None, str, dict[str, Any]]]:
    if campaign.trials.control:
        yield None, CONTROL, {}
    for i, condition in enumerate(campaign.policy):
        fixed = {
            name: value
            for name in Policy.__struct_fields__
            if (value := getattr(condition, name)) is not None
        }
        sweep = {
            name: values for name in Policy.__struct_fields__ if (values := getattr(condition.sweep, name))
        }
        both = sorted(fixed.keys() & sweep.keys())
        if both:
            raise UsageError(f"policy[{i}]: {both[0]} is given and swept; give it once")
        for values in itertools.product(*sweep.values()):
            swept = dict(zip(sweep, values, strict=True))
            try:
                policy = Policy(**{k: _listed(k, v) for k, v in (fixed | swept).items()})
            except UsageError as why:
                raise UsageError(f"policy[{i}]: {why}") from None
            yield policy, _label(condition.label, policy, swept), swept


def _listed(name: str, value: Any) -> Any:
    return (value,) if name in _LISTS and isinstance(value, str) else value


def _cell(
    campaign: Campaign,
    position: int,
    workload: WorkloadSpec,
    epoch: int,
    policy: Policy | None,
    label: str,
    swept: dict[str, Any],
) -> Planned:
    until = campaign.restart.end(epoch)
    parts: dict[str, Any] = {
        "workload": [registered(workload), workload.options],
        "epoch": epoch,
        "until": until,
        **({"control": True} if policy is None else msgspec.to_builtins(policy)),
    }
    trials = campaign.trials
    if policy is not None and trials.strata:
        _check_stratified(policy, label)
        parts["strata"] = sorted(trials.strata)
    paired = {*trials.paired, *(("until",) if "epoch" in trials.paired else ())}
    if trials.equivalent is not None:
        paired.add("workload")  # the same faults in each framework is what was asked for
    return Planned(
        key=_digest(parts, 8).hex(),
        position=position,
        workload=workload,
        epoch=epoch,
        until=until,
        policy=policy,
        label=label,
        swept={name: list(v) if isinstance(v, tuple) else v for name, v in swept.items()},
        wanted=trials.control if policy is None else trials.most,
        draws=_digest({k: v for k, v in parts.items() if k not in paired}, 16).hex(),
    )


def _check_stratified(policy: Policy, label: str) -> None:
    single = policy.count in (None, 1) and policy.fraction is None and policy.ber is None
    if (
        not single
        or policy.bits != "all"
        or policy.fault != "flip"
        or policy.design != "uniform"
        or policy.layers
    ):
        raise UsageError(
            f"policy {label!r}: strata are of single flips over all bits and layers: leave out bits, layers, "
            "fault and design, and count or set it to 1"
        )


def _label(given: str | None, policy: Policy, swept: dict[str, Any]) -> str:
    """A condition in words: its label and what was swept, or what the policy says."""
    said = [given] if given else []
    said += [_value(name, value) for name, value in swept.items()]
    if not said:
        said = [
            _value("count", policy.count or 1) if policy.ber is policy.fraction is None else policy.amount
        ]
        said += [f"bits {policy.bits}"] if policy.bits != "all" else []
    return ", ".join(said)


def _value(name: str, value: Any) -> str:
    if name == "count":
        return f"{value} fault" if value == 1 else f"{value} faults"
    text = " ".join(map(str, value)) if isinstance(value, tuple | list) else f"{value}"
    return {"ber": f"BER {text}", "fault": text}.get(name, f"{name} {text}")


def _digest(value: Any, size: int) -> bytes:
    encoded = msgspec.json.encode(value, order="deterministic")
    return hashlib.blake2b(encoded, digest_size=size).digest()


def workload_key(workload: WorkloadSpec) -> str:
    """A name for files of a workload: its label, as far as a file can be called that, and a digest."""
    text = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in label_of(workload))
    return f"{text[:40]}-{_digest([registered(workload), workload.options], 4).hex()}"
