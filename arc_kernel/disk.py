"""The disk of a run: where its adapters lie, what they will need, what remains. Knows folders and sizes; nothing of tasks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .checkpoint import weight_shapes
from .errors import ArcKernelError, counted

LOW_GB = 2.0  # below which a run is not started, and one that goes on says so: completions and report are far smaller
FLOAT32 = 4  # bytes: adapters are saved as they are trained
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def adapters_folder(out: Path, scratch: str, identity: dict) -> Path:
    """`out`/adapters, or in `scratch` a folder named after the run's `identity`, so that runs do not meet there."""
    if not scratch:
        return out / "adapters"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(scratch) / f"arc-kernel-{digest[:12]}" / "adapters"


def adapter_bytes(model: Path, rank: int, targets: Iterable[str]) -> int:
    """Bytes of one LoRA of this rank on the modules of a model folder with these names: A [rank, in] and B [out, rank]."""
    names = tuple(f".{target}.weight" for target in targets)
    return sum(FLOAT32 * rank * sum(shape) for name, shape in weight_shapes(model).items() if name.endswith(names) and len(shape) == 2)


def make_anew(folder: Path, mark: str) -> None:
    """An empty folder in place of what is there; raises ArcKernelError where that is neither empty nor an earlier one with `mark` in it."""
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / mark).exists())):
        raise ArcKernelError(f"{folder}: in the way, and not made by this script (no {mark} in it): give another --out")
    make(folder, "--out")
    try:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == mark):  # the folder stays: it may be a link, or mounted
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise ArcKernelError(f"{error.filename}: cannot be removed ({error.strerror}): give another --out") from None


def make(folder: Path, name: str) -> None:
    """Make a folder that is not there yet; raises ArcKernelError that names the setting it came from where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArcKernelError(f"{folder}: cannot be written ({error.strerror}): give another {name}") from None


def fault(error: BaseException) -> bool:
    """Whether an exception is the disk's, as where it is full: safetensors' name the number in their text only."""
    number = error.errno if isinstance(error, OSError) else next(map(int, re.findall(r"\(os error (\d+)\)", str(error))), None)
    return number in FAULTS


def free_gb(folder: Path) -> float:
    """GB free where `folder` is, or will be."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free / 1e9


def forecast(count: int, size: int, folder: Path) -> str:
    """What `count` adapters of `size` bytes need in `folder` beside what is free there, with the mend where it is too much."""
    needed, free = count * size / 1e9, free_gb(folder)
    line = f"{counted(count, 'adapter')} of {size / 1e6:.0f} MB: {needed:.1f} GB, of {free:.1f} GB that are free in {folder}"
    fits = max(0, math.floor((free - LOW_GB) / (size / 1e9)))
    return line if needed + LOW_GB <= free else f"{line}: enough for {fits}: give another scratch, or a smaller lora_rank"
