"""Both reports in headless Chromium: no network, the policy in force, the viewer draws."""

from __future__ import annotations

import base64
import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished
from PIL import Image as Picture

from synthmed import compare
from synthmed.report import viewer
from synthmed.report.page import MAX_PAGE_BYTES, render
from tests.report.browser import CHROMIUM, Page, browser
from tests.report.test_page import HOSTILE, PICTURE
from tests.report.test_page import report as whole_report  # noqa: F401
from tests.test_compare import runs  # noqa: F401

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def ball(radius: float) -> bytes:
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, 40),) * 3, indexing="ij")
    inside = (x**2 + y**2 + z**2 < radius**2).astype(np.float32)
    return viewer.small_copy(inside * (1 + 0.3 * x), np.diag([2.0, 2, 2, 1]))


def written(folder: Path, given: dict[str, Any], **fields: Any) -> Path:
    """A page with three volumes, one of which is empty."""
    contents = {
        "viewer/a.nii.gz": ball(0.8),
        "viewer/b.nii.gz": ball(0.3),
        "viewer/c.nii.gz": ball(0),
    }
    whole = {**copy.deepcopy(given), **fields}
    whole["volumes"] = [
        {"file": file, "group": "synthetic", "part": "", "caption": f"scan {i}"}
        for i, file in enumerate(contents)
    ]
    contents |= {i["file"]: PICTURE for i in whole["images"]}
    file = folder / "report.html"
    file.write_text(render(whole, contents), encoding="utf-8")
    return file


def fits(page: Page, file: Path, width: int) -> None:
    """Open a page: it paints in time and is no wider than the screen."""
    page.size(width, 900)
    page.open(file)
    paints = "performance.getEntriesByType('paint').map(e => e.startTime)"
    page.until(f"{paints}.length > 0")
    assert min(page.run(paints)) < 3000
    assert page.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("kind", ["restricted", "shareable"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_report_renders_and_its_viewer_draws(
    page: Page, tmp_path: Path, whole_report: dict[str, Any], kind: str, width: int  # noqa: F811
) -> None:  # fmt: skip
    file = written(tmp_path, whole_report, report=kind)
    assert file.stat().st_size < MAX_PAGE_BYTES
    fits(page, file, width)
    assert page.run("typeof niivue") == "undefined"  # nobody has asked for it yet
    bright = [drawn(page, i) for i in range(3)]
    assert bright[0] > 3 * bright[1] > 0
    assert bright[1] > 3 * bright[2]
    pressed = "[...document.querySelectorAll('#viewer button')].map(b => b.ariaPressed)"
    assert page.run(pressed) == ["false", "false", "true"]
    assert page.complaints == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}


def test_the_heaviest_report_is_in_time_and_draws(
    page: Page, tmp_path: Path, whole_report: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    """Volumes and pictures of noise, which nothing compresses, and five hundred figures."""
    rng = np.random.default_rng(0)
    volumes = [
        viewer.small_copy(rng.random((viewer.MAX_SIDE,) * 3, np.float32), np.eye(4))
        for _ in range(viewer.MAX_VOLUMES)
    ]
    contents = {f"viewer/{i}.nii.gz": content for i, content in enumerate(volumes)}
    whole = copy.deepcopy(whole_report)
    whole["volumes"] = [
        {"file": file, "group": "synthetic", "part": "", "caption": file} for file in contents
    ]
    for i in range(10):
        picture = io.BytesIO()
        noise = rng.integers(0, 256, (400, 600), np.uint8)
        Picture.fromarray(noise).save(picture, "PNG")
        file = f"images/synthetic-{i:04d}.png"
        contents[file] = picture.getvalue()
        whole["images"].append({**whole["images"][0], "file": file})
    contents[whole["images"][0]["file"]] = PICTURE
    slices = [f"sex={s}, {n} patients" for s in "FM" for n in range(35)]
    whole["estimates"] += [{**e, "slice": s} for e in whole["estimates"] for s in slices]
    opened = tmp_path / "report.html"
    opened.write_text(render(whole, contents), encoding="utf-8")
    text = opened.read_text(encoding="utf-8")
    assert 0.95 * MAX_PAGE_BYTES < len(text.encode()) < MAX_PAGE_BYTES
    assert "1 more scan lies beside this page" in text
    fits(page, opened, 1200)
    assert drawn(page, 4) > 0
    assert page.complaints == []


def drawn(page: Page, index: int) -> int:
    """How many pixels of the canvas are bright once a scan is shown."""
    page.run(f"document.querySelectorAll('#viewer button')[{index}].click()")
    page.until(f"document.getElementById('viewer').dataset.shown === '{index}'")
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = page.run(
        "(r => ({x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}))"
        "(document.querySelector('#viewer canvas').getBoundingClientRect())"
    )
    seen = np.asarray(Picture.open(io.BytesIO(page.picture(box))).convert("RGB")).astype(int)
    grey = np.ptp(seen, axis=2) < 20  # the cross is coloured
    return int((grey & (seen.min(axis=2) > 120)).sum())


CONTRAST = """
(() => {
  const channels = text => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a === undefined ? 1 : a];
  };
  const light = ([r, g, b]) => {
    const one = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * one(r) + 0.7152 * one(g) + 0.0722 * one(b);
  };
  const behind = node => {
    const mark = node.previousElementSibling;  // a number stands on the mark before it
    if (mark && mark.tagName === 'circle') return channels(getComputedStyle(mark).fill);
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.getClientRects().length) continue;
    if (['SCRIPT', 'STYLE'].includes(node.tagName) || node.closest('.hidden, .skip')) continue;
    const style = getComputedStyle(node);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    const ink = node.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(channels(ink)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    const text = walker.currentNode.data.trim().slice(0, 40);
    if (ratio < least) low.push(`${text} ${ratio.toFixed(2)}`);
  }
  return {seen, low};
})()
"""
"""Texts whose contrast is below the AA level of WCAG 2.1 (success criterion 1.4.3)."""


@pytest.mark.parametrize("kind", ["restricted", "shareable"])
def test_every_text_has_the_contrast_of_wcag_aa(
    page: Page, tmp_path: Path, whole_report: dict[str, Any], kind: str  # noqa: F811
) -> None:  # fmt: skip
    page.size(1200, 900)
    page.open(written(tmp_path, whole_report, report=kind))
    found = page.run(CONTRAST)
    assert found["seen"] > 100 and found["low"] == []
    # the measure itself sees grey on white
    page.run("document.querySelector('h1').style.color = '#999'")
    assert len(page.run(CONTRAST)["low"]) == 1


@pytest.mark.parametrize("width", [1200, 390])
def test_a_comparison_renders_with_its_marks_in_their_places(
    page: Page, tmp_path: Path, runs: list[Path], width: int  # noqa: F811
) -> None:  # fmt: skip
    file = tmp_path / "compare.html"
    file.write_text(compare.page(compare.compare(runs)), encoding="utf-8")
    page.size(width, 900)
    page.open(file)
    assert page.run("document.documentElement.scrollWidth") <= width
    found = page.run(CONTRAST)
    assert found["seen"] > 50 and found["low"] == []
    # fidelity against epsilon: at 8 better than at 1, so that its mark is further right and lower
    places = page.run(
        "[...document.querySelectorAll('figure svg')].map(svg => "
        "[...svg.querySelectorAll('circle')].map(c => c.getBoundingClientRect())"
        ".map(r => [r.x, r.y]))"
    )
    assert [len(marks) for marks in places] == [2, 3]
    (eight, one), _ = places
    assert eight[0] > one[0] and eight[1] > one[1]
    assert page.complaints == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}


def test_what_a_config_says_cannot_run(
    page: Page, tmp_path: Path, whole_report: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    """Were the escaping to fail, the policy would still refuse."""
    file = written(tmp_path, whole_report, title=HOSTILE)
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("<main>", "<main><script>window.owned = 1</script>"))
    page.open(file)
    assert page.run("window.owned === undefined")
    assert any("Content Security Policy" in c for c in page.complaints)


HIDDEN_ROWS = """
[...document.querySelectorAll('table tr')].filter(r => !r.getBoundingClientRect().height).length
"""


def test_printed_it_has_no_viewer_and_all_figures(
    page: Page, tmp_path: Path, whole_report: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    page.open(written(tmp_path, whole_report))
    page.ask("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.getElementById('viewer')).display") == "none"
    assert page.run("document.querySelector('#decision').getBoundingClientRect().height") > 50
    assert page.run("document.querySelectorAll('table tr').length") > len(whole_report["estimates"])
    assert page.run(HIDDEN_ROWS) == 0
    page.ask("Emulation.setEmulatedMedia", media="")
    paper = base64.b64decode(page.ask("Page.printToPDF", printBackground=True)["data"])
    assert paper.startswith(b"%PDF-") and len(paper) > 20_000


@pytest.mark.parametrize("where", ["private/report", "release/report"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_pages_of_a_finished_run_render(
    page: Page, finished: Finished, where: str, width: int
) -> None:
    """Not a page of a test's own making: what `generate` has written, learning curves and all."""
    (file,) = (finished.path / where).glob("*.html")
    fits(page, file, width)
    found = page.run(CONTRAST)
    assert found["seen"] > 100 and found["low"] == []
    curves = page.run("document.querySelectorAll('#utility svg').length")
    assert (curves > 0) == where.startswith("private")  # no policy names a point of them
    assert drawn(page, 0) > 0
    assert page.complaints == []
    assert {url.split(":")[0] for url in page.requests} <= {"file", "data"}


def test_buttons_work_by_keyboard(
    page: Page, tmp_path: Path, whole_report: dict[str, Any]  # noqa: F811
) -> None:  # fmt: skip
    page.open(written(tmp_path, whole_report))
    page.run("document.querySelectorAll('#viewer button')[1].focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        page.ask(
            "Input.dispatchKeyEvent", type=kind, key="Enter", text="\r", windowsVirtualKeyCode=13
        )
    page.until("document.getElementById('viewer').dataset.shown === '1'")
