"""The process of the twin networks, and what every test of them reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import ckptflip


class Twins:
    """Twin checkpoints in a folder, and the process that can load them."""

    def __init__(self, folder):
        self.folder = folder
        read, write = os.pipe()
        quiet = {"KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._errors = (folder / "stderr").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("twin_process.py")), str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[write],
            env=os.environ | quiet | {"PYTHONPATH": str(Path(ckptflip.__file__).parent.parent)},
            text=True,
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self._ask("make", str(folder))

    def output(self, path):
        """What the network of a checkpoint makes of a fixed input."""
        return np.array(self._ask("outputs", Path(path).name.partition("_")[0], str(path)))

    def close(self):
        self._process.stdin.close()
        self._answers.close()
        self._errors.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, *command):
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        assert line, (self.folder / "stderr").read_text()
        return json.loads(line)


def words(path):
    """All words of a checkpoint, by name."""
    with ckptflip.opened(path) as target:
        return {
            t.name: np.concatenate([np.empty(0, "u1"), *target.blocks(i)])
            .astype(t.number.word_dtype)
            .reshape(t.shape)
            for i, t in enumerate(target.tensors)
        }


def moved(name, array):
    """An array of PyTorch's as Keras keeps it, by numpy's own transposition."""
    if array.ndim == 4 and array.shape[1] == 1 and "dw" in name:
        return array.reshape(4, 2, 3, 3).transpose(2, 3, 0, 1)
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if "fc1" in name and array.ndim == 2:
        return array.reshape(5, 6, 4, 3).transpose(2, 3, 1, 0).reshape(72, 5)
    return array.T if array.ndim == 2 else array
