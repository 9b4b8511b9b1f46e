"""Locks: pip's requirements format, one name==version with its sha256 a line.

Knows nothing of profiles and the network. Beyond the standard library it needs `packaging`, which Kaggle's image has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ..errors import ArcKernelError

HASH = "--hash=sha256:"


@dataclass(frozen=True)
class Pin:
    """One distribution of a lock: normalized name, version, and the sha256 (hexadecimal) of the files that may be taken."""

    name: str
    version: str
    hashes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([f"{self.name}=={self.version}", *(HASH + value for value in self.hashes)])

    def takes(self, version: str) -> bool:
        """Whether this version is the pinned one; a pin without a local version takes any local version (PEP 440)."""
        try:
            return SpecifierSet(f"=={self.version}").contains(Version(version))
        except InvalidVersion:
            return False


def parse(text: str, where: str) -> list[Pin]:
    """The pins of a lock.

    Raises ArcKernelError, with `where` and the line, for anything but name==version with sha256 hashes (a marker, too: a lock is
    one machine's), and for a name that is pinned twice.
    """
    pins: dict[str, Pin] = {}
    for line in text.replace("\\\n", " ").splitlines():
        content = line.split(" #")[0].strip()
        if not content or content.startswith("#"):
            continue
        wanted, *hashes = content.split(HASH)
        try:
            requirement = Requirement(wanted.strip())
        except InvalidRequirement:
            raise ArcKernelError(f"{where}: {content[:60]!r} is no requirement: write name==version {HASH}...") from None
        exact = list(requirement.specifier)
        if len(exact) != 1 or exact[0].operator != "==" or exact[0].version.endswith(".*") or requirement.marker:
            raise ArcKernelError(f"{where}: {wanted.strip()!r} is no pin: write name==version")
        pin = Pin(canonicalize_name(requirement.name), exact[0].version, tuple(value.strip() for value in hashes))
        if pin.name in pins:
            raise ArcKernelError(f"{where}: {pin.name} is pinned twice: keep one line")
        pins[pin.name] = pin
    return list(pins.values())


def render(pins: Iterable[Pin], header: Iterable[str]) -> str:
    """A lock's text: header lines as comments, then the pins by name."""
    return "".join([*(f"# {line}\n" for line in header), *(f"{pin}\n" for pin in sorted(pins, key=lambda pin: pin.name))])


def differing(lock_text: str, installed: Mapping[str, str]) -> list[str]:
    """The lock's lines that are not installed in that very version; `installed` is version by name, however spelled."""
    there = {canonicalize_name(name): version for name, version in installed.items()}
    return [str(pin) for pin in parse(lock_text, "lock") if not pin.takes(there.get(pin.name, ""))]
