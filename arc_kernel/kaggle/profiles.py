"""The machines a submission is built for, read from profiles.toml: what each has, what it lacks, how vLLM starts there.

Imports only the standard library: the notebook reads a profile before anything is installed.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArcKernelError

HERE = Path(__file__).resolve().parent
FILE = HERE / "profiles.toml"
ENGINE = {"attention_backend": str, "dtype": str, "gpu_memory_utilization": float, "max_num_seqs": int,
          "max_loras": int, "enforce_eager": bool}
VERSION = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class Profile:
    """One target machine; the fields' meaning stands at the top of profiles.toml."""

    name: str
    title: str
    python: str
    platform: str
    cuda: str
    image: str
    requirements: tuple[str, ...]
    pinned: str
    as_of: str
    skip: tuple[str, ...]
    remove: tuple[str, ...]
    accelerator: str
    gpus: int
    capability: str
    docker_image: str
    competition: str
    inputs: str
    mounts: dict
    engine: dict


def names(file: Path = FILE) -> list[str]:
    """The names of all profiles, in the file's order. Raises ArcKernelError for a damaged file."""
    return list(_tables(file))


def load(name: str, file: Path = FILE) -> Profile:
    """The profile of this name. Raises ArcKernelError for a name that is not there and for a wrong or missing value."""
    tables = _tables(file)
    if name not in tables:
        raise ArcKernelError(f"profile {name}: no such profile: choose one of {', '.join(tables)}")
    values = dict(tables[name])
    if (base := values.pop("like", None)) is not None:
        if base not in tables or "like" in tables[base]:
            raise ArcKernelError(f"{file}: profile {name}: like = {base!r}: name a profile that is complete itself")
        values = tables[base] | values
    types = {f.name: f.type for f in dataclasses.fields(Profile) if f.name != "name"}
    if wrong := sorted(set(types) ^ set(values)):
        what = "no such field" if wrong[0] in values else "missing"
        raise ArcKernelError(f"{file}: profile {name}: {wrong[0]}: {what}: the fields are {', '.join(types)}")
    for field, value in values.items():
        if types[field].startswith("tuple"):
            fits = isinstance(value, list) and all(isinstance(v, str) for v in value)
            values[field] = tuple(value) if fits else value
        else:
            fits = type(value).__name__ == types[field]
        if not fits:
            raise ArcKernelError(f"{file}: profile {name}: {field} = {value!r}: give {types[field]}")
    return _sound(Profile(name, **values), file)


def matching(capability: str) -> Profile:
    """The first profile for GPUs of this compute capability, or the nearest below it; for none the one without a GPU."""
    found = [load(name) for name in names()]
    if not capability:
        return next(p for p in found if not p.gpus)
    number = lambda text: tuple(map(int, text.split(".")))
    gpus = sorted((p for p in found if p.gpus), key=lambda p: number(p.capability), reverse=True)
    best = next((p for p in gpus if number(p.capability) <= number(capability)), gpus[-1])
    return next(p for p in found if p.capability == best.capability)


def installed(profile: Profile) -> dict[str, str]:
    """The version by normalized name of what the profile's image has preinstalled, without what is to be removed."""
    if not profile.image:
        return {}
    lines = (HERE / "images" / profile.image).read_text(encoding="utf-8").splitlines()
    listed = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, version in listed.items() if name not in profile.remove}


def _tables(file: Path) -> dict[str, dict]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArcKernelError(f"{file}: {error}: mend the file") from None


def _sound(profile: Profile, file: Path) -> Profile:
    """The profile, where its values go together."""
    for field in ("python", "cuda", "capability"):
        if (value := getattr(profile, field)) and not VERSION.fullmatch(value):
            raise ArcKernelError(f"{file}: profile {profile.name}: {field} = {value!r}: give major.minor, or nothing")
    if profile.platform and not re.fullmatch(r"\w+-manylinux_2_\d+", profile.platform):
        raise ArcKernelError(f"{file}: profile {profile.name}: platform = {profile.platform!r}: give machine-manylinux_2_<minor>")
    if bool(profile.python) != bool(profile.platform):
        raise ArcKernelError(f"{file}: profile {profile.name}: python and platform: give both, or neither for this machine")
    if (profile.gpus > 0) != bool(profile.accelerator) or bool(profile.accelerator) != bool(profile.capability):
        raise ArcKernelError(f"{file}: profile {profile.name}: gpus, accelerator and capability: give all, or none without a GPU")
    if {key: type(value) for key, value in profile.engine.items()} != ENGINE:
        raise ArcKernelError(f"{file}: profile {profile.name}: engine: give {', '.join(f'{k} ({t.__name__})' for k, t in ENGINE.items())}")
    if profile.image and not (HERE / "images" / profile.image).is_file():
        raise ArcKernelError(f"{file}: profile {profile.name}: image = {profile.image!r}: no such file in {HERE / 'images'}: add it")
    return profile
