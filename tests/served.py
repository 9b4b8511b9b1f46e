"""What tests of serving share: an engine that answers with grids we choose, one prompt a step, the oldest first. Prompts, views, votes and
files are the real ones.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from arc_kernel import select, work
from arc_kernel.engine import Answer
from arc_kernel.grids import GridEncoder
from arc_kernel.job import Job
from arc_kernel.prompts import PromptBuilder
from arc_kernel.serving import Serving
from arc_kernel.views import View

ENCODER = GridEncoder.from_name("digits")
JOB = Job(model="", vocabulary="full", adapter="", out="", adapters="", profile="auto", backend="vllm", dtype="float32", ttt_dtype="auto",
          grid_encoder="digits", prompt="compact", permute_background=False, max_seq_len=4096, max_new_tokens=100, views=8,
          early_stop=True, seed=0, ttt_steps=0, ttt_batch=1, ttt_lr=1e-3, ttt_loss="last", lora_rank=8,
          adapt_until=math.inf, answer_until=math.inf, probe_tasks=())
ONE, TWO, THREE = [[1]], [[2]], [[3]]


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, ENCODER, "compact")


@pytest.fixture
def task(arc_training):
    return arc_training.tasks["d037b0a7"]


@pytest.fixture
def task_of_two(arc_training):
    return arc_training.tasks["25ff71a9"]


def small_tasks(n, task):
    return [dataclasses.replace(task, id=f"t{k}") for k in range(n)]


class Engine:
    """Answers a prompt with the grid that `grid_of(test index, view)` gives, seen through its view; None: NaN."""

    in_flight, adapters = 32, 4
    batch = property(lambda self: self.in_flight)

    def __init__(self, builder, grid_of):
        self.builder, self.grid_of, self.sent, self.given_up, self.batches = builder, grid_of, [], [], []

    def answer(self, prompts, max_new_tokens, viable, wanted):
        running, source, ended = [], iter(prompts), False
        while running or not ended:
            self.given_up += [p for p in running if not wanted(p)]
            running = [p for p in running if wanted(p)]
            while not ended and len(running) < self.in_flight:
                prompt = next(source, "end")
                ended = prompt == "end"
                if ended or prompt is None:
                    break
                running.append(prompt)
                self.sent.append(prompt)
            self.batches.append(list(running))
            if running:
                yield self.answer_to(running.pop(0))

    def answer_to(self, prompt):
        i, view = prompt.key[1][0]
        grid = self.grid_of(i, view)
        if grid is None:
            return Answer(prompt, [], math.nan, "nan", ())
        ids = self.builder.answer_ids(View.parse(view).apply_grid(np.array(grid, np.int8)))
        return Answer(prompt, ids[:-1], -0.5 * len(ids), "ok", (-0.5,) * len(ids), cached=10)

    def close(self, last=False):
        self.closed = "with the process" if last else "at once"


def served(tmp_path, builder, tasks, *engines, share=lambda task: 1.0, evidence=(), **changes):
    """The events told while these tasks, each in its `share(task)` of the time left, are answered by these engines, one after the other;
    of others there is the `evidence`."""
    told = []
    server = Serving(dataclasses.replace(JOB, out=str(tmp_path), adapters=str(tmp_path / "adapters"), **changes), builder,
                     SimpleNamespace(adapter=None),
                      lambda event, **facts: told.append({"event": event, **facts}),
                      lambda stage, **facts: told.append({"event": "stage", "stage": stage, **facts}))
    variants = [SimpleNamespace(dtype=name) for name in ("float16", "float32")]
    server._chooser = SimpleNamespace(engines=lambda wait: ((e, v, set()) for e, v in zip(engines, variants)), evidence=evidence)
    server.answer(t if t == work.LATER else (t, share(t)) for t in tasks)
    return told


def completions(tmp_path, task):
    return select.read_completions(tmp_path / "completions" / f"{task.id}.jsonl")


def of(told, kind):
    return [e for e in told if e["event"] == kind]


def numbered(*answers):
    """grid_of for an engine that gives these grids, one a call."""
    left = iter(answers)
    return lambda i, view: next(left)
