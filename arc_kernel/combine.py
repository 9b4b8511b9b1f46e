"""Several submissions become one: first attempts of each, gaps filled, or votes over the completions of several runs.

A source is a submission.json or a run's folder. Of a folder it is known which attempts are answers and which only
`solve`'s fallback; in a file an attempt is empty where it is no grid, or where both attempts are Kaggle's placeholder. Knows
grids and votes; nothing of solutions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ArcKernelError, counted
from .run_folder import RunFolder, read_run
from .select import Voted, attempts, ranked
from .tasks import ATTEMPTS, Attempts, Grid, read_submission, task_to_json, write_submission

PLACEHOLDERS = (np.zeros((2, 2), np.int8), np.zeros((1, 1), np.int8))  # both attempts in Kaggle's sample_submission.json; in others'


@dataclass(frozen=True)
class Source:
    """Attempts by (task id, test index): `answers`, distinct and in order, and `spare` grids that answer nothing; how many are none."""

    path: Path
    answers: dict[tuple[str, int], list[Grid]]
    spare: dict[tuple[str, int], list[Grid]]
    no_grids: int = 0


def combine(paths: list[Path], out: Path, rule: str, tasks: str = "") -> str:
    """Write the submission of a rule over sources, in order of trust; one line on where its attempts come from.

    `first`: the first attempts of the sources, then their second ones; `fill`: the first source's attempts, then the next
    one's; each time the first two distinct answers there are. `vote`: over all predictions of run folders, so that a run
    with twice the predictions weighs twice. The result has every task and output of any source. Raises ArcKernelError where
    fewer than two sources are given, one is no submission or run, or `out` is one of them.
    """
    if len(paths) < 2:
        raise ArcKernelError("combine: one source: give two or more")
    if twice := next((p for n, p in enumerate(paths) if p.resolve() in {q.resolve() for q in paths[:n]}), None):
        raise ArcKernelError(f"{twice}: given twice: give each source once")
    if any(out.resolve() in (p.resolve(), (p / "submission.json").resolve()) for p in paths):
        raise ArcKernelError(f"{out}: is one of the sources: give another --out")
    runs = [_run(p, tasks) for p in paths if rule == "vote" or p.is_dir()]
    _same_tasks(runs)
    if rule == "vote":
        sources = [_voted(runs)]
    else:
        folders = {run.path: run for run in runs}
        sources = [_folder(folders[p]) if p in folders else _file(p) for p in paths]
    outputs: dict[str, int] = {}
    for source in sources:
        for task_id, index in source.answers:
            outputs[task_id] = max(outputs.get(task_id, 0), index + 1)
    chosen = {(i, k): _choose(sources, (i, k), rule) for i, n in outputs.items() for k in range(n)}
    try:
        write_submission(out, outputs, {where: grids for where, (grids, _) in chosen.items()})
    except OSError as error:
        raise ArcKernelError(f"{out}: cannot be written ({error.strerror}): give another --out") from None
    empty = sum(not origins for _, origins in chosen.values())
    head = f"{out}: {len(chosen)} outputs of {len(outputs)} tasks"
    if rule == "vote":
        made = ", ".join(f"{sum(map(len, run.completions.values()))} of {run.path}" for run in runs)
        return f"{head}; predictions: {made}; {empty} without an answer"
    taken = Counter(origin for _, origins in chosen.values() for origin in origins)
    filled = sum(any(origins) for _, origins in chosen.values())
    from_each = ", ".join(f"{taken[n]} from {source.path}" for n, source in enumerate(sources))
    left_out = "".join(f"; {counted(s.no_grids, 'attempt')} of {s.path} without a grid" for s in sources if s.no_grids)
    return f"{head}; attempts: {from_each}; {counted(filled, 'output')} with one from another than the first, {empty} still empty{left_out}"


def _choose(sources: list[Source], where: tuple[str, int], rule: str) -> tuple[Attempts, list[int]]:
    """Two attempts of an output and the numbers of the sources whose answers they are."""
    of = [source.answers.get(where, []) for source in sources]
    order = [(grid, n) for n, grids in enumerate(of) for grid in grids]
    if rule == "first":
        order = [(grids[k], n) for k in range(len(ATTEMPTS)) for n, grids in enumerate(of) if k < len(grids)]
    answers = _distinct(order)[:2]
    spare = [(grid, None) for source in sources for grid in source.spare.get(where, [])] + [(grid, None) for grid in PLACEHOLDERS]
    first, second = (grid for grid, _ in _distinct(answers + spare)[:2])
    return (first, second), [n for _, n in answers]


def _distinct(grids: list[tuple[Grid, int | None]]) -> list[tuple[Grid, int | None]]:
    """Grids with their origins, later ones equal to an earlier one left out."""
    kept: dict[tuple, tuple[Grid, int | None]] = {}
    for grid, origin in grids:
        kept.setdefault((grid.shape, grid.tobytes()), (grid, origin))
    return list(kept.values())


def _run(path: Path, tasks: str) -> RunFolder:
    if not path.is_dir():
        raise ArcKernelError(f"{path}: no run's folder: rule vote counts completions: give the output folders of solve")
    return read_run(path, tasks, scored=False)


def _same_tasks(runs: list[RunFolder]) -> None:
    """Raise ArcKernelError where two runs have answered different tasks of one id; one may have fewer test inputs of it."""
    seen: dict[tuple[str, int], tuple] = {}
    for run in runs:
        for i, task in run.challenges.tasks.items():
            told = task_to_json(task)
            for k, test in enumerate(told["test"]):
                if seen.setdefault((i, k), (told["train"], test, run.path))[:2] != (told["train"], test):
                    raise ArcKernelError(f"{run.path}: task {i} is another than in {seen[i, k][2]}: combine runs on the same tasks")


def _file(path: Path) -> Source:
    """The attempts of a submission file."""
    answers, spare, none = {}, {}, 0
    for where, given in read_submission(path, empty_allowed=True).items():
        grids = [g for g in given if g is not None]
        none += len(given) - len(grids)
        empty = any(len(grids) == len(ATTEMPTS) and all(np.array_equal(g, placeholder) for g in grids) for placeholder in PLACEHOLDERS)
        answers[where], spare[where] = ([], grids) if empty else (grids, [])
    return Source(path, answers, spare, none)


def _folder(run: RunFolder) -> Source:
    """The two best candidates of each output of a run; what else `solve` submits answers nothing."""
    return _from_votes(run.path, [run], {(i, k): run.voted(i, k) for i, n in run.challenges.outputs.items() for k in range(n)})


def _voted(runs: list[RunFolder]) -> Source:
    """The two best candidates of each output over the completions of all runs, each read with its run's encoder."""
    found: dict[tuple[str, int], list[Voted]] = {}
    for run in runs:
        for i, n in run.challenges.outputs.items():
            for k in range(n):
                found.setdefault((i, k), []).extend(run.voted(i, k))
    return _from_votes(Path(), runs, {where: _together(votes) for where, votes in found.items()})


def _together(votes: list[Voted]) -> list[Voted]:
    """Votes of several runs with those for one grid made one."""
    merged: dict[tuple, Voted] = {}
    for grid, logprobs, views in votes:
        one = merged.setdefault((grid.shape, grid.tobytes()), Voted(grid, [], []))
        one.logprobs.extend(logprobs)
        one.views.extend(views)
    return list(merged.values())


def _from_votes(path: Path, runs: list[RunFolder], votes: dict[tuple[str, int], list[Voted]]) -> Source:
    """The best two candidates as answers, and the attempts `solve` gives where there are none as spare."""
    having = lambda i, k: (t for run in runs if (t := run.challenges.tasks.get(i)) and k < len(t.test))  # a run may have fewer of them
    test_input = lambda i, k: next((t.test[k].input for t in having(i, k)), None)
    return Source(path, {where: [c.grid for c in ranked(of)[:2]] for where, of in votes.items()},
                  {where: list(attempts([], test_input(*where))) for where in votes})
