"""What a recommendation workload is made of, apart from the framework: options, data and its name."""

from __future__ import annotations

import dataclasses
import logging
from functools import cached_property
from typing import Any, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from ckptflip.errors import UsageError
from ckptflip.recsys.data import criteo
from ckptflip.recsys.data.best import BestAuc, best_auc
from ckptflip.recsys.data.clicks import ClickSpec, Generated, generate
from ckptflip.recsys.data.logs import ClickLog
from ckptflip.training.checks import check_options, check_whole

# The test rows of a generated log lie so far behind the training rows that no choice of these meets them.
_TEST_START = 1 << 40
_LEAST = {"samples": 1, "test": 1, "per_epoch": 1, "rows": 2, "embedding": 1, "batch_size": 1}
_LOG = logging.getLogger(__name__)
_SAMPLES, _TEST, _PER_EPOCH = 500_000, 50_000, 50_000


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen about a recommendation workload; None stands for what fits data and model.

    Attributes:
        data: ``clicks``, the generated log; ``criteo:FILE`` or ``movielens:DIR``, the official files.
        samples: training samples; 500,000 of the generated log, all of a file's.
        test: test samples; 50,000 of the generated log, a tenth of a file's.
        per_epoch: samples of an epoch; 50,000 of the generated log, all of a file's.
        rows: the most rows that a table has.
        scale: size of the generated log's tables, as in `ClickSpec`.
        data_seed: which generated log, or which split of a file.
        embedding: columns of the tables.
        batch_size: samples per step.
        rate: learning rate.
        dropout: of the models that have it.
    """

    data: str = "clicks"
    samples: int | None = None
    test: int | None = None
    per_epoch: int | None = None
    rows: int | None = None
    scale: float | None = None
    data_seed: int = 0
    embedding: int | None = None
    batch_size: int | None = None
    rate: float | None = None
    dropout: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked choice of options for a model; the data is read or made when it is first needed.

    Attributes:
        model: name of the workload.
        options: the choice.
        config: name of a configuration of DLRM, or None.
    """

    model: str
    options: Options
    config: str | None = None

    def __post_init__(self) -> None:
        _check(self.options)

    @property
    def kind(self) -> str:
        """``clicks``, ``criteo`` or ``movielens``."""
        return self.options.data.partition(":")[0]

    @property
    def name(self) -> str:
        """What a checkpoint keeps: all that its run depends on, except where the data lies."""
        told = [f"data={self.kind}"]
        if self.config is not None:
            told.append(f"config={self.config}")
        for field in dataclasses.fields(Options)[1:]:
            value = getattr(self.options, field.name)
            if value != field.default:
                told.append(
                    f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}"
                )
        return f"{self.model}[{','.join(told)}]"

    @property
    def per_epoch(self) -> int | None:
        """Samples of an epoch; None for all."""
        return self.options.per_epoch or (_PER_EPOCH if self.kind == "clicks" else None)

    @cached_property
    def logs(self) -> tuple[ClickLog, ClickLog]:
        """Training and test rows.

        Raises:
            UsageError, WorkloadError: the files are missing, damaged or too short.
        """
        if self.kind == "clicks":
            samples = self.options.samples or _SAMPLES
            _LOG.info(
                "making the click log: %s samples, %s of the test", f"{samples:,}",
                f"{self.options.test or _TEST:,}",
            )  # fmt: skip
            train = generate(self._spec, 0, samples).log
            return train, self._test.log
        from ckptflip.recsys import files

        return files.logs(self.options)

    @property
    def form(self) -> tuple[tuple[int, ...], int]:
        """Rows of each table, and how many dense features there are."""
        if self.kind == "clicks":
            return self._spec.tables, len(criteo.DENSE)
        return self.logs[0].sizes, self.logs[0].dense.shape[1]

    @property
    def truth(self) -> NDArray[np.float64] | None:
        """float64[test rows]: the planted click probabilities; known of the generated log alone."""
        return self._test.probabilities if self.kind == "clicks" else None

    @property
    def best(self) -> BestAuc | None:
        """The best AUC that any model can expect on the test rows; known of the generated log alone."""
        return None if self.truth is None else best_auc(self.truth)

    @property
    def _spec(self) -> ClickSpec:
        spec = ClickSpec(self.options.data_seed)
        if self.options.scale is not None:
            spec = dataclasses.replace(spec, scale=self.options.scale)
        if self.options.rows is None:
            return spec
        return dataclasses.replace(spec, sizes=tuple(min(size, self.options.rows) for size in spec.tables))

    @cached_property
    def _test(self) -> Generated:
        return generate(self._spec, _TEST_START, _TEST_START + (self.options.test or _TEST))


def made(model: str, options: dict[str, Any], config: str | None = None) -> Recipe:
    """Check options by name and make a recipe of them.

    Raises:
        UsageError: an option is unknown, or its value makes no sense.

    Example:
        >>> made("fm", {"rows": 100}).name
        'fm[data=clicks,rows=100]'
    """
    check_options(model, options, [field.name for field in dataclasses.fields(Options)])
    return Recipe(model, Options(**options), config)


def check_kinds(options: Any) -> None:
    """Raise UsageError unless every field of a dataclass of options is of its declared type.

    Example:
        >>> check_kinds(Options(rate="0.1"))
        Traceback (most recent call last):
        ckptflip.errors.UsageError: rate '0.1' is of the wrong kind: Expected `float | null`, got `str`
    """
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as why:
            raise UsageError(f"{name} {value!r} is of the wrong kind: {why}") from None


def _check(options: Options) -> None:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None:
            check_whole(name, value, least)
    check_kinds(options)
    kind, _, place = options.data.partition(":")
    if options.data != "clicks" and (kind not in ("criteo", "movielens") or not place):
        raise UsageError(f"data is clicks, criteo:FILE or movielens:DIR, not {options.data!r}")
    if kind != "clicks" and options.scale is not None:
        raise UsageError("scale is an option of the generated log: leave it out, or take data=clicks")
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise UsageError(f"a learning rate is more than 0 and finite, not {options.rate}")
    if options.dropout is not None and not 0 <= options.dropout < 1:
        raise UsageError(f"dropout is 0 or more and below 1, not {options.dropout}")
