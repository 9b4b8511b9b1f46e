"""Completions become grids, grids become votes, votes become two attempts per test input.

A vote is one view's answer, seen back through the view. Knows nothing of models; completions are read from and written to
`completions/<task>.jsonl`, so that selection can be done again without the model.

Source: voting over undone augmentations is Akyürek et al. 2024 (test-time training for abstract reasoning) and arc24's
voting script; ties by mean logprob per token are ours.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .errors import ArcKernelError
from .grids import GridEncoder, Unparsable
from .tasks import Attempts, Challenges, Grid, Task, replacing
from .views import View

STATUSES = ("ok", "unparsable", "truncated", "nan")


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


def candidates(completions: list[Completion], encoder: GridEncoder) -> list[Candidate]:
    """Distinct undone grids of one test input's completions, best first: votes, then mean logprob per token."""
    seen = defaultdict(list)
    for c in completions:
        if c.status == "ok":
            view = View.parse(c.view)
            grid = view.undo(encoder.decode(c.text))
            seen[grid.shape, grid.tobytes()].append((grid, c.logprob / max(1, c.tokens), c.view))
    found = [Candidate(votes[0][0], len(votes), sum(v[1] for v in votes) / len(votes), tuple(v[2] for v in votes))
             for votes in seen.values()]
    return sorted(found, key=lambda c: (-c.votes, -c.logprob, c.grid.shape, c.grid.tobytes()))


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
            row = asdict(c) | {"logprob": c.logprob if math.isfinite(c.logprob) else None}
            file.write(json.dumps(row) + "\n")


def read_completions(path: Path) -> list[Completion]:
    """The completions of a file; raises ArcKernelError naming file and line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append(Completion(**row | {"logprob": math.nan if row["logprob"] is None else row["logprob"]}))
        except (ValueError, TypeError, KeyError) as error:
            raise ArcKernelError(f"{path} line {number}: not a completion ({error}): delete the file to answer the task again") from None
    return rows
