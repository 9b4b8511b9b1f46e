"""How good runs are, and whether one is better than another: figures with intervals, by predictions, by size, in pairs.

Everything turns around `Sample`, the values of one figure on the tasks that all runs share. Knows run folders and figures;
nothing of models or HTML.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import progress
from .bootstrap import Bootstrap, Interval
from .errors import ArcKernelError, counted
from .fewer import CURVE, sizes, with_fewer
from .run_folder import RunFolder, facts, facts_shown
from .score import FIGURES, output_rows
from .select import vote
from .tasks import Attempts, Task, task_to_json

# pass_1 is what the published figures below call accuracy: that lies below their vote_1, so it is no figure of attempts.
SHOWN = {"pass_1": "a prediction is the solution (mean over all that were made)"} | FIGURES
PUBLISHED_FIGURES = ("pass_1", "pass_n", "vote_2", "vote_1")
BY_SIZE = ("accuracy", "pass_n", "vote_2", "vote_1")  # shown by size of the test input
AVERAGES = ("per_task", "per_output")
SIZES = (25, 100, 225, 400, 900)  # cells of a test input, at most: squares of 5, 10, 15, 20 and 30
FEW_TASKS = 20  # below which the percentile bootstrap's intervals are said to be too narrow
MARK = "* : the interval of the difference does not contain 0"
PUBLISHED_ON = "ARC-AGI-1 evaluation, 400 tasks, 8 predictions, no TTT; in %, per task"
# Published figures of others with which to compare (issue 8); None where not given.
PUBLISHED = (
    {"model": "Qwen2.5-0.5B", "pass_1": 10.32, "pass_n": 27.62, "vote_2": 19.38, "vote_1": 16.88, "note": ""},
    {"model": "SmolLM2-135M", "pass_1": 5.52, "pass_n": 20.50, "vote_2": 12.62, "vote_1": 9.8, "note": ""},
    {"model": "SmolLM-135M", "pass_1": 4.20, "pass_n": 18.25, "vote_2": 11.25, "vote_1": 9.3, "note": ""},
    {"model": "NanoLM-0.3B", "pass_1": 6.38, "pass_n": None, "vote_2": 14.37, "vote_1": None, "note": ""},
    {"model": "Qwen2-0.5B", "pass_1": None, "pass_n": None, "vote_2": 32.1, "vote_1": None, "note": "with TTT per task, 100 tasks"},
)


@dataclass(frozen=True)
class Sample:
    """One run's values [outputs] of one figure; `task` int [outputs] is the number of each output's task, `tasks` of them."""

    values: np.ndarray
    task: np.ndarray
    tasks: int

    def interval(self, bootstrap: Bootstrap, average: str, among: np.ndarray | None = None) -> Interval | None:
        """The figure over the outputs `among` (bool [outputs]; all without it): a mean over outputs, or over tasks' means."""
        of = slice(None) if among is None else among
        sums, counts = (np.bincount(self.task[of], w, self.tasks) for w in (self.values[of], np.ones_like(self.values)[of]))
        if average == "per_task":
            sums, counts = sums / np.maximum(counts, 1), (counts > 0).astype(float)
        return bootstrap.interval(sums, counts)

    def minus(self, other: "Sample") -> "Sample":
        """The difference on each output."""
        return dataclasses.replace(self, values=self.values - other.values)


def evaluate(runs: list[RunFolder], resamples: int, seed: int) -> dict:
    """Figures of runs on the tasks they share, as JSON: fractions with 95% intervals, differences are to the first run.

    Keys: `tasks`, `outputs`, `resamples`, `seed`, `notes` (lines on what to bear in mind), `runs` (each with what
    `run_folder.facts` tells, `per_task`, `per_output`, `by_predictions`, `by_size`), `differences`, `published`. Raises
    ArcKernelError where no solution is known or no task is shared.
    """
    names, ids = run_names(runs), shared_tasks(runs)
    number = {i: n for n, i in enumerate(ids)}
    outputs = [(i, k) for i in ids for k, p in enumerate(runs[0].challenges.tasks[i].test) if p.output is not None]
    with progress.bar(len(runs) * len(outputs), "evaluate", "output") as bar:
        curves = [_curve(run, outputs, bar) for run in runs]
    rows = [output_rows(run.challenges, attempts_of(run), run.candidates) for run in runs]
    task = np.array([number[i] for i, _ in outputs])
    bootstrap = Bootstrap(len(ids), resamples, seed)
    sample = lambda values: Sample(np.array(values, float), task, len(ids))
    figures = [{f: sample([of[i][k][f] for i, k in outputs]) for f in FIGURES} for of in rows]
    figures = [{"pass_1": sample([e["pass_n"] for e in expected[1]])} | own for own, expected in zip(figures, curves)]
    inputs = np.array([runs[0].challenges.tasks[i].test[k].input.size for i, k in outputs])
    bounds = [(low + 1, high, (inputs > low) & (inputs <= high)) for low, high in zip((0, *SIZES), SIZES)]
    intervals = lambda of, among=None: {a: {f: _json(s.interval(bootstrap, a, among)) for f, s in of.items()} for a in AVERAGES}
    notes = _notes(runs, names, ids, outputs)
    result = {"tasks": len(ids), "outputs": len(outputs), "resamples": resamples, "seed": seed, "notes": notes, "runs": []}
    for run, name, own, expected in zip(runs, names, figures, curves):
        curve = [{"predictions": k} | intervals({f: sample([e[f] for e in of]) for f in CURVE}) for k, of in expected.items()]
        by_size = [{"cells": f"{low}-{high}", "outputs": int(among.sum())} | intervals(own, among)["per_output"]
                   for low, high, among in bounds if among.any()]
        by = {"by_predictions": curve, "by_size": by_size}
        result["runs"].append({"run": name, "folder": str(run.path)} | facts(run) | intervals(own) | by)
    result["differences"] = [{"run": name, "minus": names[0]} | intervals({f: own[f].minus(figures[0][f]) for f in SHOWN})
                             for name, own in zip(names[1:], figures[1:])]
    return result | {"published": {"on": PUBLISHED_ON, "rows": list(PUBLISHED)}}


def run_names(runs: list[RunFolder]) -> list[str]:
    """A name for each run: its folder's, or its whole path where two folders have one name."""
    count = Counter(run.path.resolve().name for run in runs)
    names = [str(run.path) if count[run.path.resolve().name] > 1 else run.path.resolve().name for run in runs]
    paths = [run.path.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ArcKernelError(f"{next(p for p in paths if paths.count(p) > 1)}: given twice: give each run once")
    return names


def shared_tasks(runs: list[RunFolder]) -> list[str]:
    """Ids of tasks with a known solution that are the same in all runs, in the first one's order."""
    solved = [{i: t for i, t in run.challenges.tasks.items() if any(o is not None for o in _solutions(t))} for run in runs]
    for run, of in zip(runs, solved):
        if not of:
            raise ArcKernelError(f"{run.path}: no solutions known of {run.challenges.source}: give --solutions")
    whole = lambda task: (task_to_json(task), _solutions(task))
    alike = lambda i: all(i in of and whole(of[i]) == whole(solved[0][i]) for of in solved)
    ids = [i for i in solved[0] if alike(i)]
    if not ids:
        raise ArcKernelError(f"{', '.join(str(run.path) for run in runs)}: no task in common: give runs on the same tasks")
    return ids


def _solutions(task: Task) -> list[list | None]:
    return [None if p.output is None else p.output.tolist() for p in task.test]


def attempts_of(run: RunFolder) -> dict[tuple[str, int], Attempts]:
    """A run's attempts, voted from its completions as `report` does."""
    return vote(run.challenges, run.candidates)


def _curve(run: RunFolder, outputs: list[tuple[str, int]], bar) -> dict[int, list[dict[str, float]]]:
    """By number of predictions, up to the most made of any output: the curve's figures of each output."""
    made = {where: len(run.answers(*where)) for where in outputs}
    curve: dict[int, list[dict[str, float]]] = {k: [] for k in sizes(max(1, *made.values()))}
    for i, n in outputs:
        truth, found = run.challenges.tasks[i].test[n].output, run.voted(i, n)
        for k, of in curve.items():
            of.append(with_fewer(found, made[i, n], truth, k, (i, n)))
        bar.update()
    return curve


def _notes(runs: list[RunFolder], names: list[str], ids: list[str], outputs: list[tuple[str, int]]) -> list[str]:
    """What to bear in mind: tasks left out, tasks without completions, predictions that were not made."""
    notes = []
    for run, name in zip(runs, names):
        if len(run.challenges.outputs) > len(ids):
            notes.append(f"{name}: {len(ids)} of its {len(run.challenges.outputs)} tasks are compared: "
                         "the others have no known solution, are broken, or are not the same in every run")
        if missing := sum(i not in run.completions for i in ids):
            notes.append(f"{name}: {missing} of {len(ids)} tasks have no completions: counted as unanswered")
        made = [len(run.answers(i, k)) for i, k in outputs]
        if few := sum(0 < n < run.settings.views for n in made):
            why = " (early_stop: their votes are those of all, their pass_n a lower bound)" if run.settings.early_stop else ""
            notes.append(f"{name}: {few} of {len(outputs)} outputs have fewer than {run.settings.views} predictions{why}: "
                         "at larger numbers the curve takes what they have")
    if len(ids) < FEW_TASKS:
        notes.append(f"{counted(len(ids), 'task')} only: intervals from so few are too narrow")
    return notes


def _json(interval: Interval | None) -> dict[str, float] | None:
    return interval and {k: round(v, 6) for k, v in dataclasses.asdict(interval).items()}


def table(result: dict) -> str:
    """The figures as text tables, in per cent with their intervals, published ones marked as such."""
    names = [r["run"] for r in result["runs"]]
    lines = [f"{counted(result['tasks'], 'task')}, {counted(result['outputs'], 'test output')}; in %, with 95% intervals "
             f"(percentile bootstrap over tasks, {result['resamples']} resamples, seed {result['seed']})"
             + f"; {MARK}" * bool(result["differences"]),
             *(f"{run['run']}: {', '.join(f'{k} {v}' for k, v in facts_shown(run).items())}" for run in result["runs"]),
             *(f"note: {text}" for text in result["notes"])]
    columns = [*names, *(f"{d['run']} - {d['minus']}" for d in result["differences"])]
    for average, meaning in zip(AVERAGES, (SHOWN, dict.fromkeys(SHOWN, ""))):  # each is explained once
        lines += ["", _line(average.replace("_", " "), columns)]
        lines += [f"{_line(f, [figure(of, average, f) for of in (*result['runs'], *result['differences'])])}  {meaning[f]}".rstrip()
                  for f in SHOWN]
    for run in result["runs"]:
        lines += ["", f"{run['run']}: per task by predictions, per output by cells of the test input", _line("predictions", CURVE)]
        lines += [_line(str(row["predictions"]), [percent(row["per_task"][f]) for f in CURVE]) for row in run["by_predictions"]]
        lines.append(_line("cells", ["outputs", *BY_SIZE]))
        lines += [_line(row["cells"], [str(row["outputs"]), *(percent(row[f]) for f in BY_SIZE)]) for row in run["by_size"]]
    lines += ["", f"published, not measured here: {result['published']['on']}", _line("model", PUBLISHED_FIGURES)]
    lines += [_line(row["model"], published_row(row)) + f"  {row['note']}".rstrip() for row in result["published"]["rows"]]
    return "\n".join(lines)


def published_row(row: dict) -> list[str]:
    """The figures of a published row in the order of PUBLISHED_FIGURES, `-` where not given."""
    return ["-" if row[f] is None else f"{row[f]:.2f}" for f in PUBLISHED_FIGURES]


def percent(interval: dict | None) -> str:
    """An interval as `12.5 [5.0, 20.0]`, in per cent."""
    return "-" if interval is None else "{value:.1f} [{low:.1f}, {high:.1f}]".format(**{k: 100 * v for k, v in interval.items()})


def figure(of: dict, average: str, name: str) -> str:
    """A figure of a run, or of a difference: `12.5 [5.0, 20.0] *`, marked where the difference's interval does not contain 0."""
    interval = of[average][name]
    return percent(interval) + " *" * ("minus" in of and interval is not None and interval["low"] * interval["high"] > 0)


def _line(head: str, values) -> str:
    return f"{head:16}" + "".join(f"  {v:>22}" for v in values)
