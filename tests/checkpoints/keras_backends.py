"""Keras on each backend that is installed, every one in a process of its own, started once for all tests."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

WANTED = {
    "tensorflow": ("cnn", "text", "subclassed", "mixed", "bfloat16", "int8"),
    "torch": ("cnn", "text", "nested", "subclassed", "mixed", "bfloat16", "float16", "int8", "int4"),
    # Every operation of a new shape is compiled, which takes its time.
    "jax": ("cnn", "subclassed", "bfloat16"),
}
INSTALLED = [b for b in WANTED if find_spec("keras") and find_spec(b)]


class Backend:
    """A process that runs Keras.

    Attributes:
        folder: where it saved its models.
        told: what it says of each: its name, and the real name of all contents by their digest.
    """

    def __init__(self, name):
        self._folder = Path(tempfile.mkdtemp(prefix=f"ckptflip-{name}-"))
        read, write = os.pipe()
        quiet = {
            "KERAS_BACKEND": name,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_ONEDNN_OPTS": "0",
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keras_process.py")), str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
            env=os.environ | quiet,
            text=True,
        )
        os.close(write)
        self._answers = os.fdopen(read)
        self._send("write", str(self._folder), WANTED[name])
        self._told = None
        atexit.register(self._close)

    @property
    def folder(self):
        assert self.told
        return self._folder

    @property
    def told(self):
        if self._told is None:
            self._told = self._receive()
        return self._told

    def ask(self, command, *arguments):
        """The answer to a command; a RuntimeError with what Keras raised."""
        assert self.told
        self._send(command, *arguments)
        return self._receive()

    def _send(self, command, *arguments):
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()

    def _receive(self):
        line = self._answers.readline()
        assert line, f"Keras ended with {self._process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"] + answer["traceback"])
        return answer["answer"]

    def _close(self):
        self._process.stdin.close()
        self._answers.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@cache
def _all():
    return {name: Backend(name) for name in INSTALLED}


def backend(name):
    """The process of a backend; all start together."""
    return _all()[name]


@cache
def sweep():
    """One backend's model of every kind of layer: the backend, and what it tells of it."""
    chosen = fastest()
    return chosen, chosen.ask("sweep", str(chosen.folder))


def fastest():
    """The backend for what is the same with all of them."""
    return backend("torch" if "torch" in INSTALLED else INSTALLED[0])
