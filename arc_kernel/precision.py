"""Which dtype a model may use on a device: the order in which dtypes are tried, the canary's judgement, the verdict.

Knows that float16 ends at 65,504 and that a model beyond it answers NaN with token 0 for ever instead of raising. Knows
nothing of engines: it judges answers it is handed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .tasks import replacing

# What may follow a dtype that failed. float16 after bfloat16 would be hopeless: it has the smaller range.
NEXT = {"bfloat16": ("float32",), "float16": ("bfloat16", "float32"), "float32": ()}
CANARY_TOKENS = 16


@dataclass(frozen=True)
class Precision:
    """The verdict, saved as precision.json: the dtype in use, and for each dtype tried what was seen."""

    dtype: str | None  # None where every dtype failed
    evidence: tuple[dict, ...]

    def save(self, path: Path) -> None:
        """Write the verdict as JSON, by write-then-rename."""
        with replacing(path) as file:
            json.dump(dataclasses.asdict(self), file, indent=1)


def device_name() -> str:
    """`cuda` where a GPU is visible to this process, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def native_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware; a T4 (sm_75) only emulates it, far slower than float16."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def candidates(wanted: str, device: str) -> list[str]:
    """Dtypes to try in order: the wanted one (`auto`: bfloat16 where native, else float16), then what may follow it."""
    native = native_bfloat16(device)
    first = wanted if wanted != "auto" else "bfloat16" if native else "float16"
    return [first, *(d for d in NEXT[first] if d != "bfloat16" or native)]


def judge(answers: list[tuple[list[int], float]], grid_tokens: set[int], last: bool) -> str:
    """What is wrong with a canary's answers (token ids, summed logprob each), or an empty string.

    Wrong is a logprob that is not finite, or every answer being one and the same token over and over where no grid is
    written with that token (a row of zeros is constant and healthy). In the `last` dtype there is to try, a model that
    repeats a token with finite logprobs is only a bad model, and is used.
    """
    if any(not math.isfinite(logprob) for _, logprob in answers):
        return "logprob is not finite"
    tokens = {token for ids, _ in answers for token in ids}
    if not last and len(tokens) == 1 and tokens.isdisjoint(grid_tokens) and min(len(ids) for ids, _ in answers) >= CANARY_TOKENS:
        return f"every answer repeats token {tokens.pop()}"
    return ""
