"""The range probe: how large every activation of a model gets on real ARC prompts, and how small its weights are.

A forward pass under `recording` keeps one number per site and layer, the largest magnitude seen; activations themselves
are dropped as the pass goes on. float16 holds up to 65,504; whatever passes it becomes inf, and NaN one operation later.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np

from ..adapter_fit import open_adapter
from ..checkpoint import load_model, weight_tensors
from ..errors import ArcKernelError
from ..prompts import IGNORED, Example, PromptBuilder
from ..tasks import Pair, Task, cells
from ..views import View, random_view, task_rng

LIMIT = 65504.0  # largest finite float16 (IEEE 754 binary16)
NORMAL = 2.0**-14  # smallest float16 with all 11 bits of its mantissa
FLUSHED = 2.0**-25  # float16 rounds this and everything below it to zero
PROBE_TOKENS = 1024  # of the longest example; activations hardly grow with length, seconds do (docs/precision.md)
PROBE_CELLS = 800  # of a task that is likely to fit into them without losing more than a pair
ATTENTION = "arc_kernel_probe"  # the name under which transformers is given the attention that records scores
QUERIES = 256  # rows of attention scores that exist at a time

# Sites by the projection whose input or output they are. Everything else is the input or output of a norm.
LAYOUT = ("embed_tokens", "layers", "norm")  # of a decoder, `model` in a causal language model
INPUTS = {"o_proj": "attention", "down_proj": "gate*up"}
OUTPUTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass(frozen=True)
class Ranges:
    """What a probe saw: `peaks[site]` the largest magnitude per layer (one entry where a site has no layers).

    `weights` has `smallest` (non-zero magnitude), `flushed` and `subnormal` (shares of all weights that float16 would
    round to zero, or keep with fewer bits). `tokens` is how many tokens were looked at.
    """

    peaks: dict[str, list[float]]
    weights: dict[str, float]
    tokens: int

    def rows(self) -> list[dict]:
        """Per site: the layer of the peak, the peak, and log2 of the headroom to float16's limit (negative: overflows)."""
        return [{"site": site, "layer": (i := largest(p)), "peak": p[i], "headroom": headroom(p[i])} for site, p in self.peaks.items()]

    def with_peaks(self, others: list[dict[str, list[float]]]) -> "Ranges":
        """These ranges, raised to the peaks of others (a task's adapter has some of the sites)."""
        peaks = {site: [max(values) for values in zip(p, *(o[site] for o in others if site in o))] for site, p in self.peaks.items()}
        return Ranges(peaks, self.weights, self.tokens)


def largest(row: list[float]) -> int:
    """The index of the largest value; of a NaN where there is one."""
    return max(range(len(row)), key=lambda i: (math.isnan(row[i]), row[i]))


def headroom(peak: float) -> float:
    """log2 of how many times `peak` fits below float16's limit; inf for 0, -inf for what is not finite."""
    if not math.isfinite(peak):
        return -math.inf
    return math.log2(LIMIT / peak) if peak else math.inf


def table(ranges: Ranges) -> str:
    """The ranges as text: site, layer of the peak, peak, headroom in bits; then what float16 does to small weights."""
    lines = [f"{'site':30}{'layer':>6}{'peak':>14}{'headroom, bits':>16}"]
    lines += [f"{r['site']:30}{r['layer']:6d}{r['peak']:14,.1f}{r['headroom']:16.1f}{'  overflows' * (r['headroom'] < 0)}"
              for r in ranges.rows()]
    w = ranges.weights
    lines.append(f"weights: smallest non-zero {w['smallest']:.3g}; "
                 f"float16 keeps {w['subnormal']:.3%} with fewer bits, flushes {w['flushed']:.3%} to zero")
    return "\n".join(lines)


def sample(tasks: Iterable[Task]) -> list[Task]:
    """A short, a middling and a long task with train pairs, the same ones whatever the order of `tasks`.

    Long is what PROBE_CELLS allows, where there are three such tasks; else the three shortest are taken.
    """
    order = sorted((t for t in tasks if t.train), key=lambda t: (cells(t), t.id))
    order = order[: max(3, sum(cells(t) <= PROBE_CELLS for t in order))]
    return [order[i] for i in sorted({0, len(order) // 2, len(order) - 1})] if order else []


def examples(tasks: list[Task], builder: PromptBuilder, longest: int) -> list[Example]:
    """Teacher-forced examples of up to `longest` tokens from train pairs: the last pair of each task as the target, under a
    random view, and that of the first task that fits as it is, too.

    Where no task gives one that fits, a copied 3x3 grid, so that there is always something to look at.
    """
    made = []
    for task in (t for t in tasks if t.train):
        *context, target = task.train
        kept = builder.fit_example(tuple(context), target, longest)
        if kept is not None:
            shown = tuple(context[k] for k in kept)
            plain, drawn = View.identity(len(shown)), random_view(len(shown), task_rng(0, task.id, "probe"))
            for view in (drawn,) if made else (plain, drawn):
                made.append(builder.example(tuple(view.apply_pair(shown[k]) for k in view.order), view.apply_pair(target)))
    square = Pair(*(np.arange(9, dtype=np.int8).reshape(3, 3) for _ in range(2)))
    return made or [builder.example((square,), square)]


def probe(model_folder: Path, made: list[Example], device: str, adapter: Path | None = None) -> Ranges:
    """Ranges of a model folder, with an adapter where one is given, over examples, in float32.

    Raises ArcKernelError where the model cannot be loaded, or the adapter opened.
    """
    model = load_model(model_folder, "float32", device)
    if adapter is not None:
        model = open_adapter(model, adapter).eval()
    with recording(model, scores=True) as peaks:
        for example in made:
            label_logits(model, example, device)
    return Ranges(collected(peaks), small_weights(model_folder), sum(len(e.input_ids) for e in made))


def label_logits(model, example: Example, device: str):
    """Logits [labels, vocabulary] at the positions that predict the answer of an example."""
    import torch

    ids = torch.from_numpy(example.input_ids).to(device)
    at = torch.from_numpy((example.labels[1:] != IGNORED).nonzero()[0]).to(device)
    with torch.no_grad():
        return model(input_ids=ids[None], logits_to_keep=at, use_cache=False).logits[0]


class UnknownLayout(ArcKernelError):
    """A model whose parts are not where `recording` looks for them."""


def check_layout(model) -> None:
    """Raise UnknownLayout where a model of transformers has no embedding, layers and last norm where Llama has them."""
    decoder = getattr(model, "model", None)
    if absent := [part for part in LAYOUT if not hasattr(decoder, part)]:
        raise UnknownLayout(f"{model.config.name_or_path}: {type(model).__name__} has no model.{absent[0]}: only decoders laid out as "
                            "Llama's can be looked into")


@contextlib.contextmanager
def recording(model, scores: bool = False) -> Iterator[dict]:
    """While the block runs, peaks of `model` (peft's or transformers') are gathered in the dict it is given.

    Keys are (site, layer), values 0-dimensional tensors. `scores` adds attention scores before softmax, and q and k as
    they are after the rotation; they cost extra memory and time.
    """
    peaks: dict = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    check_layout(base)
    undo = contextlib.ExitStack()

    def keep(site: str, layer: int, value) -> None:
        peak = value.detach().abs().amax().float()
        peaks[site, layer] = peak.maximum(peaks[site, layer]) if (site, layer) in peaks else peak

    def watch(module, layer: int, into: str = "", out: str = "") -> None:
        if into:
            undo.callback(module.register_forward_pre_hook(lambda _, args: keep(into, layer, args[0])).remove)
        if out:
            undo.callback(module.register_forward_hook(lambda *call: keep(out, layer, call[-1])).remove)

    decoder = base.model
    watch(decoder.embed_tokens, 0, out="embedding")
    for number, layer in enumerate(decoder.layers):
        for path, module in layer.named_modules():
            name = path.rpartition(".")[2]
            if name in OUTPUTS:
                watch(module, number, INPUTS.get(name, ""), OUTPUTS[name])
            elif type(module).__name__.endswith("Norm"):
                watch(module, number, f"{name} in", f"{name} out")
    watch(decoder.norm, 0, "final norm in", "final norm out")
    watch(base.get_output_embeddings(), 0, out="logits")
    with undo:
        if scores:
            _record_scores(base, keep, undo)
        yield peaks


def _record_scores(base, keep, undo: contextlib.ExitStack) -> None:
    """Give `base` an attention that hands q, k (rotated) and the largest causal score of each layer to `keep`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = base.config._attn_implementation
    own = getattr(sys.modules[type(base).__module__], "eager_attention_forward", None)  # each architecture has its own
    plain = own if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]

    def attention(module, query, key, value, attention_mask, **kwargs):
        keep("q rotated", module.layer_idx, query)
        keep("k rotated", module.layer_idx, key)
        keep("scores", module.layer_idx, _largest_score(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5))
        return plain(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS[kind])
    undo.callback(AttentionInterface.register, ATTENTION, plain)  # lets go of the model
    undo.callback(base.set_attn_implementation, kind)
    base.set_attn_implementation(ATTENTION)


def _largest_score(query, key, scaling: float):
    """Largest |q k| * scaling over causal pairs; query [1, heads, T, size], key [1, kv heads, T, size]."""
    import torch

    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).float()
    best = query.new_zeros((), dtype=torch.float32)
    for start in range(0, query.shape[2], QUERIES):
        rows = query[:, :, start:start + QUERIES].float()
        scores = rows @ key[:, :, :start + QUERIES].transpose(2, 3)
        best = best.maximum(scores.tril(start).abs().amax())
    return best * scaling


def collected(peaks: dict) -> dict[str, list[float]]:
    """Recorded peaks as numbers: site -> one per layer."""
    sites: dict[str, dict[int, float]] = defaultdict(dict)
    for (site, layer), peak in peaks.items():
        sites[site][layer] = float(peak)
    return {site: [layers[i] for i in sorted(layers)] for site, layers in sites.items()}


def small_weights(folder: Path) -> dict[str, float]:
    """The smallest non-zero magnitude among a folder's weights, and the shares float16 flushes or keeps with fewer bits."""
    smallest, flushed, subnormal, count = math.inf, 0, 0, 0
    for _, tensor in weight_tensors(folder):
        sizes = tensor.float().abs_()
        small = sizes[sizes < NORMAL]  # few, and what all three figures are about
        lost = small[small > 0]
        flushed += int((lost <= FLUSHED).sum())
        subnormal += int((lost > FLUSHED).sum())
        some = lost if lost.numel() else sizes[sizes > 0]  # neither: all zero or NaN
        smallest = min(smallest, float(some.min()) if some.numel() else math.inf)
        count += tensor.numel()
    return {"smallest": smallest, "flushed": flushed / max(1, count), "subnormal": subnormal / max(1, count)}
