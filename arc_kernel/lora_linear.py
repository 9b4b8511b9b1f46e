"""A LoRA linear layer as one autograd function: y = x W' + s (x A') B' with W frozen, A and B fp32 masters.

peft's layer does the same in several autograd nodes and casts x to the masters' dtype and back; here only the masters are
cast to the compute dtype, and the LoRA's products are added in place (10% less time per step on 2 CPU cores). peft keeps the weights, their names and
the file format; only `forward` of its plain linear layers is exchanged while training.
"""

from __future__ import annotations

import torch


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):  # x [T, in], weight [out, in], a [rank, in], b [out, rank]
        a, b = a.to(x.dtype), b.to(x.dtype)
        h = x @ a.T
        y = torch.nn.functional.linear(x, weight, bias).addmm_(h, b.T, alpha=scale)
        ctx.save_for_backward(x, h, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad):
        x, h, weight, a, b = ctx.saved_tensors
        grad_h = (grad @ b).mul_(ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_h, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, (grad_h.T @ x).float(), (grad.T @ h).mul_(ctx.scale).float(), None


def install(model: torch.nn.Module) -> int:
    """Exchange `forward` of every plain peft LoRA linear layer with one adapter and no dropout; how many were exchanged."""
    from peft.tuners.lora import Linear

    count = 0
    for module in model.modules():
        if type(module) is Linear and _plain(module):
            module.forward = _forward(module)
            count += 1
    return count


def _plain(module) -> bool:
    name = module.active_adapters[0]
    dropout = module.lora_dropout[name]
    return (len(module.active_adapters) == 1 and isinstance(dropout, torch.nn.Identity) and not module.use_dora[name]
            and type(module.get_base_layer()) is torch.nn.Linear and module.lora_B[name].bias is None)


def _forward(module):
    name = module.active_adapters[0]
    base, a, b, scale = module.get_base_layer(), module.lora_A[name], module.lora_B[name], module.scaling[name]

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(base.weight.dtype)
        return _LoraLinear.apply(rows, base.weight, base.bias, a.weight, b.weight, scale).view(*x.shape[:-1], -1)

    return forward
