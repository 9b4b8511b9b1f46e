"""Causal attention on a CPU, for dtypes whose products outrun torch's attention kernel.

torch's kernel works in small blocks of its own. In bfloat16 on CPUs that have instructions for it, it takes more than half of a
training step at 2,048 tokens (benchmarks/LOG.md). Two ways are faster. `compiled`: blocks of scores that never leave the core's cache, by
`cpu_kernels`, where there is a C compiler. `products`: the rows of all query heads that share a key head are one product of the fast
library, and what lies above the diagonal is left out but for the diagonal's blocks. A layer keeps what its softmax gave for its backward
up to KEPT bytes; what is beyond is computed again, so that memory grows with the tokens, not with their square (Dao et al. 2022,
"FlashAttention"). Which way is fastest is measured where it would be used: with AMX the kernel's forward was as good as the products'.
It is measured on one shape for all models, where the ways are far apart: two processes that chose differently would differ in rounding.
"""

from __future__ import annotations

import functools
import time
from typing import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import cpu_kernels

ROWS = 256  # query positions of a block: its scores of nine heads and 1,024 keys are 4.7 MB in 16 bits
KEPT = 48 << 20  # bytes a layer: all probabilities of nine heads at 2,048 tokens
SHAPE = 9, 3, 64  # query heads, key heads and width of the trial: SmolLM2-135M's
TRIED, TURNS = 512, 3  # tokens and turns of the trial; the fastest turn counts
FASTER = 1.2  # how many times a way must outdo the one before: not by a hair, or two processes would differ in rounding


class _Attention(torch.autograd.Function):
    """Its gradient by products; its forward too, if `whole`, or by torch's kernel."""

    @staticmethod
    def forward(ctx, q, k, v, scaling, whole):
        rows, keys, values = _rows(q, k.shape[1]).mul_(scaling), k.flatten(0, 1), v.flatten(0, 1)
        ctx.save_for_backward(rows, keys, values)
        ctx.shape, ctx.scaling, ctx.kept = q.shape, scaling, []
        if not whole:
            return kernel(q, k, v, scaling)
        out, room = torch.empty_like(rows), KEPT
        for at, size, seen in _blocks(rows, keys):
            p = _probabilities(rows[:, at], keys[:, seen], size)
            out[:, at] = torch.bmm(p, values[:, seen])
            room -= p.nbytes
            if room >= 0:
                ctx.kept.append(p)
        return _heads(out, q.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, keys, values = ctx.saved_tensors
        grad, of_rows = _rows(grad, len(keys) // len(grad)), torch.empty_like(rows)
        of_keys, of_values = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
        for number, (at, size, seen) in enumerate(_blocks(rows, keys)):
            p = ctx.kept[number] if number < len(ctx.kept) else _probabilities(rows[:, at], keys[:, seen], size)
            of_values[:, seen].add_(torch.bmm(p.mT, grad[:, at]))
            of_scores = torch._softmax_backward_data(torch.bmm(grad[:, at], values[:, seen].mT), p, -1, p.dtype)
            of_keys[:, seen].add_(torch.bmm(of_scores.mT, rows[:, at]))
            of_rows[:, at] = torch.bmm(of_scores, keys[:, seen])
        shared = (t.to(rows.dtype).unflatten(0, (ctx.shape[0], -1)) for t in (of_keys, of_values))
        return _heads(of_rows.mul_(ctx.scaling), ctx.shape), *shared, None, None


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scaling):
        out, levels = cpu_kernels.attention(q, k, v, scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(q, k, v, out, levels)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *cpu_kernels.attention_back(*ctx.saved_tensors, grad, ctx.scaling), None


def _rows(x, keys: int):
    """Heads [B, n, T, width] in new memory, those of a position that share one of `keys` key heads one after the other:
    [B * keys, T * n / keys, width]."""
    grouped = x.unflatten(1, (keys, -1)).transpose(2, 3)
    return torch.empty(grouped.shape, dtype=x.dtype).copy_(grouped).flatten(0, 1).flatten(1, 2)


def _heads(rows, shape):
    """What `_rows` read, as [B, n, T, width] of this shape; in memory it is [B, T, n, width]."""
    batch, heads, tokens, width = shape
    return rows.view(batch, len(rows) // batch, tokens, -1, width).transpose(1, 2).reshape(batch, tokens, heads, width).transpose(1, 2)


def _blocks(rows, keys) -> list[tuple[slice, int, slice]]:
    """Of each block its part of `rows`, how many positions that are, and the part of `keys` they see."""
    tokens = keys.shape[1]
    each, bounds = rows.shape[1] // tokens, [(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]
    return [(slice(start * each, stop * each), stop - start, slice(0, stop)) for start, stop in bounds]


def _probabilities(rows, keys, size: int):
    """Softmax of the scores of a block, `size` positions, of which the last sees all `keys`: [groups, rows, keys]."""
    scores = torch.bmm(rows, keys.mT)
    scores.unflatten(1, (size, -1))[..., -size:].add_(_above(ROWS, rows.dtype)[:size, None, :size])
    return scores.softmax(-1)


@functools.cache
def _above(side: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, and minus infinity above the diagonal: [side, side]."""
    return torch.full((side, side), -torch.inf, dtype=dtype).triu_(1)


def kernel(q, k, v, scaling: float):
    """Causal attention of q [B, n, T, width] over k and v [B, m, T, width], n a multiple of m: [B, n, T, width]; by torch."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


def half(q, k, v, scaling: float):
    """The same by torch, its gradient by products."""
    return _Attention.apply(q, k, v, scaling, False)


def products(q, k, v, scaling: float):
    """The same by products, and its gradient."""
    return _Attention.apply(q, k, v, scaling, True)


def compiled(q, k, v, scaling: float):
    """The same in bfloat16 by `cpu_kernels`, or by products for heads of a width that those do not take."""
    return _Compiled.apply(q, k, v, scaling) if cpu_kernels.takes(q.shape[-1]) else products(q, k, v, scaling)


def attend(q, k, v, scaling: float):
    """The same by what is fastest here in this dtype. In float32 that is the kernel: benchmarks/attention.py, benchmarks/LOG.md."""
    return (kernel if q.dtype == torch.float32 else fastest(q.dtype))(q, k, v, scaling)


def settle(weight: torch.Tensor) -> None:
    """Find out now which is fastest where this weight makes queries: a trial inside a layer that is computed again for its backward
    (gradient checkpointing) would be taken for a part of it."""
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        fastest(weight.dtype)


@functools.cache
def fastest(dtype: torch.dtype) -> Callable:
    """The fastest of `ways`, by forward and backward on this machine: tried once in a process, in turns, on TRIED tokens."""
    ways = ways_of(dtype)
    turns = [[seconds(way, dtype, *SHAPE, TRIED) for way in ways] for _ in range(TURNS)]
    times = dict(zip(ways, map(min, zip(*turns))))
    best = kernel
    for way in ways[1:]:
        if times[best] > FASTER * times[way]:
            best = way
    return best


def ways_of(dtype: torch.dtype) -> tuple[Callable, ...]:
    """The ways there are for this dtype on this machine."""
    return (kernel, half, products, *([compiled] if dtype == torch.bfloat16 and not cpu_kernels.refused() else []))


def seconds(way, dtype: torch.dtype, heads: int, keys: int, width: int, tokens: int) -> float:
    """Seconds of a forward and a backward of `way` (q, k, v, scaling) on heads as a fused layer makes them."""
    made = lambda n: torch.linspace(-1, 1, tokens * n * width).to(dtype).view(1, tokens, n, width).transpose(1, 2).requires_grad_()
    heads_of = [made(heads), made(keys), made(keys)]
    begun = time.perf_counter()
    with torch.enable_grad():
        out = way(*heads_of, width**-0.5)
        torch.autograd.grad(out, heads_of, out.detach())
    return time.perf_counter() - begun
