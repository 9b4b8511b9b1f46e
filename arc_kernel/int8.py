"""Products with frozen weights in 8-bit integers, for training on a CPU.

CPUs with VNNI multiply 8-bit integers twice as fast as bfloat16, and many times as fast as float32; those without twice as fast as
float32, with weights of 7 bits. The weights under a LoRA do not change: they are rounded once, each output with a scale of its own, and
once more for the gradient to the input. What they are multiplied with is rounded token by token. Products with A and B, their gradients,
attention, norms and the head stay as they are. Method: SwitchBack (Wortsman et al. 2023, "Stable and low-precision training for
large-scale vision-language models": forward and the gradient to the input in 8 bits, the gradient to weights in 16), here without a
gradient to weights. Some columns of what is multiplied are far larger than others, and would take all the bits: they are divided by what
the weight's columns are multiplied with (Xiao et al. 2023, "SmoothQuant", with root mean squares for largest values, which leaves 0.3 to
0.8 of the rounding on SmolLM2-135M; benchmarks/LOG.md).

They are `cpu_kernels`' where those can be used, and operators of vLLM's CPU build (`cpu_operators`) elsewhere.
"""

from __future__ import annotations

import functools
import time

import torch
from torch.nn.functional import linear

from . import cpu_kernels, cpu_operators
from .device import native_bfloat16
from .errors import ArcKernelError, named_line

LARGEST = 127, 64  # of a rounded weight; the second where the CPU adds pairs of products in 16 bits: (127 + 128) * 64 * 2 is below 2**15
SIZES = 512, 576, 1536  # rows, inputs, outputs of the trial: a layer of SmolLM2-135M's
TURNS = 16  # of the trial; the fastest counts, the first is left out. So many because another process may have the core
FASTER = 1.2  # how many times the product in 8 bits must outdo the other
APART = 0.02  # largest distance to the exact product, as a share of it; of normal numbers rounding makes 0.011, with small weights 0.017


def rest(dtype: str, device: str) -> str:
    """The dtype of all but the frozen weights, which are in `dtype`: the same, but for int8 bfloat16 where native, else float32."""
    return dtype if dtype != "int8" else "bfloat16" if native_bfloat16(device) else "float32"


@functools.cache
def refused(device: str) -> str:
    """Why products with frozen weights are not made in 8 bits on this device; empty where they are right, and faster than in `rest`.
    Tried once in a process."""
    if device != "cpu":
        return "8-bit products are made on a CPU only"
    try:
        x, weight = _some(*SIZES)
        exact = linear(x.double(), weight.double())
        apart = ((Product(weight)(x) - exact).norm() / exact.norm()).item()
        seconds, others = product_seconds(*SIZES, TURNS)
    except ArcKernelError as error:
        return str(error)
    except Exception as error:  # a release with other operators
        return f"there are no 8-bit products: {named_line(error)}"
    if not apart < APART:
        return f"8-bit products are {apart:.1%} off on this CPU"
    return "" if others > FASTER * seconds else f"8-bit products are not faster than {rest('int8', device)}'s on this CPU"


def product_seconds(rows: int, inputs: int, outputs: int, turns: int) -> tuple[float, float]:
    """Seconds of [rows, inputs] x [outputs, inputs]' in 8 bits and in `rest`, by turns; the fastest of each, the first left out."""
    x, weight = _some(rows, inputs, outputs)
    ways, times = (Product(weight), lambda x: linear(x, weight)), []
    for way in ways * turns:
        begun = time.perf_counter()
        way(x)
        times.append(time.perf_counter() - begun)
    return min(times[2::2]), min(times[3::2])


def _some(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers to multiply with and a weight of them, in `rest` on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=generator).to(getattr(torch, rest("int8", "cpu"))) for n in (rows, outputs))
    return x, weight


@functools.cache
def _largest() -> int:
    """The largest rounded weight: CPUs without VNNI add pairs of products in 16 bits, which saturates beyond the smaller one."""
    ones = torch.ones(2, 64)
    return LARGEST[0] if torch.allclose(Product(ones, largest=LARGEST[0])(ones), torch.tensor(64.0)) else LARGEST[1]


class Product:
    """x [T, in] to x @ weight.T [T, out] for a frozen `weight` [out, in], both rounded to 8 bits, in x's dtype, which is the weight's.

    `columns` float32 [in]: the root mean squares of x to expect, where they are known. `largest`: of the weight's integers, by default
    what this CPU multiplies exactly. `frozen`: it as one of `cpu_kernels`, where those are used. Raises ArcKernelError where there are no
    operators.
    """

    def __init__(self, weight: torch.Tensor, columns: torch.Tensor | None = None, largest: int = 0):
        ours = cpu_kernels.multiplies(weight)
        if reason := not ours and cpu_operators.load():
            raise ArcKernelError(f"there are no 8-bit products: {reason}")
        wide, self._factor = weight.detach().float(), None
        if columns is not None:
            even = (columns / wide.square().mean(0).sqrt()).sqrt()
            even[~(even.isfinite() & (even > 0))] = 1.0
            self._factor = (1 / even).to(weight.dtype)
            wide = wide / self._factor.float()
        scale = wide.abs().amax(1, keepdim=True) / (largest or (LARGEST[0] if ours else _largest()))
        scale.clamp_min_(torch.finfo(torch.float32).tiny)
        self._outputs, self._scale = len(weight), scale.view(1, -1).contiguous()
        rounded = (wide / scale).round_().to(torch.int8).contiguous()
        self.frozen = cpu_kernels.Frozen(rounded, self._scale, self._factor) if ours else None
        if not ours:  # the operator has its own copy of the weight, but not of the scales
            made = torch.ops._C.create_onednn_scaled_mm_handler(rounded.T, self._scale, weight.dtype, True, False, cpu_operators.SHAPES)
            self._handler = cpu_operators.held(self, made)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.frozen:
            return self.frozen(x)
        out, x = x.new_empty(len(x), self._outputs), x.contiguous()
        x = x if self._factor is None else x * self._factor
        if len(x):
            rounded, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), 1)
            torch.ops._C.dynamic_scaled_int8_quant(rounded, x, scales, None)
            torch.ops._C.onednn_scaled_mm(out, rounded, scales, None, None, None, self._handler)
        return out
