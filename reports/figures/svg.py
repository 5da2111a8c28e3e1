"""Matplotlib figures as SVG text: the same bytes for the same figure, themed by CSS, safe to put
several on one page.

A figure is drawn in the light colours of PALETTE. Standing alone it stays so; inline, each colour
becomes a CSS variable of the page, so that the figure follows the reader's light or dark theme.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.look import PALETTE

LIGHT = {name: light for name, (light, _) in PALETTE.items()}

STYLE = {
    "svg.hashsalt": "nanovllm",  # else ids are drawn from a random UUID
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the reader's font
    "text.parse_math": False,  # names come from outside; a dollar sign is a dollar sign
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": LIGHT["rule"],
    "axes.linewidth": 1,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 11,
    "lines.solid_capstyle": "round",
}


@contextmanager
def style() -> Iterator[None]:
    """STYLE over matplotlib's own defaults: what a matplotlibrc on this machine says must not
    change the bytes.
    """
    with mpl.rc_context():
        mpl.rcParams.update(
            {
                key: mpl.rcParamsDefault[key]
                for key in mpl.rcParamsDefault
                if not key.startswith("backend")
            }
        )
        mpl.rcParams.update(STYLE)
        yield


PIXELS_PER_INCH = 72  # one SVG unit is one CSS pixel
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif"


def to_svg(figure: Figure) -> str:
    """The <svg> element of a figure, without XML header, metadata and namespaces (HTML needs none)."""
    buffer = io.StringIO()
    with style():
        figure.savefig(
            buffer, format="svg", dpi=PIXELS_PER_INCH, metadata={"Date": None, "Creator": None}
        )
    # Text is cut here instead of parsed: published figures keep the bytes that matplotlib wrote.
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    # would style the whole page
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = _in_styles(svg, r"'DejaVu Sans'[^;\"]*", FONT)
    return svg.strip()


def inline(svg: str, name: str, title: str, description: str, css_class: str) -> str:
    """The element made ready for a page: named for screen readers, themed, its ids unique on the
    page.
    """
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        for key, value in element.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-", 1)
            elif key == "style":
                for color, light in LIGHT.items():
                    value = value.replace(light, f"var(--{color})")
            element.set(key, value.replace("url(#", f"url(#{name}-"))
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "class": css_class,
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
    }
    for tag, words in (("desc", description), ("title", title)):
        label = ElementTree.Element(tag, id=f"{name}-{tag}")
        label.text = words
        root.insert(0, label)
    return ElementTree.tostring(root, encoding="unicode")


def standalone(svg: str, title: str, description: str) -> str:
    """The element as a file of its own, on the light paper."""
    labels = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    background = f'<rect width="100%" height="100%" fill="{LIGHT["paper"]}"/>'
    end = svg.index(">")
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img"{svg[4:end]}>{labels}{background}{svg[end + 1 :]}\n'


def _in_styles(svg: str, pattern: str, replacement: str) -> str:
    """Replace within style attributes only, so that labels with the same characters stay."""
    return re.sub(r'style="[^"]*"', lambda match: re.sub(pattern, replacement, match[0]), svg)
