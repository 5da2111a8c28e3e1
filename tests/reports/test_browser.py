"""The pages of all published studies in a headless Chromium: rendered here, without a complaint,
without a request that leaves the page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.checking import page as check_page
from reports.claims.published_studies import PUBLISHED, folders
from reports.figures.browser import Browser, BrowserError, find
from reports.page.render import HTML

# CI sets it: there, a missing browser is a failure
REQUIRED = bool(os.environ.get("NANOVLLM_REQUIRE_CHROMIUM"))
pytestmark = pytest.mark.skipif(
    find() is None and not REQUIRED, reason="no Chromium on this machine: apt-get install chromium"
)
STUDIES = sorted(folder.relative_to(PUBLISHED).as_posix() for folder in folders())
DESK, PHONE = (1280, 800), (360, 740)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_renders_and_keeps_to_itself(
    name: str, browser: Browser, rendered: Callable[[str], Path]
) -> None:
    page = rendered(name) / HTML
    for width, height in (DESK, PHONE):
        browser.open(page, width, height, settle_s=0.1)
        size = f"{name}, {width} px"
        visible = browser.evaluate("document.querySelectorAll('details[open]').length")
        assert visible == 0, f"{size}: the evidence is folded"
        assert browser.evaluate(CUT) == [], f"{size}: a table is cut"
        # everything else is looked at with the evidence unfolded
        browser.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
        for dark in (False, True):
            browser.show_theme(dark=dark)
            look = f"{size}, {'dark' if dark else 'light'}"
            assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
            assert browser.complaints() == [], look
            assert browser.requests() == [page.resolve().as_uri()], look
            check_look(browser, page, look)


def check_look(browser: Browser, page: Path, look: str) -> None:
    """What is seen of a page whose evidence is unfolded."""
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        f"{look}: the page scrolls sideways"
    )
    shown = "[...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().height > 40)"
    figures, all_figures = browser.evaluate(
        f"[{shown}.length, document.querySelectorAll('figure').length]"
    )
    # else tables alone
    least = 0 if "no ratio and no verdict" in page.read_text(encoding="utf-8") else 3
    assert figures == all_figures >= least, (
        f"{look}: one picture of each figure, that for this width, is shown"
    )
    assert browser.evaluate(BEYOND) == [], f"{look}: something is cut at the right"
    assert browser.evaluate(LABELS) == [], f"{look}: labels of a picture"
    inside = f"{shown}.every(svg => svg.getBoundingClientRect().right <= innerWidth + 1)"
    assert browser.evaluate(inside), f"{look}: a picture is wider than the page"
    assert browser.evaluate(
        f"{shown}.every(svg => svg.getAttribute('role') == 'img' && svg.querySelector('desc').textContent)"
    )
    assert browser.evaluate(CONTRAST) >= 4.5, f"{look}: text cannot be told from its ground"
    assert (
        browser.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize)")
        >= 12
    ), look
    assert browser.picture().startswith(b"\x89PNG")


CUT = """[...document.querySelectorAll('section > .scroll')]
  .filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.getAttribute('aria-label'))"""
"""Tables outside of the evidence that have to be scrolled sideways."""

BEYOND = """[...document.querySelectorAll('header *, main *, footer *')]
  .filter(one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll'))
  .map(one => one.tagName + ' ' + one.textContent.trim().slice(0, 40))"""
"""Elements that reach beyond the window, but for those in a box that scrolls."""

LABELS = """[...document.querySelectorAll('figure svg')]
  .filter(svg => svg.getBoundingClientRect().height > 40).flatMap(svg => {
    const paper = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll('text')].map(text => [text.textContent.trim(), text.getBoundingClientRect()]);
    const outside = labels.filter(([, box]) => box.left < paper.left - 1 || box.right > paper.right + 1
      || box.top < paper.top - 1 || box.bottom > paper.bottom + 1).map(([words]) => `outside: ${words}`);
    const over = labels.flatMap(([words, a], i) => labels.slice(i + 1)
      .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
      .map(([other]) => `over each other: ${words}, ${other}`));
    return [...outside, ...over];
  })"""
"""Labels of pictures that reach out of them, or lie over each other."""

CONTRAST = """(() => {
  const channel = value => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = css => css.match(/[\\d.]+/g).slice(0, 3).map(Number).map(channel)
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const ratios = [...document.querySelectorAll('p, td, th, h1, h2, li, dt, dd, .verdict')].map(element => {
    const ink = luminance(getComputedStyle(element).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  });
  return Math.min(...ratios);
})()"""
"""The least contrast of any text with the paper (WCAG 2.2, 1.4.3 asks for 4.5)."""


CHECKED: Any = {
    "lines": [
        {
            "name": name,
            "group": "tensor_parallel_size=2, attention_backend=native, kernels=native, batching=chunked",
            "dtype": "bfloat16",
            "expected": "pass",
            "status": "pass" if good else "fail",
            "good": good,
            "reason": None
            if good
            else "request 17: token 96 lies 0.41 below the reference's choice",
            "gate": {
                "tokens_checked": 1_234_567,
                "mismatches": 1_234,
                "max_margin": 1.42e-05,
                "bound": 6.1e-06,
                "calibration": {},
            },
            "logprobs": {"engine_error": {"max": 1.42e-05}, "bound": {"max": 6.1e-06}},
            "identical": 1_000,
            "answers": 1_000,
        }
        for name, good in (("pair 17 in bfloat16", True), ("all + symmetric_memory", False))
    ],
    "good": False,
    "noise": {},
    "absent": ["cuda_graphs: needs an NVIDIA GPU of compute capability 8.0 or newer"],
    "model": {"name": "tiny", "digest": "d" * 64},
    "device": "cpu",
    "hardware": "AMD EPYC, 2 cores",
    "workloads": {"drawn": 120, "requests": 1_059},
    "duration_s": 240.0,
}


def test_nothing_is_cut_on_the_page_of_a_check(browser: Browser, tmp_path: Path) -> None:
    """What `make check` writes: on a desk, on a phone, in both themes."""
    page = tmp_path / "check.html"
    page.write_text(check_page.page(CHECKED), encoding="utf-8")
    for width, height in (DESK, PHONE):
        browser.open(page, width, height, settle_s=0.1)
        for dark in (False, True):
            browser.show_theme(dark=dark)
            look = f"{width} px, {'dark' if dark else 'light'}"
            assert browser.evaluate(CUT) == [], f"{look}: a table is cut"
            assert browser.evaluate(BEYOND) == [], f"{look}: something is cut at the right"
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), look
            assert browser.evaluate(CONTRAST) >= 4.5, look
            assert browser.complaints() == [], look


def test_the_browser_sees_what_a_page_must_not_do(
    browser: Browser, rendered: Callable[[str], Path], tmp_path: Path
) -> None:
    """The guard guarded: a page that reaches out and fails is caught, and with our policy its
    request is never made.
    """
    body = '<img src="http://127.0.0.1:9/picture.png"><script>console.error("broken"); undefined.call()</script>'
    page = tmp_path / "page.html"
    page.write_text(f"<!DOCTYPE html><html><head><title>x</title></head><body>{body}</body></html>")
    browser.open(page, *DESK)
    assert "http://127.0.0.1:9/picture.png" in browser.requests()
    assert any("broken" in complaint for complaint in browser.complaints())
    assert any("Uncaught" in complaint for complaint in browser.complaints())
    policy = next(
        line
        for line in (rendered(STUDIES[0]) / HTML).read_text().splitlines()
        if "Content-Security-Policy" in line
    )
    page.write_text(page.read_text().replace("<head>", f"<head>{policy}"))
    browser.open(page, *DESK)
    assert not [
        url for url in browser.requests() if url.startswith("http") and not blocked(browser, url)
    ]
    assert not any("broken" in complaint for complaint in browser.complaints())


def test_a_page_that_is_not_there_is_an_error(browser: Browser, tmp_path: Path) -> None:
    with pytest.raises(BrowserError, match="cannot open it"):
        browser.open(tmp_path / "absent.html", *DESK)


def blocked(browser: Browser, url: str) -> bool:
    """Whether the policy stopped a request before it left the page."""
    asked = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    ids = {one["requestId"] for one in asked if one["request"]["url"] == url}
    failed = [e["params"] for e in browser.events if e["method"] == "Network.loadingFailed"]
    return any(one["requestId"] in ids and one.get("blockedReason") == "csp" for one in failed)
