"""Lightning with two processes on gloo: the chosen rank is hit, and it alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("lightning")

SCRIPT = Path(__file__).with_name("lightning_ddp.py")


def run(tmp_path, ranks):
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "found.json"), ranks]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_the_chosen_rank_is_hit_and_both_note_it(tmp_path):
    first, second = run(tmp_path, "1")
    assert first["words"] == []
    differing = [
        [name, i, a, b]
        for name, words in first["weights"].items()
        for i, (a, b) in enumerate(zip(words, second["weights"][name], strict=True))
        if a != b
    ]
    assert differing == second["words"] != []
    assert first["state"] == second["state"]
    assert [one["step"] for one in first["state"]["fired"]] == [2]
