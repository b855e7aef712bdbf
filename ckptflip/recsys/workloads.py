"""Recommendation models as workloads that resume exactly, built in by names such as ``dlrm`` and ``deepfm``.

Every function takes the fields of `recipes.Options` as keywords, and `device` and `threads` of
`TorchWorkload`; `dummy_dlrm` takes those of `configurations.Dummy`. DLRM is trained as its configuration
says, the other models as in the Terrorch study: embedding 16, MLP (16, 16), dropout 0.2, Adam with rate 1e-3
and weight decay 1e-6, batches of 4096. What is evaluated is said in `measured`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptflip.errors import UsageError
from ckptflip.recsys import measures, recipes
from ckptflip.recsys.models.configurations import Configuration, Dummy, configuration
from ckptflip.training.checks import check_options, check_whole

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ckptflip.recsys.data.logs import ClickLog
    from ckptflip.recsys.quantised_workload import ServedWorkload
    from ckptflip.training.pytorch import Data, TorchWorkload

_EMBEDDING, _DROPOUT, _RATE, _DECAY, _BATCH = 16, 0.2, 1e-3, 1e-6, 4096
_TEST_BATCH = 4096
_WITHOUT_DROPOUT = ("dlrm", "fm")
_PLACE = ("device", "threads")


def dlrm(*, config: str = "small", device: str = "cpu", threads: int = 1, **options: Any) -> TorchWorkload:
    """``dlrm``: the reference architecture.

    Args:
        config: ``small``, ``kaggle`` or ``terabyte``.
        device: where it is trained.
        threads: of PyTorch.
        options: fields of `recipes.Options`.

    Example:
        >>> dlrm(config="kaggle", rows=1000).name
        'dlrm[data=clicks,config=kaggle,rows=1000]'
    """
    check_options("dlrm", options, _taken("dlrm"))
    chosen = configuration(config)
    recipe = recipes.made("dlrm", _with_modulo(options, chosen), config)
    from ckptflip.training.pytorch import TorchWorkload  # first: it says which extra brings PyTorch

    return TorchWorkload(
        recipe.name,
        model=lambda: _dlrm_model(recipe, chosen),
        optimizer=lambda parameters: _dlrm_optimizer(recipe, chosen, parameters),
        loss=_loss,
        data=lambda: _tensors(recipe, ones=True),
        batch_size=recipe.options.batch_size or chosen.batch,
        per_epoch=recipe.per_epoch,
        metric=measured,
        device=device,
        threads=threads,
        test_batch=_TEST_BATCH,
    )


def fm(**options: Any) -> TorchWorkload:
    """``fm``: a factorisation machine.

    Args:
        options: fields of `recipes.Options`, and `device` and `threads` of `TorchWorkload`.
    """
    return _study("fm", "factorisation", "Fm", **options)


def deepfm(**options: Any) -> TorchWorkload:
    """``deepfm``: a factorisation machine and a deep part; see `fm`."""
    return _study("deepfm", "factorisation", "DeepFm", **options)


def afm(**options: Any) -> TorchWorkload:
    """``afm``: an attentional factorisation machine; see `fm`."""
    return _study("afm", "factorisation", "Afm", **options)


def wide_deep(**options: Any) -> TorchWorkload:
    """``wide-deep``: Wide&Deep; see `fm`."""
    return _study("wide-deep", "crossing", "WideDeep", **options)


def dcn(**options: Any) -> TorchWorkload:
    """``dcn``: a deep and cross network with three cross layers of version 1; see `fm`."""
    return _study("dcn", "crossing", "Dcn", **options)


def dcn_v2(**options: Any) -> TorchWorkload:
    """``dcn-v2``: the same with cross layers of version 2; see `fm`."""
    return _study("dcn-v2", "crossing", "Dcn", {"version": 2}, **options)


def dummy_dlrm(
    *, samples: int = 10_000, data_seed: int = 0, device: str = "cpu", threads: int = 1, **sizes: Any
) -> TorchWorkload:
    """``dummy-dlrm``: a DLRM with random weights on random inputs, judged by its own clean outputs.

    Nothing is learnt: an epoch only counts. Labels are whether the clean model's output (the model that the
    run's seed gives) lies above the median of its outputs, so the clean AUC is 1.

    Args:
        samples: how many rows are evaluated.
        data_seed: of the inputs: dense features uniform in 0 to 1, ids uniform and independent.
        device: where it is computed.
        threads: of PyTorch.
        sizes: fields of `configurations.Dummy`.

    Example:
        >>> workload = dummy_dlrm(samples=50, rows=64, sparsity=0.1)
        >>> workload.name
        'dummy-dlrm[samples=50,sparsity=0.1,rows=64]'
        >>> workload.start(1)
        >>> found = workload.evaluate()
        >>> found["auc"], found["deviation"], found["changed"]
        (1.0, 0.0, 0.0)
    """
    fields = dataclasses.fields(Dummy)
    sized = [field.name for field in fields]
    check_options("dummy-dlrm", sizes, ["samples", "data_seed", *sized, *_PLACE])
    chosen = Dummy(**sizes)
    check_whole("samples", samples, 1)
    told = [f"samples={samples}"] if samples != 10_000 else []
    told += [f"data_seed={data_seed}"] if data_seed else []
    told += [f"{f.name}={sizes[f.name]:g}" for f in fields if sizes.get(f.name, f.default) != f.default]
    from ckptflip.recsys import golden

    name = f"dummy-dlrm[{','.join(told)}]"
    return golden.workload(name, chosen, samples, data_seed, device=device, threads=threads)


def served(*, model: str = "dlrm", tables: str = "int8", trained: int = 3, **options: Any) -> ServedWorkload:
    """A model that is trained for some epochs and then served, its tables stored in another form.

    Args:
        model: name of one of the workloads above.
        tables: ``fp32``, ``fp16``, ``bf16``, or a row-wise layout such as ``int8`` and ``int4``.
        trained: epochs before the tables are stored; the stored model is epoch 0.
        options: of `model`.

    Raises:
        UsageError: an option makes no sense.

    Example:
        >>> served(tables="int4", rows=100).name
        'served[tables=int4,trained=3,model=dlrm[data=clicks,config=small,rows=100]]'
    """
    makers = {
        "afm": afm, "dcn": dcn, "dcn-v2": dcn_v2, "deepfm": deepfm, "dlrm": dlrm, "fm": fm,
        "wide-deep": wide_deep,
    }  # fmt: skip
    if model not in makers:
        raise UsageError(f"a served model is one of {', '.join(makers)}, not {model!r}")
    check_options("served", options, ["model", "tables", "trained", *_taken(model)])
    check_whole("trained", trained, 0)
    recipe = makers[model](**options)
    from ckptflip.recsys.quantised_workload import ServedWorkload

    return ServedWorkload(recipe, tables, trained)


def measured(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """What is recorded of an evaluation, from logits and labels.

    Returns:
        ``loss`` (nats, at most 100 a row), ``auc`` and its standard error ``auc_se``, ``ne`` (normalised
        entropy), ``calibration``, ``ece``, ``positives`` and ``unscored`` (rows whose output is NaN), as
        `measures.evaluate` has them, of what `probabilities` gives. What is not defined, as the AUC of labels
        of one class, is left out, with a warning that says why.

    Example:
        >>> import torch
        >>> sorted(measured(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])))
        ['auc', 'auc_se', 'calibration', 'ece', 'loss', 'ne', 'positives', 'unscored']
    """
    found = measures.evaluate(targets.cpu().numpy(), probabilities(outputs))
    if found.note:
        warnings.warn(f"evaluation: {found.note}", stacklevel=2)
    names = ("loss", "auc", "auc_se", "ne", "calibration", "ece", "positives", "unscored")
    values = ((name, getattr(found, name)) for name in names)
    return {name: float(value) for name, value in values if value is not None}


def probabilities(outputs: torch.Tensor) -> NDArray[np.float64]:
    """The click probabilities that an evaluation ranks and measures, from a model's outputs.

    The sigmoid is taken in the outputs' own precision: in float32 all logits from about 17 on become the
    probability 1 and are ties, so that the AUC of a faulty model's probabilities may differ from that of its
    logits. ``measures.delong(labels, probabilities(outputs))`` has the ``auc`` of an evaluation.

    Args:
        outputs: logits, float[rows], as ``workload.outputs()`` gives them first.

    Returns:
        float64[rows], 0 to 1; NaN where the logit is.

    Example:
        >>> import torch
        >>> probabilities(torch.tensor([0.0, 20.0, 30.0])).tolist()
        [0.5, 1.0, 1.0]
    """
    found: NDArray[np.float64] = outputs.sigmoid().double().cpu().numpy()
    return found


def _study(
    name: str, module: str, model: str, arguments: dict[str, Any] | None = None, *, device: str = "cpu",
    threads: int = 1, **options: Any,
) -> TorchWorkload:  # fmt: skip
    check_options(name, options, _taken(name))
    recipe = recipes.made(name, options)
    chosen = recipe.options
    from importlib import import_module

    import torch

    from ckptflip.training.pytorch import TorchWorkload

    build: Callable[..., Any] = getattr(import_module(f"ckptflip.recsys.models.{module}"), model)
    given = dict(arguments or {}, embedding=chosen.embedding or _EMBEDDING)
    if name not in _WITHOUT_DROPOUT:
        given["dropout"] = _DROPOUT if chosen.dropout is None else chosen.dropout

    def made() -> Any:
        return build(*recipe.form, **given)

    return TorchWorkload(
        recipe.name,
        model=made,
        optimizer=lambda p: torch.optim.Adam(p, lr=chosen.rate or _RATE, weight_decay=_DECAY),
        loss=_loss,
        data=lambda: _tensors(recipe),
        batch_size=chosen.batch_size or _BATCH,
        per_epoch=recipe.per_epoch,
        metric=measured,
        device=device,
        threads=threads,
        test_batch=_TEST_BATCH,
    )


def _taken(model: str) -> list[str]:
    """The names of all options that a workload takes."""
    fields = [field.name for field in dataclasses.fields(recipes.Options)]
    if model in _WITHOUT_DROPOUT:
        fields.remove("dropout")
    return [*(["config"] if model == "dlrm" else []), *fields, *_PLACE]


def _with_modulo(options: dict[str, Any], chosen: Configuration) -> dict[str, Any]:
    """A configuration's limit of rows, where none is given."""
    return options if chosen.modulo is None else {"rows": chosen.modulo} | options


def _dlrm_model(recipe: recipes.Recipe, chosen: Configuration) -> Any:
    from ckptflip.recsys.models.dlrm import Dlrm

    sizes, dense = recipe.form
    columns = recipe.options.embedding or chosen.embedding
    bottom = (*chosen.bottom[:-1], columns)
    return Dlrm(sizes, max(dense, 1), columns, bottom, chosen.top, chosen.sparse)


def _dlrm_optimizer(recipe: recipes.Recipe, chosen: Configuration, parameters: Any) -> Any:
    import torch

    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}
    return kinds[chosen.optimizer](parameters, lr=recipe.options.rate or chosen.rate)


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)


def _tensors(recipe: recipes.Recipe, ones: bool = False) -> Data:
    """The logs as tensors. With `ones`, logs without dense features get one that is always 1."""
    train, test = (((_dense(log, ones), log.ids), log.labels) for log in recipe.logs)
    return train, test


def _dense(log: ClickLog, ones: bool) -> Any:
    return np.ones((len(log), 1), np.float32) if ones and not log.dense.shape[1] else log.dense
