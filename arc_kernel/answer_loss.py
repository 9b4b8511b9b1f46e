"""Cross entropy at the labelled positions, without ever holding logits [labels, vocabulary] of all of them.

Where the head is frozen, loss and gradient to the hidden states come from one pass over chunks of positions: the same two
matrix products, but the memory of a chunk. A head that is trained gets torch's own cross entropy.
Method: fused linear cross entropy, Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training".
"""

from __future__ import annotations

from typing import Callable
from weakref import WeakKeyDictionary

import torch

CHUNK = {"cpu": 3 << 22, "cuda": 3 << 24}  # logits at once: 50 MB in float32, and 200 MB where launches count
LOOKED_AT = 8  # tokens by which it is told whether a model's logits are its head's products
_plain: WeakKeyDictionary = WeakKeyDictionary()  # model: what was found


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):  # hidden [n, d], weight [vocabulary, d], labels int64 [n]
        each, grad = hidden.new_empty(len(labels), dtype=torch.float32), torch.empty_like(hidden, dtype=torch.float32)
        total, chunk = hidden.new_zeros((), dtype=torch.float32), max(1, CHUNK[hidden.device.type] // len(weight))
        for start in range(0, len(labels), chunk):
            rows, wanted = hidden[start:start + chunk], labels[start:start + chunk, None]
            p = torch.nn.functional.linear(rows, weight, bias).softmax(-1, dtype=torch.float32)
            lost = -p.gather(1, wanted).clamp_min_(torch.finfo(p.dtype).tiny).log_()  # 87 nats at most; the gradient is exact
            each[start:start + chunk] = lost[:, 0]
            total += lost.sum()
            p.scatter_add_(1, wanted, torch.full_like(lost, -1.0))
            grad[start:start + chunk] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(each)
        ctx.dtype = hidden.dtype
        return total, each

    @staticmethod
    def backward(ctx, grad_total, _):
        (grad,) = ctx.saved_tensors
        return (grad * grad_total).to(ctx.dtype), None, None, None


def plain_head(model, ids: torch.Tensor) -> bool:
    """Whether the logits of a causal language model are its head's products with what its decoder gives, and nothing more, seen on ids
    int64 [B, T]. Some scale or cap them, or have a layer between the two: their configs have no common word for it."""
    if model not in _plain:
        training = model.training
        model.eval()  # without dropout
        with torch.no_grad():
            asked = {"input_ids": ids[:1, :LOOKED_AT], "use_cache": False}
            mine, wanted = model.get_output_embeddings()(_decoder(model)(**asked)[0]).float(), model(**asked).logits.float()
        _plain[model] = mine.shape == wanted.shape and torch.allclose(mine, wanted, 1e-3, 1e-3, equal_nan=True)
        model.train(training)
    return _plain[model]


def _decoder(model) -> torch.nn.Module:
    """What gives a causal language model its hidden states. `base_model` alone is not it: of transformers 4.57's Gemma 3 for text, whose
    prefix is that of the model with images, it is the language model itself."""
    return getattr(model, "model", model.base_model)


def answer_losses(model, ids: torch.Tensor, labels: torch.Tensor,
                  decoder: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of the cross entropy (nats, float32) over the labels of a batch, that of each label [n] without a gradient, and the
    row each belongs to, int64 [n].

    `ids` and `labels` (negative: no loss) are int64 [B, T], padded on the right without a mask: in a causal model no token sees
    what follows. `model` is a causal language model of transformers; where its logits are not its head's (`plain_head`), they are
    taken from the model whole. `decoder` gives hidden states [n, d] of ids, rows and positions in the model's place.
    """
    rows, at = (labels[:, 1:] >= 0).nonzero(as_tuple=True)  # position t predicts token t + 1
    wanted = labels[rows, at + 1]
    if not plain_head(model, ids):
        kept = at.unique()
        logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
        logits = logits[rows, torch.searchsorted(kept, at) if logits.shape[1] == len(kept) else at]  # some models give all of them
    else:
        hidden = decoder(ids, rows, at) if decoder else _decoder(model)(input_ids=ids, use_cache=False)[0][rows, at]
        head = model.get_output_embeddings()
        if type(head) is torch.nn.Linear and not head.weight.requires_grad:  # a head with a LoRA shows its base's weight
            return *_HeadLoss.apply(hidden.to(head.weight.dtype), head.weight, head.bias, wanted), rows
        with torch.autocast(hidden.device.type, hidden.dtype, enabled=hidden.dtype != torch.float32):  # what is trained of it is float32
            logits = head(hidden)
    each = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    return each.sum(), each.detach(), rows
