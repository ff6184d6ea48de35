"""A hook of MkDocs (mkdocs.yml): links that lead out of docs/ work in the site as they do on GitHub.

A file of the repository that a page links to, such as `../SECURITY.md`, becomes a part of the site at the same path: a page
where it is Markdown, else a file to open. Links are rewritten while the site is built; the pages themselves stay as GitHub
reads them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside docs/, and what those in turn link to."""
    waiting = [("docs/" + file.src_uri, file) for file in files.documentation_pages()]
    while waiting:
        place, page = waiting.pop()
        for link in LINK.finditer(page.content_string):
            target = _resolved(place, link[2])
            if target.startswith("docs/") or not (ROOT / target).is_file() or files.get_file_from_path(target):
                continue
            added = File.generated(config, target, abs_src_path=str(ROOT / target))
            files.append(added)
            if added.is_documentation_page():
                waiting.append((target, added))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point each link at where its target lies in the site."""
    here = page.file.src_uri
    place = here if page.file.generated_by else "docs/" + here

    def rewritten(link: re.Match[str]) -> str:
        target = _resolved(place, link[2])
        if not target.startswith("docs/") and not (ROOT / target).is_file():
            return link[0]
        inside = target.removeprefix("docs/")
        return link[1] + posixpath.relpath(inside, posixpath.dirname(here) or ".") + link[3]

    return LINK.sub(rewritten, markdown)


def _resolved(place: str, link: str) -> str:
    """The path in the repository that a page there links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
