"""A LoRA linear layer as one autograd function: y = x W' + s (x A') B' with W frozen, A and B fp32 masters.

peft's layer does the same in several autograd nodes and casts x to the masters' dtype and back; here only the masters are
cast to the compute dtype (all at once by `flat_weights`, or each here), and the LoRA's products are added in place (10% less time
per step on 2 CPU cores). peft keeps the weights, their names and the file format; only `forward` of its plain linear layers is
exchanged while training.
`Group` is the arithmetic: layers that read the same x as one product.
"""

from __future__ import annotations

import contextlib
from typing import Iterator

import torch
from torch.nn.functional import linear

from . import cpu_kernels, int8

LONG = 4096  # rows; at 8,192 it takes 0.96 of a Qwen2.5-0.5B's step and 1.00 of a SmolLM2-135M's (H200, benchmarks/LOG.md)


class Group:
    """Plain LoRA layers (`plain`) that read the same input. Where there are several, their frozen weights are put into one
    tensor [out, in] of which each layer keeps its rows, so that nothing is held twice."""

    def __init__(self, modules: list):
        bases = [m.get_base_layer() for m in modules]
        names = [m.active_adapters[0] for m in modules]
        self.sizes = [b.out_features for b in bases]
        self.masters = [w for m, name in zip(modules, names) for w in (m.lora_A[name].weight, m.lora_B[name].weight)]
        self.scaling = [(m.scaling, name) for m, name in zip(modules, names)]  # read at each step: it may be rescaled
        self.weight, self.bias = bases[0].weight, bases[0].bias
        if len(bases) > 1:
            self.weight = torch.cat([b.weight.data for b in bases])
            self.bias = None if bases[0].bias is None else torch.cat([b.bias.data for b in bases])
            for base, rows in zip(bases, self.weight.split(self.sizes)):
                base.weight.data = rows
        self._rounded: tuple[int8.Product, int8.Product] | None = None  # the weight's and its transpose's
        self.sums = None  # where the masters' gradients are added up, float32, or None where autograd is given them
        ranks = [len(a) for a in self.masters[0::2]]
        fits = cpu_kernels.Lora.fits(self.weight, self.sizes, ranks)
        self._compiled = cpu_kernels.Lora(self.weight.shape[1], self.sizes, ranks) if fits else None

    def round_weight(self, of_x: torch.Tensor, of_grad: torch.Tensor) -> None:
        """From now on multiply with the frozen weight in 8 bits where a gradient is wanted, forward and backward. Of what it is multiplied
        with the root mean squares by column are given, [in] and [out]."""
        self._rounded = int8.Product(self.weight, of_x), int8.Product(self.weight.T, of_grad)

    @property
    def all_in_c(self) -> bool:
        """Whether its products, in 8 bits, and its LoRA's are those of `cpu_kernels`."""
        return bool(self._compiled and self._rounded)

    def in_c(self, masters, sums):
        """Itself for a `cpu_kernels.DecoderLayer`, with these masters and sums of their gradients, scaled as it is now."""
        lora = cpu_kernels.Lora(self.weight.shape[1], self.sizes, [len(a) for a in masters[0::2]])
        there, back = (product.frozen for product in self._rounded)
        return lora.bind(masters, [scaling[name] for scaling, name in self.scaling], sums), there, back, self.bias

    def forward(self, x, masters, residual=None, training=True):
        """y [T, out] of x [T, in], with `residual` [T, out] added where there is one, and what `backward` needs of it."""
        masters, scales = [m.to(x.dtype).contiguous() for m in masters], [scaling[name] for scaling, name in self.scaling]
        if self._compiled:
            frozen = self._rounded[0].frozen if training and self._rounded else None
            y = x.new_empty(len(x), len(self.weight)) if frozen else linear(x, self.weight)
            h = self._compiled.forward(x, y, masters, scales, residual, frozen)
            return y if self.bias is None else y.add_(self.bias), (h, masters, scales)
        a, bs = torch.cat(masters[0::2]) if len(masters) > 2 else masters[0], masters[1::2]
        h, weight = x @ a.T, self.weight
        wide = _wider(x, *self.weight.shape)
        if wide:
            weight = torch.cat([self.weight, torch.block_diag(*bs)], 1)
            x = torch.cat([x, *(low * scale for low, scale in zip(self._parts(h, bs), scales))], 1)
        if training and self._rounded:
            y = self._rounded[0](x)
            for more in (self.bias, residual):
                y = y if more is None else y.add_(more)
        elif residual is None or self.bias is not None:
            y = linear(x, weight, self.bias)
            y = y if residual is None else y.add_(residual)
        else:
            y = torch.addmm(residual, x, weight.T)
        if not wide:
            for rows, low, b, scale in zip(y.split(self.sizes, 1), self._parts(h, bs), bs, scales):
                rows.addmm_(low, b.T, alpha=scale)
        return y, (h, a, scales, *bs)

    def to_input(self, grad, kept, need_x=True):
        """From the gradient to y [T, out] that to x [T, in] (None where not asked for), and that to h, for `to_masters`."""
        if self._compiled:
            frozen = self._rounded[1].frozen if self._rounded else None
            of_x = None if not need_x else grad.new_empty(len(grad), self.weight.shape[1]) if frozen else grad @ self.weight
            return of_x, self._compiled.to_input(grad, of_x, *kept[1:], frozen)
        h, a, scales, *bs = kept
        grad_h = torch.empty_like(h)
        for g, low, b, scale in zip(grad.split(self.sizes, 1), self._parts(grad_h, bs), bs, scales):
            torch.addmm(low, g, b, beta=0, alpha=scale, out=low)
        if not need_x:
            return None, grad_h
        if _wider(grad, *reversed(self.weight.shape)):
            return torch.cat([grad, grad_h], 1) @ torch.cat([self.weight, a]), grad_h
        of_x = self._rounded[1](grad) if self._rounded else grad @ self.weight
        return of_x.addmm_(grad_h, a), grad_h

    def to_masters(self, grad, grad_h, x, kept, factor=None):
        """Gradients to the masters, None where they are added to `sums`. With `factor` [in] the layers' input was x times factor."""
        if self._compiled:
            sums = self.sums or [m.new_zeros(m.shape, dtype=torch.float32) for m in kept[1]]
            self._compiled.to_masters(grad, grad_h, x, factor, *kept, sums)
            return [None] * len(sums) if self.sums else sums
        h, _, scales, *bs = kept
        grad_a = grad_h.T @ x
        if factor is not None:
            grad_a *= factor
        of_a = grad_a.split([b.shape[1] for b in bs])
        of_b = [torch.addmm(b, g.T, low, beta=0, alpha=scale)
                for g, low, b, scale in zip(grad.split(self.sizes, 1), self._parts(h, bs), bs, scales)]
        return [g for pair in zip(of_a, of_b) for g in pair]

    def backward(self, grad, x, kept, factor=None, need_x=True):
        """Gradients to x, or to x times `factor` where that was the layers' input, and to the masters."""
        grad_x, grad_h = self.to_input(grad, kept, need_x)
        return grad_x, self.to_masters(grad, grad_h, x, kept, factor)

    @staticmethod
    def _parts(h, bs):
        return h.split([b.shape[1] for b in bs], 1)


def _wider(x, many: int, few: int) -> bool:
    """Is a product with B or A beside W cheaper than one of its own, which reads and writes the `many` columns once more? On a GPU with
    so many rows that they outweigh copying W (LONG); on a CPU it would be the zeros' FLOP."""
    return x.is_cuda and many > few and len(x) >= LONG


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, training, *masters):  # x [T, in]
        y, ctx.kept = group.forward(x, masters, training=training)
        ctx.group = group
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad):
        grad_x, of_masters = ctx.group.backward(grad, *ctx.saved_tensors, ctx.kept, need_x=ctx.needs_input_grad[0])
        return grad_x, None, None, *of_masters


@contextlib.contextmanager
def watched(groups: list[Group]) -> Iterator[dict[Group, list[torch.Tensor]]]:
    """While the block runs, gather of each group that is trained what `round_weight` asks for, of its last pass."""
    found: dict[Group, list[torch.Tensor]] = {}

    def watch(group: Group) -> None:
        def forward(x, masters, residual=None, training=True):
            if training:
                found[group] = [x.float().square().mean(0).sqrt()]
            return Group.forward(group, x, masters, residual, training)

        def to_input(grad, kept, need_x=True):
            found[group].append(grad.float().square().mean(0).sqrt())
            return Group.to_input(group, grad, kept, need_x)

        group.forward, group.to_input = forward, to_input

    for each in groups:
        watch(each)
    try:
        yield found
    finally:
        for each in groups:
            del each.forward, each.to_input


def install(model: torch.nn.Module) -> list[Group]:
    """Exchange `forward` of every plain peft LoRA linear layer with one adapter and no dropout; a group for each of them."""
    found = [module for module in model.modules() if plain(module)]
    groups = [Group([module]) for module in found]
    for module, group in zip(found, groups):
        module.forward = _forward(group)
    return groups


def plain(module) -> bool:
    """Is it a peft LoRA linear layer with one adapter, a base that is frozen whole, and neither dropout nor DoRA?"""
    from peft.tuners.lora import Linear

    if type(module) is not Linear or len(module.active_adapters) != 1:
        return False
    name, base = module.active_adapters[0], module.get_base_layer()
    return (isinstance(module.lora_dropout[name], torch.nn.Identity) and not module.use_dora[name] and type(base) is torch.nn.Linear
            and not any(p.requires_grad for p in base.parameters()) and module.lora_B[name].bias is None)


def _forward(group: Group):
    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(group.weight.dtype)
        return _LoraLinear.apply(rows, group, torch.is_grad_enabled(), *group.masters).view(*x.shape[:-1], sum(group.sizes))

    return forward
