"""The page of an evaluation: figures, plots, and the tasks that one run solves and another does not, with pictures."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from .errors import counted
from .evaluate import (AVERAGES, BY_SIZE, CURVE, MARK, PUBLISHED_FIGURES, SHOWN, attempts_of, figure, published_row, run_names,
                       shared_tasks)
from .files import replacing
from .report import NOTE, page, predictions_html, svg, task_html
from .run_folder import RunFolder, facts_shown

LINES = ((3.0, "-", "o"), (1.8, "--", "s"), (1.6, ":", "^"), (1.2, "-.", "x"))  # width, style, marker: equal lines are all seen
DIFFERENCES = ("pass_1", "accuracy", "pass_n", "vote_1", "vote_2")  # plotted; the table has all


def write_page(path: Path, runs: list[RunFolder], result: dict) -> None:
    """Write the page of what `evaluate` found on these runs, one file with everything in it."""
    notes = "".join(f'<p style="{NOTE}">{html.escape(text)}</p>' for text in result["notes"])
    text = (f"<p>{counted(result['tasks'], 'task')}, {counted(result['outputs'], 'test output')}; in %, with 95% intervals: percentile "
            "bootstrap over tasks, "
            f"{result['resamples']} resamples, seed {result['seed']}. A difference is paired: both runs on the same tasks"
            f"{f'; {MARK}' * bool(result['differences'])}.</p>")
    body = [_runs(result), text, notes, *(f"<h2>Figures, {a.replace('_', ' ')}</h2>{_figures(result, a)}" for a in AVERAGES)]
    body.append(f"<h2>Published</h2>{_published(result)}")
    if result["differences"]:
        body.append(f"<h2>Differences to {html.escape(result['differences'][0]['minus'])}</h2>{_differences(result)}")
    body.append(f"<h2>By number of predictions, per task</h2>{_curves(result)}")
    body.append(f"<h2>By cells of the test input, per output</h2>{_by_size(result)}")
    if len(runs) > 1:
        body.append(f"<h2>Where runs differ</h2>{_differing(runs)}")
    with replacing(path) as file:
        file.write(page(f"arc-kernel: {', '.join(run_names(runs))}", "".join(body)))


def _rows(header: list[str], rows: list[list[str]]) -> str:
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"
    return f"<table>{line(header, 'th')}{''.join(line(r, 'td') for r in rows)}</table>"


def _runs(result: dict) -> str:
    """What each run is, a run a row."""
    shown = {run["run"]: facts_shown(run) for run in result["runs"]}
    table = _rows(["", *next(iter(shown.values()))], [[name, *of.values()] for name, of in shown.items()])
    return f"{table}<p>Seconds are summed over workers and starts.</p>"


def _figures(result: dict, average: str) -> str:
    shown = [*result["runs"], *result["differences"]]
    header = [r["run"] + (f" - {r['minus']}" if "minus" in r else "") for r in shown]
    unbroken = lambda of, name: figure(of, average, name).replace(" ", "\N{NO-BREAK SPACE}")
    return _rows(["", *header, ""], [[f, *(unbroken(r, f) for r in shown), SHOWN[f]] for f in SHOWN])


def _published(result: dict) -> str:
    rows = [[row["model"], *published_row(row), row["note"]] for row in result["published"]["rows"]]
    return f"<p>Not measured here: {html.escape(result['published']['on'])}.</p>" + _rows(["model", *PUBLISHED_FIGURES, ""], rows)


def _bars(intervals: list[dict]) -> tuple[list[float], list[list[float]]]:
    """Values and the lengths of their error bars down and up, in per cent; a percentile interval may not hold its value."""
    values = [100 * i["value"] for i in intervals]
    down, up = ([max(0.0, sign * (100 * i[end] - v)) for i, v in zip(intervals, values)] for end, sign in (("low", -1), ("high", 1)))
    return values, [down, up]


def _differences(result: dict) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.3 * len(DIFFERENCES) * len(result["differences"])), layout="constrained")
    axes = figure.subplots()
    for number, of in enumerate(result["differences"]):
        values, errors = _bars([of["per_task"][f] for f in DIFFERENCES])
        axes.errorbar(values, np.arange(len(values)) + 0.2 * number, xerr=errors, fmt="o", capsize=3, label=f"{of['run']} - {of['minus']}")
    axes.axvline(0, color="#888", linewidth=1)
    axes.set(xlabel="difference per task, percentage points (95% interval)", yticks=range(len(DIFFERENCES)), yticklabels=DIFFERENCES)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return svg(figure)


def _curves(result: dict) -> str:
    from matplotlib.figure import Figure

    ticks = sorted({row["predictions"] for run in result["runs"] for row in run["by_predictions"]})
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVE), sharey=True), CURVE):
        for number, run in enumerate(result["runs"]):
            at, of = zip(*((row["predictions"], row["per_task"][name]) for row in run["by_predictions"]))
            width, style, marker = LINES[number % len(LINES)]
            line = axes.plot(at, [100 * i["value"] for i in of], style, linewidth=width, marker=marker, label=run["run"])[0]
            axes.fill_between(at, [100 * i["low"] for i in of], [100 * i["high"] for i in of], color=line.get_color(), alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set(title=name, xlabel="predictions", xticks=ticks, xticklabels=ticks)
    _from_zero(figure.axes[0], "% of tasks")
    figure.axes[-1].legend(fontsize=7)
    return svg(figure)


def _from_zero(axes, label: str) -> None:
    """An axis of percentages that begins at 0, and has a length where all of them are 0."""
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    axes.set_ylabel(label)


def _by_size(result: dict) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(BY_SIZE), sharey=True), BY_SIZE):
        for number, run in enumerate(result["runs"]):
            values, errors = _bars([row[name] for row in run["by_size"]])
            width = 0.8 / len(result["runs"])
            axes.bar(np.arange(len(values)) + width * number, values, width, yerr=errors, capsize=2, label=run["run"])
        middle = (0.8 - width) / 2
        labels = [f"{row['cells']}\n({row['outputs']})" for row in result["runs"][0]["by_size"]]
        axes.set(title=name, xticks=np.arange(len(labels)) + middle, xlabel="cells (outputs)")
        axes.set_xticklabels(labels, fontsize=7)
    _from_zero(figure.axes[0], "% of outputs")
    figure.axes[-1].legend(fontsize=7)
    return svg(figure)


def _differing(runs: list[RunFolder]) -> str:
    """The tasks whose outputs some runs solve and others do not: pairs, then each run's attempts and candidates."""
    names, attempts = run_names(runs), [attempts_of(run) for run in runs]
    shown = []
    for i in shared_tasks(runs):
        task = runs[0].challenges.tasks[i]
        solved = [tuple(any(np.array_equal(g, p.output) for g in given[i, k]) for k, p in enumerate(task.test)) for given in attempts]
        if len(set(solved)) == 1:
            continue
        told = ", ".join(f"{name} {sum(s)} of {len(s)}" for name, s in zip(names, solved))
        shown.append(f"<h3>{html.escape(i)}</h3><p>outputs solved: {html.escape(told)}</p>{task_html(task)}")
        for k in range(len(task.test)):
            for run, name, given in zip(runs, names, attempts):
                found = run.candidates[i][k] if i in run.candidates else []
                shown.append(f"<p><b>{html.escape(name)}</b></p>{predictions_html(task, k, found, given[i, k])}")
    differ = counted(sum(s.startswith("<h3>") for s in shown), "task")
    return f"<p>{differ} of which not all runs solve the same outputs.</p>{''.join(shown)}"
