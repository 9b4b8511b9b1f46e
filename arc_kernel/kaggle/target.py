"""What a profile's Python would say of itself: its environment markers, the wheel tags it takes, pip's arguments for it.

Knows nothing of what is installed there.
"""

from __future__ import annotations

from packaging import tags as wheel_tags
from packaging.markers import default_environment

from .profiles import Profile

LEGACY = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}  # by glibc 2.x: PEP 600, legacy manylinux tags


def environment(profile: Profile) -> dict[str, str]:
    """The marker environment of the profile's Python; like uv's, the first patch release where only major.minor is known."""
    if not profile.python:
        return dict(default_environment())
    full = f"{profile.python}.0"
    return {"python_version": profile.python, "python_full_version": full, "implementation_version": full,
            "implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix",
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": _machine(profile),
            "platform_release": "", "platform_version": ""}


def tags(profile: Profile) -> frozenset[wheel_tags.Tag]:
    """Every wheel tag the profile's Python takes."""
    if not profile.python:
        return frozenset(wheel_tags.sys_tags())
    version, platforms = _version(profile), _platforms(profile)
    interpreter = f"cp{version[0]}{version[1]}"
    return frozenset([*wheel_tags.cpython_tags(version, [interpreter], platforms),
                      *wheel_tags.compatible_tags(version, interpreter, platforms)])


def pip_arguments(profile: Profile) -> list[str]:
    """pip's options that make it choose wheels for the profile's Python instead of the one it runs in."""
    if not profile.python:
        return []
    major, minor = _version(profile)
    named = [word for platform in _platforms(profile) for word in ("--platform", platform)]
    return ["--implementation", "cp", "--python-version", profile.python, "--abi", f"cp{major}{minor}", *named]


def describe(profile: Profile) -> str:
    """The target in words, for messages."""
    return f"Python {profile.python} on {profile.platform}" if profile.python else "this Python on this machine"


def _version(profile: Profile) -> tuple[int, int]:
    major, minor = profile.python.split(".")
    return int(major), int(minor)


def _machine(profile: Profile) -> str:
    return profile.platform.split("-")[0]


def _platforms(profile: Profile) -> list[str]:
    """Platform tags from the profile's glibc down to 2.5, the oldest that manylinux knows, then plain linux."""
    newest = int(profile.platform.rsplit("_", 1)[1])
    names = [name for minor in range(newest, 4, -1) for name in (f"manylinux_2_{minor}", LEGACY.get(minor)) if name]
    return [f"{name}_{_machine(profile)}" for name in (*names, "linux")]
