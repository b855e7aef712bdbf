"""Reading a spec: from TOML, with errors that name the place; checked as a whole; fingerprint and schema."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from ckptflip.campaign.spec import AXES, OUTCOMES, STRATA, Campaign
from ckptflip.campaign.task import WorkloadSpec
from ckptflip.errors import UsageError
from ckptflip.faults.policy import Policy

_BACKENDS = ("tensorflow", "torch", "jax")
_FRAMEWORKS = ("pytorch", "keras")
_MOST = 1 << 20
# No part of what the trials are: another value gives the same results.
_FREE = ("title", "about", "executor")
# Besides these, what may differ between a spec and one that extends it: more cells, more trials.
_EXTENDABLE = ("workload", "policy", "trials", "restart", "name")


def load(path: str | Path) -> Campaign:
    """Read a campaign's spec from a TOML file, or from JSON as a report shows it.

    Args:
        path: the file, at most 1 MiB; its name ends in ``.json`` if it is JSON.

    Raises:
        UsageError: no such file, not TOML, an unknown key, an impossible value or combination; the message
            names the place in the spec and the nearest key.
    """
    import tomllib

    path = Path(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"campaign {path} is not a plain file")
    try:
        if path.stat().st_size > _MOST:
            raise UsageError(f"campaign {path} is larger than 1 MiB: it is no spec")
        text = path.read_text("utf-8-sig")
        # A report shows the spec as JSON.
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as why:
        raise UsageError(f"campaign {path}: {why.strerror}") from None
    except (ValueError, RecursionError) as why:
        form = "JSON" if path.suffix == ".json" else "TOML"
        raise UsageError(f"campaign {path} is not {form}: {why}") from None
    try:
        return convert(data)
    except UsageError as why:
        raise UsageError(f"campaign {path}: {why}") from None


def convert(data: Any) -> Campaign:
    """A spec from plain data, checked as a whole.

    Raises:
        UsageError: see `load`.

    Example:
        >>> made = convert({"name": "one flip", "workload": [{"name": "digits-cnn"}],
        ...     "restart": {"epochs": [5], "until": 15}, "policy": [{"bits": "critical"}]})
        >>> made.trials.most
        100
    """
    _check_plain(data)
    try:
        campaign = msgspec.convert(data, Campaign)
    except msgspec.ValidationError as why:
        raise UsageError(_said(str(why))) from None
    _check(campaign)
    return campaign


def fingerprint(campaign: Campaign) -> str:
    """What tells two specs apart whose results may differ; 16 hexadecimal digits."""
    plain = plain_of(campaign)
    return _digest({key: value for key, value in plain.items() if key not in _FREE})


def core(campaign: Campaign) -> dict[str, str]:
    """What must stay when a campaign is extended: a digest for each part, by the part's name."""
    plain = plain_of(campaign)
    parts = {key: value for key, value in plain.items() if key not in (*_FREE, *_EXTENDABLE)}
    parts["trials.paired"] = plain["trials"]["paired"]
    parts["trials.equivalent"] = plain["trials"]["equivalent"]
    if campaign.trials.strata:
        # Which stratum a trial is drawn from follows from the outcomes of the rounds before.
        rule = campaign.trials.stop
        parts["trials.stop"] = None if rule is None else [rule.batch, sorted(rule.outcomes)]
    return {key: _digest(value) for key, value in parts.items()}


def plain_of(campaign: Campaign) -> dict[str, Any]:
    """A spec as plain data, for JSON; `convert` reads it back."""
    plain: dict[str, Any] = msgspec.to_builtins(campaign)
    return plain


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors."""
    made: dict[str, Any] = _unindented(msgspec.json.schema(Campaign))
    return {"title": "ckptflip campaign", **made}


def example() -> str:
    """A small spec with comments, to begin with.

    Example:
        >>> import tomllib
        >>> convert(tomllib.loads(example())).name
        'first'
    """
    return Path(__file__).with_name("example.toml").read_text("utf-8")


def _unindented(value: Any) -> Any:
    """A schema whose descriptions are the docstrings as Python 3.13 keeps them, on every Python."""
    if isinstance(value, list):
        return [_unindented(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inspect.cleandoc(item) if key == "description" and isinstance(item, str) else _unindented(item)
        for key, item in value.items()
    }


def _digest(value: Any) -> str:
    encoded = msgspec.json.encode(value, order="deterministic")
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def _check_plain(data: Any, place: str = "") -> None:
    """Refuse what JSON cannot hold, and lists of nothing in a sweep, wherever they stand."""
    if isinstance(data, float) and not math.isfinite(data):
        raise UsageError(f"{place}: {data} is no number that can be used")
    if isinstance(data, dict):
        for key, value in data.items():
            if place.endswith(".sweep") and value == []:
                raise UsageError(f"{place}.{key} is an empty list: no value, no cell")
            _check_plain(value, f"{place}.{key}" if place else str(key))
    elif isinstance(data, list | tuple):
        for i, value in enumerate(data):
            _check_plain(value, f"{place}[{i}]")


def _said(message: str) -> str:
    """A validation error in our words: the place as in TOML, and the nearest key."""
    text, _, place = message.partition(" - at `$")
    place = place.rstrip("`").removeprefix(".") if place else ""
    match = re.fullmatch(r"Object contains unknown field `(.*)`", text)
    if match is None:
        return f"{place}: {text}" if place else text
    known = _keys_at(place)
    near = difflib.get_close_matches(match[1], known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    where = f"[{place}] has" if place else "there is"
    return f"{where} no key {match[1]!r}; {hint}"


def _keys_at(place: str) -> list[str]:
    """The keys of the table at a place such as ``policy[0].sweep``."""
    kind: Any = Campaign
    for part in re.sub(r"\[\d*\]|\[\.\.\.\]", "", place).split("."):
        if not part:
            continue
        found = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}.get(part)
        inner = [t for t in (found, *getattr(found, "__args__", ())) if _is_struct(t)]
        inner += [
            t for a in getattr(found, "__args__", ()) for t in getattr(a, "__args__", ()) if _is_struct(t)
        ]
        origin = getattr(getattr(found, "__origin__", None), "__args__", ())
        inner += [t for t in origin if _is_struct(t)]
        if not inner:
            return []
        kind = inner[0]
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _check(campaign: Campaign) -> None:
    """Raise UsageError where parts of a spec make no sense, alone or together."""
    _one_of("metric.better", campaign.metric.better, ("higher", "lower"))
    if campaign.keras_backend is not None:
        _one_of("keras_backend", campaign.keras_backend, _BACKENDS)
    _check_workloads(campaign)
    _check_restart(campaign)
    _check_trials(campaign)
    if not campaign.policy and not campaign.trials.control:
        raise UsageError("there is nothing to run: neither a [[policy]] nor trials.control")
    _unique("clean.seeds", campaign.clean.seeds)
    if not campaign.clean.seeds:
        raise UsageError("clean.seeds is empty: give at least one")
    # Sizes and durations are text: they are read here, so that a typo is not found after an hour.
    for key in ("seconds", "memory"):
        try:
            getattr(campaign.executor, key)
        except UsageError as why:
            raise UsageError(f"executor: {why}") from None


def _check_workloads(campaign: Campaign) -> None:
    for i, workload in enumerate(campaign.workload):
        if workload.framework is not None:
            _one_of(f"workload[{i}].framework", workload.framework, _FRAMEWORKS)
        try:
            msgspec.msgpack.encode(workload.options)
        except (OverflowError, TypeError, ValueError) as why:
            raise UsageError(f"workload[{i}].options cannot be handed to a worker: {why}") from None
    _unique("the labels of the workloads", [label_of(w) for w in campaign.workload])


def _check_restart(campaign: Campaign) -> None:
    restart = campaign.restart
    if (restart.until is None) == (restart.horizon is None):
        raise UsageError("restart: give until (an epoch) or horizon (epochs after the restart), one of them")
    if not restart.epochs:
        raise UsageError("restart.epochs is empty: name the checkpoints that are altered, as in epochs = [5]")
    _unique("restart.epochs", restart.epochs)
    for epoch in restart.epochs:
        if restart.until is not None and restart.until <= epoch:
            raise UsageError(
                f"restart.until is {restart.until}: it must be beyond epoch {epoch}, which is altered"
            )
        for after in campaign.measure.propagation:
            if epoch + after > restart.end(epoch):
                raise UsageError(
                    f"measure.propagation: {after} epochs after epoch {epoch} lie beyond the end, "
                    f"epoch {restart.end(epoch)}"
                )


def _check_trials(campaign: Campaign) -> None:
    trials = campaign.trials
    if trials.per_cell is not None and trials.stop is not None:
        raise UsageError("trials: give per_cell or stop, not both")
    for i, name in enumerate(trials.paired):
        _one_of(f"trials.paired[{i}]", name, (*AXES, *Policy.__struct_fields__))
    for i, name in enumerate(trials.strata):
        _one_of(f"trials.strata[{i}]", name, STRATA)
    if trials.stop is not None:
        for i, name in enumerate(trials.stop.outcomes):
            _one_of(f"trials.stop.outcomes[{i}]", name, OUTCOMES)
        if not trials.stop.outcomes:
            raise UsageError("trials.stop.outcomes is empty: name the outcomes whose rate is estimated")
        if trials.stop.at_least > trials.stop.at_most:
            raise UsageError("trials.stop: at_least is above at_most")
    if trials.equivalent is not None:
        _one_of("trials.equivalent", trials.equivalent, [label_of(w) for w in campaign.workload])
    if trials.strata and trials.equivalent is not None:
        raise UsageError("trials: strata and equivalent faults cannot be combined")


def label_of(workload: WorkloadSpec) -> str:
    """What a workload is called in tables and figures."""
    return workload.label or registered(workload)


def registered(workload: WorkloadSpec) -> str:
    """The name under which a workload is found, its framework included."""
    name = workload.name
    if workload.framework == "keras" and ":" not in name and not name.endswith("-keras"):
        return f"{name}-keras"
    if workload.framework == "pytorch" and name.endswith("-keras"):
        return name.removesuffix("-keras")
    return name


def _one_of(where: str, value: str, known: Any) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, list(known), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise UsageError(f"{where} is {value!r}; {hint}")


def _unique(where: str, values: Any) -> None:
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise UsageError(f"{where}: {twice[0]!r} stands there twice")
