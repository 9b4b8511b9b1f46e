"""Whether a set of wheels works on a profile's machine, told from the wheels' metadata alone; nothing is installed.

It does what `pip check` does after an install, for a Python and a platform that need not be the ones that run.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PathDistribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from ..errors import ArcKernelError, first_line
from . import target
from .profiles import HERE, Profile, installed as preinstalled

PACKAGE_REQUIREMENTS = HERE.parent.parent / "requirements.txt"


@dataclass(frozen=True)
class Wheel:
    """What a wheel's file name and metadata say; `python` is its Requires-Python."""

    path: Path
    name: str
    version: str
    tags: frozenset
    requires: tuple[Requirement, ...]
    python: SpecifierSet


def read_wheel(path: Path) -> Wheel:
    """A wheel's metadata. Raises ArcKernelError where the file is no wheel."""
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            folders = {entry.split("/")[0] for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")}
            metadata = PathDistribution(zipfile.Path(archive, f"{folders.pop()}/"))
            requires = tuple(Requirement(line) for line in metadata.requires or ())
            python = SpecifierSet(metadata.metadata["Requires-Python"] or "")
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, RuntimeError) as error:  # as zipfile raises them
        raise ArcKernelError(f"{path}: not a wheel that can be read ({error}): remove it and build again") from None
    return Wheel(path, name, str(version), tags, requires, python)


def wanted(profile: Profile) -> list[Requirement]:
    """What must be importable on the profile's machine: the package's requirements and the profile's, without `skip`.

    Raises ArcKernelError where the requirements file is missing or holds something else.
    """
    file = HERE.parent.parent / profile.pinned if profile.pinned else PACKAGE_REQUIREMENTS
    try:
        lines = [line.split(" #")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [Requirement(line) for line in (*lines, *profile.requirements) if line and not line.startswith("#")]
    except FileNotFoundError:
        raise ArcKernelError(f"{file}: no such file: wheels are built in a clone of the repository") from None
    except InvalidRequirement as error:
        raise ArcKernelError(f"profile {profile.name}: {first_line(error)}: mend {file} or profiles.toml") from None
    environment = target.environment(profile)
    return [r for r in found if canonicalize_name(r.name) not in profile.skip and (not r.marker or r.marker.evaluate(environment))]


def faults(wheels: Iterable[Path], profile: Profile, installed: Mapping[str, str] | None = None) -> list[str]:
    """What would not work once `wheels` are installed with --no-deps on the profile's machine; a line each, none when all is well.

    `installed` is the version by name of what is there already: by default what the profile's image lists.
    """
    found, read = [], {}
    takes, environment = target.tags(profile), target.environment(profile)
    for path in wheels:
        try:
            wheel = read_wheel(path)
        except ArcKernelError as error:
            found.append(str(error))
            continue
        if wheel.name in read:
            found.append(f"{path.name}: {read[wheel.name].path.name} is there too: keep one of them")
        if not takes & wheel.tags:
            found.append(f"{path.name}: its tags do not fit {target.describe(profile)}")
        if not wheel.python.contains(environment["python_full_version"], prereleases=True):
            found.append(f"{path.name}: is for Python {wheel.python}, not {environment['python_full_version']}")
        read[wheel.name] = wheel
    installed = preinstalled(profile) if installed is None else installed
    there = {canonicalize_name(name): version for name, version in installed.items()}
    there |= {wheel.name: wheel.version for wheel in read.values()}
    for who, requirement in _requirements(read, profile, environment):
        name = canonicalize_name(requirement.name)
        if name in profile.skip or name in there and requirement.specifier.contains(there[name], prereleases=True):
            continue
        found.append(f"{who} wants {requirement.name}{requirement.specifier}: there is {there.get(name, 'none')}")
    return sorted(set(found))


def _requirements(wheels: Mapping[str, Wheel], profile: Profile, environment: Mapping[str, str]):
    """Who wants what in this environment: the profile, then each wheel with the extras that anybody asks of it."""
    waiting = [(f"profile {profile.name}", requirement) for requirement in wanted(profile)]
    waiting += [(f"{w.name} {w.version}", requirement) for w in wheels.values() for requirement in _active(w, "", environment)]
    asked = set()
    while waiting:
        who, requirement = waiting.pop()
        yield who, requirement
        wheel = wheels.get(canonicalize_name(requirement.name))
        for extra in requirement.extras if wheel else ():
            if (wheel.name, extra) not in asked:
                asked.add((wheel.name, extra))
                base = _active(wheel, "", environment)
                waiting += [(f"{wheel.name} {wheel.version}", r) for r in _active(wheel, extra, environment) if r not in base]


def _active(wheel: Wheel, extra: str, environment: Mapping[str, str]) -> list[Requirement]:
    return [r for r in wheel.requires if not r.marker or r.marker.evaluate({**environment, "extra": extra})]
