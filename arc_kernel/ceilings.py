"""What a device can do and what a model must do: speeds of matrix products and memory, and the FLOP and bytes of training,
prefill and decoding. Each benchmark's bound comes from here. Knows nothing of trainers or engines.

Counted is what cannot be left out. Frozen weights need no gradient, so a weight costs 2 FLOP a token forward and 2 backward
to its inputs, not 6. A causal attention is half of its square; its backward is 2.5 times its forward (five products for
two: Dao 2023, "FlashAttention-2", arXiv 2307.08691, section 4.1, which counts 4 * T^2 * head_dim * heads for the square).
Norms, rotations, activations, softmax and the optimizer are not counted: they are no matrix products and below 1%.
Two savings that exist are not taken off: the first layer's inputs need no gradient (q, k, v: 0.5% of the backward at 30
layers), and the last layer's q, o and MLP are needed at labels only (3% at 30 layers).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .adapt import TARGET_MODULES
from .checkpoint import decoder_config, head_size, weight_shapes
from .device import synchronize
from .precision import verdict

DTYPES = ("bfloat16", "float16", "float32")
ITEM = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes
SIDE = 2048  # of the square product that is called the ceiling
SLOW = 0.5  # seconds: where that product would take longer in a 16-bit dtype, only a small one is timed
COPIED = 256 << 20  # bytes of each array whose copy is timed; beyond any cache
REPEATS = 5  # timed copies of each kind


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes: `linears` (name, inputs, outputs) of every frozen linear layer without the head, `adapted` those
    that get a LoRA; `attention` = heads * head_dim and `keys` = key/value heads * head_dim, per layer."""

    linears: tuple[tuple[str, int, int], ...]
    adapted: tuple[tuple[str, int, int], ...]
    layers: int
    attention: int
    keys: int
    hidden: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Weights of the linear layers."""
        return sum(i * o for _, i, o in self.linears)

    def lora(self, rank: int) -> int:
        """Weights of a LoRA of this rank."""
        return sum(rank * (i + o) for _, i, o in self.adapted)


def shape_of(folder: Path) -> Shape:
    """The sizes of a model folder, from config and safetensors headers. Raises ArcKernelError for layouts other than Llama's."""
    config = decoder_config(folder)
    linears = tuple((name.removesuffix(".weight"), sides[1], sides[0]) for name, sides in sorted(weight_shapes(folder).items())
                    if name.endswith(".weight") and len(sides) == 2 and "embed" not in name and not name.startswith("lm_head"))
    heads, width = config["num_attention_heads"], head_size(config)
    adapted = tuple(layer for layer in linears if layer[0].rpartition(".")[2] in TARGET_MODULES)
    return Shape(linears, adapted, config["num_hidden_layers"], heads * width,
                 config.get("num_key_value_heads", heads) * width, config["hidden_size"], config["vocab_size"])


def train_flop(shape: Shape, tokens: int, labels: int, rank: int) -> dict[str, float]:
    """FLOP of a training step on one example of `tokens` tokens, forward and backward, by what they are for.

    `weights`: 4 per frozen weight and token. `lora`: 6 per LoRA weight and token. `attention`: per layer 3.5 times
    2 * tokens^2 * heads * head_dim, half of the square. `logits`: 4 per head weight and label, forward and to the hidden state.
    """
    return {"weights": 4.0 * shape.weights * tokens, "lora": 6.0 * shape.lora(rank) * tokens,
            "attention": 3.5 * 2.0 * tokens**2 * shape.attention * shape.layers,
            "logits": 4.0 * shape.vocabulary * shape.hidden * labels}


def train_seconds(flop: dict[str, float], frozen: float, others: float) -> float:
    """Seconds of what `train_flop` gives where products with frozen weights run at `frozen` FLOP/s and all others at `others`."""
    return flop["weights"] / frozen + (sum(flop.values()) - flop["weights"]) / others


def prefill_flop(shape: Shape, prompts: int, tokens: int, rank: int) -> float:
    """FLOP of reading `prompts` prompts of `tokens` tokens each with a LoRA, logits at each last token."""
    each = 2.0 * (shape.weights + shape.lora(rank)) * tokens + 2.0 * tokens**2 * shape.attention * shape.layers
    return prompts * (each + 2.0 * shape.vocabulary * shape.hidden)


def decode_work(shape: Shape, batch: int, context: int, rank: int, dtype: str, adapters: int) -> tuple[float, float]:
    """(FLOP, bytes) of a decoding step of `batch` answers after `context` tokens each, of so many adapters: all weights, the LoRA of each
    adapter and every answer's keys and values are read once."""
    weights, lora = shape.weights + shape.vocabulary * shape.hidden, shape.lora(rank)
    flop = batch * (2.0 * (weights + lora) + 4.0 * context * shape.attention * shape.layers)
    return flop, ITEM[dtype] * (weights + adapters * lora + 2.0 * batch * context * shape.keys * shape.layers)


def gemm(dtype: str, device: str, repeats: int = 5) -> float:
    """FLOP/s of a square product of side 2048, the fastest of `repeats`; of a small one where the dtype is emulated. In int8 with the
    rounding of one factor, as training makes it."""
    if dtype == "int8":
        from . import int8  # imports torch, which `run` can do without

        return 2 * SIDE**3 / int8.product_seconds(SIDE, SIDE, SIDE, repeats)[0]
    if emulated(dtype, device):
        rows, side = verdict.PRODUCT["cpu"]
        return 2 * rows * side * side / verdict.product_seconds(dtype, device, rows, side, side)
    return 2 * SIDE**3 / verdict.product_seconds(dtype, device, SIDE, SIDE, SIDE, repeats)


def emulated(dtype: str, device: str) -> bool:
    """Whether a 16-bit dtype is so slow here that a large product would take over SLOW seconds, foreseen from a small one."""
    rows, side = verdict.PRODUCT["cpu"]
    return dtype != "float32" and verdict.product_seconds(dtype, device, rows, side, side) / (rows * side * side) * SIDE**3 > SLOW


def bandwidth(device: str) -> dict[str, list[float]]:
    """bytes/s, one per repeat, of `copy` (a read and a write), `triad` (a = b + s * c: two reads and a write) and `read` (a matrix
    times a vector, as decoding one answer reads weights). What a cache fetches before it is overwritten is not counted."""
    import torch

    a, b, c = (torch.ones(COPIED // 4, device=device) for _ in range(3))
    matrix, vector = b.view(-1, 4096), torch.ones(4096, device=device)
    ways = {"copy": (2, lambda: a.copy_(b)), "triad": (3, lambda: torch.add(b, c, alpha=3.0, out=a)), "read": (1, lambda: matrix @ vector)}
    found = {name: [] for name in ways}
    for n in range(REPEATS + 1):
        for name, (arrays, work) in ways.items():
            begun = time.perf_counter()
            work()
            synchronize(device)
            if n:  # the first touches the pages
                found[name].append(arrays * COPIED / (time.perf_counter() - begun))
    return found


