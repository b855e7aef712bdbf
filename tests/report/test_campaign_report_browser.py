"""The report in a real browser: no error, every figure visible, nothing from outside, dark mode, phones."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import campaign_stores as stores
import pytest

from ckptflip.report.campaign import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
DARK, LIGHT = 0, 1
# What a reader's browser made of the page, written into it: the policy of the page itself allows no script.
PROBE = """<script>
addEventListener("load", () => {
  const sizes = [...document.querySelectorAll("svg, img")].map(e => e.getBoundingClientRect());
  const made = document.createElement("pre");
  made.id = "probe";
  const colour = (e, what) => getComputedStyle(e)[what];
  const label = document.querySelector("svg text");
  made.textContent = JSON.stringify({
    sizes: sizes.map(r => [r.width, r.height]),
    page: document.documentElement.scrollWidth, window: innerWidth,
    paper: colour(document.body, "backgroundColor"), ink: colour(document.body, "color"),
    label: label ? colour(label, "fill") : "", ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    loaded: performance.getEntriesByType("resource").map(e => e.name)});
  document.body.append(made);
});
</script>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def chromium(page: Path, profile: Path, *, width: int = 1280, scheme: int = LIGHT) -> tuple[str, list[str]]:
    """The page as the browser made it, and what its console said."""
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
            "--dump-dom", f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},2000",
            "--enable-logging=stderr", "--v=0", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(page: Path, profile: Path, **how: Any) -> dict[str, Any]:
    """What the probe saw in a copy of the page."""
    copy = page.with_name("probed.html")
    copy.write_text(POLICY.sub("", page.read_text("utf-8")).replace("</body>", f"{PROBE}</body>"), "utf-8")
    dom, said = chromium(copy, profile, **how)
    assert said == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    return seen


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    stores.drawn(
        folder / "runs.db", workloads=("PyTorch", "Keras"), counts_swept=(1, 10, 100), trials=12, until=10,
        spread=(1,),
    )  # fmt: skip
    return write(folder / "runs.db", folder / "report")


def test_the_console_is_silent_and_the_page_whole(page, tmp_path):
    dom, said = chromium(page, tmp_path)
    assert said == []
    assert dom.rstrip().endswith("</html>")
    assert "To reproduce this" in dom


def test_a_console_that_is_not_silent_is_heard(page, tmp_path):
    """The policy of the page stops what should never be in it, and the browser says so."""
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text("utf-8").replace("</body>", "<script>alert(1)</script></body>"), "utf-8")
    _, said = chromium(broken, tmp_path)
    assert said


def test_every_figure_is_visible_and_nothing_is_loaded(page, tmp_path):
    seen = probed(page, tmp_path)
    files = list((page.parent / "figures").glob("*.svg"))
    assert len(seen["sizes"]) == len(files) >= 8
    assert min(width for width, _ in seen["sizes"]) > 300
    assert min(height for _, height in seen["sizes"]) > 80
    assert seen["loaded"] == []
    assert len(seen["ids"]) == len(set(seen["ids"]))


def test_a_phone_has_no_sideways_scrolling(page, tmp_path):
    seen = probed(page, tmp_path, width=390)
    assert seen["window"] <= 500  # what a headless window can be at least
    assert seen["page"] <= seen["window"]


def test_dark_mode_turns_paper_and_figures(page, tmp_path):
    light, dark = (probed(page, tmp_path / str(scheme), scheme=scheme) for scheme in (LIGHT, DARK))
    for one in (light, dark):
        assert one["label"] == one["ink"]
    assert brightness(light["paper"]) > 200 > 100 > brightness(light["ink"])
    assert brightness(dark["paper"]) < 100 < 200 < brightness(dark["ink"])


def brightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``, 0 to 255."""
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / 3


def test_nothing_in_the_page_leads_outside(page):
    made = page.read_text("utf-8")
    places = re.findall(r"""(?:src|href|data|action|poster)\s*=\s*["']([^"']*)["']|url\(([^)]*)\)""", made)
    assert places
    for place in (first or second for first, second in places):
        assert place.startswith(("#", "figures/", "data:,")), place
        if place.startswith("figures/"):
            assert (page.parent / place).is_file()
    assert "@import" not in made
