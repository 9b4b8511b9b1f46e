"""Completions become votes and two attempts: `python -m pytest tests/test_select.py`."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import grids, views

from arc_kernel import select
from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import ENCODERS, GridEncoder
from arc_kernel.select import Candidate, Completion
from arc_kernel.tasks import Challenges, Pair, Task

DIGITS = GridEncoder.from_name("digits")
PLAIN = "identity|0123456789|"
SWAPPED = "rot90|0213456789|"


def array(rows):
    return np.array(rows, np.int8)


def completion(text, logprob=-1.0, status="ok", view=PLAIN, tokens=2, test_index=0):
    return Completion("t", test_index, view, text, [32, 33], logprob, status, tokens)


def candidate(rows):
    return Candidate(array(rows), 1, -1.0, (PLAIN,))


def rows_of(found):
    return [c.grid.tolist() for c in found]


def test_answers_are_counted_after_they_are_seen_back_through_their_views():
    found = select.candidates([completion("12"), completion("1\n2", view=SWAPPED), completion("34")], DIGITS)
    assert rows_of(found) == [[[1, 2]], [[3, 4]]] and [c.votes for c in found] == [2, 1]
    assert found[0].views == (PLAIN, SWAPPED)


def test_votes_go_before_logprob_and_ties_go_to_the_mean_logprob_per_token():
    answers = [completion("1", -1.0, tokens=2), completion("2", -3.0, tokens=30), completion("3", -40.0), completion("3", -60.0)]
    found = select.candidates(answers, DIGITS)
    assert rows_of(found) == [[[3]], [[2]], [[1]]]
    assert [c.logprob for c in found] == [-25.0, -0.1, -0.5]


def test_only_answers_that_ended_well_vote():
    answers = [completion("1", status=s) for s in ("unparsable", "truncated", "nan")] + [completion("2")]
    assert rows_of(select.candidates(answers, DIGITS)) == [[[2]]]
    assert select.candidates(answers[:3], DIGITS) == select.candidates([], DIGITS) == []


@given(answers=st.lists(st.tuples(st.sampled_from(["1", "2", "12", "1\n2"]), st.integers(-8, 0),
                                  st.sampled_from([PLAIN, SWAPPED])), max_size=12),
       seed=st.integers(0, 9))
def test_the_order_in_which_answers_come_changes_nothing(answers, seed):
    completions = [completion(text, logprob / 4, view=view, tokens=1) for text, logprob, view in answers]
    shuffled = random.Random(seed).sample(completions, len(completions))
    ranked = lambda some: [(c.grid.tolist(), c.votes, c.logprob) for c in select.candidates(some, DIGITS)]
    assert ranked(shuffled) == ranked(completions)
    assert sum(c.votes for c in select.candidates(completions, DIGITS)) == len(answers)


ANSWERS = st.tuples(st.sampled_from(["11"] * 5 + ["22"] * 3 + ["1\n1", "33", "x"]), st.sampled_from([0.0, -0.25, -0.5, -3.0]))
FALLBACK = array([[9]])


def answers_of(stream):
    return [completion(text, logprob, "unparsable" if text == "x" else "ok", tokens=1) for text, logprob in stream]


def attempts_of(completions):
    return [g.tolist() for g in select.attempts(select.candidates(completions, DIGITS), FALLBACK)]


@settings(max_examples=300)
@given(stream=st.lists(ANSWERS, min_size=6, max_size=24), data=st.data())
def test_what_is_decided_stays_as_it_is_whatever_answers_follow(stream, data):
    stop = next(n for n in range(len(stream) + 1) if select.decided(answers_of(stream[:n]), len(stream) - n, DIGITS))
    following = data.draw(st.lists(ANSWERS, min_size=len(stream) - stop, max_size=len(stream) - stop))
    assert attempts_of(answers_of(stream[:stop])) == attempts_of(answers_of(stream)) == attempts_of(answers_of(stream[:stop] + following))


@settings(max_examples=300)
@given(known=st.lists(ANSWERS, max_size=18).map(answers_of), outstanding=st.integers(1, 6))
def test_the_rule_asks_for_no_answer_too_many(known, outstanding):
    """What is not decided is changed by answers that agree on a grid that is there, or on the smallest there can be."""
    changed = [text for text in ("0", "11", "22", "1\n1", "33")
               if attempts_of(known + answers_of([(text, 0.0)] * outstanding)) != attempts_of(known)]
    assert select.decided(known, outstanding, DIGITS) == (not changed)


def votes(*counts, logprob=-0.5):
    """So many answers for each of as many grids."""
    return answers_of([(text, logprob) for text, count in zip(("11", "22", "1\n1", "33"), counts) for _ in range(count)])


@pytest.mark.parametrize("known, outstanding, expected", [
    ([], 0, True), (votes(9), 0, True), (votes(9), 1, False),  # no second grid yet: any new one would be the second attempt
    (votes(5, 2), 1, True), (votes(3, 2), 1, False), (votes(5, 2, 1), 1, False), (votes(4, 4), 1, False),
    (votes(4, 2), 2, False), (votes(17, 8, 1), 6, True), (votes(17, 8, 2), 6, False), (votes(24), 8, False),
    (answers_of([("11", -0.1)] * 4 + [("22", -2.0)] * 2 + [("33", -9.0)]), 1, True),
    (answers_of([("11", -0.1)] * 7 + [("22", -2.0)] * 4), 3, True), (answers_of([("11", -2.0)] * 7 + [("22", -0.1)] * 4), 3, False),
])
def test_decided_is_what_no_outstanding_answer_can_change(known, outstanding, expected):
    assert select.decided(known, outstanding, DIGITS) is expected


def test_an_answer_is_read_once_however_often_its_vote_is_counted(monkeypatch):
    select._seen_back.cache_clear()
    read, decode = [], GridEncoder.decode
    monkeypatch.setattr(GridEncoder, "decode", lambda encoder, text: read.append(text) or decode(encoder, text))
    answers = [completion(DIGITS.encode(np.full((3, 7), n, np.int8))) for n in range(10)] + [completion("1\n2", view=SWAPPED)]
    for count in range(len(answers)):
        select.decided(answers[:count], len(answers) - count, DIGITS)
    assert len(select.candidates(answers, DIGITS)) == len(answers) == len(read)
    with pytest.raises(ValueError, match="read-only"):
        select.candidates(answers, DIGITS)[0].grid[0, 0] = 1


@given(grid=grids(), seen_as=st.lists(views(), min_size=1, max_size=8), name=st.sampled_from(ENCODERS))
def test_views_that_agree_are_votes_for_one_grid(grid, seen_as, name):
    encoder = GridEncoder.from_name(name)
    (found,) = select.candidates([completion(encoder.encode(v.apply_grid(grid)), view=str(v)) for v in seen_as], encoder)
    assert np.array_equal(found.grid, grid) and found.votes == len(seen_as)


def test_candidates_of_a_task_are_kept_apart_by_test_input():
    task = Task("t", (), (Pair(array([[0]]), None),) * 3)
    found = select.all_candidates(task, [completion("1", test_index=2), completion("2"), completion("3", test_index=2)], DIGITS)
    assert [rows_of(f) for f in found] == [[[[2]]], [], [[[1]], [[3]]]]


@pytest.mark.parametrize("found, test_input, expected", [
    ([[[1]], [[2]], [[3]]], [[9]], ([[1]], [[2]])),
    ([[[1]]], [[9, 9]], ([[1]], [[9, 9]])),
    ([[[9, 9]]], [[9, 9]], ([[9, 9]], [[0, 0]])),
    ([[[0, 0]]], [[0, 0]], ([[0, 0]], [[1, 1]])),
    ([[[0]]], None, ([[0]], [[1]])),
    ([], [[9], [8]], ([[9], [8]], [[0], [0]])),
    ([], [[0]], ([[0]], [[1]])),
    ([], [[1]], ([[1]], [[0]])),
    ([], None, ([[0]], [[1]])),
])
def test_attempts_are_the_best_candidates_then_the_documented_fallback(found, test_input, expected):
    given = select.attempts([candidate(rows) for rows in found], None if test_input is None else array(test_input))
    assert tuple(g.tolist() for g in given) == expected


@given(found=st.lists(grids(2, 2), max_size=3), test_input=grids(2, 2))
def test_two_attempts_are_always_two_distinct_grids(found, test_input):
    texts = [completion(DIGITS.encode(g)) for g in found]
    first, second = select.attempts(select.candidates(texts, DIGITS), test_input)
    assert not np.array_equal(first, second) and first.dtype == second.dtype == np.int8


def test_every_test_input_of_the_file_gets_attempts_the_broken_tasks_too():
    good, late = Task("good", (), (Pair(array([[5]]), None),) * 2), Task("late", (), (Pair(array([[6]]), None),))
    challenges = Challenges("c.json", {"good": good, "late": late}, {"bad": "broken"}, {"good": 2, "bad": 3, "late": 1})
    result = select.vote(challenges, {"good": [[candidate([[7]])], [candidate([[8]])]]})
    assert list(result) == [("good", 0), ("good", 1), ("bad", 0), ("bad", 1), ("bad", 2), ("late", 0)]
    assert [tuple(g.tolist() for g in result[key]) for key in (("good", 0), ("good", 1), ("bad", 2), ("late", 0))] == [
        ([[7]], [[5]]), ([[8]], [[5]]), ([[0]], [[1]]), ([[6]], [[0]])]


@pytest.mark.parametrize("ended, text, status", [
    ("ok", "12", "ok"), ("ok", "1 2", "unparsable"), ("ok", "", "unparsable"),
    ("stopped", "12", "unparsable"), ("stopped", "x", "unparsable"),
    ("truncated", "12", "truncated"), ("truncated", "x", "truncated"), ("nan", "", "nan"),
])
def test_the_status_says_how_an_answer_ended(ended, text, status):
    assert select.status_of(ended, text, DIGITS) == status and status in select.STATUSES


def test_completions_read_back_as_written_and_a_nan_logprob_is_null_in_the_file(tmp_path):
    path = tmp_path / "completions" / "t.jsonl"
    written = [completion("1\n2", -0.25), completion("", math.nan, "nan"), completion("\u2028é", -math.inf, "unparsable", SWAPPED)]
    select.write_completions(path, written)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    back = select.read_completions(path)
    assert [line["logprob"] for line in lines] == [-0.25, None, None]
    assert back[0] == written[0] and [c.text for c in back] == ["1\n2", "", "\u2028é"]
    assert all(math.isnan(c.logprob) for c in back[1:]) and back[2].view == SWAPPED
    select.write_completions(path, [])
    assert select.read_completions(path) == []


def test_completions_are_written_whole_or_not_at_all(tmp_path):
    path, made = tmp_path / "t.jsonl", completion("1")
    select.write_completions(path, [made])
    with pytest.raises(TypeError):
        select.write_completions(path, [completion("2"), dataclasses.replace(made, text=object())])
    assert select.read_completions(path) == [made] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", [
    b'{"task_id": "t", "te', b"", b"[]", b"null", b"{}", b'"text"', b"\xff\xfe{", b'{"logprob": 1, "other": 2}',
    b'{"task_id": "t", "test_index": "0", "view": "", "text": "1", "token_ids": [], "logprob": 0, "status": "ok", "tokens": 1}',
    b'{"task_id": "t", "test_index": 0, "view": "", "text": "1", "token_ids": 7, "logprob": "x", "status": "ok", "tokens": 1}'])
def test_a_damaged_line_is_named_by_file_and_number(tmp_path, damage):
    path = tmp_path / "t.jsonl"
    select.write_completions(path, [completion("1"), completion("2")])
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + damage + b"\n" + second + b"\n")
    with pytest.raises(ArcKernelError) as raised:
        select.read_completions(path)
    assert f"{path} line 2:" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("edited", [{"text": "12\n3"}, {"text": "no grid"}, {"view": "sideways"}, {"view": "identity|0123456789|9"}])
def test_an_answer_edited_into_no_grid_is_named_by_its_task(edited):
    with pytest.raises(ArcKernelError, match="task t: .*delete completions/t.jsonl") as raised:
        select.candidates([completion("1"), dataclasses.replace(completion("2"), **edited)], DIGITS)
    assert "\n" not in str(raised.value)
