"""What a run's report.html says: `python -m pytest tests/test_report.py`."""

import json

from arc_kernel.run import write_report_again
from run_folders import write_run, write_tasks


def test_report_of_a_folder_that_was_moved_is_written_there(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]]]})
    moved = write_run(tmp_path / "r", source, {("A", 0): [[[5]]]}, prompt="compact").rename(tmp_path / "moved")
    (moved / "events.jsonl").write_text('{"event": "stage", "at": 1.0, "stage": "adapt", "seconds": 1.0}\n')
    assert write_report_again(moved) == moved / "report.html" and not (tmp_path / "r").exists()
    assert len((moved / "events.jsonl").read_text().splitlines()) == 1, "a report is no stage of its run"


def test_report_says_in_words_what_is_right_and_what_the_run_was(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]]]})
    folder = write_run(tmp_path / "r", source, {("A", 0): [[[5]], [[5]], [[4]]]}, prompt="compact", model="models/s", ttt_steps=7, views=3)
    page = write_report_again(folder).read_text()
    title = f"<h1>arc-kernel: {source}, models/s, 7 steps, 3 views</h1>"
    assert title in page and page.index("Green frame: equal to the solution; red frame: not.") < page.index('<h2 id="A">')
    assert all(f">{said}<" in page for said in ("attempt 1: right", "attempt 2: wrong"))
    assert page.index(">2 votes: right\nlogprob/token ") < page.index(">1 vote: wrong\nlogprob/token ")
    blind = write_tasks(tmp_path / "blind.json", {"A": [None]})
    page = write_report_again(write_run(tmp_path / "b", blind, {("A", 0): [[[5]]]}, prompt="compact")).read_text()
    assert ">attempt 1<" in page and ">1 vote\nlogprob" in page and "Green frame" not in page and "most votes first" in page


def test_report_says_how_many_predictions_of_a_task_gave_no_grid_and_why(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]]], "B": [[[5]]]})
    folder = write_run(tmp_path / "r", source, {("A", 0): [[[5]]], ("B", 0): [[[5]]]}, prompt="compact")
    told = [("A", {"nan": 4}), ("A", {"ok": 1, "truncated": 2, "unparsable": 1}), ("B", {"ok": 4})]  # A was answered anew
    (folder / "events.jsonl").write_text("".join(json.dumps({"event": "answered", "at": 1.0, "task": task, "statuses": statuses}) + "\n"
                                                 for task, statuses in told))
    page = write_report_again(folder).read_text()
    assert ">3 of 4 predictions gave no grid: 1 text that is no grid, 2 out of tokens before an end<" in page
    assert page.count("gave no grid:") == 1


def test_report_says_what_the_time_left_out_and_what_befell_the_run(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]]], "B": [[[5]]]})
    folder = write_run(tmp_path / "r", source, {("A", 0): [[[5]]], ("B", 0): [[[5]]]}, prompt="compact", ttt_steps=60)
    told = [{"event": "adapted", "task": "A", "steps": 20}, {"event": "adapted", "task": "A", "steps": 35},
            {"event": "adapted", "task": "B", "steps": 60}, {"event": "answered", "task": "A", "cut": 3},
            {"event": "answered", "task": "B", "cut": 0}, {"event": "note", "task": "B", "text": "of B alone"},
            *[{"event": "note", "text": "time budget: fewer steps for 1 of 2 tasks"}] * 2]
    (folder / "events.jsonl").write_text("".join(json.dumps(event | {"at": 1.0}) + "\n" for event in told))
    page = write_report_again(folder).read_text()
    assert page.count(">trained for 35 of 60 steps, 3 predictions fewer than asked<") == 1 and page.count("trained for") == 1
    assert page.count("<li>time budget: fewer steps for 1 of 2 tasks</li>") == 1 and page.count("of B alone") == 1


def test_report_shows_settings_as_they_were_given(tmp_path):
    source = write_tasks(tmp_path / "t.json", {"A": [[[5]]]})
    folder = write_run(tmp_path / "r", source, {("A", 0): [[[5]]]}, prompt="compact", adapter="läufe/adapter")
    assert write_report_again(folder).read_text().count("läufe/adapter") == 3, "title, heading, settings"
