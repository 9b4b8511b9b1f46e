"""OpenELM as a Qwen3-layout model: the same function, its narrow layers padded with zeros to the widest.

apple/OpenELM-* have no code in transformers or vLLM. They are pre-norm transformers with RMS norms, q and k normed per head
before rope, grouped queries and a gated feed-forward, as Qwen3 is; only the number of heads and the feed-forward size go by
layer. A head of zeros has zero values and meets zero columns of o_proj, a feed-forward unit of zeros zero columns of
down_proj: neither adds anything.

Source: Mehta et al. 2024 (arXiv 2404.14619) and the names and shapes in huggingface.co/apple/OpenELM-270M.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

from ..checkpoint import missing_tensors, weight_shapes
from ..errors import ArcKernelError
from .draft import Draft, Weights

EPSILON = 1e-6  # of every norm in OpenELM's code; its config does not say
EXPECTED = {"normalize_qk_projections": True, "ffn_with_glu": True, "activation_fn_name": "swish", "normalization_layer_name": "rms_norm"}
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype", "use_cache", "vocab_size", "_name_or_path")
LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
PLAIN = {"transformer.token_embeddings.weight": "model.embed_tokens.weight", "transformer.norm.weight": "model.norm.weight",
         "lm_head.weight": "lm_head.weight"}
IN_LAYER = {"attn.q_norm.weight": "self_attn.q_norm.weight", "attn.k_norm.weight": "self_attn.k_norm.weight",
            "attn_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight"}
FUSED = ("attn.qkv_proj.weight", "attn.out_proj.weight", "ffn.proj_1.weight", "ffn.proj_2.weight")


def convert(draft: Draft) -> None:
    """Turn the draft of an OpenELM checkpoint into one of a Qwen3 model of equal logits; the report says what padding costs.

    Raises ArcKernelError where the config asks for what this layout does not have, and where a tensor is missing or has
    another shape.
    """
    config, where = draft.config, draft.source / "config.json"
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            raise ArcKernelError(f"{where}: {key} is {config[key]!r}, only {value!r} is imported: take a published OpenELM")
    try:
        shape = {"hidden_size": config["model_dim"], "head_dim": config["head_dim"], "num_hidden_layers": config["num_transformer_layers"],
                 "max_position_embeddings": config["max_context_length"]}
        q_heads, kv_heads = _by_layer(config, "num_query_heads"), _by_layer(config, "num_kv_heads")
        tied = bool(config["share_input_output_layers"])
    except KeyError as missing:
        raise ArcKernelError(f"{where}: no {missing.args[0]}: take config.json as published") from None
    shapes = weight_shapes(draft.source)
    _check(draft.source, shapes, shape, q_heads, kv_heads, tied)
    units = max(shapes[f"transformer.layers.{i}.ffn.proj_2.weight"][1] for i in range(shape["num_hidden_layers"]))
    kv, group = max(kv_heads), max(q // k for q, k in zip(q_heads, kv_heads))
    before = sum(map(math.prod, shapes.values()))
    draft.config = {k: config[k] for k in KEPT if k in config} | shape | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": units, "num_attention_heads": kv * group,
        "num_key_value_heads": kv, "hidden_act": "silu", "rms_norm_eps": EPSILON, "attention_bias": False, "attention_dropout": 0.0,
        "rope_theta": float(config.get("rope_freq_constant", 10_000)), "use_sliding_window": False, "tie_word_embeddings": tied,
        "full_parameters": before}
    draft.stages.append(functools.partial(_translated, q_heads=q_heads, kv_heads=kv_heads, kv=kv, group=group, units=units,
                                          head=shape["head_dim"]))
    layer = shape["head_dim"] * shape["hidden_size"] * (2 * kv * group + 2 * kv) + 3 * units * shape["hidden_size"]
    own = sum(math.prod(s) for n, s in shapes.items() if n.endswith(FUSED))
    after = before - own + layer * shape["num_hidden_layers"]
    draft.report.append("architecture: OpenELM -> Qwen3ForCausalLM, equal logits: "
                        f"{min(q_heads)}-{max(q_heads)} heads padded to {kv * group}, "
                        f"{min(kv_heads)}-{max(kv_heads)} key/value heads to {kv}, feed-forward to {units}: "
                        f"{before / 1e6:.1f}M -> {after / 1e6:.1f}M weights, {after / before - 1:.0%} more, all zeros")


def _by_layer(config: dict, key: str) -> list[int]:
    value, layers = config[key], config["num_transformer_layers"]
    return list(value) if isinstance(value, list) else [value] * layers


def _check(source: Path, shapes: dict, shape: dict, q_heads: list[int], kv_heads: list[int], tied: bool) -> None:
    """Raise ArcKernelError where a tensor is missing, or its shape is not what the config says."""
    hidden, head, layers = shape["hidden_size"], shape["head_dim"], shape["num_hidden_layers"]
    names = [n for n in PLAIN if not (tied and n.startswith("lm_head"))]
    names += [f"transformer.layers.{i}.{n}" for i in range(layers) for n in (*IN_LAYER, *FUSED)]
    if missing := [n for n in names if n not in shapes]:
        raise missing_tensors(source, missing, "OpenELM")
    if len(q_heads) != layers or len(kv_heads) != layers or any(q % k for q, k in zip(q_heads, kv_heads)):
        raise ArcKernelError(f"{source / 'config.json'}: num_query_heads and num_kv_heads do not give {layers} layers of whole groups: "
                             "take it as published")
    for i, (q, k) in enumerate(zip(q_heads, kv_heads)):
        units = shapes[f"transformer.layers.{i}.ffn.proj_2.weight"][1]
        for part, wanted in zip(FUSED, ([(q + 2 * k) * head, hidden], [hidden, q * head], [2 * units, hidden], [hidden, units])):
            name = f"transformer.layers.{i}.{part}"
            if shapes[name] != wanted:
                raise ArcKernelError(f"{source}: tensor {name} has shape {shapes[name]}, config.json says {wanted}: copy the model again")


def _translated(weights: Weights, q_heads: list[int], kv_heads: list[int], kv: int, group: int, units: int, head: int) -> Weights:
    """The stream under Qwen3's names: fused projections split, heads and units padded to `kv` x `group` heads and `units`."""
    for name, tensor in weights:
        match = LAYER.fullmatch(name)
        if not match:
            yield PLAIN.get(name, name), tensor
            continue
        layer, part = int(match[1]), match[2]
        into, q, k = f"model.layers.{layer}.", q_heads[layer], kv_heads[layer]
        if part in IN_LAYER:
            yield into + IN_LAYER[part], tensor
        elif part == "attn.qkv_proj.weight":  # [heads of q, then k, then v, each of `head` rows]
            parts = tensor.split([q * head, k * head, k * head])
            yield into + "self_attn.q_proj.weight", _placed(parts[0], _query_rows(q, k, group, head), kv * group * head)
            for side, rows in zip("kv", parts[1:]):
                yield f"{into}self_attn.{side}_proj.weight", _placed(rows, range(len(rows)), kv * head)
        elif part == "attn.out_proj.weight":
            yield into + "self_attn.o_proj.weight", _placed(tensor.T, _query_rows(q, k, group, head), kv * group * head).T
        elif part == "ffn.proj_1.weight":  # [gate, then up]
            for side, rows in zip(("gate", "up"), tensor.chunk(2)):
                yield f"{into}mlp.{side}_proj.weight", _placed(rows, range(len(rows)), units)
        elif part == "ffn.proj_2.weight":
            yield into + "mlp.down_proj.weight", _placed(tensor.T, range(tensor.shape[1]), units).T
        else:
            yield name, tensor


def _query_rows(q: int, k: int, group: int, head: int) -> list[int]:
    """Where the rows of a layer's `q` query heads go: those that share a key/value head stay with it.

    OpenELM repeats each key/value head for q / k queries in a row (repeat_interleave), the padded model for `group`.
    """
    own = q // k
    return [((h // own) * group + h % own) * head + row for h in range(q) for row in range(head)]


def _placed(tensor, rows, size: int):
    """A tensor [size, ...] of zeros with `tensor`'s rows at `rows`."""
    wide = tensor.new_zeros(size, *tensor.shape[1:])
    wide[list(rows)] = tensor
    return wide
