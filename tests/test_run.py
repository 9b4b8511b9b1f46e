"""Whole runs from the command line: files, failures of each stage; `python -m pytest tests/test_run.py`.

Failures are provoked on a tiny random model of the real architecture with the transformers backend, in seconds; the real
thing is test_real_run.py. Runs that are cut short: test_run_cut_short.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from arc_kernel.errors import ArcKernelError
from arc_kernel.precision import verdict
from arc_kernel.run import Run
from arc_kernel.settings import Settings
from arc_kernel.tasks import read_submission
from models import nan_model, overflowing_model, tiny_model
from runs import SMALL, TRAINING, challenges, digests, events, solve


@pytest.fixture(scope="module")
def float16(fast):
    """Settings of a fast run on SMALL that is answered in float16."""
    return {k: v if isinstance(v, int) else str(v) for k, v in fast.items()} | {"tasks": TRAINING, "task_ids": SMALL, "dtype": "float16"}


@pytest.fixture(scope="module")
def plain(float16, tmp_path_factory):
    """What such a run leaves behind when nothing goes wrong."""
    return run_with(lambda adapters: None, tmp_path_factory.mktemp("runs") / "plain", float16)


def run_with(change, out, settings):
    """A run whose adapters are changed, `change(folder)`, before anything is answered."""
    run = Run(Settings(**settings, out=str(out)))
    try:
        run.adapt()
        change(out / "adapters")
        run.answer()
        run.finish()
    finally:
        run.stop()
    return out


def test_model_that_is_nan_in_every_dtype_ends_in_a_filled_submission(tmp_path, fast, arc_training):
    out = tmp_path / "run"
    done = solve(out, **fast | {"model": nan_model(fast["model"], tmp_path / "nan"), "tasks": TRAINING, "task_ids": SMALL})
    assert done.returncode == 0, done.stderr
    settled = json.loads((out / "precision.json").read_text())
    assert settled["dtype"] is None and {e["ok"] for e in settled["evidence"]} == {False}
    assert "not finite" in done.stderr
    for (task_id, i), (first, second) in read_submission(out / "submission.json").items():
        assert first.tolist() == arc_training.tasks[task_id].test[i].input.tolist() != second.tolist()
    assert json.loads((out / "metrics.json").read_text())["per_output"]["unanswered"] == 1


def test_model_that_overflows_float16_is_rescaled_without_adapters_too(tmp_path, float16):
    sick, out = overflowing_model(Path(float16["model"]), tmp_path / "model", log2=24), tmp_path / "run"
    done = solve(out, **float16 | {"model": sick, "ttt_steps": 0})
    assert done.returncode == 0 and "float16 cannot hold the model as it is; rescaled: residual stream 2^-" in done.stderr
    settled = json.loads((out / "precision.json").read_text())
    assert settled["dtype"] == "float16" and max(settled["peaks"]["final norm in"]) > 65504
    rows = [json.loads(line) for p in (out / "completions").iterdir() for line in p.read_text().splitlines()]
    assert len(rows) == 4 * 2 and not [r for r in rows if r["status"] == "nan"]


def test_odd_tasks_are_named_and_cost_the_others_nothing(tmp_path, fast, arc_training):
    broken = {"train": [{"input": [[1, 2], [3]], "output": [[1]]}], "test": [{"input": [[1]]}, {"input": [[2]]}]}
    none = {"train": [], "test": [{"input": [[1]]}]}
    huge = {"train": [{"input": [[1] * 30] * 30, "output": [[2] * 30] * 30}], "test": [{"input": [[3] * 30] * 30}]}
    flat = {"train": [{"input": [[0]], "output": [[0]]}], "test": [{"input": [[0]]}]}
    odd = {"broken": broken, "none": none, "huge": huge, "flat": flat}
    path = challenges(tmp_path / "a_challenges.json", arc_training, ["d037b0a7", "3c9b0459"], **odd)
    out = tmp_path / "run"
    (out / "adapters").mkdir(parents=True)
    (out / "adapters" / "3c9b0459").write_text("a file where the adapter's folder must go")
    done = solve(out, tasks=path, **fast | {"max_seq_len": 256, "max_new_tokens": 100})
    assert done.returncode == 0, done.stderr
    assert "task broken, train pair 1: input row 2 has 1 cells, expected 2" in done.stderr
    assert "task none: no train pair: answered without an adapter" in done.stderr
    assert "task huge, test input 1: longer than max_seq_len 256 even with one pair: fallback answer" in done.stderr
    assert "task flat, test input 1: only 1 distinct views of 2 asked" in done.stderr
    assert "task d037b0a7, test input 1: 1 of 3 train pairs dropped to fit max_seq_len 256" in done.stderr
    assert "Traceback" not in done.stderr
    attempts = read_submission(out / "submission.json")
    assert list(attempts) == [(i, 0) for i in ("d037b0a7", "3c9b0459", "broken")] + [("broken", 1), ("none", 0), ("huge", 0), ("flat", 0)]
    failed = {e["task"]: e["error"] for e in events(out, "adapt-failed")}
    assert set(failed) == {"3c9b0459", "none", "huge"} and all("answered without an adapter" in error for error in failed.values())
    assert "Not a directory" in failed["3c9b0459"] and {e["task"] for e in events(out, "adapted")} == {"d037b0a7", "flat"}
    assert {p.stem for p in (out / "completions").iterdir()} == {"d037b0a7", "3c9b0459", "none", "huge", "flat"}
    assert (out / "completions" / "none.jsonl").read_text().count("\n") == 2
    assert "input row 2 has 1 cells" in (out / "report.html").read_text()


def test_adapter_that_overflows_after_the_verdict_costs_only_its_own_answers(tmp_path, float16, plain):
    def overflow(adapters):
        path = adapters / "3c9b0459" / "adapter_model.safetensors"
        save_file({k: v * 1e8 if "lora_B" in k else v for k, v in load_file(path).items()}, path)

    run_with(overflow, tmp_path / "sick", float16)
    well, sick = (digests(out, "completions") for out in (plain, tmp_path / "sick"))
    assert [n for n in well if well[n][0] != sick[n][0]] == ["completions/3c9b0459.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "sick" / "completions" / "3c9b0459.jsonl").read_text().splitlines()]
    assert [r["status"] == "nan" for r in rows] == [True, False] * 2 and rows[0]["view"] == rows[1]["view"] != rows[2]["view"]
    said = [e["text"] for e in events(tmp_path / "sick", "precision")]
    second = next(d for d in verdict.candidates("float16", "cpu") if d != "float16")
    assert said == ["2 predictions (3c9b0459) without a finite answer in float16: asked again where a dtype is left"]
    assert json.loads((tmp_path / "sick" / "precision.json").read_text())["dtype"] == "float16"
    again = next(e for e in events(tmp_path / "sick", "stage") if e["stage"] == f"answer again in {second}")
    assert again["tokens"] > 0 and again["predictions"] == 2
    assert not events(plain, "precision")


def test_adapter_known_to_overflow_is_served_in_the_next_dtype_from_the_start(tmp_path, float16):
    def known(adapters):
        path = adapters / "25ff71a9" / "range.json"
        ranges = json.loads(path.read_text())
        path.write_text(json.dumps(ranges | {"peaks": ranges["peaks"] | {"gate": [1e6, 1.0]}}))

    run_with(known, tmp_path / "run", float16)
    said = [e["text"] for e in events(tmp_path / "run", "precision")]
    assert "task 25ff71a9: its adapter is not served in float16: gate of layer 0 peaks at 1,000,000" in said[0]
    for task_id in SMALL.split(","):
        rows = [json.loads(line) for line in (tmp_path / "run" / "completions" / f"{task_id}.jsonl").read_text().splitlines()]
        assert rows and not [r for r in rows if r["status"] == "nan"]
    second = next(d for d in verdict.candidates("float16", "cpu") if d != "float16")
    again = next(e for e in events(tmp_path / "run", "stage") if e["stage"] == f"answer again in {second}")
    assert again["predictions"] == 4


def test_next_start_has_the_adapters_of_scratch_and_the_verdict_on_the_dtype(tmp_path, fast, model_folder):
    model = tiny_model(model_folder, tmp_path / "model", tied=False)  # one that no other test has a verdict on
    options = {**fast, "model": model, "tasks": TRAINING, "task_ids": SMALL, "scratch": tmp_path / "scratch"}
    out = tmp_path / "run"
    assert solve(out, **options).returncode == 0
    assert not (out / "adapters").exists() and [e["stage"] for e in events(out, "stage")].count("canary") == 1
    (adapters,) = (tmp_path / "scratch").glob("*/adapters")
    assert {p.name for p in adapters.iterdir()} == set(SMALL.split(","))
    settled = (out / "precision.json").read_text()
    shutil.rmtree(out / "completions")
    assert solve(out, **options).returncode == 0
    assert len(events(out, "adapted")) == 3 and len(events(out, "answered")) == 6
    assert [e["stage"] for e in events(out, "stage")].count("canary") == 1 and (out / "precision.json").read_text() == settled
    known = {k: v if isinstance(v, int) else str(v) for k, v in options.items()}
    adapters_of = lambda steps: Path(started(ttt_steps=steps, out=str(tmp_path / f"steps-{steps}"))._resolve().adapters)
    started = lambda **more: Run(Settings(**known | more))
    assert adapters_of(2) == adapters != adapters_of(3) and adapters_of(3).parent.parent == tmp_path / "scratch"
    tiny_model(model_folder, model, tied=False, seed=1)
    shutil.rmtree(tmp_path / "steps-2")
    assert adapters_of(2) != adapters, "other weights under the same name"
    (out / "completions" / f"{SMALL.split(',')[0]}.jsonl").unlink()
    with pytest.raises(ArcKernelError, match="holds a run with other weights, .*/model has changed: give another --out"):
        started(out=str(out)).adapt()


def test_scratch_that_cannot_be_made_is_told_before_anything_is_trained(tmp_path, fast):
    (tmp_path / "file").touch()
    done = solve(tmp_path / "run", tasks=TRAINING, task_ids=SMALL, scratch=tmp_path / "file", **fast)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("cannot be written (Not a directory): give another scratch")
    assert len(read_submission(tmp_path / "run" / "submission.json")) == 4 and not events(tmp_path / "run", "loss")


def test_two_devices_give_the_same_submission_as_one(tmp_path, float16, plain):
    done = solve(tmp_path / "two", devices=2, **float16)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert (plain / "submission.json").read_bytes() == (two / "submission.json").read_bytes()
    assert {e["worker"] for e in events(two, "stage") if "worker" in e and e["stage"] == "import libraries"} == {0, 1}
    contents = lambda out: {name: digest for name, (digest, _) in digests(out, "adapters").items()}
    assert contents(plain) == contents(two)
