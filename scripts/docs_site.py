"""A hook of MkDocs: pages link to files of the repository as GitHub shows them; the site has SECURITY.md as a page, and names
the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"SECURITY.md": "security.md"}


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    depth = page.file.src_uri.count("/") + 1
    outside = re.compile(rf"\[([^\]]*)\]\((?:\.\./){{{depth}}}([^)#]+)(#[^)]*)?\)")
    if page.file.src_uri in PAGES.values():  # it stood at the root
        return re.sub(r"\]\(docs/", "](", markdown)
    return outside.sub(lambda found: _linked(*found.groups(), depth=depth), markdown)


def _linked(text: str, path: str, anchor: str | None, *, depth: int) -> str:
    if path in PAGES:
        return f"[{text}]({'../' * (depth - 1)}{PAGES[path]}{anchor or ''})"
    assert (ROOT / path).exists(), f"{path} is linked to, and not there"
    return text if "`" in text else f"`{path}`"
