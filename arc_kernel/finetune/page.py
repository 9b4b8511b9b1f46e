"""Pictures of training: loss by prompt kind, gradient norm, learning rate, tokens/s, share of peak, largest activation; one page
a run, and one for a study of learning rates. Knows run folders; nothing of models."""

from __future__ import annotations

import html
import math
from pathlib import Path

import numpy as np

from .. import report
from ..events import read_events
from ..files import replacing, write_json
from .settings import FinetuneSettings

LAST = 0.1  # share of a run's steps over which figures at its end are means: single steps jump with their examples
LEAST = 4  # steps, though, of which one of these means is made
DIVERGED = 1.2  # times the lowest mean loss on the way that the last one is, or not finite

PANELS = (("gradient", "gradient norm before clipping", "log", 1), ("lr", "learning rate", "linear", 1),
          ("tokens_per_second", "tokens/s", "linear", 1), ("peak_share", "share of the machine's product peak, %", "linear", 100),
          ("largest", "largest activation", "log", 1))
COLUMNS = {"lr": ("learning rate", "{:g}"), "loss": ("loss at the end, nats per answer token", "{:.4f}"),
           "first_loss": ("loss at the start, nats per answer token", "{:.4f}"), "gradient": ("largest gradient norm", "{:.3g}"),
           "tokens": ("tokens", "{:,}"), "tokens_per_second": ("tokens/s", "{:,.0f}"), "skipped": ("skipped float16 steps", "{}"),
           "peak_share": ("share of the product peak", "{:.1%}"), "diverged": ("diverged", "{}")}  # of figures: heading, form
IN_SHORT = ("lr", "loss", "diverged", "tokens_per_second")  # those of a study's text


def steps(events: list[dict]) -> list[dict]:
    """The events of steps by number; of a step done again after a kill the last."""
    return [e for _, e in sorted({e["step"]: e for e in events if e["event"] == "step"}.items())]


def figures(events: list[dict]) -> dict:
    """Loss of the first and last tenth, the largest gradient norm, tokens/s, share of peak, tokens, skipped steps, `diverged`."""
    rows, gave_up = steps(events), any(e["event"] == "diverged" for e in events)
    if not rows:
        return {"loss": None, "first_loss": None, "gradient": None, "tokens": 0, "tokens_per_second": 0.0, "skipped": 0, "peak_share": 0.0,
                "diverged": gave_up}
    count = min(len(rows), max(LEAST, round(LAST * len(rows))))
    means = [float(np.mean([r["loss"] for r in rows[max(0, i + 1 - count): i + 1]])) for i in range(count - 1, len(rows))]
    seconds = sum(r["seconds"] for r in rows)
    last, gradients = means[-1], [r["gradient"] for r in rows if r["gradient"] is not None and math.isfinite(r["gradient"])]
    return {"loss": last, "first_loss": means[0], "gradient": max(gradients, default=None), "tokens": sum(r["tokens"] for r in rows),
            "tokens_per_second": sum(r["tokens"] for r in rows) / seconds, "skipped": sum(bool(r["skipped"]) for r in rows),
            "peak_share": sum(r["peak_share"] * r["seconds"] for r in rows) / seconds,
            "diverged": gave_up or not math.isfinite(last) or last > DIVERGED * min(means)}


def write_report(out: Path, settings: FinetuneSettings) -> Path:
    """Write `report.html` into a run folder from its events and return its path."""
    events = read_events(out)
    notes = [e for e in events if e.get("text")]
    lines = "".join(f"<li>{html.escape(e['event'])}: {html.escape(e['text'])}</li>" for e in notes)
    body = f"<h2>Figures</h2>{table([figures(events)])}<h2>Training</h2>{dynamics(steps(events))}<h2>What happened</h2><ul>{lines}</ul>"
    with replacing(out / "report.html") as file:
        file.write(report.page(f"Fine-tuning of {settings.model}", body + f"<h2>Settings</h2><pre>{html.escape(settings.to_json())}</pre>"))
    return out / "report.html"


def dynamics(rows: list[dict]) -> str:
    """Six plots over the steps as one inline SVG."""
    if not rows:
        return "<p>No step was taken.</p>"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(3, 2).ravel()
    for kind in sorted({k for r in rows for k in r["kinds"]}):
        found = [(r["step"], r["kinds"][kind]) for r in rows if kind in r["kinds"]]
        panels[0].plot([s for s, _ in found], report.smooth([v for _, v in found]), linewidth=1.2, label=kind)
    panels[0].set(title="loss, nats per answer token (mean over a tenth)")
    report.log_scale(panels[0])
    panels[0].legend(fontsize=7)
    for axes, (name, title, scale, times) in zip(panels[1:], PANELS):
        found = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        axes.plot([s for s, _ in found], [times * v for _, v in found], linewidth=1, marker="." if name == "largest" else None)
        axes.set(title=title if found else f"{title}: not sampled", xlabel="step")
        if scale == "log":
            report.log_scale(axes)
    return report.svg(figure)


def table(rows: list[dict]) -> str:
    """Figures of runs as an HTML table, a run a row."""
    names = list(rows[0])
    cells = "".join(f"<tr>{''.join(f'<td>{shown(n, r[n])}</td>' for n in names)}</tr>" for r in rows)
    return f"<table><tr>{''.join(f'<th>{COLUMNS[n][0]}</th>' for n in names)}</tr>{cells}</table>"


def shown(name: str, value) -> str:
    """A figure as it is written everywhere; `-` where there is none."""
    return "-" if value is None else ("no", "yes")[value] if isinstance(value, bool) else COLUMNS[name][1].format(value)


def study_text(rows: list[dict], out: Path) -> str:
    """What a study in `out` found, as text: a rate a line, the best of them, and how to decide."""
    heads = [COLUMNS[name][0] for name in IN_SHORT]
    line = lambda cells: "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads))
    return "\n".join([line(heads), *(line([shown(name, row[name]) for name in IN_SHORT]) for row in rows), *_found(rows, out)])


def _found(rows: list[dict], out: Path) -> list[str]:
    """The rate of the lowest loss, and what that does not say."""
    fit = [r for r in rows if r["loss"] is not None and not r["diverged"]]
    if not fit:
        return ["Every run diverged."]
    held_out = next(iter(sorted(out.glob("lr-*/held_out.json"))), None)
    unseen = "solve tasks that none of the runs has seen (of a pool, --hold-out keeps some apart)"
    given = f"solve --tasks {held_out}" if held_out else unseen
    return [f"Lowest loss at the end: {min(fit, key=lambda r: r['loss'])['lr']:g}.",
            f"This is the loss on what was trained on. To decide: {given} with each adapter, then evaluate these runs."]


def write_study(out: Path, runs: dict[float, list[dict]]) -> Path:
    """Write study.html and study.json: runs that differ in the learning rate alone, by it, each given by its events."""
    from matplotlib.figure import Figure

    rows = [{"lr": lr} | figures(events) for lr, events in runs.items()]
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss, gradient = figure.subplots(1, 2)
    for lr, events in runs.items():
        found = steps(events)
        loss.plot([r["step"] for r in found], report.smooth([r["loss"] for r in found]), linewidth=1.2, label=f"{lr:g}")
        gradient.plot([r["step"] for r in found], [r["gradient"] for r in found], linewidth=0.8, label=f"{lr:g}")
    for axes, title in ((loss, "loss, nats per answer token"), (gradient, "gradient norm")):
        axes.set(title=title, xlabel="step")
        report.log_scale(axes)
    loss.legend(fontsize=8, title="learning rate")
    found = "".join(f"<p>{html.escape(text)}</p>" for text in _found(rows, out))
    write_json(out / "study.json", rows)
    with replacing(out / "study.html") as file:
        file.write(report.page("Learning rates", found + table(rows) + report.svg(figure)))
    return out / "study.html"
