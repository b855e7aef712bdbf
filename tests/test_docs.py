"""The documentation says what the program does: a current reference, examples that print what is shown."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from ckptflip.cli.main import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES_WITH_EXAMPLES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if any(mark in page.read_text("utf-8") for mark in ("```console", "<!-- run -->"))
]

NEEDED = {
    **dict.fromkeys(
        (
            "README",
            "vision",
            "pytorch",
            "dcp",
            "propagation",
            "campaigns",
            "recsys",
            "live",
            "intensity",
            "protection",
            "clipping",
            "abft",
            "abft-embeddings",
            "bit-protection",
            "seals",
        ),
        ("torch",),
    ),
    **dict.fromkeys(("keras", "training"), ("keras", "torch")),
    "callbacks": ("torch", "sklearn", "keras", "lightning", "transformers", "accelerate", "skorch"),
    "zarr": ("zarr",),
    "orbax": ("zarr", "orbax"),
}


def load(name: str, folder: str = "docs") -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_commands_say() -> None:
    reference = load("reference")
    assert reference.PAGE.read_text("utf-8") == reference.text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_a_help_text(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help, name
    bare = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
    assert bare == []


@pytest.mark.parametrize("page", PAGES_WITH_EXAMPLES)
def test_examples_print_what_the_page_shows(page: str) -> None:
    for library in NEEDED.get(Path(page).stem, ()):
        # Found, not imported: examples run elsewhere, and not all frameworks bear one another.
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")
    assert load("examples").check(ROOT / page) == []


def test_examples_are_compared_for_real() -> None:
    same = load("examples").same
    assert same(["a  1.00", "...", "end … 3f800000"], ["a 1.02", "x", "y", "end of 3f800001"])
    assert not same(["a 1.00"], ["a 1.20"])
    assert not same(["3f800000"], ["40000000"])
    assert not same(["3 bits"], ["4 bits"])
    assert not same(["a"], ["a", "b"])
    assert not same([], ["b"])


def test_every_example_page_has_examples() -> None:
    examples = load("examples")
    counts = {
        page: len(list(examples.examples((ROOT / page).read_text("utf-8")))) for page in PAGES_WITH_EXAMPLES
    }
    assert min(counts.values()) >= 1
    assert counts["README.md"] >= 5


def test_links_between_pages_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("markdown")
    assert load("build").build(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "columns", "page"),
    [("inject", 5, "README.md"), ("formats", 8, "README.md"), ("seal", 7, "docs/seals.md")],
)
def test_the_speeds_on_a_page_are_the_benchmarks(name: str, columns: int, page: str) -> None:
    processes = load("processes", "benchmarks")
    first, last = processes.markers(name)
    shown = (ROOT / page).read_text("utf-8").partition(first)[2].partition(last)[0]
    results = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text("utf-8")
    assert shown.strip() == processes.table_of(results, columns)
    assert shown.count("\n|") > 5


def test_the_page_of_loaders_has_a_row_for_each() -> None:
    from ckptflip.loaders import PROBES

    page = (ROOT / "docs" / "loaders.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert [(row[0][2:], row[1].strip("`")) for row in rows] == [(p.format, p.loader) for p in PROBES]
    assert all(row[4] in ("silent", "detected", "refused") for row in rows)
