"""A worker's answers: tasks become prompts, prompts become answers of one engine, every answer is guarded.

Engines come from `chooser`, healthy, in the order in which dtypes are tried. What has no finite answer nevertheless, and
only that, is answered again by the next one.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Iterator

from .chooser import Chooser
from .dtypes import Model
from .engine import Answer, Prompt
from .errors import counted, named_line
from .job import Job
from .prompts import PromptBuilder
from .select import PARTIAL, Completion, decided, read_completions, status_of, write_completions
from .tasks import Task
from .views import shared_views
from .work import LATER, Feed, Work

KEEP_SECONDS = 15.0  # at most so often is what there is of a task written before it is whole: of 32 large grids that takes 15 ms


class Serving:
    """Answers tasks in the first healthy dtype; `tell` and `lap` report what happens, as the worker's methods do."""

    def __init__(self, job: Job, builder: PromptBuilder, model: Model, tell: Callable, lap: Callable):
        self.job, self.builder, self.tell, self.lap = job, builder, tell, lap
        self.out, self.max_new_tokens = Path(job.out), job.max_new_tokens or builder.longest_answer
        self._chooser = Chooser(model, job.dtype, job.backend, job.max_seq_len, job.lora_rank, Path(job.adapters), tell, lap, job.profile)

    def answer(self, tasks: Iterator[tuple[Task, float] | str], early: bool = False) -> None:
        """Answer tasks as they come, each with its share of the time left (0 to 1), or LATER.

        `early`: they come when other workers have adapted theirs, and the engine is started before that. A task is finished when
        every prompt has a finite answer, no dtype is left, or its time is over. Raises RuntimeError where no engine could be started
        and it was not judged: another process, or this one's device later, may answer. The process ends afterwards: the engine that gave
        the last answers is left as it is.
        """
        first: list[tuple[Task, float] | str] = []

        def wait() -> None:
            first.extend(itertools.islice(tasks, 1))
            self.lap("wait for other workers")

        waiting: Iterable[Work | str] = self._works(itertools.chain(first, tasks))
        again = False
        for engine, variant, left_out in self._chooser.engines(wait if early else None):
            waiting = self.serve(engine, waiting, left_out, f"answer again in {variant.dtype}" if again else "answer")
            engine.close(last=not waiting)
            if not waiting:
                return
            again = True
            for place, work in enumerate(waiting):
                work.share = 1 / (len(waiting) - place)
                self._keep(work)
            lost, names = sum(len(w.needed(p)) for w in waiting for p in w.waiting), ", ".join(w.task.id for w in waiting)
            self.tell("precision", stage="answer", dtype=variant.dtype, tasks=[w.task.id for w in waiting], predictions=lost,
                      text=f"{counted(lost, 'prediction')} ({names}) without a finite answer in {variant.dtype}: "
                           "asked again where a dtype is left")
        last_words = {e["dtype"]: e for e in self._chooser.evidence}.values()  # of each dtype, whatever backends were tried before
        unjudged = [e for e in last_words if not e["ok"] and not e["judged"]]
        if unjudged and not again:
            raise RuntimeError(f"no engine could be started: {'; '.join(e['seen'] for e in unjudged)}")
        for work in waiting:
            work.done = [c for c in work.done if c.status != "nan"]
            left = sum(len(work.needed(p)) for p in work.waiting)
            work.cut += left if unjudged else 0  # the next start may have another engine
            lost = f"{counted(left, 'prediction')} lost" if work.done else "fallback answer"
            self._finish(work, error=f"task {work.task.id}: no dtype gives finite answers: {lost}")

    def _works(self, tasks: Iterable[tuple[Task, float] | str]) -> Iterator[Work | str]:
        """Each task with its prompts, LATER as it is; those that have none are finished at once."""
        for given in tasks:
            if given == LATER:
                yield LATER
                continue
            task, share = given
            try:
                prompts, notes = self._prompts(task)
            except Exception as error:  # one task's trouble is its own
                traceback.print_exc()
                prompts, notes = [], [f"task {task.id}: {named_line(error)}: fallback answer"]
            for note in notes:
                self.tell("note", task=task.id, text=note)
            work = Work(task, prompts, prompts[0].adapter if prompts else None, share)
            if prompts:
                yield work
            else:
                self._finish(work)

    def _prompts(self, task: Task) -> tuple[list[Prompt], list[str]]:
        """The prompts of a task, each once, and what must be said about them.

        View by view, so that a vote is not decided by half of the views; prompts of one view stand together, since what
        they begin with is computed once where one comes after the other (vLLM's prefix cache).
        """
        job, notes = self.job, []
        like: dict[tuple[int, ...], list[int]] = {}  # train pairs kept -> test inputs
        for i in range(len(task.test)):
            answer = min(self.max_new_tokens, self.builder.likely_answer(task, i))
            kept = self.builder.fit(task.train, task.test[i].input, answer, job.max_seq_len)
            if kept is None:
                notes.append(f"task {task.id}, test input {i + 1}: longer than max_seq_len {job.max_seq_len} even with one pair: "
                             "fallback answer")
                continue
            if len(kept) < len(task.train):
                notes.append(f"task {task.id}, test input {i + 1}: {len(task.train) - len(kept)} of {len(task.train)} train pairs "
                             f"dropped to fit max_seq_len {job.max_seq_len}")
            like.setdefault(kept, []).append(i)
        asked = []  # (place of the view, test index, view, token ids)
        for kept, tests in like.items():
            fitted = Task(task.id, tuple(task.train[k] for k in kept), task.test)
            for i, views in shared_views(fitted, tests, job.views, job.seed, job.permute_background).items():
                if len(views) < job.views:
                    notes.append(f"task {task.id}, test input {i + 1}: only {len(views)} distinct views of {job.views} asked")
                asked += [(place, i, str(v), tuple(self.builder.prompt(v, fitted, i))) for place, v in enumerate(views)]
        stands_for: dict[tuple[int, ...], list[tuple[int, str]]] = {}
        for _, i, view, ids in sorted(asked):
            stands_for.setdefault(ids, []).append((i, view))
        adapter = self._adapter_of(task)
        return [Prompt((task.id, tuple(predictions)), list(ids), adapter) for ids, predictions in stands_for.items()], notes

    def _adapter_of(self, task: Task) -> Path | None:
        folder = Path(self.job.adapters) / task.id
        if folder.is_dir():
            return folder.resolve()
        return Path(self.job.adapter).resolve() if self.job.adapter else None

    def serve(self, engine, works: Iterable[Work | str], left_out: set[Path], stage: str) -> list[Work]:
        """Answer work as it comes, streaming; given back is what has prompts without a finite answer."""
        feed, counts = Feed(works, engine, left_out, self.job.answer_until), Counter()
        viable = lambda ids: self.builder.encoder.may_begin(self.builder.text_of(ids))
        for answer in engine.answer(feed.prompts(), self.max_new_tokens, viable, feed.wanted):
            if not feed.wanted(answer.prompt):  # it ended in the step that decided its vote
                continue
            work = feed.answered(answer.prompt)
            completions = self._completions(answer, work)
            work.take(answer.prompt, completions)
            counts.update(prompt_tokens=len(answer.prompt.token_ids), cached_tokens=answer.cached, tokens=completions[0].tokens,
                          predictions=len(completions), repeated=len(completions) - 1)
            for completion in completions:
                self.tell("completion", task=work.task.id, status=completion.status, tokens=completion.tokens)
                counts.update(decided=self._decide(work, completion.test_index))
            if feed.done(work):
                self._finish(work)
            elif time.monotonic() > work.kept_at + KEEP_SECONDS:
                self._keep(work)
        self.lap(stage, **counts)
        if feed.in_time():
            return feed.unfinished
        for work in feed.rest():  # who waits for these to end gets the others then
            self._break_off(work)
        return []

    def _decide(self, work: Work, test_index: int) -> int:
        """Leave out of a task's work what can no longer change this test input's attempts; how many predictions that are."""
        done = [c for c in work.done if c.test_index == test_index and c.status != "nan"]
        left = sum(i == test_index for prompt in work.left() for i, _ in work.needed(prompt))
        if not self.job.early_stop or not left or not decided(done, left, self.builder.encoder):
            return 0
        work.decide(test_index)
        self.tell("decided", task=work.task.id, test_index=test_index, predictions=left,
                  text=f"test input {test_index + 1}: decided by {counted(len(done), 'prediction')}, {left} more not needed")
        return left

    def _completions(self, answer: Answer, work: Work) -> list[Completion]:
        """The completions an answer stands for, one per prediction that is needed."""
        text = "" if answer.status == "nan" else self.builder.text_of(answer.token_ids)
        status = status_of(answer.status, text, self.builder.encoder)
        ids = [] if status == "nan" else answer.token_ids
        return [Completion(work.task.id, i, view, text, ids, answer.logprob, status, len(answer.logprobs))
                for i, view in work.needed(answer.prompt)]

    def _break_off(self, work: Work) -> None:
        """Keep what there is of a task at the end of the time budget."""
        work.cut += sum(len(work.needed(p)) for p in work.left())
        work.done = [c for c in work.done if c.status != "nan"]
        made = len(work.done)
        self.tell("note", task=work.task.id, text=f"task {work.task.id}: time budget: {made} of {made + work.cut} predictions made")
        self._finish(work)

    def _keep(self, work: Work) -> None:
        """Write what there is of a task, should the process be lost before the rest is there."""
        work.kept_at = time.monotonic()
        if finite := [c for c in work.done if c.status != "nan"]:
            write_completions(self._partial(work), self._with_kept(work, finite))

    def _with_kept(self, work: Work, made: list[Completion]) -> list[Completion]:
        """`made` and what an earlier start, or a worker that died, left of predictions that have no finite answer now."""
        partial, there = self._partial(work), {(c.test_index, c.view) for c in made if c.status != "nan"}
        if work.before is None:  # later it holds what this work has written itself
            work.before = read_completions(partial) if partial.is_file() else []
        return [*made, *(c for c in work.before if c.status != "nan" and (c.test_index, c.view) not in there)]

    def _partial(self, work: Work) -> Path:
        return self.out / "completions" / f"{work.task.id}.jsonl{PARTIAL}"

    def _finish(self, work: Work, error: str = "") -> None:
        """Write a task's completions; those of a task that was cut short beside the files of the others, to be made anew."""
        lacking = work.cut or error or not work.done
        made = self._with_kept(work, work.done) if lacking else work.done
        order = sorted(made, key=lambda c: (c.test_index, c.view, c.status != "nan"))
        partial = self._partial(work)
        write_completions(partial if work.cut else partial.with_suffix(""), order)
        if not work.cut:
            partial.unlink(missing_ok=True)
        counts = {s: sum(c.status == s for c in order) for s in {c.status for c in order}}
        self.tell("answered", task=work.task.id, tokens=sum(c.tokens for c in order), statuses=counts, cut=work.cut,
                  **({"error": error} if error else {}))
