"""From a dtype's name to a model that is fit for it: the probe, the rescaled weights, the reference, a healthy engine.

What is found out about a model is kept under the sha256 of its weights in the cache folder, so that a second run has it at
once; a model folder may be a read-only mount, or a bundle whose every byte is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

from filelock import FileLock

from .checkpoint import cache_folder, require_device, weights_sha256, write_json
from .engine import EngineSettings, Prompt
from .errors import ArcKernelError
from .generate import adapter_rank, start_engine
from .precision import probe, rescale, verdict
from .precision.probe import Ranges
from .precision.rescale import Refused, Rescale
from .precision.verdict import Precision
from .prompts import PromptBuilder
from .tasks import Task

Peaks = dict[str, list[float]]  # by site, one per layer

HEADROOM = 2.0  # bits left free under the probe's peaks
HEADROOM_TTT = 3.0  # with test-time training: an adapter may add to what the probe saw
OTHERS_KERNELS = ("cuda",)  # devices on which an adapter's products are vLLM's own kernels, compiled for that device by Triton


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
        self.cache = cache_folder() / "precision" / verdict.digest(weights)
        self._made = probe.examples(tasks, builder, min(max_seq_len, probe.PROBE_TOKENS))
        self._asked = probe.examples(tasks, builder, min(max_seq_len, verdict.CANARY_PROMPT))
        self.key = weights | {"examples": verdict.digest([e.input_ids.tolist() for e in self._made + self._asked])}

    @functools.cached_property
    def ranges(self) -> Ranges:
        """The probe's ranges in float32, measured once. Raises Refused where the model cannot be probed."""
        name = "ranges-" + self.key["examples"]
        try:
            return Ranges(**self._once(name, lambda: vars(probe.probe(self.folder, self._made, self.device, self.adapter))))
        except probe.UnknownLayout as error:
            raise Refused(str(error)) from None

    def reference(self) -> verdict.Answers:
        """float32 answers of transformers to the canary's prompts, measured once per set of prompts."""
        return self._answers("reference-" + self.key["examples"], self.canary_prompts(), self.device)

    def adapter_reference(self, prompt: Prompt) -> verdict.Answers:
        """The same to a prompt with an adapter, computed on the CPU: an engine may hold the GPU's memory."""
        named = verdict.digest([prompt.token_ids, weights_sha256(prompt.adapter)])
        return self._answers(f"reference-adapter-{named}", [prompt], "cpu")

    def _answers(self, name: str, prompts: list[Prompt], device: str) -> verdict.Answers:
        settings = EngineSettings(self.folder, "float32", self.max_seq_len, self.builder.end_token, 0)

        def measure() -> list:
            engine = start_engine("transformers", settings, device)
            answers = canary(engine, prompts)
            engine.close()
            return answers

        return [(ids, logprobs) for ids, logprobs in self._once(name, measure)]

    def canary_prompts(self) -> list[Prompt]:
        """Real prompts of the tasks the model is probed on, each short enough for a canary."""
        return [Prompt((i,), [int(t) for t in e.input_ids[: int((e.labels != probe.IGNORED).argmax())]], self.adapter)
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
        """The model for a dtype, with room for adapters with these peaks. Raises Refused where float16 cannot hold it."""
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
        facts = json.loads((folder / "precision.json").read_text())
        if "logit_change" not in facts:
            facts |= rescale.underflow(self.folder, folder, self._made[:2], self.device)
            facts |= {"weights": self.key["weights"], "tolerance": rescale.TOLERANCE}
            write_json(folder / "precision.json", facts)
        if facts["logit_change"] > rescale.TOLERANCE:
            raise Refused(f"weights too small for float16 after 2**-{made.residual}: logits change by {facts['logit_change']:.2g}")
        return facts["logit_change"]

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


class Chooser:
    """Healthy engines for a model, in the order in which dtypes are tried on its device.

    `adapters` is the folder with the tasks' adapters; `tell` and `lap` report what happens, as a worker's methods do.
    """

    def __init__(self, model: Model, wanted: str, backend: str, max_seq_len: int, lora_rank: int, adapters: Path | None,
                 tell: Callable, lap: Callable, profile: str = "auto"):
        self.model, self.wanted, self.backend, self.adapters, self.tell, self.lap = model, wanted, backend, adapters, tell, lap
        self.max_seq_len, self._rank = max_seq_len, adapter_rank(model.adapter) if model.adapter else lora_rank
        self.profile, self.evidence = profile, []
        self.settled: Precision | None = None  # the verdict, once there is one
        self._told: set[Path] = set()  # adapters that were said not to be served in float16

    def engines(self, wait: Callable[[], None] | None = None) -> Iterator[tuple[object, Variant, set[Path]]]:
        """(engine, variant, folders of adapters it cannot serve) for each healthy dtype; the caller closes the engine.

        The first is the verdict: it is told, and kept, so that the next start has it without reference and canary. Where
        no dtype is healthy, that is told. A dtype in which vLLM cannot be started is tried with transformers before the next. `wait`
        returns when all adapters are there; the first engine is started before that, and again where adapters that came meanwhile ask
        for another scale, or where it answers wrongly with one of them.
        """
        there = self.adapters and any(self.adapters.glob("[!.]*/adapter_model.safetensors"))
        self.uses_adapters = bool(self.model.adapter or there or wait)
        self.key = {**self.model.key, "wanted": self.wanted, "backend": self.backend, "adapters": self.uses_adapters,
                    "device": verdict.device_model(self.model.device), "versions": verdict.versions()}
        path = self.model.cache / f"verdict-{verdict.digest(self.key)}.json"
        known = Precision.load(path, self.key)
        dtypes = verdict.candidates(self.wanted, self.model.device)
        for dtype in dtypes:
            started = self._settled(dtype, dtype == dtypes[-1], known, path)
            if started is not None and wait is not None:
                wait()
                wait, (engine, variant, _) = None, started
                same = self._scale(dtype) == variant.rescale
                if same:
                    started = engine, *self._variant(dtype)
                if not same or self._wrong_with_adapter(engine, self.evidence[-1]["backend"], dtype, started[2]):
                    engine.close()  # its memory is needed to check the weights at another scale
                    self.settled, self.evidence = None, [e for e in self.evidence if e["dtype"] != dtype]
                    started = self._settled(dtype, dtype == dtypes[-1], None, path)
            if started is not None:
                known = None
                yield started
        if self.settled is None:
            self._settle(None)

    def _settled(self, dtype: str, last: bool, known: Precision | None, path: Path) -> tuple[object, Variant, set[Path]] | None:
        """What `_start` gives, with transformers where vLLM does not work here; the first that is healthy is the verdict."""
        backend = self._backend_for(dtype)
        started = self._start(dtype, backend, last, known)
        if started is None and backend == "vllm" and not self.evidence[-1]["judged"]:
            started = self._start(dtype, "transformers", last, known)
        if started is not None and self.settled is None:
            self._settle(started[1])
            self.settled.save(path)
        return started

    def _start(self, dtype: str, backend: str, last: bool, known: Precision | None) -> tuple[object, Variant, set[Path]] | None:
        before = [e for e in known.evidence if (e["dtype"], e["backend"]) == (dtype, backend) and e.get("judged")] if known else []
        trusted = known is not None and known.dtype == dtype and any(e["ok"] for e in before)
        if before and not trusted:
            self.evidence += before
            return None
        engine, wrong, seen, judged = None, "", "", True
        try:
            variant, left_out = self._variant(dtype)
            self.lap("probe", dtype=dtype)
            reference = None if trusted else self.model.reference()
            self.lap("float32 reference")
            settings = EngineSettings(variant.folder, dtype, self.max_seq_len, self.model.builder.end_token,
                                      self._rank if self.uses_adapters else 0,
                                      variant.rescale, self.model.builder.special_tokens, self.profile)
            engine = start_engine(backend, settings, self.model.device)
            self.lap("start engine", dtype=dtype)
            if reference is not None:
                found = verdict.judge(canary(engine, self.model.canary_prompts()), reference, last)
                self.lap("canary")
                wrong, seen = found.wrong, str(found)
            if not wrong and (wrong := self._wrong_with_adapter(engine, backend, dtype, left_out)):
                seen, judged = wrong, False
        except Exception as error:  # vLLM and its kernels raise what they like: the next dtype may do
            traceback.print_exc()
            require_device(self.model.device)
            wrong = seen = str(error) if isinstance(error, ArcKernelError) else f"{type(error).__name__}: {error}".splitlines()[0]
            judged = isinstance(error, Refused)  # else it may have been the moment's fault, and is tried again by the next start
        self.evidence += before if trusted and not wrong else [{"dtype": dtype, "backend": backend, "ok": not wrong, "seen": seen,
                                                                "judged": judged}]
        if not wrong:
            return engine, variant, left_out
        if engine is not None:
            try:
                engine.close()
            except Exception:  # it had failed already
                traceback.print_exc()
        tried_again = backend == "vllm" and not judged
        self.tell("precision", stage="canary", dtype=dtype,
                  text=f"vLLM is not used in {dtype}, transformers is tried: {wrong}" if tried_again else f"{dtype} is not used: {wrong}")
        return None

    def _wrong_with_adapter(self, engine, backend: str, dtype: str, left_out: set[Path]) -> str:
        """What is wrong with an engine's answer with one of the tasks' adapters, whose products no canary has seen: wrong ones would
        give a submission that looks like any other. Empty where nothing is, or there is none, or its products are our own."""
        if backend != "vllm" or self.model.device not in OTHERS_KERNELS or self.adapters is None:
            return ""
        folders = (f.parent.resolve() for f in sorted(self.adapters.glob("[!.]*/adapter_model.safetensors")))
        adapter = next((f for f in folders if f not in left_out), None)
        if adapter is None:
            return ""
        shortest = min(self.model.canary_prompts(), key=lambda p: len(p.token_ids))
        prompt = dataclasses.replace(shortest, adapter=adapter)
        found = verdict.judge(canary(engine, [prompt]), self.model.adapter_reference(prompt), False)
        self.lap("canary with an adapter", dtype=dtype)
        return found.wrong and f"with the adapter of task {adapter.name}: {found}"

    def _settle(self, variant: Variant | None) -> None:
        """The verdict on a variant (None: no dtype is healthy), told."""
        peaks = self.model.ranges.peaks if variant and variant.dtype == "float16" else None
        made = variant and variant.rescale and variant.rescale.to_json()
        self.settled = Precision(variant and variant.dtype, made, peaks, tuple(self.evidence), self.key)
        self.tell("verdict", **dataclasses.asdict(self.settled))
        if variant and variant.rescale:
            self.tell("precision", stage="verdict", dtype=variant.dtype,
                      text=f"{variant.dtype} cannot hold the model as it is; {variant.rescale}")

    def _variant(self, dtype: str) -> tuple[Variant, set[Path]]:
        """The model as `dtype` wants it, and the tasks' adapters that overflow there whatever is done."""
        if dtype != "float16" or self.adapters is None:
            return self.model.variant(dtype), set()
        self.model.plan()  # a model that is refused by itself is not its adapters' fault
        variant, left_out = self.model.without_overflow(self._peaks())
        for folder in [folder for folder in left_out if folder not in self._told]:
            self._told.add(folder)
            self.tell("precision", stage="answer", task=folder.name, dtype=dtype,
                      text=f"task {folder.name}: its adapter is not served in {dtype}: {left_out[folder]}")
        return variant, set(left_out)

    def _scale(self, dtype: str) -> Rescale | None:
        """The scale that `dtype` needs for the model and the adapters that are there now, found without loading anything."""
        if dtype != "float16":
            return None
        try:
            return self.model.plan(self.model.fitting(self._peaks())[0])
        except Refused:  # for all of them together
            return self.model.plan()

    def _peaks(self) -> dict[Path, Peaks]:
        """The peaks of each task's adapter by its folder; what is being written lies in folders that begin with a dot."""
        return {file.parent.resolve(): json.loads(file.read_text())["peaks"] for file in sorted(self.adapters.glob("[!.]*/range.json"))}

    def _backend_for(self, dtype: str) -> str:
        """vLLM's GPU LoRA kernels take 16-bit types only; float32 with adapters on a GPU is answered by transformers."""
        on_gpu = self.model.device == "cuda" and dtype == "float32" and self.uses_adapters
        return "transformers" if on_gpu else self.backend


def canary(engine, prompts: list[Prompt]) -> verdict.Answers:
    """An engine's greedy answers to the canary's prompts, in their order: token ids and the logprob of each."""
    answers = {a.prompt.key: (a.token_ids, list(a.logprobs)) for a in engine.answer(prompts, verdict.CANARY_TOKENS)}
    return [answers[p.key] for p in prompts]
