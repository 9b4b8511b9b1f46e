"""Norms of vLLM's CPU build as one operator each, instead of six to eight of torch's.

vLLM has the operator for CPUs too, but asks for it on GPUs only (vllm/kernels/vllm_c.py, read in 0.32).
"""

from __future__ import annotations

from . import cpu_operators

WIDTH = 8  # what the operators take is a multiple of it


def install() -> None:
    """Exchange the forward of vLLM's RMSNorm on a CPU; nothing changes where there is no such class or operator."""
    try:
        from vllm.model_executor.layers.layernorm import RMSNorm
    except ImportError:
        return
    if hasattr(RMSNorm, "forward_cpu") and not cpu_operators.load() and all(map(cpu_operators.has, ("rms_norm", "fused_add_rms_norm"))):
        RMSNorm.forward_cpu = _forward


def _forward(self, x, residual=None):
    """The norm of x [..., d], or of x + residual, and then that sum, too: in their memory, as on a GPU."""
    import torch

    weight = getattr(self, "weight", None)
    others = [t for t in (x, residual) if t is not None]
    if (weight is None or self.variance_size_override is not None or x.shape[-1] % WIDTH
            or not all(t.is_contiguous() and t.dtype == weight.dtype for t in others)):
        return self.forward_native(x, residual)
    if residual is None:
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, weight.data, self.variance_epsilon)
        return out
    torch.ops._C.fused_add_rms_norm(x, residual, weight.data, self.variance_epsilon)
    return x, residual
