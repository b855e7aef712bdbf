"""What all figures share: colours, a figure without a window system, names that cannot harm, files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Without its date, and with names that are not drawn, a figure is the same from one time to the next.
UNDATED: dict[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
SUFFIXES = (".png", ".svg", ".pdf")
# Okabe & Ito, "Color Universal Design" (2008), told apart with every kind of colour vision. Black is the
# clean run's; yellow is last, being faint on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
LINES = ("-", "--", ":")
NAMES = {
    "accuracy": "accuracy on the test set", "loss": "loss on the test set", "train_loss": "training loss",
    "grad_norm": "L2 norm of the gradient", "auc": "AUC on the test set",
}  # fmt: skip


def checked(out: str | Path) -> Path:
    """The path of a figure.

    Raises:
        UsageError: its suffix is none of `SUFFIXES`.

    Example:
        >>> checked("curves.svg").suffix
        '.svg'
    """
    out = Path(out)
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out}: a figure's name ends in {', '.join(SUFFIXES)}")
    return out


def blank(width: float, height: float, dpi: int = 150) -> Figure:
    """An empty figure, in inches, whose parts make room for each other."""
    # Figure alone, without pyplot: no window system, and no figure of the caller's is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write a figure in the form that its suffix names; the same numbers give the same SVG and PDF.

    Raises:
        UsageError: the file cannot be written.
    """
    import matplotlib

    with writable(out), matplotlib.rc_context({"svg.hashsalt": "ckptflip"}):
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata=UNDATED.get(out.suffix.lower(), {}))


@contextmanager
def writable(out: Path) -> Iterator[None]:
    """Say which file or folder cannot be written, as UsageError, where writing it fails."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error


@contextmanager
def strangers_names(settings: dict[str, Any] | None = None) -> Iterator[None]:
    """Draw with names that are strangers' text: no mathematics, no TeX, no settings of the user's.

    Args:
        settings: further settings of matplotlib.
    """
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"text.parse_math": False, "text.usetex": False, "svg.hashsalt": "ckptflip"} | (settings or {})
        )
        # A browser finds a font for letters that matplotlib's has not; it draws boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def harmless(text: object) -> str:
    """A stranger's text on one line: control characters, and those that turn the direction, as escapes.

    Example:
        >>> harmless("conv1" + chr(10) + chr(0x202e) + "x")
        'conv1\\\\n\\\\u202ex'
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)


def short(text: object, longest: int = 36, *, keep: str = "end") -> str:
    """A name that fits a figure: harmless, and cut in the middle or at its beginning.

    Args:
        text: a stranger's text.
        longest: characters at most.
        keep: ``end``: its end is kept, as of layers; ``both``: both ends.

    Example:
        >>> short("encoder.layer.11.attention.output", 16)
        '…ttention.output'
        >>> short("all but critical, count 10", 16, keep="both")
        'all but…count 10'
    """
    said = harmless(text)
    if len(said) <= longest:
        # A label that begins so is left out of legends.
        return f" {said}" if said.startswith("_") else said
    if keep == "end":
        return f"…{said[1 - longest :]}"
    head = (longest - 1) // 2
    return f"{said[:head]}…{said[head + 1 - longest :]}"
