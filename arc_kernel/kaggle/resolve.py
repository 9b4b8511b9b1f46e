"""Which versions a profile's machine gets, each with its sha256: uv resolves for a machine that is not this one, pip for this one.

Asks the package index, downloads nothing to keep, knows nothing of bundles.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.utils import canonicalize_name

from ..errors import ArcKernelError
from .check import wanted
from .lock import Pin, parse
from .profiles import Profile, installed


def resolve(profile: Profile) -> list[Pin]:
    """What must be installed on the profile's machine and is not there in that very version, complete, with sha256 hashes.

    Raises ArcKernelError where uv is missing, and where no set of versions or wheels satisfies the requirements.
    """
    return _for_this_machine(profile) if profile.pinned else _for_another_machine(profile)


def _for_another_machine(profile: Profile) -> list[Pin]:
    """uv's resolution; the image's versions are preferences, as those of an existing output file are to uv."""
    if not importlib.util.find_spec("uv"):
        raise ArcKernelError(f"profile {profile.name}: resolving needs uv, which is not installed: pip install 'uv==0.13.*'")
    there = installed(profile)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "wanted.txt").write_text("\n".join(map(str, wanted(profile))))
        (home / "skip.txt").write_text("\n".join(profile.skip))
        (home / "lock.txt").write_text("\n".join(f"{name}=={version}" for name, version in there.items()))
        _run(profile, [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate",
                       "--generate-hashes", "--only-binary", ":all:", "--python", sys.executable,  # else uv looks for one, 15 s
                       "--python-version", profile.python, "--python-platform", profile.platform,
                       *(("--exclude-newer", profile.as_of) if profile.as_of else ()), "--excludes", "skip.txt",
                       "wanted.txt", "-o", "lock.txt"], home)
        pins = parse((home / "lock.txt").read_text(), f"profile {profile.name}")
    return [pin for pin in pins if pin.name not in there or not Pin(pin.name, there[pin.name]).takes(pin.version)]


def _for_this_machine(profile: Profile) -> list[Pin]:
    """The versions of the profile's complete lock, and its own requirements with whatever else those need here."""
    locked = [r for r in wanted(profile) if str(r) not in profile.requirements]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "locked.txt").write_text("\n".join(f"{r.name}{r.specifier}" for r in locked))
        report = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-",
                  "--only-binary", ":all:"]
        texts = [_run(profile, [*report, *profile.requirements, "-c", "locked.txt"], home),
                 _run(profile, [*report, "--no-deps", "-r", "locked.txt"], home)]
    pins: dict[str, Pin] = {}
    for item in (item for text in texts for item in json.loads(text)["install"]):
        name = canonicalize_name(item["metadata"]["name"])
        pins[name] = Pin(name, item["metadata"]["version"], (item["download_info"]["archive_info"]["hashes"]["sha256"],))
    return list(pins.values())


def _run(profile: Profile, command: list[str], folder: Path) -> str:
    """Standard output of a resolver; ArcKernelError with what it said where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if "warning" not in line.lower())
        raise ArcKernelError(f"profile {profile.name}: its requirements cannot be resolved ({said[:600]}): "
                             "check the network, else change them in profiles.toml")
    return done.stdout
