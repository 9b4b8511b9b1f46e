"""A pass through a fused model on a CPU as one autograd node, its layers in C (`cpu_kernels`) from end to end.

What is fast in C leaves Python's and torch's own time to be seen: fifty calls a layer forward and back, each with what it allocates, made
while the products have filled the core's cache, were a tenth of a step of 512 tokens (benchmarks/LOG.md). Here it is two. Gradients go
straight into the flat weights', and what a layer kept is let go of as soon as it is used.
"""

from __future__ import annotations

import torch

from . import cpu_attention, cpu_kernels, decoder_pass, elementwise
from .flat_weights import FlatWeights
from .fused_layer import Fused


def fits(model, fused: Fused) -> bool:
    """Is this causal language model one whose decoder pass is known (`decoder_pass`), all that its layers compute in C?"""
    if not (elementwise.compiled and decoder_pass.fits(model, fused) and all(map(_in_c, fused.layers))):
        return False
    hidden = model.base_model.embed_tokens(torch.zeros(1, 1, dtype=torch.int64))
    angles, _ = model.base_model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
    return (cpu_attention.fastest(torch.bfloat16) is cpu_attention.compiled and hidden.dtype == angles.dtype == torch.bfloat16
            and all(angles.shape[-1] == layer.width for layer in fused.layers))


def _groups(layer) -> tuple:
    return layer.qkv, layer.o, layer.gate_up, layer.down


def _in_c(layer) -> bool:
    return (all(group.all_in_c for group in _groups(layer)) and not layer.head_norm
            and cpu_kernels.DecoderLayer.fits(layer.norms, layer.width, layer.inner))


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, hidden, wanted, cos, sin, decoder):
        ctx.decoder, ctx.given, ctx.kept = decoder, (hidden.shape, wanted, cos, sin), []  # the first holds what its layers point to
        scratch = _scratch(decoder.layers, hidden.shape)
        for layer in decoder.layers:
            last = {"wanted": wanted} if layer is decoder.layers[-1] else {}
            hidden, kept = layer.forward(hidden.view(ctx.given[0]), cos, sin, scratch, **last)
            ctx.kept.append(kept)
        return hidden

    @staticmethod
    def backward(ctx, of_wanted):
        (shape, wanted, cos, sin), layers = ctx.given, ctx.decoder.layers
        if not ctx.kept:
            raise RuntimeError("what this pass kept for its backward is used up")
        grad, scratch = of_wanted.new_empty(shape), _scratch(layers, shape)
        grad.flatten(0, 1)[:len(wanted)] = of_wanted
        for layer in reversed(layers):
            last = {"wanted": wanted} if layer is layers[-1] else {}
            layer.backward(ctx.kept.pop(), grad, cos, sin, scratch, layer is layers[0], **last)
        return None, None, None, None, None, None


def _scratch(layers, shape):
    return torch.empty(max(layer.scratch(*shape[:2]) for layer in layers), dtype=torch.uint8)


class Decoder:
    """Ids to hidden states, for a model that `fits`, whose LoRA is in `flat`; to its caller like `decoder_pass.Decoder`."""

    def __init__(self, model, fused: Fused, flat: FlatWeights):
        self._inner, self._flat = model.base_model, flat
        self._copy = torch.empty(flat.tensor.shape, dtype=fused.layers[0].qkv.weight.dtype)  # what layers read
        read, sums = flat.views(self._copy), flat.views(flat.tensor.grad)
        self.layers = [cpu_kernels.DecoderLayer([group.in_c(read[group], sums[group]) for group in _groups(layer)], layer.norms,
                                                 layer.scaling, *layer.heads[:2], layer.width) for layer in fused.layers]

    def __call__(self, ids: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, d] of ids int64 [B, T] at these rows and positions, int64 [n] both, in ascending order: the last layer computes
        no others after its attention. One pass is under way at a time: its backward comes before the next forward."""
        self._copy.copy_(self._flat.tensor.detach())
        hidden = self._inner.embed_tokens(ids)
        cos, sin = self._inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        return self._inner.norm(_Pass.apply(self._flat.tensor, hidden, rows * ids.shape[1] + at, cos, sin, self))

    def told(self) -> str:
        """Nothing makes these passes slower."""
        return ""

    def make_room(self, reason: str) -> bool:
        """There is no memory to give back."""
        return False
