"""A worker's answers: tasks become prompts, prompts become answers of one engine, every answer is guarded.

Engines come from `dtypes`, healthy, in the order in which dtypes are tried. What has no finite answer nevertheless, and
only that, is answered again by the next one.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator

from .dtypes import Chooser, Model
from .engine import Answer, Prompt
from .job import Job
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

    def __init__(self, job: Job, builder: PromptBuilder, model: Model, tell: Callable, lap: Callable):
        self.job, self.builder, self.tell, self.lap = job, builder, tell, lap
        self.out, self.max_new_tokens = Path(job.out), job.max_new_tokens or builder.longest_answer
        self._chooser = Chooser(model, job.dtype, job.backend, job.max_seq_len, job.lora_rank, Path(job.adapters), tell, lap, job.profile)

    def answer(self, tasks: Iterable[Task]) -> None:
        """Answer tasks as they come. A task is finished when every prompt has a finite answer, or no dtype is left."""
        waiting: Iterable[Work] = self._works(tasks)
        again = False
        for engine, variant, left_out in self._chooser.engines():
            waiting = self._serve(engine, waiting, left_out, f"answer again in {variant.dtype}" if again else "answer")
            engine.close()
            if not waiting:
                return
            again = True
            prompts, names = sum(len(w.prompts) for w in waiting), ", ".join(w.task.id for w in waiting)
            self.tell("precision", stage="answer", dtype=variant.dtype, tasks=[w.task.id for w in waiting], predictions=prompts,
                      text=f"{prompts} predictions ({names}) have no finite answer in {variant.dtype}: asked again where a dtype is left")
        for work in waiting:
            work.done = [c for c in work.done if c.status != "nan"]
            lost = f"{len(work.prompts)} predictions lost" if work.done else "fallback answer"
            self._finish(work, error=f"task {work.task.id}: no dtype gives finite answers: {lost}")

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
        folder = Path(self.job.adapters) / task.id
        if folder.is_dir():
            return folder.resolve()
        return Path(self.job.adapter).resolve() if self.job.adapter else None

    def _serve(self, engine, works: Iterable[Work], left_out: set[Path], stage: str) -> list[Work]:
        """Answer work as it comes, streaming; given back is what has prompts without a finite answer."""
        open_works: dict[str, Work] = {}
        unfinished, prompt_tokens, new_tokens, predictions = [], 0, 0, 0

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
            predictions += 1
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
        self.lap(stage, prompt_tokens=prompt_tokens, tokens=new_tokens, predictions=predictions)
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
