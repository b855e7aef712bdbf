"""One flip in a large checkpoint against one in a small one, in every format that patches bytes in place.

    python benchmarks/formats.py [--folder DIR] [--rounds N] [--output benchmarks/results/formats.md]

Makes checkpoints of 4 MiB and of 4 GiB in DIR (30 GiB of room), flips one bit in place in each, in turn, and
writes medians, ratios, peak memory and how many bytes the processes read, to the README as well when written
to their usual place. Baselines load, alter and save with
the framework, as a user without a tool would. Formats whose library is not installed are left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

from processes import GIB, Spent, into_readme, machine, program, timed, with_bytecode

RESULTS = Path(__file__).parent / "results" / "formats.md"
TENSORS = 64
SIZES = {"4 MiB": GIB // 256, "4 GiB": 4 * GIB}

# What each script gets: the checkpoint's name, and bytes per tensor.
SAFETENSORS = """
import json, os, sys
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
header = {f"layer{i}.weight": {"dtype": "F32", "shape": [size // 4096, 1024],
          "data_offsets": [i * size, (i + 1) * size]} for i in range(count)}
text = json.dumps(header).encode()
with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for i in range(count):
        f.write(os.urandom(4096) * (size // 4096))
"""
PYTORCH = """
import sys, torch
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.save({f"layer{i}.weight": torch.randn(size // 4096, 1024) for i in range(count)}, path)
"""
TENSORFLOW = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = np.random.default_rng(0).standard_normal((size // 4096, 1024), np.float32)
tf.raw_ops.SaveV2(prefix=path, tensor_names=[f"layer{i}" for i in range(count)],
                  shape_and_slices=[""] * count, tensors=[data] * count)
"""
NPZ = """
import sys, numpy as np
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = np.random.default_rng(0).standard_normal((size // 4096, 1024), np.float32)
np.savez(path, **{f"layer{i}": data for i in range(count)})
"""
DISTRIBUTED = """
import sys, torch, torch.distributed.checkpoint as dcp
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dcp.save({f"layer{i}": torch.randn(size // 4096, 1024) for i in range(count)}, checkpoint_id=path)
"""
ZARR = """
import sys, numpy as np, zarr
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = np.random.default_rng(0).standard_normal((size // 4096, 1024), np.float32)
root = zarr.open_group(path, mode="w", zarr_format=3)
for i in range(count):
    root.create_array(f"layer{i}", data=data, chunks=(max(1, size // 16384), 1024), compressors=None)
"""
GGUF = """
import sys, gguf, numpy as np
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = np.random.default_rng(0).standard_normal((size // 4096, 1024), np.float32)
writer = gguf.GGUFWriter(path, "llama")
for i in range(count):
    writer.add_tensor(f"layer{i}", data)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
"""
ONNX = """
import sys, numpy as np, onnx
from onnx import helper, numpy_helper
path, size, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from pathlib import Path
with open(Path(path).with_suffix(".data"), "wb") as f:
    data = np.random.default_rng(0).standard_normal((size // 4096, 1024), np.float32).tobytes()
    for i in range(count):
        f.write(data)
made = []
for i in range(count):
    t = onnx.TensorProto(name=f"layer{i}", dims=[size // 4096, 1024], data_type=1, data_location=1)
    place = {"location": Path(path).with_suffix(".data").name, "offset": str(i * size), "length": str(size)}
    for key, value in place.items():
        t.external_data.add(key=key, value=value)
    made.append(t)
onnx.save(helper.make_model(helper.make_graph([], "g", [], [], made)), path)
"""
# Load all, alter one bit, save all: what a user does without a tool.
BY_SAFETENSORS = """
import sys, numpy as np
from safetensors.numpy import load_file, save_file
t = load_file(sys.argv[1])
t["layer3.weight"].reshape(-1).view(np.uint32)[5] ^= 1 << 30
save_file(t, sys.argv[1])
"""
BY_TORCH = """
import sys, torch
t = torch.load(sys.argv[1], weights_only=True)
t["layer3.weight"].view(torch.int32)[0, 5] ^= 1 << 30; torch.save(t, sys.argv[1])
"""


class Case(NamedTuple):
    """A format: how a checkpoint of it is called, the library that writes one, the user's way."""

    name: str
    file: str
    library: str
    writer: str
    script: str = ""


CASES = (
    Case("safetensors", "model.safetensors", "safetensors", SAFETENSORS, BY_SAFETENSORS),
    Case("PyTorch zip", "model.pt", "torch", PYTORCH, BY_TORCH),
    Case("TensorBundle", "ckpt.index", "tensorflow", TENSORFLOW),
    Case("npz", "model.npz", "numpy", NPZ),
    Case("torch distributed", "step-1", "torch", DISTRIBUTED),
    Case("zarr v3, raw", "model.zarr", "zarr", ZARR),
    Case("GGUF", "model.gguf", "gguf", GGUF),
    Case("ONNX, external data", "model.onnx", "onnx", ONNX),
)


def measure(case: Case, folder: Path, rounds: int) -> dict[str, list[Spent]]:
    """One flip in the small and in the large checkpoint in turn, the user's way beside each."""
    commands: dict[str, tuple[list[str], Callable[[], None]]] = {}
    for label, size in SIZES.items():
        place = folder / label.replace(" ", "")
        place.mkdir()
        path = place / case.file
        named = path.with_suffix("") if case.file.endswith(".index") else path
        command = [sys.executable, "-c", case.writer, str(named), str(size // TENSORS), str(TENSORS)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record = place / "record.jsonl"
        ours = [*program(), "inject", str(path), "--in-place", "--seed", "1", "--record", str(record)]
        commands[label] = (ours, lambda record=record: record.unlink(missing_ok=True))
        if case.script:
            commands[f"{label}, script"] = ([sys.executable, "-c", case.script, str(path)], lambda: None)
    found: dict[str, list[Spent]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, (command, before) in commands.items():
            if "script" in name and turn > 3:
                continue
            before()
            spent = timed(command)
            if turn:
                found[name].append(spent)
    return found


def row(case: Case, found: dict[str, list[Spent]]) -> str:
    """One line of the table."""
    small, large = (statistics.median(s.seconds for s in found[label]) for label in SIZES)
    few, many = (statistics.median(s.read for s in found[label]) for label in SIZES)
    script = found.get("4 GiB, script", [])
    cells = (
        case.name,
        f"{small:.3f}",
        f"{large:.3f}",
        f"{large / small:.2f}",
        f"{max(s.peak for s in found['4 GiB']) / 1e6:.0f}",
        f"{(many - few) / 1024:,.0f}",
        f"{statistics.median(s.seconds for s in script):.1f}" if script else "–",
        f"{max(s.peak for s in script) / 1e6:,.0f}" if script else "–",
    )
    return f"| {' | '.join(cells)} |"


TITLES = (
    "format", "4 MiB (s)", "4 GiB (s)", "ratio", "MB at the peak", "KiB read more than at 4 MiB",
    "script (s)", "its MB",
)  # fmt: skip


def report(rows: list[str], rounds: int, left_out: list[str]) -> str:
    """The results as Markdown."""
    libraries = {c.library: metadata.version(c.library) for c in CASES if util.find_spec(c.library)}
    lines = [
        "# One flip in 4 GiB, in every format that is patched in place",
        "",
        f"Made by `python benchmarks/formats.py` on {machine(**libraries)}.",
        f"Whole processes, start and imports included; medians of {rounds} interleaved rounds, files in the",
        f"page cache where they fit. {TENSORS} float32 tensors, one bit flipped in place with a full record,",
        "checksums repaired. To reach: at most 1.5 times the time in 4 MiB, and 200 MB of memory.",
        "KiB read more are below 0 where less is read: a small file is digested, a large one is not. The",
        "script loads, alters and saves the 4 GiB with the framework.",
        "",
        f"| {' | '.join(TITLES)} |",
        "|---" * len(TITLES) + "|",
        *rows,
        "",
    ]
    if left_out:
        lines += [f"Not installed here, so not measured: {', '.join(left_out)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure all formats and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to make the files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with_bytecode()
    rows, left_out = [], []
    for case in (c for c in CASES if arguments.only in c.name):
        if util.find_spec(case.library) is None:
            left_out.append(case.name)
            continue
        folder = Path(tempfile.mkdtemp(prefix="ckptflip-bench-", dir=arguments.folder))
        try:
            rows.append(row(case, measure(case, folder, arguments.rounds)))
            print(rows[-1], flush=True)
        finally:
            shutil.rmtree(folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = report(rows, arguments.rounds, left_out)
    arguments.output.write_text(text, "utf-8")
    if arguments.output == RESULTS:
        into_readme("formats", text, 8)
    print(arguments.output)


if __name__ == "__main__":
    main()
