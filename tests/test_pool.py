"""Workers that die or hang, seen from the pool: `python -m pytest tests/test_pool.py`.

The workers are stand-ins that speak the real ones' protocol; processes, queue and restarts are the pool's own.
"""

import os
import sys
import time

import pytest

from arc_kernel import device, pool
from arc_kernel.pool import Pool

WORKER = """#!{python}
import json, os, sys, time
device, behaviour = os.environ["DEVICE"], os.environ["BEHAVIOUR"]
tell = lambda **facts: print(json.dumps(facts), flush=True)
job = json.loads(sys.stdin.readline())
for stage in ("adapt", "answer"):
    if behaviour == "vLLM kills it early" and stage == "answer" and job["backend"] == "vllm":
        tell(event="want", stage=stage, now=True)
        sys.stdin.readline()
        os._exit(3)
    if behaviour == "asks for a word" and stage == "answer":
        tell(event="want", stage=stage, now=True)
        reply = json.loads(sys.stdin.readline())
        tell(event="note", text="later" if reply.get("later") else "now")
        if reply["task"]:
            tell(event="answered", task=reply["task"])
    if behaviour == "together" and stage == "answer":
        held = []
        while True:
            tell(event="want", stage=stage)
            reply = json.loads(sys.stdin.readline())
            held += [reply["task"]] if reply["task"] else []
            if not reply["task"] or len(held) == 4:
                if any("killer" in task for task in held):
                    os._exit(3)
                for task in held:
                    tell(event="answered", task=task)
                if not held and not reply.get("wait"):
                    sys.exit()
                held = []
    while True:
        tell(event="want", stage=stage)
        task = json.loads(sys.stdin.readline())["task"]
        if task is None and behaviour == "one dies when the other has trained" and stage == "adapt":
            open(os.environ["HUNG"], "w").write("trained")
            time.sleep(1)  # as long as it takes to let go of the model
        if task is None:
            break
        if behaviour == "capitals kill it once" and task.isupper() and not os.path.exists(os.environ["HUNG"] + task):
            open(os.environ["HUNG"] + task, "w").close()
            os._exit(3)
        if behaviour == "some kill it in training" and stage == "adapt" and task.startswith("bad"):
            os._exit(3)
        if behaviour == "one dies when the other has trained" and stage == "adapt":
            try:
                open(os.environ["HUNG"], "x").close()
            except FileExistsError:
                while open(os.environ["HUNG"]).read() != "trained":
                    time.sleep(0.05)
                os._exit(3)
        if behaviour == "second dies late" and device == "1":
            time.sleep(2)
            os._exit(3)
        if behaviour == "hangs in all training" and stage == "adapt":
            time.sleep(600)
        if behaviour == "hangs in training" and stage == "adapt" and not os.path.exists(os.environ["HUNG"]):
            open(os.environ["HUNG"], "w").close()
            time.sleep(600)
        if behaviour == "lives on" or behaviour == "the second lives on" and device == "1":
            os.close(1)
            time.sleep(600)
        if behaviour == "stops later":
            open(os.environ["HUNG"], "a").write(task)
            if open(os.environ["HUNG"]).read() == "ab":
                tell(event="stop", error="the model cannot be read")
                sys.exit(1)
        if behaviour == "graphs kill it" and job["graphs"]:
            os._exit(3)
        if behaviour == "vLLM kills it" and stage == "answer" and job["backend"] == "vllm":
            os._exit(3)
        time.sleep(2 if behaviour == "asks for a word" and stage == "adapt" and task == "a" else 0.1)
        tell(event={{"adapt": "adapted", "answer": "answered"}}[stage], task=task)
if behaviour == "hangs at its end":
    time.sleep(600)
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A pool of stand-ins of this behaviour on tasks to adapt and to answer; killed at the end."""
    script = tmp_path / "worker"
    script.write_text(WORKER.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(script))
    environment, made = pool._environment, []

    def start(behaviour, devices, adapt, answer):
        monkeypatch.setattr(pool, "_environment", lambda device, *of: environment(device, *of) | {
            "DEVICE": str(device), "BEHAVIOUR": behaviour, "HUNG": str(tmp_path / "hung")})
        todo = {"adapt": adapt, "answer": answer}
        made.append(Pool(devices, {"backend": "vllm"}, {i: i for i in adapt + answer}, todo, tmp_path, lambda stage, task: 1.0))
        return made[0]

    yield start
    for each in made:
        each.kill()


def done(messages, event):
    return sorted(m["task"] for m in messages if m["event"] == event)


def test_task_of_a_device_that_is_lost_is_done_by_one_that_had_ended(started, monkeypatch):
    monkeypatch.setattr(pool, "DEATHS", 1)
    crew = started("second dies late", 2, [], ["a", "b"])
    messages = list(crew.events("answer", time.time() + 60))
    assert done(messages, "answered") == ["a", "b"] and sum(m["event"] == "worker-died" for m in messages) == 1
    assert list(crew.close()) == []


def test_device_whose_worker_died_is_tried_without_graphs(started):
    pool = started("graphs kill it", 2, ["a", "b", "c"], ["a"])
    messages = [*pool.events("adapt"), *pool.events("answer")]
    assert done(messages, "adapted") == ["a", "b", "c"] and done(messages, "answered") == ["a"]
    assert [m["given_up"] for m in messages if m["event"] == "worker-died"] == [{"adapt": [], "answer": []}] * 2


@pytest.mark.parametrize("behaviour, devices, tasks", [
    ("vLLM kills it", 1, "a"), ("vLLM kills it", 2, "abcde"), ("vLLM kills it early", 2, "abc")])
def test_where_workers_die_of_vllm_transformers_answers_every_task(started, behaviour, devices, tasks):
    crew = started(behaviour, devices, list(tasks), list(tasks))
    messages = [*crew.events("adapt"), *crew.events("answer", time.time() + 60)]
    assert done(messages, "adapted") == done(messages, "answered") == list(tasks)
    assert sum(m.get("text", "").endswith("; from now on transformers answers") for m in messages) == 1
    assert 2 <= len(deaths(messages)) <= 3  # the other device's may have started before


def test_worker_that_hangs_in_training_is_stopped_and_the_tasks_are_answered(started):
    crew = started("hangs in training", 1, ["a"], ["a", "b"])
    held = [m for m in crew.events("adapt", time.time() + 2, grace=0.5) if m.get("held")]
    assert [m["tasks"] for m in held] == [["a"]]
    crew.stop_holders("adapt")
    messages = list(crew.events("answer", time.time() + 60))
    assert done(messages, "answered") == ["a", "b"] and sum(m["event"] == "worker-died" for m in messages) == 1


def test_worker_on_a_gpu_without_a_word_is_replaced_long_before_the_end_of_the_stage(started, monkeypatch):
    monkeypatch.setattr(pool, "SILENCE", 2.0)
    crew = started("hangs in training", 1, ["a", "b"], [])
    crew._gpus = 1
    messages = list(crew.events("adapt", time.time() + 600))
    assert done(messages, "adapted") == ["a", "b"] and deaths(messages) == [{"adapt": [], "answer": []}]
    assert [m["text"] for m in messages if m["event"] == "note"] == ["worker 0 hangs: no word for 2 s: stopped"]


@pytest.mark.parametrize("behaviour, devices, adapted", [("the second lives on", 2, ["a", "b", "c"]), ("lives on", 1, [])])
def test_device_whose_process_does_not_even_end_is_left_alone(started, monkeypatch, behaviour, devices, adapted):
    monkeypatch.setattr(pool, "PATIENCE", 1.0)
    crew = started(behaviour, devices, ["a", "b", "c"], ["a"])
    messages = [*crew.events("adapt", time.time() + 600), *crew.events("answer", time.time() + 600)]
    (died,) = (m["text"] for m in messages if m["event"] == "worker-died")
    assert done(messages, "adapted") == adapted and done(messages, "answered") == ["a"][: len(adapted)]
    assert "its process does not end" in died


def test_what_stops_a_worker_once_tasks_were_finished_stops_no_other(started):
    crew = started("stops later", 1, ["a", "b", "c"], [])
    messages = list(crew.events("adapt", time.time() + 60))
    assert done(messages, "adapted") == ["a", "b", "c"] and len(deaths(messages)) == 1
    assert [m["error"] for m in messages if m["event"] == "stop"] == ["the model cannot be read"]


def test_worker_with_nothing_left_to_adapt_is_told_at_once_that_others_are_not_done(started):
    crew = started("asks for a word", 2, ["a", "b"], ["a", "b", "c"])
    messages = list(crew.events("adapt"))
    assert [m.get("text") or m["task"] for m in messages] == ["b", "later", "a"]
    last = messages[-1]["worker"]
    time.sleep(1)  # the other one waits and could take everything
    messages = list(crew.events("answer"))
    assert sorted(done(messages, "answered")) == ["a", "b", "c"]
    assert [m["text"] for m in messages if m["event"] == "note"] == ["now"]
    assert any(m["event"] == "answered" and m["worker"] == last for m in messages), "one was kept for who trained to the end"


@pytest.mark.parametrize("patience, left", [(1.0, 600), (600.0, 1.0), (600.0, -5.0)])
def test_worker_that_hangs_at_its_end_is_stopped_with_a_word_and_in_time(started, monkeypatch, patience, left):
    monkeypatch.setattr(pool, "PATIENCE", patience)
    crew = started("hangs at its end", 1, [], ["a"])
    assert done(crew.events("answer", time.time() + 60), "answered") == ["a"]
    begun = time.monotonic()
    assert [m["text"] for m in crew.close(time.time() + left)] == ["1 worker did not end within 1 s: stopped"]
    assert time.monotonic() - begun < 10


def deaths(messages):
    return [m["given_up"] for m in messages if m["event"] == "worker-died"]


def test_tasks_that_kill_their_worker_in_training_cost_the_others_nothing(started):
    killers, tasks = ["bad large one", "bad large two", "bad large three"], ["a", "b", "c"]
    crew = started("some kill it in training", 1, killers + tasks, killers + tasks)
    trained, answered = list(crew.events("adapt")), list(crew.events("answer"))
    assert done(trained, "adapted") == tasks and done(answered, "answered") == sorted(killers + tasks)
    assert sorted(i for lost in deaths(trained) for i in lost["adapt"]) == sorted(killers) and not deaths(answered)


def test_device_on_which_nothing_can_be_trained_answers(started):
    crew = started("some kill it in training", 1, ["bad a", "bad b"], ["bad a", "bad b"])
    assert done(crew.events("adapt"), "adapted") == [] and done(crew.events("answer", time.time() + 60), "answered") == ["bad a", "bad b"]


def test_task_left_by_a_lost_device_is_given_up_where_the_others_have_begun_to_answer(started, monkeypatch):
    monkeypatch.setattr(pool, "DEATHS", 1)
    crew = started("one dies when the other has trained", 2, ["a", "b"], ["a", "b"])
    begun, messages = time.monotonic(), list(crew.events("adapt", time.time() + 60))
    (trained,), (lost,) = done(messages, "adapted"), deaths(messages)
    assert {trained, *lost["adapt"]} == {"a", "b"} and time.monotonic() - begun < 30
    assert done(crew.events("answer", time.time() + 60), "answered") == ["a", "b"]


def test_task_that_kills_the_engine_takes_none_of_those_beside_it_with_it(started):
    tasks = ["a", "killer", "b", "c", "d", "e", "f"]
    crew = started("together", 1, [], tasks)
    messages = list(crew.events("answer", time.time() + 60))
    assert done(messages, "answered") == sorted(set(tasks) - {"killer"})
    assert [lost["answer"] for lost in deaths(messages)] == [[], ["killer"]]


def test_worker_that_hangs_in_every_training_is_not_given_the_task_again(started):
    crew = started("hangs in all training", 1, ["a"], ["a", "b"])
    assert [m["tasks"] for m in crew.events("adapt", time.time() + 2, grace=0.5) if m.get("held")] == [["a"]]
    crew.stop_holders("adapt")
    messages = list(crew.events("answer", time.time() + 60))
    assert done(messages, "answered") == ["a", "b"] and deaths(messages) == [{"adapt": ["a"], "answer": []}]


def test_tasks_that_kill_their_workers_alone_are_not_the_devices_fault(started):
    """The first of the batch come first: two that kill, then two that do not. The second death may still be vLLM's fault."""
    crew = started("together", 1, [], ["a killer", "b killer", "c", "d"])
    messages = list(crew.events("answer", time.time() + 60))
    assert done(messages, "answered") == ["c", "d"]
    assert [lost["answer"] for lost in deaths(messages)] == [[], [], ["b killer"], ["a killer"]]


def test_device_that_loses_a_worker_now_and_then_is_not_given_up(started):
    tasks = ["A", "b", "C", "d", "E", "f", "G", "h"]
    messages = list(started("capitals kill it once", 1, [], tasks).events("answer", time.time() + 60))
    assert done(messages, "answered") == sorted(tasks) and len(deaths(messages)) == 4 > pool.DEATHS


def test_each_worker_gets_its_own_gpu_of_those_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("HF_HUB_OFFLINE", False)
    one, two = (pool._environment(number, 2, 2) for number in (0, 1))
    assert (one["CUDA_VISIBLE_DEVICES"], two["CUDA_VISIBLE_DEVICES"]) == ("3", "5")
    assert one["VLLM_CACHE_ROOT"] != two["VLLM_CACHE_ROOT"] and "HF_HUB_OFFLINE" in one
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("VLLM_CACHE_ROOT", False)
    assert pool._environment(1, 2, 2)["CUDA_VISIBLE_DEVICES"] == "1"


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(pool, "cores", lambda: [0, 1, 2, 3, 4])
    assert [pool._share(number, 2) for number in (0, 1)] == [[0, 2, 4], [1, 3]] and pool._share(7, 8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("visible, listed, count", [
    (None, "GPU 0: Tesla T4\\nGPU 1: Tesla T4\\n", 2), ("1", "", 1), ("0,1", "", 2), ("", "", 0), ("-1", "", 0)])
def test_gpus_are_those_that_are_visible(tmp_path, monkeypatch, visible, listed, count):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.gpu_count() == count
