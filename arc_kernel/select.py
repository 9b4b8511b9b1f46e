"""Completions become grids, grids become votes, votes become two attempts per test input.

A vote is one view's answer, seen back through the view. Knows nothing of models; completions are read from and written to
`completions/<task>.jsonl`, so that selection can be done again without the model.

Source: voting over undone augmentations is Akyürek et al. 2024 (test-time training for abstract reasoning) and arc24's
voting script; ties by mean logprob per token are ours.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import ArcKernelError
from .files import parse_json, replacing
from .grids import GridEncoder, Unparsable
from .tasks import Attempts, Challenges, Grid, Task
from .views import View

STATUSES = ("ok", "unparsable", "truncated", "nan")
PARTIAL = ".part"  # added to the name of a file of some completions (time over, a worker lost): they vote, the task is answered anew


@dataclass(frozen=True)
class Completion:
    """One view's answer: its text and ids, the summed logprob over them (nats) and how it ended (one of STATUSES).

    `tokens` counts what was generated, the closing token included.
    """

    task_id: str
    test_index: int
    view: str
    text: str
    token_ids: list[int]
    logprob: float
    status: str
    tokens: int


@dataclass(frozen=True)
class Candidate:
    """A grid some views agree on: votes, mean over them of logprob per token (nats), and their names."""

    grid: Grid
    votes: int
    logprob: float
    views: tuple[str, ...]


def status_of(ended: str, text: str, encoder: GridEncoder) -> str:
    """The status of an answer that ended `ok`, `truncated`, `stopped` or `nan` with this text."""
    if ended in ("truncated", "nan"):
        return ended
    try:
        encoder.decode(text)
        return "ok" if ended == "ok" else "unparsable"
    except Unparsable:
        return "unparsable"


class Voted(NamedTuple):
    """A grid with its votes: of each the logprob per token (nats) and the view."""

    grid: Grid
    logprobs: list[float]
    views: list[str]


def voted_grids(completions: list[Completion], encoder: GridEncoder) -> list[Voted]:
    """Distinct undone grids of answers that ended well, with their votes.

    Raises ArcKernelError naming the task whose stored answer ended well and is no grid.
    """
    seen: dict = {}
    for c in completions:
        if c.status == "ok":
            try:
                grid = _seen_back(c.view, c.text, encoder)
            except ValueError as error:
                raise ArcKernelError(f"task {c.task_id}: completion of view {c.view[:40]!r} is not a grid of this run ({error}): delete "
                                     f"completions/{c.task_id}.jsonl to answer the task again") from None
            voted = seen.setdefault((grid.shape, grid.tobytes()), Voted(grid, [], []))
            voted.logprobs.append(c.logprob / max(1, c.tokens))
            voted.views.append(c.view)
    return list(seen.values())


@functools.lru_cache(maxsize=4096)  # `decided` is asked again with each answer: 64 of 30x30 cells were read 16 times
def _seen_back(view: str, text: str, encoder: GridEncoder) -> Grid:
    """The grid of an answer's text, seen back through its view; raises ValueError where it is none."""
    grid = View.parse(view).undo(encoder.decode(text))
    grid.flags.writeable = False  # it is shared
    return grid


def place(grid: Grid, votes: int, total: float) -> tuple:
    """Candidates are sorted by this: votes, `total` logprob (of as many votes, so as their mean), then shape and bytes, so that no two
    are equal.

    Totals are from `math.fsum`, which does not depend on the order of answers and never grows by a logprob below 0.
    """
    return -votes, -total, grid.shape, grid.tobytes()


def candidates(completions: list[Completion], encoder: GridEncoder) -> list[Candidate]:
    """Distinct undone grids of one test input's completions, best first: votes, then mean logprob per token."""
    return ranked(voted_grids(completions, encoder))


def ranked(found: list[Voted]) -> list[Candidate]:
    """Candidates with these votes, best first; `candidates` of one run's completions, or of several runs' votes put together."""
    order = sorted(found, key=lambda v: place(v.grid, len(v.logprobs), math.fsum(v.logprobs)))
    return [Candidate(grid, len(logprobs), math.fsum(logprobs) / len(logprobs), tuple(views)) for grid, logprobs, views in order]


def decided(completions: list[Completion], outstanding: int, encoder: GridEncoder) -> bool:
    """Whether a test input's attempts are those of these completions, whatever the `outstanding` other answers will be.

    The worst that can happen to a place is that all of them vote for one grid behind it, with logprob 0; so the rule is
    exact: the first two places must hold against every grid behind them and, with no votes yet, against one not seen so
    far (taken as smaller than any other where all else is equal). Below two candidates the unseen grid replaces the
    fallback. The second place needs more votes than there are outstanding answers, and the first as many votes more as
    there are, so nothing is decided before three quarters of all answers are there.
    """
    if outstanding == 0:
        return True
    if 3 * outstanding > len(completions):
        return False
    votes = [(grid, len(logprobs), math.fsum(logprobs)) for grid, logprobs, _ in voted_grids(completions, encoder)]
    votes.sort(key=lambda v: place(*v))
    if len(votes) < 2:
        return False
    first, second = (place(*v) for v in votes[:2])
    best = [place(grid, count + outstanding, total) for grid, count, total in votes]
    unseen = (-outstanding, 0.0, (), b"")
    return first < best[1] and all(second < other for other in [*best[2:], unseen])


def attempts(found: list[Candidate], test_input: Grid | None) -> Attempts:
    """Two distinct grids: the best candidates, then the fallback.

    The fallback is the test input itself, then a grid of its shape filled with 0, then with 1; for a task so broken that
    its input cannot be read, 1x1 grids.
    """
    base = np.zeros((1, 1), np.int8) if test_input is None else test_input
    options = [c.grid for c in found[:2]] + [base, np.zeros_like(base), np.ones_like(base)]
    first = options[0]
    return first, next(g for g in options[1:] if not np.array_equal(g, first))


def all_candidates(task: Task, completions: list[Completion], encoder: GridEncoder) -> list[list[Candidate]]:
    """Candidates of each test input of a task, in order."""
    return [candidates([c for c in completions if c.test_index == i], encoder) for i in range(len(task.test))]


def vote(challenges: Challenges, found: dict[str, list[list[Candidate]]]) -> dict[tuple[str, int], Attempts]:
    """Attempts for every task and test input of the challenges; tasks without candidates get the fallback."""
    result = {}
    for task_id, count in challenges.outputs.items():
        task = challenges.tasks.get(task_id)
        for i in range(count):
            best = found[task_id][i] if task_id in found else []
            result[task_id, i] = attempts(best, task.test[i].input if task else None)
    return result


def write_completions(path: Path, completions: list[Completion]) -> None:
    """One JSON line per completion, by write-then-rename; a NaN logprob is written as null."""
    with replacing(path) as file:
        for c in completions:
            row = vars(c) | {"logprob": c.logprob if math.isfinite(c.logprob) else None}
            file.write(json.dumps(row) + "\n")


def read_completions(path: Path) -> list[Completion]:
    """The completions of a file; raises ArcKernelError naming file and line."""
    rows, types = [], {name: typing.get_origin(kind) or kind for name, kind in typing.get_type_hints(Completion).items()}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = parse_json(line)
            made = Completion(**row | {"logprob": math.nan if row["logprob"] is None else float(row["logprob"])})
            for name in (name for name, kind in types.items() if not isinstance(getattr(made, name), kind)):
                raise TypeError(f"{name} is {getattr(made, name)!r}")
            rows.append(made)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ArcKernelError(f"{path} line {number}: not a completion ({error}): start its run again, "
                                 "which answers the task anew") from None
    return rows
