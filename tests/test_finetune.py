"""Fine-tuning runs on a tiny random model of the real architecture: `python -m pytest tests/test_finetune.py`."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM, get_scheduler
from transformers.integrations import sdpa_attention

from arc_kernel import __main__ as command_line
from arc_kernel import ceilings, checkpoint, cpu_attention
from arc_kernel.decoder_pass import Decoder
from arc_kernel.errors import ArcKernelError
from arc_kernel.events import read_events
from arc_kernel.finetune import learner, page, run, study, train
from arc_kernel.finetune.learner import Learner
from finetuning import killed_at, losses_of, nothing_that_takes_seconds, pool, prepared, rows_of, settings, tiny  # noqa: F401  fixtures
from models import model_with_buffers, save


def test_a_run_learns_and_leaves_an_adapter_a_report_and_figures(settings, prepared, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # of accelerate's own configuration; these settings say float32
    made = run.finetune(dataclasses.replace(settings, steps=30), prepared)
    assert made["loss"] < made["first_loss"] - 0.15 and not made["diverged"] and made["tokens"] > 3000 and made["tokens_per_second"] > 0
    assert (made["result"] == settings.out_path / "adapter"
            and Learner(checkpoint.open_model(settings.model), 1, made["result"], "float32").result == "adapter")
    text = made["report"].read_text()
    assert text.count("<svg") == 1 and "largest activation" in text and "inputs" in text and settings.data[0] in text
    rows = rows_of(settings)
    assert ([r["step"] for r in rows if "largest" in r] == [1, 5, 9, 13, 17, 21, 25, 29]
            and all(r["largest"] > 0 for r in rows if "largest" in r))
    assert all(0 < r["peak_share"] and set(r["kinds"]) <= {"output", "inputs"} for r in rows)
    assert max(r["lr"] for r in rows) == pytest.approx(1e-2) and rows[-1]["lr"] < 1e-3


def test_full_training_leaves_a_model_folder_that_loads_and_differs(settings, prepared, tiny, killed_at, monkeypatch):
    save = Learner.save
    full = dataclasses.replace(settings, lora_rank=0, steps=6, save_every=2, lr=1e-3, gradient_checkpointing=True)
    killed_at(3)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(full, prepared)
    saved = []
    monkeypatch.setattr(Learner, "save", lambda self, folder: saved.append(folder) or save(self, folder))
    made = run.finetune(dataclasses.replace(full, save_every=1), prepared)
    assert len(saved) == 4, "each step from the third on"
    assert len(losses_of(full)) == 6 and losses_of(full)[-1][1] < losses_of(full)[0][1]
    checkpoint.check_model(made["result"])
    old, new = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny, made["result"]))
    assert new.config.to_dict() | {"_name_or_path": ""} == old.config.to_dict() | {"_name_or_path": ""}
    assert not torch.equal(old.model.layers[0].mlp.up_proj.weight, new.model.layers[0].mlp.up_proj.weight)
    assert checkpoint.load_tokenizer(made["result"])("12").input_ids == checkpoint.load_tokenizer(tiny)("12").input_ids


def test_fully_trained_model_is_written_as_the_base_was_with_its_prompt(tiny, tmp_path):
    base, prompt = shutil.copytree(tiny, tmp_path / "base"), {"prompt": "compact", "grid_encoder": "digits"}
    (base / "model.safetensors.index.json").write_text("{}")
    made = Learner(tiny, 0, None, "float32")
    made.folder = base
    result = made.save_result(tmp_path / "out", prompt)
    assert json.loads((result / "trained_prompt.json").read_text()) == prompt
    assert not (result / "model.safetensors.index.json").exists()
    assert {tensor.dtype for _, tensor in checkpoint.weight_tensors(result)} == {torch.bfloat16}


@pytest.mark.skipif(checkpoint.on_transformers_4(), reason="transformers 4 has no such model")
def test_numbers_that_are_no_parameters_are_in_checkpoints_and_in_the_result(model_folder, tmp_path):
    base = model_with_buffers(model_folder, tmp_path / "base")
    made = Learner(base, 0, None, "float32")
    made.base.model.layers[0].layer_scalar.fill_(3.0)
    made.save(tmp_path / "checkpoint")
    again = Learner(base, 0, None, "float32")
    again.load(tmp_path / "checkpoint")
    result = again.save_result(tmp_path / "out", {"prompt": "chat", "grid_encoder": "digits"})
    assert checkpoint.load_model(result, "float32", "cpu").model.layers[0].layer_scalar == 3.0


def test_full_training_is_refused_where_the_result_would_not_be_read_as_this_model(model_folder, tmp_path):
    """transformers 5 holds all experts of a layer in one tensor; vLLM and 4.57 read one each, as 4.57 has them."""
    config = MixtralConfig(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=2)
    folder = save(MixtralForCausalLM(config), model_folder, tmp_path / "experts")
    if checkpoint.on_transformers_4():
        assert Learner(folder, 0, None, "float32").result == "model"
    else:
        with pytest.raises(ArcKernelError, match="experts.* under a name that is none of the folder's.*train a LoRA"):
            Learner(folder, 0, None, "float32")
        assert Learner(folder, 4, None, "float32").result == "adapter"


def test_checkpointed_layers_train_in_16_bits_whatever_attention_is_taken(settings, prepared, monkeypatch):
    monkeypatch.setattr(cpu_attention, "TRIED", 32)
    cpu_attention.fastest.cache_clear()  # as in a process of its own, where the trial comes with the first step
    run.finetune(dataclasses.replace(settings, dtype="bfloat16", steps=3, gradient_checkpointing=True), prepared)
    assert len(losses_of(settings)) == 3


@pytest.mark.parametrize("fits", [True, False])
def test_passes_that_can_be_graphs_learn_the_same(settings, prepared, tmp_path, monkeypatch, fits):
    """On a CPU every capture fails, as on a GPU that cannot make one, and passes go on as they are; so, too, where the GPU has no room."""
    settings = dataclasses.replace(settings, steps=8)
    run.finetune(settings, prepared)
    monkeypatch.setattr(learner, "GRAPHS", ("cpu", "cuda"))
    own, calls = Decoder._plain, []

    def plain(self, *given):
        calls.append(given)
        if not fits and len(calls) == 2:
            self._captured[(0, 0)] = None  # what it gives back
            raise torch.OutOfMemoryError("no memory\nin sight")
        return own(self, *given)

    monkeypatch.setattr(Decoder, "_plain", plain)
    again = dataclasses.replace(settings, out=str(tmp_path / "again"))
    run.finetune(again, prepared)
    assert len(calls) > settings.steps // 2
    assert [r["loss"] for r in rows_of(again)] == pytest.approx([r["loss"] for r in rows_of(settings)], rel=1e-4)
    assert all(r["largest"] for r in rows_of(again)[::settings.sample_every])  # what a graph would pass by
    said = [e["text"] for e in read_events(again.out_path) if e["event"] == "slow"]
    assert any("CUDA graphs" in text and ("no memory" in text or fits) for text in said)


def test_the_loss_does_not_depend_on_how_examples_are_put_together(settings, prepared, tmp_path):
    small = dataclasses.replace(settings, steps=3, micro_tokens=1, out=str(tmp_path / "small"))
    large = dataclasses.replace(settings, steps=3, micro_tokens=5000, gradient_checkpointing=True)
    for s in (small, large):
        run.finetune(s, prepared)
    assert [r["loss"] for r in rows_of(small)] == pytest.approx([r["loss"] for r in rows_of(large)], rel=1e-4)
    assert [r["gradient"] for r in rows_of(small)] == pytest.approx([r["gradient"] for r in rows_of(large)], rel=1e-3)


def test_processes_share_a_step_and_agree_on_its_counts(settings, prepared):
    made = [train.Steps(prepared.stream, dataclasses.replace(settings, batch=7), prepared.lengths,
                        ceilings.shape_of(prepared.folder), rank, world)[3]
            for rank, world in ((0, 1), (0, 2), (1, 2))]
    rows = [sorted(tuple(row) for ids, labels, _ in step["passes"]
                   for row in labels.clamp(min=0).sort(1, True).values[:, :30].tolist()) for step in made]
    assert rows[0] == sorted(rows[1] + rows[2]) and len(rows[0]) == 7 and len(rows[1]) == 4
    assert len({(step["answers"], step["tokens"], step["flop"]) for step in made}) == 1


def test_two_processes_under_torchrun_learn_what_one_does_and_go_on_from_its_checkpoint(settings, prepared, tmp_path):
    one = dataclasses.replace(settings, steps=8, save_every=4)
    two = dataclasses.replace(one, out=str(tmp_path / "two"))
    run.finetune(one, prepared)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "arc_kernel", "finetune"]
    for name, value in dataclasses.asdict(two).items():
        for given in value if isinstance(value, tuple) else [] if isinstance(value, bool) else [value]:
            command.append(f"--{name.replace('_', '-')}={given}")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    behind = 0
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 19):  # 4.57 and 5.7 load to "cpu:0", which torch does not know
        shutil.copytree(one.out_path / "checkpoints", two.out_path / "checkpoints")
        shutil.rmtree(two.out_path / "checkpoints" / "checkpoint-8")
        behind = 4
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(r["step"], r["tokens"]) for r in rows_of(two)] == [(r["step"], r["tokens"]) for r in rows_of(one)][behind:]
    assert [r["loss"] for r in rows_of(two)] == pytest.approx([r["loss"] for r in rows_of(one)][behind:], rel=1e-4)


@pytest.mark.parametrize("schedule, rises", [("linear", 1), ("cosine", 1), ("cosine_with_restarts", 3), ("constant_with_warmup", 1)])
def test_schedules_warm_up_and_end_as_they_are_called(settings, schedule, rises):
    made = train.arguments(dataclasses.replace(settings, schedule=schedule, steps=100, warmup=0.1), settings.out_path, "float32", "cpu")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=made.learning_rate)
    scheduler = get_scheduler(made.lr_scheduler_type, optimizer, made.get_warmup_steps(100), 100, made.lr_scheduler_kwargs)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    up = np.diff(rates) > 0
    assert up[:9].all() and (up[1:] & ~up[:-1]).sum() + 1 == rises and max(rates) == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-2) if schedule == "constant_with_warmup" else rates[-1] < 2e-3


def test_layers_that_get_no_lora_are_named(settings, prepared, tmp_path):
    config = Phi3Config(vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    phi3 = save(Phi3ForCausalLM(config), Path(settings.model), tmp_path / "phi3")
    run.finetune(dataclasses.replace(settings, steps=1, model=str(phi3)), dataclasses.replace(prepared, folder=phi3))
    assert "no LoRA on gate_up_proj, qkv_proj: q_proj, " in (tmp_path / "run" / "events.jsonl").read_text()


def test_gradients_that_are_not_finite_change_nothing_and_end_the_run_by_naming_the_last_checkpoint(settings, prepared, monkeypatch):
    whole = train.StepTrainer.training_step

    def broken(self, *inputs):
        loss, number = whole(self, *inputs), self.state.global_step + 1
        if number == 3 or number > 6:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    shown = []
    monkeypatch.setattr(run, "PAGE_SECONDS", 0.0)
    monkeypatch.setattr(page, "write_report", lambda *_: shown.append(len(rows_of(settings))))
    monkeypatch.setattr(train.StepTrainer, "training_step", broken)
    with pytest.raises(ArcKernelError, match="step 9: gradients are not finite 3 steps in a row in float32.*checkpoint-5"):
        run.finetune(settings, prepared)
    rows = rows_of(settings)
    assert shown == [5, 8], "the page of a run that gave up has all its steps"
    assert [r["step"] for r in rows if r["skipped"]] == [3, 7, 8] and all(np.isfinite(r["loss"]) for r in rows)


def test_a_study_ends_in_one_page_with_each_rate_and_the_best_of_them(settings):
    path = study.study(dataclasses.replace(settings, steps=10, batch=2), [1e-3, 1e-2])
    rows = {r["lr"]: r for r in json.loads((settings.out_path / "study.json").read_text())}
    assert rows.keys() == {1e-3, 1e-2} and rows[1e-2]["loss"] < rows[1e-3]["loss"] and not rows[1e-3]["diverged"]
    text, best = path.read_text(), min((r for r in rows.values() if not r["diverged"]), key=lambda r: r["loss"])
    assert text.count("<svg") == 1 and f"Lowest loss at the end: {best['lr']:g}." in text
    assert "<th>loss at the end, nats per answer token</th>" in text and f"<td>{best['loss']:.4f}</td>" in text
    assert "This is the loss on what was trained on. To decide: solve tasks that none of the runs has seen" in text
    first = [[json.loads(line)["loss"] for line in (settings.out_path / f"lr-{lr}" / "events.jsonl").read_text().splitlines()
              if '"step", "at"' in line][0]
             for lr in ("0.001", "0.01")]
    assert len(set(first)) == 1  # the same data, from the same start


def test_the_command_prints_what_a_study_found_and_how_to_decide(monkeypatch, tmp_path, capsys):
    rows = [{"lr": 1e-4, "loss": 2.0, "diverged": True}, {"lr": 1e-3, "loss": 1.25, "diverged": False}, {"lr": 1e-2, "loss": None,
                                                                                                              "diverged": False}]
    rows = [page.figures([]) | {"tokens_per_second": 1234.5} | row for row in rows]
    (tmp_path / "lr-0.001").mkdir()
    (tmp_path / "lr-0.001" / "held_out.json").touch()

    def studied(settings, rates):
        (tmp_path / "study.json").write_text(json.dumps(rows))
        return tmp_path / "study.html"

    monkeypatch.setattr(study, "study", studied)
    assert command_line.main(["finetune", "--data", "x.jsonl", "--lr", "1e-4,1e-3,1e-2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [["0.0001", "2.0000", "yes", "1,234"], ["0.001", "1.2500", "no", "1,234"],
                                                     ["0.01", "-", "no", "1,234"]]
    assert lines[4] == "Lowest loss at the end: 0.001."
    assert f"solve --tasks {tmp_path}/lr-0.001/held_out.json with each adapter, then evaluate" in lines[5]


def test_a_study_goes_on_after_a_rate_whose_gradients_are_not_finite(settings, monkeypatch, capsys):
    whole = train.StepTrainer.training_step

    def broken(self, *inputs):
        loss = whole(self, *inputs)
        if self.args.learning_rate == 1e-2:
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(train.StepTrainer, "training_step", broken)
    study.study(dataclasses.replace(settings, steps=5, batch=1), [1e-2, 1e-3])
    rows = json.loads((settings.out_path / "study.json").read_text())
    assert [(r["lr"], r["diverged"]) for r in rows] == [(1e-2, True), (1e-3, False)]
    assert "lr 0.01: finetune: step 3: gradients are not finite" in capsys.readouterr().err
    assert study.study(dataclasses.replace(settings, steps=5, batch=1), [1e-2]) == settings.out_path / "study.html"  # nothing is run
    with pytest.raises(ArcKernelError, match="lr-0.01: holds a run with other settings .*clip"):
        study.study(dataclasses.replace(settings, steps=5, batch=1, clip=0.1), [1e-2])
    with pytest.raises(ArcKernelError, match="are called alike"):
        study.study(settings, [1e-2, 1.0000001e-2])


def test_a_run_whose_loss_rises_again_or_is_nan_has_diverged():
    made = lambda losses: [{"event": "step", "step": i, "loss": v, "gradient": 1.0, "tokens": 10, "seconds": 1.0,
                            "peak_share": 0.5, "skipped": False, "kinds": {}}
                           for i, v in enumerate(losses, 1)]
    falling = [3.0 - 0.1 * i for i in range(20)]
    assert not page.figures(made(falling))["diverged"]
    assert page.figures(made(falling + [3.0] * 4))["diverged"] and page.figures(made(falling + [float("nan")]))["diverged"]


def failing(arguments, capsys):
    assert command_line.main(["finetune", *map(str, arguments)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("error: "))


def test_bad_input_is_one_line_on_the_command_line(settings, tiny, pool, tmp_path, capsys):
    basic = ["--model", tiny, "--out", tmp_path / "x", "--evaluation-tasks", "", "--prompt", "compact"]
    one = tmp_path / "one.jsonl"
    one.write_text('{"id": "lonely", "pairs": [{"input": [[1]], "output": [[2]]}]}\n')
    (tmp_path / "empty").mkdir()
    assert "no data: give --data" in failing(basic, capsys)
    assert "unknown prompt kind 'sideways'" in failing([*basic, "--data", f"{pool}:sideways"], capsys)
    assert "empty" in failing([*basic, "--data", tmp_path / "empty"], capsys)
    assert "task lonely has 1 pair" in failing([*basic, "--data", one], capsys)
    assert "smaller than any example" in failing([*basic, "--data", pool, "--max-seq-len", 16], capsys)
    assert "recall:900: longer than the 500 tokens" in failing([*basic, "--data", "recall:900", "--max-seq-len", 500], capsys)
    assert "--lr 1e-3,fast: give a number" in failing([*basic, "--data", pool, "--lr", "1e-3,fast"], capsys)
    assert "merge the adapter first" in failing([*basic, "--data", pool, "--lora-rank", 0, "--adapter", "a"], capsys)
    assert not (tmp_path / "x").exists()


def test_on_a_gpu_without_flash_attention_keys_are_repeated_before_anything_is_trained(settings, monkeypatch):
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    Learner(checkpoint.open_model(settings.model), 4, None, "float32", device="cuda")
    assert not sdpa_attention.use_gqa_in_sdpa(None, None)


def test_an_adapter_for_another_base_is_refused_before_the_model_is_loaded(settings, prepared, model_folder):
    made = run.finetune(dataclasses.replace(settings, steps=1), prepared)["result"]
    Learner(checkpoint.open_model(settings.model), 4, made, "float32")
    with pytest.raises(ArcKernelError, match=r"lora_A.weight is \[4, .*the adapter is for another base"):
        Learner(model_folder, 4, made, "float32")
