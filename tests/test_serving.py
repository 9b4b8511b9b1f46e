"""What is asked of an engine, in which order, and what need not be: `python -m pytest tests/test_serving.py`.

The engine is a stand-in that answers with grids we choose, one prompt a step, the oldest first; prompts, views, votes and
files are the real ones.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from arc_kernel import events, select, serving, work
from arc_kernel.engine import Answer, Prompt
from arc_kernel.grids import GridEncoder
from arc_kernel.job import Job
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run_folder import completions_file
from arc_kernel.serving import Serving
from arc_kernel.tasks import Pair, Task
from arc_kernel.views import View

ENCODER = GridEncoder.from_name("digits")
JOB = Job(model="", vocabulary="full", adapter="", out="", adapters="", profile="auto", backend="vllm", dtype="float32", ttt_dtype="auto",
          grid_encoder="digits", prompt="compact", permute_background=False, max_seq_len=4096, max_new_tokens=100, views=8,
          early_stop=True, seed=0, ttt_steps=0, ttt_batch=1, ttt_lr=1e-3, ttt_loss="last", lora_rank=8,
          adapt_until=math.inf, answer_until=math.inf, probe_tasks=())


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, ENCODER, "compact")


class Engine:
    """Answers a prompt with the grid that `grid_of(test index, view)` gives, seen through its view; None: NaN."""

    in_flight, adapters = 32, 4
    batch = property(lambda self: self.in_flight)

    def __init__(self, builder, grid_of):
        self.builder, self.grid_of, self.sent, self.given_up, self.batches = builder, grid_of, [], [], []

    def answer(self, prompts, max_new_tokens, viable, wanted):
        running, source, ended = [], iter(prompts), False
        while running or not ended:
            self.given_up += [p for p in running if not wanted(p)]
            running = [p for p in running if wanted(p)]
            while not ended and len(running) < self.in_flight:
                prompt = next(source, "end")
                ended = prompt == "end"
                if ended or prompt is None:
                    break
                running.append(prompt)
                self.sent.append(prompt)
            self.batches.append(list(running))
            if running:
                yield self.answer_to(running.pop(0))

    def answer_to(self, prompt):
        i, view = prompt.key[1][0]
        grid = self.grid_of(i, view)
        if grid is None:
            return Answer(prompt, [], math.nan, "nan", ())
        ids = self.builder.answer_ids(View.parse(view).apply_grid(np.array(grid, np.int8)))
        return Answer(prompt, ids[:-1], -0.5 * len(ids), "ok", (-0.5,) * len(ids), cached=10)

    def close(self, last=False):
        self.closed = "with the process" if last else "at once"


def served(tmp_path, builder, tasks, *engines, share=lambda task: 1.0, evidence=(), **changes):
    """The events told while these tasks, each in its `share(task)` of the time left, are answered by these engines, one after the other;
    of others there is the `evidence`."""
    told = []
    server = Serving(dataclasses.replace(JOB, out=str(tmp_path), adapters=str(tmp_path / "adapters"), **changes), builder,
                     SimpleNamespace(adapter=None),
                      lambda event, **facts: told.append({"event": event, **facts}),
                      lambda stage, **facts: told.append({"event": "stage", "stage": stage, **facts}))
    variants = [SimpleNamespace(dtype=name) for name in ("float16", "float32")]
    server._chooser = SimpleNamespace(engines=lambda wait: ((e, v, set()) for e, v in zip(engines, variants)), evidence=evidence)
    server.answer(t if t == work.LATER else (t, share(t)) for t in tasks)
    return told


def completions(tmp_path, task):
    return select.read_completions(tmp_path / "completions" / f"{task.id}.jsonl")


def of(told, kind):
    return [e for e in told if e["event"] == kind]


def numbered(*answers):
    """grid_of for an engine that gives these grids, one a call."""
    left = iter(answers)
    return lambda i, view: next(left)


ONE, TWO, THREE = [[1]], [[2]], [[3]]


@pytest.fixture
def task(arc_training):
    return arc_training.tasks["d037b0a7"]


@pytest.fixture
def task_of_two(arc_training):
    return arc_training.tasks["25ff71a9"]


def test_test_input_that_is_decided_is_asked_no_more_and_its_attempts_are_those_of_the_whole_run(tmp_path, builder, task):
    answers = [ONE, ONE, TWO, ONE, ONE, TWO, ONE] + [THREE]
    runs = {}
    for early in (True, False):
        engine = Engine(builder, numbered(*answers))
        told = served(tmp_path / str(early), builder, [task], engine, early_stop=early)
        found = completions(tmp_path / str(early), task)
        runs[early] = [g.tolist() for g in select.attempts(select.candidates(found, ENCODER), task.test[0].input)]
        (lap,) = of(told, "stage")
        assert (len(found), lap["predictions"], lap["decided"], len(engine.given_up)) == ((7, 7, 1, 1) if early else (8, 8, 0, 0))
        assert [(e["task"], e["test_index"], e["predictions"]) for e in of(told, "decided")] == [(task.id, 0, 1)] * early
        assert sum(e["statuses"]["ok"] for e in of(told, "answered")) == len(found) == len(of(told, "completion"))
    assert runs[True] == runs[False] == [ONE, TWO]


def test_what_is_not_sent_yet_when_its_vote_is_decided_is_never_sent(tmp_path, builder, task):
    engine = Engine(builder, numbered(*[ONE] * 20, *[TWO] * 9))
    told = served(tmp_path, builder, [task], engine, views=36)
    assert (len(completions(tmp_path, task)), of(told, "decided")[0]["predictions"]) == (29, 7)
    assert len(engine.sent) == 36 and len(engine.given_up) == 7  # the last ones are under way by then, half a batch of one task
    engine = Engine(builder, numbered(*[ONE] * 51, *[TWO] * 25))
    told = served(tmp_path, builder, [task], engine, views=100)
    assert (len(completions(tmp_path, task)), of(told, "decided")[0]["predictions"]) == (76, 24)
    assert len(engine.sent) == 76 + Engine.in_flight // 2 - 1 and len(engine.given_up) == Engine.in_flight // 2 - 1


def test_one_test_input_is_decided_without_the_other(tmp_path, builder, task_of_two):
    engine = Engine(builder, lambda i, view: next(first) if i == 0 else ONE)
    first = iter([ONE] * 5 + [TWO] * 2 + [THREE])
    told = served(tmp_path, builder, [task_of_two], engine)
    assert Counter(c.test_index for c in completions(tmp_path, task_of_two)) == {0: 7, 1: 8}
    assert [(e["test_index"], e["predictions"]) for e in of(told, "decided")] == [(0, 1)]


def test_prompt_without_a_finite_answer_is_outstanding_until_it_has_one_or_its_vote_is_decided(tmp_path, builder, task):
    first = Engine(builder, numbered(None, None, ONE, ONE, ONE, TWO, ONE, ONE))
    second = Engine(builder, numbered(TWO, THREE))
    told = served(tmp_path, builder, [task], first, second)
    assert (len(first.sent), len(second.sent)) == (8, 2)
    assert (first.closed, second.closed) == ("at once", "with the process")
    assert [e["stage"] for e in of(told, "stage")] == ["answer", "answer again in float32"] and of(told, "precision")[0]["predictions"] == 2
    decided_early = Engine(builder, numbered(None, ONE, ONE, ONE, ONE, TWO, TWO, ONE))
    told = served(tmp_path / "early", builder, [task], decided_early)
    assert [e["predictions"] for e in of(told, "decided")] == [1] and not of(told, "precision")
    assert Counter(c.status for c in completions(tmp_path / "early", task)) == {"nan": 1, "ok": 7}


def test_room_is_left_for_an_answer_like_the_tasks_own_outputs_not_for_the_largest_grid_there_is(tmp_path, builder, task):
    """In a context of 256 tokens, where a 30x30 answer of 930 would leave no room for any pair."""
    engine = Engine(builder, lambda i, view: ONE)
    told = served(tmp_path, builder, [task], engine, max_new_tokens=0, max_seq_len=256)
    assert len(engine.sent) == 8 and not of(told, "note")
    assert {len(p.token_ids) for p in engine.sent} == {len(builder.prompt(View.identity(len(task.train)), task, 0))}


def test_test_inputs_of_a_task_share_views_and_come_one_after_the_other(tmp_path, builder, task_of_two):
    engine = Engine(builder, lambda i, view: [[i]])
    served(tmp_path, builder, [task_of_two], engine)
    asked = [p.key[1] for p in engine.sent]
    assert [i for ((i, _),) in asked] == [0, 1] * 8
    for first, second in zip(engine.sent[::2], engine.sent[1::2]):
        assert first.key[1][0][1] == second.key[1][0][1]
        pairs = builder.prompt_ids(View.parse(first.key[1][0][1]).apply(task_of_two).train, np.zeros((1, 1), np.int8))
        alike = next(n for n, (a, b) in enumerate(zip(first.token_ids, second.token_ids)) if a != b)
        assert alike >= len(pairs) - len(builder.prompt_ids((), np.zeros((1, 1), np.int8)))


def test_equal_prompts_are_asked_once_and_counted_for_each_test_input(tmp_path, builder, task):
    twice = dataclasses.replace(task, test=(task.test[0], Pair(task.test[0].input.copy(), None)))
    engine = Engine(builder, lambda i, view: ONE)
    told = served(tmp_path, builder, [twice], engine)
    rows = completions(tmp_path, twice)
    assert len(engine.sent) == 8 and Counter(c.test_index for c in rows) == {0: 8, 1: 8}
    assert [c.view for c in rows[:8]] == [c.view for c in rows[8:]]
    (lap,) = of(told, "stage")
    assert (lap["predictions"], lap["repeated"], lap["cached_tokens"]) == (16, 8, 80)
    assert lap["prompt_tokens"] == sum(len(p.token_ids) for p in engine.sent)


def test_stage_table_says_what_was_repeated_decided_and_cached(tmp_path, builder, task):
    twice = dataclasses.replace(task, test=task.test * 2)
    told = served(tmp_path, builder, [twice], Engine(builder, numbered(*[ONE] * 5, *[TWO] * 2, THREE)))
    (lap,) = of(told, "stage")
    (row,) = events.stage_rows([{"seconds": 2.0, **lap}])
    assert [row[k] for k in ("predictions", "repeated", "decided")] == [14, 7, 2]
    assert row["cached"] == pytest.approx(70 / lap["prompt_tokens"], abs=1e-4)
    heads, values, summed, columns = events.stage_table([row]).splitlines()
    assert heads.split()[-4:] == ["cached", "predictions", "repeated", "decided"]
    assert values.split()[-4:] == [f"{row['cached']:.1%}", "14", "7", "2"]
    assert summed == "seconds: summed over workers and starts"
    assert [part.partition(":")[0] for part in columns.split("; ")] == ["cached", "repeated", "decided"]
    assert events.stage_table([row | {"cached": 0.0, "repeated": 0}]).splitlines()[-1].startswith("decided: not made")
    assert len(events.stage_table(events.stage_rows([{"event": "stage", "stage": "vote, score", "seconds": 0.1}])).splitlines()) == 2


def test_equal_prompts_under_two_views_are_each_seen_back_through_their_own(tmp_path, builder):
    """The train pair looks the same flipped, and the second test input is the first one flipped."""
    same, corner = np.array([[0, 0], [0, 0]], np.int8), np.array([[0, 1], [0, 0]], np.int8)
    mirrored = Task("m", (Pair(same, same),), (Pair(corner, None), Pair(np.fliplr(corner), None)))
    engine = Engine(builder, lambda i, view: corner if i == 0 else np.fliplr(corner))
    told = served(tmp_path, builder, [mirrored], engine, views=4, early_stop=False)
    prompts = [tuple(p.token_ids) for p in engine.sent]
    assert len(set(prompts)) == len(prompts) < 8 == of(told, "stage")[0]["predictions"]
    for i, grid in enumerate((corner, np.fliplr(corner))):
        (found,) = select.candidates([c for c in completions(tmp_path, mirrored) if c.test_index == i], ENCODER)
        assert np.array_equal(found.grid, grid) and found.votes == 4


def small_tasks(n, task):
    return [dataclasses.replace(task, id=f"t{k}") for k in range(n)]


def test_batch_is_full_and_holds_no_more_adapters_or_prompts_of_one_task_than_it_may(tmp_path, builder, task):
    tasks = small_tasks(12, task)
    for t in tasks:
        (tmp_path / "adapters" / t.id).mkdir(parents=True)
    engine = Engine(builder, lambda i, view: ONE)
    served(tmp_path, builder, tasks, engine, views=32)
    assert max(len({p.adapter for p in batch}) for batch in engine.batches) <= engine.adapters
    assert max(max(Counter(p.adapter for p in batch).values(), default=0) for batch in engine.batches) == 16
    assert all(len(batch) == 32 for batch in engine.batches[:11 * 32])
    assert len(engine.sent) == 12 * 32
    engine = Engine(builder, lambda i, view: ONE)
    served(tmp_path, builder, tasks, engine, views=4)
    assert max(len({p.adapter for p in batch}) for batch in engine.batches) == engine.adapters


def test_tasks_without_adapters_fill_the_batch_however_few_predictions_each_has(tmp_path, builder, task):
    engine = Engine(builder, lambda i, view: ONE)
    served(tmp_path, builder, small_tasks(40, task), engine, views=1)
    assert len(engine.batches[0]) == 32 and len(engine.sent) == 40


def test_time_budget_keeps_what_is_answered_of_a_task_and_leaves_no_task_without_a_word(tmp_path, builder, task, task_of_two, monkeypatch):
    clock = itertools.count()  # one second a prediction
    now = [0]
    monkeypatch.setattr(work, "time", SimpleNamespace(time=lambda: now[0]))

    def slow(i, view):
        now[0] = next(clock)
        return ONE

    told = served(tmp_path, builder, [task, task_of_two], Engine(builder, slow), answer_until=3, early_stop=False)
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
def test_predictions_that_do_not_fit_into_the_time_are_left_out_of_every_task_alike(tmp_path, builder, task, monkeypatch, kind, adapted):
    """Also where a batch takes all that is asked for the tasks whose adapters it may hold, so that no prompt ever waits."""
    now, tasks, budget = [0.0], small_tasks(60, task), 240
    for t in tasks if adapted else ():
        (tmp_path / "adapters" / t.id).mkdir(parents=True)
    monkeypatch.setattr(work, "time", SimpleNamespace(time=lambda: now[0]))

    def second(i, view):
        now[0] += 1
        return ONE

    begun = []

    def share(task):
        begun.append(task)
        return 1 / (len(tasks) - len(begun) + 1)

    told = served(tmp_path, builder, tasks, kind(builder, second), share=share, answer_until=budget, early_stop=False)
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


def test_a_start_without_any_finite_answer_keeps_those_of_an_earlier_one(tmp_path, builder, task, monkeypatch):
    now = [0]
    monkeypatch.setattr(work, "time", SimpleNamespace(time=lambda: now[0]))

    def second(i, view):
        now[0] += 1
        return ONE

    served(tmp_path, builder, [task], Engine(builder, second), answer_until=6, early_stop=False)
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


BROKEN = {"dtype": "float32", "ok": False, "judged": False, "seen": "vLLM does not start"}


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


def test_fewer_answers_of_a_next_start_do_not_replace_more_of_an_earlier_one(tmp_path, builder, task, monkeypatch):
    now = [0]
    monkeypatch.setattr(work, "time", SimpleNamespace(time=lambda: now[0]))

    def answers(grid):
        def second(i, view):
            now[0] += 1
            return grid
        return Engine(builder, second)

    for until, grid in ((6, ONE), (2, TWO), (-1, THREE)):
        now[0] = 0
        served(tmp_path, builder, [task], answers(grid), answer_until=until, early_stop=False)
        kept = select.read_completions(completions_file(tmp_path, task.id))
        assert len(kept) == len({c.view for c in kept}) == 5
    assert Counter(g.votes for g in select.candidates(kept, ENCODER)) == {4: 1, 1: 1}


def test_task_that_comes_alone_is_waited_for_until_the_others_are_answered(tmp_path, builder, task):
    """As the pool gives one that was in a worker that died: nothing beside what is open, and nothing beside it."""
    engine, told = Engine(builder, lambda i, view: ONE), []
    first, alone = small_tasks(2, task)

    def given():
        yield first
        while not any(e["event"] == "answered" for e in told):
            yield work.LATER
        yield alone

    server = Serving(dataclasses.replace(JOB, out=str(tmp_path), adapters=str(tmp_path / "adapters"), early_stop=False), builder,
                     SimpleNamespace(adapter=None), lambda event, **facts: told.append({"event": event, **facts}), lambda *_, **__: None)
    server._chooser = SimpleNamespace(engines=lambda wait: [(engine, SimpleNamespace(dtype="float32"), set())], evidence=[])
    server.answer(t if t == work.LATER else (t, 1.0) for t in given())
    assert [len(completions(tmp_path, t)) for t in (first, alone)] == [8, 8]
    assert all(len({p.key[0] for p in batch}) <= 1 for batch in engine.batches)


def test_worker_that_holds_only_what_no_engine_could_answer_does_not_wait_for_more(tmp_path, builder, task):
    first = small_tasks(1, task)[0]
    later = itertools.chain([first], itertools.repeat(work.LATER))
    served(tmp_path, builder, later, Engine(builder, lambda i, view: None), Engine(builder, lambda i, view: ONE))
    assert len(completions(tmp_path, first)) >= 6


def test_tasks_without_an_adapter_of_their_own_are_answered_with_the_one_they_start_from(tmp_path, builder, task):
    (tmp_path / "adapters" / "t0").mkdir(parents=True)
    engine = Engine(builder, lambda i, view: ONE)
    served(tmp_path, builder, small_tasks(2, task), engine, adapter=str(tmp_path / "base"), views=2)
    assert {p.key[0]: p.adapter for p in engine.sent} == {"t0": tmp_path / "adapters" / "t0", "t1": tmp_path / "base"}


def test_prompts_leave_room_for_the_answer_and_background_is_permuted_where_asked(tmp_path, builder, task):
    asked = []

    class Asked(Engine):
        def answer(self, prompts, max_new_tokens, *more):
            asked.append(max_new_tokens)
            return super().answer(prompts, max_new_tokens, *more)

    engine, room = Asked(builder, lambda i, view: ONE), len(builder.prompt_ids(task.train, task.test[0].input)) + 5
    served(tmp_path, builder, [task], engine, max_seq_len=room, permute_background=True)
    assert asked == [100] and max(len(p.token_ids) for p in engine.sent) + builder.likely_answer(task, 0) <= room
    assert len({View.parse(p.key[1][0][1]).colours[0] for p in engine.sent}) > 1
