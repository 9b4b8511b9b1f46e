"""What is kept and what is left out where time runs out or an engine fails: `python -m pytest tests/test_serving_cut_short.py`."""

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from arc_kernel import select, serving, work
from arc_kernel.engine import Prompt
from arc_kernel.run_folder import completions_file
from served import ENCODER, ONE, THREE, TWO, Engine, completions, numbered, of, served, small_tasks
from served import builder, task, task_of_two  # noqa: F401  fixtures

BROKEN = {"dtype": "float32", "ok": False, "judged": False, "seen": "vLLM does not start"}


@pytest.fixture
def now(monkeypatch):
    """The time as the order of work sees it, in seconds: now[0]."""
    now = [0.0]
    monkeypatch.setattr(work, "time", SimpleNamespace(time=lambda: now[0]))
    return now


def a_second_each(now, grid):
    """grid_of for an engine that takes a second for each answer."""
    def grid_of(i, view):
        now[0] += 1
        return grid
    return grid_of


def test_time_budget_keeps_what_is_answered_of_a_task_and_leaves_no_task_without_a_word(tmp_path, builder, task, task_of_two, now):
    told = served(tmp_path, builder, [task, task_of_two], Engine(builder, a_second_each(now, ONE)), answer_until=4, early_stop=False)
    kept = select.read_completions(tmp_path / "completions" / f"{task.id}.jsonl.part")
    assert len(kept) == 3 and not (tmp_path / "completions" / f"{task.id}.jsonl").exists()
    assert [e["task"] for e in of(told, "answered")] == [task.id, task_of_two.id]
    assert [e["text"].partition(": ")[2] for e in of(told, "note")] == [f"time budget: {n} predictions made" for n in ("3 of 8", "0 of 16")]
    assert of(told, "stage")[0]["predictions"] == 3

    now[0] = 0
    again = served(tmp_path, builder, [task], Engine(builder, lambda i, view: ONE), answer_until=3, early_stop=False)
    assert (len(completions(tmp_path, task)) == 8 and not (tmp_path / "completions" / f"{task.id}.jsonl.part").exists()
            and not of(again, "note"))


class BatchEngine(Engine):
    """Takes prompts only where all that it had are answered, as transformers does."""

    batch = 8

    def answer(self, prompts, max_new_tokens, viable, wanted):
        while taken := list(itertools.islice((p for p in prompts if p is not None), self.batch)):
            yield from map(self.answer_to, taken)


@pytest.mark.parametrize("kind, adapted", [(Engine, False), (Engine, True), (BatchEngine, False), (BatchEngine, True)])
def test_predictions_that_do_not_fit_into_the_time_are_left_out_of_every_task_alike(tmp_path, builder, task, now, kind, adapted):
    """Also where a batch takes all that is asked for the tasks whose adapters it may hold, so that no prompt ever waits."""
    tasks, budget = small_tasks(60, task), 240
    for t in tasks if adapted else ():
        (tmp_path / "adapters" / t.id).mkdir(parents=True)
    begun = []

    def share(task):
        begun.append(task)
        return 1 / (len(tasks) - len(begun) + 1)

    told = served(tmp_path, builder, tasks, kind(builder, a_second_each(now, ONE)), share=share, answer_until=budget, early_stop=False)
    by_task = {t.id: len(select.read_completions(completions_file(tmp_path, t.id))) for t in tasks}
    made = list(by_task.values())
    assert 0.9 * budget < sum(made) <= budget and np.median(made) == 4 and sum(n in (3, 4, 5) for n in made) > 40
    assert sum(n == 0 for n in made) <= 5 * (adapted and kind is Engine), "its batch is kept half full: 16 prompts of 4 tasks"
    assert {e["task"]: 8 - e["cut"] for e in of(told, "answered")} == by_task
    assert not (tmp_path / "completions" / f"{tasks[-1].id}.jsonl").exists(), "what was cut short is answered anew by a next start"


def test_time_that_is_over_leaves_two_predictions_a_test_input_and_some_under_way(task_of_two):
    asked = [Prompt((task_of_two.id, ((k % 2, str(k)),)), [1]) for k in range(5)] + [Prompt((task_of_two.id, ((0, "5"), (1, "5"))), [1])]
    late, answered = (work.Work(task_of_two, list(asked), room=0.0) for _ in range(2))
    late.take(late.send(), [SimpleNamespace(status="nan")])  # which is no prediction
    left = []
    for _ in range(4):
        late.send()
        late.cut_short(pace=1.0)
        left.append(len(late.waiting))
    assert left == [4, 3, 2, 0] and late.cut == 2
    for _ in range(4):
        answered.take(answered.send(), [SimpleNamespace(status="ok")])
        answered.cut_short(pace=1.0)
    assert len(answered.waiting) == 2, "with none under way no answer would come that ends the task"


def test_finite_answers_outlive_an_engine_that_takes_the_process_with_it(tmp_path, builder, task):
    class Dying(Engine):
        def answer(self, *_):
            raise RuntimeError("CUDA error: out of memory")

    answers = iter([ONE, None, ONE, ONE, ONE, ONE, ONE, ONE])
    with pytest.raises(RuntimeError):
        served(tmp_path, builder, [task], Engine(builder, lambda i, view: next(answers)), Dying(builder, None), early_stop=False)
    kept = select.read_completions(completions_file(tmp_path, task.id))
    assert [c.status for c in kept] == ["ok"] * 7


def test_answers_outlive_the_process_they_were_given_in(tmp_path, builder, task, monkeypatch):
    def fifth_kills(i, view):
        if len(engine.sent) == len(engine.batches) == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return ONE

    monkeypatch.setattr(serving, "KEEP_SECONDS", 0.0)
    for _ in range(2):  # and in the next one, which dies as well
        engine = Engine(builder, fifth_kills)
        engine.in_flight = 1
        with pytest.raises(RuntimeError):
            served(tmp_path, builder, [task], engine, early_stop=False)
        kept = completions_file(tmp_path, task.id)
        assert kept.suffix == ".part" and [c.status for c in select.read_completions(kept)] == ["ok"] * 4
    served(tmp_path, builder, [task], Engine(builder, lambda i, view: TWO), early_stop=False)
    found, = select.candidates(completions(tmp_path, task), ENCODER)
    assert found.votes == 8 and found.grid.tolist() == TWO and not kept.exists()


def test_a_start_without_any_finite_answer_keeps_those_of_an_earlier_one(tmp_path, builder, task, now):
    served(tmp_path, builder, [task], Engine(builder, a_second_each(now, ONE)), answer_until=6, early_stop=False)
    assert len(select.read_completions(completions_file(tmp_path, task.id))) == 5
    now[0] = 0
    served(tmp_path, builder, [task], Engine(builder, lambda i, view: None), evidence=[BROKEN | {"judged": True}], early_stop=False)
    assert len(completions(tmp_path, task)) == 5


def test_task_without_a_finite_answer_is_asked_again_in_full_where_there_is_time(tmp_path, builder, task, task_of_two):
    class Slow(Engine):
        in_flight = 4

        def answer_to(self, prompt):
            time.sleep(0.2 * (len(self.sent) <= self.in_flight))
            return super().answer_to(prompt)

    tasks, engines = [task, task_of_two], (Engine(builder, lambda i, view: None), Slow(builder, lambda i, view: ONE))
    served(tmp_path, builder, tasks, *engines, share=lambda task: 0.005, early_stop=False, answer_until=time.time() + 30)
    assert [sum(c.status == "ok" for c in completions(tmp_path, t)) for t in tasks] == [8, 16]


def test_where_no_engine_could_be_started_no_task_is_taken_and_the_worker_ends(tmp_path, builder, task):
    taken = []
    with pytest.raises(RuntimeError, match="no engine could be started: vLLM does not start"):
        served(tmp_path, builder, (taken.append(t) or t for t in [task]), evidence=[BROKEN])
    assert not taken and not (tmp_path / "completions").exists()
    served(tmp_path, builder, [task], evidence=[BROKEN | {"judged": True}])
    assert completions(tmp_path, task) == []


def test_what_the_next_dtypes_engine_could_not_answer_is_asked_again_by_the_next_start(tmp_path, builder, task):
    told = served(tmp_path, builder, [task], Engine(builder, numbered(*[ONE] * 7, None)), evidence=[BROKEN], early_stop=False)
    assert completions_file(tmp_path, task.id).suffix == ".part" and of(told, "answered")[0]["cut"] == 1


def test_fewer_answers_of_a_next_start_do_not_replace_more_of_an_earlier_one(tmp_path, builder, task, now):
    for until, grid in ((6, ONE), (2, TWO), (-1, THREE)):
        now[0] = 0
        served(tmp_path, builder, [task], Engine(builder, a_second_each(now, grid)), answer_until=until, early_stop=False)
        kept = select.read_completions(completions_file(tmp_path, task.id))
        assert len(kept) == len({c.view for c in kept}) == 5
    assert Counter(g.votes for g in select.candidates(kept, ENCODER)) == {4: 1, 1: 1}


def test_worker_that_holds_only_what_no_engine_could_answer_does_not_wait_for_more(tmp_path, builder, task):
    first = small_tasks(1, task)[0]
    later = itertools.chain([first], itertools.repeat(work.LATER))
    served(tmp_path, builder, later, Engine(builder, lambda i, view: None), Engine(builder, lambda i, view: ONE))
    assert len(completions(tmp_path, first)) >= 6
