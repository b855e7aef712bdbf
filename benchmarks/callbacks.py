"""What injection costs a training run: while nothing fires, and when it does.

    python benchmarks/callbacks.py [--rounds N] [--only LOOP/MODEL …] [--output callbacks.md]

Each loop trains in a process of its own, on one thread, with and without an injector in turn (the order
rotates); medians of the rounds' ratios. Of each run the first epoch warms up and the second is timed, by the
processor's time, for others use the machine too. The same without an injector on either side tells what is
noise. Loops whose library is not installed are left out. An epoch is 92 steps of 64 digits for the small
model (`digits-mlp`), and --steps of 32 images for ResNet18.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from processes import machine

RESULTS = Path(__file__).parent / "results" / "callbacks.md"
# Loop: the libraries it needs, and the backend of Keras where it is that.
LOOPS = {
    "PyTorch": (("torch",), ""),
    "Keras, tensorflow": (("keras", "tensorflow"), "tensorflow"),
    "Keras, torch": (("keras", "torch"), "torch"),
    "Keras, jax": (("keras", "jax"), "jax"),
    "Lightning": (("lightning",), ""),
    "Lightning, against an empty callback": (("lightning",), ""),
    "HF Trainer": (("transformers", "accelerate"), ""),
    "skorch": (("skorch",), ""),
}
# Lightning spends time on every callback, whatever it does: the second row tells ours alone.
EMPTY = "Lightning, against an empty callback"
MODELS = {"digits-mlp": 0.03, "ResNet18": 0.01}
FLIPS, LIMIT_MS = 1000, 10
MIB = 1 << 20


class Loop(NamedTuple):
    """A training loop.

    Attributes:
        epoch: trains two epochs, with or without an injector that does not fire in them; seconds of the
            second.
        steps: in an epoch.
        target: makes the target of the injector, for firings.
    """

    epoch: Callable[[bool], float]
    steps: int
    target: Callable[[], Any]


def idle() -> Any:
    """A schedule that fires in the third epoch, before which every run is stopped."""
    from ckptflip.callbacks import InjectionSchedule
    from ckptflip.faults import Policy

    return InjectionSchedule(Policy(), seed=1, epochs=2)


def batches(name: str, steps: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Inputs, channel first, targets and the batch size."""
    if name == "digits-mlp":
        from ckptflip.training.digits import images

        x, y = images()[0]
        return np.tile(np.asarray(x), (4, 1, 1, 1)), np.tile(np.asarray(y), 4), 64
    draws = np.random.default_rng(0)
    images_of = draws.standard_normal((32 * steps, 3, 32, 32), np.float32)
    return images_of, draws.integers(0, 10, 32 * steps), 32


def torch_model(name: str) -> Any:
    """The network in PyTorch."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name == "digits-mlp":
        from ckptflip.training.digits import mlp

        workload = mlp()
        workload.start(0)
        return workload.model
    from ckptflip.vision.torch_models import resnet18

    return resnet18()


def torch_optimizer(model: Any, name: str) -> Any:
    """The optimizer of the network's workload."""
    import torch

    if name == "digits-mlp":
        return torch.optim.Adam(model.named_parameters(), lr=3e-3)
    return torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)


def dataset(name: str, steps: int) -> tuple[Any, int, int]:
    """A data set for PyTorch, the batch size, and the steps of an epoch."""
    import torch

    x, y, size = batches(name, steps)
    data = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return data, size, -(-len(x) // size)


def pytorch_loop(name: str, steps: int) -> Loop:
    """The loop of PyTorch's tutorials."""
    import torch

    from ckptflip.callbacks import Injector
    from ckptflip.live.torch_tensors import TorchTarget

    model = torch_model(name)
    optimizer = torch_optimizer(model, name)
    data, size, count = dataset(name, steps)
    pairs = [data[i : i + size] for i in range(0, len(data), size)]
    loss = torch.nn.CrossEntropyLoss()

    def train() -> float:
        began = time.process_time()
        for x, y in pairs:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        return time.process_time() - began

    def epoch(armed: bool) -> float:
        if not armed:
            train()
            return train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it did not fire is the point
            with Injector(idle(), model, optimizer) as injector:
                injector.epoch = 0
                train()
                injector.epoch = 1
                return train()

    return Loop(epoch, count, lambda: TorchTarget(model, optimizer))


def keras_loop(name: str, steps: int) -> Loop:
    """``fit`` of a compiled model."""
    import keras

    from ckptflip.callbacks import KerasInjector
    from ckptflip.live.keras_variables import KerasTarget

    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)
    keras.utils.set_random_seed(0)
    x, y, size = batches(name, steps)
    x = np.moveaxis(x, 1, -1).copy()
    if name == "digits-mlp":
        layers = keras.layers
        parts = [layers.Flatten(), layers.Dense(64), layers.ReLU(), layers.Dense(10)]
        model: Any = keras.Sequential([keras.Input((8, 8, 1)), *parts])
        optimizer: Any = keras.optimizers.Adam(3e-3)
    else:
        from ckptflip.vision.keras_models import resnet18

        model, optimizer = resnet18(), keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.began = time.process_time()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.spent = time.process_time() - self.began
            self.model.stop_training = epoch == 1

    def epoch(armed: bool) -> float:
        clock = Clock()
        # A run goes on from the optimizer's count of steps; each of these is a run of its own.
        model.optimizer.iterations.assign(0)
        with_ours = [KerasInjector(idle()), clock] if armed else [clock]
        model.fit(x, y, batch_size=size, epochs=3, verbose=0, shuffle=False, callbacks=with_ours)
        return clock.spent

    return Loop(epoch, -(-len(x) // size), lambda: KerasTarget(model))


def lightning_loop(name: str, steps: int, *, empty: bool = False) -> Loop:
    """Lightning's `Trainer`; without our callback it has none, or an empty one."""
    import lightning
    import torch

    from ckptflip.callbacks import LightningInjector
    from ckptflip.live.torch_tensors import TorchTarget

    data, size, count = dataset(name, steps)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch_model(name)

        def training_step(self, batch: Any, index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch_optimizer(self.net, name)

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.began = time.process_time()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.spent = time.process_time() - self.began
            trainer.should_stop = trainer.current_epoch == 1

    module, instead = Module(), [lightning.Callback()] if empty else []

    def epoch(armed: bool) -> float:
        clock = Clock()
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, min_epochs=0,
            callbacks=[*([LightningInjector(idle())] if armed else instead), clock],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=size))
        return clock.spent

    return Loop(epoch, count, lambda: TorchTarget(module))


def trainer_loop(name: str, steps: int) -> Loop:
    """Hugging Face's `Trainer`."""
    import tempfile

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from ckptflip.callbacks import TrainerInjector
    from ckptflip.live.torch_tensors import TorchTarget

    data, size, count = dataset(name, steps)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch_model(name)

        def forward(self, pixels: Any, labels: Any) -> Any:
            logits = self.net(pixels)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Clock(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **run: Any) -> None:
            self.began = time.process_time()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **run: Any) -> Any:
            self.spent = time.process_time() - self.began
            control.should_training_stop = state.epoch > 1.5
            return control

    model = Classifier()
    rows = [{"pixels": x, "labels": y} for x, y in data]
    folder = tempfile.mkdtemp()

    def epoch(armed: bool) -> float:
        clock = Clock()
        arguments = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=size, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=rows, optimizers=(torch_optimizer(model, name), None),
            callbacks=[TrainerInjector(idle()), clock] if armed else [clock],
        )  # fmt: skip
        trainer.train()
        return clock.spent

    return Loop(epoch, count, lambda: TorchTarget(model))


def skorch_loop(name: str, steps: int) -> Loop:
    """``fit`` of a skorch net."""
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Callback

    from ckptflip.callbacks import SkorchInjector
    from ckptflip.live.torch_tensors import TorchTarget

    x, y, size = batches(name, steps)
    model = torch_model(name)

    class Clock(Callback):
        def on_epoch_begin(self, net: Any, **run: Any) -> None:
            self.began = time.process_time()

        def on_epoch_end(self, net: Any, **run: Any) -> None:
            net.spent_ = time.process_time() - self.began
            if len(net.history) == 2:
                raise KeyboardInterrupt

    def epoch(armed: bool) -> float:
        net = NeuralNetClassifier(
            model, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=3e-3, max_epochs=3,
            batch_size=size, train_split=None, verbose=0, callbacks__print_log=None,
            callbacks=[("ours", SkorchInjector(idle())), ("clock", Clock())] if armed else [Clock()],
        )  # fmt: skip
        net.fit(x, y)
        return net.spent_

    return Loop(epoch, -(-len(x) // size), lambda: TorchTarget(model))


MAKERS = {
    "PyTorch": pytorch_loop,
    "Lightning": lightning_loop,
    EMPTY: partial(lightning_loop, empty=True),
    "HF Trainer": trainer_loop,
    "skorch": skorch_loop,
}


def measured(loop: Loop, rounds: int) -> dict[str, Any]:
    """Ratios of epochs with and without the injector, and of epochs without it among themselves."""
    for armed in (False, True):
        loop.epoch(armed)
    plain: list[float] = []
    ratios: list[float] = []
    nothing: list[float] = []
    for i in range(rounds):
        # Each kind stands at each place in turn, so that no place in the order favours one.
        order: list[str] = ["plain", "armed", "again"]
        order = order[i % 3 :] + order[: i % 3]
        spent = {kind: loop.epoch(kind == "armed") for kind in order}
        plain.append(spent["plain"])
        ratios.append(2 * spent["armed"] / (spent["plain"] + spent["again"]))
        nothing.append(spent["again"] / spent["plain"])
    return {
        "step_ms": statistics.median(plain) / loop.steps * 1e3,
        "ratio": statistics.median(ratios),
        "nothing": statistics.median(nothing),
        "spread": statistics.quantiles(ratios, n=4) if len(ratios) > 3 else [],
    }


def fired(target: Any) -> dict[str, Any]:
    """The time of a firing, with its record in memory and on disk, and the memory that it takes."""
    import tempfile

    from ckptflip.faults import Policy
    from ckptflip.live import Armed, undo

    path = Path(tempfile.mkdtemp()) / "r.flips.jsonl"
    policy = Policy(count=FLIPS, bits="mantissa", roles=("model",))
    undo(target, Armed(target, policy).fire(0, record=path))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    armed = Armed(target, policy)
    spent: dict[str, list[float]] = {"fire_ms": [], "file_ms": [], "undo_ms": []}
    for seed in range(1, 31):
        for kind, where in (("fire_ms", None), ("file_ms", path)):
            began = time.perf_counter()
            record = armed.fire(seed, record=where, overwrite=True)
            done = time.perf_counter()
            undo(target, record)
            spent[kind].append(done - began)
            spent["undo_ms"].append(time.perf_counter() - done)
    peak = _status("VmHWM") - before
    size = sum(t.nbytes for t in target.tensors if not t.name.startswith("optimizer"))
    found = {kind: statistics.median(times) * 1e3 for kind, times in spent.items()}
    return found | {"peak_mib": peak / MIB, "model_mib": size / MIB}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def child(name: str, model: str, rounds: int, steps: int) -> None:
    """Measure one loop, in this process, and print what was found as JSON."""
    maker = MAKERS.get(name, keras_loop)
    loop = maker(model, steps)
    found = measured(loop, rounds)
    if model == "ResNet18":
        found |= fired(loop.target())
    print(json.dumps(found))


def runs(args: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each loop found, for each model."""
    known = json.loads(args.measured.read_text()) if args.measured and args.measured.exists() else {}
    for model in MODELS:
        for name, (libraries, backend) in LOOPS.items():
            if (args.only and f"{name}/{model}" not in args.only) or (name == EMPTY and model == "ResNet18"):
                continue
            if f"{name}/{model}" in known:
                yield name, model, known[f"{name}/{model}"]
                continue
            if not all(util.find_spec(library) for library in libraries):
                print(f"{name}: {' or '.join(libraries)} is not installed; left out", file=sys.stderr)
                continue
            rounds = args.rounds if model == "digits-mlp" else args.large_rounds
            command = [sys.executable, __file__, "--child", name, model, str(rounds), str(args.steps)]
            quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
            quiet |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "CUDA_VISIBLE_DEVICES": ""}
            environment = os.environ | quiet | ({"KERAS_BACKEND": backend} if backend else {})
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                print(f"{name}, {model} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            print(f"{name}, {model}: {found}", file=sys.stderr)
            known[f"{name}/{model}"] = found
            if args.measured:
                args.measured.write_text(json.dumps(known))
            yield name, model, found


def report(rows: list[tuple[str, str, dict[str, Any]]], args: argparse.Namespace) -> str:
    """The results as a page."""
    present = ("torch", "keras", "tensorflow", "jax", "lightning", "transformers", "skorch")
    versions = {n: metadata.version(n) for n in present if util.find_spec(n)}
    lines = [
        "# Injection in running training loops",
        "",
        f"Made by `python benchmarks/callbacks.py` on {machine(numpy=np.__version__, **versions)}.",
        "One thread. Epochs with and without an injector in turn, the processor's time, medians of "
        f"{args.rounds} rounds",
        f"(ResNet18: {args.large_rounds} rounds of {args.steps} steps of 32 images of 32×32). *Nothing* is "
        "the same without an injector",
        "on either side: what lies within its distance from 0 is noise. Keras hands its own bookkeeping to a",
        "second thread unless a callback wants to see batches: with an injector it takes less processor.",
        "",
        "| loop | model | step (ms) | while nothing fires | middle half | nothing | to reach |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, model, found in rows:
        share, nothing = (100 * (found[k] - 1) for k in ("ratio", "nothing"))
        spread = found["spread"]
        half = f"{100 * (spread[0] - 1):+.1f} to {100 * (spread[2] - 1):+.1f} %" if spread else ""
        goal = f"≤ {100 * MODELS[model]:g} %"
        step = f"{found['step_ms']:.3g}"
        lines.append(f"| {name} | {model} | {step} | {share:+.2f} % | {half} | {nothing:+.2f} % | {goal} |")
    lines += [
        "",
        f"A firing of {FLIPS} flips, each seen to have taken effect, in ResNet18's parameters and statistics "
        "(11.2 M);",
        "medians of 30. *Memory* is the process's peak above what it held before, of a model of the size "
        "beside it.",
        "",
        "| loop | firing (ms) | with its record on disk (ms) | undo (ms) | to reach | memory (MiB) "
        "| model (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, _, found in rows:
        if "fire_ms" in found:
            times = " | ".join(f"{found[k]:.2f}" for k in ("fire_ms", "file_ms", "undo_ms"))
            memory = f"{found['peak_mib']:.1f} | {found['model_mib']:.0f}"
            lines.append(f"| {name} | {times} | ≤ {LIMIT_MS} ms | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="for digits-mlp")
    parser.add_argument("--large-rounds", type=int, default=9, help="for ResNet18")
    parser.add_argument("--steps", type=int, default=3, help="of an epoch of ResNet18")
    parser.add_argument("--only", nargs="*", default=[], help="such as PyTorch/digits-mlp")
    parser.add_argument("--measured", type=Path, help="keep what was measured here, and go on from it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, model, rounds, steps = args.child
        child(name, model, int(rounds), int(steps))
        return
    text = report(list(runs(args)), args)
    args.output.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
