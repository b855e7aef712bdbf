"""Faults in running PyTorch models, beside PyTorchFI and MRFI where these are installed.

    python benchmarks/live.py [--rounds N] [--output live.md]       (pip install pytorchfi MRFI for the peers)

ResNet18 for 32×32 images (11.2 M parameters), batch 1, and a small MLP (64-64-10), in evaluation mode, one
thread. Each round does the same work with every tool in turn, the order rotating, by the processor's time;
medians, and of forward passes the median of each round's ratio to the plain model. Same network, same kind
and number of faults; each tool draws its own. What a tool cannot do is left out.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import warnings
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import machine
from rounds import AGAIN, PLAIN, Work, measured, milliseconds, share

from ckptflip import live
from ckptflip.faults import Policy
from ckptflip.live.torch_tensors import TorchTarget
from ckptflip.vision.torch_models import resnet18

RESULTS = Path(__file__).parent / "results" / "live.md"
LAYERS = [torch.nn.Conv2d, torch.nn.Linear]
NEVER = 10**9
PEERS = {"PyTorchFI": "pytorchfi", "MRFI": "mrfi"}
DISTRIBUTIONS = {"PyTorchFI": "pytorchfi", "MRFI": "MRFI"}
MANY, BER = 20_000, 1e-5


def weights(rounds: int) -> list[tuple[str, dict[str, list[float]], float]]:
    """One flip, many, and a rate over all weights: drawn, recorded, put in, checked and taken back."""
    model = network()
    target = TorchTarget(model)
    rows = []
    for label, policy, limit, repeat in (
        ("one flip", Policy(), 0.10, 40),
        (f"{MANY:,} flips", Policy(count=MANY), 20, 3),
        (f"BER {BER:g} over all weights", Policy(ber=BER), 5, 5),
    ):
        armed, seeds = live.Armed(target, policy), iter(range(10**9))

        def ours(armed: live.Armed = armed, seeds: Any = seeds) -> None:
            live.undo(target, armed.fire(next(seeds)))

        works = [Work("ckptflip", ours, repeat)]
        if has("PyTorchFI"):
            works.append(Work("PyTorchFI", pytorchfi_weights(model, policy)))
        rows.append((label, measured(works, rounds), limit))
    if has("MRFI"):
        rows[-1][1]["MRFI"] = mrfi_rate(rounds)
    return rows


def pytorchfi_weights(model: torch.nn.Module, policy: Policy) -> Callable[[], None]:
    """PyTorchFI puts values into a copy of the model; its user draws the places and flips the bits."""
    from pytorchfi import core

    injector = core.fault_injection(model, 1, [3, 32, 32], layer_types=LAYERS)
    shapes = [tuple(injector.get_weights_size(i)) for i in range(injector.get_total_layers())]
    sizes = np.array([np.prod(shape) for shape in shapes])
    draws = np.random.default_rng(0)

    def flip(weight: torch.Tensor, place: tuple[int, ...]) -> torch.Tensor:
        word = weight.detach()[place].reshape(1).clone()
        word.view(torch.int32)[0] ^= 1 << random.randrange(31)
        return word[0]

    def run() -> None:
        n = draws.binomial(32 * sizes.sum(), policy.ber) if policy.ber else policy.count or 1
        flat = draws.integers(0, sizes.sum(), n)
        layer = np.searchsorted(np.cumsum(sizes), flat, side="right")
        places = [np.unravel_index(draws.integers(0, sizes[i]), shapes[i]) for i in layer]
        four = [(*map(int, place), *(None,) * (4 - len(place))) for place in places]
        axes = [[place[axis] for place in four] for axis in range(4)]
        names = dict(zip(("k", "dim1", "dim2", "dim3"), axes, strict=True))
        injector.declare_weight_fi(function=flat_flip, layer_num=layer.tolist(), **names)

    def flat_flip(weight: torch.Tensor, place: tuple[Any, ...]) -> torch.Tensor:
        return flip(weight, tuple(axis for axis in place if axis is not None))

    return run


def mrfi_rate(rounds: int) -> list[float]:
    """MRFI puts weights back and hits them anew in each forward pass: what that adds to the plain one."""
    faulty, plain, x = network(), network(), torch.randn(1, 3, 32, 32)
    # Its rate counts words; each gets one flip.
    made = mrfi(faulty, "weight", f"{{method: RandomPositionByRate, poisson: true, rate: {32 * BER}}}", True)
    with torch.no_grad():
        found = measured([Work("MRFI", lambda: made(x)), Work(PLAIN, lambda: plain(x))], rounds)
    return [a - b for a, b in zip(found["MRFI"], found[PLAIN], strict=True)]


def mrfi(model: torch.nn.Module, kind: str, selector: str, enabled: bool) -> Any:
    """A model under MRFI, with random flips in convolutions and linear layers."""
    from mrfi import MRFI, EasyConfig

    name = "\n    name: [weight]" if kind == "weight" else ""
    config = f"""
faultinject:
  - type: {kind}{name}
    enabled: {str(enabled).lower()}
    selector: {selector}
    error_mode: {{method: FloatRandomBitFlip, floattype: float32}}
    module_type: [Conv2d, Linear]
observe: []
"""
    return MRFI(model, EasyConfig.load_string(config))


def forwards(kind: str, idle: bool, rounds: int) -> dict[str, list[float]]:
    """Forward passes with hooks that are idle, or with one flip in the output of every layer."""
    model, shape = (network(), (1, 3, 32, 32)) if kind == "ResNet18" else (perceptron(), (1, 64))
    repeat = 2 if kind == "ResNet18" else 500
    x = torch.randn(shape)
    works = [Work(PLAIN, lambda: model(x), repeat), Work(AGAIN, lambda: model(x), repeat)]
    hooked = copy.deepcopy(model)
    layers = [kind for kind in LAYERS if any(isinstance(m, kind) for m in model.modules())]
    block = live.faults(hooked, Policy(), seed=1, activations=layers, calls=NEVER if idle else None)
    works.append(Work("ckptflip", lambda: hooked(x), repeat))
    if has("MRFI"):
        selector = "{method: RandomPositionByNumber, n: 1}"
        under = mrfi(copy.deepcopy(model), "activation_out", selector, not idle)
        works.append(Work("MRFI", lambda: under(x), repeat))
    if has("PyTorchFI"):
        forward = pytorchfi_neurons(model, list(shape[1:]), idle)
        works.append(Work("PyTorchFI", lambda: forward(x), repeat))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", live.FaultWarning)  # that idle hooks do not fire is the point
        with block:
            return measured(works, rounds)


def pytorchfi_neurons(model: torch.nn.Module, shape: list[int], idle: bool) -> Callable[[Any], Any]:
    """PyTorchFI's copy of the model: one value in every layer's output, the same in each pass, or none."""
    from pytorchfi import core, neuron_error_models

    injector = core.fault_injection(model, 1, shape, layer_types=LAYERS)
    none: dict[str, list[Any]] = {k: [] for k in ("batch", "layer_num", "dim1", "dim2", "dim3", "value")}
    faults = neuron_error_models.random_inj_per_layer
    corrupted = injector.declare_neuron_fi(**none) if idle else faults(injector)

    def forward(x: torch.Tensor) -> Any:
        injector.reset_current_layer()  # it counts layers, and its user has to tell where a pass begins
        return corrupted(x)

    return forward


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return resnet18().eval()


def perceptron() -> torch.nn.Module:
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()


def has(peer: str) -> bool:
    return util.find_spec(PEERS[peer]) is not None


def report(args: argparse.Namespace) -> str:
    versions = {
        name: metadata.version(package)
        for name, package in (
            ("numpy", "numpy"),
            ("torch", "torch"),
            ("PyTorchFI", "pytorchfi"),
            ("MRFI", "MRFI"),
        )
        if util.find_spec(PEERS.get(name, name)) is not None
    }
    lines = [
        "# Faults in running PyTorch models",
        "",
        f"Made by `python benchmarks/live.py` on {machine(**versions)}.",
        f"One thread; the tools in turn, the processor's time, medians of {args.rounds} rounds.",
        "",
        "Weights of ResNet18 (11.2 M), in ms. Ours draws, records, alters, checks and restores; PyTorchFI",
        "copies the model and gives no record; MRFI puts all weights back and hits them anew in each forward",
        "pass, whose own time is taken off.",
        "",
        "| work | ckptflip | to reach | PyTorchFI | MRFI |",
        "|---|---|---|---|---|",
    ]
    for label, found, limit in weights(args.rounds):
        cells = [milliseconds(found, tool) for tool in ("ckptflip", "PyTorchFI", "MRFI")]
        lines.append(f"| {label} | {cells[0]} | ≤ {limit:g} | {cells[1]} | {cells[2]} |")
    lines += [
        "",
        "Forward passes at batch 1, against the plain model. *Nothing* is that one against itself. Ours",
        "and MRFI draw new places in each pass; PyTorchFI writes a value to the same places.",
        "",
        "| work | plain (ms) | ckptflip | to reach | MRFI | PyTorchFI | nothing |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, idle, limit in (
        ("ResNet18", True, "≤ 1 %"),
        ("MLP 64-64-10", True, "≤ 10 %"),
        ("ResNet18", False, "≤ 15 %"),
        ("MLP 64-64-10", False, "–"),
    ):
        found = forwards(kind, idle, args.rounds)
        work = f"{kind}, {'hooks that are idle' if idle else 'one flip in every layer'}"
        peers = " | ".join(share(found, tool) for tool in ("MRFI", "PyTorchFI"))
        plain, nothing = milliseconds(found, PLAIN), share(found, AGAIN)
        lines.append(f"| {work} | {plain} | {share(found, 'ckptflip')} | {limit} | {peers} | {nothing} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    text = report(args)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
