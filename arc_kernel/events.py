"""What happens in a run: events.jsonl, written a line at a time and read back; seconds of stages and curves of losses from its lines."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .files import parse_json

STAGE_COUNTS = ("seconds", "tokens", "prompt_tokens", "cached_tokens", "predictions", "repeated", "decided")
COLUMNS = {"cached": "share of the prompts' tokens known from an earlier prompt", "repeated": "had the answer of an equal prompt",
           "decided": "not made, as they could change no vote"}
NUMBER, NOTHING = (int, float), type(None)
FIELDS = {"stage": dict.fromkeys(STAGE_COUNTS, NUMBER) | {"stage": str}, "loss": {"task": str, "step": int, "losses": list},
          "adapted": {"task": str, "steps": int}, "answered": {"task": str, "statuses": dict, "cut": int},
          "step": dict.fromkeys(("loss", "lr", "tokens", "seconds", "peak_share"), NUMBER)
          | {"step": int, "kinds": dict, "skipped": bool, "gradient": (*NUMBER, NOTHING)}}  # read back of events of these kinds
MISSING = dict.fromkeys(STAGE_COUNTS, 0) | {"statuses": {}, "cut": 0}  # of them what need not be there
TEXTS = "task", "text", "error", "dtype"  # of all, where they are there


@dataclass(frozen=True)
class EventLog:
    """events.jsonl of the run in the folder `out`, which began at `begun` (`time.perf_counter`). `silent`: nothing is
    written or printed here, since another process does it or the run is over."""

    out: Path
    begun: float
    silent: bool = False

    def __post_init__(self):
        path = self.out / "events.jsonl"
        with contextlib.suppress(OSError):  # whoever starts a run there says so
            if not self.silent and path.is_file() and not path.read_bytes()[-1:] in (b"", b"\n"):
                with open(path, "a", encoding="utf-8") as file:
                    file.write("\n")  # a kill cut the last line short

    def add(self, event: str, **facts) -> None:
        """Write a line: what happened, seconds since the run began, and `facts`."""
        if not self.silent:
            line = json.dumps({"event": event, "at": round(time.perf_counter() - self.begun, 3), **facts})
            with contextlib.suppress(OSError), open(self.out / "events.jsonl", "a", encoding="utf-8") as file:  # a full disk costs a line
                file.write(line + "\n")

    def say(self, event: str, **facts) -> None:
        """Write it, and print it as one line on stderr, above a progress bar."""
        self.add(event, **facts)
        if not self.silent:
            text = facts.get("error") or facts.get("text") or ", ".join(f"{k} {v}" for k, v in facts.items())
            tqdm.write(f"{event}: {text}", file=sys.stderr)


def read_events(out: Path) -> list[dict]:
    """The events of a run folder; a line that a kill cut short, or that is damaged or lacks what is read of it, is left out."""
    path, events = out / "events.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and _whole(event):
            events.append(event)
    return events


def _whole(event: dict) -> bool:
    """Whether it has what is read of an event of its kind, as it should be."""
    kind, known = event["event"], MISSING | event
    return (all(name in known and isinstance(known[name], of) for name, of in FIELDS.get(kind, {}).items())
            and all(isinstance(event.get(name), (str, NOTHING)) for name in TEXTS)
            and (kind != "loss" or all(isinstance(loss, NUMBER) for loss in event["losses"])))


def stage_rows(events: list[dict]) -> list[dict]:
    """Seconds, share of all seconds, tokens, tokens/s and predictions of each stage, summed over workers and starts.

    Of its predictions, `repeated` had the answer of an equal prompt; `decided` were not made, as they could not change a
    vote; `cached` is the share of the prompts' tokens that was there from an earlier prompt. A stage of its own is what is
    answered again, so that the rows say how many predictions that were and what they cost.
    """
    sums: dict[str, Counter] = {}
    for e in events:
        if e["event"] == "stage":
            sums.setdefault(e["stage"], Counter()).update({k: e.get(k, 0) for k in STAGE_COUNTS})
    total = sum(s["seconds"] for s in sums.values()) or 1.0
    rows = []
    for stage, s in sums.items():
        seconds, tokens, prompts = s["seconds"], s["tokens"] + s["prompt_tokens"], s["prompt_tokens"]
        rows.append({"stage": stage, "seconds": round(seconds, 2), "share": round(seconds / total, 4), "tokens": tokens,
                     "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else 0.0,
                     "cached": round(s["cached_tokens"] / prompts, 4) if prompts else 0.0, "cached_tokens": s["cached_tokens"],
                     **{k: s[k] for k in ("predictions", "repeated", "decided")}})
    return rows


def stage_table(rows: list[dict]) -> str:
    """The stage rows as a text table, and below it what the columns that say something mean."""
    lines = [f"{'stage':26}{'seconds':>10}{'share':>8}{'tokens':>10}{'tokens/s':>10}"
             f"{'cached':>8}{'predictions':>13}{'repeated':>10}{'decided':>9}"]
    rate = lambda r: f"{r['tokens']:10d}{r['tokens_per_second']:10.0f}" if r["tokens"] else f"{'':20}"
    made = lambda r: f"{r['cached']:8.1%}{r['predictions']:13d}{r['repeated']:10d}{r['decided']:9d}" if r["predictions"] else ""
    lines += [f"{r['stage']:26}{r['seconds']:10.1f}{r['share']:8.1%}{rate(r)}{made(r)}".rstrip() for r in rows]
    said = "; ".join(f"{column}: {meaning}" for column, meaning in COLUMNS.items() if any(r[column] for r in rows))
    return "\n".join([*lines, *["seconds: summed over workers and starts"] * any(r["tokens"] for r in rows), *[said] * bool(said)])


def losses(events: list[dict]) -> dict[str, list[float]]:
    """Training loss per step (nats per answer token) of each task; a task trained again after a kill starts over."""
    curves: dict[str, list[float]] = {}
    for e in events:
        if e["event"] == "loss":
            before = curves.get(e["task"], [])[: e["step"] - len(e["losses"])]
            curves[e["task"]] = before + e["losses"]
    return curves
