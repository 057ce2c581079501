"""Compares versions.

A pre-release counts as its release. `2.7.0a0+ecf3bae40a.nv25.02` in a vendor's container, or `2.9.0.dev20260701`, is
built from sources that have most of that release's features; PEP 440 orders both before it, and every requirement such
as `torch>=2.7` would refuse them. Two requirements are read as PEP 440 says: one that names a pre-release itself
(`flash-attn-4>=4.0.0b5`), and `==`, which is about one build.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version


def read(version: str) -> Version | None:
    """The version by PEP 440, without its pre-release part; None if invalid."""
    from packaging.version import InvalidVersion, Version

    try:
        return _as_release(Version(version))
    except InvalidVersion:
        return None


def meets(version: str, specifier: str) -> bool:
    """Whether `version` meets e.g. `>=2.6.3,!=2.7.0`; an invalid version meets nothing."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    release = _as_release(parsed)
    for requirement in SpecifierSet(specifier):
        as_given = requirement.operator in ("==", "===") or _names_a_pre_release(requirement.version)
        if not requirement.contains(parsed if as_given else release, prereleases=True):
            return False
    return True


def _as_release(version: Version) -> Version:
    from packaging.version import Version

    if not version.is_prerelease:
        return version
    post = f".post{version.post}" if version.post is not None else ""
    local = f"+{version.local}" if version.local else ""
    return Version(f"{version.base_version}{post}{local}")


def _names_a_pre_release(text: str) -> bool:
    from packaging.version import Version

    return not text.endswith(".*") and Version(text).is_prerelease
