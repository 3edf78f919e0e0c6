"""Releases of the packages that are installed, without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def find_version(package: str) -> str | None:
    """Return the installed release of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def list_versions(packages: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return the installed ones of some packages, each with its release."""
    found = ((package, find_version(package)) for package in packages)
    return tuple((package, release) for package, release in found if release is not None)
