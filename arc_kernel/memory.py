"""The memory of this process: kept from step to step, given back from stage to stage; and how much there is for others."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import Iterator

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_memory() -> None:
    """Have what is freed kept for what is asked for next; `free_memory` gives it back.

    glibc asks the system for every array above 32 MB and gives it back at once, so that logits of 256 labels, activations of long
    examples and of a prefill were zeroed page by page in every step. Where the C library is another one, nothing changes. vLLM's
    manual asks for tcmalloc instead, which would have to be there before Python starts.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def importing(library: str) -> Iterator[None]:
    """Import a large library in this block, with all it brings. Looking for garbage among what such libraries define took a sixth of the
    seconds of starting torch, transformers and vLLM (benchmarks/LOG.md): so there is no looking meanwhile, and none among them later, until
    `gc.unfreeze`, as where an engine is closed. Their bytecode is kept for the next start where an installer left none (uv), also in
    a process that writes none of ours."""
    if library in sys.modules:
        yield
        return
    was, wrote_none = gc.isenabled(), sys.dont_write_bytecode
    gc.disable()
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    try:
        yield
    finally:
        sys.dont_write_bytecode = wrote_none
        gc.freeze()
        if was:
            gc.enable()


def exhausted(error: BaseException) -> bool:
    """Whether this is torch's word for a GPU that is full; where a CUDA graph finds no memory, that is no OutOfMemoryError."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and "out of memory" in str(error)


def mend_generators() -> None:
    """Take the GPUs' random generators out of a capture that broke off: they would refuse everything until the process ends."""
    import torch

    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


def free_memory() -> None:
    """Give back what a dropped model held: to the system, and on a GPU also to other libraries."""
    gc.collect()
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    torch = sys.modules.get("torch")  # what was not loaded holds nothing
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def available_memory() -> int:
    """Bytes that new processes may take: what Linux has left, or a container, where that is less; 0 where neither is told."""
    told = [1024 * amount for amount in amounts("/proc/meminfo", "MemAvailable:")]
    for folder, limit, used, cached in (("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
                                        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
        with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
            left = int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text())
            told.append(left + sum(amounts(f"{folder}/memory.stat", cached)))
    return max(0, min(told, default=0))


def amounts(path: str, name: str) -> list[int]:
    """The amount on a line `name amount ...` of a file of the system; none where it is not there."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.split()[:1] == [name]]


def _libc():
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no program-wide handle
        return None
