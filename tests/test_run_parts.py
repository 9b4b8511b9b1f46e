"""What a run does between its workers' messages, no worker started: `python -m pytest tests/test_run_parts.py`."""

import dataclasses
import json
import math
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from models import tiny_model
from run_folders import write_tasks
from safetensors.numpy import save_file

from arc_kernel import adapt, device, disk, report, select
from arc_kernel import run as running
from arc_kernel.errors import ArcKernelError
from arc_kernel.events import read_events
from arc_kernel.job import Job
from arc_kernel.run import Run
from arc_kernel.run_folder import facts, read_run
from arc_kernel.settings import Settings
from arc_kernel.tasks import read_submission

JOB = Job(**dict.fromkeys(f.name for f in dataclasses.fields(Job)) | {"model": "none", "ttt_steps": 1, "views": 2, "adapt_until": math.inf,
                                                                      "adapters": ""})


@pytest.fixture
def made(tmp_path):
    """A run on A (two test inputs), B and C, each larger than the one before."""
    source = write_tasks(tmp_path / "tasks.json", {"A": [None, None], "B": [None], "C": [None]})
    tasks = json.loads(source.read_text())
    for columns, task in enumerate(tasks.values(), 1):
        task["train"][0]["input"] = [[1] * columns] * 3
    source.write_text(json.dumps(tasks))
    runs = []

    def start(**options):
        fixed = {"prompt": "compact", "grid_encoder": "digits", "vocabulary": "full"}
        runs.append(Run(Settings(tasks=str(source), out=str(tmp_path / "run"), **fixed, **options)))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


def pool(events=lambda *_: iter(()), todo=None, **more):
    """In the place of a run's workers: what they tell."""
    return SimpleNamespace(events=events, todo=todo or {"adapt": [], "answer": []}, kill=lambda: None, **more)


def answered(tmp_path, name):
    """Have a task's file of completions hold one that is 7."""
    select.write_completions(tmp_path / "run" / "completions" / name,
                             [select.Completion("B", 0, "identity|0123456789|0", "7", [1], -1.0, "ok", 2)])


def submitted(tmp_path):
    return read_submission(tmp_path / "run" / "submission.json")["B", 0][0].tolist()


def test_ids_may_have_spaces(made):
    assert list(made(task_ids="C, A").challenges.tasks) == ["A", "C"]


@pytest.mark.parametrize("time_budget, order", [(0.0, ["C", "B", "A"]), (100.0, ["A", "B", "C"])])
def test_longest_tasks_come_first_and_shortest_where_time_is_short(made, time_budget, order):
    assert made(time_budget=time_budget)._unanswered() == order


def test_share_of_the_time_goes_by_devices_and_test_inputs(made):
    run = made(devices=1)
    run._pool = pool(todo={"adapt": ["B", "C"], "answer": ["B", "C"]}, workers=1)
    assert run._share("adapt", "A") == pytest.approx(1 / 3) and run._share("answer", "A") == pytest.approx(2 / 4)
    run._pool.workers = 2
    assert run._share("adapt", "A") == pytest.approx(2 / 4) and run._share("answer", "A") == pytest.approx(4 / 6)


@pytest.mark.parametrize("seconds, finish", [(40, 4), (100, 10), (400, 20), (41400, 828)])
def test_time_for_votes_and_report_is_kept_and_answers_have_some_after_training(made, seconds, finish):
    budget = made(time_budget=float(seconds)).budget
    assert budget.until(1.0) - budget.workers_until == pytest.approx(finish, abs=0.1)
    assert budget.last_call == pytest.approx(budget.workers_until - 0.05 * seconds, abs=0.1)
    assert budget.adapt_until + 0.2 * seconds < budget.last_call < budget.answer_until < budget.workers_until


def test_disk_that_runs_low_is_told_once(made, monkeypatch, capsys):
    run = made()
    run.job = JOB
    monkeypatch.setattr(disk, "free_gb", lambda folder: 1.0)
    for _ in range(2):
        run._note({"event": "adapted", "task": "A"})
    assert capsys.readouterr().err.count("only 1.0 GB left") == 1


def test_what_each_worker_notes_of_the_model_they_share_is_told_once(made, capsys):
    run = made()
    for worker, text in ((0, "all tokens are kept"), (1, "all tokens are kept"), (1, "no LoRA on qkv_proj")):
        run._note({"event": "note", "text": text, "worker": worker})
    assert capsys.readouterr().err.splitlines() == ["note: all tokens are kept", "note: no LoRA on qkv_proj"]


def test_submission_has_the_answers_that_are_there_while_others_are_awaited(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(running, "SUBMISSION_SECONDS", -1.0)
    seen = []

    def events(*_):
        answered(tmp_path, "B.jsonl")
        yield {"event": "answered", "task": "B", "cut": 3}
        seen.append(submitted(tmp_path))

    run = made(views=2)
    run.job, run._pool = JOB, pool(events)
    run.answer()
    assert seen == [[[7]]] and "fewer predictions for 1 of 3 tasks: 3 to 3 less" in capsys.readouterr().err


def test_a_bar_says_which_stages_are_over_until_something_is_done(made, monkeypatch):
    def events(*_):
        for stage in ("import libraries", "start engine"):
            yield {"event": "stage", "stage": stage, "seconds": 9.0}
        yield {"event": "completion", "task": "B", "tokens": 7}

    shown, move = [], running.progress.move
    monkeypatch.setattr(running.progress, "move", lambda bar, *told: shown.append(move(bar, *told) or bar.postfix))
    run = made(views=2)
    run.job, run._pool = JOB, pool(events)
    run.answer()
    assert shown[:2] == ["0/3 tasks; over: import libraries", "0/3 tasks; over: import libraries, start engine"]
    assert shown[2].endswith(" tok/s, 0/3 tasks")


@pytest.mark.parametrize("name", ["B.jsonl", "B.jsonl.part"])
def test_next_start_submits_at_once_what_an_earlier_one_answered(made, tmp_path, name):
    made()
    answered(tmp_path, name)
    assert submitted(tmp_path) == [[0, 0]]
    made()
    assert submitted(tmp_path) == [[7]]
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"settings.json", "submission.json", "events.jsonl", "completions", ".lock"}


def test_damaged_answers_are_put_aside_and_cost_the_others_nothing(made, tmp_path, capsys):
    """A line cut short, bytes that are no text, and a file that lost what was written to it, or a part of it."""
    run = made(views=2)
    run.job = JOB
    for name in "ABC":
        answered(tmp_path, f"{name}.jsonl")
        run._note({"event": "answered", "task": name, "cut": 0, "statuses": {"ok": 1}})
    folder = tmp_path / "run" / "completions"
    whole = (folder / "A.jsonl").read_bytes()
    for damaged in (whole[:-7], b"\xc8\xc9\n", b""):
        (folder / "A.jsonl").write_bytes(damaged)
        capsys.readouterr()
        assert made(views=2)._unanswered() == ["A"] and submitted(tmp_path) == [[7]]
        assert f"task A is answered again, A.jsonl is put aside as A.jsonl.damaged: {folder / 'A.jsonl'}" in capsys.readouterr().err
        assert (folder / "A.jsonl.damaged").read_bytes() == damaged
        assert made(views=2)._unanswered() == ["A"] and not capsys.readouterr().err
    answered(tmp_path, "A.jsonl.part")  # it never was whole
    made(views=2)
    assert (folder / "A.jsonl.part").is_file()


def test_a_start_beside_a_run_that_ends_meanwhile_submits_what_that_has(made, tmp_path):
    first, second = made(views=2), made(views=2)
    first._lock.acquire()
    answered(tmp_path, "B.jsonl")
    first.candidates["B"] = first._stored.candidates("B")
    first.finish()
    assert submitted(tmp_path) == [[7]]
    second.adapt = lambda: None  # nothing is left
    second.answer()
    second.finish()
    assert submitted(tmp_path) == [[7]] and second.candidates.keys() == {"B"}


def test_submission_of_a_run_at_work_is_left_to_it(made, tmp_path):
    first = made(views=2)
    answered(tmp_path, "B.jsonl")
    first._lock.acquire()
    for look in (lambda: made(views=2), lambda: running.write_report_again(tmp_path / "run")):
        look()
        assert submitted(tmp_path) == [[0, 0]]
    with pytest.raises(ArcKernelError, match="another run is at work"):
        made(views=2).adapt()


def test_a_task_that_workers_died_of_or_whose_adapter_is_gone_is_trained_by_a_next_start(made, tmp_path, capsys):
    def events(*_):
        yield {"event": "worker-died", "worker": 0, "text": "died", "given_up": {"adapt": ["B"], "answer": []}}
        for name in "BC":
            answered(tmp_path, f"{name}.jsonl")
            yield {"event": "answered", "task": name, "cut": 0, "statuses": {"ok": 1}}

    run = made(views=2)
    run.job, run._pool, run._trained = dataclasses.replace(JOB, adapters=str(tmp_path / "gone")), pool(events), {"C"}
    run.answer()
    assert f"{tmp_path / 'gone' / 'C'}: gone since the task was trained" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run" / "completions").iterdir()) == ["B.jsonl.part", "C.jsonl.part"]
    assert submitted(tmp_path) == [[7]] and len(made(views=2)._unanswered()) == 3


def test_a_folder_with_damaged_events_and_verdict_has_a_report(made, tmp_path):
    run = made(views=2)
    answered(tmp_path, "B.jsonl")
    (tmp_path / "run" / "precision.json").write_text('{"dtype": ')
    with open(tmp_path / "run" / "events.jsonl", "ab") as file:
        file.write(b'\xc8\xc9\n{"event": "note", "text": "afterwards"}\n')
    assert run.finish()["report"] and report.read_verdict(tmp_path / "run") is None
    assert run.events()[-1]["event"] == "stage" and "afterwards" in [e.get("text") for e in run.events()]


@pytest.mark.parametrize("lacking", [
    {"event": "stage"}, {"event": "stage", "stage": "adapt", "seconds": "9"}, {"event": "loss", "task": "B", "step": 1},
    {"event": "loss", "task": "B", "step": 1, "losses": [None]}, {"event": "answered"}, {"event": "answered", "task": ["B"]},
    {"event": "answered", "task": "B", "statuses": 3}, {"event": "note", "text": {}}, {"event": 3}, {"event": ["stage"]},
])
def test_an_event_that_lacks_what_is_read_of_it_is_left_out(made, tmp_path, lacking):
    run = made(views=2)
    answered(tmp_path, "B.jsonl")
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write(json.dumps(lacking) + "\n")
    assert run.finish()["report"].is_file() and lacking not in run.events()
    assert facts(read_run(tmp_path / "run"))["seconds"].keys() == {"read tasks", "vote, score"}


def test_what_a_lost_worker_left_of_a_task_votes(made, tmp_path):
    run = made(views=2)
    run.job, run._pool = JOB, pool()
    answered(tmp_path, "B.jsonl.part")
    run.answer()
    assert submitted(tmp_path) == [[7]]


def test_a_task_answered_in_whole_votes_though_its_worker_died_before_it_said_so(made, tmp_path):
    def events(*_):
        answered(tmp_path, "B.jsonl")
        yield {"event": "worker-died", "text": "", "given_up": {"adapt": [], "answer": ["B"]}}

    run = made(views=2)
    run.job, run._pool = JOB, pool(events)
    run.answer()
    assert submitted(tmp_path) == [[7]]


@pytest.mark.parametrize("message", [{"event": "adapt-failed", "task": "B", "error": "time budget", "again": True},
                                     {"event": "out-of-time", "stage": "adapt", "tasks": ["B"], "held": False, "text": ""}])
def test_a_task_there_was_no_time_to_train_votes_and_is_trained_by_a_next_start(made, tmp_path, monkeypatch, message):
    def events(stage, *_):
        if stage == "adapt":
            yield message
        else:
            answered(tmp_path, "B.jsonl")
            yield {"event": "answered", "task": "B", "cut": 0}

    monkeypatch.setattr(running, "Pool", lambda *_: pool(events))
    run = made(adapter="nowhere", ttt_steps=1, views=2)
    run._resolve = lambda: JOB
    run.adapt()
    run.answer()
    assert submitted(tmp_path) == [[7]] and "B" in made(adapter="nowhere", ttt_steps=1, views=2)._unanswered()


def write_adapter(folder, steps):
    folder.mkdir(parents=True)
    (folder / "range.json").write_text(json.dumps({"peaks": {}, "steps": steps}))
    (folder / "adapter_config.json").write_text("{}")
    save_file({"lora": np.zeros(8, np.float32)}, folder / "adapter_model.safetensors")


def test_an_adapter_of_fewer_steps_than_asked_or_a_damaged_one_is_trained_anew(made, tmp_path, monkeypatch):
    given, seen = [], lambda: {p.name for p in (tmp_path / "adapters").iterdir() if not p.name.startswith(".")}
    monkeypatch.setattr(running, "Pool", lambda devices, job, tasks, todo, *_: given.append((todo, seen())) or pool())
    run = made(adapter="nowhere", ttt_steps=4, time_budget=9.0)
    run._resolve = lambda: dataclasses.replace(JOB, adapters=str(tmp_path / "adapters"), ttt_steps=4)
    for task_id, steps in {"A": 4, "B": 3, "C": 4}.items():
        write_adapter(tmp_path / "adapters" / task_id, steps)
    os.truncate(tmp_path / "adapters" / "C" / "adapter_model.safetensors", 80)
    run.adapt()
    assert given == [({"adapt": ["C", "B"], "answer": ["A", "B", "C"]}, {"A"})], "no engine is started on what is replaced meanwhile"
    assert seen() == {"A", "B"}, "there was no time for another: the task keeps the one it has"
    assert run._trained == {"A", "B"} and run._untrained == set()


def test_of_two_adapters_the_one_of_more_steps_is_kept_also_after_a_kill(tmp_path):
    for now, kept in ((2, 3), (4, 4), (0, 3)):
        write_adapter(tmp_path / "B", 3)
        adapt.set_aside(tmp_path / "B")
        assert not (tmp_path / "B").exists()
        if now:
            write_adapter(tmp_path / "B", now)
        adapt.keep_longer(tmp_path / "B")
        assert adapt.steps_taken(tmp_path / "B") == kept and [p.name for p in tmp_path.iterdir()] == ["B"]
        shutil.rmtree(tmp_path / "B")


def test_first_event_after_a_line_cut_short_is_not_lost_with_it(made, tmp_path):
    made().log.add("loss", task="A", step=1, losses=[2.0])
    with open(tmp_path / "run" / "events.jsonl", "a") as file:
        file.write('[]\n{"event": "lo')
    made().log.add("loss", task="A", step=2, losses=[1.0])
    assert [e["step"] for e in read_events(tmp_path / "run") if e["event"] == "loss"] == [1, 2]


def test_other_weights_are_refused_once_something_was_answered_and_the_folder_stays_theirs(made, fast, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(running, "Pool", lambda *_: pool(lambda *_: iter([{"event": "adapted", "task": "A"}])))
    model = tiny_model(model_folder, tmp_path / "model")
    run = made(model=str(model), backend="transformers", ttt_steps=1)
    run.adapt()
    tiny_model(model_folder, model, seed=1)
    for _ in range(2):
        with pytest.raises(ArcKernelError, match="holds a run with other weights"):
            run.adapt()


def test_adapting_again_stops_the_workers_of_before(made, monkeypatch):
    killed = []
    monkeypatch.setattr(running, "Pool", lambda *_: SimpleNamespace(events=lambda *_: iter(()), kill=lambda: killed.append(1)))
    run = made(adapter="nowhere")
    run._resolve = lambda: JOB
    run.adapt()
    assert not killed
    run.adapt()
    assert killed == [1]


def test_worker_that_hangs_in_training_is_stopped(made, monkeypatch):
    stopped = []
    held = {"event": "out-of-time", "stage": "adapt", "tasks": ["A"], "held": True, "text": ""}
    monkeypatch.setattr(running, "Pool", lambda *_: pool(lambda *_: iter([held]), stop_holders=stopped.append))
    run = made(adapter="nowhere")
    run._resolve = lambda: JOB
    run.adapt()
    assert stopped == ["adapt"]


def test_what_a_job_is_told(made, fast, tmp_path, capsys):
    model = shutil.copytree(fast["model"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512, "full_parameters": 10**9}))
    run = made(model=str(model), background="permuted", backend="transformers")
    job = run._resolve()
    assert (job.max_seq_len, job.permute_background) == (512, True) and job.ttt_lr == pytest.approx(8e-5)
    (model / "trained_prompt.json").write_text('{"prompt": "chat", "grid_encoder": "shape+rows+digits"}')
    run._resolve()
    assert "prompt is compact, but" in capsys.readouterr().err


GB = 1 << 30


@pytest.mark.parametrize("tasks, steps, cores, memory, weights, workers", [
    (4, 60, 2, 64 * GB, 135e6, 2), (3, 60, 2, 64 * GB, 135e6, 1), (40, 1, 2, 64 * GB, 135e6, 1), (40, 0, 2, 64 * GB, 135e6, 1),
    (400, 320, 2, 17 * GB, 135e6, 2), (400, 320, 2, 15 * GB, 135e6, 1), (400, 320, 2, 20 * GB, 494e6, 1), (400, 320, 2, 0, 135e6, 1),
    (400, 320, 16, 64 * GB, 135e6, 4), (400, 320, 6, 40 * GB, 135e6, 3), (400, 320, 7, 40 * GB, 135e6, 1), (400, 320, 1, 64 * GB, 135e6, 1),
])
def test_cores_are_shared_by_as_many_workers_as_there_is_work_and_memory_for(tasks, steps, cores, memory, weights, workers, monkeypatch):
    monkeypatch.setattr(device, "cores", lambda: list(range(cores)))
    monkeypatch.setattr(device, "available_memory", lambda: memory)
    assert device.cpu_workers(tasks, steps, int(weights)) == workers


def test_without_a_gpu_the_tasks_that_are_left_say_how_many_workers_there_are(fast, tmp_path, monkeypatch, capfd):
    for module in (device, running):
        monkeypatch.setattr(module, "cores", lambda: [0, 1])
    monkeypatch.setattr(device, "available_memory", lambda: 64 * GB)
    monkeypatch.setattr(running, "gpu_count", lambda: 0)
    source = write_tasks(tmp_path / "many.json", {f"{number:08x}": [None] for number in range(5)})
    for devices, answered, workers in ((0, 0, 2), (0, 2, 1), (1, 0, 1)):
        out = tmp_path / f"run {devices} {answered}"
        run = Run(Settings(tasks=str(source), model=str(fast["model"]), out=str(out), devices=devices, ttt_steps=40))
        for task_id in list(run.challenges.tasks)[:answered]:
            select.write_completions(out / "completions" / f"{task_id}.jsonl", [])
        run._resolve()
        run.stop()
        assert run.devices == workers and ("2 workers share this machine's 2 cores" in capfd.readouterr().err) == (workers == 2)


def test_more_devices_than_gpus_are_refused(made, fast, monkeypatch):
    monkeypatch.setattr(running, "gpu_count", lambda: 1)
    with pytest.raises(ArcKernelError, match="devices is 2: this machine shows 1 GPU"):
        made(model=str(fast["model"]), devices=2)._resolve()


def test_unknown_profile_is_refused_before_anything_is_trained(made, fast):
    with pytest.raises(ArcKernelError, match="nowhere"):
        made(model=str(fast["model"]), profile="nowhere")._resolve()


def test_a_report_that_fails_costs_no_submission_and_is_told(made, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such font")

    run = made()
    monkeypatch.setattr(running.report, "write_report", fail)
    assert run.finish()["report"] is None and "report.html is not written: ValueError: no such font" in capsys.readouterr().err
    with pytest.raises(ArcKernelError, match="report.html: not written"):
        running.write_report_again(tmp_path / "run")


def test_a_disk_that_is_full_at_the_end_leaves_the_submission_of_before(made, tmp_path, monkeypatch, capsys):
    run = made(views=2)
    run._lock.acquire()
    answered(tmp_path, "B.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "write_submission", full)
    assert run.finish()["submission"].is_file() and submitted(tmp_path) == [[0, 0]]
    assert "the last votes are not written (No space left on device)" in capsys.readouterr().err
    monkeypatch.undo()
    assert made(views=2).finish() and submitted(tmp_path) == [[7]]


def test_run_begun_with_a_path_from_its_folder_is_continued_and_reported_from_any(tmp_path, monkeypatch):
    write_tasks(tmp_path / "tasks.json", {"A": [None]})
    monkeypatch.chdir(tmp_path)
    Run(Settings(tasks="tasks.json", out="run", prompt="compact"))
    monkeypatch.chdir("/")
    Run(Settings(tasks=str(tmp_path / "tasks.json"), out=str(tmp_path / "run"), prompt="compact"))
    assert running.write_report_again(tmp_path / "run") == tmp_path / "run" / "report.html"


def test_a_start_that_is_refused_lets_the_next_have_the_folder(made, tmp_path):
    for model in ("none", "nor-this"):  # the first run is still at hand then, as in a notebook
        with pytest.raises(ArcKernelError, match="no such model folder"):
            made(model=str(tmp_path / model)).adapt()


def test_a_scratch_that_cannot_be_written_may_be_changed(made, fast, tmp_path):
    (tmp_path / "file").touch()
    first = made(model=str(fast["model"]), scratch=str(tmp_path / "file" / "below"), ttt_steps=2)
    for _ in range(2):
        with pytest.raises(ArcKernelError, match="give another scratch"):
            first.adapt()
    assert made(model=str(fast["model"]), ttt_steps=1)._unanswered(), "the folder is free for other settings"
