"""The state of a Keras run in a ``.keras`` file, and taking it up again with checks of what does not fit.

The file is the one that ``model.save`` writes, with one member more: ``ckptflip.json``, with what Keras
leaves out. Nothing in a file is executed on loading: the model is made by the workload, and Keras' own loader
of weights fills it.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np

from ckptflip.checkpoints import opened
from ckptflip.checkpoints.files import new_file
from ckptflip.errors import CheckpointError, CkptflipError, WorkloadError
from ckptflip.training.keras_settings import Ambient, backend, keras, torch_device
from ckptflip.training.keras_steps import Steps

SCHEMA = "keras/1"
MEMBER = "ckptflip.json"
WEIGHTS = "model.weights.h5"
_LIMIT = 1 << 26


class Variable(msgspec.Struct, frozen=True):
    """A variable that Keras saves, by its path in the model or in the optimizer."""

    path: str
    dtype: str
    shape: tuple[int, ...]


class Kept(msgspec.Struct, frozen=True):
    """A variable that Keras does not save, such as the seed of a dropout layer, with its bytes."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What ``ckptflip.json`` holds.

    Attributes:
        workload, epoch, seed: as in every checkpoint of a workload.
        backend: what Keras ran on.
        threads: what it computed with.
        x64: whether JAX computed with 64-bit numbers.
        optimizer: its class; of a loss-scaling one also the class inside.
        variables: every variable of the model and the optimizer that the weights hold.
        kept: those that they do not hold.
        rng: further random states by name, as bytes.
        versions: of Keras and the backend.
    """

    schema: str = SCHEMA
    workload: str
    epoch: int
    seed: int
    backend: str
    threads: int
    x64: bool = False
    optimizer: str
    variables: tuple[Variable, ...]
    kept: tuple[Kept, ...]
    rng: dict[str, bytes]
    versions: dict[str, str] = {}


@dataclass(slots=True)
class Run:
    """Everything of one run that changes while it trains."""

    model: Any
    steps: Steps
    ambient: Ambient
    generator: Any
    rng: dict[str, bytes]
    seed: int
    threads: int
    x64: bool = False
    epoch: int = 0


def random_state() -> dict[str, bytes]:
    """The state of the backend's own generators; Keras itself draws from variables of the model."""
    if backend() != "torch":
        return {}
    from ckptflip.training import settings

    return {name: value.numpy().tobytes() for name, value in settings.random_state(torch_device()).items()}


def set_random_state(rng: dict[str, bytes]) -> None:
    """Put back what `random_state` gave."""
    if backend() == "torch":
        import torch

        from ckptflip.training import settings

        state = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in rng.items()}
        settings.set_random_state(state, torch_device())


def snapshot(run: Run) -> list[Kept]:
    """The variables that Keras does not save, as they are now."""
    return [
        Kept(_path(v), _dtype(v), tuple(v.shape), np.asarray(keras.ops.convert_to_numpy(v.value)).tobytes())
        for v in _unsaved(run)
    ]


def restore(run: Run, kept: Sequence[Kept], path: str) -> None:
    """Give those variables the contents of a snapshot."""
    variables = _unsaved(run)
    ours = [(_path(v), _dtype(v), tuple(v.shape)) for v in variables]
    if ours != [(one.path, one.dtype, one.shape) for one in kept]:
        raise WorkloadError(
            f"{path} holds a model of another architecture: its random generators are "
            f"{', '.join(one.path for one in kept)}, the model's {', '.join(name for name, _, _ in ours)}"
        )
    for variable, one in zip(variables, kept, strict=True):
        form = np.asarray(keras.ops.convert_to_numpy(variable.value))
        if len(one.data) != form.nbytes:
            raise CheckpointError(
                f"{path} is damaged: {one.path} has {len(one.data)} bytes, not {form.nbytes}"
            )
        variable.assign(np.frombuffer(one.data, form.dtype).reshape(form.shape))


def capture(run: Run, name: str) -> list[Any]:
    """Everything that `write` saves of a run, as plain data."""
    variables = [*run.model.weights, *run.model.optimizer.variables]
    values = [np.asarray(keras.ops.convert_to_numpy(v.value)) for v in variables]
    kept = [(one.path, one.data) for one in snapshot(run)]
    return [name, run.epoch, run.seed, [v.path for v in _saved(run.model)], values, kept, run.rng]


def write(run: Run, name: str, path: Path) -> None:
    """Save a run: ``model.save``, then our member; the file appears whole or not at all."""
    held = Held(
        workload=name, epoch=run.epoch, seed=run.seed, backend=backend(), threads=run.threads, x64=run.x64,
        optimizer=_optimizer(run.model), variables=_saved(run.model), kept=tuple(snapshot(run)), rng=run.rng,
        versions={"keras": keras.__version__, backend(): str(__import__(backend()).__version__)},
    )  # fmt: skip
    with new_file(path, overwrite=True) as temporary:
        # Keras writes to names of this ending alone.
        written = temporary.with_name(f"{temporary.name}.keras")
        try:
            run.model.save(written)
            with zipfile.ZipFile(written, "a") as archive:
                archive.writestr(MEMBER, msgspec.json.encode(held))
            written.replace(temporary)
        except (OSError, CkptflipError):
            raise
        except Exception as error:  # a model that cannot tell its configuration, and the like
            raise CheckpointError(
                f"Keras cannot save the model to {path}: {type(error).__name__}: {_brief(error)}"
            ) from error
        finally:
            written.unlink(missing_ok=True)


def read(path: Path) -> Held:
    """Read our member, with the archive and its checksums verified.

    Raises:
        CheckpointError: the file is missing, damaged or cut off, or a checksum does not fit.
        WorkloadError: it holds no state of a workload.
    """
    with opened(path):
        pass  # its structure is sound, and it unpacks to no more than it may
    try:
        with zipfile.ZipFile(path) as archive:
            if MEMBER not in archive.namelist():
                raise WorkloadError(
                    f"{path} is no checkpoint of a workload: it lacks {MEMBER}, which `ckptflip train` adds "
                    "to what Keras saves (epoch, seed, random states)"
                )
            if archive.getinfo(MEMBER).file_size > _LIMIT:
                raise CheckpointError(f"{path} is damaged: {MEMBER} claims more than {_LIMIT} bytes")
            raw = archive.read(MEMBER)
            _check_links(archive.read(WEIGHTS), path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: {error}. Keras does not load such a file. If it was altered with --checksum leave, "
            "alter the original again with --checksum repair"
        ) from error
    except (OSError, KeyError, EOFError, zipfile.LargeZipFile) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        held = msgspec.json.decode(raw, type=Held)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {MEMBER}: {error}") from error
    if held.schema != SCHEMA:
        raise WorkloadError(f"{path} is of the form {held.schema!r}, not {SCHEMA}: another release wrote it")
    return held


def identify(held: Held, name: str, path: Path) -> None:
    """Check that a state belongs to this workload and this backend."""
    if held.workload != name:
        raise WorkloadError(f"{path} belongs to the workload {held.workload!r}, not to {name!r}")
    # No machine has more threads, and no generator takes a larger seed.
    if held.epoch < 0 or not 0 <= held.seed < 1 << 63 or not 1 <= held.threads <= 1 << 12:
        raise CheckpointError(
            f"{path} is damaged: seed {held.seed}, epoch {held.epoch}, threads {held.threads} make no sense"
        )
    if held.backend != backend():
        raise WorkloadError(
            f"{path} was trained on Keras' {held.backend} backend and this process runs {backend()}: the "
            f"resume would not be exact. Set KERAS_BACKEND={held.backend} and start anew"
        )


def take_up(run: Run, held: Held, path: Path) -> None:
    """Load a state into a freshly built run, in its `settled` block."""
    _check_variables(_saved(run.model), held, _optimizer(run.model), path)
    restore(run, held.kept, str(path))
    try:
        with warnings.catch_warnings():
            # Keras only warns of an optimizer whose state it leaves out.
            warnings.filterwarnings("error", "Skipping variable loading", UserWarning)
            run.model.load_weights(_keras_name(path))
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: Keras cannot load its weights: {_brief(error)}") from error
    try:
        set_random_state(held.rng)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the state of the random generators is damaged: {error}") from error
    run.rng, run.epoch = random_state(), held.epoch


def _check_variables(ours: Sequence[Variable], held: Held, optimizer: str, path: Path) -> None:
    if held.optimizer != optimizer:
        raise WorkloadError(
            f"{path} holds the state of another optimizer: {held.optimizer}, and the model has {optimizer}"
        )
    model, found = _by_path(ours), _by_path(held.variables)
    differences = [f"{name} is missing" for name in model.keys() - found.keys()]
    differences += [f"{name} is unknown to the model" for name in found.keys() - model.keys()]
    for name in model.keys() & found.keys():
        if model[name] != found[name]:
            differences.append(f"{name} is {found[name]}, the model has {model[name]}")
    if not differences and list(model) != list(found):
        differences.append("its variables come in another order")
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        listed = "; ".join(sorted(differences)[:3])
        raise WorkloadError(f"{path} holds a model of another architecture: {listed}{more}")


def _check_links(data: bytes, path: Path) -> None:
    """Refuse weights that lie in other files: not every release of Keras looks out for them."""
    seen: set[Any] = set()

    def walk(group: Any) -> None:
        for name in group:
            item = group.get(name) if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
            if item is None or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
                raise CheckpointError(
                    f"{path}: {group.name}/{name} of {WEIGHTS} does not lie in the file itself"
                )
            if isinstance(item, h5py.Group) and (place := h5py.h5o.get_info(item.id).addr) not in seen:
                seen.add(place)
                walk(item)

    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            walk(file)
    except (OSError, RuntimeError, KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {WEIGHTS} is damaged: {_brief(error)}") from error


def _keras_name(path: Path) -> str:
    if path.suffix != ".keras":
        raise CheckpointError(f"{path}: Keras reads only files whose name ends in .keras; rename it")
    return str(path)


def _saved(model: Any) -> tuple[Variable, ...]:
    named = [("", v) for v in model.weights] + [("optimizer:", v) for v in model.optimizer.variables]
    return tuple(Variable(f"{part}{_path(v)}", _dtype(v), tuple(v.shape)) for part, v in named)


def _unsaved(run: Run) -> list[Any]:
    """The generator of draws without a seed, the layers' generators, and what else is state but no weight."""
    saved = {id(variable) for variable in (*run.model.weights, *run.model.metrics_variables)}
    others = [v for v in run.model.non_trainable_variables if id(v) not in saved]
    return [run.generator.state, *(v for v in others if v is not run.generator.state)]


def _by_path(variables: Sequence[Variable]) -> dict[str, str]:
    named: dict[str, str] = {}
    for variable in variables:
        name, count = variable.path, 2
        while name in named:
            name, count = f"{variable.path}~{count}", count + 1
        named[name] = f"{variable.dtype}{list(variable.shape)}"
    return named


def _path(variable: Any) -> str:
    return str(getattr(variable, "path", variable.name))


def _dtype(variable: Any) -> str:
    return str(keras.backend.standardize_dtype(variable.dtype))


def _optimizer(model: Any) -> str:
    inner = getattr(model.optimizer, "inner_optimizer", None)
    name = type(model.optimizer).__name__
    return name if inner is None else f"{name}({type(inner).__name__})"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
