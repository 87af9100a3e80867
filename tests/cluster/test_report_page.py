"""The report page in a real browser without network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hg_scale.commands.main import main
from tests.run_folders import write_run

pytestmark = pytest.mark.cluster
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
# Colours of the runs and of the page, as page.css has them.
FIRST = {"light": (0x1F, 0x6F, 0xD6), "dark": (0x6C, 0xAB, 0xFF)}
SECOND = {"light": (0xD2, 0x54, 0x1B), "dark": (0xFF, 0x8F, 0x5C)}
PAPER = {"light": (0xFB, 0xFB, 0xF9), "dark": (0x14, 0x17, 0x1A)}

ONLY_CURVES = "<style>header, .cards, .bars, .legend, footer { display: none }</style>"
POINT = """<script>addEventListener("load", () => {
  const hit = document.querySelector(".hit"), box = hit.getBoundingClientRect();
  hit.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.5 * box.width}));
});</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "alpha"),
        write_run(folder / "beta", change={"model": {"hierarchy": "3@1"}}, offset=0.3),
    ]
    output = folder / "page.html"
    words = ["report", *map(str, runs), "--sample", "0", "--output", str(output)]
    assert main(words) == 0
    return output


def browse(page: Path, *options: str) -> str:
    """Return the browser's output for a page; it can reach only the file."""
    if BROWSER is None:
        pytest.skip("needs chromium: apt-get install chromium")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
        f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(page.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(page: Path, width: int, height: int, scheme: str) -> NDArray[np.uint8]:
    """Return the pixels (height, width, 3) of the page in a colour scheme."""
    output = page.parent / f"{scheme}-{width}.png"
    dark = () if scheme == "light" else ("--blink-settings=preferredColorScheme=0",)
    browse(page, f"--window-size={width},{height}", f"--screenshot={output}", *dark)
    return np.asarray(Image.open(output).convert("RGB"))


def near(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.bool_]:
    return (np.abs(pixels.astype(int) - colour) < 12).all(-1)


def test_curves_are_drawn_and_the_script_runs(page: Path) -> None:
    dom = browse(page, "--dump-dom")
    for chart in ("bits_per_byte", "tokens_per_second", "grad_norm"):
        start = rf'<svg class="plot on-tokens"[^>]*data-chart="{chart}"'
        plot = re.search(start + ".*?</desc>.*?</svg>", dom, re.DOTALL)
        assert plot
        paths = re.findall(r'<path class="line run\d[^"]*" d="(M[^"]+)"', plot[0])
        assert len(paths) == 2 and all(p.count("l") > 50 for p in paths)
    assert dom.count('class="hit"') == 7  # created by the script, one per chart


def test_pointer_shows_the_values_of_both_runs(page: Path) -> None:
    pointed = page.with_name("pointed.html")
    pointed.write_text(page.read_text().replace("</body>", POINT + "</body>"))
    dom = browse(pointed, "--dump-dom")
    tip = re.search(r'<div class="tip" style="[^"]*">(.*?)</div>', dom, re.DOTALL)
    assert tip
    text = re.sub(r"<[^>]+>", " ", tip[1])
    assert "tokens 25.6k" in text and "alpha" in text and "beta" in text
    assert "validation 2.024 at 25.6k" in text  # 1.6 + 6 / sqrt(200)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 500])
def test_screenshot_shows_both_runs(page: Path, scheme: str, width: int) -> None:
    curves = page.with_name("curves.html")
    curves.write_text(page.read_text().replace("</head>", ONLY_CURVES + "</head>"))
    pixels = screenshot(curves, width, 1000, scheme)
    assert near(pixels, PAPER[scheme]).mean() > 0.5
    for colour in (FIRST[scheme], SECOND[scheme]):
        # Each curve runs from one side to the other: its colour is in most columns of pixels.
        assert near(pixels, colour).any(0).mean() > 0.7
