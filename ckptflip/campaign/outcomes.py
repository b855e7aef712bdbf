"""What became of a trial, judged against the clean run it started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from ckptflip.campaign.spec import Metric

# A share such as 0.98 - 0.97 is not 0.01 in binary.
_ROUNDING = 1e-12


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a trial.

    Attributes:
        outcome: ``identical``, ``masked``, ``slowed``, ``degraded`` or ``collapsed``.
        recovered: epochs after the restart from which on the metric is within tolerance of the clean run's,
            to the end; None: it is not at the end.
        right_after: the metric of the altered checkpoint, before any training; NaN where it has none.
        final: the metric at the last epoch; NaN where there is none.
        clean_final: the clean run's.
    """

    outcome: str
    recovered: int | None
    right_after: float
    final: float
    clean_final: float


Values = Mapping[str, Sequence[float | None]]


def nonfinite(values: Values, row: int) -> bool:
    """Whether weights or loss of a row are NaN or infinite.

    Args:
        values: by metric, a value per row; None: not measured.
        row: which.

    Example:
        >>> nonfinite({"loss": [0.1, float("nan")], "nan": [0, 0]}, 1)
        True
    """
    counted = any((values[name][row] or 0) > 0 for name in ("nan", "inf") if name in values)
    measured = [values[name][row] for name in ("loss", "train_loss") if name in values]
    return counted or any(value is not None and not math.isfinite(value) for value in measured)


def judge(
    epochs: Sequence[int],
    values: Values,
    clean: Mapping[int, float],
    metric: Metric,
    *,
    identical: bool,
    until: int,
) -> Judgement:
    """Judge a trial by its rows.

    Args:
        epochs: of the rows; the first is the restart's.
        values: by metric, a value per row.
        clean: the clean run's metric by epoch.
        metric: its name, which way is better, the tolerance and chance.
        identical: whether the whole state equals the clean run's at the end.
        until: the last epoch of a trial that runs to its end.

    Raises:
        KeyError: the trial, or the clean run, lacks the metric.

    Example:
        >>> clean = {5: 0.90, 6: 0.92, 7: 0.93}
        >>> rows = {"accuracy": [0.50, 0.915, 0.93], "loss": [2.0, 0.2, 0.1]}
        >>> made = judge([5, 6, 7], rows, clean, Metric(), identical=False, until=7)
        >>> made.outcome, made.recovered
        ('slowed', 1)
    """
    measured = [math.nan if value is None else value for value in values[metric.name]]
    right_after, clean_final = measured[0], clean[until]
    final = measured[-1] if epochs[-1] == until else math.nan
    broken = any(nonfinite(values, row) for row in range(len(epochs)))
    if identical:
        # From here on both go the same way, through every bit.
        measured += [clean[epoch] for epoch in range(epochs[-1] + 1, until + 1)]
        final = clean_final
    recovered = _recovered(measured, [clean[epochs[0] + k] for k in range(len(measured))], metric)
    if broken or collapsed(final, clean_final, metric):
        return Judgement(
            outcome="collapsed", recovered=None, right_after=right_after, final=final, clean_final=clean_final
        )
    outcome = "degraded" if recovered is None else "slowed" if recovered else "masked"
    return Judgement(
        outcome="identical" if identical else outcome,
        recovered=recovered,
        right_after=right_after,
        final=final,
        clean_final=clean_final,
    )


def _recovered(measured: Sequence[float], clean: Sequence[float], metric: Metric) -> int | None:
    sign = 1 if metric.better == "higher" else -1
    within = [
        sign * (value - other) >= -metric.tolerance - _ROUNDING
        for value, other in zip(measured, clean, strict=True)
    ]
    if not within[-1]:
        return None
    return max((k + 1 for k, inside in enumerate(within) if not inside), default=0)


def collapsed(final: float, clean_final: float, metric: Metric) -> bool:
    """Whether a final metric is that of a model that is of no use.

    No loss tells what such a model has: where lower is better, only what is not finite has collapsed.

    Args:
        final: the trial's.
        clean_final: the clean run's.
        metric: which way is better, and chance.
    """
    if metric.better == "lower":
        return not math.isfinite(final)
    return not final >= (clean_final + metric.chance) / 2
