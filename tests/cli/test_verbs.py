"""The command line: every verb, every format, exit codes, and what goes to which stream."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import ckptflip
from ckptflip.cli import main
from ckptflip.cli.options import FORMATS

ROOT = Path(ckptflip.__file__).parent.parent
FRAMEWORKS = ("torch", "tensorflow", "keras", "matplotlib", "scipy", "sklearn")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with h5py.File("a.h5", "w") as file:
        file["conv1/weight"] = rng.normal(size=(8, 4)).astype("f4")
        file["conv1/bias"] = rng.normal(size=8).astype("f4")
        file["optimizer/step"] = np.int64(7)
        file["text"] = "not a tensor"
        file["tied"] = file["conv1/weight"]
    return tmp_path


@pytest.fixture
def cli(folder, capsys):
    """Runs a command: (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        code = main.run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def process(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ckptflip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **options)


def parsed(text: str, form: str) -> list[dict]:
    if form == "json":
        return json.loads(text)
    if form == "ndjson":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text)))


COMMANDS = {
    "ls": (["ls", "a.h5"], 0, "name", ["conv1/bias", "conv1/weight", "optimizer/step"]),
    "inject": (
        ["inject", "a.h5", "-n", "400", "--seed", "1", "-t", "conv1/*"],
        0,
        "tensor",
        ["conv1/bias", "conv1/weight"],
    ),
    "show": (["show", "b.h5.flips.jsonl"], 0, "tensor", ["conv1/weight"]),
    "flips": (["show", "--flips", "b.h5.flips.jsonl"], 0, "tensor", ["conv1/weight"]),
    "replay": (["replay", "b.h5.flips.jsonl", "a.h5", "-o", "c.h5"], 0, "tensor", ["conv1/weight"]),
    "diff": (["diff", "a.h5", "b.h5"], 3, "tensor", ["conv1/weight"]),
    "diff --all": (
        ["diff", "a.h5", "b.h5", "--all"],
        3,
        "tensor",
        ["conv1/bias", "conv1/weight", "optimizer/step"],
    ),
    "scan": (["scan", "b.h5", "--all"], 3, "tensor", ["conv1/bias", "conv1/weight"]),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_listing_in_every_format(cli, name, form):
    ckptflip.inject("a.h5", out="b.h5", tensors="conv1/weight", fault="value:nan", seed=1)
    arguments, code, key, names = COMMANDS[name]
    found, out, err = cli(*arguments, "--format", form)
    assert found == code, err
    if form == "table":
        header, *rows = out.splitlines()
        assert header.split()[0] == key and sorted(r.split()[0] for r in rows) == names
    else:
        rows = parsed(out, form)
        assert sorted(r[key] for r in rows) == names
        assert len({tuple(r) for r in rows}) == 1
    assert err and "Error" not in err


def test_values_survive_the_formats(cli):
    ckptflip.inject("a.h5", out="b.h5", tensors="conv1/weight", fault="value:nan", seed=1)
    forms = {
        form: parsed(cli("show", "--flips", "b.h5.flips.jsonl", "--format", form)[1], form)[0]
        for form in FORMATS[1:]
    }
    assert forms["json"] == forms["ndjson"]
    assert forms["json"]["value_after"] == forms["csv"]["value_after"] == "nan"
    assert forms["json"]["after"] == forms["csv"]["after"] == "7fc00000"
    assert forms["csv"]["index"] == ",".join(map(str, forms["json"]["index"]))
    rows = parsed(cli("ls", "a.h5", "--format", "json")[1], "json")
    assert rows[1] | {"offset": 0} == {
        "name": "conv1/weight",
        "shape": [8, 4],
        "dtype": "float32",
        "layer": "conv1",
        "role": "weight",
        "bytes": 128,
        "offset": 0,
        "layout": "contiguous",
        "aliases": ["tied"],
    }


def test_an_empty_listing(cli):
    for form, wanted in (("json", []), ("ndjson", [])):
        code, out, _ = cli("diff", "a.h5", "a.h5", "--format", form)
        assert code == 0 and parsed(out, form) == wanted
    assert cli("diff", "a.h5", "a.h5", "--format", "csv")[1].startswith("tensor,status")
    assert cli("diff", "a.h5", "a.h5")[1].split()[0] == "tensor"


def test_data_to_stdout_and_talk_to_stderr(cli):
    _, out, err = cli("ls", "a.h5")
    assert "left out: text (strings)" in err and "left out" not in out
    _, out, err = cli("inject", "a.h5", "-n", "3", "--seed", "1")
    assert "3 bits hit" in err and "record a.flipped.h5.flips.jsonl" in err and "hit in" not in out


def test_the_whole_round(cli, folder):
    before = (folder / "a.h5").read_bytes()
    assert cli("inject", "a.h5", "--in-place", "--bits", "critical", "-n", "5", "--seed", "7")[0] == 0
    assert (folder / "a.h5").read_bytes() != before
    (folder / "orig.h5").write_bytes(before)
    assert cli("diff", "orig.h5", "a.h5")[0] == 3
    assert cli("replay", "a.h5.flips.jsonl", "orig.h5", "-o", "again.h5")[0] == 0
    assert (folder / "again.h5").read_bytes() == (folder / "a.h5").read_bytes()
    code, out, err = cli("undo", "a.h5", "--record", "a.h5.flips.jsonl")
    assert code == 0 and out == "" and "5 words restored" in err and "byte for byte" in err
    assert (folder / "a.h5").read_bytes() == before
    assert cli("diff", "orig.h5", "a.h5")[0] == 0
    assert cli("undo", "again.h5", "--record", "again.h5.flips.jsonl", "-o", "back.h5")[0] == 0
    assert (folder / "back.h5").read_bytes() == before


@pytest.mark.parametrize("name", ["r.h5", "r.jsonl"])
def test_records_in_both_forms(cli, folder, name):
    assert cli("inject", "a.h5", "-o", "b.h5", "--record", name, "-n", "5", "--seed", "7")[0] == 0
    assert h5py.is_hdf5(name) is (name == "r.h5")
    code, out, _ = cli("show", "--flips", name, "--format", "json")
    assert code == 0 and sum(len(r["bits"]) for r in json.loads(out)) == 5
    assert cli("undo", "b.h5", "--record", name)[0] == 0
    assert (folder / "b.h5").read_bytes() == (folder / "a.h5").read_bytes()


def test_options_reach_the_library(cli):
    arguments = ["inject", "a.h5", "--dry-run", "--seed", "3", "--format", "json"]
    for options, given in (
        (["-t", "conv1/*,!conv1/bias"], {"tensors": ["conv1/*", "!conv1/bias"]}),
        (["-t", "conv1/*", "-t", "!conv1/bias"], {"tensors": ["conv1/*", "!conv1/bias"]}),
        (["-l", "conv1", "--roles", "bias"], {"layers": ["conv1"], "roles": ["bias"]}),
        (["--rows", "0-1", "-t", "conv1/weight"], {"rows": "0-1", "tensors": "conv1/weight"}),
        (["--slice", "1,:2", "-t", "conv1/weight"], {"slice": "1,:2", "tensors": "conv1/weight"}),
        (["--bits", "sign,critical", "-n", "30"], {"bits": "sign,critical", "count": 30}),
        (["--fraction", "0.5"], {"fraction": 0.5}),
        (["--ber", "0.1"], {"ber": 0.1}),
        (["--fault", "burst:3", "-n", "4"], {"fault": "burst:3", "count": 4}),
        (["--design", "layer", "-n", "4"], {"design": "layer", "count": 4}),
        (["--forbid", "nan,extreme:100", "-n", "40"], {"forbid": ["nan", "extreme:100"], "count": 40}),
    ):
        code, out, err = cli(*arguments, *options)
        record = ckptflip.inject("a.h5", dry_run=True, seed=3, **given)
        rows = {e.name: int((record.plan.tensor == i).sum()) for i, e in enumerate(record.header.tensors)}
        assert code == 0 and {r["tensor"]: r["words"] for r in json.loads(out)} == rows
        assert f"{record.bits_hit} bit" in err and "dry run: nothing was written" in err


def test_a_dry_run_writes_nothing(cli, folder):
    ckptflip.inject("a.h5", out="b.h5", seed=1)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli("inject", "a.h5", "--dry-run", "-n", "5")[0] == 0
    assert cli("inject", "a.h5", "--dry-run", "--in-place")[0] == 0
    assert cli("replay", "b.h5.flips.jsonl", "a.h5", "--dry-run", "-o", "c.h5")[0] == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_replay_says_when_words_differ(cli):
    ckptflip.inject("a.h5", out="b.h5", tensors="conv1", count=5, seed=1)
    code, _, err = cli("replay", "b.h5.flips.jsonl", "b.h5", "-o", "c.h5")
    assert code == 0 and "words held another value than in the record" in err
    assert "another value" not in cli("replay", "b.h5.flips.jsonl", "a.h5", "-o", "d.h5")[2]


def test_show_counts_bits_by_field(cli):
    ckptflip.inject("a.h5", out="b.h5", tensors="conv1/weight", fraction=1.0, seed=1)
    (row,) = json.loads(cli("show", "b.h5.flips.jsonl", "--format", "json")[1])
    assert {k: row[k] for k in ("words", "bits", "sign", "critical", "exponent", "mantissa", "value")} == {
        "words": 32,
        "bits": 32 * 32,
        "sign": 32,
        "critical": 32,
        "exponent": 32 * 7,
        "mantissa": 32 * 23,
        "value": 0,
    }
    ckptflip.inject("a.h5", out="c.h5", tensors="optimizer/step", fraction=1.0, seed=1)
    (row,) = json.loads(cli("show", "c.h5.flips.jsonl", "--format", "json")[1])
    assert (row["sign"], row["value"], row["mantissa"]) == (1, 63, 0)


def test_policy_files(cli, folder):
    (folder / "p.toml").write_text('seed = 4\ntensors = ["conv1/bias"]\ncount = 6\nbits = "mantissa"\n')
    code, out, err = cli("inject", "a.h5", "--policy", "p.toml", "--format", "json")
    assert code == 0 and "seed 4" in err and json.loads(out)[0]["mantissa"] == 6
    assert cli("inject", "a.h5", "--policy", "p.toml", "-n", "3")[0] == 2
    code, _, err = cli("inject", "a.h5", "--policy", "p.toml", "--bits", "sign", "--ber", "0.1")
    assert code == 2 and "a policy was given and bits, ber too" in err
    (folder / "p.toml").write_text("cuont = 3\n")
    code, _, err = cli("inject", "a.h5", "--policy", "p.toml")
    assert code == 2 and "p.toml, policy 1: there is no key 'cuont'; did you mean 'count'?" in err
    assert cli("inject", "a.h5", "--policy", "gone.toml")[0] == 2


def test_epochs(cli, folder):
    for epoch in (1, 2, 12):
        (folder / f"ckpt_{epoch:03d}.h5").write_bytes((folder / "a.h5").read_bytes())
    pattern = "ckpt_{epoch:03d}.h5"
    assert cli("inject", pattern, "--epoch", "12", "--seed", "1")[0] == 0
    assert (folder / "ckpt_012.flipped.h5").exists()
    assert cli("inject", ".", "--epoch", "2", "--seed", "1", "-o", "two.h5")[0] == 0
    assert "ckpt_002.h5 → two.h5" in cli("show", "two.h5.flips.jsonl")[2]
    for verb in ("ls", "scan"):
        assert cli(verb, pattern, "--epoch", "1")[0] == 0
        assert cli(verb, ".", "--epoch", "1")[0] == 0
    assert cli("replay", "two.h5.flips.jsonl", pattern, "--epoch", "1", "-o", "one.h5")[0] == 0
    for arguments, code, message in (
        ([pattern], 2, "is a pattern: say which epoch with --epoch N"),
        (["."], 2, "is a folder: say which checkpoint with --epoch N (there are epochs 1-2, 12)"),
        ([".", "--epoch", "5"], 1, "has no checkpoint of epoch 5"),
        ([pattern, "--epoch", "5"], 1, "ckpt_005.h5 does not exist"),
        (["a.h5", "--epoch", "1"], 2, "a.h5 is a single checkpoint"),
        ([".", "--epoch", "-1"], 2, "0 or more"),
        ([".", "--epoch", "x"], 2, "not a valid integer"),
    ):
        found, out, err = cli("inject", *arguments)
        assert (found, out) == (code, "") and message in err


FAILURES = {
    "no such file": (["ls", "gone.h5"], 1, "gone.h5 does not exist"),
    "a folder": (["undo", ".", "--record", "r"], 1, "record"),
    "text": (["scan", "notes.txt"], 1, "looks like text"),
    "no command": (["injct", "a.h5"], 2, "Did you mean 'inject'?"),
    "no option": (["inject", "a.h5", "--cuont", "3"], 2, "--count"),
    "no argument": (["inject"], 2, "Missing argument"),
    "no record option": (["undo", "a.h5"], 2, "--record"),
    "no such format": (["ls", "a.h5", "--format", "xml"], 2, "xml"),
    "no such design": (["inject", "a.h5", "--design", "fair"], 2, "fair"),
    "two amounts": (["inject", "a.h5", "-n", "1", "--ber", "0.1"], 2, "say how much in one way"),
    "two outputs": (["inject", "a.h5", "-o", "b.h5", "--in-place"], 2, "choose one"),
    "too many": (["inject", "a.h5", "-n", "99999"], 2, "larger than the 1344 eligible bits"),
    "no match": (["inject", "a.h5", "-t", "conv1/wieght"], 2, "did you mean 'conv1/weight'"),
    "bad seed": (["inject", "a.h5", "--seed", "-1"], 2, "seed"),
    "output is source": (["inject", "a.h5", "-o", "a.h5", "--overwrite"], 2, "must be different files"),
    "no output folder": (["inject", "a.h5", "-o", "no/b.h5"], 1, "No such file or directory"),
    "no record": (["show", "gone.jsonl"], 1, "gone.jsonl: No such file"),
    "not a record": (["show", "notes.txt"], 1, "not a ckptflip record"),
    "wrong record": (["undo", "a.h5", "--record", "other.jsonl"], 1, "Nothing was altered"),
    "guards": (
        ["inject", "a.h5", "--fault", "value:nan", "-t", "conv1", "--forbid", "nan"],
        1,
        "cannot be drawn",
    ),
    "threshold": (["scan", "a.h5", "--threshold", "0"], 2, "above 0"),
    "diff threshold": (["diff", "a.h5", "a.h5", "--threshold", "-1"], 2, "above 0"),
    "shell": (["completion", "tcsh"], 2, "tcsh"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_errors_are_one_message_and_an_exit_code(cli, folder, name):
    (folder / "notes.txt").write_text("hello\n")
    with h5py.File("other.h5", "w") as file:
        file["conv1/weight"] = np.full((8, 4), 5, "f4")
    ckptflip.inject("other.h5", out="x.h5", record="other.jsonl", seed=1)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    arguments, code, message = FAILURES[name]
    found, out, err = cli(*arguments)
    assert (found, out) == (code, ""), err
    assert message in err and "Traceback" not in err
    assert err.count("Error: ") == 1
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_help_and_version(cli):
    code, out, err = cli("--help")
    assert code == 0 and err == "" and all(f"\n  {name} " in out for name in main.COMMANDS)
    assert cli("--version")[1] == f"ckptflip, version {ckptflip.__version__}\n"
    for name in main.COMMANDS:
        code, out, _ = cli(name, "-h")
        assert code == 0 and out.startswith(f"Usage: ckptflip {name} ")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_called_alone_knows_both_names_of_help_and_keeps_them(cli, name):
    """click keeps a command's first help option for the life of the process."""
    alone = main.cli.get_command(click.Context(main.cli), name)
    alone._help_option = None
    for option in ("-h", "--help"):
        done = CliRunner().invoke(alone, [option])
        assert done.exit_code == 0 and done.output.startswith("Usage: ")
    code, out, _ = cli(name, "-h")
    assert code == 0 and out.startswith(f"Usage: ckptflip {name} ")


def test_interrupted(cli, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptflip.alter.inject", interrupt)
    code, out, err = cli("inject", "a.h5")
    assert (code, out) == (130, "") and err.strip() == "Error: interrupted"


def test_out_of_memory_and_other_failures(cli, monkeypatch):
    def fail(why):
        def raise_it(*_, **__):
            raise why

        monkeypatch.setattr("ckptflip.alter.inject", raise_it)
        return cli("inject", "a.h5")

    assert fail(MemoryError())[0] == 1
    code, _, err = fail(PermissionError(13, "Permission denied", "x/y"))
    assert code == 1 and "x/y: Permission denied" in err


HOSTILE = "w\x1b[31mred\x1b[0m\r\nnew\tline\x07\u202e"


def test_names_from_strangers_are_printed_harmlessly(cli):
    with h5py.File("evil.h5", "w") as file:
        file[HOSTILE] = np.ones(4, "f4")
        file["t" + HOSTILE] = "text"
    ckptflip.inject("evil.h5", out="b.h5", fault="value:nan", seed=1)
    for arguments in (
        ["ls", "evil.h5"],
        ["inject", "evil.h5", "--dry-run"],
        ["show", "b.h5.flips.jsonl"],
        ["show", "--flips", "b.h5.flips.jsonl"],
        ["diff", "evil.h5", "b.h5"],
        ["scan", "b.h5"],
        ["inject", "evil.h5", "-t", "zzz"],
        ["inject", "evil.h5", "-t", "w*", "-n", "999"],
        ["undo", "a.h5", "--record", "b.h5.flips.jsonl"],
    ):
        code, out, err = cli(*arguments)
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out + err), arguments
        assert code in (0, 1, 2, 3)
    assert "w\\x1b[31mred\\x1b[0m\\r\\nnew" in cli("ls", "evil.h5")[1]
    assert len(cli("ls", "evil.h5")[1].splitlines()) == 2
    assert json.loads(cli("ls", "evil.h5", "--format", "json")[1])[0]["name"] == HOSTILE


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete"), ("zsh", "compdef"), ("fish", "complete --")]
)
def test_completion_scripts(cli, shell, word):
    code, out, err = cli("completion", shell)
    assert (code, err) == (0, "") and word in out and "_CKPTFLIP_COMPLETE" in out


def test_completion_completes():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COMP_WORDS": "ckptflip inj", "COMP_CWORD": "1"}
    code = "from ckptflip.cli.main import cli; cli(prog_name='ckptflip')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "_CKPTFLIP_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "inject" in done.stdout


def test_as_a_process(folder):
    done = process("inject", "a.h5", "-n", "3", "--seed", "1", "--format", "json", cwd=folder)
    assert done.returncode == 0 and sum(r["bits"] for r in json.loads(done.stdout)) == 3
    done = process("diff", "a.h5", "a.flipped.h5", cwd=folder)
    assert done.returncode == 3
    done = process("ls", "gone.h5", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == "Error: gone.h5 does not exist\n"


@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_that_has_seen_enough(folder, form):
    """`ckptflip ls … | head -1`: no error, the totals at most."""
    with h5py.File("many.h5", "w") as file:
        for i in range(3000):
            file[f"layer{i:05d}/weight"] = np.float32(i)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m ckptflip ls many.h5 --format {form} | head -c 20"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, len(done.stdout)) == (0, 20)
    assert done.stderr in ("", "hdf5: 3000 tensors, 12000 bytes\n")


def imported(code: str, cwd: Path) -> set[str]:
    code = f"import sys\n{code}\nprint('\\n' + ' '.join(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_nothing_heavy_is_imported(folder):
    assert not imported("import ckptflip", folder) & {*FRAMEWORKS, "h5py", "numpy", "click"}
    run = "from ckptflip.cli import main; assert main.run({}) == 0"
    assert not imported(run.format(["--help"]), folder) & set(FRAMEWORKS)
    assert not imported(run.format(["inject", "a.h5", "--seed", "1"]), folder) & set(FRAMEWORKS)
    assert not imported(run.format(["ls", "a.h5"]), folder) & set(FRAMEWORKS)
    assert not imported(run.format(["diff", "a.h5", "a.h5"]), folder) & set(FRAMEWORKS)


def test_our_own_warnings_are_a_line(capsys, monkeypatch):
    inside, others = str(Path(ckptflip.__file__).parent / "recsys" / "files.py"), []
    monkeypatch.setattr(main, "_as_python_does", lambda *shown: others.append(shown[1:4]))
    main.show_warning(UserWarning("3 of 9 lines\x1b are malformed"), UserWarning, inside, 42)
    assert capsys.readouterr().err == "Warning: 3 of 9 lines\\x1b are malformed\n"
    main.show_warning(UserWarning("old"), UserWarning, "somewhere.py", 42)
    main.show_warning(DeprecationWarning("old"), DeprecationWarning, inside, 42)
    assert others == [(UserWarning, "somewhere.py", 42), (DeprecationWarning, inside, 42)]
    assert not capsys.readouterr().err


def test_a_progress_bar_only_for_somebody_who_watches(folder, monkeypatch):
    from ckptflip.cli import options

    monkeypatch.setattr(options, "_WORTH_A_BAR", 1)
    with options.progress_bar("a.h5", "copying") as progress:
        assert progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with options.progress_bar("a.h5", "copying") as progress:
        assert progress is not None
        progress((folder / "a.h5").stat().st_size)
    with options.progress_bar("gone.h5", "copying") as progress:
        assert progress is None
