"""The stream of training examples: each is a pure function of (seed, index), so that a resumed run goes on exactly.

Step s of a run with batch B is made of the examples s*B to s*B + B - 1, on any number of GPUs. Knows sources, views and prompts;
nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from ..compose import compose
from ..errors import ArcKernelError
from ..prompts import Example, PromptBuilder
from ..tasks import Pair
from ..views import random_view
from . import recall
from .data import Source

DRAWS = 5000  # tries at an example of an allowed length: what every 500th draw is, is missed once in 22,000 times
SAMPLE = 256  # examples whose lengths are looked at before the first step
SHORTEST = 0.1  # quantile of the lengths at which `short_first` begins
PERCENTILES = (5, 25, 50, 75, 90, 95, 99, 100)
SIDES = {"output": ("input", "output"), "inputs": ("input",), "outputs": ("output",)}  # of a pair that a prompt kind shows


@dataclass(frozen=True)
class Drawn:
    """An example, its kind, and its tokens before context pairs were dropped."""

    example: Example
    kind: str
    tokens: int


class Stream:
    """Examples of weighted sources under random views. `longest`: tokens an example is shortened to; `limit`: tokens beyond
    which it is drawn again (0: none)."""

    def __init__(self, sources: Sequence[Source], builder: PromptBuilder, seed: int, longest: int, compose: float = 0.0,
                 limit: int = 0, all_outputs: bool = True, permute_background: bool = False):
        self.sources, self.builder, self.seed, self.longest, self.compose = sources, builder, seed, longest, compose
        self.limit, self.all_outputs, self.permute_background = limit, all_outputs, permute_background
        weights = np.array([s.weight for s in sources])
        self._weights = (weights / weights.max()) / (weights / weights.max()).sum()

    def draw(self, index: int, limit: int = 0) -> Drawn:
        """Example `index`, at most `limit` tokens long (0: the stream's own limit). One that is too long loses context pairs, the
        largest first, where it passes `longest`; where it passes the limit, or has one context pair left, it is drawn again.

        Raises ArcKernelError where DRAWS draws gave none that fits.
        """
        rng, limit = np.random.default_rng((self.seed, index)), min(filter(None, (limit, self.limit)), default=0)
        for _ in range(DRAWS):
            drawn = self._draw(rng, limit)
            if drawn is not None and len(drawn.example.input_ids) <= min(self.longest, limit or self.longest):
                return drawn
        raise ArcKernelError(f"finetune: example {index}: none of {DRAWS} drawn examples has {limit or self.longest} tokens or fewer: "
                             f"raise max_seq_len or max_tokens, or give data with smaller grids")

    def lengths(self, count: int = SAMPLE) -> np.ndarray:
        """Tokens, int64 [count], of the first draw of each of `count` examples, as long as the data makes them."""
        tokens = []
        for rng in (np.random.default_rng((self.seed, index)) for index in range(count)):
            drawn = next(filter(None, (self._draw(rng, self.limit, fit=False) for _ in range(DRAWS))), None)
            if drawn is not None:
                tokens.append(drawn.tokens)
            elif not tokens:  # nothing fits, and the others would say so one by one
                break
        return np.array(tokens)

    def _draw(self, rng: np.random.Generator, limit: int, fit: bool = True) -> Drawn | None:
        """One try at an example; None where a pool has no pairs small enough for `limit` tokens (a cell is a token or more),
        and where nothing could be composed."""
        source = self.sources[rng.choice(len(self.sources), p=self._weights)]
        if source.kind == "recall":
            example = recall.example(self.builder, source.tokens, rng)
            return Drawn(example, "recall", len(example.input_ids))
        pairs = source.draw(rng, limit)
        if not pairs:
            return None
        if rng.random() < self.compose:
            pairs, composed = compose(pairs, rng, SIDES[source.kind])
            if composed is None:
                return None
        view = random_view(len(pairs) - 1, rng, self.permute_background)
        shown = [view.apply_pair(p) for p in pairs]
        example = self._example(source.kind, shown)
        tokens = len(example.input_ids)
        while fit and len(example.input_ids) > self.longest and len(shown) > 2:
            size = lambda i: sum(getattr(shown[i], side).size for side in SIDES[source.kind])
            del shown[max(range(len(shown) - 1), key=size)]
            example = self._example(source.kind, shown)
        return Drawn(example, source.kind, tokens)

    def _example(self, kind: str, pairs: Sequence[Pair]) -> Example:
        *context, target = pairs
        if kind == "output":
            return self.builder.example(tuple(context), target, self.all_outputs)
        grids = [getattr(p, SIDES[kind][0]) for p in pairs]
        return self.builder.side_example(kind, tuple(grids[:-1]), grids[-1], self.all_outputs)


def growing_limit(lengths: np.ndarray, step: int, steps: int, share: float) -> int:
    """Tokens allowed at a step while examples grow, from the SHORTEST quantile of `lengths` to all of them; 0 once they may be any."""
    if step >= share * steps:
        return 0
    return int(np.quantile(lengths, SHORTEST + (1 - SHORTEST) * step / (share * steps)))


def check_lengths(lengths: np.ndarray, longest: int, allowed: float) -> str:
    """One line with the percentiles of sampled lengths; raises ArcKernelError where more than `allowed` of them pass `longest`."""
    if not len(lengths):
        raise ArcKernelError(f"finetune: no pool has two pairs small enough for {longest} tokens: raise max_tokens")
    share = float((lengths > longest).mean())
    line = (f"tokens of {len(lengths)} examples: " + ", ".join(f"{p}% {int(np.percentile(lengths, p))}" for p in PERCENTILES)
            + f"; {share:.1%} are longer than {longest}")
    if share == 1.0 and allowed < 1.0:
        raise ArcKernelError(f"finetune: the context of {longest} tokens is smaller than any example: {line}: raise max_seq_len")
    if share > allowed:
        raise ArcKernelError(f"finetune: {line}, more than max_too_long {allowed:.0%}: raise max_seq_len or max_too_long, "
                             f"or give shorter data")
    return line
