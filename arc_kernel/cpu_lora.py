"""LoRA on vLLM's CPU build as one matrix product per adapter, instead of a copy of the adapter's weights per token.

vLLM's torch operators (vllm/lora/ops/torch_ops/lora_ops.py, read in 0.32) gather `weights[index of each token]`: at rank
32 on SmolLM2-135M that is 20 MB of copies a token in bfloat16, and index -1 (no adapter) takes the last slot's weights.
Here rows are grouped by adapter once per step. GPUs keep vLLM's own kernels.
"""

from __future__ import annotations

import inspect


def install() -> bool:
    """Make vLLM's CPU LoRA wrapper group rows by adapter; False, and nothing changed, where vLLM has moved it."""
    try:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    except ImportError:
        return False
    names = list(inspect.signature(PunicaWrapperCPU.add_lora_linear).parameters)
    if names[:7] != ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]:
        return False
    if PunicaWrapperCPU.add_lora_linear is not _add_lora_linear:
        inherited = PunicaWrapperCPU.update_metadata

        def update_metadata(self, *args, **kwargs):
            inherited(self, *args, **kwargs)
            self.arc_kernel_groups = _groups(self.token_lora_indices)

        PunicaWrapperCPU.update_metadata = update_metadata
        PunicaWrapperCPU.add_lora_linear = _add_lora_linear
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
            h, part = some @ a[slot, 0].T, y[:, start:start + size]
            if isinstance(rows, slice):
                part[rows].addmm_(h, b[slot, 0].T, alpha=scale)
            else:
                part[rows] = part[rows].addmm_(h, b[slot, 0].T, alpha=scale)
            start += size
