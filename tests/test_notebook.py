"""The notebook through papermill, from bundles, as on Kaggle: `python -m pytest tests/test_notebook.py`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arc_kernel import bundle, generate, notebook
from arc_kernel.tasks import read_submission
from models import tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE, BUILT = REPOSITORY / "notebooks" / "submission.py", REPOSITORY / "notebooks" / "submission.ipynb"


def dry_run(input_root, out, *parameters):
    command = [sys.executable, REPOSITORY / "notebooks" / "dry_run.py", "--out", out, f"input_root={input_root}", *parameters]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory, model_folder):
    """Bundles of the code and of a tiny random model under two unlike mount points, and a Kaggle challenges file."""
    root = tmp_path_factory.mktemp("input")
    bundle.build_code(root / "datasets" / "someone", "someone")
    bundle.build_weights(root, str(tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")), "someone")
    (root / "arc-prize").mkdir()
    task = {"train": [{"input": [[1, 0]], "output": [[0, 1]]}] * 2, "test": [{"input": [[2, 0]]}]}
    (root / "arc-prize" / "arc-agi_test_challenges.json").write_text(json.dumps({"one": task, "two": task}))
    return root


FAST = ("tasks=arc-agi_test_challenges.json", "task_ids=''", "ttt_steps=2", "views=2", "max_new_tokens=8", "backend=transformers", "lora_rank=4")


def test_ipynb_is_what_its_source_gives(tmp_path):
    notebook.write_notebook(SOURCE, tmp_path / "a.ipynb")
    assert (tmp_path / "a.ipynb").read_bytes() == BUILT.read_bytes()
    cells = json.loads(BUILT.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(code) <= 10 and ["parameters"] == code[0]["metadata"]["tags"]


@pytest.mark.skipif(not generate.vllm_installed(), reason="no vLLM wheel for this platform")
def test_real_model_real_task_through_papermill(tmp_path, model_folder):
    root = tmp_path / "input"
    bundle.build_code(root, "someone")
    bundle.build_weights(root, str(model_folder), "someone")
    before = contents(root)
    done = dry_run(root, tmp_path / "out", "task_ids=d037b0a7", "ttt_steps=3", "views=2", "lora_rank=8")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert contents(root) == before
    assert set(read_submission(tmp_path / "out" / "submission.json")) == {("d037b0a7", 0)}
    assert "test outputs solved" in done.stdout and "report.html" in done.stdout
    executed = json.loads((tmp_path / "out" / "submission.ipynb").read_text())
    pictures = "".join(str(o) for c in executed["cells"] for o in c.get("outputs", []))
    assert "data:image/png" in pictures and "<svg" in pictures and "truth" in pictures


def test_challenges_are_found_by_name_below_the_input_root(mounted, tmp_path):
    done = dry_run(mounted, tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert list(read_submission(tmp_path / "out" / "submission.json")) == [("one", 0), ("two", 0)]
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["tasks"].endswith("arc-prize/arc-agi_test_challenges.json")


def test_unknown_parameter_is_an_error(mounted, tmp_path):
    done = dry_run(mounted, tmp_path / "out", *FAST, "ttt_stepz=3")
    assert done.returncode == 1 and "unknown parameter ttt_stepz" in done.stderr
    assert not (tmp_path / "out" / "submission.json").exists()


@pytest.mark.parametrize("kind, file", [("code", "arc_kernel/views.py"), ("code", "arc_kernel/bundle.py"), ("weights", "model/model.safetensors")])
@pytest.mark.parametrize("damage", ["changed", "missing"])
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
