"""The notebook through papermill, from bundles, as on Kaggle, with a tiny model; with the real one: test_real_run.py.

    python -m pytest tests/test_notebook.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_kernel import bundle, notebook
from arc_kernel.device import gpu_count
from arc_kernel.kaggle import datasets
from arc_kernel.tasks import read_submission
from models import tiny_model
from runs import REPOSITORY, dry_run, needs_packages
from small_wheels import make_wheel

SOURCE, BUILT = REPOSITORY / "notebooks" / "submission.py", REPOSITORY / "notebooks" / "submission.ipynb"


@pytest.fixture(scope="module")
def mounted(tmp_path_factory, model_folder):
    """Bundles of the code and of a tiny random model under two unlike mount points, and a Kaggle challenges file."""
    root = tmp_path_factory.mktemp("input")
    datasets.build_code(root / "datasets" / "someone", "someone")
    datasets.build_weights(root, str(tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")), "someone")
    (root / "arc-prize").mkdir()
    task = lambda pairs: {"train": [{"input": [[1, 0]], "output": [[0, 1]]}] * pairs, "test": [{"input": [[2, 0]]}]}
    (root / "arc-prize" / "arc-agi_test_challenges.json").write_text(json.dumps({"one": task(3), "two": task(2)}))
    return root


FAST = ("tasks=arc-agi_test_challenges.json", "task_ids=''", "ttt_steps=2", "views=2", "max_new_tokens=8",
        "backend=transformers", "lora_rank=4")


def test_ipynb_is_what_its_source_gives(tmp_path):
    notebook.write_notebook(SOURCE, tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_bytes() == BUILT.read_bytes()
    cells = json.loads(BUILT.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(code) <= 10 and ["parameters"] == code[0]["metadata"]["tags"]


def first_cells(root, out):
    """The parameters' cell with what a run in `out` needs, and the two after it."""
    first, *more = ["".join(c["source"]) for c in json.loads(BUILT.read_text())["cells"] if c["cell_type"] == "code"][:3]
    return [f"{first}\ninput_root, out, profile, scratch, devices = {str(root)!r}, {str(out)!r}, 'auto', '', 1", *more]


def run_cells(cells, folder):
    return subprocess.run([sys.executable, "-c", "\n".join(cells)], capture_output=True, text=True, cwd=folder, timeout=300)


def test_first_cells_may_be_run_again_with_another_value(mounted, tmp_path):
    first, *more = first_cells(mounted, tmp_path)
    done = run_cells([first, *more, "views = 3", *more, "print(settings.views, settings.self_test, settings.tasks)"], tmp_path)
    assert done.returncode == 0, done.stderr
    views, self_test, tasks = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert (views, self_test) == ("3", "False") and tasks.endswith("arc-prize/arc-agi_test_challenges.json")
    assert "scoring run: 2 tasks, 2 outputs" in done.stdout
    assert list(read_submission(tmp_path / "submission.json")) == [("one", 0), ("two", 0)]


def test_bundles_are_found_behind_links_and_a_loop_ends(mounted, tmp_path):
    (tmp_path / "input").mkdir()
    for folder in mounted.iterdir():
        (tmp_path / "input" / folder.name).symlink_to(folder)
    (tmp_path / "input" / "loop").symlink_to(tmp_path / "input")
    (tmp_path / "input" / "itself").symlink_to(tmp_path / "input" / "itself")
    (tmp_path / "input" / "another's").mkdir()
    (tmp_path / "input" / "another's" / "manifest.json").write_text("[" * 100_000)
    shutil.copytree(next(f for f in mounted.rglob("arc_kernel") if f.is_dir()).parent, tmp_path / "input" / ".old")
    done = run_cells([*first_cells(tmp_path / "input", tmp_path / "out"), "print('code of', _code)"], tmp_path)
    assert done.returncode == 0 and "scoring run: 2 tasks" in done.stdout, done.stderr
    assert "code of" in done.stdout and "/.old" not in done.stdout


def test_a_run_that_is_made_again_lets_its_folder_go(mounted, tmp_path):
    cells = ["".join(c["source"]) for c in json.loads(BUILT.read_text())["cells"] if c["cell_type"] == "code"]
    look = next(c for c in cells if "run = Run(settings)" in c)
    done = run_cells([*first_cells(mounted, tmp_path), look, "run._lock.acquire()", look, "run._lock.acquire()"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given, said", [
    ("task_ids = ['one']", "settings: task_ids is ['one']: give a value of type str"),
    ("import decimal; ttt_lr = decimal.Decimal('1e-4')", "settings: ttt_lr is Decimal('0.0001'): give a value of type float"),
    ("precision_bench = 'no'", "precision_bench is 'no': give True or False"),
    (f"tasks = '{'x' * 300}'", f"no {'x' * 300} in it"),
    ("views = None", "settings: views is None: give a value of type int"),
    ("ttt_stepz = {'a': 3}", "settings: unknown parameter ttt_stepz: known are "),
    ("tasks = 5", "settings: tasks is 5: give a value of type str"),
    ("profile = None", "settings: profile is None: give a value of type str"),
    ("input_root = None", "input_root is None: give a value of type str: the folder"),
    ("input_root = 5", "input_root is 5: give a value of type str: the folder")])
def test_a_parameter_of_another_type_is_named_before_anything_is_written(mounted, tmp_path, given, said):
    first, find, _ = first_cells(mounted, tmp_path / "out")
    done = run_cells([first, given, find], tmp_path)
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_dry_run_takes_numbers_as_they_are_written_and_leaves_task_ids_alone(tmp_path):
    done = dry_run(tmp_path / "empty", tmp_path / "out", "ttt_lr=1e-3", "ttt_steps=1e2", "task_ids=00576224")
    assert done.returncode == 1 and "no arc-kernel code bundle" in done.stderr
    executed = json.loads((tmp_path / "out" / "submission.ipynb").read_text())
    given = next("".join(c["source"]) for c in executed["cells"] if "injected-parameters" in c["metadata"].get("tags", []))
    assert {'ttt_lr = 0.001', 'ttt_steps = 100', 'task_ids = "00576224"'} <= set(given.splitlines())


@pytest.mark.parametrize("script, pair, said", [("dry_run.py", "views=many", "settings: views is 'many': "),
                                                ("dry_run.py", "ttt_stepz=3", "settings: unknown parameter ttt_stepz"),
                                                ("rehearse.py", "ttt_stepz=3", "settings: unknown parameter ttt_stepz"),
                                                ("rehearse.py", "--seconds=-4", "settings: time_budget is -4.0")])
def test_a_wrong_parameter_costs_no_earlier_run_its_files(tmp_path, script, pair, said):
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "submission.ipynb").touch()
    command = [sys.executable, REPOSITORY / "notebooks" / script, "--out", tmp_path, pair]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kaggle", "submission.ipynb"]


@pytest.mark.parametrize("script, pair", [("dry_run.py", "views"), ("dry_run.py", "views=["),
                                          ("rehearse.py", "views"), ("rehearse.py", "=3")])
def test_a_parameter_without_a_value_is_refused_before_anything_is_made(tmp_path, script, pair):
    command = [sys.executable, REPOSITORY / "notebooks" / script, "--out", tmp_path / "out", pair]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"error: parameter '{pair}': not name=value")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("parameter, said", [("ttt_stepz=3", "unknown parameter ttt_stepz:"),
                                             ("run_kind=Commit", "run_kind is 'Commit': choose auto, commit or scoring")])
def test_unknown_parameter_or_kind_of_run_is_an_error(mounted, tmp_path, parameter, said):
    done = dry_run(mounted, tmp_path / "out", *FAST, parameter)
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "out" / "submission.json").exists()


@pytest.mark.parametrize("kind, file, damage", [
    ("code", "arc_kernel/views.py", "changed"), ("code", "arc_kernel/bundle.py", "missing"),
    ("weights", "model/model.safetensors", "changed")])
def test_damaged_bundle_is_named_before_anything_is_loaded(mounted, tmp_path, kind, file, damage):
    root = shutil.copytree(mounted, tmp_path / "input")
    victim = bundle.find_bundles(root)[kind].folder / file
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.unlink() if damage == "missing" else victim.write_bytes(content)
    done = dry_run(root, tmp_path / "out", *FAST)
    assert done.returncode == 1 and Path(file).name in done.stderr
    assert not (tmp_path / "out" / "settings.json").exists()


def test_missing_weights_bundle_is_said(mounted, tmp_path):
    root = shutil.copytree(mounted / "datasets", tmp_path / "input")
    done = dry_run(root, tmp_path / "out", *FAST)
    assert done.returncode == 1 and "weights" in done.stderr


def faulty(root, out, said, *parameters, submission=True):
    """Run the notebook: it must end in one line that says `said`, with a valid submission where the tasks could be read."""
    done = dry_run(root, out, *FAST, *parameters)
    last = done.stderr.rstrip().rpartition("\n")[2]  # before it Jupyter may have said something of its own
    assert done.returncode == 1 and last.startswith("error: ") and said in last, done.stderr
    assert not (out / "settings.json").exists()
    if submission:
        assert list(read_submission(out / "submission.json")) == [("one", 0), ("two", 0)]
    else:
        assert not (out / "submission.json").exists()


@pytest.mark.skipif(gpu_count() > 0, reason="about a machine without a GPU")
def test_machine_that_is_not_the_profiles_ends_the_run_before_anything_is_spent(mounted, tmp_path):
    here = ".".join(map(str, sys.version_info[:2]))
    said = "no GPU here, profile kaggle-t4 is for 2" if here == "3.12" else f"Python {here}"
    faulty(mounted, tmp_path / "out", said, "profile=kaggle-t4", "devices=2")


def test_two_versions_of_a_bundle_are_both_named(mounted, tmp_path, model_folder):
    root = shutil.copytree(mounted, tmp_path / "input")
    other = tiny_model(model_folder, tmp_path / "models" / "tiny")
    (other / "generation_config.json").write_text("{}\n")
    datasets.build_weights(root / "second", str(other), "someone")
    faulty(root, tmp_path / "out", "two different weights bundles: detach one")


def test_changed_byte_in_a_wheel_is_named(mounted, tmp_path):
    root = shutil.copytree(mounted, tmp_path / "input")
    wheel = make_wheel(tmp_path / "wheels", "small")
    house = datasets.build(root / "arc-kernel-wheels-local-cpu", "wheels", {"profile": "local-cpu"},
                           {f"wheels/{wheel.name}": wheel}, "someone", print)
    victim = house / "wheels" / wheel.name
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    faulty(root, tmp_path / "out", f"wheels/{wheel.name} has changed bytes")


def test_missing_competition_is_said_with_where_it_was_looked_for(mounted, tmp_path):
    root = shutil.copytree(mounted, tmp_path / "input", ignore=shutil.ignore_patterns("arc-prize"))
    faulty(root, tmp_path / "out", f"{root}: no arc-agi_test_challenges.json in it: attach the competition", submission=False)


@needs_packages
def test_commit_run_goes_through_everything_with_the_smallest_task_and_submits_all(mounted, tmp_path):
    root = shutil.copytree(mounted, tmp_path / "input")
    shutil.copy(root / "arc-prize" / "arc-agi_test_challenges.json", root / "arc-prize" / "arc-agi_evaluation_challenges.json")
    done = dry_run(root, tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "commit run: one short task per device" in done.stdout
    assert [p.stem for p in (tmp_path / "out" / "completions").iterdir()] == ["two"]  # the smallest
    assert list(read_submission(tmp_path / "out" / "submission.json")) == [("one", 0), ("two", 0)]
