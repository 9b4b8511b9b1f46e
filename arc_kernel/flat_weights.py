"""The weights of a LoRA as one tensor: one update, one norm, one cast, instead of one for each of 420 small matrices.

A method of FSDP's (Zhao et al. 2023, "PyTorch FSDP", flat parameters), used here for the number of launches, not for sharding.
"""

from __future__ import annotations

import contextlib

import torch

from .lora_linear import Group


class FlatWeights:
    """`tensor`, float32 [all weights], of which each trained parameter becomes a view, and its gradient one of `tensor.grad`.

    Both stay where they are (CUDA graphs write to them): a gradient is zeroed (`zero_grad`), never dropped.
    """

    def __init__(self, weights: list[torch.nn.Parameter], groups: list[Group]):
        self.tensor = torch.nn.Parameter(torch.cat([w.detach().flatten() for w in weights]))
        self.tensor.grad = torch.zeros_like(self.tensor)
        self._weights, self._shapes, self._sizes = weights, [w.shape for w in weights], [w.numel() for w in weights]
        for weight, data in zip(weights, self.tensor.detach().split(self._sizes)):
            weight.data = data.view(weight.shape)
        self.zero_grad()
        number = {id(w): i for i, w in enumerate(weights)}
        self._groups = [(group, group.masters, [number[id(w)] for w in group.masters]) for group in groups]
        for group in groups:  # which may add gradients up there by itself
            group.sums = [w.grad for w in group.masters]

    def zero_grad(self) -> None:
        """Zero the gradient, and give each trained parameter its view of it back, also where somebody dropped it."""
        self.tensor.grad.zero_()
        for weight, grad in zip(self._weights, self.tensor.grad.split(self._sizes)):
            weight.grad = grad.view(weight.shape)

    def views(self, tensor: torch.Tensor) -> dict[Group, list[torch.Tensor]]:
        """Of each group its masters as they lie in a tensor like this one."""
        views = [v.view(shape) for v, shape in zip(tensor.split(self._sizes), self._shapes)]
        return {group: [views[i] for i in at] for group, _, at in self._groups}

    @contextlib.contextmanager
    def cast(self, dtype: torch.dtype, leaf: torch.Tensor | None = None):
        """Have the layers of `groups` read their A and B as views of one copy of `tensor` in this dtype, with its gradient; or of
        `leaf`, another tensor on the same memory."""
        source = self.tensor if leaf is None else leaf
        for group, views in self.views(source.to(dtype)).items():
            group.masters = views
        try:
            yield
        finally:
            for group, masters, _ in self._groups:
                group.masters = masters
