"""Exact rescaling: the same function with smaller activations, by powers of two, so that float16 can hold it.

A decoder with RMSNorms does not care how large its residual stream is, as long as everything that writes into the stream
shrinks alike and the norms' epsilon follows; its MLP does not care how large up * gate is, as long as down undoes it; its
attention does not care how large the values are, as long as o undoes it. Powers of two leave every mantissa as it is.
What is checked by `underflow` is the one thing that is not exact: weights that get too small for float16.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import safe_open

from ..checkpoint import WEIGHTS, copy_texts, load_model, read_config, weight_shapes, weight_tensors
from ..errors import ArcKernelError
from ..files import whole_folder, write_json
from ..memory import free_memory
from ..prompts import Example
from .probe import LIMIT, NORMAL, Ranges, label_logits, largest, small_weights

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose weights all stand in `Rescale.exponent`
FIXED_HEADROOM = 1.0  # bits that must be free at a site nothing scales: other prompts go a little higher than the probe's
ROOM = 3.0  # bits of a layer's median weight above float16's smallest normal number that `balance` looks after
TOLERANCE = 0.05  # largest change of a logit that weights lost to float16's underflow may cause
STREAM = ("embedding", "o", "down", "input_layernorm in", "post_attention_layernorm in", "final norm in")
VALUE, PRODUCT = ("v", "attention"), ("up", "gate*up")
QUERY_KEY = ("q", "k", "q_norm in", "k_norm in")  # they follow the stream where a norm comes behind them
IN_FLOAT32 = ("scores",)  # attention kernels keep scores in float32 whatever the dtype
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)")


class Refused(ArcKernelError):
    """The model, or this much of it, cannot be rescaled; the message says which part forbids it."""


@dataclass(frozen=True)
class Rescale:
    """Exponents: the residual stream times 2**-residual, and per layer gate*up times 2**-product, values times 2**-value.

    `tied`: the head is the embedding; `untie` gives it weights of its own, where the final norm's output could not take
    2**residual. `qk_norm`: q and k are normed.
    """

    residual: int
    product: tuple[int, ...]
    value: tuple[int, ...]
    tied: bool
    untie: bool
    qk_norm: bool

    def __str__(self) -> str:
        inner = [f"{what} up to 2^-{max(row)} (layer {row.index(max(row))})"
                 for what, row in (("gate*up", self.product), ("values", self.value)) if any(row)]
        return "rescaled: " + ", ".join([f"residual stream 2^-{self.residual}", *inner, *(["head untied"] if self.untie else [])])

    @property
    def identity(self) -> bool:
        """Whether nothing is scaled."""
        return not (self.residual or any(self.product) or any(self.value))

    def exponent(self, name: str) -> int:
        """The power of two by which the weight of this name is multiplied; raises Refused for a name it does not know."""
        k, shared = self.residual, self.tied and not self.untie
        whole = {"model.embed_tokens.weight": -k, "model.norm.weight": k if shared else 0, "lm_head.weight": -k if shared else 0}
        if name in whole:
            return whole[name]
        match = _LAYER.fullmatch(name)
        if match:
            layer, module, kind = int(match[1]), match[2], match[3]
            m, j = self.product[layer], self.value[layer]
            query_key = -k if self.qk_norm else 0
            known = {"input_layernorm": 0, "post_attention_layernorm": 0, "q_norm": 0, "k_norm": 0, "gate_proj": 0,
                     "q_proj": query_key, "k_proj": query_key, "v_proj": -j, "up_proj": -m,
                     "o_proj": -k + (j if kind == "weight" else 0), "down_proj": -k + (m if kind == "weight" else 0)}
            if module in known and not (kind == "bias" and module.endswith("norm")):
                return known[module]
        raise Refused(f"weight {name} is not known to the rescaling")

    def site_exponent(self, site: str, layer: int) -> int:
        """The power of two by which an activation site of a layer is multiplied."""
        if site in STREAM or (site in QUERY_KEY and self.qk_norm):
            return -self.residual
        if site == "final norm out":
            return self.residual if self.tied and not self.untie else 0
        return -self.product[layer] if site in PRODUCT else -self.value[layer] if site in VALUE else 0

    def scaled(self, peaks: dict[str, list[float]], back: bool = False) -> dict[str, list[float]]:
        """Peaks as they are after this rescaling (`back`: as they were before it)."""
        sign = -1 if back else 1
        return {site: [p * 2.0 ** (sign * self.site_exponent(site, i)) for i, p in enumerate(row)] for site, row in peaks.items()}

    def to_json(self) -> dict:
        """As a value for JSON; `Rescale(**value)` with lists as tuples is the inverse, `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "Rescale":
        """The inverse of `to_json`."""
        return cls(**value | {"product": tuple(value["product"]), "value": tuple(value["value"])})


def unscaled(folder: Path) -> Rescale:
    """The rescaling of a model folder that scales nothing, with the facts of its architecture.

    Raises Refused with the reason where the architecture cannot be rescaled.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError:
        raise Refused(f"transformers has no code of its own for model type {read_config(folder).get('model_type')}") from None
    names = weight_shapes(folder)
    multipliers = [k for k, v in config.to_dict().items()
                   if re.search(r"(_multipliers?|^logits_scaling|^logit_scale|^scale_\w+)$", k) and v not in (None, 1, 1.0, False)]
    if multipliers:
        raise Refused(f"{config.model_type}: config has {', '.join(multipliers)}, a factor inside the stream")
    if "gemma" in config.model_type:
        raise Refused(f"{config.model_type}: its norms multiply by 1 + weight, which no power of two scales exactly")
    if any(hasattr(config, k) for k in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")):
        raise Refused(f"{config.model_type}: LayerNorm, not RMSNorm")
    if config.model_type not in ARCHITECTURES:
        raise Refused(f"model type {config.model_type}: the rescaling knows {', '.join(ARCHITECTURES)}")
    if getattr(config, "quantization_config", None):
        raise Refused(f"{config.model_type}: weights are quantized")
    none = (0,) * config.num_hidden_layers
    made = Rescale(0, none, none, bool(config.tie_word_embeddings), False, any(".q_norm." in n for n in names))
    for name in names:
        made.exponent(name)
    return made


def plan(ranges: Ranges, base: Rescale, headroom: float) -> Rescale:
    """The smallest exponents that leave `headroom` bits free at every site that can be scaled.

    Raises Refused where a site nothing scales has less than FIXED_HEADROOM bits, naming it.
    """
    layers = len(base.product)
    stream = [*STREAM, *(QUERY_KEY if base.qk_norm else ())]
    found = replace(base, residual=max(_need(ranges.peaks.get(s, [0.0]), headroom) for s in stream),
                    product=tuple(max(_need([ranges.peaks[s][i]], headroom) for s in PRODUCT) for i in range(layers)),
                    value=tuple(max(_need([ranges.peaks[s][i]], headroom) for s in VALUE) for i in range(layers)))
    if base.tied and max(found.scaled(ranges.peaks)["final norm out"]) * 2**FIXED_HEADROOM > LIMIT:
        found = replace(found, untie=True)
    reason = overflows(found.scaled(ranges.peaks))
    if reason:
        raise Refused(reason + ("" if "not finite" in reason else ", and nothing scales it exactly"))
    return found


def weight_sizes(folder: Path) -> dict[tuple[int, str], float]:
    """log2 of the median magnitude of each layer's v, o, up and down weights, by layer and module name."""
    sizes = {}
    for name, tensor in weight_tensors(folder):
        if name.endswith(("v_proj.weight", "o_proj.weight", "up_proj.weight", "down_proj.weight")):
            match = _LAYER.fullmatch(name)
            some = tensor.flatten()[:: max(1, tensor.numel() // 10_000)].float().abs()
            sizes[int(match[1]), match[2]] = math.log2(max(float(some.median()), 2.0**-126))
    return sizes


def balance(sizes: dict[tuple[int, str], float], made: Rescale) -> Rescale:
    """`made` with larger exponents inside a layer where its output weights, of these sizes, get too small for float16.

    o and down carry 2**-residual, and a model may bring them small; what they gain by a larger `value` or `product` exponent
    is taken from v and up, as long as those keep ROOM bits themselves, or halfway where there is not enough for both.
    """
    floor, grown = math.log2(NORMAL) + ROOM, {"value": list(made.value), "product": list(made.product)}
    for which, source, sink in (("value", "v_proj", "o_proj"), ("product", "up_proj", "down_proj")):
        for layer in range(len(made.value)):
            lacks = floor - sizes[layer, sink] + made.residual - grown[which][layer]
            spare = sizes[layer, source] - grown[which][layer] - floor
            if lacks > 0:
                grown[which][layer] += max(0, math.ceil(lacks if spare >= lacks else (lacks + spare) / 2))
    return replace(made, value=tuple(grown["value"]), product=tuple(grown["product"]))


def overflows(peaks: dict[str, list[float]]) -> str:
    """The first site with less than FIXED_HEADROOM bits to float16's limit, in words; empty where there is none."""
    for site, row in peaks.items():
        worst = largest(row)
        if not math.isfinite(row[worst]):
            return f"{site} of layer {worst} is not finite even in float32"
        if site not in IN_FLOAT32 and row[worst] * 2**FIXED_HEADROOM > LIMIT:
            return f"{site} of layer {worst} peaks at {row[worst]:,.0f} of float16's {LIMIT:,.0f}"
    return ""


def _need(peaks: list[float], headroom: float) -> int:
    """The exponent that brings the largest peak `headroom` bits under the limit; 0 where it is not finite, see `overflows`."""
    peak = peaks[largest(peaks)]
    return max(0, math.ceil(math.log2(peak * 2**headroom / LIMIT))) if peak and math.isfinite(peak) else 0


def write_model(source: Path, rescale: Rescale, target: Path) -> None:
    """Write the rescaled model as folder `target`, the exponents in its precision.json.

    Weights keep their dtype, and every mantissa; float16 weights are written as float32, whose range cannot lose them.
    Raises Refused where a scaled weight is not exactly the old one times a power of two.
    """
    import torch
    from safetensors.torch import save_file

    with whole_folder(target) as fresh:
        copy_texts(source, fresh)
        config = read_config(source)
        config["rms_norm_eps"] = config.get("rms_norm_eps", 1e-6) * 4.0**-rescale.residual  # transformers' where it is not said
        tensors, embedding = {}, None
        for name, tensor in weight_tensors(source):
            if tensor.dtype == torch.float16:
                tensor, config["torch_dtype"] = tensor.float(), "float32"
            embedding = tensor if name == "model.embed_tokens.weight" else embedding
            tensors[name] = shift(tensor, rescale.exponent(name), name)
        if rescale.tied and rescale.untie:
            tensors["lm_head.weight"], config["tie_word_embeddings"] = embedding, False
        save_file(tensors, fresh / WEIGHTS.replace("*", ""), metadata={"format": "pt"})
        write_json(fresh / "config.json", config)
        write_json(fresh / "precision.json", {"rescale": rescale.to_json()})


def shift(tensor, exponent: int, name: str):
    """tensor * 2**exponent in its own dtype; raises Refused where that is not exact."""
    if not exponent:
        return tensor
    made = tensor * 2.0**exponent
    if not (made * 2.0**-exponent).equal(tensor) and not tensor.isnan().any():
        raise Refused(f"weight {name} times 2**{exponent} leaves the range of {str(tensor.dtype).removeprefix('torch.')}")
    return made


def underflow(source: Path, target: Path, made: list[Example], device: str) -> dict:
    """What float16 loses of a rescaled model's weights: shares flushed and kept with fewer bits, and what that does.

    `logit_change` is the largest difference of a label's logits in float32 between the source model and the target with
    its weights rounded to float16, over the examples.
    """
    import torch

    model = load_model(source, "float32", device)
    wanted = [label_logits(model, example, device) for example in made]
    del model
    free_memory()
    model = load_model(target, "float32", device)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float16).float()
    change = max(float((label_logits(model, e, device) - w).abs().max()) for e, w in zip(made, wanted))
    weights = small_weights(target)
    return {"logit_change": change, "flushed": weights["flushed"], "subnormal": weights["subnormal"]}


PLAIN_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")  # peft's names


def require_plain_lora(adapter: Path) -> None:
    """Raises Refused for an adapter folder with anything but plain LoRA weights, which no power of two makes fit for rescaled weights."""
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as weights:
        others = [name for name in weights.keys() if not PLAIN_LORA.fullmatch(name)]
    if others:
        raise Refused(f"{adapter}: {others[0]}: only plain LoRA weights are rescaled")


def convert_adapter(source: Path, target: Path, rescale: Rescale) -> None:
    """Write the LoRA in folder `source`, made for the original weights, for the rescaled ones as `target`.

    A layer's B @ A is scaled like its weight, half of the exponent in A and half in B, so that neither gets too small for
    float16. Raises Refused for adapters with anything but plain LoRA weights.
    """
    from safetensors.torch import load_file, save_file

    require_plain_lora(source)
    tensors = {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        match = PLAIN_LORA.fullmatch(name)
        exponent = rescale.exponent(f"{match[1]}.weight")
        half = exponent // 2 if match[2] == "A" else exponent - exponent // 2
        tensors[name] = shift(tensor, half, name)
    target.mkdir(parents=True)
    shutil.copy(source / "adapter_config.json", target)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
