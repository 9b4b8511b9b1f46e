"""The gradient of causal attention on a CPU as batched matrix products, for dtypes whose products outrun torch's attention kernel.

torch's kernel works in small blocks of its own. In bfloat16 on CPUs that have instructions for it, its forward is quick, but its
backward takes five times as long, half of a training step at 2,048 tokens (benchmarks/LOG.md), while products of whole blocks of
rows go to the fast library. So in the backward the rows of all query heads that share a key head are one product, and what lies
above the diagonal is left out but for the diagonal's blocks. Probabilities are computed again, so that memory grows with the
tokens, not with their square (Dao et al. 2022, "FlashAttention"). Whether it is faster is measured where it would be used.
"""

from __future__ import annotations

import functools
import time
from typing import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS = 128  # query positions of a block: its scores of nine heads and 1,024 keys are 2.4 MB in 16 bits
TRIED, TURNS = 256, 3  # tokens and turns of the trial; the fastest turn counts
FASTER = 1.2  # how many times the products must outdo the kernel: not by a hair, or two processes would differ in rounding


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scaling):
        ctx.scaling = scaling
        ctx.save_for_backward(q, k, v)
        return kernel(q, k, v, scaling)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        q, (k, v) = q * ctx.scaling, (t.flatten(0, 1) for t in (k, v))
        of_q, (of_k, of_v) = torch.empty_like(q), (torch.zeros_like(t, dtype=torch.float32) for t in (k, v))
        for block in _blocks(q.shape[2]):
            rows, of_rows = _rows(q, block, len(k)), _rows(grad, block, len(k))
            seen, p = slice(0, block.stop), _probabilities(rows, k, block)
            of_v[:, seen].add_(p.mT @ of_rows)
            of_scores = torch._softmax_backward_data(of_rows @ v[:, seen].mT, p, -1, p.dtype)
            of_k[:, seen].add_(of_scores.mT @ rows)
            _put(of_q, block, of_scores @ k[:, seen])
        return of_q.mul_(ctx.scaling), *(t.to(q.dtype).unflatten(0, (len(q), -1)) for t in (of_k, of_v)), None


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]


def _rows(x, block: slice, groups: int):
    """The rows of a block of x [B, n, T, width], those of heads that share a key one after the other: [groups, n / m * rows, width]."""
    return x[:, :, block].reshape(groups, -1, x.shape[-1])


def _put(x, block: slice, rows) -> None:
    """Write what `_rows` reads."""
    x[:, :, block] = rows.view(*x.shape[:2], -1, x.shape[-1])


def _probabilities(rows, k, block: slice):
    """Softmax of a block's scores [groups, rows, keys up to the block's last]."""
    scores = rows @ k[:, :block.stop].mT
    size = block.stop - block.start
    above = torch.full((size, size), -torch.inf, dtype=rows.dtype).triu_(1)
    scores.unflatten(1, (-1, size))[..., block].add_(above)
    return scores.softmax(-1)


def products(q, k, v, scaling: float):
    """Causal attention of q [B, n, T, width] over k and v [B, m, T, width], n a multiple of m: [B, n, T, width]. Its gradient is made of
    products."""
    return _Products.apply(q, k, v, scaling)


def kernel(q, k, v, scaling: float):
    """The same by torch."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


def attend(q, k, v, scaling: float):
    """The same by what is faster here in this dtype. In float32 that is the kernel: benchmarks/attention.py, benchmarks/LOG.md."""
    fast = q.dtype != torch.float32 and products_are_faster(q.dtype, q.shape[1], k.shape[1], q.shape[3])
    return (products if fast else kernel)(q, k, v, scaling)


def settle(weight: torch.Tensor, heads: Sequence[int], width: int) -> None:
    """Find out now which is faster for heads of queries and keys made by this weight: a trial inside a layer that is computed again for
    its backward (gradient checkpointing) would be taken for a part of it."""
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        products_are_faster(weight.dtype, *heads, width)


@functools.cache
def products_are_faster(dtype: torch.dtype, heads: int, keys: int, width: int) -> bool:
    """Are they, forward and backward, on this machine? Tried once in a process, in turns, on TRIED tokens."""
    turns = [[seconds(way, dtype, heads, keys, width, TRIED) for way in (kernel, products)] for _ in range(TURNS)]
    of_kernel, of_products = (min(times) for times in zip(*turns))
    return of_kernel > FASTER * of_products


def seconds(way, dtype: torch.dtype, heads: int, keys: int, width: int, tokens: int) -> float:
    """Seconds of a forward and a backward of `way` (q, k, v, scaling) on heads as a fused layer makes them."""
    made = lambda n: torch.linspace(-1, 1, tokens * n * width).to(dtype).view(1, tokens, n, width).transpose(1, 2).requires_grad_()
    heads_of = [made(heads), made(keys), made(keys)]
    begun = time.perf_counter()
    with torch.enable_grad():
        out = way(*heads_of, width**-0.5)
        torch.autograd.grad(out, heads_of, out.detach())
    return time.perf_counter() - begun
