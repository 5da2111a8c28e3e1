"""The look that all pages share: colours, style sheet, the head of an HTML page, and how values are
escaped in HTML and Markdown.

base.html.j2    the frame of every HTML page: one file, readable in a light and in a dark theme
style.css       its style
"""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

LOOK = Path(__file__).resolve().parent

# name: (light, dark). The verdicts differ in lightness as well as in hue, and are always written
# out beside the colour.
PALETTE = {
    "paper": ("#fdfcf9", "#15181b"),
    "ink": ("#1e2227", "#e7e4dd"),
    "muted": ("#69707a", "#9ba3ac"),
    "rule": ("#dfdcd4", "#30363c"),
    "band": ("#ece8de", "#262c31"),
    "faster": ("#0d766c", "#4fc4b5"),
    "slower": ("#b4500b", "#f0a25c"),
    "equivalent": ("#4a5462", "#aab4bf"),
    "inconclusive": ("#6f619a", "#b7a9dc"),
}


def html_environment(templates: Path) -> Environment:
    """An environment for the pages of a folder, whose templates extend `base.html.j2`. Printed values
    are escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([templates, LOOK], encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    environment.globals["palette"] = PALETTE
    environment.globals["css"] = Markup((LOOK / "style.css").read_text(encoding="utf-8"))
    return environment


def breakable(value: object) -> Markup:
    """Text as HTML in which a line may break after the characters that join the words of a name."""
    return Markup(re.sub(r"([_=+/-])", r"\1<wbr />", str(escape(value))))


def markdown_environment(templates: Path) -> Environment:
    """An environment that escapes every printed value for Markdown, so that a pipe in a name
    cannot end a table cell.
    """
    environment = html_environment(templates)
    environment.finalize = escape_markdown
    environment.filters["code"] = code
    return environment


def escape_markdown(value: object) -> Markup:
    """Text as Markdown that shows it literally, on one line."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    return Markup(re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", line))


def code(value: object) -> Markup:
    """Text as a code span. Pipes are replaced, since they end a table cell even in code; the fence
    is longer than any run of backticks within.
    """
    line = " ".join(str(value).split()).replace("|", "¦")
    if not line:
        return Markup("")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if "`" in line else ""
    return Markup(f"{fence}{pad}{line}{pad}{fence}")
