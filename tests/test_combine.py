"""Submissions put together by each rule: `python -m pytest tests/test_combine.py`."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import write_run, write_tasks

from arc_kernel.__main__ import main
from arc_kernel.combine import combine
from arc_kernel.tasks import read_submission

EMPTY = [None, [], [[]], [[0, 1], [2]], [[10]], "grid", {}, [[1.5]]]
SAMPLE = [[0, 0], [0, 0]]


def submission(path, **tasks):
    """A file of task -> [(attempt 1, attempt 2), ...]; an attempt `...` is left out."""
    rows = lambda pairs: [{k: v for k, v in zip(("attempt_1", "attempt_2"), pair) if v is not ...} for pair in pairs]
    path.write_text(json.dumps({i: rows(pairs) for i, pairs in tasks.items()}))
    return path


def combined(tmp_path, rule, *sources, **more):
    line = combine(list(sources), tmp_path / "out.json", rule, **more)
    rows = {where: [g.tolist() for g in grids] for where, grids in read_submission(tmp_path / "out.json").items()}
    return rows, line


def test_first_takes_the_first_attempt_of_each_and_goes_on_where_they_are_equal(tmp_path):
    a = submission(tmp_path / "a.json", t=[([[1]], [[2]])], u=[([[1]], [[2]])], v=[([[1]], [[1]])])
    b = submission(tmp_path / "b.json", t=[([[3]], [[4]])], u=[([[1]], [[4]])], v=[([[1]], [[5]])])
    rows, line = combined(tmp_path, "first", a, b)
    assert rows == {("t", 0): [[[1]], [[3]]], ("u", 0): [[[1]], [[2]]], ("v", 0): [[[1]], [[5]]]}
    assert f"3 outputs of 3 tasks; attempts: 4 from {a}, 2 from {b}; 2 outputs with one from another than the first, 0 still empty" in line


def test_of_three_files_the_first_two_that_differ_are_taken(tmp_path):
    files = [submission(tmp_path / f"{n}.json", t=[(first, [[9]])]) for n, first in enumerate(([[1]], [[1]], [[2]]))]
    assert combined(tmp_path, "first", *files)[0]["t", 0] == [[[1]], [[2]]]
    assert combined(tmp_path, "fill", *files)[0]["t", 0] == [[[1]], [[9]]]


@pytest.mark.parametrize("nothing", [*EMPTY, ...], ids=str)
def test_fill_replaces_what_is_no_grid_and_keeps_the_rest(tmp_path, nothing):
    a = submission(tmp_path / "a.json", t=[([[1]], nothing), (nothing, [[2]]), (nothing, nothing), ([[1]], [[2]])])
    b = submission(tmp_path / "b.json", t=[([[5]], [[6]])] * 4)
    rows, line = combined(tmp_path, "fill", a, b)
    assert rows == {("t", 0): [[[1]], [[5]]], ("t", 1): [[[2]], [[5]]], ("t", 2): [[[5]], [[6]]], ("t", 3): [[[1]], [[2]]]}
    assert line.endswith(f"3 outputs with one from another than the first, 0 still empty; 4 attempts of {a} without a grid")


def test_kaggles_placeholder_is_empty_only_where_both_attempts_are_it(tmp_path):
    a = submission(tmp_path / "a.json", t=[(SAMPLE, SAMPLE), (SAMPLE, [[1]]), ([[0]], [[0]]), (SAMPLE, None), (SAMPLE, SAMPLE)])
    b = submission(tmp_path / "b.json", t=[([[5]], [[6]])] * 4)
    rows, line = combined(tmp_path, "fill", a, b)
    assert [rows["t", k] for k in range(4)] == [[[[5]], [[6]]], [SAMPLE, [[1]]], [[[5]], [[6]]], [SAMPLE, [[5]]]]
    assert rows["t", 4][0] == SAMPLE and "1 still empty" in line
    (tmp_path / "a.json").write_text('{"t": [null, 3]}')
    assert combined(tmp_path, "fill", a, b)[0]["t", 1] == [[[5]], [[6]]]


def test_other_tasks_and_other_numbers_of_test_inputs_are_put_together(tmp_path):
    a = submission(tmp_path / "a.json", t=[([[1]], [[2]])], only_a=[([[3]], [[4]])])
    b = submission(tmp_path / "b.json", t=[([[5]], [[6]]), ([[7]], [[8]])], only_b=[([[9]], [[1]])])
    wanted = {("t", 0): [[[1]], [[2]]], ("t", 1): [[[7]], [[8]]], ("only_a", 0): [[[3]], [[4]]], ("only_b", 0): [[[9]], [[1]]]}
    assert combined(tmp_path, "fill", a, b)[0] == wanted
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["t", "only_a", "only_b"]


ATTEMPT = st.sampled_from([[[1]], [[2]], [[3, 3]], None, [], [[0, 1], [2]]])


@given(sources=st.lists(st.lists(st.tuples(ATTEMPT, ATTEMPT), min_size=1, max_size=2), min_size=2, max_size=3),
       rule=st.sampled_from(["first", "fill"]))
def test_no_valid_attempt_gives_way_to_an_empty_one(sources, rule, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    rows, _ = combined(folder, rule, *(submission(folder / f"{n}.json", t=pairs) for n, pairs in enumerate(sources)))
    assert set(rows) == {("t", k) for k in range(max(map(len, sources)))}
    for (_, k), given_back in rows.items():
        valid = [g for pairs in sources if k < len(pairs) for g in pairs[k] if g in ([[1]], [[2]], [[3, 3]])]
        distinct = {json.dumps(g) for g in valid}
        assert len({json.dumps(g) for g in given_back} & distinct) == min(2, len(distinct))
        assert given_back[0] != given_back[1]


@pytest.fixture
def runs(tmp_path):
    """Two runs with encoders of their own. t 1: 7 leads in x, 5 over both. t 2: x unanswered, y answers. u: neither. w: in y alone."""
    tasks = write_tasks(tmp_path / "x_tasks.json", {"t": [None, None], "u": [None]})
    more = write_tasks(tmp_path / "y_tasks.json", {"t": [None, None], "u": [None], "w": [None]})
    x = {("t", 0): [[[7]], [[7]], [[7]], [[5]], [[5]], [[6]]], ("t", 1): ["none"], ("u", 0): ["none"]}
    y = {("t", 0): [[[5, 5]], [[5]], [[5]], "none"], ("t", 1): [[[3]]], ("w", 0): [[[4]], [[4]]]}
    return write_run(tmp_path / "x", tasks, x), write_run(tmp_path / "y", more, y, encoder="shape+rows+spaced")


def test_votes_are_counted_over_the_completions_of_all_runs_each_read_in_its_own_form(tmp_path, runs):
    rows, line = combined(tmp_path, "vote", *runs)
    assert rows["t", 0] == [[[5]], [[7]]] and rows["t", 1][0] == [[3]] and rows["w", 0][0] == [[4]]
    assert rows["u", 0][0] == [[0, 0]]  # the test input, as solve itself falls back to
    assert f"predictions: 8 of {runs[0]}, 7 of {runs[1]}; 1 without an answer" in line


def test_of_a_runs_folder_it_is_known_which_attempts_are_no_answers(tmp_path, runs):
    rows, line = combined(tmp_path, "fill", *runs)
    assert rows["t", 0] == [[[7]], [[5]]] and rows["t", 1][0] == [[3]]
    assert "1 still empty" in line and combined(tmp_path, "first", *runs)[0]["t", 0] == [[[7]], [[5]]]
    file = submission(tmp_path / "b.json", u=[([[8]], [[9]])])
    assert combined(tmp_path, "fill", runs[0], file)[0]["u", 0] == [[[8]], [[9]]]


@pytest.mark.parametrize("rule", ["fill", "vote"])
def test_runs_of_another_machine_are_combined_with_their_tasks_given(tmp_path, rule):
    source = write_tasks(tmp_path / "t.json", {"t": [None]})
    made = [write_run(tmp_path / f"r{n}", source, {("t", 0): [[[n]]]}) for n in (1, 2)]
    moved = source.rename(tmp_path / "moved.json")
    assert combined(tmp_path, rule, *made, tasks=str(moved))[0]["t", 0] == [[[1]], [[2]]]


def test_grids_of_the_same_cells_in_another_shape_are_two(tmp_path):
    a = submission(tmp_path / "a.json", t=[([[1, 2]], [[1], [2]])])
    b = submission(tmp_path / "b.json", t=[([[3]], [[4]])])
    assert combined(tmp_path, "fill", a, b)[0]["t", 0] == [[[1, 2]], [[1], [2]]]
    source = write_tasks(tmp_path / "t.json", {"t": [None]})
    made = [write_run(tmp_path / n, source, {("t", 0): grids}) for n, grids in (("x", [[[1, 2]]] * 2), ("y", [[[1], [2]]]))]
    assert combined(tmp_path, "vote", *made)[0]["t", 0] == [[[1, 2]], [[1], [2]]]


@pytest.mark.parametrize("rule", ["fill", "vote"])
def test_what_no_run_answers_gets_the_fallback_of_the_run_that_has_the_task(tmp_path, rule):
    one = write_tasks(tmp_path / "1.json", {"t": [None]})
    more = write_tasks(tmp_path / "2.json", {"t": [None, None], "w": [None]})
    made = write_run(tmp_path / "x", one, {("t", 0): [[[7]]]}), write_run(tmp_path / "y", more, {("t", 0): [[[5]]]})
    assert combined(tmp_path, rule, *made)[0]["w", 0] == [[[0, 0]], [[1, 1]]]


def test_the_fallback_is_the_test_input_where_a_run_before_has_fewer_of_them(tmp_path):
    sources = [write_run(tmp_path / str(n), write_tasks(tmp_path / f"{n}.json", {"A": [None] * n}), {("A", 0): [[[5]]]}) for n in (1, 2)]
    assert combined(tmp_path, "vote", *sources)[0]["A", 1] == [[[0, 0]], [[1, 1]]]


def test_solutions_a_run_was_scored_with_need_not_be_there(tmp_path, runs):
    for run in runs:
        stored = json.loads((run / "settings.json").read_text())
        (run / "settings.json").write_text(json.dumps(stored | {"solutions": str(tmp_path / "gone.json")}))
    assert main(["combine", *map(str, runs), "--rule", "vote", "--out", str(tmp_path / "out.json")]) == 0


def test_each_fault_is_one_line(tmp_path, runs, capsys):
    good = submission(tmp_path / "good.json", t=[([[1]], [[2]])])

    def refused(*sources, rule="fill", out=tmp_path / "out.json"):
        assert main(["combine", *map(str, sources), "--out", str(out), "--rule", rule]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out.json").exists()
        return said

    assert "give two or more" in refused(good)
    assert "no.json: no such file" in refused(good, tmp_path / "no.json")
    (tmp_path / "list.json").write_text("[1]")
    other = submission(tmp_path / "other.json", t=[([[3]], [[4]])])
    assert "list.json: [1] at the top" in refused(good, tmp_path / "list.json")
    assert "good.json: is one of the sources" in refused(good, tmp_path / "list.json", out=good)
    assert "good.json: given twice" in refused(good, good)
    assert "is one of the sources" in refused(*runs, rule="vote", out=runs[0] / "submission.json")
    assert "rule vote counts completions: give the output folders" in refused(runs[0], good, rule="vote")
    assert "settings.json: no such file" in refused(runs[0], tmp_path, rule="vote")
    assert "cannot be written" in refused(good, other, out=good / "below" / "out.json")
    for name, grid in (("train", "[[1]]"), ("test", "[[0, 0]]")):
        (tmp_path / f"{name}.json").write_text((tmp_path / "x_tasks.json").read_text().replace(grid, "[[4]]"))
        other = write_run(tmp_path / name, tmp_path / f"{name}.json", {("t", 0): [np.array([[5]])]})
        assert all(f"{name}: task t is another than in" in refused(runs[0], other, rule=rule) for rule in ("first", "fill", "vote"))
