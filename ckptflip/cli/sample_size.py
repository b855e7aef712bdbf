"""`ckptflip sample-size`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptflip.cli.options import HELP, epoch_option, format_option, picked, selection_options
from ckptflip.errors import UsageError

if TYPE_CHECKING:
    from ckptflip.campaign.statistics.eligible import Stratum

COLUMNS = ("layer", "bits", "population", "trials", "exact_trials", "no_event_trials")


@click.command("sample-size", context_settings=HELP)
@click.option(
    "--margin", type=float, default=0.01, show_default=True, metavar="E", help="Half width of the interval."
)
@click.option(
    "--confidence", type=float, default=0.95, show_default=True, metavar="C", help="Of the intervals."
)
@click.option(
    "--p", type=float, default=0.5, show_default=True, help="The expected rate; 0.5 needs the most."
)
@click.option(
    "--upper-bound", type=float, metavar="R", help="And without an event: until the rate is below R."
)
@click.option("--population", type=int, metavar="N", help="Possible faults.  [default: without end]")
@click.option("--checkpoint", metavar="CKPT", help="Count the possible faults in CKPT instead.")
@selection_options
@click.option("--fault", default="flip", show_default=True, metavar="SPEC", help="As for `inject`.")
@epoch_option
@click.option("--per-layer", is_flag=True, help="For a claim about each layer.")
@click.option("--by", type=click.Choice(("bit", "field")), help="For a claim about each bit, or bit field.")
@format_option
def command(**given: Any) -> None:
    """How many trials a claim needs.

    `trials` is the usual formula with finite-population correction (Leveugle et al., DATE 2009), for each
    layer and bit where a claim is about each (Ruospo et al., DATE 2023). `exact_trials` is what the exact
    interval (Clopper-Pearson) needs, in a population without end. `no_event_trials` without a single event
    show, with the same confidence, that the rate is below --upper-bound.

        ckptflip sample-size --margin 0.01 --checkpoint ckpt.h5 --roles model --per-layer
    """
    from ckptflip.campaign.statistics.sample_size import exact_sample_size, no_event_size, sample_size
    from ckptflip.cli.output import emit, many, say

    margin, confidence, p, bound = (given[k] for k in ("margin", "confidence", "p", "upper_bound"))
    exact = exact_sample_size(margin, confidence, p)
    rows: list[dict[str, Any]] = []
    for part in _populations(given):
        size = None if part is None else part.population
        rows.append(
            {
                "layer": part and part.layer,
                "bits": part and part.bits,
                "population": size,
                "trials": sample_size(margin, confidence, p, size),
                "exact_trials": exact if size is None else min(exact, size),
                "no_event_trials": None if bound is None else no_event_size(bound, confidence, size),
            }
        )
    emit(rows, _shown(given), given["form"])
    each = (
        f" for each of {len(rows)}, {many(sum(row['trials'] for row in rows), 'trial')} in all"
        if len(rows) > 1
        else ""
    )
    say(f"± {margin:g} with {confidence:.4g} confidence{each}")


def _populations(given: dict[str, Any]) -> list[Stratum] | list[None]:
    """The populations that the options name; [None] for one without end."""
    checkpoint, population = given["checkpoint"], given["population"]
    if checkpoint is not None:
        if population is not None:
            raise UsageError("--population and --checkpoint were both given; the checkpoint says it")
        from ckptflip.campaign.statistics.eligible import strata
        from ckptflip.faults.policy import Policy

        if given.get("rowwise"):
            raise UsageError(
                "--rowwise: fields of tables are not counted here; say how many with --population"
            )
        policy = Policy(**_selected(given))
        path = picked(checkpoint, given["epoch"])
        return strata(path, policy, per_layer=given["per_layer"], by=given["by"] or "none")
    used = [*_selected(given), *(k for k in ("per_layer", "by", "epoch") if given[k])]
    if used:
        raise UsageError(f"--{used[0].replace('_', '-')} selects in a checkpoint; name it with --checkpoint")
    if population is None:
        return [None]
    from ckptflip.campaign.statistics.eligible import Stratum

    return [Stratum("", "", population)]


def _selected(given: dict[str, Any]) -> dict[str, Any]:
    """The options that say what may be hit, those that differ from their defaults."""
    from ckptflip.faults.policy import Policy

    plain = Policy()
    return {k: v for k, v in given.items() if hasattr(plain, k) and v != getattr(plain, k)}


def _shown(given: dict[str, Any]) -> tuple[str, ...]:
    """The columns; a table for people leaves out those that were not asked for."""
    if given["form"] != "table":
        return COLUMNS
    hidden = {
        "layer": not given["per_layer"],
        "bits": given["by"] is None,
        "no_event_trials": given["upper_bound"] is None,
        "population": given["population"] is None and given["checkpoint"] is None,
    }
    return tuple(column for column in COLUMNS if not hidden.get(column, False))
