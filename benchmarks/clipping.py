"""What activation clipping adds to the time of inference, for the recommendation models and Keras models.

    python benchmarks/clipping.py [--rounds N] [--output benchmarks/results/clipping.md]

Forward passes without gradients on the generated click log, and of Keras models on TensorFlow, one thread, by
the processor's time. In each round every way does the same passes in turn, each on its own copy of the model,
the order rotating; what is shown is the median of the rounds' ratios to the plain models, of which there are
two. To reach: 3 % or less. The allocator keeps freed memory.
"""

from __future__ import annotations

import argparse
import copy
import os
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from processes import keep_memory, machine
from rounds import AGAIN, PLAIN, Work, measured, milliseconds, share, spent

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.protect import clipping
from ckptflip.protect.clipping import torch_clipping, torch_values
from ckptflip.protect.native import kernels
from ckptflip.training import find

RESULTS = Path(__file__).parent / "results" / "clipping.md"
BATCHES = (128, 1024, 4096)
# The configuration of the reference is trained with batches of 128, its larger one with 2048.
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("dlrm", {}),
    ("dlrm", {"config": "kaggle"}),
    *((name, {}) for name in ("wide-deep", "deepfm", "fm", "dcn")),
]
CLIPPED, FAULTY, APART, WITHOUT, STUDY = (
    "clipped", "clipped, faulty weights", "nothing fused", "without the kernel", "±100",
)  # fmt: skip
WAYS = (CLIPPED, FAULTY, APART, WITHOUT, STUDY, AGAIN)
BER = 1e-4
# Seconds of passes in one measurement, about.
SPAN = 0.012


def copies(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.nn.Module]:
    """A copy of the model for each way."""
    bounds = clipping.calibrate(model, [inputs])
    found = {way: copy.deepcopy(model) for way in (PLAIN, *WAYS)}
    live.faults(found[FAULTY], Policy(ber=BER), seed=1).__enter__()
    clipping.clip(found[CLIPPED], bounds)
    clipping.clip(found[FAULTY], bounds)
    with (
        mock.patch.object(torch_clipping, "_FORWARDS", {}),
        mock.patch.object(torch_clipping, "rectified", lambda *_: {}),
    ):
        clipping.clip(found[APART], bounds)
    with mock.patch.object(torch_values, "kernels", lambda: None):
        clipping.clip(found[WITHOUT], bounds)
    if sum(isinstance(module, torch.nn.Linear) for module in model.modules()) > 1:
        clipping.clip(found[STUDY], clipping.fixed(model, 100))
    else:
        del found[STUDY]
    return found


def timed(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by way."""
    runs[PLAIN]()
    repeat = max(1, round(SPAN / max(spent(runs[PLAIN], 3), 1e-6)))
    return measured([Work(way, run, repeat) for way, run in runs.items()], rounds)


def called(model: Any, *inputs: Any) -> Any:
    return lambda: model(*inputs)


def recommendation(rounds: int) -> list[str]:
    """The table of the recommendation models."""
    lines = [f"| model | batch | plain (ms) | {' | '.join(WAYS)} |", f"|---|---|---|{'---|' * len(WAYS)}"]
    for name, options in MODELS:
        workload = find(name, samples=5000, per_epoch=5000, test=4096, threads=1, **options)
        workload.start(0)
        model = workload.model.eval()
        inputs = workload.inputs()
        label = f"{name} {options['config']}" if options else name
        models = copies(model, inputs)
        for batch in BATCHES:
            some = [part[:batch] for part in inputs]
            found = timed({way: called(each, *some) for way, each in models.items()}, rounds)
            shown = " | ".join(share(found, way) for way in WAYS)
            lines.append(f"| {label} | {batch} | {milliseconds(found, PLAIN)} | {shown} |")
    return lines


def on_keras(rounds: int) -> list[str]:
    """The table of Keras models."""
    import keras
    import tensorflow as tf

    from ckptflip.vision import keras_models

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    digits = find("digits-cnn-keras")
    digits.start(0)
    layers, ways = keras.layers, (CLIPPED, STUDY, AGAIN)
    dense = [layers.Dense(units, activation="relu") for units in (512, 256)]
    models = {
        "MLP 512-512-256-1": keras.Sequential([keras.Input((512,)), *dense, layers.Dense(1)]),
        "digits-cnn-keras": digits.model,
        "ResNet18, 32×32": keras_models.resnet18(),
    }
    lines = [f"| model | batch | plain (ms) | {' | '.join(ways)} |", f"|---|---|---|{'---|' * len(ways)}"]
    for label, model in models.items():
        for batch in (8,) if "ResNet" in label else BATCHES:
            drawn = np.random.default_rng(batch)
            inputs = drawn.random((batch, *model.input_shape[1:]), np.float32)
            made = {way: keras.models.clone_model(model) for way in (PLAIN, *ways)}
            for each in made.values():
                each.set_weights(model.get_weights())
            clipping.clip(made[CLIPPED], clipping.calibrate(made[CLIPPED], [inputs]))
            every = [bound.layer for bound in clipping.calibrate(made[STUDY], [inputs]).layers]
            clipping.clip(made[STUDY], clipping.fixed(made[STUDY], 100, layers=every))
            runs = {way: called(each.predict_on_batch, inputs) for way, each in made.items()}
            found = timed(runs, rounds)
            shown = " | ".join(share(found, way) for way in ways)
            lines.append(f"| {label} | {batch} | {milliseconds(found, PLAIN)} | {shown} |")
    return lines


def report(rounds: int) -> str:
    versions = {name: metadata.version(name) for name in ("torch", "keras", "tensorflow")}
    lines = [
        "# Time of activation clipping",
        "",
        "Made by `python benchmarks/clipping.py` on",
        f"{machine(**versions)}.",
        f"One thread; medians of {rounds} rounds; the allocator keeps freed memory. *Clipped* has",
        "calibrated bounds on all layers with parameters, tables among them, and counts; *±100* is the",
        "Terrorch study's, on linear layers but the last. Both do ReLUs in the same pass and in place, which",
        "saves time; *clipped* also stacks rows of tables and computes DCN's cross layers and FM's dense",
        "fields in the pass that looks, which may save more than it costs. *Nothing fused* looks at every",
        "output after it was made: what a model of other layers pays. The faulty weights have a bit error",
        f"rate of {BER:g}. *Plain again* is the plain model against itself: what nothing looks like.",
        "",
        *recommendation(rounds),
        "",
        "## Keras on TensorFlow",
        "",
        "`predict_on_batch`, compiled by Keras as it comes. *±100* is on all layers with weights here. There",
        "is no kernel: bounds are operations of the graph, and each pass counts.",
        "",
        *on_keras(rounds),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    keep_memory()
    os.environ["KERAS_BACKEND"] = "tensorflow"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if kernels() is None:
        parser.error("the compiled kernels were not built")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    text = report(args.rounds)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
