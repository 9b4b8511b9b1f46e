"""Fine-tuning runs that are killed, go on or may not: `python -m pytest tests/test_finetune_resume.py`."""

import dataclasses
import resource
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.torch import save_file

from arc_kernel import checkpoint
from arc_kernel.errors import ArcKernelError
from arc_kernel.events import read_events
from arc_kernel.finetune import learner, run
from finetuning import killed_at, losses_of, nothing_that_takes_seconds, pool, prepared, rows_of, settings, tiny  # noqa: F401  fixtures


def test_20_steps_at_once_are_10_and_10_more_after_a_kill(settings, prepared, tmp_path, killed_at, capsys):
    again = dataclasses.replace(settings, out=str(tmp_path / "again"))
    whole = run.finetune(settings, prepared)
    killed_at(13)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(again, prepared)
    (again.out_path / "checkpoints" / ".part-15").mkdir()  # what a kill in the middle of saving leaves
    made = run.finetune(again, prepared)
    assert [e["step"] for e in read_events(again.out_path) if e["event"] == "step"] == [*range(1, 14), *range(11, 21)]
    assert losses_of(again) == losses_of(settings) and len(losses_of(again)) == 20
    one, other = (load_file(m["result"] / "adapter_model.safetensors") for m in (whole, made))
    assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    assert sorted(p.name for p in (again.out_path / "checkpoints").iterdir()) == ["checkpoint-15", "checkpoint-20"]
    capsys.readouterr()
    assert run.finetune(again, prepared)["step"] == 20 and len(losses_of(again)) == 20  # a finished run is left as it is
    assert " 20/20 [" in capsys.readouterr().err


def test_other_data_or_weights_under_the_same_name_are_refused(settings, tiny, pool, tmp_path, killed_at):
    """As a pool that grew: what was held out of the first would be other tasks than what is held out now."""
    mine, model = shutil.copy(pool, tmp_path / "mine.jsonl"), shutil.copytree(tiny, tmp_path / "model")
    own = dataclasses.replace(settings, data=(str(mine),), model=str(model), hold_out=2, steps=4, save_every=2)
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(own)
    held_out = (own.out_path / "held_out.json").read_text()
    lines = pool.read_text()
    mine.write_text(lines + lines.splitlines()[0].replace('"t0"', '"t8"') + "\n")
    with pytest.raises(ArcKernelError, match="holds a run with other data under the same name"):
        run.finetune(own)
    assert (own.out_path / "held_out.json").read_text() == held_out
    mine.write_text(lines)
    weights = {name: tensor * 2 for name, tensor in checkpoint.weight_tensors(model)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArcKernelError, match="holds a run with other weights under the same name"):
        run.finetune(own)
    shutil.copy(tiny / "model.safetensors", model)
    assert run.finetune(own)["step"] == 4


def test_two_runs_on_one_folder_are_one_and_a_refusal(settings, prepared, killed_at):
    first = run.Run(dataclasses.replace(settings, steps=2), prepared)
    with pytest.raises(ArcKernelError, match="another run is at work on this folder"):
        run.finetune(first.s, prepared)
    first.stop()
    assert run.finetune(first.s, prepared)["step"] == 2


@pytest.mark.parametrize("name, change, words", [
    ("optimizer.pt", lambda file: file.unlink(), "not there"), ("scheduler.pt", lambda file: file.unlink(), "not there"),
    ("optimizer.pt", lambda file: file.write_bytes(file.read_bytes()[:900] + b"?" * 64 + file.read_bytes()[964:]), "damaged"),
    ("trainer_state.json", lambda file: file.write_text("{}"), "cannot be read")])
def test_a_checkpoint_that_lacks_something_is_named(settings, prepared, killed_at, name, change, words):
    killed_at(7)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(settings, prepared)
    folder = settings.out_path / "checkpoints" / "checkpoint-5"
    shutil.copytree(folder, folder.with_name("checkpoint-5-old"))  # as a person may keep one
    change(folder / name)
    with pytest.raises(ArcKernelError, match=f"{folder / name}: {words}.*delete {folder} to go on"):
        run.finetune(settings, prepared)


def test_a_run_that_was_killed_has_a_report_of_its_steps_up_to_the_last_checkpoint(settings, prepared, killed_at, monkeypatch):
    monkeypatch.setattr(run, "PAGE_SECONDS", 0.0)
    killed_at(6)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(settings, prepared)
    text = (settings.out_path / "report.html").read_text()
    assert "loss at the end" in text and "<svg" in text and f">{sum(r['tokens'] for r in rows_of(settings)[:5]):,}<" in text


def test_a_result_is_there_until_the_next_is_written(settings, prepared, monkeypatch):
    full = dataclasses.replace(settings, lora_rank=0, steps=2)
    made = run.finetune(full, prepared)

    def disk_is_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learner, "save_file", disk_is_full)
    with pytest.raises(ArcKernelError, match="cannot be written"):
        run.finetune(full, prepared)
    checkpoint.check_model(made["result"])


def test_training_goes_on_from_a_given_adapter(settings, prepared, tmp_path):
    first = run.finetune(settings, prepared)
    second = dataclasses.replace(settings, steps=2, adapter=str(first["result"]), out=str(tmp_path / "second"))
    run.finetune(second, prepared)
    assert losses_of(second)[0][1] < losses_of(settings)[0][1] - 0.2


def test_a_checkpoint_that_broke_off_is_named_and_the_one_before_goes_on(settings, prepared, killed_at):
    killed_at(13)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(settings, prepared)
    last = settings.out_path / "checkpoints" / "checkpoint-10"
    names = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors")
    files = [f for f in sorted(last.rglob("*")) if f.name in names]
    assert len(files) == 4
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[:len(whole) // 2])
        with pytest.raises(ArcKernelError, match=f"{file}: .*: delete {last} to go on from the one before it") as error:
            run.finetune(settings, prepared)
        assert "\n" not in str(error.value)
        file.write_bytes(whole)
    shutil.rmtree(last)
    assert run.finetune(settings, prepared)["step"] == 20
    assert [e["step"] for e in read_events(settings.out_path) if e["event"] == "step"] == [*range(1, 14), *range(6, 21)]


def test_a_disk_that_is_full_while_saving_leaves_the_last_good_checkpoint(settings, prepared, monkeypatch):
    settings = dataclasses.replace(settings, steps=12)
    whole, limits = run.Run._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, step, facts):
        whole(self, step, facts)
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # larger files cannot be written from here on

    monkeypatch.setattr(run.Run, "_step", fill)
    try:
        with pytest.raises(ArcKernelError, match="checkpoint of step 10 cannot be saved.*goes on from checkpoint-5$") as error:
            run.finetune(settings, prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [p.name for p in (settings.out_path / "checkpoints").iterdir()] == ["checkpoint-5"]
    monkeypatch.setattr(run.Run, "_step", whole)
    assert run.finetune(settings, prepared)["step"] == 12
    assert [e["step"] for e in read_events(settings.out_path) if e["event"] == "step"] == [*range(1, 11), *range(6, 13)]


def test_a_time_budget_saves_and_stops_and_the_next_start_goes_on(settings, prepared):
    short = dataclasses.replace(settings, time_budget=1e-3, save_every=100, steps=4)
    assert run.finetune(short, prepared)["step"] == 1 and (short.out_path / "adapter").is_dir()
    assert run.finetune(dataclasses.replace(short, time_budget=0.0), prepared)["step"] == 4
    assert [r[0] for r in losses_of(short)] == [1, 2, 3, 4]


def test_a_run_with_other_settings_is_not_overwritten(settings, prepared, killed_at):
    killed_at(1)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(settings, prepared)
    with pytest.raises(ArcKernelError, match="holds a run with other settings.*lr: 0.02 vs 0.01"):
        run.finetune(dataclasses.replace(settings, lr=2e-2), prepared)
