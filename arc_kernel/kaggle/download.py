"""Wheels of a lock, from the package index into a cache: whole files only, each with the sha256 that the lock names.

Knows nothing of why a wheel is wanted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from ..errors import ArcKernelError
from . import target
from .lock import Pin
from .profiles import Profile


def fetch(pins: Iterable[Pin], profile: Profile, cache: Path, say: Callable[[str], None]) -> list[Path]:
    """A wheel in `cache` for each pin, in order; only what is not there with the right sha256 is downloaded.

    A run that is killed loses the file it was at; the next one goes on from there. `say` gets a line per download. Raises
    ArcKernelError for a pin without hashes and for one that has no wheel for the profile's Python.
    """
    pins, found, start, fresh = list(pins), [], time.perf_counter(), 0
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        there = _by_name(cache)
        for number, pin in enumerate(pins, 1):
            wheel = next((f for f in there.get(pin.name, ()) if _sha256(f) in pin.hashes), None)
            if wheel is None:
                before = time.perf_counter()
                wheel = _download(pin, profile, cache)
                size, seconds = wheel.stat().st_size / 1e6, time.perf_counter() - before
                fresh += wheel.stat().st_size
                say(f"[{number}/{len(pins)}] {wheel.name}: {size:.1f} MB ({seconds:.1f} s)")
            found.append(wheel)
    total = sum(f.stat().st_size for f in found) / 1e6
    say(f"{len(found)} wheels, {total:.1f} MB, of which {fresh / 1e6:.1f} MB downloaded ({time.perf_counter() - start:.1f} s)")
    return found


def hashed(pin: Pin, wheel: Path) -> Pin:
    """The pin with the sha256 of this one file."""
    return Pin(pin.name, pin.version, (_sha256(wheel),))


def _by_name(cache: Path) -> dict[str, list[Path]]:
    """The cache's files by normalized distribution name."""
    found: dict[str, list[Path]] = {}
    for file in sorted(cache.glob("*.whl")):
        try:
            found.setdefault(parse_wheel_filename(file.name)[0], []).append(file)
        except InvalidWheelFilename:
            continue
    return found


def _download(pin: Pin, profile: Profile, cache: Path) -> Path:
    """One wheel by pip, which checks its sha256, renamed into the cache when it is whole; a process per wheel, so that a kill loses one."""
    if not pin.hashes:
        raise ArcKernelError(f"{pin}: has no sha256: make the lock again")
    part = cache / ".part"  # one at a time, under the cache's lock: what a killed run left goes
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "wanted.txt").write_text(f"{pin}\n")
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir",
                           "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", "wanted.txt", "-d", "wheels",
                           *target.pip_arguments(profile)], cwd=part, capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip()[-200:])
        raise ArcKernelError(f"{pin.name}=={pin.version}: no wheel for {target.describe(profile)} ({said}): "
                             "check the network, else make the lock again")
    wheel = next((part / "wheels").iterdir())
    os.replace(wheel, cache / wheel.name)
    shutil.rmtree(part)
    return cache / wheel.name


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
