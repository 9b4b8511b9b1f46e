"""A longer context through rope theta.

Knows configs only; no weight changes.
"""

from __future__ import annotations

from ..checkpoint import head_size
from ..errors import ArcKernelError
from ..rope import by_layer, names_of, theta_of
from .draft import Draft


def ntk_theta(theta: float, scale: float, head_size: int) -> float:
    """The rope theta for a context `scale` times as long: theta * scale^(d / (d - 2)), d the rotated dimensions of a head.

    The slowest pair of dimensions then turns `scale` times slower, as interpolation of positions would have it, the fastest
    as before. Source: bloc97, "NTK-Aware Scaled RoPE" (reddit.com/r/LocalLLaMA, June 2023); Peng et al. 2023, YaRN
    (arXiv 2309.00071), section 3.1.
    """
    return theta * scale ** (head_size / (head_size - 2))


def window_of(config: dict) -> int | None:
    """Tokens a layer with a sliding window looks back; None where no layer has one (Qwen2's configs name one and turn it off)."""
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


def stretch(draft: Draft, context: int, theta: float) -> None:
    """Set a context of `context` tokens with rope theta `theta` (0: by the NTK-aware rule where the context grows).

    Raises ArcKernelError where the config has no context, several thetas, or a rope that is scaled otherwise already.
    """
    config = draft.config
    where, before, old = draft.source / "config.json", config.get("max_position_embeddings"), theta_of(config)
    if not before:
        raise ArcKernelError(f"{where}: no max_position_embeddings, so nothing to stretch: leave out --context")
    if by_layer(config):
        raise ArcKernelError(f"{where}: several rope thetas, by kind of layer: leave out --context and --rope-theta")
    kind = (config.get("rope_scaling") or {}).get("rope_type") or (config.get("rope_scaling") or {}).get("type")
    if kind not in (None, "default"):
        raise ArcKernelError(f"{where}: rope is scaled already ({kind}): leave out --context")
    name, share = names_of(config)
    d = int(head_size(config) * float(config.get(share) or 1))
    new, why = theta or old, "as asked" if theta else "unchanged"
    if not theta and context > before:
        new, why = ntk_theta(old, context / before, d), f"NTK-aware: {old:g} * {context / before:g}^({d}/{d - 2})"
    config |= {"max_position_embeddings": context, name: new, "rope_scaling": None}
    config.pop("rope_parameters", None)
    draft.tokenizer["model_max_length"] = context
    draft.report.append(f"context: {before} -> {context} tokens, rope theta {old:g} -> {new:g} ({why})")
    if window := window_of(config):
        layers = config["num_hidden_layers"]
        draft.report.append(f"sliding window: stays {window}: a layer looks {window} tokens back, "
                            f"all {layers} of them together at most {window * layers}")
