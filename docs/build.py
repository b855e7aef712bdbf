"""Builds the documentation as HTML pages that work offline: python docs/build.py OUTPUT_FOLDER.

Fails on a link between pages that leads nowhere.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

import markdown

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · ckptflip</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }}
nav a {{ margin-right: 1rem; }}
pre {{ overflow-x: auto; padding: .8rem; border: 1px solid #8886; border-radius: 6px; font-size: .85rem; }}
code {{ font-family: ui-monospace, monospace; font-size: .92em; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ border: 1px solid #8886; padding: .3rem .6rem; text-align: left; }}
img {{ max-width: 100%; background: #fff; }}
</style>
</head>
<body>
<nav>{nav}</nav>
{body}
</body>
</html>
"""


def pages() -> dict[str, Path]:
    """Every Markdown page by its path in the built site."""
    found = {"index.html": ROOT / "README.md"}
    for path in sorted(HERE.rglob("*.md")):
        found[str(path.relative_to(HERE).with_suffix(".html"))] = path
    for name in ("CONTRIBUTING", "CHANGELOG"):
        found[f"{name}.html"] = ROOT / f"{name}.md"
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        found[f"benchmarks-{path.stem}.html"] = path
    return found


def build(output: Path) -> list[str]:
    """Write the site.

    Returns:
        Links that lead nowhere, as messages.
    """
    output.mkdir(parents=True, exist_ok=True)
    site = pages()
    broken: list[str] = []
    for name, source in site.items():
        text = source.read_text("utf-8")
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * name.count("/")

        def link(match: re.Match[str], source: Path = source, up: str = up) -> str:
            address, anchor = match.group(2), match.group(3) or ""
            if re.match(r"[a-z]+:", address):
                return match.group(0)
            wanted = (source.parent / address).resolve()
            if not wanted.exists():
                broken.append(f"{source.relative_to(ROOT)}: {address} leads nowhere")
            for page, origin in site.items():
                if origin.resolve() == wanted:
                    return f"{match.group(1)}({up}{page}{anchor})"
            if wanted.is_relative_to(HERE):
                return f"{match.group(1)}({up}{wanted.relative_to(HERE)}{anchor})"
            return f"{match.group(1)}({up}{wanted.name}{anchor})"

        text = re.sub(r"(\[[^\]]*\])\(([^)#\s]+)(#[^)]*)?\)", link, text)
        body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc"])
        title = text.lstrip("# ").splitlines()[0]
        nav = " ".join(
            f'<a href="{up}{page}">{html.escape(page.removesuffix(".html"))}</a>'
            for page in site
            if "/" not in page
        )
        target.write_text(PAGE.format(title=html.escape(title), nav=nav, body=body), "utf-8")
    shutil.copytree(HERE / "images", output / "images", dirs_exist_ok=True)
    return broken


if __name__ == "__main__":
    problems = build(Path(sys.argv[1]))
    print("\n".join(problems) or f"{len(pages())} pages in {sys.argv[1]}")
    sys.exit(1 if problems else 0)
