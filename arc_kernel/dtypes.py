"""From a dtype's name to a model that is fit for it: the probe, the rescaled weights, the reference, the canary.

What is found out about a model is kept under the sha256 of its weights in the cache folder, so that a second run has it at
once; a model folder may be a read-only mount, or a bundle whose every byte is checked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from filelock import FileLock

from .checkpoint import cache_folder, weights_sha256, write_json
from .generate import EngineSettings, Prompt, TransformersEngine
from .precision import probe, rescale, verdict
from .precision.probe import Ranges
from .precision.rescale import Refused, Rescale
from .prompts import PromptBuilder
from .tasks import Task

HEADROOM = 2.0  # bits left free under the probe's peaks
HEADROOM_TTT = 3.0  # with test-time training: an adapter may add to what the probe saw


@dataclass(frozen=True)
class Variant:
    """A model as one dtype wants it: the folder to load, and the rescaling in it (None: the weights as they are)."""

    dtype: str
    folder: Path
    rescale: Rescale | None = None


class Model:
    """One model (with the adapter every task starts from, if any) on one device, and what is known about its precision.

    `tasks` are those it is probed and judged on: short, middling, long.
    """

    def __init__(self, folder: Path, adapter: Path | None, builder: PromptBuilder, tasks: list[Task], device: str,
                 max_seq_len: int, headroom: float):
        self.folder, self.adapter, self.builder = folder, adapter, builder
        self.device, self.max_seq_len, self.headroom = device, max_seq_len, headroom
        weights = {"weights": weights_sha256(folder), "adapter": adapter and weights_sha256(adapter)}
        self.cache = cache_folder() / "precision" / verdict.digest(weights)
        self._made = probe.examples(tasks, builder, max_seq_len)
        self.key = weights | {"examples": verdict.digest([e.input_ids.tolist() for e in self._made])}

    def ranges(self) -> Ranges:
        """The probe's ranges in float32, measured once."""
        name = "ranges-" + self.key["examples"]
        value = self._once(name, lambda: vars(probe.probe(self.folder, self._made, self.device, self.adapter)))
        return Ranges(**value)

    def reference(self) -> verdict.Answers:
        """float32 answers of transformers to the canary's prompts, measured once per set of prompts."""
        prompts = self.canary_prompts()
        settings = EngineSettings(self.folder, "float32", self.max_seq_len, self.builder.end_token, 0)

        def measure() -> list:
            engine = TransformersEngine(settings, self.device)
            answers = canary(engine, prompts)
            engine.close()
            return answers

        return [(ids, logprobs) for ids, logprobs in self._once("reference-" + self.key["examples"], measure)]

    def canary_prompts(self) -> list[Prompt]:
        """The prompts of the examples the model is probed on, up to their answers."""
        return [Prompt((i,), [int(t) for t in e.input_ids[: int((e.labels != probe.IGNORED).argmax())]], self.adapter)
                for i, e in enumerate(self._made)]

    def variant(self, dtype: str, adapters: list[dict[str, list[float]]] = ()) -> Variant:
        """The model for a dtype, with room for adapters with these peaks. Raises Refused where float16 cannot hold it."""
        if dtype != "float16":
            return Variant(dtype, self.folder)
        ranges = self.ranges()
        try:
            base = rescale.unscaled(self.folder)
        except Refused as reason:
            seen = rescale.overflows(ranges.with_peaks(adapters).peaks)
            if seen:
                raise Refused(f"{seen}; cannot be rescaled: {reason}") from None
            return Variant(dtype, self.folder)
        made = rescale.plan(ranges, base, self.headroom)
        if any(rescale.overflows(made.scaled(peaks)) for peaks in adapters):
            made = rescale.plan(ranges.with_peaks(adapters), base, self.headroom)
        return Variant(dtype, self.folder) if made.identity else Variant(dtype, self._rescaled(made), made)

    def _rescaled(self, made: Rescale) -> Path:
        """The folder of the rescaled model, written and checked once. Raises Refused where underflow changes logits."""
        folder = self.cache / f"rescaled-{verdict.digest(made.to_json())}"
        with self._lock():
            if not folder.is_dir():
                rescale.write_model(self.folder, made, folder)
            facts = json.loads((folder / "precision.json").read_text())
            if "logit_change" not in facts:
                facts |= rescale.underflow(self.folder, folder, self._made[::2], self.device)
                facts |= {"weights": self.key["weights"], "tolerance": rescale.TOLERANCE}
                write_json(folder / "precision.json", facts)
        if facts["logit_change"] > rescale.TOLERANCE:
            raise Refused(f"weights too small for float16 after 2**-{made.residual}: logits change by {facts['logit_change']:.2g}")
        return folder

    def _lock(self) -> FileLock:
        self.cache.mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache / "lock")

    def _once(self, name: str, measure: Callable):
        """What `measure` gives, kept as JSON; a second worker waits for the first instead of measuring again."""
        path = self.cache / f"{name}.json"
        with self._lock():
            if not path.is_file():
                write_json(path, measure())
            return json.loads(path.read_text())


def canary(engine, prompts: list[Prompt]) -> verdict.Answers:
    """An engine's greedy answers to the canary's prompts, in their order: token ids and the logprob of each."""
    answers = {a.prompt.key: (a.token_ids, list(a.logprobs)) for a in engine.answer(prompts, verdict.CANARY_TOKENS)}
    return [answers[p.key] for p in prompts]
