"""One worker process: its share of tasks is adapted with one base model, then answered from one engine.

Started by `run` as `python -m arc_kernel.worker`. It asks for work and reports over stdin and stdout, one JSON object a
line, and is never told a solution. What it prints otherwise goes to its log.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Callable

from . import adapt, disk
from .checkpoint import load_tokenizer
from .device import device_name, require_device, require_own_gpu
from .dtypes import HEADROOM, HEADROOM_TTT, Model
from .errors import ArcKernelError, first_line, named_line
from .grids import GridEncoder
from .job import Job
from .memory import exhausted, free_memory, importing
from .precision import verdict
from .precision.rescale import Refused
from .prepare.trimmed import trimmed
from .prompts import PromptBuilder
from .serving import Serving
from .tasks import Task, task_from_json
from .work import LATER

PROGRESS_SECONDS = 0.5
STRIKES = 2  # tasks in a row that fail in a dtype before training leaves it
LESS, SHORTEST = 0.75, 1024  # of the tokens of an example, where a GPU is full; tokens


class OutOfTime(ArcKernelError):
    """The time for training ended with fewer steps taken than are worth an adapter."""


class Worker:
    """The life of a worker; `lines_in` and `lines_out` are the two ends of the talk with `run`."""

    def __init__(self, lines_in, lines_out):
        self._in, self._out = lines_in, lines_out
        self.job = Job(**json.loads(self._in.readline()))
        self.clock = time.perf_counter()

    def tell(self, event: str, **facts) -> None:
        """Report something that happened."""
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()

    def ask(self, stage: str) -> tuple[Task, float] | str | None:
        """The next task of a stage ('adapt' or 'answer') and its share of the time left for it (0 to 1); None where none is left, LATER
        where there is none beside those this worker has."""
        return self._given(self._want(stage=stage))

    def _want(self, **facts) -> dict:
        self.tell("want", **facts)
        line = self._in.readline()
        if not line:  # run is gone
            sys.exit(1)
        return json.loads(line)

    def _given(self, reply: dict) -> tuple[Task, float] | str | None:
        return (task_from_json(reply["task"]), reply["share"]) if reply["task"] else LATER if reply.get("wait") else None

    def lap(self, stage: str, **facts) -> None:
        """Report the seconds since the last lap as spent on `stage`."""
        now = time.perf_counter()
        self.tell("stage", stage=stage, seconds=round(now - self.clock, 3), **facts)
        self.clock = now

    def work(self) -> None:
        """Adapt, then answer, until `run` has no more tasks."""
        job = self.job
        with importing("torch"):
            importlib.import_module("peft" if job.ttt_steps else "transformers")  # and torch with it
        self.device = device_name()
        require_own_gpu(self.device)
        self.lap("import libraries")
        note = lambda text: self.tell("note", text=text)
        folder = trimmed(Path(job.model), job.vocabulary, job.prompt, job.grid_encoder, job.adapter, note)
        self.lap("leave out tokens")
        self.builder = PromptBuilder(load_tokenizer(folder), GridEncoder.from_name(job.grid_encoder), job.prompt)
        start = Path(job.adapter) if job.adapter else None
        tasks = [task_from_json(t) for t in job.probe_tasks]
        self.model = Model(folder, start and start.resolve(), self.builder, tasks, self.device, job.max_seq_len,
                           HEADROOM_TTT if job.ttt_steps else HEADROOM)
        self._adapt_all()
        self._answer_all()

    def _adapt_all(self) -> None:
        asked = self.ask("adapt")
        if asked is None:
            return
        self._strikes = 0  # tasks in a row that needed a wider dtype
        self._dtypes = verdict.training_candidates(self.job.ttt_dtype, self.device)
        if not self._load_trainer(self._dtypes):
            raise ArcKernelError(f"{self.job.model}: no dtype is left to train in: set ttt_steps=0")
        for text in filter(None, (self._trainer.left_out, self._trainer.slow)):
            self.tell("note", text=text)
        self.lap("load model")
        tokens = 0
        while asked is not None:
            trouble = ""
            try:
                tokens += self._adapt(*asked)
                self._strikes = 0
            except FloatingPointError as error:  # which holds the model while it is at hand
                trouble = str(error)
            if trouble:
                tokens += self._adapt_in_wider_dtype(*asked, trouble)
            asked = self.ask("adapt")
        self._trainer = None
        free_memory()
        self.lap("adapt", tokens=tokens)

    def _load_trainer(self, dtypes: list[str]) -> bool:
        """Load the model in the first of these dtypes that may train it; False where there is none."""
        job, self._trainer = self.job, None  # the old model goes before the new one comes
        free_memory()
        peaks = "float16" in verdict.candidates(job.dtype, self.device)
        recipe = adapt.Recipe(job.ttt_steps, job.ttt_batch, job.ttt_lr, job.lora_rank, job.max_seq_len, job.permute_background,
                              job.seed, job.ttt_loss == "all")
        for dtype in dtypes:
            try:
                variant = self.model.variant(dtype)
            except Refused as reason:
                self.tell("precision", stage="adapt", dtype=dtype, text=f"{dtype} is not used for training: {reason}")
                continue
            self._trainer = adapt.TaskTrainer(variant.folder, self.builder, recipe, self.model.adapter, self.device, dtype, variant.rescale,
                                              job.graphs, peaks)
            return True
        return False

    def _adapt_in_wider_dtype(self, task: Task, share: float, trouble: str) -> int:
        """Train a task that did not stay finite in the dtypes that may follow. Later tasks are trained as before, unless it
        is the second task in a row: then it is the model, and the wider dtype is kept."""
        before = self._trainer.dtype
        while self._load_trainer(self._dtypes[self._dtypes.index(self._trainer.dtype) + 1:]):
            self.tell("precision", task=task.id, stage="adapt", dtype=self._trainer.dtype,
                      text=f"task {task.id}: {trouble}: trained in {self._trainer.dtype}")
            try:
                tokens = self._adapt(task, share)
            except FloatingPointError as error:
                trouble = str(error)
                continue
            self._strikes += 1
            if self._strikes < STRIKES:
                self._load_trainer([before])
            return tokens
        self.tell("adapt-failed", task=task.id, error=f"task {task.id}: {trouble}: answered without an adapter")
        self._load_trainer([before])  # the task's own fault
        return 0

    def _adapt(self, task: Task, share: float) -> int:
        """Train one task's adapter in this share of the time left; its training tokens. Any failure but a NaN leaves the task
        to the base model."""
        begun = told = time.perf_counter()
        waiting, taken, total = [], 0, 0  # losses not told yet; steps; tokens
        seconds = share * max(0.001, self.job.adapt_until - time.time())

        def on_step(step: int, loss: float, tokens: int) -> None:
            nonlocal taken, total
            if time.time() > self.job.adapt_until and step < adapt.fewest_steps(self.job.ttt_steps):
                raise OutOfTime(f"task {task.id}: time budget: training ends at step {step}: answered without an adapter")
            taken, total = step, total + tokens
            waiting.append(round(loss, 5))
            if time.perf_counter() - told > PROGRESS_SECONDS:
                tell_losses()

        def tell_losses() -> None:
            nonlocal told
            if waiting:
                self.tell("loss", task=task.id, step=taken, losses=waiting[:], tokens=total)
            waiting.clear()
            told = time.perf_counter()

        def on_trouble(text: str) -> None:
            tell_losses()  # after a rollback those of the steps that are taken again replace them
            self.tell("precision", task=task.id, stage="adapt", dtype=self._trainer.dtype, text=f"task {task.id}: {text}")

        try:
            facts = self._train_where_it_fits(task, on_step, on_trouble, seconds)
            tell_losses()
            self.tell("adapted", task=task.id, seconds=round(time.perf_counter() - begun, 3), tokens=total,
                      dtype=self._trainer.dtype, **facts)
        except FloatingPointError:
            raise
        except ArcKernelError as error:
            self.tell("adapt-failed", task=task.id, error=str(error), again=isinstance(error, OutOfTime))
        except Exception as error:
            traceback.print_exc()
            require_device(self.device)
            self.tell("adapt-failed", task=task.id, error=f"task {task.id}: {named_line(error)}: answered without an adapter",
                      again=disk.fault(error))
        return total

    def _train_where_it_fits(self, task: Task, on_step: Callable, on_trouble: Callable, seconds: float) -> dict:
        """`TaskTrainer.train`, in a context shorter by LESS where the GPU has no room for the task's examples, which then lose pairs."""
        trainer, asked = self._trainer, self._trainer.recipe
        try:
            while True:
                try:
                    return trainer.train(task, Path(self.job.adapters) / task.id, on_step, on_trouble, seconds=seconds)
                except Exception as error:  # which holds the step's memory while it is at hand
                    shorter = int(trainer.recipe.max_seq_len * LESS)
                    if not exhausted(error) or shorter < SHORTEST:
                        raise
                    reason = first_line(error)
                free_memory()
                trainer.recipe = dataclasses.replace(trainer.recipe, max_seq_len=shorter)
                on_trouble(f"{reason}: tried with examples of up to {shorter} tokens")
        finally:
            trainer.recipe = asked

    def _answer_all(self) -> None:
        reply, tasks = self._want(stage="answer", now=True), iter(lambda: self.ask("answer"), None)
        if reply["task"] or reply.get("later"):
            serving = Serving(self.job, self.builder, self.model, self.tell, self.lap)
            serving.answer(itertools.chain([self._given(reply)] if reply["task"] else [], tasks), early=reply["task"] is None)


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
    for stream in (talk, sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # taking apart what the libraries made takes seconds, in which `run` waits


if __name__ == "__main__":
    main()
