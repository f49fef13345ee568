"""The versions that this package is tested with, from which pyproject.toml, constraints and docs must not differ."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from packaging.version import InvalidVersion, Version

from .version import __version__


class Range(NamedTuple):
    """The lowest and the newest version of a package with which all tests pass."""

    lowest: str
    newest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.newest else f"{self.lowest} to {self.newest}"


TESTED = {
    "torch": Range("2.6.0", "2.13.0"),
    "transformers": Range("5.8.0", "5.24.0"),
    "peft": Range("0.21.0", "0.21.2"),
    "accelerate": Range("1.4.0", "1.15.0"),
}


Place = Literal["older", "within", "newer"]


def find_version(package: str) -> str | None:
    """
    Looks up the installed version of a package without importing it.

    Returns:
        `str | None`: The version, or `None` if it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_release(package: str) -> Version | None:
    """
    Looks up the installed release of a package, for comparisons.

    Returns:
        `Version | None`: The version without its local part: 2.13.0 for 2.13.0+cpu. `None` if the package is not
        installed, or its version cannot be parsed.
    """
    try:
        return Version(Version(find_version(package) or "").public)
    except InvalidVersion:
        return None


def place(package: str) -> Place | None:
    """
    Compares the installed version of a package with the tested ones.

    Returns:
        `str | None`: "older", "within" or "newer", which includes development versions. `None` if there is nothing to
        compare.
    """
    release = find_release(package)
    if release is None:
        return None
    lowest, newest = map(Version, TESTED[package])
    return "older" if release < lowest else "newer" if release > newest else "within"


def newer_than_tested() -> str | None:
    """
    Says which installed packages are newer than the newest tested versions.

    Returns:
        `str | None`: One line that names both versions and the remedy, or `None` if no package is newer.
    """
    newer = [package for package in TESTED if place(package) == "newer"]
    if not newer:
        return None
    installed = _join(f"{package} {find_version(package)}" for package in newer)
    newest = _join(TESTED[package].newest for package in newer)
    to_install = " ".join(f'"{package}<={TESTED[package].newest}"' for package in newer)
    are_newer, versions = ("is newer", "version") if len(newer) == 1 else ("are newer", "versions")
    return (
        f"{installed} {are_newer} than the newest {versions} that peft-m2pt {__version__} was tested with ({newest}); "
        f"if that is why, try a newer peft-m2pt, or: pip install {to_install}"
    )


def _join(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last
