"""One worker process: its share of tasks is adapted with one base model, then answered from one engine.

Started by `run` as `python -m arc_kernel.worker`. It asks for work and reports over stdin and stdout, one JSON object a
line, and is never told a solution. What it prints otherwise goes to its log.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

from . import adapt, precision
from .checkpoint import free_memory, load_tokenizer
from .errors import ArcKernelError
from .generate import Answer, EngineSettings, Prompt, adapter_rank, start_engine
from .grids import GridEncoder
from .prompts import PromptBuilder
from .select import Completion, status_of, write_completions
from .tasks import Task, task_from_json
from .views import spread_views, task_rng

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What a worker is started with; all that `run` has resolved (no zeros that stand for a default)."""

    model: str
    adapter: str
    out: str
    backend: str
    dtype: str
    grid_encoder: str
    prompt: str
    permute_background: bool
    max_seq_len: int
    max_new_tokens: int
    views: int
    seed: int
    ttt_steps: int
    ttt_batch: int
    ttt_lr: float
    lora_rank: int


class Worker:
    """The life of a worker; `lines_in` and `lines_out` are the two ends of the talk with `run`."""

    def __init__(self, lines_in, lines_out):
        self._in, self._out = lines_in, lines_out
        self.job = Job(**json.loads(self._in.readline()))
        self.out = Path(self.job.out)
        self.clock = time.perf_counter()

    def tell(self, event: str, **facts) -> None:
        """Report something that happened."""
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()

    def ask(self, stage: str) -> Task | None:
        """The next task of a stage ('adapt' or 'answer'), None where there is none left; waits for the reply."""
        self.tell("want", stage=stage)
        line = self._in.readline()
        if not line:  # run is gone
            sys.exit(1)
        reply = json.loads(line)["task"]
        return reply and task_from_json(reply)

    def lap(self, stage: str, **facts) -> None:
        """Report the seconds since the last lap as spent on `stage`."""
        now = time.perf_counter()
        self.tell("stage", stage=stage, seconds=round(now - self.clock, 3), **facts)
        self.clock = now

    def work(self) -> None:
        """Adapt, then answer, until `run` has no more tasks."""
        job = self.job
        self.device = precision.device_name()
        self.builder = PromptBuilder(load_tokenizer(Path(job.model)), GridEncoder.from_name(job.grid_encoder), job.prompt)
        self.max_new_tokens = job.max_new_tokens or self.builder.longest_answer
        self.lap("import libraries")
        self._adapt_all()
        self._answer_all()

    def _adapt_all(self) -> None:
        task = self.ask("adapt")
        if task is None:
            return
        self._load_trainer(adapt.train_dtypes(self.device)[0])
        self.lap("load model")
        tokens = 0
        while task is not None:
            try:
                tokens += self._adapt(task)
            except FloatingPointError as error:
                tokens += self._adapt_in_wider_dtype(task, error)
            task = self.ask("adapt")
        self._trainer = None
        free_memory()
        self.lap("adapt", tokens=tokens)

    def _load_trainer(self, dtype: str) -> None:
        job, self._trainer = self.job, None  # the old model goes before the new one comes
        free_memory()
        recipe = adapt.Recipe(job.ttt_steps, job.ttt_batch, job.ttt_lr, job.lora_rank, job.max_seq_len, job.permute_background, job.seed)
        start = Path(job.adapter) if job.adapter else None
        self._trainer = adapt.TaskTrainer(Path(job.model), self.builder, recipe, start, self.device, dtype)

    def _adapt_in_wider_dtype(self, task: Task, error: FloatingPointError) -> int:
        """Train a task whose loss was not finite in the dtypes that may follow; one is kept only where it helps."""
        before, dtypes = self._trainer.dtype, adapt.train_dtypes(self.device)
        for dtype in dtypes[dtypes.index(before) + 1:]:
            self.tell("precision", task=task.id, stage="adapt", dtype=self._trainer.dtype, seen=str(error), next=dtype)
            self._load_trainer(dtype)
            try:
                return self._adapt(task)
            except FloatingPointError as again:
                error = again
        self.tell("adapt-failed", task=task.id, error=f"task {task.id}: {error}: answered without an adapter")
        if self._trainer.dtype != before:  # the task's own fault
            self._load_trainer(before)
        return 0

    def _adapt(self, task: Task) -> int:
        """Train one task's adapter; its training tokens. Any failure but a NaN leaves the task to the base model."""
        begun = told = time.perf_counter()
        waiting, total = [], 0

        def on_step(step: int, loss: float, tokens: int) -> None:
            nonlocal told, total
            total += tokens
            waiting.append(round(loss, 5))
            now = time.perf_counter()
            if now - told > PROGRESS_SECONDS or step == self.job.ttt_steps:
                self.tell("loss", task=task.id, step=step, losses=waiting[:], tokens=total)
                waiting.clear()
                told = now

        try:
            self._trainer.train(task, self.out / "adapters" / task.id, on_step)
            self.tell("adapted", task=task.id, seconds=round(time.perf_counter() - begun, 3), tokens=total)
        except FloatingPointError:
            raise
        except ArcKernelError as error:
            self.tell("adapt-failed", task=task.id, error=str(error))
        except Exception as error:
            traceback.print_exc()
            self.tell("adapt-failed", task=task.id, error=f"task {task.id}: {type(error).__name__}: {error}: answered without an adapter")
        return total

    def _answer_all(self) -> None:
        """Answer tasks in the first dtype that is healthy; those whose answers are NaN there go on to the next."""
        first = self.ask("answer")
        self.lap("wait for other workers")
        if first is None:
            return
        dtypes, waiting, more = precision.candidates(self.job.dtype, self.device), [first], self._tasks()
        evidence: list[dict] = []
        for number, dtype in enumerate(dtypes):
            engine = self._healthy_engine(dtype, waiting[0], evidence, last=dtype == dtypes[-1])
            self.tell("verdict", dtype=engine and dtype, evidence=evidence)
            if engine is None:
                continue
            waiting, more = self._serve(engine, itertools.chain(waiting, more), keep_nan=dtype == dtypes[-1]), iter(())
            engine.close()
            if not waiting:
                return
            self.tell("precision", stage="answer", dtype=dtype, tasks=[t.id for t in waiting], seen="nan answers", next=dtypes[number + 1:])
        for task in itertools.chain(waiting, more):
            self._finish(task, [], error=f"task {task.id}: no dtype gives finite answers: fallback answer")

    def _healthy_engine(self, dtype: str, task: Task, evidence: list[dict], last: bool):
        """A started engine that passed the canary, or None; what was seen is added to `evidence`."""
        backend, engine = self._backend_for(dtype), None
        try:
            engine = start_engine(backend, self._engine_settings(dtype), self.device)
            self.lap("start engine", dtype=dtype)
            wrong = self._canary(engine, task, last)
            self.lap("canary")
        except ArcKernelError as error:
            traceback.print_exc()
            wrong = str(error)
        evidence.append({"dtype": dtype, "backend": backend, "ok": not wrong, "seen": wrong or "finite logprobs"})
        if wrong and engine is not None:
            engine.close()
        return None if wrong else engine

    def _tasks(self) -> Iterator[Task]:
        while (task := self.ask("answer")) is not None:
            yield task

    def _backend_for(self, dtype: str) -> str:
        """vLLM's GPU LoRA kernels take 16-bit types only; float32 with adapters on a GPU is answered by transformers."""
        on_gpu = self.device == "cuda" and dtype == "float32" and (self.job.ttt_steps or self.job.adapter)
        return "transformers" if on_gpu else self.job.backend

    def _engine_settings(self, dtype: str) -> EngineSettings:
        job = self.job
        rank = adapter_rank(Path(job.adapter)) if job.adapter else job.lora_rank
        uses = job.adapter or any((self.out / "adapters").glob("*/adapter_model.safetensors"))
        return EngineSettings(Path(job.model), dtype, job.max_seq_len, self.builder.end_token, rank if uses else 0)

    def _canary(self, engine, task: Task, last: bool) -> str:
        """What is wrong with a few real answers of the model in this dtype, or an empty string.

        It judges the model each task starts from; a task's own adapter is judged by the guard on each of its answers.
        """
        start = Path(self.job.adapter).resolve() if self.job.adapter else None
        prompts = [dataclasses.replace(p, adapter=start) for p in self._prompts(task)[0][:2]]
        answers = [(a.token_ids, a.logprob) for a in engine.answer(prompts, precision.CANARY_TOKENS)]
        digits = {t for c in "0123456789" for t in self.builder.ids_of(c)}
        return precision.judge(answers, digits, last)

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

    def _serve(self, engine, tasks: Iterable[Task], keep_nan: bool) -> list[Task]:
        """Answer tasks as they come, streaming; those with NaN answers are given back, unless `keep_nan`."""
        open_tasks: dict[str, tuple[Task, int]] = {}
        done: dict[str, list[Completion]] = defaultdict(list)
        sick, prompt_tokens, new_tokens = [], 0, 0

        def feed() -> Iterator[Prompt]:
            nonlocal prompt_tokens
            for task in tasks:
                try:
                    prompts, notes = self._prompts(task)
                except Exception as error:  # one task's trouble is its own
                    traceback.print_exc()
                    prompts, notes = [], [f"task {task.id}: {type(error).__name__}: {error}: fallback answer"]
                for note in notes:
                    self.tell("note", task=task.id, text=note)
                if not prompts:
                    self._finish(task, [])
                    continue
                open_tasks[task.id] = (task, len(prompts))
                prompt_tokens += sum(len(p.token_ids) for p in prompts)
                yield from prompts

        viable = lambda ids: self.builder.encoder.may_begin(self.builder.text_of(ids))
        for answer in engine.answer(feed(), self.max_new_tokens, viable):
            completion = self._completion(answer)
            done[completion.task_id].append(completion)
            new_tokens += completion.tokens
            task, expected = open_tasks[completion.task_id]
            if len(done[task.id]) < expected:
                self.tell("completion", task=task.id, status=completion.status, tokens=completion.tokens)
            elif any(c.status == "nan" for c in done[task.id]) and not keep_nan:
                sick.append(task)
                del done[task.id]
            else:
                self._finish(task, done.pop(task.id))
        self.lap("answer", prompt_tokens=prompt_tokens, tokens=new_tokens)
        return sick

    def _completion(self, answer: Answer) -> Completion:
        task_id, test_index, view = answer.prompt.key
        text = "" if answer.status == "nan" else self.builder.text_of(answer.token_ids)
        status = status_of(answer.status, text, self.builder.encoder)
        ids = [] if status == "nan" else answer.token_ids
        return Completion(task_id, test_index, view, text, ids, answer.logprob, status, len(answer.token_ids) + (answer.status == "ok"))

    def _finish(self, task: Task, completions: list[Completion], error: str = "") -> None:
        order = sorted(completions, key=lambda c: (c.test_index, c.view))
        write_completions(self.out / "completions" / f"{task.id}.jsonl", order)
        counts = {s: sum(c.status == s for c in order) for s in {c.status for c in order}}
        self.tell("answered", task=task.id, tokens=sum(c.tokens for c in order), statuses=counts, **({"error": error} if error else {}))


def main() -> None:
    """Talk over stdin and stdout; everything else printed in this process goes to stderr, which is the log."""
    talk = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(sys.stdin, talk)
    try:
        worker.work()
    except ArcKernelError as error:
        worker.tell("stop", error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
