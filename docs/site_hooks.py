"""Links from the pages to files of the repository that are not in docs/, for the site of `make docs`.

Pages link to such a file by its relative path (`../reports/published/.../report.md`), which works
where the code is hosted. For the site, every file that is linked becomes part of it, under
`repository/`: Markdown as a page, other text as a page that shows it, pictures and data as they
are. What a Markdown file links to comes along in turn, unless it is a plain data file. With
`repo_url` in mkdocs.yml the links go to that address instead.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = "repository"
BRANCH = "main"
SHOWN_AS_TEXT = {
    ".py": "python",
    ".yaml": "yaml",
    ".toml": "toml",
    ".txt": "text",
    "": "makefile",
}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
"""`](target#anchor)`"""
CODE = re.compile(r"(?ms)^(```|~~~).*?^\1|`[^`\n]+`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every file outside docs/ that a page links to."""
    root = Path(config.docs_dir).parent
    if config.repo_url:
        return files
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.abs_src_path]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if not source.startswith("docs/"):
            files.append(as_site_file(root, source, config))
        if not source.endswith(".md"):
            continue
        for target in linked(source, (root / source).read_text(encoding="utf-8")):
            if target not in seen and not target.startswith("docs/") and (root / target).is_file():
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links so that they lead to the same file within the site."""
    here = page.file.src_uri
    source = in_repository(here)
    root = Path(config.docs_dir).parent

    def rewritten(match: re.Match[str]) -> str:
        if is_address(match[2]):
            return match[0]
        target = resolved(source, match[2])
        if not (root / target).exists():
            return match[0]  # MkDocs says that it is missing
        if target.startswith("docs/"):
            link = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here))
        elif config.repo_url:
            link = f"{config.repo_url.rstrip('/')}/blob/{BRANCH}/{quote(target)}"
        else:
            link = posixpath.relpath(f"{FOLDER}/{site_name(target)}", posixpath.dirname(here))
        return match[1] + link + match[3]

    return outside_code(markdown, lambda text: LINK.sub(rewritten, text))


def as_site_file(root: Path, source: str, config: MkDocsConfig) -> File:
    """source: relative to the repository's root."""
    name = f"{FOLDER}/{site_name(source)}"
    if site_name(source) == source:
        return File.generated(config, name, abs_src_path=str(root / source))
    language = SHOWN_AS_TEXT[posixpath.splitext(source)[1]]
    content = (root / source).read_text(encoding="utf-8")
    return File.generated(
        config, name, content=f"# `{source}`\n\n~~~~ {language}\n{content}\n~~~~\n"
    )


def site_name(source: str) -> str:
    return f"{source}.md" if posixpath.splitext(source)[1] in SHOWN_AS_TEXT else source


def in_repository(src_uri: str) -> str:
    """The file that a page of the site was made from, relative to the repository's root."""
    if src_uri.startswith(f"{FOLDER}/"):
        return src_uri.removeprefix(f"{FOLDER}/")
    return f"docs/{src_uri}"


def linked(source: str, markdown: str) -> list[str]:
    """The files that a page links to, relative to the repository's root."""
    prose = CODE.sub("", markdown)
    return [resolved(source, link) for _, link, _ in LINK.findall(prose) if not is_address(link)]


def resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def is_address(link: str) -> bool:
    return link.startswith("/") or re.match(r"[a-z][a-z0-9+.-]*:", link) is not None


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies `change` to everything that is not code."""
    parts, end = [], 0
    for match in CODE.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])
