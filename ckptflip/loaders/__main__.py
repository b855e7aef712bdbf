"""``python -m ckptflip.loaders NAME``: ask one loader in this process, and print its verdict as JSON."""

from __future__ import annotations

import sys

import msgspec

from ckptflip.loaders.asking import ask_here
from ckptflip.loaders.probes import PROBES

if __name__ == "__main__":
    print(msgspec.json.encode(ask_here(next(p for p in PROBES if p.name == sys.argv[1]))).decode())
