"""Runs compared: figures worked out by hand, intervals, common tasks, the page; `python -m pytest tests/test_evaluate.py`."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_folders import write_run, write_tasks

from arc_kernel import evaluate_page, select
from arc_kernel.__main__ import main
from arc_kernel.bootstrap import Bootstrap
from arc_kernel.errors import ArcKernelError
from arc_kernel.evaluate import PUBLISHED, SHOWN, evaluate, percent, table
from arc_kernel.fewer import SUBSETS, sizes, with_fewer
from arc_kernel.grids import GridEncoder
from arc_kernel.run_folder import completions_file, read_run
from arc_kernel.select import Completion

REAL = "d037b0a7,25ff71a9,3c9b0459"  # 25ff71a9 has two test inputs


@pytest.fixture
def tasks(tmp_path):
    """A with two test outputs, B with one."""
    return write_tasks(tmp_path / "tasks.json", {"A": [[[5]], [[7]]], "B": [[[4]]]})


@pytest.fixture
def run(tmp_path, tasks):
    """A 1: 5 has one vote of four, behind 2 (two votes) and 3 (equal, smaller). A 2: 7 has two, one answer is no grid. B: never right."""
    answers = {("A", 0): [[[5]], [[2]], [[2]], [[3]]], ("A", 1): [[[7]], [[7]], "none", [[1]]], ("B", 0): [[[1]]] * 4}
    return write_run(tmp_path / "one", tasks, answers, views=4, early_stop=False)


def of(result, average, run=0):
    return {f: i["value"] for f, i in result["runs"][run][average].items()}


def test_the_figures_of_a_case_with_two_test_outputs_are_those_worked_out_by_hand(run):
    result = evaluate([read_run(run)], 100, 0)
    assert (result["tasks"], result["outputs"]) == (2, 3)
    assert of(result, "per_output") == pytest.approx({
        "pass_1": (1 / 4 + 2 / 4 + 0) / 3, "accuracy": 1 / 3, "pass_n": 2 / 3, "vote_1": 1 / 3, "vote_2": 1 / 3,
        "correct_pixels": 1 / 3, "correct_size": 1, "unanswered": 0}, abs=1e-6)
    assert of(result, "per_task") == pytest.approx({
        "pass_1": (3 / 8 + 0) / 2, "accuracy": 1 / 4, "pass_n": 1 / 2, "vote_1": 1 / 4, "vote_2": 1 / 4,
        "correct_pixels": 1 / 4, "correct_size": 1, "unanswered": 0}, abs=1e-6)


def test_the_curve_of_predictions_is_the_one_worked_out_by_hand(run):
    """Of two predictions: 5 is among them in 3 of 6 pairs, always second; 7 in 5 of 6, behind 1 in two of them."""
    rows = evaluate([read_run(run)], 100, 0)["runs"][0]["by_predictions"]
    assert [row["predictions"] for row in rows] == [1, 2, 4]
    values = [{f: i["value"] for f, i in row["per_output"].items()} for row in rows]
    assert values[0] == pytest.approx(dict.fromkeys(("pass_n", "vote_1", "vote_2"), (1 / 4 + 2 / 4) / 3), abs=1e-6)
    assert values[1] == pytest.approx({"pass_n": (1 / 2 + 5 / 6) / 3, "vote_1": (0 + 3 / 6) / 3, "vote_2": (1 / 2 + 5 / 6) / 3}, abs=1e-6)
    assert values[2] == pytest.approx({"pass_n": 2 / 3, "vote_1": 1 / 3, "vote_2": 1 / 3}, abs=1e-6)


DIGITS, TRUTH = GridEncoder.from_name("digits"), np.array([[2]], np.int8)


def completion(text, logprob=-1.0):
    return Completion("t", 0, "identity|0123456789|", text, [], logprob, "ok" if text.isdigit() else "unparsable", 1)


def by_choosing(made, k):
    """The figures as the mean over all choices of k, each voted by itself."""
    votes = [[np.array_equal(c.grid, TRUTH) for c in select.candidates(list(some), DIGITS)] for some in itertools.combinations(made, k)]
    return {name: np.mean([any(v[:best]) for v in votes]) for name, best in (("pass_n", None), ("vote_1", 1), ("vote_2", 2))}


@given(made=st.lists(st.builds(completion, st.sampled_from(["1", "2", "3", "11", "no grid"]), st.sampled_from([-3.0, -2.0, -1.0, 0.0])),
                     min_size=1, max_size=7), k=st.integers(1, 8))
def test_fewer_predictions_give_the_mean_over_all_choices_of_them(made, k):
    expected = by_choosing(made, min(k, len(made)))
    assert with_fewer(select.voted_grids(made, DIGITS), len(made), TRUTH, k, ("t", 0)) == pytest.approx(expected)


def test_where_there_are_too_many_choices_a_seeded_sample_of_them_is_near():
    made = [completion(text) for text in ["2"] * 5 + ["3"] * 4 + ["1"] * 3]
    found = select.voted_grids(made, DIGITS)
    sampled = with_fewer(found, 12, TRUTH, 6, ("t", 0))
    assert sampled == with_fewer(found, 12, TRUTH, 6, ("t", 0))
    assert 0 < abs(sampled["vote_1"] - by_choosing(made, 6)["vote_1"]) < 3 * 0.5 / SUBSETS**0.5
    assert sizes(8) == [1, 2, 4, 8] and sizes(6) == [1, 2, 4, 6] and sizes(1) == [1]


def test_the_interval_of_a_share_is_about_two_standard_errors_each_side():
    values = np.repeat([1.0, 0.0], [100, 300])
    interval = Bootstrap(400, 4000, 1).interval(values, np.ones(400))
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (interval.value == 0.25 and interval.low == pytest.approx(0.25 - half, abs=0.006)
            and interval.high == pytest.approx(0.25 + half, abs=0.006))
    assert Bootstrap(400, 4000, 1).interval(values, np.ones(400)) == interval
    assert Bootstrap(400, 4000, 1).interval(values, np.zeros(400)) is None


def test_a_paired_difference_is_far_surer_than_the_runs_themselves(tmp_path):
    tasks = write_tasks(tmp_path / "tasks.json", {f"t{n}": [[[5]]] for n in range(40)})
    right = lambda count: {(f"t{n}", 0): [[[5]]] if n < count else [[[6]]] for n in range(40)}
    runs = [write_run(tmp_path / name, tasks, right(count), views=1) for name, count in (("worse", 20), ("better", 23))]
    result = evaluate(list(map(read_run, runs)), 2000, 0)
    assert of(result, "per_task")["accuracy"] == 0.5 and of(result, "per_task", 1)["accuracy"] == pytest.approx(23 / 40)
    own, difference = result["runs"][0]["per_task"]["accuracy"], result["differences"][0]
    assert (difference["run"], difference["minus"]) == ("better", "worse")
    paired = difference["per_task"]["accuracy"]
    assert paired["value"] == pytest.approx(3 / 40) and 0 <= paired["low"] < paired["value"] < paired["high"] < 0.2
    assert own["high"] - own["low"] > 1.5 * (paired["high"] - paired["low"])
    assert percent(paired) in table(result) and "better - worse" in table(result)


def test_a_difference_whose_interval_does_not_contain_0_is_marked(tmp_path):
    tasks = write_tasks(tmp_path / "tasks.json", {f"t{n}": [[[5]]] for n in range(40)})
    right = lambda count: {(f"t{n}", 0): [[[5]]] if n < count else [[[6]]] for n in range(40)}
    runs = [read_run(write_run(tmp_path / name, tasks, right(n), views=1))
            for name, n in (("some", 20), ("alike", 20), ("none", 0), ("all", 40))]
    shown = table(evaluate(runs[:2], 200, 0))
    assert "* : the interval of the difference does not contain 0" in shown and "] *" not in shown
    marked = table(evaluate([runs[0], *runs[2:]], 200, 0))
    assert next(line for line in marked.splitlines() if line.startswith("accuracy")).count("] *") == 2
    assert "* :" not in table(evaluate(runs[:1], 200, 0)), "one run has no differences"


def test_what_each_run_is_stands_on_table_page_and_in_the_json(tmp_path, tasks):
    told = [{"event": "stage", "stage": stage, "seconds": s} for stage, s in (("adapt", 40.0), ("adapt", 20.4), ("answer", 5.0),
                                                                                ("answer again in float32", 2.0))]
    told += 2 * [{"event": "verdict", "dtype": "float16", "rescale": {"residual": 7}}]  # of two workers
    first = write_run(tmp_path / "first", tasks, {("A", 0): [[[5]]]}, views=1, ttt_steps=8, model="models/s", adapter="runs/long/adapter",
                      prompt="compact")
    (first / "events.jsonl").write_text("".join(json.dumps(e | {"at": 1.0}) + "\n" for e in told))
    runs = [read_run(first), read_run(write_run(tmp_path / "untold", tasks, {("A", 0): [[[5]]]}, views=1, ttt_steps=0))]
    result = evaluate(runs, 10, 0)
    assert {k: result["runs"][0][k] for k in ("model", "adapter", "prompt", "grid_encoder", "dtype", "seconds")} == {
        "model": "models/s", "adapter": "long/adapter", "prompt": "compact", "grid_encoder": "digits", "dtype": "float16 rescaled",
        "seconds": {"adapt": 60.4, "answer": 5.0, "answer again in float32": 2.0}}
    assert ("first: model models/s, adapter long/adapter, steps 8, views 1, prompt compact, grid encoder digits, dtype float16 rescaled, "
            "training 60 s, answering 7 s") in table(result)
    evaluate_page.write_page(tmp_path / "e.html", runs, result)
    page = (tmp_path / "e.html").read_text()
    assert "<td>long/adapter</td><td>8</td>" in page and "<td>60 s</td><td>7 s</td>" in page
    assert "<td>none</td><td>0</td>" in page and "<td>-</td><td>none</td><td>-</td>" in page


def test_plots_of_runs_that_solve_nothing_begin_at_0_and_say_their_units(tmp_path, tasks):
    runs = [read_run(write_run(tmp_path / name, tasks, {("A", 0): [[[6]]]}, views=1)) for name in "xy"]
    for some, wanted in ((runs[:1], 0), (runs, 1)):
        evaluate_page.write_page(tmp_path / "e.html", some, evaluate(some, 10, 0))
        page = (tmp_path / "e.html").read_text()
        assert page.count("percentage points") == wanted and "<!-- cells (outputs) -->" in page
        curves, sizes = (part.partition("</svg>")[0] for part in page.split("<svg")[-2:])
        assert "<!-- 1.0 -->" in curves and "<!-- 1.0 -->" in sizes and "<!-- \N{MINUS SIGN}" not in curves + sizes


def test_runs_on_other_tasks_are_compared_on_those_they_share(tmp_path):
    first = write_tasks(tmp_path / "1.json", {"a": [[[1]]], "b": [[[2]]], "c": [[[3]]], "d": [None], "f": [[[4]]]})
    second = write_tasks(tmp_path / "2.json", {"b": [[[2]]], "c": [[[9]]], "e": [[[5]]], "f": [[[4]]]})
    others = json.loads(second.read_text())
    others["f"]["train"][0]["input"] = [[3]]  # the same answer to another question
    second.write_text(json.dumps(others))
    runs = [write_run(tmp_path / "x", first, {(i, 0): [[[2]]] for i in "abc"}, views=1),
            write_run(tmp_path / "y", second, {("e", 0): [[[5]]]}, views=1)]
    result = evaluate(list(map(read_run, runs)), 100, 0)
    assert (result["tasks"], result["outputs"]) == (1, 1)
    assert of(result, "per_task")["accuracy"] == 1 and of(result, "per_task", 1)["accuracy"] == 0
    assert [n.partition(":")[2][:30] for n in result["notes"][:3]] == [
        " 1 of its 5 tasks are compared", " 1 of its 4 tasks are compared", " 1 of 1 tasks have no completi"]


def test_predictions_that_were_not_made_and_tasks_without_answers_are_told(tmp_path, tasks):
    answers = {("A", 0): [[[5]]] * 3, ("A", 1): [[[7]]] * 4}
    folders = [write_run(tmp_path / name, tasks, answers, views=4, early_stop=name == "early") for name in ("early", "cut")]
    result = evaluate(list(map(read_run, folders)), 100, 0)
    assert [n.partition(" (early_stop")[1] for n in result["notes"] if "1 of 3 outputs have fewer than 4 predictions" in n] == [
        " (early_stop", ""]
    assert any("1 of 2 tasks have no completions: counted as unanswered" in n for n in result["notes"])
    assert of(result, "per_output")["unanswered"] == pytest.approx(1 / 3, abs=1e-6)
    assert [row["predictions"] for row in result["runs"][0]["by_predictions"]] == [1, 2, 4]
    assert result["runs"][0]["by_predictions"][-1]["per_output"]["vote_1"]["value"] == pytest.approx(2 / 3, abs=1e-6)


def test_what_the_time_budget_left_of_a_task_counts(tmp_path, run):
    (run / "completions" / "A.jsonl").rename(run / "completions" / "A.jsonl.part")
    assert of(evaluate([read_run(run)], 100, 0), "per_output")["accuracy"] == pytest.approx(1 / 3, abs=1e-6)


def test_whole_completions_go_before_what_was_left_of_an_earlier_start(run):
    (run / "completions" / "A.jsonl.part").touch()
    assert completions_file(run, "A").name == "A.jsonl"


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path, tasks):
    for place in "xy":
        (tmp_path / place).mkdir()
    runs = [read_run(write_run(tmp_path / place / "run", tasks, {("A", 0): [[[5]]]}, views=1)) for place in "xy"]
    result = evaluate(runs, 10, 0)
    assert [r["run"] for r in result["runs"]] == [str(tmp_path / place / "run") for place in "xy"]
    assert any("2 tasks only" in n for n in result["notes"])


def test_sizes_hold_their_upper_bound(tmp_path):
    train = [{"input": [[1]], "output": [[2]]}]
    tasks = {f"t{n}": {"train": train, "test": [{"input": [[0] * n] * n, "output": [[1]]}]} for n in (1, 5, 10, 11, 30)}
    (tmp_path / "t.json").write_text(json.dumps(tasks))
    read = read_run(write_run(tmp_path / "r", tmp_path / "t.json", {("t1", 0): [[[1]]]}, views=1))
    assert [(row["cells"], row["outputs"]) for row in evaluate([read], 10, 0)["runs"][0]["by_size"]] == [
        ("1-25", 2), ("26-100", 1), ("101-225", 1), ("401-900", 1)]


def test_intervals_are_repeated_by_their_seed(tmp_path):
    source = write_tasks(tmp_path / "t.json", {f"t{n}": [[[5]]] for n in range(30)})
    read = read_run(write_run(tmp_path / "r", source, {(f"t{n}", 0): [[[5 if n % 3 else 6]]] for n in range(30)}, views=1))
    made = [evaluate([read], 50, seed)["runs"][0]["per_task"]["accuracy"] for seed in (0, 0, 1, 2, 3)]
    assert made[0] == made[1] and len({json.dumps(m) for m in made}) > 1
    assert not any("too narrow" in n for n in evaluate([read], 50, 0)["notes"])


def test_task_of_which_one_solution_is_known_counts_with_that_one(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]], None]})
    result = evaluate([read_run(write_run(tmp_path / "r", source, {("A", 0): [[[5]]]}, views=1))], 10, 0)
    assert (result["tasks"], result["outputs"]) == (1, 1)


def test_table_has_the_curve_per_task_in_per_cent(tmp_path, tasks):
    assert percent({"value": 0.125, "low": 0.05, "high": 0.2}) == "12.5 [5.0, 20.0]" and percent(None) == "-"
    read = read_run(write_run(tmp_path / "r", tasks, {("A", 0): [[[5]]], ("A", 1): [[[7]]]}, views=1))
    text = table(evaluate([read], 10, 0))
    row = next(line for line in text.splitlines() if line.startswith("1  ") and "[" in line)
    assert row.split()[1] == "50.0"
    assert all(text.count(f"  {meaning}") == 1 for meaning in SHOWN.values()), "each figure is explained once"


@pytest.mark.parametrize("chosen, stored, read", [({"limit": 1}, {}, ["A"]), ({"task_ids": "A,B"}, {"task_ids": "A, B"}, ["A", "B"])])
def test_run_of_some_tasks_with_solutions_of_their_own_is_read_back(tmp_path, chosen, stored, read):
    source = write_tasks(tmp_path / "t.json", {"A": [None], "B": [None], "C": [None]})
    (tmp_path / "truth.json").write_text(json.dumps({i: [[[5]]] for i in "ABC"}))
    folder = write_run(tmp_path / "r", source, {("A", 0): [[[5]]]}, solutions=str(tmp_path / "truth.json"), **chosen)
    (folder / "settings.json").write_text(json.dumps(json.loads((folder / "settings.json").read_text()) | stored))
    found = read_run(folder).challenges.tasks
    assert list(found) == read and found["A"].test[0].output.tolist() == [[5]]


def test_the_command_writes_a_table_a_json_and_a_page_with_the_tasks_that_differ(tmp_path, arc_training, capsys):
    outputs = {(i, k): p.output for i in REAL.split(",") for k, p in enumerate(arc_training.tasks[i].test)}
    right = {where: [g, g] for where, g in outputs.items()}
    wrong = right | {("25ff71a9", 1): [np.zeros((3, 3), np.int8)] * 2}
    rows = lambda pairs: [{"input": p.input.tolist(), "output": p.output.tolist()} for p in pairs]
    tasks = {i: {"train": rows(t.train), "test": rows(t.test)} for i, t in arc_training.tasks.items() if i in REAL.split(",")}
    (tmp_path / "real.json").write_text(json.dumps(tasks))
    chosen = {"encoder": "shape+rows+digits", "views": 2}
    runs = [str(write_run(tmp_path / name, tmp_path / "real.json", of, **chosen)) for name, of in (("right", right), ("wrong", wrong))]
    assert main(["evaluate", *runs, "--json", str(tmp_path / "e.json"), "--out", str(tmp_path / "e.html"), "--resamples", "200"]) == 0
    shown = capsys.readouterr().out
    assert "3 tasks, 4 test outputs" in shown and "published, not measured here" in shown and "27.62" in shown
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["runs"][0]["per_output"]["accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["differences"][0]["per_output"]["accuracy"]["value"] == -0.25 and result["published"]["rows"] == list(PUBLISHED)
    for row in result["runs"]:
        assert sum(size["outputs"] for size in row["by_size"]) == 4
    page = (tmp_path / "e.html").read_text()
    assert re.findall(r"<h3>(\w+)</h3>", page) == ["25ff71a9"] and "right 2 of 2, wrong 1 of 2" in page
    assert page.count("<svg") == 3 and page.count("<img") > 10 and "http://www.w3.org" in page and "Not measured here" in page


def test_each_fault_is_one_line(tmp_path, tasks, run, capsys):
    def refused(*arguments):
        assert main(["evaluate", *map(str, arguments)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "no/settings.json: no such file: give the output folder of a run" in refused(tmp_path / "no")
    assert f"{tmp_path}: is a folder: give the name of a file" in refused(run, "--out", tmp_path)
    recall = "--tasks", "recall:100", "--model", "smollm2-135m"
    assert "--out and --solutions go with runs" in refused(*recall, "--out", tmp_path / "page.html")
    empty = write_run(tmp_path / "empty", tasks, {})
    assert "empty/completions: no completions" in refused(empty)
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "settings.json").write_text(json.dumps({"batch": 16, "tasks_sha256": ""}))  # as of finetune
    assert "long/settings.json: not the settings of a run" in refused(tmp_path / "long")
    blind = write_tasks(tmp_path / "blind.json", {"A": [None]})
    unknown = write_run(tmp_path / "unknown", blind, {("A", 0): [[[1]]]})
    assert "no solutions known" in refused(unknown) and "give --solutions" in refused(run, unknown)
    (tmp_path / "known.json").write_text(json.dumps({"A": [[[1]]]}))
    assert main(["evaluate", str(unknown), "--solutions", str(tmp_path / "known.json"), "--resamples", "10"]) == 0
    capsys.readouterr()
    other = write_run(tmp_path / "other", write_tasks(tmp_path / "o.json", {"Z": [[[1]]]}), {("Z", 0): [[[1]]]})
    assert "no task in common" in refused(run, other)
    assert "given twice" in refused(run, run)
    assert "answers other tasks" in refused(run, "--tasks", tmp_path / "o.json")
    (run / "completions" / "B.jsonl").write_text("{}\n")
    assert "B.jsonl line 1: not a completion" in refused(run)


def test_a_run_from_another_machine_is_read_with_its_tasks_given(tmp_path, tasks, run):
    moved = tasks.rename(tmp_path / "moved.json")
    with pytest.raises(ArcKernelError, match="no such file"):
        read_run(run)
    assert set(read_run(run, str(moved)).completions) == {"A", "B"}
