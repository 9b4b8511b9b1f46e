"""A decoder layer of the Llama family with a LoRA as two autograd nodes around its attention, while training.

transformers' layer is some sixty operations forward and twice as many backward, most of them elementwise: they wait for
memory on a CPU with fast products, and for their launch on a GPU with a small model. Here q, k and v are one product, and
gate and up; residuals are added by the products; norms, rotary and SwiGLU have their gradients written out, with what can
be computed again not kept. Same numbers up to rounding.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from . import cpu_attention, elementwise, lora_linear
from .device import shares_keys
from .lora_linear import Group, plain

# the same arithmetic; Qwen3, as which OpenELM is opened, has a norm of each query and key head before the rotary, too
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class _Masks:
    """Is a mask causal and nothing else? transformers 4.57 makes one in training even so. All layers of a pass are given the same
    tensor, so that it is looked at once."""

    def __init__(self):
        self.last, self.verdict = lambda: None, True

    def causal(self, mask) -> bool:
        """`mask` is None, or bool [B, 1, T, T] with True where a query (row) sees a key."""
        if mask is None:
            return True
        if mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
            return False
        if self.last() is not mask:
            self.last, self.verdict = weakref.ref(mask), bool((mask == torch.ones_like(mask[0, 0]).tril()).all())
        return self.verdict


class _Parts:
    """What of a decoder layer the fused forward reads; `ready` tells whether it may be used for a call."""

    def __init__(self, layer, masks: _Masks):
        attention, mlp, self.masks = layer.self_attn, layer.mlp, masks
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o, self.gate_up, self.down = Group([attention.o_proj]), Group([mlp.gate_proj, mlp.up_proj]), Group([mlp.down_proj])
        self.norms = [(norm.weight.data, torch.tensor(norm.variance_epsilon, device=norm.weight.device))
                      for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.heads = [size // self.width for size in self.qkv.sizes]
        self.head_norm = None  # weight [query and key heads, width] and eps
        if norms := _head_norms(attention):
            weight = torch.cat([norm.weight.data.expand(count, -1) for norm, count in zip(norms, self.heads)])
            self.head_norm = weight, torch.tensor(norms[0].variance_epsilon, device=weight.device)
        self.inner = mlp.gate_proj.out_features
        self.modules = list(layer.modules())

    @property
    def masters(self) -> list:
        """A and B of what comes after attention."""
        return [*self.o.masters, *self.gate_up.masters, *self.down.masters]

    def settle(self) -> None:
        """Find out now what is fastest on a CPU, and right."""
        weight = self.qkv.weight
        cpu_attention.settle(weight)
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            elementwise.take_kernels(weight.shape[1], self.inner, *self.heads[:2], self.width, bool(self.head_norm))

    def ready(self, hidden, mask, past, embeddings) -> bool:
        """Training from the start of a sequence, causal and no more, and nobody wants to see what is inside."""
        return (torch.is_grad_enabled() and past is None and embeddings is not None
                and embeddings[0].shape[-1] == self.width and hidden.dtype == self.qkv.weight.dtype
                and not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules) and self.masks.causal(mask))


class _Queries(torch.autograd.Function):
    """Hidden states [B, T, d] to rotated q and k and to v, [B, heads, T, width] each."""

    @staticmethod
    def forward(ctx, hidden, cos, sin, parts, *masters):
        weight, eps = parts.norms[0]
        normed, inverse, read = elementwise.norm(hidden.flatten(0, 1), weight, eps)
        out, ctx.kept = parts.qkv.forward(read, masters)
        heads = out.view(*hidden.shape[:2], -1, parts.width)
        cos, sin = cos[:, :, None], sin[:, :, None]
        both, of_heads = heads[:, :, :-parts.heads[2]], ()
        if parts.head_norm:
            *of_heads, both = elementwise.norm(both, *parts.head_norm)
        turned = elementwise.rotate(both, cos, sin)
        ctx.parts = parts
        ctx.save_for_backward(normed, inverse, cos, sin, *of_heads)
        return *(t.transpose(1, 2) for t in turned.split(parts.heads[:2], 2)), heads[:, :, -parts.heads[2]:].transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads):
        parts, (normed, inverse, cos, sin, *of_heads) = ctx.parts, ctx.saved_tensors
        turned = elementwise.rotate_back(*(g.transpose(1, 2) for g in grads), cos, sin)
        if of_heads:
            both = turned[:, :, :-parts.heads[2]]
            both.copy_(elementwise.norm_back(both, *of_heads, parts.head_norm[0]))
        weight = parts.norms[0][0]
        grad, of_masters = parts.qkv.backward(turned.flatten(2).flatten(0, 1), normed, ctx.kept, weight, ctx.needs_input_grad[0])
        if grad is not None:
            grad = elementwise.norm_back(grad, normed, inverse, weight).view(*turned.shape[:2], -1)
        return grad, None, None, None, *of_masters


class _Rest(torch.autograd.Function):
    """Hidden states [B, T, d] and attention's output [B, T, heads * width] to the layer's output."""

    @staticmethod
    def forward(ctx, hidden, attended, parts, *masters):
        weight, eps = parts.norms[1]
        rows = attended.flatten(0, 1)
        hidden_rows, of_o = parts.o.forward(rows, masters[:2], hidden.flatten(0, 1))
        normed, inverse, read = elementwise.norm(hidden_rows, weight, eps)
        both, of_both = parts.gate_up.forward(read, masters[2:6])
        out, of_down = parts.down.forward(elementwise.swiglu(both), masters[6:], hidden_rows)
        ctx.parts, ctx.kept = parts, (of_o, of_both, of_down)
        ctx.save_for_backward(rows, normed, inverse, both)
        return out.view(hidden.shape)

    @staticmethod
    def backward(ctx, grad_out):
        parts, (rows, normed, inverse, both), (of_o, of_both, of_down) = ctx.parts, ctx.saved_tensors, ctx.kept
        grad = grad_out.flatten(0, 1)
        of_product, of_h = parts.down.to_input(grad, of_down)
        grad_both, product = elementwise.swiglu_back(of_product, both)
        down = parts.down.to_masters(grad, of_h, product, of_down)
        weight = parts.norms[1][0]
        of_normed, gate_up = parts.gate_up.backward(grad_both, normed, of_both, weight)
        grad = elementwise.norm_back(of_normed, normed, inverse, weight, grad)
        of_rows, o = parts.o.backward(grad, rows, of_o)
        shape = grad_out.shape
        return grad.view(shape), of_rows.view(*shape[:2], -1), None, *o, *gate_up, *down


@dataclass(frozen=True)
class Fused:
    """What `install` exchanged: decoder layers, and the groups of linear layers in the whole model."""

    layers: list[_Parts]
    groups: list[Group]


def install(model: torch.nn.Module) -> Fused:
    """Exchange `forward` of every decoder layer that is one of LAYERS with plain LoRA layers throughout.

    The layer's own forward still answers what is not training (see `_Parts.ready`), and other architectures: its linear
    layers are lora_linear's. The model must be where it is trained: the weights of a group are put together there.
    """
    groups = lora_linear.install(model)
    found = [module for module in model.modules() if type(module).__name__ in LAYERS and _fits(module)]
    masks, layers = _Masks(), []
    for layer in found:
        layers.append(_Parts(layer, masks))
        layer.forward = _forward(layers[-1], layer.forward)
        layers[-1].settle()
    return Fused(layers, groups + [g for p in layers for g in (p.qkv, p.o, p.gate_up, p.down)])


def _head_norms(attention) -> list:
    return [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []


def _fits(layer) -> bool:
    attention, mlp, of_heads = layer.self_attn, layer.mlp, _head_norms(layer.self_attn)
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]
    return (all(map(plain, linears)) and all(type(n).__name__ in NORMS and not n.weight.requires_grad for n in norms)
            and (len({m.get_base_layer().bias is None for m in linears[:3]})
                 == len({m.get_base_layer().bias is None for m in linears[4:6]}) == 1)
            and len({n.variance_epsilon for n in of_heads}) < 2
            and attention.config._attn_implementation == "sdpa" and not attention.attention_dropout
            and attention.config.hidden_act == "silu")


def _forward(parts: _Parts, own):
    def forward(hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                position_embeddings=None, **others):
        if not parts.ready(hidden_states, attention_mask, past_key_values, position_embeddings):
            return own(hidden_states, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                       use_cache=use_cache, position_embeddings=position_embeddings, **others)
        q, k, v = _Queries.apply(hidden_states, *position_embeddings, parts, *parts.qkv.masters)
        attended = _attend(q, k, v, parts.scaling)
        return _Rest.apply(hidden_states, attended.transpose(1, 2).flatten(2), parts, *parts.masters)

    return forward


def _attend(q, k, v, scaling):
    """Causal attention of heads [B, n, T, width]; keys and values are repeated where no fast kernel shares them."""
    if q.device.type == "cpu":
        return cpu_attention.attend(q, k, v, scaling)
    shared = q.shape[1] != k.shape[1]
    if shared and not shares_keys(q.device.type):
        repeat = lambda t: t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2)
        k, v, shared = repeat(k), repeat(v), False
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=shared)
