"""The commands of the laboratory that train nothing: evaluate, merge, combine. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from .errors import ArcKernelError
from .settings import DTYPES, Help

MOST = 1_000_000  # draws of the bootstrap


def add_commands(commands) -> None:
    """Add the parsers of evaluate, merge and combine."""
    shown = {"formatter_class": Help}
    evaluate = commands.add_parser("evaluate",
                                   help="figures of runs with intervals, and their paired differences; or recall by distance", **shown)
    evaluate.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="output folder of solve; differences are to the first")
    evaluate.add_argument("--json", type=Path, default=None, help="file to write the figures to")
    evaluate.add_argument("--out", type=Path, default=None, help="HTML page to write: plots, and pictures of tasks where runs differ")
    evaluate.add_argument("--tasks", default="", help="the runs' challenges, where those their settings name are not on this machine; "
                          "recall:<tokens>[,<tokens>...]: instead of runs, how well --model recalls a number over such distances")
    evaluate.add_argument("--model", default="", help="for recall: model folder, or smollm2-135m (embedded)")
    evaluate.add_argument("--adapter", type=Path, default=None, help="for recall: folder of a LoRA")
    evaluate.add_argument("--count", type=int, default=20, help="for recall: texts of each length")
    evaluate.add_argument("--solutions", default="", help="solutions JSON; empty: as in the run's settings")
    evaluate.add_argument("--resamples", type=int, default=2000, help="draws of the bootstrap")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the draws")
    evaluate.set_defaults(command=_evaluate)
    merge = commands.add_parser("merge", help="write a model folder with an adapter merged into it, checked by logits", **shown)
    merge.add_argument("--model", default="smollm2-135m", help="model folder, or smollm2-135m (embedded)")
    merge.add_argument("--adapter", type=Path, required=True, help="folder of a LoRA trained on that model")
    merge.add_argument("--out", type=Path, required=True, help="folder to write")
    merge.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of the weights written; auto: as each is in the model")
    merge.set_defaults(command=_merge, slow_start=True)
    combine = commands.add_parser("combine", help="one submission from several", **shown)
    combine.add_argument("sources", nargs="+", metavar="A", help="submission.json, or output folder of solve (which tells answers "
                         "from fallbacks), in order of trust")
    combine.add_argument("--out", type=Path, required=True, help="submission.json to write")
    combine.add_argument("--rule", required=True, choices=("first", "fill", "vote"), help="first: the first attempt of each; "
                         "fill: the first's attempts, others where they are empty; vote: over the completions of all (folders)")
    combine.add_argument("--tasks", default="", help="the runs' challenges, where those their settings name are not on this machine")
    combine.set_defaults(command=_combine)


def _evaluate(tasks: str, model: str, adapter: Path | None, count: int, **options) -> None:
    if tasks.startswith("recall:"):
        _recall(tasks, model, adapter, count, **options)
    elif model or adapter:
        raise ArcKernelError("evaluate: --model and --adapter go with --tasks recall:<tokens>: leave them out")
    elif not options["runs"]:
        raise ArcKernelError("evaluate: no run: give output folders of solve")
    else:
        _compare(tasks=tasks, **options)


def _recall(tasks: str, model: str, adapter: Path | None, count: int, runs: list[Path], json: Path | None, seed: int, out: Path | None,
            solutions: str, resamples: int) -> None:
    from .checkpoint import open_model
    from .device import device_name
    from .files import check_writable, write_json
    from .finetune.recall import lengths_of, recall_by_distance, table
    from .finetune.run import training_dtype

    if runs or not model:
        raise ArcKernelError("evaluate: recall is a model's: give --model, and no run")
    if count < 1:
        raise ArcKernelError(f"evaluate: --count {count}: give 1 or more")
    if out or solutions:
        raise ArcKernelError("evaluate: --out and --solutions go with runs, not with recall: leave them out (--json keeps the figures)")
    if seed < 0:
        raise ArcKernelError(f"evaluate: --seed {seed}: give 0 or more")
    if json:
        check_writable(json)
    device = device_name()
    rows = recall_by_distance(open_model(model), adapter, lengths_of(tasks), count, seed, training_dtype("auto", device), device)
    print(table(rows))
    if json:
        write_json(json, {"model": model, "adapter": adapter and str(adapter), "seed": seed, "rows": rows})


def _compare(runs: list[Path], json: Path | None, out: Path | None, tasks: str, solutions: str, resamples: int, seed: int) -> None:
    from .files import check_writable, write_json
    from .evaluate import evaluate, table
    from .run_folder import read_run

    if not 1 <= resamples <= MOST or seed < 0:
        raise ArcKernelError(f"evaluate: --resamples {resamples}, --seed {seed}: give 1 to {MOST:,} resamples and a seed of 0 or more")
    if json and out and json.resolve() == out.resolve():
        raise ArcKernelError(f"evaluate: --json and --out are both {out}: give two files")
    for file in filter(None, (json, out)):
        check_writable(file)
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
