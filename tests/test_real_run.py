"""The real thing: the notebook from bundles, the real model, real tasks, TTT, vLLM, and the trap this project makes impossible;
`python -m pytest tests/test_real_run.py`."""

import json
import resource
import subprocess
import sys
import time

import pytest

from arc_kernel import bundle
from arc_kernel.kaggle import datasets
from arc_kernel.tasks import read_submission
from models import overflowing_model
from runs import TRAINING, challenges, contents, digests, dry_run, events, needs_packages, solve

FILES = {"settings.json", "precision.json", "adapters", "completions", "submission.json", "metrics.json", "events.jsonl", "report.html"}


@needs_packages
def test_real_run_of_the_notebook_leaves_a_scored_submission_and_a_second_start_does_nothing(
        tmp_path, model_folder, arc_training, monkeypatch):
    """On a machine where vLLM and torch's compiler have no cache yet, as in each Kaggle session."""
    out, root, caches = tmp_path / "run", tmp_path / "input", tmp_path / "caches"
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(caches / name))
    datasets.build_code(root, "someone")
    datasets.build_weights(root, str(model_folder), "someone")
    tasks = ["d037b0a7", "25ff71a9"]  # the second has two test inputs
    challenges(root / "a_challenges.json", arc_training, tasks)
    before = contents(root)
    options = {"ttt_steps": 4, "ttt_lr": 2e-3, "views": 2, "lora_rank": 8, "prompt": "compact"}
    done = dry_run(root, out, "tasks=a_challenges.json", "task_ids=''", "run_kind=scoring", *(f"{k}={v}" for k, v in options.items()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert contents(root) == before
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6, "KiB; the most of any process these tests have waited for"
    assert FILES <= {p.name for p in out.iterdir()} and "Traceback" not in (out / "worker-0.log").read_text()
    left = [p for p in caches.rglob("*") if p.is_file()]
    assert not left, "vLLM was imported by a second process for 13 s, or g++ called for 10 s"
    attempts = read_submission(out / "submission.json")
    assert list(json.loads((out / "submission.json").read_text())) == tasks
    assert set(attempts) == {("d037b0a7", 0), ("25ff71a9", 0), ("25ff71a9", 1)}
    assert all(a.tolist() != b.tolist() for a, b in attempts.values())
    completions = [json.loads(line) for p in (out / "completions").iterdir() for line in p.read_text().splitlines()]
    assert len(completions) == 3 * 2 and any(c["status"] == "ok" for c in completions)
    assert {p.name for p in (out / "adapters").iterdir()} == set(tasks)
    assert json.loads((out / "metrics.json").read_text())["counts"]["outputs"] == 3
    stages = {e["stage"] for e in events(out, "stage")}
    assert {"read tasks", "import libraries", "load model", "adapt", "probe", "float32 reference", "start engine", "canary",
            "answer", "vote, score"} <= stages
    assert all(stage in done.stdout for stage in stages)
    assert "test outputs solved" in done.stdout and "report.html" in done.stdout
    losses = [x for e in events(out, "loss") if e["task"] == "d037b0a7" for x in e["losses"]]
    assert len(losses) == 4
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") > 20 and "<svg" in page and 'src="http' not in page and "<script" not in page
    cells = json.loads((out / "submission.ipynb").read_text())["cells"]
    pictures = "".join(str(o) for c in cells for o in c.get("outputs", []))
    assert "data:image/png" in pictures and "<svg" in pictures and "truth" in pictures

    options |= {"tasks": root / "a_challenges.json", "model": bundle.find_inputs(root, weights=True).model, "profile": "local-cpu"}
    before = digests(out, "adapters", "completions")
    begun = time.perf_counter()
    again = solve(out, **options)
    assert again.returncode == 0, again.stderr
    assert digests(out, "adapters", "completions") == before and len(events(out, "answered")) == 2
    assert time.perf_counter() - begun < 10
    other = solve(out, **options | {"views": 4})
    assert other.returncode == 1 and other.stderr.count("\n") == 1
    assert "views: 4 vs 2" in other.stderr and "give another --out" in other.stderr

    scored = subprocess.run([sys.executable, "-m", "arc_kernel", "score", "--submission", str(out / "submission.json"),
                             "--tasks", str(options["tasks"])], capture_output=True, text=True)
    assert scored.returncode == 0 and "of 3 test outputs solved" in scored.stdout
    reported = subprocess.run([sys.executable, "-m", "arc_kernel", "report", "--out", str(out)], capture_output=True, text=True)
    assert reported.returncode == 0 and reported.stdout.strip().endswith("report.html")


@needs_packages
def test_model_that_overflows_float16_is_rescaled_and_answered_in_float16(tmp_path, model_folder, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    sick = overflowing_model(model_folder, tmp_path / "model")
    out = tmp_path / "run"
    options = {"tasks": TRAINING, "task_ids": "d037b0a7", "model": sick, "dtype": "float16", "views": 1, "max_new_tokens": 8,
               "prompt": "compact", "grid_encoder": "digits", "ttt_steps": 2}
    done = solve(out, **options)
    assert done.returncode == 0, done.stderr
    settled = json.loads((out / "precision.json").read_text())
    assert settled["dtype"] == "float16" and settled["rescale"]["residual"] == 8
    assert "float16 cannot hold the model as it is; rescaled: residual stream 2^-" in done.stderr
    assert max(settled["peaks"]["final norm in"]) > 65504 and [e["ok"] for e in settled["evidence"]] == [True]
    statuses = [json.loads(line)["status"] for line in (out / "completions" / "d037b0a7.jsonl").read_text().splitlines()]
    assert len(statuses) == 1 and "nan" not in statuses
    assert not list((tmp_path / "scratch").glob("arc-kernel-*")), "adapters converted for the rescaled weights"
