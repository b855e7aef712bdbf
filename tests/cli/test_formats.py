"""Every verb of the command line on a checkpoint of every format, as its own library wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptflip.cli.main import run
from ckptflip.loaders import PROBES, Probe

pytestmark = pytest.mark.filterwarnings("ignore")
# One loader of each format will do here.
FORMATS = list({p.format: p for p in PROBES}.values())


@pytest.fixture(params=FORMATS, ids=lambda p: p.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, written: Callable[[Probe], Path]) -> Path:
    missing = request.param.missing()
    if missing:
        pytest.skip(f"{missing} is not installed")
    path = written(request.param)
    shutil.copytree(path.parent, tmp_path / "run")
    return tmp_path / "run" / path.name


def test_every_verb(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    folder = tmp_path / "new"
    folder.mkdir()
    bad, again = folder / checkpoint.name, tmp_path / "again" / checkpoint.name
    again.parent.mkdir()

    code, listed, _ = call("ls", checkpoint, "--format", "json")
    names = [row["name"] for row in json.loads(listed)]
    assert code == 0 and len(names) == len(set(names)) > 0
    assert call("scan", checkpoint)[0] in (0, 3)
    code, _, said = call("inject", checkpoint, "-o", bad, "--count", "4", "--seed", "2")
    assert (code, "4 bits hit" in said) == (0, True)
    record = bad.with_name(f"{bad.name}.flips.jsonl")
    code, shown, _ = call("show", record, "--flips", "--format", "json")
    assert code == 0 and {row["tensor"] for row in json.loads(shown)} <= set(names)
    code, differing, _ = call("diff", checkpoint, bad, "--format", "json")
    assert code == 3 and sum(row["bits"] for row in json.loads(differing)) == 4
    assert call("replay", record, checkpoint, "-o", again)[0] == 0
    assert call("diff", bad, again)[0] == 0
    converted = tmp_path / "converted.h5"
    assert call("convert", bad, converted)[0] == 0
    assert call("diff", bad, converted)[0] == 0
    assert call("undo", bad, "--record", record)[0] == 0
    assert call("diff", checkpoint, bad)[0] == 0
    assert call("diff", checkpoint, converted)[0] == 3
    # Across formats: the same flips taken back from the converted copy.
    assert call("undo", converted, "--record", record)[0] == 0
    assert call("diff", checkpoint, converted)[0] == 0
    assert call("inject", checkpoint, "--tensors", "no such tensor")[0] == 2
    assert call("inject", checkpoint, "--epoch", "3")[0] == 2
