"""Which dtype and backend answer: engines are started, judged by a canary against float32, and the first healthy one is the verdict."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import traceback
from pathlib import Path
from typing import Callable, Iterator, Sequence

from .adapter_fit import adapter_rank
from .device import device_model, native_bfloat16, require_device
from .dtypes import Model, Peaks, Variant, canary
from .engine import EngineSettings, Prompt
from .errors import ArcKernelError, named_line
from .files import read_json
from .generate import start_engine
from .precision import verdict
from .precision.rescale import Refused, Rescale
from .precision.verdict import Precision

OTHERS_KERNELS = ("cuda",)  # devices on which an adapter's products are vLLM's own kernels, compiled for that device by Triton


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
        self._checked = False  # whether the newest engine was asked with an adapter

    def engines(self, wait: Callable[[], None] | None = None) -> Iterator[tuple[object, Variant, set[Path]]]:
        """(engine, variant, folders of adapters it cannot serve) for each healthy dtype; the caller closes the engine.

        The first is the verdict: it is told, and kept, so that the next start has it without reference and canary. Where
        no dtype is healthy, that is told. A dtype in which vLLM does not start, or answers wrongly with an adapter, is tried with
        transformers before the next (`_backends`). `wait` returns when all adapters are there; the first engine is started before that,
        and again where adapters that came meanwhile ask for another scale.
        """
        there = self.adapters and any(self.adapters.glob("[!.]*/adapter_model.safetensors"))
        self.uses_adapters = bool(self.model.adapter or there or wait)
        self.key = {**self.model.key, "wanted": self.wanted, "backend": self.backend, "adapters": self.uses_adapters,
                    "profile": self.profile, "headroom": self.model.headroom, "device": device_model(self.model.device),
                    "versions": verdict.versions()}
        path = self.model.cache / f"verdict-{verdict.digest(self.key)}.json"
        known = Precision.load(path, self.key)
        self._dtypes = verdict.candidates(self.wanted, self.model.device)
        for dtype in self._dtypes:
            backends = self._backends(dtype)
            started = self._settled(dtype, backends, known, path)
            if started is not None and wait is not None:
                wait()
                wait, started = None, self._after_wait(dtype, backends, path, *started)
            if started is not None:
                known = None
                yield started
        if self.settled is None:
            self._settle(None)

    def _settled(self, dtype: str, backends: Sequence[str], known: Precision | None,
                 path: Path) -> tuple[object, Variant, set[Path]] | None:
        """What `_start` gives with the first of the backends that works here; the first that is healthy is the verdict."""
        started = None
        for backend in backends:
            started = self._start(dtype, backend, known)
            if started is not None or not self._goes_on(dtype, self.evidence[-1]["judged"]):
                break
        if started is not None and self.settled is None:
            self._settle(started[1])
            with contextlib.suppress(OSError):  # a full disk: the next start judges again
                self.settled.save(path)
        return started

    def _after_wait(self, dtype: str, backends: Sequence[str], path: Path, engine, variant: Variant,
                    _: set[Path]) -> tuple[object, Variant, set[Path]] | None:
        """What was started before all adapters were there, now that they are: the same engine, unless they ask for another scale or it
        answers wrongly with one."""
        backend, wrong = self.evidence[-1]["backend"], ""
        if self._scale(dtype) == variant.rescale:
            started = engine, *self._variant(dtype)
            if not self._checked:
                wrong = self._wrong_with_adapter(engine, self._asked_with_adapter(backend, started[2]))
            if not wrong:
                return started
        engine.close()  # its memory is needed to check the weights at another scale
        self.settled, self.evidence = None, [e for e in self.evidence if e["dtype"] != dtype]
        if wrong:
            self._reject(dtype, backend, wrong, False)
            backends = backends[1:]
        return self._settled(dtype, backends, None, path)

    def _goes_on(self, dtype: str, judged: bool) -> bool:
        """Whether the next backend may do in a dtype: not where the dtype was judged, unless it is the last one there is."""
        return not judged or dtype == self._dtypes[-1]

    def _start(self, dtype: str, backend: str, known: Precision | None) -> tuple[object, Variant, set[Path]] | None:
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
            asked = self._asked_with_adapter(backend, left_out)
            self.lap("float32 reference")
            settings = EngineSettings(variant.folder, dtype, self.max_seq_len, self.model.builder.end_token,
                                      self._rank if self.uses_adapters else 0,
                                      variant.rescale, self.model.builder.special_tokens, self.profile)
            engine = start_engine(backend, settings, self.model.device)
            self.lap("start engine", dtype=dtype)
            if reference is not None:
                last = (dtype, backend) == (self._dtypes[-1], self._backends(dtype)[-1])
                found = verdict.judge(canary(engine, self.model.canary_prompts()), reference, last)
                self.lap("canary")
                wrong, seen = found.wrong, str(found)
            if not wrong and (wrong := self._wrong_with_adapter(engine, asked)):
                seen, judged = wrong, False
            self._checked = asked is not None
        except Exception as error:  # vLLM and its kernels raise what they like: the next dtype may do
            traceback.print_exc()
            require_device(self.model.device)
            wrong = seen = str(error) if isinstance(error, ArcKernelError) else named_line(error)
            judged = isinstance(error, Refused)  # else it may have been the moment's fault, and is tried again by the next start
        if not wrong:
            self.evidence += before if trusted else [{"dtype": dtype, "backend": backend, "ok": True, "seen": seen, "judged": True}]
            return engine, variant, left_out
        self._reject(dtype, backend, seen, judged, wrong)
        if engine is not None:
            try:
                engine.close()
            except Exception:  # it had failed already
                traceback.print_exc()
        return None

    def _reject(self, dtype: str, backend: str, seen: str, judged: bool, wrong: str = "") -> None:
        """Keep and tell why a dtype is not used with a backend; `wrong`: the same in fewer words."""
        self.evidence.append({"dtype": dtype, "backend": backend, "ok": False, "seen": seen, "judged": judged})
        again = self._goes_on(dtype, judged) and backend in self._backends(dtype)[:-1]
        self.tell("precision", stage="canary", dtype=dtype, text=(f"vLLM is not used in {dtype}, transformers is tried" if again else
                                                                  f"{dtype} is not used") + f": {wrong or seen}")

    def _asked_with_adapter(self, backend: str, left_out: set[Path]) -> tuple[list[Prompt], verdict.Answers] | None:
        """The canary's prompts with one of the tasks' adapters, and float32's answers: no canary has seen the adapters' products, and
        wrong ones would give a submission that looks like any other. None where there is no adapter, or its products are our own."""
        if backend != "vllm" or self.model.device not in OTHERS_KERNELS or self.adapters is None:
            return None
        folders = (f.parent.resolve() for f in sorted(self.adapters.glob("[!.]*/adapter_model.safetensors")))
        adapter = next((f for f in folders if f not in left_out), None)
        if adapter is None:
            return None
        prompts = [dataclasses.replace(p, adapter=adapter) for p in self.model.canary_prompts()]
        try:
            return prompts, self.model.adapter_reference(prompts)
        except Exception as error:  # the reference's own trouble says nothing of the engine
            traceback.print_exc()
            self.tell("note", text=f"vLLM's answers with an adapter are not compared with float32: {named_line(error)}")
            return None

    def _wrong_with_adapter(self, engine, asked: tuple[list[Prompt], verdict.Answers] | None) -> str:
        """What is wrong with an engine's answers to these prompts; empty where nothing is. Ones that are not finite are not the engine's
        fault but this adapter's, in this dtype: each answer is guarded against that."""
        if asked is None:
            return ""
        prompts, reference = asked
        try:
            found = verdict.judge(canary(engine, prompts), reference, False)
        except Exception as error:
            traceback.print_exc()
            require_device(self.model.device)
            return f"with an adapter: {named_line(error)}"
        self.lap("canary with an adapter")
        return found.wrong and math.isfinite(found.difference) and f"with the adapter of task {prompts[0].adapter.name}: {found}" or ""

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
        """The peaks of each task's adapter by its folder; what is being written lies in folders that begin with a dot. A damaged file is
        that of a task that is answered already: the others' are looked at when a run starts."""
        found = {}
        for file in sorted(self.adapters.glob("[!.]*/range.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found[file.parent.resolve()] = read_json(file)["peaks"]
        return found

    def _backends(self, dtype: str) -> list[str]:
        """Backends in the order in which they are tried: transformers comes after vLLM where the device has the dtype.

        vLLM's GPU LoRA kernels take 16-bit types only; float32 with adapters on a GPU is answered by transformers.
        """
        if self.backend != "vllm" or self.model.device == "cuda" and dtype == "float32" and self.uses_adapters:
            return ["transformers"]
        emulated = dtype == "bfloat16" and not native_bfloat16(self.model.device)
        return ["vllm"] if emulated else ["vllm", "transformers"]
