"""One worker process: its share of tasks is adapted with one base model, then answered from one engine.

Started by `run` as `python -m arc_kernel.worker`. It asks for work and reports over stdin and stdout, one JSON object a
line, and is never told a solution. What it prints otherwise goes to its log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from . import adapt, precision
from .checkpoint import load_tokenizer
from .errors import ArcKernelError
from .generate import Answer, EngineSettings, Prompt, adapter_rank, start_engine
from .grids import GridEncoder
from .prompts import PromptBuilder
from .select import Completion, status_of, write_completions
from .tasks import Task, task_from_json
from .views import View, spread_views, task_rng

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
        job, task = self.job, self.ask("adapt")
        if task is None:
            return
        recipe = adapt.Recipe(job.ttt_steps, job.ttt_batch, job.ttt_lr, job.lora_rank, job.max_seq_len, job.permute_background, job.seed)
        dtypes = adapt.train_dtypes(self.device)
        start = Path(job.adapter) if job.adapter else None
        load = lambda: adapt.TaskTrainer(Path(job.model), self.builder, recipe, start, self.device, dtypes[0])
        trainer = load()
        self.lap("load model")
        tokens = 0
        while task is not None:
            try:
                tokens += self._adapt(trainer, task)
            except FloatingPointError as error:
                self.tell("precision", task=task.id, stage="adapt", dtype=dtypes[0], seen=str(error), next=dtypes[1:2])
                if len(dtypes) > 1:
                    dtypes = dtypes[1:]
                    del trainer
                    adapt.free_memory()
                    trainer = load()
                    continue
                self.tell("adapt-failed", task=task.id, error=f"task {task.id}: {error}: answered without an adapter")
            task = self.ask("adapt")
        del trainer
        adapt.free_memory()
        self.lap("adapt", tokens=tokens)

    def _adapt(self, trainer: adapt.TaskTrainer, task: Task) -> int:
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
            trainer.train(task, self.out / "adapters" / task.id, on_step)
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
        first = self.ask("answer")
        self.lap("wait for other workers")
        dtypes = precision.candidates(self.job.dtype, self.device)
        evidence, again = [], [first] if first else []
        fresh = self._tasks()
        for number, dtype in enumerate(dtypes):
            last = number == len(dtypes) - 1
            if not again:
                break
            backend = self._backend_for(dtype)
            try:
                engine = start_engine(backend, self._engine_settings(dtype), self.device)
            except ArcKernelError as error:
                traceback.print_exc()
                evidence.append({"dtype": dtype, "backend": backend, "ok": False, "seen": str(error)})
                continue
            self.lap("start engine", dtype=dtype)
            seen = self._canary(engine, again[0])
            self.lap("canary")
            evidence.append({"dtype": dtype, "backend": backend, "ok": not seen, "seen": seen or "finite logprobs, varied tokens"})
            self.tell("verdict", dtype=None if seen else dtype, evidence=evidence)
            if not seen or last:  # with the last dtype even a sick engine answers, and the guard marks what is NaN
                again = self._serve(engine, again, fresh, keep_nan=last)
                fresh = iter(())
                if again:
                    self.tell("precision", stage="answer", dtype=dtype, tasks=[t.id for t in again], seen="nan answers", next=dtypes[number + 1:])
            engine.close()
            del engine
        if first is not None and (fresh_left := [*again, *fresh]):
            self.tell("verdict", dtype=None, evidence=evidence)
            for task in fresh_left:
                self._finish(task, [], error="no engine starts")

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

    def _canary(self, engine, task: Task) -> str:
        """What is wrong with a few real answers in this dtype, or an empty string."""
        prompts = self._prompts(task)[0][:2]
        if not prompts:
            return ""
        prompts += [Prompt(p.key, p.token_ids, None) for p in prompts[:1] if p.adapter]
        answers = [(a.token_ids, a.logprob) for a in engine.answer(prompts, precision.CANARY_TOKENS)]
        digits = {t for c in "0123456789" for t in self.builder.ids_of(c)}
        return precision.judge(answers, digits)

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

    def _serve(self, engine, first: list[Task], more: Iterator[Task], keep_nan: bool) -> list[Task]:
        """Answer tasks as they come, streaming; those with NaN answers are given back, unless `keep_nan`."""
        open_tasks: dict[str, tuple[Task, int]] = {}
        done: dict[str, list[Completion]] = defaultdict(list)
        sick, prompt_tokens, new_tokens = [], 0, 0

        def feed():
            nonlocal prompt_tokens
            for tasks in (first, more):
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
            task_id = answer.prompt.key[0]
            completion = self._completion(answer)
            done[task_id].append(completion)
            new_tokens += completion.tokens
            task, expected = open_tasks[task_id]
            if len(done[task_id]) < expected:
                self.tell("completion", task=task_id, status=completion.status, tokens=completion.tokens)
            elif any(c.status == "nan" for c in done[task_id]) and not keep_nan:
                sick.append(task)
                del done[task_id]
            else:
                self._finish(task, done.pop(task_id))
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
