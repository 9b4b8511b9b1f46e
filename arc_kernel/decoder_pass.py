"""The decoder of a fused model on a GPU, forward and backward, as two CUDA graphs for each size of a pass.

A step of a small model is some four thousand launches that take the CPU longer than the GPU: a step of 512 tokens took as long as
one of 8,192 (0.13 s on an H200; benchmarks/LOG.md). A graph is launched at once. It has one size, so passes are padded on the
right; a size is captured when it is seen again, after a plain pass that warms it up. Where capturing fails, passes stay plain,
and `trouble` says why. Method: CUDA graphs as in torch.cuda.make_graphed_callables; here gradients go straight into the flat
weights', and all graphs share one pool of memory and what they read and write, for no two are under way at once.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch

from . import elementwise
from .errors import named_line
from .flat_weights import FlatWeights
from .fused_layer import Fused
from .memory import exhausted, free_memory, mend_generators

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")  # embedding, layers, norm; nothing between them
BY_LENGTH = ("dynamic", "longrope")  # kinds of rotary embedding whose frequencies go by the largest position; passes are padded here
PARTS = 16  # sizes in an octave of tokens: padding is 3% on average
SMALLEST = 64  # tokens by which sizes differ at least: what is shorter leaves a GPU idle anyway, and capturing a size takes 0.2 s
PLAIN = 1  # passes of a size before it is captured
KEPT = 256  # sizes captured at once, the one not used for longest goes first; fine-tuning sees some 150 (benchmarks/LOG.md)
FEWEST = 4  # of them: where a GPU has no room for so many, there are none
TRIES = 3  # captures that may fail before it is given up


def fits(model, fused: Fused) -> bool:
    """Is this causal language model nothing but fused layers between its embedding and its norm, each causal and no more, with angles
    that do not go by the length of a pass, and nothing but their LoRA trained?"""
    inner, config = model.base_model, model.config
    masters = {id(w) for layer in fused.layers for w in (*layer.qkv.masters, *layer.masters)}
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window is not None)
    if type(inner).__name__ not in DECODERS or inner.rotary_emb.rope_type in BY_LENGTH:
        return False
    return (len(fused.layers) == len(inner.layers) and not windows
            and all(id(w) in masters for w in inner.parameters() if w.requires_grad))


def size_of(tokens: int) -> int:
    """The size of a pass that holds so many tokens: the next of PARTS steps to the octave."""
    step = max(SMALLEST, 1 << max(0, (tokens - 1).bit_length() - 1 - (PARTS.bit_length() - 1)))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class _Ends:
    """What graphs read and write: ids int64 [tokens], or [B, T] as one size sees them, hidden states and the gradient to them
    [tokens, d], or [B, T, d]."""

    ids: torch.Tensor
    hidden: torch.Tensor
    grad: torch.Tensor

    def of(self, size: tuple[int, int]) -> _Ends:
        """The first B * T tokens."""
        rows, hidden = size[0] * size[1], (*size, -1)
        return _Ends(self.ids[:rows].view(size), self.hidden[:rows].view(hidden), self.grad[:rows].view(hidden))


@dataclass(frozen=True)
class _Captured:
    """Graphs of one size and their ends."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    ends: _Ends


class _Replay(torch.autograd.Function):
    """Hidden states of a captured pass. Its backward adds to the flat weights' gradient by itself."""

    @staticmethod
    def forward(ctx, anchor, captured):
        ctx.captured = captured
        captured.forward.replay()
        return captured.ends.hidden.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.captured.ends.grad.copy_(grad)
        ctx.captured.backward.replay()
        return None, None


class Decoder:
    """Ids to hidden states, for a model that `fits`, whose LoRA is in `flat`."""

    def __init__(self, model, fused: Fused, flat: FlatWeights):
        self._inner, self._flat, self._dtype = model.base_model, flat, fused.layers[0].qkv.weight.dtype
        self._captured: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._seen: Counter = Counter()
        self._anchor = torch.zeros((), device=flat.tensor.device, requires_grad=True)
        self._pool, self._ends, self._tries, self._kept = None, None, TRIES, KEPT
        self.trouble = ""  # what `told` says next
        first = fused.layers[0]
        if flat.tensor.is_cuda:
            self._not_compiled(elementwise.compile_on_gpu(self._dtype, str(flat.tensor.device), first.norms[0][0].numel(), first.inner,
                                                          first.heads[0], first.heads[1], first.width, bool(first.head_norm)))

    def __call__(self, ids: torch.Tensor, rows: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, d] of ids int64 [B, T] at these rows and positions, int64 [n] both. One pass is under way at a time: its
        backward comes before the next forward."""
        size = (ids.shape[0], size_of(ids.shape[1]))
        padded = torch.nn.functional.pad(ids, (0, size[1] - ids.shape[1]))
        self._seen[size] += 1
        if self._tries and size not in self._captured and self._seen[size] > PLAIN:
            self._capture(size)
        if elementwise.trouble:
            self._not_compiled(elementwise.trouble)
            elementwise.trouble = ""
        if size not in self._captured:
            return self._plain(padded)[rows, at]
        self._captured.move_to_end(size)
        captured = self._captured[size]
        captured.ends.ids.copy_(padded)
        return _Replay.apply(self._anchor, captured)[rows, at]

    def _not_compiled(self, reason: str) -> None:
        if reason:
            self.trouble = f"norm, rotary and SwiGLU are not compiled, training is slower: {reason}"

    def _plain(self, ids: torch.Tensor, leaf: torch.Tensor | None = None) -> torch.Tensor:
        """As transformers' own forward, which also asks the GPU whether positions are packed: no capture allows that."""
        with self._flat.cast(self._dtype, leaf):
            hidden = self._inner.embed_tokens(ids)
            turned = self._inner.rotary_emb(hidden, torch.arange(ids.shape[1], device=ids.device)[None])
            for layer in self._inner.layers:
                hidden = layer(hidden, position_embeddings=turned)
            return self._inner.norm(hidden)

    def _capture(self, size: tuple[int, int]) -> None:
        while len(self._captured) >= self._kept:
            self._captured.popitem(last=False)
        leaf = self._flat.tensor.detach().requires_grad_()  # the tensor's own node may be alive in another stream, which breaks a capture
        try:
            ends = self._room(size[0] * size[1]).of(size)
            forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(forward, pool=self._pool):
                hidden = self._plain(ends.ids, leaf)
                ends.hidden.copy_(hidden.detach())
            self._pool = self._pool or forward.pool()
            with torch.cuda.graph(backward, pool=self._pool):
                self._flat.tensor.grad.add_(*torch.autograd.grad(hidden, leaf, ends.grad))
            self._captured[size] = _Captured(forward, backward, ends)
        except Exception as error:  # a CUDA error, a compiler's, no memory: the pass is done all the same
            self._pool = None  # one that a capture broke off in takes no other
            while error.__context__ is not None:  # the end of a capture that broke off raises an error of its own
                error = error.__context__
            reason = named_line(error)
            if not (exhausted(error) and self.make_room(reason)):
                self._tries -= 1
                if not self._tries:
                    self._give_up(reason)
            mend_generators()

    def _room(self, tokens: int) -> _Ends:
        """Ends for so many tokens or more. Graphs captured before keep the ends they have."""
        if self._ends is None or len(self._ends.ids) < tokens:
            rows, like = 1 << (tokens - 1).bit_length(), {"dtype": self._dtype, "device": self._anchor.device}
            sides = rows, self._inner.config.hidden_size
            self._ends = _Ends(torch.zeros(rows, dtype=torch.int64, device=self._anchor.device),
                               torch.zeros(sides, **like), torch.zeros(sides, **like))
        return self._ends

    def told(self) -> str:
        """Why passes are slower than they could be, said once; empty where they are not."""
        said, self.trouble = self.trouble, ""
        return said

    def make_room(self, reason: str) -> bool:
        """Give the graphs' memory back, for a GPU that had none left for a pass. From now on half as many are kept, or none where
        that is less than FEWEST. False: there are none."""
        had = len(self._captured)
        if had:
            self._kept = had // 2
            self._let_go()
            if self._kept < FEWEST:
                self._give_up(reason)
        return had > 0

    def _let_go(self) -> None:
        self._captured.clear()
        self._pool, self._ends = None, None
        free_memory()

    def _give_up(self, reason: str) -> None:
        self._let_go()
        self._tries, self.trouble = 0, f"passes are not captured as CUDA graphs, training is slower: {reason}"
