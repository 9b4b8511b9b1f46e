"""LoRA on vLLM's CPU build as one matrix product per adapter, instead of a copy of the adapter's weights per token.

vLLM's torch operators (vllm/lora/ops/torch_ops/lora_ops.py, read in 0.32) gather `weights[index of each token]`: at rank
32 on SmolLM2-135M that is 20 MB of copies a token in bfloat16, and index -1 (no adapter) takes the last slot's weights.
Here rows are grouped by adapter once per step. For the head it copies [vocabulary, rank] a token, 6 MB, also where no adapter
has one: such adapters are passed over. GPUs keep vLLM's own kernels.
"""

from __future__ import annotations

import inspect


def install() -> bool:
    """Make vLLM's CPU LoRA wrapper group rows by adapter; False, and nothing changed, where vLLM has moved it."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    except ImportError:
        return False
    names = lambda method: list(inspect.signature(method).parameters)
    first = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale"]
    if names(PunicaWrapperCPU.add_lora_linear)[:7] != [*first, "output_slices"] or names(PunicaWrapperCPU.add_lora_logits)[:6] != first:
        return False
    if PunicaWrapperCPU.add_lora_linear is not _add_lora_linear:
        inherited = PunicaWrapperCPU.update_metadata

        def update_metadata(self, *args, **kwargs):
            inherited(self, *args, **kwargs)
            self.arc_kernel_groups, self.arc_kernel_heads = _groups(self.token_lora_indices), _groups(self.sampler_indices)

        PunicaWrapperCPU.update_metadata = update_metadata
        PunicaWrapperCPU.add_lora_linear, PunicaWrapperCPU.add_lora_logits = _add_lora_linear, _add_lora_logits
    return True


def _groups(indices):
    """(slot, rows) for each adapter among per-token slots int64 [tokens]; rows without an adapter (-1) are in none.

    Rows are a slice where they are neighbours (a prefill), which spares gathering and scattering, else their indexes.
    """
    groups = []
    for slot in indices.unique().tolist():
        if slot >= 0:
            rows = (indices == slot).nonzero()[:, 0]
            first, last = int(rows[0]), int(rows[-1])
            groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups


def _add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **_):
    """y [tokens, out] += scale * x [tokens, in] @ A.T @ B.T, with A [slots, 1, rank, in] and B [slots, 1, slice, rank]."""
    for slot, rows in self.arc_kernel_groups:
        some, start = x[rows], 0
        for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices):
            _add(y[:, start:start + size], rows, some @ a[slot, 0].T, b[slot, 0], scale)
            start += size


def _add_lora_logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **_):
    """Logits y [prompts, vocabulary] += scale * x [prompts, hidden] @ A.T @ B.T, where an adapter has a head: its A is not zero."""
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    for slot, rows in self.arc_kernel_heads:
        if lora_a_stacked[slot].any():
            _add(y, rows, x[rows] @ lora_a_stacked[slot, 0].T, lora_b_stacked[slot, 0], scale)


def _add(y, rows, h, b, scale) -> None:
    """Rows of y [tokens, out] += scale * h [rows, rank] @ b.T."""
    if isinstance(rows, slice):
        y[rows].addmm_(h, b.T, alpha=scale)
    else:
        y[rows] = y[rows].addmm_(h, b.T, alpha=scale)
