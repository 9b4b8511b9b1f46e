"""The figures, worked out by hand on small cases: `python -m pytest tests/test_score.py`."""

import numpy as np
import pytest

from arc_kernel import select, tasks
from arc_kernel.errors import ArcKernelError
from arc_kernel.score import FIGURES, score, score_submission, table
from arc_kernel.select import Candidate
from arc_kernel.tasks import Challenges, Pair, Task

CANDIDATE_FIGURES = {"pass_n", "vote_1", "vote_2", "unanswered"}


def array(rows):
    return np.array(rows, np.int8)


def task_of(task_id, *solutions):
    return Task(task_id, (), tuple(Pair(array([[0]]), None if s is None else array(s)) for s in solutions))


def challenges_of(*some, broken=()):
    outputs = {t.id: len(t.test) for t in some} | {i: 1 for i in broken}
    return Challenges("c.json", {t.id: t for t in some}, dict.fromkeys(broken, "broken"), outputs)


def ranked(*grids):
    return [Candidate(array(g), len(grids) - i, -1.0, ()) for i, g in enumerate(grids)]


@pytest.fixture
def case():
    """Three outputs of two tasks: A 1 right at attempt 2 (candidate 2), A 2 of the wrong size (solution is candidate 3), B unanswered."""
    challenges = challenges_of(task_of("A", [[1, 2], [3, 4]], [[5, 6]]), task_of("B", [[7, 7, 7, 7]]))
    found = {"A": [ranked([[1, 2], [3, 0]], [[1, 2], [3, 4]]), ranked([[5], [6]], [[6, 5]], [[5, 6]])], "B": [[]]}
    attempts = {("A", 0): (array([[1, 2], [3, 0]]), array([[1, 2], [3, 4]])), ("A", 1): (array([[5], [6]]), array([[6, 5]])),
                ("B", 0): (array([[7, 0, 7, 0]]), array([[0]]))}
    return challenges, attempts, found


def test_the_figures_are_those_worked_out_by_hand(case):
    figures = score(*case)
    assert figures["counts"] == {"tasks": 2, "outputs": 3, "solved_outputs": 1, "solved_tasks": 0}
    assert figures["per_output"] == pytest.approx({
        "accuracy": 1 / 3, "pass_n": 2 / 3, "vote_1": 0, "vote_2": 1 / 3, "correct_pixels": (3 / 4 + 0 + 2 / 4) / 3,
        "correct_size": 2 / 3, "unanswered": 1 / 3}, abs=1e-6)
    assert figures["per_task"] == pytest.approx({
        "accuracy": (1 / 2 + 0) / 2, "pass_n": (1 + 0) / 2, "vote_1": 0, "vote_2": (1 / 2 + 0) / 2,
        "correct_pixels": (3 / 8 + 2 / 4) / 2, "correct_size": (1 / 2 + 1) / 2, "unanswered": (0 + 1) / 2}, abs=1e-6)


def test_a_task_is_solved_when_all_its_outputs_are():
    challenges = challenges_of(task_of("A", [[1]], [[2]]), task_of("B", [[3]]), task_of("C", [[4]]))
    attempts = {("A", 0): (array([[1]]), array([[0]])), ("A", 1): (array([[0]]), array([[2]])),
                ("B", 0): (array([[3]]), array([[0]])), ("C", 0): (array([[0]]), array([[3]]))}
    assert score(challenges, attempts)["counts"] == {"tasks": 3, "outputs": 4, "solved_outputs": 3, "solved_tasks": 2}


def test_the_best_voted_candidate_counts_for_both_votes():
    figures = score(challenges_of(task_of("A", [[1]])), {("A", 0): (array([[1]]), array([[2]]))}, {"A": [ranked([[1]], [[2]])]})
    assert [figures["per_output"][k]
            for k in ("accuracy", "pass_n", "vote_1", "vote_2", "correct_pixels", "unanswered")] == [1, 1, 1, 1, 1, 0]


def test_only_outputs_with_a_known_solution_are_scored():
    challenges = challenges_of(task_of("A", [[1]], None), task_of("B", None), broken=("C",))
    attempts = {("A", 0): (array([[1]]), array([[0]])), ("A", 1): (array([[0]]), array([[1]])), ("B", 0): (array([[0]]), array([[1]]))}
    assert score(challenges, attempts)["counts"] == {"tasks": 1, "outputs": 1, "solved_outputs": 1, "solved_tasks": 1}
    assert score(challenges_of(task_of("B", None)), attempts) is None


def test_a_task_of_which_the_run_has_no_candidates_is_unanswered(case):
    challenges, attempts, found = case
    assert score(challenges, attempts, {"A": found["A"]}) == score(challenges, attempts, found)
    assert score(challenges, attempts, {})["per_output"]["unanswered"] == 1


def test_a_submission_from_elsewhere_is_scored_without_the_figures_of_candidates(case, tmp_path):
    challenges, attempts, found = case
    tasks.write_submission(tmp_path / "s.json", challenges.outputs, attempts)
    figures, own = score_submission(challenges, tasks.read_submission(tmp_path / "s.json")), score(challenges, attempts, found)
    assert figures["missing_outputs"] == 0 and figures["counts"] == own["counts"]
    assert set(figures["per_output"]) == set(FIGURES) - CANDIDATE_FIGURES
    for averaged in ("per_output", "per_task"):
        assert figures[averaged] == {k: v for k, v in own[averaged].items() if k not in CANDIDATE_FIGURES}


def test_outputs_that_a_submission_lacks_are_counted_and_wrong(case):
    challenges, attempts, _ = case
    lacking = score_submission(challenges, {("A", 0): attempts["A", 0], ("stranger", 0): attempts["A", 0]})
    assert lacking["missing_outputs"] == 2 and lacking["counts"]["outputs"] == 3
    assert lacking["per_output"]["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert lacking["per_output"]["correct_size"] == pytest.approx(1 / 3, abs=1e-6)
    missing = "outputs are missing in the submission and count as wrong"
    assert table(lacking).startswith(f"2 {missing}; of the tasks it has: 1 of 2 test outputs solved,")
    empty = score_submission(challenges, {})
    assert empty["counts"]["solved_outputs"] == 0 and table(empty).startswith(f"3 {missing}\n0 of 3")


def test_a_file_without_solutions_cannot_be_scored():
    with pytest.raises(ArcKernelError, match="c.json: no solutions known: give --solutions"):
        score_submission(challenges_of(task_of("A", None)), {})


def test_the_solutions_themselves_score_one_on_real_tasks(arc_training):
    attempts = {(i, k): (p.output, p.input) for i, t in arc_training.tasks.items() for k, p in enumerate(t.test)}
    figures = score_submission(arc_training, attempts)
    assert figures["counts"] == {"tasks": 400, "outputs": 416, "solved_outputs": 416, "solved_tasks": 400}
    assert set(figures["per_output"].values()) == set(figures["per_task"].values()) == {1.0} and figures["missing_outputs"] == 0


def test_the_fallback_scores_nothing_but_its_size_on_real_tasks(arc_training):
    figures = score(arc_training, select.vote(arc_training, {}), {})
    same_size = [p.output.shape == p.input.shape for t in arc_training.tasks.values() for p in t.test]
    assert figures["per_output"]["correct_size"] == pytest.approx(np.mean(same_size), abs=1e-6)
    assert figures["per_output"]["unanswered"] == 1 and figures["counts"]["solved_outputs"] == 0
    assert 0 < figures["per_output"]["correct_pixels"] < figures["per_output"]["correct_size"]
    said = [line for line in table(figures).splitlines() if "fallback" in line]
    assert [line.split()[0] for line in said] == ["correct_pixels", "correct_size", "unanswered"]


def test_the_table_shows_every_figure_with_its_meaning(case):
    text = table(score(*case))
    assert "1 of 3 test outputs solved, 0 of 2 tasks" in text
    assert all(name in text and meaning in text for name, meaning in FIGURES.items())
    assert "0.3333      0.2500  one of the two attempts is the solution" in text
