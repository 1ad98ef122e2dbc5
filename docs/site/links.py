"""A hook of mkdocs: pages from outside docs/, and links that are right both in a checkout and on the site.

A link is written as a checkout needs it: relative to its file. Here one to another page is turned into the
site's, and one to a file that the site does not have becomes its text. One to nothing is an error.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Code is left alone, also where it looks like a link; a link's text may hold code.
LINK = re.compile(
    r"^```.*?^```|(?P<image>!?)\[(?P<text>(?:[^\]\\]|\\.)*)\]\((?P<target>[^()\s]+)\)|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    path = page.file.src_uri
    source = {new: old for old, new in PAGES.items()}.get(path, f"docs/{path}")

    def replaced(match: re.Match[str]) -> str:
        image, text, target = match["image"], match["text"], match["target"]
        if target is None or "://" in target or target.startswith(("#", "mailto:")):
            return match.group()
        place, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), place))
        if not (ROOT / there).exists():
            raise PluginError(f"{source}: a link to {target}, and there is no {there}")
        on_site = PAGES.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if on_site is None:
            return text
        link = posixpath.relpath(on_site, posixpath.dirname(path) or ".")
        return f"{image}[{text}]({link}{'#' + anchor if anchor else ''})"

    return LINK.sub(replaced, markdown)
