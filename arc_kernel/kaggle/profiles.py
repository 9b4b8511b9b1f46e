"""The machines a submission is built for, read from profiles.toml: what each has, what it lacks, how vLLM starts there.

Imports only the standard library: the notebook reads a profile before anything is installed.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArcKernelError

HERE = Path(__file__).resolve().parent
FILE = HERE / "profiles.toml"


@dataclass(frozen=True)
class Profile:
    """One target machine; the fields' meaning stands at the top of profiles.toml."""

    name: str
    title: str
    python: str  # of the image, major.minor
    platform: str  # uv's name of the target platform
    cuda: str  # CUDA line the image's driver and torch speak, major.minor; empty without a GPU
    image: str  # file in images/ with the packages the image has, name==version a line; empty: nothing is preinstalled
    requirements: tuple[str, ...]  # what must be importable on top of the image
    remove: tuple[str, ...]  # distributions of the image that must go
    accelerator: str  # Kaggle's machine_shape; empty without a GPU
    gpus: int
    capability: str  # CUDA compute capability of its GPUs, major.minor; empty without a GPU
    docker_image: str  # the image pinned in the kernel's metadata
    competition: str  # slug
    engine: dict  # vLLM's engine arguments


def names() -> list[str]:
    """The names of all profiles, in the file's order."""
    return list(tomllib.loads(FILE.read_text(encoding="utf-8")))


def load(name: str) -> Profile:
    """The profile of this name. Raises ArcKernelError for a name that is not there and for a damaged file."""
    try:
        table = tomllib.loads(FILE.read_text(encoding="utf-8"))
        if name not in table:
            raise ArcKernelError(f"profile {name}: no such profile: choose one of {', '.join(table)}")
        value = table[name]
        return Profile(name=name, **value | {"requirements": tuple(value["requirements"]), "remove": tuple(value["remove"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArcKernelError(f"{FILE}: profile {name}: {error}: mend the file") from None


def fields() -> list[str]:
    """The names of a profile's fields."""
    return [f.name for f in dataclasses.fields(Profile)]
