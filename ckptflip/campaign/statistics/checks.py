"""Arguments that make no sense, refused with their name, their value and what they may be."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckptflip.errors import UsageError

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


def inside(name: str, value: float, low: float = 0.0, high: float = 1.0) -> float:
    """The value, when it lies strictly between two bounds.

    Raises:
        UsageError: it does not, or is no number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low < value < high:
        raise UsageError(f"{name} must be a number above {low:g} and below {high:g}, not {value!r}")
    return float(value)


def at_least(name: str, value: int, low: int) -> int:
    """The value, when it is a whole number that is not below a bound.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise UsageError(f"{name} must be a whole number of at least {low}, not {value!r}")
    return int(value)


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value, when it is one of the known ones.

    Raises:
        UsageError: it is not.
    """
    if value not in known:
        raise UsageError(f"{name} {value!r} is not one of {', '.join(known)}")
    return value


def counted(events: ArrayLike, trials: ArrayLike, least: int = 0) -> tuple[Whole, Whole]:
    """Events and trials as int64 arrays of one shape.

    Raises:
        UsageError: numbers that are not whole, fewer trials than `least`, more events than trials.
    """
    s, n = _whole("events", events), _whole("trials", trials)
    try:
        s, n = np.broadcast_arrays(s, n)
    except ValueError:
        raise UsageError(
            f"events have shape {s.shape} and trials {n.shape}; they must fit together"
        ) from None
    if np.any(n < least):
        raise UsageError(f"trials must be at least {least}, not {int(n.min())}")
    wrong = (s < 0) | (s > n)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise UsageError(f"events must lie between 0 and trials: {int(s[at])} events in {int(n[at])} trials")
    return s, n


def _whole(name: str, given: ArrayLike) -> Whole:
    found = np.asarray(given)
    if found.dtype.kind in "bui":
        return found.astype(np.int64)
    if found.dtype.kind != "f" or not np.all(np.isfinite(found)) or np.any(found != np.floor(found)):
        raise UsageError(f"{name} must be whole numbers, not {given!r}")
    return found.astype(np.int64)


def numbers(name: str, given: ArrayLike, least: int = 1) -> Floats:
    """Finite numbers as a float64 array of one dimension.

    Raises:
        UsageError: NaN or infinite values, other dimensions, fewer than `least`.
    """
    try:
        found = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be numbers, not {given!r}") from None
    if found.ndim != 1 or found.size < least:
        raise UsageError(f"{name} must be a list of at least {least}, not of shape {found.shape}")
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise UsageError(
            f"{name}[{bad[0]}] is {found[bad[0]]}: {bad.size} of {found.size} are not finite; "
            "say what a collapsed trial counts as (an accuracy of chance, say) before you compare"
        )
    return found


def weighed(weights: ArrayLike) -> Floats:
    """Shares of the population, one for each stratum, which sum to 1.

    Raises:
        UsageError: a share is not positive, or they do not sum to 1 (within 1e-6).
    """
    found = numbers("weights", weights)
    if np.any(found <= 0):
        raise UsageError(f"weights must be above 0, not {found.min():g}; leave empty strata out")
    if abs(found.sum() - 1) > 1e-6:
        raise UsageError(
            f"weights must sum to 1, not {found.sum():.7g}; divide the strata's bits by those of all"
        )
    shares: Floats = found / found.sum()
    return shares
