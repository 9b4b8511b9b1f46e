"""What both inference backends share: prompts, answers, settings, the guard on every answer, adapters as weights want them.

An engine has two methods: `answer`, prompts plus adapters in, scored answers out, and `close`; its `in_flight` is how many
prompts it takes at once, its `batch` how many of them are decoded together at most, its `adapters` how many adapters may be
among them. Knows nothing of tasks or grids; the caller says with `viable` when going on with an answer is wasted, with `wanted`
when nobody needs it any more.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from .precision.rescale import Rescale, convert_adapter

CHECK_EVERY = 8  # generated tokens between two looks at whether an answer is still viable, at first


@dataclass(frozen=True)
class Prompt:
    """Token ids to answer, with the adapter to answer them with (None: the base model); `key` comes back with the answer."""

    key: tuple
    token_ids: list[int]
    adapter: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What was generated: ids without the closing token, the summed logprob (nats), and how it ended.

    `logprobs` has one entry per generated token, the closing token included. `status` is `ok` (closing token reached),
    `truncated` (out of tokens), `stopped` (not viable) or `nan` (see `failed`). `cached` is the number of the prompt's
    tokens that were not computed because an earlier prompt begins alike.
    """

    prompt: Prompt
    token_ids: list[int]
    logprob: float
    status: str
    logprobs: tuple[float, ...]
    cached: int = 0


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with: model folder, dtype, tokens of prompt plus answer, closing token, LoRA rank (0: none).

    `rescale`: the model's weights are rescaled so; adapters are converted as they are loaded. `special`: ids of the
    tokenizer's special tokens, for the guard. `profile`: whose engine arguments vLLM is started with; auto: by the device.
    `in_flight`: prompts decoded together; 0: what suits the device. `drafts`: tokens are guessed from the prompt and checked together,
    where that was found faster (vLLM on a CPU); without, as a bench times it, each answer gains a token a step.
    """

    model: Path
    dtype: str
    max_seq_len: int
    end_token: int
    lora_rank: int
    rescale: Rescale | None = None
    special: frozenset[int] = frozenset()
    profile: str = "auto"
    in_flight: int = 0
    drafts: bool = True


Viable = Callable[[list[int]], bool]
Wanted = Callable[[Prompt], bool]


def due(length: int, gained: int = 1) -> bool:
    """Whether an answer of so many tokens is looked at, the last `gained` of them new. Of a long one an eighth to a sixteenth comes
    between two looks, since each reads it from its beginning: all looks at a 30x30 grid then take a fifth of the CPU time, for which a
    GPU waits."""
    return length % max(CHECK_EVERY, 1 << length.bit_length() >> 4) < gained


def failed(token_ids: list[int], logprob: float, special: frozenset[int]) -> bool:
    """The guard on every answer: a logprob that is not finite, or one special token over and over from the first on.

    The second is what NaN logits look like where an engine hides their logprob: greedy decoding takes token 0.
    """
    if not math.isfinite(logprob):
        return True
    return len(token_ids) >= CHECK_EVERY and token_ids[0] in special and token_ids.count(token_ids[0]) == len(token_ids)


class ServedAdapters:
    """Adapter folders as an engine's weights want them: themselves, or converted for rescaled weights when first asked for.

    Converted copies of the last `kept` adapters are kept, and of those that have prompts under way.
    """

    def __init__(self, rescale: Rescale | None, kept: int):
        self._rescale, self._kept, self._made = rescale, kept, {}
        self._scratch = tempfile.TemporaryDirectory(prefix="arc-kernel-") if rescale else None

    def folder(self, adapter: Path, busy: set[Path | None] = frozenset()) -> Path:
        """The folder to load for an adapter; `busy` are those whose copies are still needed."""
        if self._rescale is None:
            return adapter
        if adapter in self._made:
            self._made[adapter] = self._made.pop(adapter)  # the newest now
            return self._made[adapter]
        self._made[adapter] = Path(tempfile.mkdtemp(dir=self._scratch.name)) / adapter.name
        convert_adapter(adapter, self._made[adapter], self._rescale)
        for old in [a for a in self._made if a != adapter and a not in busy][: max(0, len(self._made) - self._kept)]:
            shutil.rmtree(self._made.pop(old))
        return self._made[adapter]

    def close(self) -> None:
        """Remove what was converted."""
        if self._scratch:
            self._scratch.cleanup()
