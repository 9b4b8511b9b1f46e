"""The device this process computes on: which, what it can do, how a process is made ready for it and whether it still is of use.

Without torch where it is only counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .memory import available_memory, keep_memory

WORKER = 7 << 30  # bytes of a CPU's worker beside its model: 8.1 GB were seen with one of 135M weights, on prompts of 5,000 to 7,000 tokens
WEIGHT = 8  # bytes of a worker for each of the model's weights: a copy in 32 bits, two in 16
TASKS, STEPS = 2, 64  # for each of a CPU's workers at least, or its start, some 5 s of a run, costs more than is gained


def gpu_count() -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    visible, tool = os.environ.get("CUDA_VISIBLE_DEVICES"), shutil.which("nvidia-smi")
    if visible is not None and (tool or Path("/proc/driver/nvidia").exists()):
        return len([v for v in visible.split(",") if v and v != "-1"])
    if not tool:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def cores() -> list[int]:
    """The CPU cores this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cpu_workers(tasks: int, steps: int, weights: int) -> int:
    """How many processes share the cores for so many tasks, trained for so many steps each, with a model of so many weights: one a core, or
    fewer with as many cores each where there is too little to do for them, or too little memory. Two with a core each took 0.86 to 0.92
    of the seconds of training of one with both, and about as many for answers (benchmarks/LOG.md)."""
    count = len(cores())
    most = min(count, tasks // TASKS, tasks * steps // STEPS, available_memory() // (WORKER + WEIGHT * weights))
    return max((n for n in range(1, most + 1) if count % n == 0), default=1)


def device_name() -> str:
    """`cuda` where a GPU is visible to this process, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_model(device: str) -> str:
    """The device in words, as far as arithmetic depends on it."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}"


def native_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a T4 (sm_75) only emulates it, far slower than float16."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def synchronize(device: str) -> None:
    """Wait for a GPU to have done what it was given; a CPU has."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def prepare_for(device: str) -> None:
    """Have this process compute on `device` as suits it: attention without T x T scores, float16 products that are added in float32,
    freed memory kept."""
    if not shares_keys(device):
        repeat_keys()
    if device == "cpu":
        keep_memory()
    else:
        wide_sums()


def wide_sums() -> None:
    """Have a GPU's float16 products, where cuBLAS takes them in parts, add the parts in float32. A part may pass 65,504 where the whole
    does not, and what the probe measured is the whole (torch's notes on CUDA: reduced precision reduction in FP16 GEMMs)."""
    import torch

    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def shares_keys(device: str) -> bool:
    """Has torch's attention a fast kernel on this device for queries that share a key (`enable_gqa`)?

    GPUs before sm_80 have no flash attention, and the memory-efficient kernel wants as many keys as queries: a T4 would hold
    all T x T scores (transformers issue 48633).
    """
    import torch

    return device != "cuda" or torch.cuda.get_device_capability() >= (8, 0)


def repeat_keys() -> None:
    """Have transformers' attention repeat keys and values for the queries that share them, see `shares_keys`."""
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def require_device(device: str) -> None:
    """Raise torch's error where one before has left the GPU of no use to this process, as an illegal access does: only a new one helps."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def require_own_gpu(device: str) -> None:
    """Raise RuntimeError where this process was given a GPU and computes on the CPU: that GPU is lost, and others go on on theirs."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device == "cpu" and given not in ("", "-1") and torch.version.cuda:
        raise RuntimeError(f"GPU {given} cannot be used any more")
