"""Pictures: tasks, predictions beside the truth, loss curves, the stage table; one HTML page a run, and the same pieces in
the notebook. Knows run folders and grids; nothing of models.

Grids are small PNG images inside the page, so that it opens from the file system and can be sent as one file.
"""

from __future__ import annotations

import base64
import html
import io
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Callable

import numpy as np

from .errors import counted
from .events import losses, stage_rows, stage_table
from .files import read_json, replacing, short_path
from .precision.probe import headroom
from .precision.rescale import Rescale
from .score import FIGURES
from .select import Candidate
from .settings import Settings
from .tasks import Attempts, Challenges, Grid, Task

# The colours of ARC's own testing interface (github.com/fchollet/ARC-AGI, apps/css/common.css), 0 to 9, then grid lines.
PALETTE = ("000000", "0074D9", "FF4136", "2ECC40", "FFDC00", "AAAAAA", "F012BE", "FF851B", "7FDBFF", "870C25", "555555")
CANDIDATES_SHOWN = 8
NO_GRID = {"unparsable": "text that is no grid", "truncated": "out of tokens before an end", "nan": "not finite"}  # statuses in words
TOLD = "note", "out-of-time", "worker-died"  # events about a whole run
LEGEND_TRUTH = "Green frame: equal to the solution; red frame: not. "
LEGEND = "First the attempts; below them all candidates, most votes first."
PAGE_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
h2{margin-top:2em;border-top:1px solid #ccc;padding-top:1em}td,th{padding:.15em .8em}"""
# Styles stand in the elements, because a notebook shows pieces of the page without its style sheet.
ROW = "display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start;margin:.6em 0"
PAIR = "display:flex;gap:.4em;align-items:center;border:1px solid #ddd;padding:.4em"
CAPTION = "font-size:12px;color:#555;max-width:14em;white-space:pre-line"
NOTE = "color:#a40"
RIGHT, WRONG = "outline:3px solid #2a2", "outline:3px solid #c33"


def read_verdict(out: Path) -> dict | None:
    """The precision.json of a run folder; None where no dtype was needed yet, or the file is damaged."""
    try:
        verdict = read_json(out / "precision.json")
    except (OSError, ValueError):
        return None
    return verdict if isinstance(verdict, dict) else None


def picture(grid: Grid, caption: str = "", style: str = "", width: int = 150) -> str:
    """A grid as an HTML figure with an inline PNG, cells 5 to 18 pixels wide."""
    from PIL import Image

    rows, columns = grid.shape
    cell = max(5, min(18, width // max(rows, columns)))
    pixels = np.full((rows * (cell + 1) + 1, columns * (cell + 1) + 1), len(PALETTE) - 1, dtype=np.uint8)
    for r in range(rows):
        for c in range(columns):
            pixels[r * (cell + 1) + 1:(r + 1) * (cell + 1), c * (cell + 1) + 1:(c + 1) * (cell + 1)] = grid[r, c]
    drawn = Image.fromarray(pixels)
    drawn.putpalette(b"".join(bytes.fromhex(c) for c in PALETTE))
    data = io.BytesIO()
    drawn.save(data, "PNG", optimize=True)
    source = base64.b64encode(data.getvalue()).decode()
    alt = html.escape(f"{rows}x{columns} grid")
    image = f'<img style="margin:0;{style}" alt="{alt}" src="data:image/png;base64,{source}">'
    return f'<figure style="margin:0">{image}<figcaption style="{CAPTION}">{html.escape(caption)}</figcaption></figure>'


def task_html(task: Task) -> str:
    """All pairs of a task and its test inputs."""
    pairs = [f'<div style="{PAIR}">{picture(p.input)}<span>→</span>{picture(p.output)}</div>' for p in task.train]
    tests = [f'<div style="{PAIR}">{picture(p.input, f"test input {i}")}</div>' for i, p in enumerate(task.test, 1)]
    return f'<div style="{ROW}">{"".join(pairs + tests)}</div>'


def predictions_html(task: Task, index: int, found: list[Candidate], attempts: Attempts) -> str:
    """Test input, both attempts, the truth where known, and the candidates with votes and logprob, most votes first; right or wrong is
    said in words and by the colour of the frame."""
    truth = task.test[index].output
    right = lambda grid: truth is not None and np.array_equal(grid, truth)
    mark = lambda grid: "" if truth is None else RIGHT if right(grid) else WRONG
    said = lambda grid: "" if truth is None else ": right" if right(grid) else ": wrong"
    shown = [picture(task.test[index].input, f"test input {index + 1}")]
    shown += [picture(g, f"attempt {n}{said(g)}", mark(g)) for n, g in enumerate(attempts, 1)]
    shown += [picture(truth, "truth")] if truth is not None else []
    rest = [picture(c.grid, f"{counted(c.votes, 'vote')}{said(c.grid)}\nlogprob/token {c.logprob:.3f}", mark(c.grid), 90)
            for c in found[:CANDIDATES_SHOWN]]
    more = f"<p>{counted(len(found) - CANDIDATES_SHOWN, 'more candidate')}</p>" if len(found) > CANDIDATES_SHOWN else ""
    none = "" if found else f'<p style="{NOTE}">no view gave a valid grid: fallback answer</p>'
    return f'<div style="{ROW}">{"".join(shown)}</div>{none}<div style="{ROW}">{"".join(rest)}</div>{more}'


def no_grids(statuses: dict[str, int]) -> str:
    """How many of a task's predictions gave no grid, and why; empty where all did."""
    why = [f"{statuses[status]} {text}" for status, text in NO_GRID.items() if statuses.get(status)]
    count = sum(statuses.values())
    return f"{count - statuses.get('ok', 0)} of {counted(count, 'prediction')} gave no grid: {', '.join(why)}" if why else ""


def cut_short(events: list[dict], settings: Settings) -> dict[str, str]:
    """Of each task that had fewer steps or predictions than asked how many, as its last events tell."""
    last = {(e["event"], e["task"]): e for e in events if e["event"] in ("adapted", "answered")}
    texts = defaultdict(list)
    for (event, task), e in last.items():
        if event == "adapted" and e["steps"] < settings.ttt_steps:
            texts[task].append(f"trained for {e['steps']} of {counted(settings.ttt_steps, 'step')}")
        elif e.get("cut"):
            texts[task].append(f"{counted(e['cut'], 'prediction')} fewer than asked")
    return {task: ", ".join(said) for task, said in texts.items()}


def losses_html(curves: dict[str, list[float]]) -> str:
    """Loss curves of all tasks, thin, with their mean, as one inline SVG; empty where nothing was trained."""
    if not curves:
        return "<p>No adapters were trained.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for task_id, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), smooth(curve), linewidth=0.8, alpha=0.7, label=task_id)
    longest = max(map(len, curves.values()))
    mean = [np.mean([c[i] for c in curves.values() if len(c) > i]) for i in range(longest)]
    axes.plot(range(1, longest + 1), smooth(mean), color="black", linewidth=2, label="mean")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    log_scale(axes)
    if len(curves) <= 10:
        axes.legend(fontsize=7, ncols=2)
    return svg(figure)


def headroom_html(peaks: dict[str, list[float]], rescale: Rescale | None) -> str:
    """log2 of the headroom to float16's limit by depth, a line a site, as the weights are and as they are served; inline SVG."""
    from matplotlib.figure import Figure

    shown = [("as the weights are", peaks)] + ([("rescaled, as served in float16", rescale.scaled(peaks))] if rescale else [])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(panels, shown):
        for number, (site, row) in enumerate((s, r) for s, r in rows.items() if len(r) > 1):
            axes.plot(range(len(row)), [min(30.0, max(-10.0, headroom(p))) for p in row], linewidth=1.2, color=f"C{number % 10}",
                      linestyle="-" if number < 10 else "--", marker="" if number < 10 else ".", label=site)
        axes.axhspan(-10, 0, color="#c33", alpha=0.15)
        axes.axhline(0, color="#c33")
        axes.set(title=title, xlabel="layer")
    panels[0].set_ylabel("headroom in float16, bits")
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure)


def precision_html(verdict: dict | None, float16: Rescale | None = None) -> str:
    """The verdict on dtypes: what was tried and seen, and the picture of headroom where the model was probed, beside it what `float16`
    would be served as, where that is not what the verdict says."""
    if not verdict:
        return "<p>No dtype was needed.</p>"
    rows = "".join(f"<tr><td>{html.escape(e['dtype'])}</td><td>{html.escape(e['backend'])}</td><td>{'used' if e['ok'] else 'dropped'}</td>"
                   f"<td>{html.escape(e['seen'])}</td></tr>" for e in verdict["evidence"])
    made = verdict["rescale"] and Rescale.from_json(verdict["rescale"])
    text = (f"<p>Inference in <b>{verdict['dtype'] or 'no dtype'}</b>{f', {html.escape(str(made))}' if made else ''}.</p>"
            f"<table>{rows}</table>")
    return text + (headroom_html(verdict["peaks"], float16 or made) if verdict["peaks"] else "")


def metrics_html(metrics: dict | None) -> str:
    """The figures as a table."""
    if not metrics:
        return "<p>No solutions known: nothing to score.</p>"
    c, rows = metrics["counts"], []
    for name, value in metrics["per_output"].items():
        rows.append(f'<tr><td>{name}</td><td>{value:.4f}</td><td>{metrics["per_task"][name]:.4f}</td>'
                    f'<td style="text-align:left">{FIGURES[name]}</td></tr>')
    return (f"<p><b>{c['solved_outputs']} of {c['outputs']} test outputs solved</b>, {c['solved_tasks']} of {c['tasks']} tasks.</p>"
            f"<table><tr><th></th><th>per output</th><th>per task</th><th></th></tr>{''.join(rows)}</table>")


def page(title: str, body: str) -> str:
    """A whole HTML page."""
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<style>{PAGE_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>')


def write_report(out: Path, settings: Settings, challenges: Challenges, found: dict[str, list[list[Candidate]]],
                 attempts: dict[tuple[str, int], Attempts], metrics: dict | None, events: list[dict]) -> Path:
    """Write `report.html` into a run folder and return its path."""
    notes = defaultdict(list)
    for e in events:
        if e.get("task") and (e.get("error") or e.get("text")):
            notes[e["task"]].append(e.get("error") or e["text"])
    lost = {e["task"]: no_grids(e.get("statuses", {})) for e in events if e["event"] == "answered"}  # of a task answered anew the last
    told = dict.fromkeys(e["text"] for e in events if e["event"] in TOLD and e.get("text") and not e.get("task"))
    less = cut_short(events, settings)
    body = [f"<h2>Score</h2>{metrics_html(metrics)}", f"<h2>Stages</h2><pre>{html.escape(stage_table(stage_rows(events)))}</pre>",
            f"<h2>Precision</h2>{precision_html(read_verdict(out))}", f"<h2>Training loss</h2>{losses_html(losses(events))}"]
    if told:
        body.append(f"<h2>What happened</h2><ul>{''.join(f'<li>{html.escape(text)}</li>' for text in told)}</ul>")
    known = any(p.output is not None for t in challenges.tasks.values() for p in t.test)
    body.append(f"<h2>Tasks</h2><p>{LEGEND_TRUTH * known}{LEGEND}</p>")
    for task_id, count in challenges.outputs.items():
        task = challenges.tasks.get(task_id)
        body.append(f'<h2 id="{html.escape(task_id)}">{html.escape(task_id)}</h2>')
        if task is None:
            body.append(f'<p style="{NOTE}">{html.escape(challenges.broken[task_id])}</p>')
            continue
        said = [*dict.fromkeys(notes[task_id]), *filter(None, [less.get(task_id), lost.get(task_id)])]
        body += [f'<p style="{NOTE}">{html.escape(text)}</p>' for text in said]
        body.append(task_html(task))
        for i in range(count):
            best = found[task_id][i] if task_id in found else []
            body.append(predictions_html(task, i, best, attempts[task_id, i]))
    body.append(f"<h2>Settings</h2><pre>{html.escape(settings.to_json())}</pre>")
    start = f" from {short_path(settings.adapter)}" if settings.adapter else ""
    title = f"arc-kernel: {settings.tasks}, {short_path(settings.model)}{start}, {settings.ttt_steps} steps, {settings.views} views"
    path = out / "report.html"
    with replacing(path) as file:
        file.write(page(title, "".join(body)))
    return path


def svg(figure) -> str:
    """A matplotlib figure as an inline SVG element, the same bytes for the same data."""
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return data.getvalue()[data.getvalue().index("<svg"):]


def log_scale(axes) -> None:
    """A logarithmic y axis whose numbers are written out: 0.2, where matplotlib writes 2 x 10^-1."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Plain(LogFormatterSciNotation):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


def show(make: Callable[..., str], *given) -> None:
    """Display in a notebook the HTML that `make` gives; one that fails is told, and costs no run its submission."""
    from IPython.display import HTML, display

    try:
        display(HTML(make(*given)))
    except Exception:
        traceback.print_exc()


def smooth(curve: list[float]) -> list[float]:
    """Mean over a trailing window of a tenth of the curve: single steps jump between pairs of a task."""
    window = max(1, len(curve) // 10)
    return [float(np.mean(curve[max(0, i + 1 - window): i + 1])) for i in range(len(curve))]
