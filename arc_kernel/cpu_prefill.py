"""Prompts on vLLM's CPU build: attention of those that are read from their first token on, and SwiGLU, by `cpu_kernels`.

vLLM 0.32's own attention makes a third of a large product's speed where the CPU has no AMX, and was 29% of reading prompts of 1,150
tokens (benchmarks/LOG.md). What goes on with a prompt, or begins behind a cached prefix, reads keys and values from the cache, whose order
is vLLM's own: such sequences, and answers that are decoded, stay with it, put together for a call of their own. Only in bfloat16, and not with AMX, which vLLM's has a way of its own for.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING

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

    made = cpu_kernels.swiglu(x.flatten(0, -2))
    return self.forward_native(x) if made is NotImplemented else made.view(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class _Split:
    """Of a step's rows those of each sequence that begins in it, and those of the others, with what vLLM knows of them alone."""

    begun: list[slice]
    others: torch.Tensor
    known: object | None


def _build(own):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        made = own(self, common_prefix_len, common_attn_metadata, fast_build)
        made.arc_kernel_split = _split(common_attn_metadata, lambda few: own(self, common_prefix_len, few, fast_build))
        return made

    return build


def _split(common, build) -> _Split | None:
    import torch

    starts, lengths = common.query_start_loc[:common.num_reqs + 1], common.seq_lens[:common.num_reqs]
    rows = starts.diff()
    begun = (rows == lengths) & (rows >= LEAST)
    if not begun.any():
        return None
    bounds, known, number = starts.tolist(), None, (~begun).nonzero()[:, 0]
    others = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in number.tolist()] or [torch.arange(0)])
    if len(number):
        begin = torch.cat([starts[:1], rows[number].cumsum(0, dtype=starts.dtype)])
        known = build(dataclasses.replace(
            common, num_reqs=len(number), num_actual_tokens=len(others), max_query_len=int(rows[number].max()), query_start_loc=begin,
            query_start_loc_cpu=begin, seq_lens=lengths[number], block_table_tensor=common.block_table_tensor[number],
            slot_mapping=common.slot_mapping[others]))
    return _Split([slice(bounds[i], bounds[i + 1]) for i in begun.nonzero()[:, 0].tolist()], others, known)


def _forward(own):
    from . import cpu_kernels

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None):
        split = getattr(attn_metadata, "arc_kernel_split", None)
        if split is None or not _plain(self, query, attn_metadata):
            return own(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        for rows in split.begun:
            heads = (x[rows].view(rows.stop - rows.start, -1, self.head_size) for x in (query, key, value, output))
            q, k, v, out = (x.transpose(0, 1)[None] for x in heads)
            cpu_kernels.attention(q, k, v, self.scale, out)
        if split.known is not None:
            part = output[split.others]
            own(self, layer, *(x[split.others] for x in (query, key, value)), kv_cache, split.known, part)
            output[split.others] = part
        return output

    return forward


def _plain(attention, query, metadata) -> bool:
    """Is this causal attention over all that was, by the scores as they are?"""
    import torch

    from . import cpu_kernels

    return (query.dtype == torch.bfloat16 and cpu_kernels.takes(attention.head_size) and attention.attn_type == "decoder"
            and metadata.causal is True and getattr(metadata, "dynamic_causal", None) is None and attention.sliding_window == -1
            and attention.alibi_slopes is None and not attention.logits_soft_cap and attention.sinks is None
            and attention.kv_sharing_target_layer_name is None and attention.kv_cache_dtype == "auto")
