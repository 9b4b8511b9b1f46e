"""A worker's answers: tasks become prompts, prompts become answers of one engine, every answer is guarded.

The dtype is settled first: candidates in order, each by the canary against the float32 reference, or at once by the
verdict of an earlier run. What is NaN nevertheless, and only that, is answered again in the next dtype afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator

from .dtypes import Model, Variant, canary
from .errors import ArcKernelError
from .generate import Answer, EngineSettings, Prompt, adapter_rank, start_engine
from .job import Job
from .precision import rescale, verdict
from .precision.verdict import Precision
from .prompts import PromptBuilder
from .select import Completion, status_of, write_completions
from .tasks import Task
from .views import spread_views, task_rng


@dataclass
class Work:
    """A task on its way: prompts still to be answered, completions there are; `failed` are prompts answered with NaN."""

    task: Task
    prompts: list[Prompt]
    done: list[Completion] = field(default_factory=list)
    failed: list[Prompt] = field(default_factory=list)
    answered: int = 0


class Serving:
    """Answers tasks in the first healthy dtype; `tell` and `lap` report what happens, as the worker's methods do."""

    def __init__(self, job: Job, builder: PromptBuilder, model: Model, device: str, tell: Callable, lap: Callable):
        self.job, self.builder, self.model, self.device, self.tell, self.lap = job, builder, model, device, tell, lap
        self.out, self.max_new_tokens = Path(job.out), job.max_new_tokens or builder.longest_answer
        self._evidence: list[dict] = []

    def answer(self, tasks: Iterable[Task]) -> None:
        """Answer tasks as they come. A task is finished when every prompt has a finite answer, or no dtype is left."""
        waiting: Iterable[Work] = self._works(tasks)
        dtypes = verdict.candidates(self.job.dtype, self.device)
        known = Precision.load(self._verdict_path(), self._verdict_key())
        settled = False
        for dtype in dtypes:
            last = dtype == dtypes[-1]
            started = self._start(dtype, last, None if settled else known)
            if started is None:
                continue
            engine, left_out = started
            settled = True
            waiting = self._serve(engine, waiting, left_out, "answer" if not self._again(waiting) else f"answer again in {dtype}")
            engine.close()
            if not waiting:
                return
            prompts = sum(len(w.prompts) for w in waiting)
            self.tell("precision", stage="answer", dtype=dtype, tasks=[w.task.id for w in waiting], predictions=prompts, next=dtypes[dtypes.index(dtype) + 1:],
                      text=f"{prompts} predictions of {len(waiting)} tasks have no finite answer in {dtype}" + ("" if last else ": answered again in the next dtype"))
        if not settled:
            self.tell("verdict", **dataclasses.asdict(Precision(None, None, None, tuple(self._evidence), self._verdict_key())))
        for work in waiting:
            work.done = [c for c in work.done if c.status != "nan"]
            self._finish(work, error=f"task {work.task.id}: no dtype gives finite answers: " + ("fallback answer" if not work.done else f"{len(work.prompts)} predictions lost"))

    @staticmethod
    def _again(waiting: Iterable[Work]) -> bool:
        return isinstance(waiting, list)

    def _start(self, dtype: str, last: bool, known: Precision | None):
        """(engine, folders of adapters it cannot serve) of a healthy dtype, or None; evidence is gathered."""
        if known and known.dtype != dtype and any(e["dtype"] == dtype for e in known.evidence):
            self._evidence += [e for e in known.evidence if e["dtype"] == dtype]
            return None
        backend, engine, seen = self._backend_for(dtype), None, ""
        try:
            variant, left_out = self._variant(dtype)
            self.lap("probe", dtype=dtype)
            reference = None if known else self.model.reference()
            self.lap("float32 reference")
            engine = start_engine(backend, self._engine_settings(variant), self.device)
            self.lap("start engine", dtype=dtype)
            if reference is not None:
                judged = verdict.judge(canary(engine, self.model.canary_prompts()), reference, last)
                self.lap("canary")
                wrong, seen = judged.wrong, str(judged)
        except ArcKernelError as error:
            traceback.print_exc()
            wrong = seen = str(error)
        else:
            wrong = "" if reference is None else wrong
        if known and not wrong:
            self._evidence += [e for e in known.evidence if e["dtype"] == dtype]
        else:
            self._evidence.append({"dtype": dtype, "backend": backend, "ok": not wrong, "seen": seen})
        if wrong:
            if engine is not None:
                engine.close()
            self.tell("precision", stage="canary", dtype=dtype, text=f"{dtype} is not used: {wrong}")
            return None
        self._settle(variant)
        return engine, left_out

    def _settle(self, variant: Variant) -> None:
        """Keep the verdict for the next run, and tell it."""
        peaks = self.model.ranges().peaks if variant.dtype == "float16" else None
        made = variant.rescale and variant.rescale.to_json()
        settled = Precision(variant.dtype, made, peaks, tuple(self._evidence), self._verdict_key())
        settled.save(self._verdict_path())
        self.tell("verdict", **dataclasses.asdict(settled))

    def _verdict_key(self) -> dict:
        job = self.job
        return {**self.model.key, "wanted": job.dtype, "backend": job.backend, "device": verdict.device_model(self.device),
                "versions": verdict.versions(), "adapters": bool(job.ttt_steps)}

    def _verdict_path(self) -> Path:
        return self.model.cache / f"verdict-{verdict.digest(self._verdict_key())}.json"

    def _variant(self, dtype: str) -> tuple[Variant, set[Path]]:
        """The model as `dtype` wants it, and the tasks' adapters that overflow there whatever is done."""
        if dtype != "float16":
            return self.model.variant(dtype), set()
        peaks = {folder.parent.resolve(): json.loads(folder.read_text())["peaks"] for folder in sorted((self.out / "adapters").glob("*/range.json"))}
        left_out = set()
        for folder, one in peaks.items():
            try:
                self.model.variant(dtype, [one])
            except rescale.Refused as reason:
                if not left_out:
                    self.model.variant(dtype)  # a model that is refused without adapters is not the adapter's fault
                left_out.add(folder)
                self.tell("precision", stage="answer", task=folder.name, dtype=dtype, text=f"task {folder.name}: its adapter is not served in {dtype}: {reason}")
        return self.model.variant(dtype, [p for f, p in peaks.items() if f not in left_out]), left_out

    def _backend_for(self, dtype: str) -> str:
        """vLLM's GPU LoRA kernels take 16-bit types only; float32 with adapters on a GPU is answered by transformers."""
        on_gpu = self.device == "cuda" and dtype == "float32" and (self.job.ttt_steps or self.job.adapter)
        return "transformers" if on_gpu else self.job.backend

    def _engine_settings(self, variant: Variant) -> EngineSettings:
        job = self.job
        rank = adapter_rank(Path(job.adapter)) if job.adapter else job.lora_rank
        uses = job.adapter or any((self.out / "adapters").glob("*/adapter_model.safetensors"))
        return EngineSettings(variant.folder, variant.dtype, job.max_seq_len, self.builder.end_token, rank if uses else 0,
                              variant.rescale, self.builder.special_tokens)

    def _works(self, tasks: Iterable[Task]) -> Iterator[Work]:
        """Each task with its prompts; those that have none are finished at once."""
        for task in tasks:
            try:
                prompts, notes = self._prompts(task)
            except Exception as error:  # one task's trouble is its own
                traceback.print_exc()
                prompts, notes = [], [f"task {task.id}: {type(error).__name__}: {error}: fallback answer"]
            for note in notes:
                self.tell("note", task=task.id, text=note)
            work = Work(task, prompts)
            if prompts:
                yield work
            else:
                self._finish(work)

    def _prompts(self, task: Task) -> tuple[list[Prompt], list[str]]:
        """The prompts of a task (key: task id, test index, view) and what must be said about them."""
        job, prompts, notes = self.job, [], []
        adapter = self._adapter_of(task)
        for i in range(len(task.test)):
            kept = self.builder.fit(task.train, task.test[i].input, self.max_new_tokens, job.max_seq_len)
            if kept is None:
                notes.append(f"task {task.id}, test input {i + 1}: longer than max_seq_len {job.max_seq_len} even with one pair: fallback answer")
                continue
            if len(kept) < len(task.train):
                notes.append(f"task {task.id}, test input {i + 1}: {len(task.train) - len(kept)} of {len(task.train)} train pairs dropped to fit max_seq_len {job.max_seq_len}")
            fitted = Task(task.id, tuple(task.train[k] for k in kept), task.test)
            views = spread_views(fitted, i, job.views, task_rng(job.seed, task.id, f"views {i}"), job.permute_background)
            if len(views) < job.views:
                notes.append(f"task {task.id}, test input {i + 1}: only {len(views)} distinct views of {job.views} asked")
            prompts += [Prompt((task.id, i, str(v)), self.builder.prompt(v, fitted, i), adapter) for v in views]
        return prompts, notes

    def _adapter_of(self, task: Task) -> Path | None:
        folder = self.out / "adapters" / task.id
        if folder.is_dir():
            return folder.resolve()
        return Path(self.job.adapter).resolve() if self.job.adapter else None

    def _serve(self, engine, works: Iterable[Work], left_out: set[Path], stage: str) -> list[Work]:
        """Answer work as it comes, streaming; given back is what has prompts without a finite answer."""
        open_works: dict[str, Work] = {}
        unfinished, prompt_tokens, new_tokens = [], 0, 0

        def feed() -> Iterator[Prompt]:
            nonlocal prompt_tokens
            for work in works:
                if work.prompts[0].adapter in left_out:
                    unfinished.append(work)
                    continue
                open_works[work.task.id] = work
                prompt_tokens += sum(len(p.token_ids) for p in work.prompts)
                yield from work.prompts

        viable = lambda ids: self.builder.encoder.may_begin(self.builder.text_of(ids))
        for answer in engine.answer(feed(), self.max_new_tokens, viable):
            work, completion = open_works[answer.prompt.key[0]], self._completion(answer)
            work.done.append(completion)
            work.answered += 1
            new_tokens += completion.tokens
            if completion.status == "nan":
                work.failed.append(answer.prompt)
            self.tell("completion", task=work.task.id, status=completion.status, tokens=completion.tokens)
            if work.answered == len(work.prompts):
                del open_works[work.task.id]
                if work.failed:
                    unfinished.append(Work(work.task, work.failed, work.done))
                else:
                    self._finish(work)
        self.lap(stage, prompt_tokens=prompt_tokens, tokens=new_tokens)
        return unfinished

    def _completion(self, answer: Answer) -> Completion:
        task_id, test_index, view = answer.prompt.key
        text = "" if answer.status == "nan" else self.builder.text_of(answer.token_ids)
        status = status_of(answer.status, text, self.builder.encoder)
        ids = [] if status == "nan" else answer.token_ids
        return Completion(task_id, test_index, view, text, ids, answer.logprob, status, len(answer.logprobs))

    def _finish(self, work: Work, error: str = "") -> None:
        order = sorted(work.done, key=lambda c: (c.test_index, c.view, c.status != "nan"))
        write_completions(self.out / "completions" / f"{work.task.id}.jsonl", order)
        counts = {s: sum(c.status == s for c in order) for s in {c.status for c in order}}
        self.tell("answered", task=work.task.id, tokens=sum(c.tokens for c in order), statuses=counts, **({"error": error} if error else {}))
