"""How good a submission is, in the field's figures. Knows grids, attempts and candidates; nothing of models.

Every figure is given twice: averaged per test output (Kaggle's leaderboard) and per task (mean over a task's outputs
first), with counts.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from .errors import ArcKernelError, counted
from .select import Candidate
from .tasks import Attempts, Challenges, Grid

FIGURES = {
    "accuracy": "one of the two attempts is the solution",
    "pass_n": "some candidate is the solution (of the predictions made: fewer with early_stop)",
    "vote_1": "the best-voted candidate is the solution",
    "vote_2": "one of the two best-voted candidates is the solution",
    "correct_pixels": "share of attempt 1's cells that are right (0 where its size is wrong; unanswered: the fallback's)",
    "correct_size": "attempt 1 has the solution's size (unanswered: the fallback's)",
    "unanswered": "no view gave a valid grid: a fallback is the answer",
}


def score(challenges: Challenges, attempts: dict[tuple[str, int], Attempts],
          found: dict[str, list[list[Candidate]]] | None = None) -> dict | None:
    """Figures over all test outputs whose solution is known; None where none is.

    Without candidates (`found`), as for a submission from elsewhere, pass_n, vote_1, vote_2 and unanswered are left out.
    A task or output that the submission lacks counts as wrong.
    """
    rows = {task_id: list(of.values()) for task_id, of in output_rows(challenges, attempts, found).items()}
    if not rows:
        return None
    outputs = [row for task in rows.values() for row in task]
    per_task = [{k: float(np.mean([r[k] for r in task])) for k in task[0]} for task in rows.values()]
    mean = lambda some: {k: round(float(np.mean([r[k] for r in some])), 6) for k in some[0]}
    counts = {"tasks": len(rows), "outputs": len(outputs),
              "solved_outputs": int(sum(r["accuracy"] for r in outputs)),
              "solved_tasks": sum(r["accuracy"] == 1 for r in per_task)}
    return {"counts": counts, "per_output": mean(outputs), "per_task": mean(per_task)}


def output_rows(challenges: Challenges, attempts: dict[tuple[str, int], Attempts],
                found: dict[str, list[list[Candidate]]] | None = None) -> dict[str, dict[int, dict[str, float]]]:
    """The figures of each test output whose solution is known: task id -> test index -> figure -> 0 to 1; see `score`."""
    rows: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for task_id, task in challenges.tasks.items():
        for i, pair in enumerate(task.test):
            if pair.output is not None:
                best = (found.get(task_id) or [[]] * len(task.test))[i] if found is not None else None
                rows[task_id][i] = _row(pair.output, attempts.get((task_id, i)), best)
    return dict(rows)


def score_submission(challenges: Challenges, attempts: dict[tuple[str, int], Attempts]) -> dict:
    """Figures of any submission, with `missing_outputs`, and `of_its_tasks`: `counts` over the tasks it has (None where it has none).

    Raises ArcKernelError where no solution is known.
    """
    result = score(challenges, attempts)
    if result is None:
        why = next(iter([*challenges.unscored.values(), *challenges.broken.values()]), "give --solutions")
        raise ArcKernelError(f"{challenges.source}: no solutions known: {why}")
    has = {i for i, _ in attempts}
    own = score(dataclasses.replace(challenges, tasks={i: t for i, t in challenges.tasks.items() if i in has}), attempts)
    return result | {"missing_outputs": sum((i, k) not in attempts for i, n in challenges.outputs.items() for k in range(n)),
                     "of_its_tasks": own and own["counts"], "left_out": {**challenges.broken, **challenges.unscored}}


def table(metrics: dict) -> str:
    """The figures as a text table: name, per output, per task, what it means; before it what the submission lacks."""
    solved = lambda c: f"{c['solved_outputs']} of {c['outputs']} test outputs solved, {c['solved_tasks']} of {c['tasks']} tasks"
    lines = [solved(metrics["counts"]), f"{'':16}{'per output':>12}{'per task':>12}"]
    if missing := metrics.get("missing_outputs"):
        own = metrics["of_its_tasks"]
        lines.insert(0, f"{missing} outputs are missing in the submission and count as wrong"
                        + (f"; of the tasks it has: {solved(own)}" if own else ""))
    if left := metrics.get("left_out"):
        lines.insert(0, f"{counted(len(left), 'task')} left out of the figures: {next(iter(left.values()))}")
    lines += [f"{k:16}{v:12.4f}{metrics['per_task'][k]:12.4f}  {FIGURES[k]}" for k, v in metrics["per_output"].items()]
    return "\n".join(lines)


def _row(truth: Grid, given: Attempts | None, found: list[Candidate] | None) -> dict[str, float]:
    same = lambda grid: float(np.array_equal(grid, truth))
    size = given is not None and given[0].shape == truth.shape
    row = {"accuracy": max(map(same, given)) if given else 0.0}
    if found is not None:
        row["pass_n"] = max((same(c.grid) for c in found), default=0.0)
        row["vote_1"] = max((same(c.grid) for c in found[:1]), default=0.0)
        row["vote_2"] = max((same(c.grid) for c in found[:2]), default=0.0)
    row["correct_pixels"] = float((given[0] == truth).mean()) if size else 0.0
    row["correct_size"] = float(size)
    if found is not None:
        row["unanswered"] = float(not found)
    return row
