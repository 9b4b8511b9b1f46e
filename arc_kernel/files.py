"""Files and folders written so that whoever looks sees the old ones or the new ones, whole, and may read them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from .errors import ArcKernelError

MAKING = ".making-"  # in the name of a folder that is being made
STALE = 3600  # seconds in which a folder being made has gained no file: nobody is at it any more


def short_path(path: str) -> str:
    """The last two parts of a path: `long/adapter` says more than `adapter`."""
    return "/".join(part for part in Path(path).parts[-2:] if part != "/")


def cache_folder() -> Path:
    """Where converted models are kept: $ARC_KERNEL_CACHE, else ~/.cache/arc_kernel."""
    return Path(os.environ.get("ARC_KERNEL_CACHE") or Path.home() / ".cache" / "arc_kernel")


def make_writable(folder: Path) -> None:
    """Make a folder that is not there yet; raises OSError where it cannot be made, or nothing can be written into it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def check_cache() -> Path:
    """`cache_folder`, made; raises ArcKernelError where it cannot be, or cannot be written."""
    try:
        folder = cache_folder()
    except RuntimeError:  # pathlib's, of a user who has none
        raise ArcKernelError("there is no home folder: set ARC_KERNEL_CACHE to a folder that can be written") from None
    try:
        make_writable(folder)
    except OSError as error:
        raise ArcKernelError(f"{folder}: cannot be written ({error.strerror}): set ARC_KERNEL_CACHE to another folder") from None
    return folder


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w"):
    """Open a temporary file beside `path` for writing and rename it to `path` when the block ends without error. What UTF-8 has no bytes
    for, as half a character in a task's id, is written as its number; with `mode` "wb" bytes are written, and are on the disk before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with os.fdopen(handle, mode, **text) as file:
            yield file
            if "b" in mode:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes 0600; others must be able to read a submission
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def parse_json(text: str | bytes):
    """The value of a JSON text, with or without a mark of its coding before it; raises ValueError for whatever is none, such as lists in
    lists in lists deeper than Python goes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects within each other without end") from None


def read_json(path: Path):
    """The value of a JSON file; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(path.read_bytes())


def write_json(path: Path, value) -> None:
    """Write a value as JSON to `path`, through `replacing`."""
    with replacing(path) as file:
        json.dump(value, file, indent=1)


def take_folder(lock, folder: Path) -> None:
    """Hold a run's output folder by its `lock`, a filelock.FileLock; raises ArcKernelError where another run does."""
    from filelock import Timeout

    try:
        lock.acquire()
    except Timeout:
        raise ArcKernelError(f"{folder}: another run is at work on this folder: wait for it, or give another --out") from None


def check_writable(path: Path) -> None:
    """Make the folder of a file that is written later; raises ArcKernelError where it cannot be, or `path` is a folder."""
    try:
        make_writable(path.parent)
    except OSError as error:
        raise ArcKernelError(f"{path}: cannot be written ({error.strerror}): give another place") from None
    if path.is_dir():
        raise ArcKernelError(f"{path}: is a folder: give the name of a file")


def readable(folder: Path) -> None:
    """Let everybody read a folder made by `tempfile` and the files in it; safetensors makes them 0600."""
    os.chmod(folder, 0o755)
    for file in filter(Path.is_file, folder.rglob("*")):
        file.chmod(0o644)


@contextlib.contextmanager
def whole_folder(folder: Path, replace: bool = False):
    """A fresh folder beside `folder` that takes its place when the block ends without error; the first of two racers wins, or with
    `replace` the last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _forget_killed(folder)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}{MAKING}"))
    try:
        yield fresh
        readable(fresh)
        if replace:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            fresh.rename(folder)
        except OSError:  # another process was first, or nothing can take this folder's place, as of a mount point
            if replace or not folder.is_dir() or all(p.name == fresh.name for p in folder.iterdir()):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _forget_killed(folder: Path) -> None:
    """Remove what processes that were killed left of a folder they were making."""
    for left in [p for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}{MAKING}")]:
        with contextlib.suppress(OSError):  # another process removes it
            if left.is_dir() and time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
