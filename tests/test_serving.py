"""What is asked of an engine, in which order, and what need not be: `python -m pytest tests/test_serving.py`."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from arc_kernel import events, select, work
from arc_kernel.serving import Serving
from arc_kernel.tasks import Pair, Task
from arc_kernel.views import View
from served import ENCODER, JOB, ONE, THREE, TWO, Engine, completions, numbered, of, served, small_tasks
from served import builder, task, task_of_two  # noqa: F401  fixtures


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
