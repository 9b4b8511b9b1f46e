"""Evaluation tasks in training data, found by content: pairs that are the same under some symmetry and some colours.

Each pair has a canonical form: of its 8 symmetries, with colours renamed by first appearance, the smallest. Only pairs whose
cheap invariants (sides, counts of colours) occur in the evaluation set get one, so that 40,000 pairs take seconds.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Iterable, NamedTuple, Sequence

import numpy as np

from ..tasks import COLOURS, Grid, Pair, Task
from ..views import SYMMETRIES, turned
from .data import Source

SMALL = 16  # cells of a pair: below, two tasks may share one by chance (a recoloured 1x1 output of a 3x3 input)


class Found(NamedTuple):
    """An evaluation task and the source and training task that share a pair with it."""

    task: str
    source: str
    group: str


def invariant(pair: Pair) -> tuple:
    """What no symmetry and no renaming of colours changes: the sides of both grids, and the counts of colours in each."""
    return (*sorted(pair.input.shape), *sorted(pair.output.shape), *_counts(pair.input), -1, *_counts(pair.output))


def _counts(grid: Grid) -> list[int]:
    return sorted(np.bincount(grid.ravel(), minlength=COLOURS).tolist())


def canonical(pair: Pair) -> tuple:
    """The same value for every symmetry and every colouring of a pair, different for different pairs."""
    forms = []
    for symmetry in range(len(SYMMETRIES)):
        seen = [turned(g, symmetry) for g in (pair.input, pair.output)]
        cells = np.concatenate([g.ravel() for g in seen])
        colours, first = np.unique(cells, return_index=True)
        names = np.zeros(COLOURS, np.int8)
        names[colours[np.argsort(first)]] = np.arange(len(colours))
        forms.append((seen[0].shape, seen[1].shape, names[cells].tobytes()))
    return min(forms)


def find(tasks: Iterable[Task], sources: Sequence[Source]) -> list[Found]:
    """Training tasks that hold a pair of an evaluation task, of SMALL or more cells (any pair, where it has smaller ones only), or
    have its id: pools of pairs made for a task are named after it."""
    invariants, forms, ids = set(), defaultdict(set), set()
    for task in tasks:
        ids.add(task.id)
        pairs = [p for p in (*task.train, *task.test) if p.output is not None]
        for pair in [p for p in pairs if p.input.size + p.output.size >= SMALL] or pairs:
            invariants.add(invariant(pair))
            forms[canonical(pair)].add(task.id)
    found = []
    for source in sources:
        for group in source.groups:
            hits = {i for v in group.variations for p in v if invariant(p) in invariants for i in forms.get(canonical(p), ())}
            hits |= {group.id} & ids
            found += [Found(task_id, source.name, group.id) for task_id in sorted(hits)]
    return found


def text(found: Sequence[Found]) -> str:
    """How many tasks were found, and ten of them with where."""
    first = {f.task: f for f in reversed(found)}
    shown = [f"{i} ({first[i].group} in {first[i].source})" for i in sorted(first)[:10]]
    return f"{len(first)} evaluation task{'s' * (len(first) != 1)} in the data" + (f": {', '.join(shown)}" if shown else "") \
        + (f" and {len(first) - 10} more" if len(first) > 10 else "")
