"""The wheelhouse: what a profile's machine lacks becomes a bundle of wheels with a lock, checked before it is uploaded.

`build` makes it from the committed lock in locks/, `faults` says what would not work. Wheels only: Kaggle unpacks archives, so a
source distribution would not arrive as a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import ArcKernelError
from ..files import cache_folder
from . import datasets, target
from .check import faults, wanted
from .lock import parse, render
from .profiles import HERE, Profile
from .templates import USERNAME, slug

__all__ = ["build", "faults", "lock_file", "name", "renewed"]


def build(out: Path, profile: Profile, username: str = USERNAME, say: Callable[[str], None] = print,
          upgrade: bool = False) -> Path:
    """Write wheels/*.whl and lock.txt as `out`/arc-kernel-wheels-<profile>; returns that folder.

    With a lock and its wheels at hand no network is needed, and a second build changes no byte. `upgrade` resolves again
    and rewrites the lock. Raises ArcKernelError where something cannot be resolved, downloaded or written, and where the
    wheels would not work on the profile's machine.
    """
    from . import download, resolve

    lock, cache = lock_file(profile), cache_folder() / "wheels"
    renew = upgrade or not lock.is_file()
    if renew:
        say(f"profile {profile.name}: resolving for {target.describe(profile)}")
    pins = resolve.resolve(profile) if renew else parse(lock.read_text(encoding="utf-8"), str(lock))
    wheels = download.fetch(pins, profile, cache, say)
    if wrong := faults(wheels, profile):
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise ArcKernelError(f"{lock}: would not work: {wrong[0]}{more}: {renewed(profile)}")
    if renew:
        _write(lock, render([download.hashed(pin, wheel) for pin, wheel in zip(pins, wheels)], _header(profile)))
    extra = {"profile": profile.name, "python": profile.python, "platform": profile.platform, "cuda": profile.cuda,
             "image": profile.image, "remove": list(profile.remove)}
    sources = {"lock.txt": lock, **{f"wheels/{wheel.name}": wheel for wheel in wheels}}
    return datasets.build(Path(out) / name(profile), "wheels", extra, sources, username, say, copy=_link)


def name(profile: Profile) -> str:
    """The name of the profile's wheels dataset."""
    return "arc-kernel-wheels-" + slug(profile.name)


def renewed(profile: Profile) -> str:
    """How the profile's lock is made again."""
    return f"make it again with upgrade (build_kernel.py wheels --upgrade --profile {profile.name})"


def lock_file(profile: Profile) -> Path:
    """Where the profile's lock is: in locks/, or in the cache where it is one of this machine and Python."""
    if profile.python:
        return HERE / "locks" / f"{profile.name}.txt"
    asked = "\n".join([*sorted(map(str, wanted(profile))), *sorted(map(str, target.tags(profile)))])
    return cache_folder() / "locks" / f"{profile.name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.txt"


def _header(profile: Profile) -> list[str]:
    on_top = f"on top of images/{profile.image}" if profile.image else "on top of nothing"
    until = f", releases until {profile.as_of}" if profile.as_of else ""
    return [f"Profile {profile.name}: {target.describe(profile)}, {on_top}{until}.",
            "Made by arc_kernel.kaggle.wheels; pip install --no-index --no-deps --find-links wheels -r lock.txt"]


def _write(path: Path, text: str) -> None:
    """Write a lock under another name and rename it into place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise ArcKernelError(f"{path}: cannot be written ({error.strerror}): build in a clone of your own") from None


def _link(source: Path, destination: Path) -> None:
    """A hard link, so that gigabytes are not there twice; a copy where the file system has none."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
