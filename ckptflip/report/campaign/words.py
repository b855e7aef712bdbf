"""Numbers and names as the page says them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptflip.report.style import harmless

NONE = "–"


def percent(share: float, *, unit: bool = True) -> str:
    """A share in percent: never 0 or 100 where it is neither.

    Example:
        >>> percent(0.123), percent(0.0004), percent(1.0), percent(0.99999)
        ('12 %', '0.04 %', '100 %', '> 99.9 %')
    """
    value = 100 * share
    if 0 < value < 0.01:
        said = "< 0.01"
    elif 99.9 < value < 100:
        said = "> 99.9"
    elif value in (0, 100):
        said = f"{value:.0f}"
    else:
        said = f"{value:.2g}" if value < 99 else f"{value:.3g}"
    return f"{said} %" if unit else said


def number(value: float, digits: int = 4, *, sign: bool = False) -> str:
    """A measured number; a dash where there is none.

    Args:
        value: the number.
        digits: that count.
        sign: say also that it is above 0.

    Example:
        >>> number(0.98765432), number(-0.00001234), number(float("nan")), number(0.5, sign=True)
        ('0.9877', '−1.234e-05', '–', '+0.5')
    """
    if math.isnan(value):
        return NONE
    said = f"{value:{'+' if sign and value else ''}.{digits}g}"
    return said.replace("-", "−", 1) if value < 0 else said


def exactly(value: float | int) -> str:
    """A number of a tensor, as short as tells it from its neighbours in float32; NaN and infinity by name."""
    if isinstance(value, float):
        return f"{value:.9g}".replace("-", "−", 1) if value < 0 else f"{value:.9g}"
    return str(value)


def many(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    Example:
        >>> many(1, "trial"), many(12000, "trial")
        ('1 trial', '12\u202f000 trials')
    """
    return f"{grouped(count)} {noun if count == 1 else plural or noun + 's'}"


def grouped(count: int) -> str:
    """A count with its thousands apart.

    Example:
        >>> grouped(1234567)
        '1\u202f234\u202f567'
    """
    return f"{count:,}".replace(",", "\u202f")


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def name(text: object, longest: int = 300) -> str:
    """A stranger's text for the page: harmless, and cut where it would fill it."""
    said = harmless(text)
    return said if len(said) <= longest else f"{said[: longest - 1]}…"


def lines(text: object, longest: int = 4000) -> str:
    """A stranger's text of several lines; other control characters become escapes."""
    said = "\n".join(harmless(line) for line in str(text).splitlines())
    return said if len(said) <= longest else f"{said[: longest - 1]}…"


def metric(name: str) -> str:
    """A metric as it is written in a sentence.

    Example:
        >>> metric("auc"), metric("accuracy")
        ('AUC', 'accuracy')
    """
    return {"auc": "AUC"}.get(name, name)
