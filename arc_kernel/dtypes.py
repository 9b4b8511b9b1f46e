"""From a dtype's name to a model that is fit for it: the probe, the rescaled weights, the reference.

What is found out about a model is kept under the sha256 of its weights in the cache folder, so that a second run has it at
once; a model folder may be a read-only mount, or a bundle whose every byte is checked.
"""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from filelock import FileLock

from .checkpoint import weights_sha256
from .engine import EngineSettings, Prompt
from .files import check_cache, read_json, write_json
from .generate import start_engine
from .memory import exhausted, free_memory
from .precision import probe, rescale, verdict
from .precision.probe import Ranges
from .precision.rescale import Refused, Rescale
from .prompts import IGNORED, PromptBuilder
from .tasks import Task

Peaks = dict[str, list[float]]  # by site, one per layer

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
        self.folder, self.adapter, self.builder, self.tasks = folder, adapter, builder, tasks
        self.device, self.max_seq_len, self.headroom = device, max_seq_len, headroom
        weights = {"weights": weights_sha256(folder), "adapter": adapter and weights_sha256(adapter)}
        self.cache = check_cache() / "precision" / verdict.digest(weights)
        self._made = probe.examples(tasks, builder, min(max_seq_len, probe.PROBE_TOKENS))
        self._asked = probe.examples(tasks, builder, min(max_seq_len, verdict.CANARY_PROMPT))
        self.key = weights | {"examples": verdict.digest([e.input_ids.tolist() for e in self._made + self._asked])}

    @functools.cached_property
    def ranges(self) -> Ranges:
        """The probe's ranges in float32, measured once. Raises Refused where the model cannot be probed."""
        name = "ranges-" + self.key["examples"]
        try:
            seen = lambda device: vars(probe.probe(self.folder, self._made, device, self.adapter))
            return Ranges(**self._once(name, lambda: _where_it_fits(self.device, seen)))
        except probe.UnknownLayout as error:
            raise Refused(str(error)) from None

    def reference(self) -> verdict.Answers:
        """float32 answers of transformers to the canary's prompts, measured once per set of prompts."""
        return self._answers("reference-" + self.key["examples"], self.canary_prompts(), self.device)

    def adapter_reference(self, prompts: list[Prompt]) -> verdict.Answers:
        """The same to prompts with an adapter of their own, computed on the CPU: an engine may hold the GPU's memory."""
        named = verdict.digest([self.key["examples"], weights_sha256(prompts[0].adapter)])
        return self._answers(f"reference-adapter-{named}", prompts, "cpu")

    def _answers(self, name: str, prompts: list[Prompt], device: str) -> verdict.Answers:
        settings = EngineSettings(self.folder, "float32", self.max_seq_len, self.builder.end_token, 0)

        def measure(device: str) -> list:
            engine = start_engine("transformers", settings, device)
            answers = canary(engine, prompts)
            engine.close()
            return answers

        return [(ids, logprobs) for ids, logprobs in self._once(name, lambda: _where_it_fits(device, measure))]

    def canary_prompts(self) -> list[Prompt]:
        """Real prompts of the tasks the model is probed on, each short enough for a canary."""
        return [Prompt((i,), [int(t) for t in e.input_ids[: int((e.labels != IGNORED).argmax())]], self.adapter)
                for i, e in enumerate(self._asked)]

    def plan(self, adapters: Sequence[Peaks] = ()) -> Rescale | None:
        """What float16 needs for the model and adapters with these peaks; None: the weights as they are.

        Raises Refused where it cannot hold them.
        """
        try:
            base = self._unscaled
        except Refused as reason:
            seen = next(filter(None, map(rescale.overflows, [self.ranges.peaks, *adapters])), "")
            if seen:
                raise Refused(f"{seen}; cannot be rescaled: {reason}") from None
            return None
        made = rescale.plan(self.ranges, base, self.headroom)
        if any(rescale.overflows(made.scaled(peaks)) for peaks in adapters):
            made = rescale.plan(self.ranges.with_peaks(adapters), base, self.headroom)
        made = rescale.balance(self._weight_sizes, made)
        return None if made.identity else made

    def variant(self, dtype: str, adapters: Sequence[Peaks] = ()) -> Variant:
        """The model for a dtype, with room for adapters with these peaks. Raises Refused where float16 cannot hold it, or int8 is of no use
        on the device."""
        if dtype == "int8":
            from . import int8  # imports torch, which `run` can do without

            if reason := int8.refused(self.device):
                raise Refused(reason)
        made = self.plan(adapters) if dtype == "float16" else None
        return Variant(dtype, self.folder if made is None else self._rescaled(made), made)

    def fitting(self, adapters: dict[Path, Peaks]) -> tuple[list[Peaks], dict[Path, str]]:
        """The peaks of adapters that float16 can hold with the model, each by itself, and why it cannot hold the others."""
        left_out = {}
        for folder, peaks in adapters.items():
            try:
                self.plan([peaks])
            except Refused as reason:
                left_out[folder] = str(reason)
        return [p for f, p in adapters.items() if f not in left_out], left_out

    def without_overflow(self, adapters: dict[Path, Peaks]) -> tuple[Variant, dict[Path, str]]:
        """The model in float16 with room for as many of these adapters as can be, and why the others cannot be served."""
        held, left_out = self.fitting(adapters)
        try:
            return self.variant("float16", held), left_out
        except Refused as reason:  # together they ask for more than the weights can give: what is beyond the model's own needs
            made = self.plan()
            large = [f for f, p in adapters.items() if rescale.overflows(made.scaled(p) if made else p)]
            return self.variant("float16"), left_out | {f: left_out.get(f, str(reason)) for f in large}

    @functools.cached_property
    def _unscaled(self) -> Rescale:
        if self.adapter:  # training would start from it on the rescaled weights, answering would convert what comes of it
            rescale.require_plain_lora(self.adapter)
        return rescale.unscaled(self.folder)

    @functools.cached_property
    def _weight_sizes(self) -> dict:
        return rescale.weight_sizes(self.folder)

    def _rescaled(self, made: Rescale) -> Path:
        """The folder of the rescaled model in the cache, written and checked once."""
        folder = self.cache / f"rescaled-{verdict.digest(made.to_json())}"
        with self._lock():
            self.write_rescaled(made, folder)
        return folder

    def write_rescaled(self, made: Rescale, folder: Path) -> float:
        """Write the rescaled model as `folder` unless it is there, check it, and return the largest change of a label's
        logits through float16's underflow. Raises Refused where that is more than TOLERANCE."""
        if not folder.is_dir():
            rescale.write_model(self.folder, made, folder)
        facts = read_json(folder / "precision.json")
        if "logit_change" not in facts:
            facts |= _where_it_fits(self.device, lambda device: rescale.underflow(self.folder, folder, self._made[:2], device))
            facts |= {"weights": self.key["weights"], "tolerance": rescale.TOLERANCE}
            write_json(folder / "precision.json", facts)
        if facts["logit_change"] > rescale.TOLERANCE:
            raise Refused(f"weights too small for float16 after 2**-{made.residual}: logits change by {facts['logit_change']:.2g}")
        return facts["logit_change"]

    def _lock(self) -> FileLock:
        self.cache.mkdir(parents=True, exist_ok=True)
        return FileLock(self.cache / "lock")

    def _once(self, name: str, measure: Callable):
        """What `measure` gives, as JSON has it, and kept unless the disk is full; a second worker waits for the first instead of measuring
        again."""
        path = self.cache / f"{name}.json"
        with self._lock():
            if path.is_file():
                return read_json(path)
            found = measure()
            with contextlib.suppress(OSError):
                write_json(path, found)
            return json.loads(json.dumps(found))


def _where_it_fits(device: str, measure: Callable[[str], object]):
    """What `measure` gives on the device, or on the CPU where a GPU has no room for float32."""
    try:
        return measure(device)
    except RuntimeError as error:  # which holds what there is of the model while it is at hand
        if device == "cpu" or not exhausted(error):
            raise
    free_memory()
    return measure("cpu")


def canary(engine, prompts: list[Prompt]) -> verdict.Answers:
    """An engine's greedy answers to the canary's prompts, in their order: token ids and the logprob of each."""
    answers = {a.prompt.key: (a.token_ids, list(a.logprobs)) for a in engine.answer(prompts, verdict.CANARY_TOKENS)}
    return [answers[p.key] for p in prompts]
