"""The commands of the laboratory that need no training: evaluate, merge, combine. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from .errors import ArcKernelError
from .settings import DTYPES


def add_commands(commands) -> None:
    """Add the parsers of evaluate, merge and combine."""
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    evaluate = commands.add_parser("evaluate", help="figures of runs with intervals, and their paired differences", **shown)
    evaluate.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of solve; differences are to the first")
    evaluate.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    evaluate.add_argument("--out", type=Path, default=None, help="HTML page to write: plots, and pictures of tasks where runs differ")
    evaluate.add_argument("--tasks", default="", help="the runs' challenges, where those their settings name are not on this machine")
    evaluate.add_argument("--solutions", default="", help="solutions JSON; empty: as in the run's settings")
    evaluate.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the draws")
    evaluate.set_defaults(command=_evaluate)
    merge = commands.add_parser("merge", help="write a model folder with an adapter merged into it, checked by logits", **shown)
    merge.add_argument("--model", default="smollm2-135m", help="model folder, or smollm2-135m (embedded)")
    merge.add_argument("--adapter", type=Path, required=True, help="folder of a LoRA trained on that model")
    merge.add_argument("--out", type=Path, required=True, help="folder to write")
    merge.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the weights written; auto: as each is in the model")
    merge.set_defaults(command=_merge)
    combine = commands.add_parser("combine", help="one submission from several", **shown)
    combine.add_argument("sources", nargs="+", metavar="A", help="submission.json, or output folder of solve (which tells answers "
                         "from fallbacks), in order of trust")
    combine.add_argument("--out", type=Path, required=True, help="submission.json to write")
    combine.add_argument("--rule", required=True, choices=("first", "fill", "vote"), help="first: the first attempt of each; "
                         "fill: the first's attempts, others where they are empty; vote: over the completions of all (folders)")
    combine.add_argument("--tasks", default="", help="the runs' challenges, where those their settings name are not on this machine")
    combine.set_defaults(command=_combine)


def _evaluate(runs: list[Path], json: Path | None, out: Path | None, tasks: str, solutions: str, resamples: int, seed: int) -> None:
    from .checkpoint import write_json
    from .evaluate import evaluate, table
    from .run_folder import read_run

    if resamples < 1 or seed < 0:
        raise ArcKernelError(f"evaluate: --resamples {resamples}, --seed {seed}: give 1 or more resamples and a seed of 0 or more")
    read = [read_run(path, tasks, solutions) for path in runs]
    result = evaluate(read, resamples, seed)
    print(table(result))
    try:
        if json:
            write_json(json, result)
        if out:
            from .evaluate_page import write_page

            write_page(out, read, result)
    except OSError as error:
        raise ArcKernelError(f"{error.filename}: cannot be written ({error.strerror}): give another place") from None
    if out:
        print(f"\npage: {out}")


def _merge(model: str, adapter: Path, out: Path, dtype: str) -> None:
    from .checkpoint import open_model
    from .merge import merge

    print(merge(open_model(model), adapter, out, dtype))


def _combine(sources: list[str], out: Path, rule: str, tasks: str) -> None:
    from .combine import combine

    print(combine([Path(s) for s in sources], out, rule, tasks))
