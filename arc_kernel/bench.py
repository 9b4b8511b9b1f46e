"""The `bench` command: what this device can do, and how near to it training, prefill, decoding and a whole run come.

Each part is measured in a fresh process (`bench_part`), several times and interleaved, so that a busy minute falls on all of
them; every figure stands beside its bound, in a table and as JSON, and beside an earlier run where one is given.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from tqdm import tqdm

from . import trained_prompt
from .checkpoint import open_model
from .device import cores, device_model, device_name
from .errors import ArcKernelError
from .files import check_writable, read_json, write_json
from .generate import chosen_backend
from .precision import verdict
from .prepare.trimmed import trimmed
from .settings import AUTO

FORMAT = 1  # of the JSON file
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
MOVES = 0.5  # seconds between two moves of the progress bar
# Parts in order: rounds at most (0: only what starting costs, a second time), and seconds within which further rounds begin.
FULL = (("ceilings", 1, 15.0), ("train", 8, 90.0), ("infer", 8, 100.0), ("train", 0, 10.0), ("infer", 0, 20.0), ("solve", 2, 90.0))
QUICK = (("ceilings", 1, 10.0), ("train", 8, 28.0), ("infer", 8, 32.0), ("solve", 1, 45.0))


@dataclass(frozen=True)
class Figure:
    """Samples of one thing: seconds of each, and of each the share of its bound (`bounds`: least seconds at the speeds measured
    beside it; empty: it has none), `by` what bounds it, and the tokens, FLOP and bytes in it. Peak memory has only `mib`."""

    part: str
    name: str
    seconds: tuple[float, ...] = ()
    bounds: tuple[float, ...] = ()
    by: str = ""
    tokens: float = 0
    flop: float = 0
    bytes: float = 0
    mib: float = 0

    @property
    def best(self) -> float:
        """The least seconds: what the machine does when nobody else is on it."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """How far the median lies above the best: 0.1 is 10%."""
        return statistics.median(self.seconds) / self.best - 1 if self.best else 0.0

    @property
    def share(self) -> float | None:
        """The median share of the bound: 1 would be the device's own speed. None without a bound, or for no time at all."""
        shares = [b / s for b, s in zip(self.bounds, self.seconds) if s]
        return statistics.median(shares) if shares else None


def bench(model: str, vocabulary: str, dtype: str, backend: str, out: Path | None, against: Path | None, quick: bool) -> Path:
    """Measure, print the table and write the JSON; its path. Raises ArcKernelError before anything is measured."""
    folder, earlier, begun = open_model(model), read(against) if against else None, time.perf_counter()
    backend = chosen_backend(backend)
    device = device_name()
    dtype, ttt_dtype = verdict.candidates(dtype, device)[0], verdict.training_candidates(dtype, device)[0]
    out = out or Path("runs/bench") / f"{folder.name}-{dtype}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    check_writable(out)
    prompt, grid_encoder = trained_prompt.choose(AUTO, AUTO, model, "")
    opened = trimmed(folder, vocabulary, prompt, grid_encoder, "", lambda text: print(f"note: {text}", file=sys.stderr, flush=True))
    facts = {"format": FORMAT, "date": time.strftime("%Y-%m-%d %H:%M:%S"), "device": device_model(device), "cores": len(cores()),
             "load": os.getloadavg()[0], "model": folder.name, "versions": verdict.versions()}
    asked = {"dtype": dtype, "ttt_dtype": ttt_dtype, "backend": backend, "quick": quick}
    facts |= asked | {"vocabulary": vocabulary}
    lines = list(_all_parts(QUICK if quick else FULL, asked | {"model": str(opened)}))
    figures, notes = collect(lines), [f"{line['part']}: {line['note']}" for line in lines if "note" in line]
    print(table(figures, earlier and earlier["figures"]))
    for note in notes + (differences(facts, earlier) if earlier else []):
        print(f"note: {note}")
    seconds = time.perf_counter() - begun
    print(f"{facts['device']}, {facts['cores']} cores, {dtype}, training in {ttt_dtype}, {backend}, load {facts['load']:.1f} at the start; "
          f"{seconds:.0f} s in all")
    write_json(out, facts | {"seconds": round(seconds, 1), "notes": notes, "figures": [_plain(f) for f in figures]})
    print(f"figures: {out}")
    return out


def collect(lines: list[dict]) -> list[Figure]:
    """Samples of the same part and name as one figure, in the order in which each was first seen."""
    found: dict[tuple[str, str], list[dict]] = {}
    for line in lines:
        if "name" in line:
            found.setdefault((line["part"], line["name"]), []).append(line)
    figures = []
    for (part, name), samples in found.items():
        last = samples[-1]
        bounds = tuple(s["bound"] for s in samples) if all("bound" in s for s in samples) else ()
        seconds, mib = tuple(s["seconds"] for s in samples if "seconds" in s), max(s.get("mib", 0) for s in samples)
        work = {key: last[key] for key in ("by", "tokens", "flop", "bytes") if key in last}
        figures.append(Figure(part, name, seconds, bounds, mib=mib, **work))
    return figures


def table(figures: list[Figure], earlier: list[Figure] | None = None) -> str:
    """The figures as text: best seconds, how far the median is above, rates at the best, bound and median share of it.

    With an earlier run, the ratio of best seconds to it (below 1: faster now; ~ where the samples of both overlap) and its share.
    """
    before = {(f.part, f.name): f for f in earlier or ()}
    head = f"{'':46}{'best, s':>11}{'median':>8}{'n':>3}{'tokens/s':>10}{'GFLOP/s':>9}{'GB/s':>7}{'bound, s':>11}{'of it':>6}  {'by':6}"
    lines, part = [head + (f"{'x earlier':>11}{'then':>6}" if earlier is not None else "")], ""
    for f in figures:
        if f.part != part:
            lines.append(f"[{f.part}]")
            part = f.part
        old = before.get((f.part, f.name))
        lines.append((_row(f) + (_against(f, old) if old else "")).rstrip())
    return "\n".join(lines)


def _row(f: Figure) -> str:
    if not f.seconds:
        return f"{f.name:46}{f.mib:>11,.0f} MiB"

    def rate(amount: float, unit: float, width: int) -> str:
        speed = amount / f.best / unit if f.best else 0.0
        return f"{speed:{width},.{1 if speed < 100 else 0}f}" if speed else " " * width

    spread = f"{f.spread:+.0%}" if len(f.seconds) > 1 else "-"
    bound = f"{min(f.bounds):11.4f}{f.share:6.0%}  {f.by:6}" if f.share is not None else f"{'-':>11}{'':14}"
    rates = rate(f.tokens, 1, 10) + rate(f.flop, 1e9, 9) + rate(f.bytes, 1e9, 7)
    return f"{f.name:46}{f.best:11.4f}{spread:>8}{len(f.seconds):3}{rates}{bound}"


def _against(f: Figure, old: Figure) -> str:
    if not f.seconds or not old.seconds:
        return f"{f.mib / old.mib:>11.2f}" if f.mib and old.mib else ""
    same = min(f.seconds) <= max(old.seconds) and min(old.seconds) <= max(f.seconds)
    ratio = f"{'~' * same}{f.best / old.best:.2f}" if old.best else "-"
    return f"{ratio:>11}" + (f"{old.share:6.0%}" if old.share is not None else "")


def read(path: Path) -> dict:
    """An earlier run's JSON, its figures as `Figure`s; raises ArcKernelError naming the file."""
    try:
        stored = read_json(path)
        names = {f.name for f in dataclasses.fields(Figure)}
        figures = [Figure(**{k: tuple(v) if isinstance(v, list) else v for k, v in f.items() if k in names}) for f in stored["figures"]]
        return stored | {"figures": figures}
    except FileNotFoundError:
        raise ArcKernelError(f"{path}: no such file: give the --out of an earlier bench") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ArcKernelError(f"{path}: not the figures of a bench: give the --out of an earlier bench") from None


def differences(facts: dict, earlier: dict) -> list[str]:
    """What makes two runs hard to compare, a line each."""
    names = ("device", "cores", "model", "vocabulary", "dtype", "ttt_dtype", "backend", "versions")
    return [f"{name} was {earlier.get(name)} in the earlier run" for name in names if earlier.get(name) != facts[name]]


def _plain(f: Figure) -> dict:
    """A figure for JSON, with what the table derives from it."""
    derived = {"best": f.best, "median": statistics.median(f.seconds), "share": f.share} if f.seconds else {}
    return dataclasses.asdict(f) | derived


def _all_parts(plan: tuple[tuple[str, int, float], ...], asked: dict) -> Iterator[dict]:
    """The lines of all parts; the bar counts seconds, as planned and as gone."""
    total = sum(seconds for _, _, seconds in plan)
    with tqdm(total=total, desc="bench", bar_format=BAR, mininterval=0.5 if sys.stderr.isatty() else 10.0) as bar:
        ended = 0.0
        for name, rounds, seconds in plan:
            bar.set_postfix_str(name)
            begun, line = time.perf_counter(), None
            for line in _part(asked | {"part": name, "rounds": rounds, "seconds": seconds}):
                if line is not None and line.get("name", "").startswith("memory "):
                    asked = asked | {"bandwidth": max(asked.get("bandwidth", 0.0), line["bytes"] / line["seconds"])}
                if line is None:
                    bar.update(min(ended + seconds, ended + time.perf_counter() - begun) - bar.n)
                else:
                    yield line
            if "bandwidth" not in asked:
                raise ArcKernelError(f"bench: the device's speeds could not be measured ({line}): mend that first")
            ended += seconds
            bar.update(ended - bar.n)


def _part(asked: dict) -> Iterator[dict | None]:
    """The lines of one part as its process says them, None every MOVES seconds; a part that fails says so as a note."""
    asked = asked | {"spawned": time.time()}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen([sys.executable, "-m", "arc_kernel.bench_part", json.dumps(asked)], stdout=talk, stderr=log,
                                   env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"})
        try:
            while process.poll() is None:
                time.sleep(MOVES)
                yield None
        finally:
            process.kill()
            process.wait()
        talk.seek(0)
        yield from map(json.loads, talk)
        if process.returncode:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()] or ["no word"]
            yield {"part": asked["part"], "note": f"ended with status {process.returncode}: {lines[-1][:200]}"}
