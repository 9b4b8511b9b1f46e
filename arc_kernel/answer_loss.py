"""Cross entropy at the labelled positions, without ever holding logits [labels, vocabulary] of all of them.

The head is frozen, so loss and gradient to the hidden states come from one pass over chunks of positions: the same two matrix
products, but the memory of a chunk. Method: fused linear cross entropy, Hsu et al. 2024, "Liger
Kernel: Efficient Triton Kernels for LLM Training".
"""

from __future__ import annotations

import torch

CHUNK = 256  # positions: at 49,152 tokens a chunk's float32 logits are 50 MB
FACTORS = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # config fields of models that change logits after the head


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):  # hidden [n, d], weight [vocabulary, d], labels int64 [n]
        total, grad = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden, dtype=torch.float32)
        for start in range(0, len(labels), CHUNK):
            rows, wanted = hidden[start:start + CHUNK], labels[start:start + CHUNK, None]
            logits = torch.nn.functional.linear(rows, weight, bias).float()
            log_total = logits.logsumexp(-1, keepdim=True)
            total += (log_total - logits.gather(1, wanted)).sum()
            p = logits.sub_(log_total).exp_()
            p.scatter_add_(1, wanted, torch.full_like(log_total, -1.0))
            grad[start:start + CHUNK] = p.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return total / len(labels)

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return (grad * (grad_loss / len(grad))).to(ctx.dtype), None, None, None


def answer_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy (nats, float32) of labels int64 [T] (negative: no loss) on ids int64 [T].

    `model` is a causal language model of transformers with a frozen head; where its config changes logits after the head,
    they are taken from the model whole.
    """
    at, wanted = positions(labels)
    if any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in FACTORS):
        logits = model(input_ids=ids[None], logits_to_keep=at).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), wanted)
    head = model.get_output_embeddings()
    hidden = model.base_model(input_ids=ids[None], use_cache=False)[0][0, at]
    return _HeadLoss.apply(hidden.to(head.weight.dtype), head.weight, head.bias, wanted)


def positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is labelled, int64 [n], and those labels: position t predicts token t + 1."""
    at = (labels[1:] >= 0).nonzero()[:, 0]
    return at, labels[1:][at]
