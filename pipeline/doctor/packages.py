"""Python and the installed packages, beside the versions that Relay is made for."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pipeline.doctor.finding import Case, Finding, fail, ok, warn

DIST = "relay-rlhf"
MEASURED = (3, 11)


def python(case: Case) -> list[Finding]:
    found = f"{platform.python_version()} ({sys.executable})"
    wanted = SpecifierSet(metadata.metadata(DIST)["Requires-Python"] or "")
    if not wanted.contains(platform.python_version(), prereleases=True):
        return [fail("Python", f"{found}; Relay wants {wanted}", "make the environment with another Python")]
    if sys.version_info[:2] != MEASURED:
        return [warn("Python", f"{found}; Relay is tested on {'.'.join(map(str, MEASURED))}", "it may well work")]
    return [ok("Python", found)]


def versions(case: Case) -> list[Finding]:
    """Each package that Relay requires, by what is installed. What an extra requires is another command's matter."""
    wanted = [Requirement(text) for text in metadata.requires(DIST) or []]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = [finding for one in wanted if (finding := _version(one))]
    named = ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "trl", "peft") if _has(name))
    return bad or [ok("packages", f"all {len(wanted)} within their ranges ({named}, …)")]


def _version(one: Requirement) -> Finding | None:
    fix = f"pip install '{one}'"
    if not _has(one.name):
        return fail("packages", f"{one.name} is not installed; Relay wants {one.specifier or 'it'}", fix)
    found = metadata.version(one.name)
    if one.specifier.contains(found, prereleases=True):
        return None
    return fail("packages", f"{one.name} {found} is installed; Relay wants {one.specifier}", fix)


def _has(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
