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

BATCH = 8  # wheels a pip process; pip keeps nothing of a process that is killed, and takes a second to start


def fetch(pins: Iterable[Pin], profile: Profile, cache: Path, say: Callable[[str], None]) -> list[Path]:
    """A wheel in `cache` for each pin, in order; only what is not there with the right sha256 is downloaded.

    A run that is killed loses the batch it was at; the next one goes on from there. `say` gets a line per download, and one
    with the sum. Raises ArcKernelError for a pin without hashes and for one that has no wheel for the profile's Python.
    """
    pins, start = list(pins), time.perf_counter()
    if bare := [pin for pin in pins if not pin.hashes]:
        raise ArcKernelError(f"{bare[0]}: has no sha256: make the lock again")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        found = _held(pins, cache)
        missing = [pin for pin in pins if pin not in found]
        if missing:
            say(f"{len(found)} of {len(pins)} wheels are there, {len(missing)} to download")
            for i in range(0, len(missing), BATCH):
                _download(missing[i:i + BATCH], profile, cache, say)
            found |= _held(missing, cache)
    total, fresh = (sum(found[pin].stat().st_size for pin in some) / 1e6 for some in (pins, missing))
    say(f"{len(pins)} wheels, {total:.1f} MB, of which {fresh:.1f} MB downloaded ({time.perf_counter() - start:.1f} s)")
    return [found[pin] for pin in pins]


def hashed(pin: Pin, wheel: Path) -> Pin:
    """The pin with the sha256 of this one file."""
    return Pin(pin.name, pin.version, (_sha256(wheel),))


def _held(pins: Iterable[Pin], cache: Path) -> dict[Pin, Path]:
    """The pins that are in the cache with a sha256 of theirs, and the files; another file of that name is no match."""
    files: dict[str, list[Path]] = {}
    for file in sorted(cache.glob("*.whl")):
        try:
            files.setdefault(parse_wheel_filename(file.name)[0], []).append(file)
        except InvalidWheelFilename:
            continue
    return {pin: file for pin in pins for file in files.get(pin.name, ()) if _sha256(file) in pin.hashes}


def _download(pins: list[Pin], profile: Profile, cache: Path, say: Callable[[str], None]) -> None:
    """pip fetches the pins' wheels and checks each sha256; then all are renamed into the cache."""
    part = cache / ".part"  # one at a time, under the cache's lock: what a killed run left goes
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    (part / "wanted.txt").write_text("".join(f"{pin}\n" for pin in pins))
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--no-deps",
               "--only-binary", ":all:", "--require-hashes", "-r", "wanted.txt", "-d", "wheels", "--no-cache-dir",
               *target.pip_arguments(profile)]
    with (open(part / "errors.txt", "w+") as errors,
          subprocess.Popen(command, cwd=part, stdout=subprocess.PIPE, stderr=errors, text=True) as pip):
        for line in pip.stdout:
            if line.strip().startswith("Downloading"):
                say(line.strip())
        if pip.wait():
            errors.seek(0)
            said = " ".join(line.strip() for line in errors if "warning" not in line.lower())
            raise ArcKernelError(f"{cache}: no wheels for {target.describe(profile)} ({said[:600]}): "
                                 "check the network, else make the lock again")
    for wheel in (part / "wheels").iterdir():
        os.replace(wheel, cache / wheel.name)
    shutil.rmtree(part)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
