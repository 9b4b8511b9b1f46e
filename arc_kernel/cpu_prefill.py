"""Prompts on vLLM's CPU build: their attention, and SwiGLU, by `cpu_kernels`.

vLLM 0.32's own attention makes a third of a large product's speed where the CPU has no AMX, and was 29 to 40% of reading prompts of 1,150
tokens (benchmarks/LOG.md). Answers that are decoded stay with it, put together for a call of their own. Keys and values of what was read
before, a cached prefix or the part of a long prompt that earlier steps read, lie in vLLM's cache in an order of its own, which differs from
CPU to CPU: it is seen by writing numbers into a block that say where they are from. Only in bfloat16, and not with AMX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

LEAST = 256  # tokens of a prompt: with 129 it takes as long either way
BUILD = ["self", "common_prefix_len", "common_attn_metadata", "fast_build"]
FORWARD = ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output", "output_scale", "output_block_scale"]


def install() -> None:
    """Exchange both; nothing changes where this CPU has no such functions, or vLLM's are others."""
    import torch

    from . import cpu_kernels  # imports torch, which `run` can do without

    if cpu_kernels.refused():
        return
    try:
        from vllm.model_executor.layers.activation import SiluAndMul
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder
    except ImportError:
        return
    if hasattr(SiluAndMul, "forward_cpu"):
        SiluAndMul.forward_cpu = _swiglu
    names = lambda method: list(inspect.signature(method).parameters)
    build, forward = CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward
    if (names(build) == BUILD and names(forward) == FORWARD and build.__module__ != __name__ and not torch.cpu._is_amx_tile_supported()
            and getattr(CPUAttentionBackend, "forward_includes_kv_cache_update", True) is False):
        CPUAttentionMetadataBuilder.build, CPUAttentionBackendImpl.forward = _build(build), _forward(forward)


def _swiglu(self, x):
    """silu(gate) * up of [..., 2 n], gate before up."""
    from . import cpu_kernels

    made = cpu_kernels.swiglu(x.flatten(0, -2)) if x.dim() > 1 else NotImplemented
    return self.forward_native(x) if made is NotImplemented else made.view(*x.shape[:-1], x.shape[-1] // 2)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A step's `rows` of a sequence, how many tokens of it were there `before`, and in which `blocks` of the cache, int64."""

    rows: slice
    before: int
    blocks: torch.Tensor


class _Order(NamedTuple):
    """Where a block's keys and values [size, heads, width] lie, in numbers from its beginning: the first, and how far the next ones are."""

    keys: tuple[int, list[int]]
    values: tuple[int, list[int]]


@dataclasses.dataclass(frozen=True)
class _Split:
    """Of a step its prompts, with the `order` of a block of the cache; and the other rows, with what vLLM knows of them alone."""

    prompts: list[_Prompt]
    order: _Order
    others: torch.Tensor
    known: object | None


def _build(own):
    import torch

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        made = own(self, common_prefix_len, common_attn_metadata, fast_build)
        made.arc_kernel_split = None
        with contextlib.suppress(AttributeError, TypeError):  # a release whose metadata has other fields: its own attention is used
            if self.dtype == torch.bfloat16 and not (self.is_cross_attention or self.is_encoder_only_attention):
                order = _order(self.isa, self.num_kv_heads, self.block_size, self.head_dim, self.dtype)
                made.arc_kernel_split = order and _split(common_attn_metadata, self.block_size, order,
                                                         lambda few: own(self, common_prefix_len, few, fast_build))
        return made

    return build


@functools.cache
def _order(isa: str, heads: int, size: int, width: int, dtype: torch.dtype):
    """The order of a block of the cache, [heads, size, 2 width] in memory; None where numbers of a side are not equally far apart."""
    import torch
    from vllm import _custom_ops

    numbers, found = torch.arange(size * heads * width).view(size, heads, width), [0, 0]
    try:
        for power in (1, 256, 65536):  # bfloat16 holds whole numbers up to 256
            part, block = (numbers // power % 256).to(dtype), torch.zeros(1, heads, 2 * size, width, dtype=dtype)
            _custom_ops.cpu_attn_reshape_and_cache(part, part.clone(), *block.chunk(2, 2), torch.arange(size), isa)
            found = [old + power * half.long() for old, half in zip(found, block.chunk(2, 2))]
    except Exception:  # a release whose operator takes something else
        return None
    places, made = torch.arange(2 * numbers.numel()).view(heads, 2 * size, width).chunk(2, 1), []
    for at, half in zip(found, places):
        place = torch.full((numbers.numel(),), -1)
        place[at.flatten().clamp_max(len(place) - 1)] = half.flatten()
        made.append(_evenly(place.view(numbers.shape)))
    return None if None in made else _Order(*made)


def _evenly(places) -> tuple[int, list[int]] | None:
    """The first of places [a, b, c], and how far the next one of each side is; None where they are not equally far apart."""
    import torch

    first, far = places[0, 0, 0], [int(places.diff(dim=side).flatten()[:1].sum()) for side in range(3)]  # 0 of a side of one
    sides = torch.meshgrid(*map(torch.arange, places.shape), indexing="ij")
    even = min(places.min(), *far) >= 0 and torch.equal(places, first + sum(n * i for n, i in zip(far, sides)))
    return (int(first), far) if even else None


def _split(common, size: int, order, build) -> _Split | None:
    import torch

    starts, lengths = common.query_start_loc[:common.num_reqs + 1], common.seq_lens[:common.num_reqs]
    rows = starts.diff()
    long = rows >= LEAST
    if not long.any():
        return None
    bounds, before, known, number = starts.tolist(), (lengths - rows).tolist(), None, (~long).nonzero()[:, 0]
    others = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in number.tolist()] or [torch.arange(0)])
    if len(number):
        begin = torch.cat([starts[:1], rows[number].cumsum(0, dtype=starts.dtype)])
        known = build(dataclasses.replace(
            common, num_reqs=len(number), num_actual_tokens=len(others), max_query_len=int(rows[number].max()), query_start_loc=begin,
            query_start_loc_cpu=begin, seq_lens=lengths[number], block_table_tensor=common.block_table_tensor[number],
            slot_mapping=common.slot_mapping[others]))
    prompts = [_Prompt(slice(bounds[i], bounds[i + 1]), before[i], common.block_table_tensor[i, :-(-before[i] // size)].long())
               for i in long.nonzero()[:, 0].tolist()]
    return _Split(prompts, order, others, known)


def _forward(own):
    import torch

    from . import cpu_kernels

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None):
        split = getattr(attn_metadata, "arc_kernel_split", None)
        if split is None or not _plain(self, query, kv_cache, attn_metadata):
            return own(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        for prompt in split.prompts:
            heads = lambda x: x[prompt.rows].view(prompt.rows.stop - prompt.rows.start, -1, self.head_size)
            q, k, v, out = map(heads, (query, key, value, output))
            if prompt.before:
                there = kv_cache[prompt.blocks].contiguous()
                k, v = (_behind(there, where, prompt.before, new) for where, new in zip(split.order, (k, v)))
            q, k, v, out = (x.transpose(0, 1)[None] for x in (q, k, v, out))
            cpu_kernels.attention(q, k, v, self.scale, out)
        if split.known is not None:
            part = output[split.others]
            own(self, layer, *(x[split.others] for x in (query, key, value)), kv_cache, split.known, part)
            output[split.others] = part
        return output

    return forward


def _behind(there, where: tuple[int, list[int]], before: int, new):
    """Keys or values of a sequence, [before + T, heads, width]: those in its blocks `there`, and `new` [T, heads, width]."""
    (first, steps), (blocks, _, size, _) = where, there.shape
    made = new.new_empty(blocks * size + len(new), *new.shape[1:])
    old = there.as_strided((blocks, size, *new.shape[1:]), (there.stride(0), *steps), first)
    made[:blocks * size].view(old.shape).copy_(old)
    made[before:before + len(new)] = new
    return made[:before + len(new)]


def _plain(attention, query, cache, metadata) -> bool:
    """Is this causal attention over all that was, by the scores as they are, with a cache [blocks, heads, size, 2 width]?"""
    import torch

    from . import cpu_kernels

    return (query.dtype == cache.dtype == torch.bfloat16 and cpu_kernels.takes(attention.head_size) and attention.attn_type == "decoder"
            and cache.dim() == 4 and (cache.shape[1], cache.shape[3]) == (attention.num_kv_heads, 2 * attention.head_size)
            and metadata.causal is True and getattr(metadata, "dynamic_causal", None) is None and attention.sliding_window == -1
            and attention.alibi_slopes is None and not attention.logits_soft_cap and attention.sinks is None
            and attention.kv_sharing_target_layer_name is None and attention.kv_cache_dtype == "auto")
