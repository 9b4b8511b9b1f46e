"""The operators of vLLM's CPU build (csrc/cpu/dnnl_kernels.cpp and layernorm.cpp, read in 0.32), for what torch's take longer.

Only vLLM's library is loaded, the one vLLM itself would load, not vLLM. torch is imported by what uses it: `run` knows the engine's
module and can do without.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import named_line

if TYPE_CHECKING:
    import torch

SHAPES = 32  # numbers of rows for which a product is kept ready; vLLM's own number


@functools.cache
def load() -> str:
    """Load the operators; in words why that cannot be done, empty where it could."""
    import torch

    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return "vLLM is not installed"
    # vLLM's own choice (vllm/platforms/cpu.py, import_kernels): a second library would register the same operators again
    name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    libraries = [Path(folder) / f"{name}.abi3.so" for folder in found.submodule_search_locations]
    there = [path for path in libraries if path.is_file()]
    if not there:
        return f"this vLLM has no {libraries[0].name}"
    try:
        torch.ops.load_library(str(there[0]))
    except OSError as error:  # built for a GPU, or for another torch
        return named_line(error)
    return "" if has("create_onednn_scaled_mm_handler") else "this vLLM is not built for CPUs"


def has(name: str) -> bool:
    """Is there an operator of this name, loaded by `load` or by vLLM?"""
    import torch

    return hasattr(torch.ops._C, name)


def held(owner: object, number: int) -> torch.Tensor:
    """What operators are given for a product's number, as which the library knows it; it is let go of with its owner."""
    import torch

    weakref.finalize(owner, torch.ops._C.release_dnnl_matmul_handler, number)
    return torch.tensor(number, dtype=torch.int64)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether there is a `Product` of this dtype on this CPU: of float16 there is none on most."""
    import torch

    try:
        Product(torch.ones(32, 32, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
    return True


class Product:
    """x [T, in] to x @ weight for a `weight` [in, out] that stays as it is, put in the order in which it is read: torch's product does
    that each time, which with few rows takes longer than to multiply. Both in the same dtype."""

    def __init__(self, weight: torch.Tensor):
        import torch

        self._outputs, self._multiply = weight.shape[1], torch.ops._C.onednn_mm
        self._handler = held(self, torch.ops._C.create_onednn_mm_handler(weight, SHAPES))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), self._outputs)
        self._multiply(out, x, None, self._handler)
        return out
