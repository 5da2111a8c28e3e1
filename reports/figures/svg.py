"""Matplotlib figures as SVG text: the same bytes for the same figure, themed by CSS, safe to put
several on one page.

A figure is drawn in the light colours of PALETTE. Standing alone it stays so; inline, each colour
becomes a CSS variable of the page, so that the figure follows the reader's light or dark theme.
"""

import copy
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

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
        for key, value in _settings().items():
            mpl.rcParams._set(key, value)
        yield


@cache
def _settings() -> dict[str, Any]:
    """All of them, validated once: matplotlib takes longer for that than for a small picture."""
    with mpl.rc_context():
        defaults = [key for key in mpl.rcParamsDefault if not key.startswith("backend")]
        mpl.rcParams.update({key: mpl.rcParamsDefault[key] for key in defaults})
        mpl.rcParams.update(STYLE)
        return {key: mpl.rcParams._get(key) for key in defaults}


PIXELS_PER_INCH = 72  # one SVG unit is one CSS pixel
FONT = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', sans-serif"


def to_svg(figure: Figure) -> Element:
    """The <svg> element of a figure, without metadata, matplotlib's style sheet, which would style
    the whole page, and namespaces (HTML needs none). Its text is in the reader's own font.
    """
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with style():
        figure.savefig(buffer, format="svg", dpi=PIXELS_PER_INCH, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.items()}
        if "style" in element.attrib:
            element.set("style", _in_readers_font(element.attrib["style"]))
    for definitions in root.findall("defs"):
        if definitions.find("style") is not None:
            root.remove(definitions)
    return root


def inline(svg: Element, name: str, title: str, description: str, css_class: str) -> str:
    """The element made ready for a page: named for screen readers, themed, its ids unique on the
    page.
    """
    root = copy.deepcopy(svg)
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
    _describe(root, {"title": title, "desc": description}, lambda tag: {"id": f"{name}-{tag}"})
    return ElementTree.tostring(root, encoding="unicode")


def standalone(svg: Element, title: str, description: str) -> str:
    """The element as a file of its own, on the light paper."""
    root = copy.deepcopy(svg)
    root.attrib = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **root.attrib}
    paper = {"width": "100%", "height": "100%", "fill": LIGHT["paper"]}
    root.insert(0, Element("rect", paper))
    _describe(root, {"title": title, "desc": description}, lambda tag: {})
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _describe(
    root: Element, words: Mapping[str, str], attributes: Callable[[str], dict[str, str]]
) -> None:
    """Puts title and description in front of everything else."""
    for place, (tag, text) in enumerate(words.items()):
        label = Element(tag, attributes(tag))
        label.text = text
        root.insert(place, label)


def _local(name: str) -> str:
    """A name as ElementTree gives it, `{namespace}name`, without the namespace."""
    return name.rpartition("}")[2]


def _in_readers_font(style: str) -> str:
    """Style declarations in which matplotlib's list of fonts is FONT: `font: 12px 'DejaVu Sans', ...`, or
    `font-family: 'DejaVu Sans', ...` in versions before 3.11.
    """
    declarations = []
    for declaration in style.split(";"):
        key, colon, value = declaration.partition(":")
        if key.strip() in ("font", "font-family"):
            value = value.partition("'")[0] + FONT
        declarations.append(f"{key}{colon}{value}")
    return ";".join(declarations)
