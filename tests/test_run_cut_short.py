"""Whole runs that are killed, lose a worker or run out of time; `python -m pytest tests/test_run_cut_short.py`."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from arc_kernel import adapt, pool
from arc_kernel.grids import GridEncoder
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run import solve as solve_here
from arc_kernel.settings import Settings
from arc_kernel.tasks import read_submission
from runs import SMALL, TRAINING, command, digests, events, solve


def started(out, **options):
    return subprocess.Popen(command(out, **options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.poll() is None, "the run ended or hung before the moment to test"
        time.sleep(0.02)


def wait_for_end(pids, seconds=10):
    """Until each process is gone or only waits to be collected."""
    end = time.monotonic() + seconds
    for pid in pids:
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end, f"worker {pid} outlives the run"
            time.sleep(0.05)


def test_killed_run_finishes_when_started_again_and_keeps_what_was_done_though_a_worker_is_killed(tmp_path, fast):
    out, options = tmp_path / "run", fast | {"tasks": TRAINING, "task_ids": SMALL, "ttt_steps": 12}
    children = lambda of: list(map(int, subprocess.run(["pgrep", "-P", str(of.pid), "-f", "arc_kernel.worker"],
                                                        capture_output=True, text=True).stdout.split()))
    process = started(out, **options)
    wait_for(lambda: (out / "adapters").is_dir() and any(p.name[0] != "." for p in (out / "adapters").iterdir()), process)
    assert set(json.loads((out / "submission.json").read_text())) == set(SMALL.split(","))
    workers = children(process)
    process.kill()
    process.communicate()
    wait_for_end(workers)
    finished = {k: v for k, v in digests(out, "adapters").items() if not k.startswith("adapters/.")}
    assert finished and not (out / "report.html").exists()
    told = len(events(out, "loss"))

    process = started(out, **options)
    wait_for(lambda: len(events(out, "loss")) > told, process)
    (worker,) = children(process)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [e["returncode"] for e in events(out, "worker-died")] == [-signal.SIGKILL]
    after = digests(out, "adapters")
    assert {k: after[k] for k in finished} == finished
    assert {p.name for p in (out / "adapters").iterdir() if p.name[0] != "."} == set(SMALL.split(","))
    assert {p.stem for p in (out / "completions").iterdir()} == set(SMALL.split(",")) and (out / "report.html").exists()


def test_workers_that_cannot_live_end_in_a_filled_submission(tmp_path, fast):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('a damaged installation')")
    done = subprocess.run(command(tmp_path / "run", **fast | {"tasks": TRAINING, "task_ids": SMALL}), capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(tmp_path / "broken")})
    assert done.returncode == 0, done.stderr
    assert len(events(tmp_path / "run", "worker-died")) == 6 and "worker-5.log" in done.stderr  # three to train, three to answer
    assert "a damaged installation" in (tmp_path / "run" / "worker-2.log").read_text()
    assert "a damaged installation" not in done.stderr, "the process that leads a run loads no torch"
    assert len(read_submission(tmp_path / "run" / "submission.json")) == 4


def test_where_vllm_ends_its_process_transformers_answers(tmp_path, fast):
    (tmp_path / "broken" / "vllm").mkdir(parents=True)
    (tmp_path / "broken" / "vllm" / "__init__.py").write_text("import os; os.abort()")
    asked = command(tmp_path / "run", **fast | {"tasks": TRAINING, "task_ids": "d037b0a7", "ttt_steps": 0, "backend": "vllm"})
    done = subprocess.run(asked, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(tmp_path / "broken")})
    assert done.returncode == 0, done.stderr
    assert [e["returncode"] for e in events(tmp_path / "run", "worker-died")] == [-signal.SIGABRT] * 2
    assert "; from now on transformers answers" in done.stderr
    (verdict,), (answered,) = events(tmp_path / "run", "verdict"), events(tmp_path / "run", "answered")
    assert verdict["evidence"][-1]["backend"] == "transformers" and answered["task"] == "d037b0a7" and not answered.get("error")


def test_device_whose_workers_cannot_live_costs_no_task_its_answers(tmp_path, fast, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SICK') == '1': os._exit(3)")
    environment = pool._environment
    monkeypatch.setattr(pool, "_environment", lambda device, *of: environment(device, *of) | {
        "SICK": str(device), "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment(device, *of)['PYTHONPATH']}"})
    options = {k: v if isinstance(v, int) else str(v) for k, v in fast.items()}
    solve_here(Settings(tasks=TRAINING, task_ids=SMALL, devices=2, out=str(tmp_path / "run"), **options))
    assert [e["returncode"] for e in events(tmp_path / "run", "worker-died")] == [3] * pool.DEATHS
    assert {p.stem for p in (tmp_path / "run" / "completions").iterdir()} == set(SMALL.split(","))
    assert {e["task"] for e in events(tmp_path / "run", "adapted")} == set(SMALL.split(","))


def test_steps_that_do_not_fit_into_the_time_budget_leave_tasks_an_adapter_of_fewer(
        tmp_path, fast, tokenizer, arc_training, monkeypatch, capsys):
    recipe = adapt.Recipe(steps=40, batch=1, lr=1e-2, rank=4, max_seq_len=4096, permute_background=False, seed=5)
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), "chat")
    trainer = adapt.TaskTrainer(fast["model"], builder, recipe, None, "cpu", "float32")
    ends = []
    trainer.train(arc_training.tasks["25ff71a9"], tmp_path / "trial", lambda *_: ends.append(time.perf_counter()))
    fastest = min(end - begin for begin, end in zip(ends, ends[1:]))  # whatever else the machine does meanwhile
    monkeypatch.setattr("arc_kernel.budget.ADAPT_SHARE", 0.15)  # 24 s, of which start-up leaves some 5 s to each task
    wanted = round(5 * 5 / fastest)  # five times what fits
    options = {k: v if isinstance(v, int) else str(v) for k, v in fast.items()} | {"ttt_steps": wanted, "ttt_dtype": "float32"}
    begun = time.time()
    solve_here(Settings(tasks=TRAINING, task_ids=SMALL, **options, time_budget=160.0, out=str(tmp_path / "run")))
    assert time.time() - begun < 160
    steps = {e["task"]: e["steps"] for e in events(tmp_path / "run", "adapted")}
    failed = events(tmp_path / "run", "adapt-failed")  # where the machine has slowed down and not even an eighth of the steps fits,
    late = {task for e in events(tmp_path / "run", "out-of-time") if e["stage"] == "adapt" for task in e["tasks"]}  # or not one
    assert set(steps) | {e["task"] for e in failed} | late == set(SMALL.split(",")) and 1 <= len(steps)
    assert all("time budget: training ends at step" in e["error"] for e in failed)
    cut = sorted(taken for taken in steps.values() if taken < wanted)
    assert cut and adapt.fewest_steps(wanted) <= cut[0] and max(steps.values()) <= wanted
    for task, taken in steps.items():
        assert sum(len(e["losses"]) for e in events(tmp_path / "run", "loss") if e["task"] == task) == taken
    assert f"time budget: fewer steps for {len(cut)} of 3 tasks: {cut[0]} to {cut[-1]} of {wanted}" in capsys.readouterr().err
    names = {p.name for p in (tmp_path / "run" / "completions").iterdir()}  # what was not trained at all is answered anew by a next start
    assert names == {f"{task}.jsonl{'' if task in steps else '.part'}" for task in SMALL.split(",")}


def test_time_budget_that_is_over_leaves_a_complete_submission(tmp_path, fast):
    done = solve(tmp_path / "run", tasks=TRAINING, task_ids=SMALL, **fast, **{"time-budget": 0.1})
    assert done.returncode == 0, done.stderr
    assert "time budget: 3 tasks left out of 'answer'" in done.stderr
    assert len(read_submission(tmp_path / "run" / "submission.json")) == 4
