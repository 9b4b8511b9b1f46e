"""Test-time training on a tiny random model of the real architecture: `python -m pytest tests/test_adapt.py`."""

import dataclasses
import errno
import io
import json
import re
import shutil
import time
import types

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from arc_kernel import adapt, checkpoint, events, fused_layer
from arc_kernel.decoder_pass import Decoder
from arc_kernel.grids import GridEncoder
from arc_kernel.job import Job
from arc_kernel.precision import rescale
from arc_kernel.prompts import IGNORED, PromptBuilder
from arc_kernel.tasks import Pair, Task, task_from_json, task_to_json
from arc_kernel.worker import Worker
from models import nan_model, tiny_model

RECIPE = adapt.Recipe(steps=3, batch=2, lr=1e-2, rank=4, max_seq_len=4096, permute_background=False, seed=5)


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), "chat")


@pytest.fixture(scope="module")
def trainer(tiny, builder):
    return adapt.TaskTrainer(tiny, builder, RECIPE, None, "cpu", "float32")


def trained(trainer, task, folder):
    losses = []
    trainer.train(task, folder, lambda step, loss, tokens: losses.append(loss))
    return load_file(folder / "adapter_model.safetensors"), losses


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_adapter_is_the_same_bit_for_bit_with_and_without_solutions(trainer, arc_training, tmp_path):
    task = arc_training.tasks["d037b0a7"]
    assert task.test[0].output is not None
    wrong = dataclasses.replace(task, test=(Pair(task.test[0].input, task.train[0].output),))
    known, _ = trained(trainer, task, tmp_path / "known")
    assert same(known, trained(trainer, task_from_json(task_to_json(task)), tmp_path / "hidden")[0])
    assert same(known, trained(trainer, wrong, tmp_path / "wrong")[0])


def test_adapter_does_not_depend_on_tasks_trained_before(trainer, tiny, builder, arc_training, tmp_path):
    first, second = arc_training.tasks["3c9b0459"], arc_training.tasks["25ff71a9"]
    after, _ = trained(trainer, first, tmp_path / "a") and trained(trainer, second, tmp_path / "b")
    alone, _ = trained(adapt.TaskTrainer(tiny, builder, RECIPE, None, "cpu", "float32"), second, tmp_path / "c")
    assert same(after, alone)


def test_nor_where_the_models_config_has_a_dropout(tiny, builder, arc_training, tmp_path):
    config = json.loads((shutil.copytree(tiny, tmp_path / "tiny") / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    trainer = adapt.TaskTrainer(tmp_path / "tiny", builder, RECIPE, None, "cpu", "float32")
    one, other = (trained(trainer, arc_training.tasks["25ff71a9"], tmp_path / name)[0] for name in "ab")
    assert same(one, other)


def test_training_lowers_the_loss_and_moves_every_adapter_matrix(tiny, builder, arc_training, tmp_path):
    recipe = dataclasses.replace(RECIPE, steps=30, batch=1)
    weights, losses = trained(adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", "bfloat16"), arc_training.tasks["25ff71a9"],
                              tmp_path / "a")
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert len(weights) == 2 * 7 * 2 and all(np.abs(v).max() > 0 for v in weights.values())
    assert all(v.dtype == np.float32 for v in weights.values())
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()} == {0o644}, "for whoever is given the folder"


def test_examples_of_a_step_are_one_pass_with_the_loss_and_the_adapter_of_one_by_one(tiny, builder, arc_training, tmp_path, monkeypatch):
    recipe, made, passes = dataclasses.replace(RECIPE, batch=3), [], []
    for together in (adapt.together, lambda examples, tokens: [[i] for i in range(len(examples))]):
        monkeypatch.setattr(adapt, "together", together)
        trainer = adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", "float32")
        real = trainer._loss
        monkeypatch.setattr(trainer, "_loss", lambda examples, real=real: passes.append(len(examples)) or real(examples))
        made.append(trained(trainer, arc_training.tasks["d037b0a7"], tmp_path / "a"))
    assert passes == [3, 3, 3] + 9 * [1]
    (one, losses), (other, theirs) = made
    assert losses == pytest.approx(theirs, rel=1e-5)
    assert all(np.allclose(one[k], other[k], rtol=1e-3, atol=1e-6) for k in one) and one.keys() == other.keys()


def test_saved_adapter_is_plain_lora_without_paths(trainer, arc_training, tmp_path, tiny):
    trained(trainer, arc_training.tasks["d037b0a7"], tmp_path / "a")
    text = (tmp_path / "a" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert json.loads((tmp_path / "a" / "range.json").read_text())["peaks"]["down"][1] > 0
    assert (config["peft_type"], config["r"], config["use_dora"]) == ("LORA", 4, False)
    assert (config["lora_alpha"], config["target_modules"]) == (8, sorted(adapt.TARGET_MODULES))
    assert str(tiny.parent) not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "range.json"}


def test_each_task_continues_from_the_given_adapter(trainer, tiny, builder, arc_training, tmp_path):
    start, _ = trained(trainer, arc_training.tasks["d037b0a7"], tmp_path / "start")
    still = dataclasses.replace(RECIPE, steps=1, lr=0.0)
    continued = adapt.TaskTrainer(tiny, builder, still, tmp_path / "start", "cpu", "float32")
    assert same(start, trained(continued, arc_training.tasks["3c9b0459"], tmp_path / "one")[0])
    config = tmp_path / "start" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))  # as adapters of others have
    moving = adapt.TaskTrainer(tiny, builder, RECIPE, tmp_path / "start", "cpu", "float32")
    one, _ = trained(moving, arc_training.tasks["3c9b0459"], tmp_path / "two")
    assert not same(start, one)
    assert same(one, trained(moving, arc_training.tasks["3c9b0459"], tmp_path / "three")[0])
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["lora_dropout"] == 0


def test_an_adapter_whose_targets_are_a_pattern_is_saved_with_it(tiny, tmp_path):
    pattern = r".*self_attn\.(q_proj|v_proj)"  # as unsloth writes it
    made = get_peft_model(checkpoint.load_model(tiny, "float32", "cpu"), LoraConfig(r=2, target_modules=pattern))
    adapt.save_adapter(made, tmp_path / "a")
    again = PeftModel.from_pretrained(checkpoint.load_model(tiny, "float32", "cpu"), tmp_path / "a")
    assert {name for name, m in again.named_modules() if hasattr(m, "lora_A")} == {
        name for name, m in made.named_modules() if hasattr(m, "lora_A")}


def test_what_an_architecture_names_otherwise_and_so_gets_no_lora_is_told(trainer):
    small = Phi3Config(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    assert adapt.left_out(Phi3ForCausalLM(small)).startswith("no LoRA on gate_up_proj, qkv_proj: q_proj, ")
    assert trainer.left_out == ""
    experts = MixtralConfig(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=1, num_local_experts=2)
    assert re.match("no LoRA on (experts' down_proj, experts' gate_up_proj|gate, w1, w2, w3): q_proj, ",  # transformers 5, and 4.57
                    adapt.left_out(MixtralForCausalLM(experts)))


def test_every_pair_becomes_the_target_once_in_each_round_after_each_other_one_in_any_order_and_colours(tokenizer):
    """Each pair has a size of its own, so that what an example shows is known whatever the view."""
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+digits"), "compact")
    square = lambda side: np.zeros((side, side), np.int8)
    task = Task("t", tuple(Pair(square(n), square(n + 10)) for n in (1, 2, 3, 4)), ())
    recipe = dataclasses.replace(RECIPE, permute_background=True, all_outputs=True)
    examples, targets, orders, colours = adapt.leave_one_out(task, builder, recipe, np.random.default_rng(0)), [], set(), set()
    for _ in range(40):
        example = next(examples)
        inputs = builder.text_of(example.input_ids[:-1].tolist()).split("I\n")[1:]
        sizes = [int(text.split("x")[0]) for text in inputs]
        assert sorted(sizes) == [1, 2, 3, 4], "the target, and each other pair once"
        targets.append(sizes[-1])
        orders.add(tuple(sizes))
        colours |= {text.split("\n")[1][0] for text in inputs}
        learnt = int((example.labels != IGNORED).sum())
        assert learnt == sum(len(builder.grid_ids(square(n + 10))) + 1 for n in sizes[1:]), "all outputs but the first"
    rounds = {tuple(targets[k:k + 4]) for k in range(0, 40, 4)}
    assert all(sorted(r) == [1, 2, 3, 4] for r in rounds) and len(rounds) > 4 and len(orders) > 4 and len(colours) > 5


def test_context_is_cut_to_max_seq_len_and_a_task_without_room_cannot_train(builder, arc_training):
    task = arc_training.tasks["d037b0a7"]
    short = dataclasses.replace(RECIPE, max_seq_len=180)
    examples = adapt.leave_one_out(task, builder, short, np.random.default_rng(0))
    assert max(len(next(examples).input_ids) for _ in range(12)) <= 180
    with pytest.raises(adapt.CannotTrain, match="fits into max_seq_len 40"):
        adapt.leave_one_out(task, builder, dataclasses.replace(RECIPE, max_seq_len=40), np.random.default_rng(0))


@pytest.mark.parametrize("pairs", [0, 1])
def test_tasks_with_no_or_one_pair(trainer, arc_training, tmp_path, pairs):
    task = arc_training.tasks["d037b0a7"]
    task = Task(task.id, task.train[:pairs], task.test)
    if pairs:
        assert len(trained(trainer, task, tmp_path / "a")[1]) == RECIPE.steps
    else:
        with pytest.raises(adapt.CannotTrain, match="no train pair"):
            trained(trainer, task, tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_loss_that_is_not_finite_is_raised_and_nothing_is_saved(tiny, builder, arc_training, tmp_path):
    sick = adapt.TaskTrainer(nan_model(tiny, tmp_path / "model"), builder, RECIPE, None, "cpu", "float32")
    with pytest.raises(FloatingPointError, match="loss is not finite at step 1 in float32"):
        trained(sick, arc_training.tasks["d037b0a7"], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def failing_once(trainer, monkeypatch, call, times=1):
    """Make the trainer's loss NaN at a call, and at the next `times - 1` ones."""
    real, calls = trainer._loss, []

    def loss(examples):
        calls.append(None)
        return real(examples) * (float("nan") if call <= len(calls) < call + times else 1.0)

    monkeypatch.setattr(trainer, "_loss", loss)


def test_nan_in_the_middle_of_training_goes_back_to_the_last_good_state_and_finishes(tiny, builder, arc_training, tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, steps=24, batch=1)
    trainer, steps, said = adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", "float32"), [], []
    failing_once(trainer, monkeypatch, 18)
    facts = trainer.train(arc_training.tasks["25ff71a9"], tmp_path / "a", lambda step, loss, tokens: steps.append((step, loss)),
                          said.append)
    assert facts == {"steps": 24, "rollbacks": 1, "skipped": 0}
    assert [step for step, _ in steps] == [*range(1, 18), *range(11, 25)] and all(np.isfinite(loss) for _, loss in steps)
    assert said == ["loss is not finite at step 18 in float32: back to step 10 at 0.5 of the learning rate"]
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(np.isfinite(w).all() for w in weights.values()) and np.mean([x for _, x in steps[-5:]]) < steps[0][1]


def test_training_that_does_not_fit_into_its_seconds_is_shorter_and_comes_down_to_no_learning_rate(
        tiny, builder, arc_training, tmp_path, monkeypatch):
    task, rates, whole = arc_training.tasks["25ff71a9"], [], adapt._schedule
    monkeypatch.setattr(adapt, "_schedule", lambda *done: rates.append(whole(*done)) or rates[-1])
    trainer = adapt.TaskTrainer(tiny, builder, dataclasses.replace(RECIPE, steps=8, batch=1), None, "cpu", "float32")
    begun = time.perf_counter()
    trainer.train(task, tmp_path / "trial", lambda *_: None)
    seconds = 5 * (time.perf_counter() - begun)  # of 40 steps

    trainer.recipe, losses, begun = dataclasses.replace(trainer.recipe, steps=160), [], time.perf_counter()
    facts = trainer.train(task, tmp_path / "a", lambda step, loss, tokens: losses.append(loss), seconds=seconds)
    assert time.perf_counter() - begun < 2 * seconds and 20 <= facts["steps"] == len(losses) < 160
    assert max(rates) > 0.8 and rates[-1] < 0.2 and np.mean(losses[-5:]) < losses[0]
    assert (tmp_path / "a" / "adapter_model.safetensors").is_file()

    facts = trainer.train(task, tmp_path / "b", lambda *_: None, seconds=1e-3)
    assert facts["steps"] == adapt.fewest_steps(160) == 20 and rates[-1] < 0.2, "what is too short to learn anything is exceeded"


def test_schedule_warms_up_over_a_twentieth_and_falls_to_zero():
    rates = [adapt._schedule(step, 320) for step in range(320)]
    assert rates[0] == pytest.approx(1 / 16) and rates[15] == max(rates) == 1.0 and rates[17] < 1.0 and 0 < rates[-1] < 0.01


def test_time_enough_changes_nothing(trainer, arc_training, tmp_path):
    for name, limit in (("none", {}), ("enough", {"seconds": 1e6})):
        trainer.train(arc_training.tasks["25ff71a9"], tmp_path / name, lambda *_: None, **limit)
    none, enough = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("none", "enough"))
    assert all(np.array_equal(none[k], enough[k]) for k in none)


def test_training_that_keeps_failing_is_given_up(trainer, arc_training, tmp_path, monkeypatch):
    failing_once(trainer, monkeypatch, 2, times=100)
    said = []
    with pytest.raises(FloatingPointError, match="loss is not finite at step 1 in float32"):
        trainer.train(arc_training.tasks["25ff71a9"], tmp_path / "a", lambda *_: None, said.append)
    assert len(said) == adapt.ROLLBACKS and not (tmp_path / "a").exists()


def test_float16_gradients_that_do_not_fit_are_skipped_and_counted(tiny, builder, arc_training, tmp_path, monkeypatch):
    monkeypatch.setattr(adapt, "LOSS_SCALE", 2.0**24)
    recipe, losses = dataclasses.replace(RECIPE, steps=12, batch=1), []
    trainer = adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", "float16")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float16, torch.float32}
    facts = trainer.train(arc_training.tasks["25ff71a9"], tmp_path / "a", lambda step, loss, tokens: losses.append(loss))
    assert 0 < facts["skipped"] <= adapt.SKIPS and facts["rollbacks"] == 0
    assert len(losses) == 12 and losses[-1] < losses[0]


def test_float16_training_follows_float32(tiny, builder, arc_training, tmp_path):
    recipe, ends = dataclasses.replace(RECIPE, steps=30, batch=1), []
    for dtype in ("float32", "float16"):
        _, losses = trained(adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", dtype), arc_training.tasks["25ff71a9"], tmp_path / dtype)
        ends.append(np.mean(losses[-5:]))
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_training_on_rescaled_weights_gives_the_adapter_of_the_original_ones(tiny, builder, arc_training, tmp_path):
    made = dataclasses.replace(rescale.unscaled(tiny), residual=6, product=(3, 0), value=(0, 5))
    rescale.write_model(tiny, made, tmp_path / "rescaled")
    plain = adapt.TaskTrainer(tiny, builder, RECIPE, None, "cpu", "float32")
    moved = adapt.TaskTrainer(tmp_path / "rescaled", builder, RECIPE, None, "cpu", "float32", made)
    task = arc_training.tasks["d037b0a7"]
    (one, losses), (other, theirs) = trained(plain, task, tmp_path / "a"), trained(moved, task, tmp_path / "b")
    assert losses == pytest.approx(theirs, rel=1e-5)
    assert all(np.allclose(one[k], other[k], rtol=1e-3, atol=1e-6) for k in one) and one.keys() == other.keys()
    ranges = [json.loads((tmp_path / f / "range.json").read_text())["peaks"] for f in "ab"]
    assert all(ranges[0][site] == pytest.approx(ranges[1][site], rel=1e-3) for site in ranges[0])


def test_default_learning_rate_follows_the_size():
    assert adapt.default_lr(494_032_768) == pytest.approx(8e-5, rel=0.01)
    assert adapt.default_lr(134_515_008) == pytest.approx(8e-4, rel=0.01)
    assert 8e-5 < adapt.default_lr(270_000_000) < 8e-4
    assert adapt.default_lr(7_000_000_000) == adapt.default_lr(494_000_000)


def test_a_pass_that_does_not_fit_beside_the_graphs_is_done_again_without_them(tiny, builder, arc_training, monkeypatch):
    """As on a GPU whose memory the graphs fill: seen here through the decoder, in whose place no graph can be made."""
    made, install = [], fused_layer.install
    monkeypatch.setattr(fused_layer, "install", lambda model: made.append(install(model)) or made[0])
    trainer = adapt.TaskTrainer(tiny, builder, RECIPE, None, "cpu", "float32")
    base, scaler = trainer.model.get_base_model(), torch.amp.GradScaler("cpu", enabled=False)
    drawn = [next(adapt.leave_one_out(arc_training.tasks["d037b0a7"], builder, RECIPE, np.random.default_rng(i))) for i in range(2)]
    loss = trainer._backward(drawn, scaler)
    wanted = trainer._flat.tensor.grad.clone()
    trainer._flat.tensor.grad.zero_()
    trainer._decoder = Decoder(base, made[0], trainer._flat)
    trainer._decoder._captured[1, 64] = None  # stands for what fills the memory
    asked, own = [], Decoder.__call__
    errors = iter([RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("CUDA out of memory.")])

    def full(self, *given):
        asked.append(len(self._captured))
        if len(asked) == 2 or len(asked) > 4:
            raise next(errors)  # as of a graph's launch, as of an array
        return own(self, *given)

    monkeypatch.setattr(Decoder, "__call__", full)
    monkeypatch.setattr("arc_kernel.adapt.together", lambda drawn, tokens: [[i] for i in range(len(drawn))])
    assert trainer._backward(drawn, scaler).item() == pytest.approx(loss.item(), rel=1e-5) and asked == [1, 1, 0, 0]
    assert torch.allclose(trainer._flat.tensor.grad, wanted, rtol=1e-3, atol=1e-6) and "out of memory" in trainer._decoder.trouble
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to give back
        trainer._backward(drawn, scaler)


@pytest.fixture
def worker(tmp_path):
    """A worker whose trainer is set by the test, and what it tells."""
    given = {"ttt_steps": 6, "adapt_until": time.time() + 60, "adapters": str(tmp_path)}
    job, said = Job(**dict.fromkeys(f.name for f in dataclasses.fields(Job)) | given), io.StringIO()
    made = Worker(io.StringIO(json.dumps(dataclasses.asdict(job)) + "\n"), said)
    return made, lambda: [json.loads(line) for line in said.getvalue().splitlines()]


def test_peaks_are_looked_at_where_float16_may_ask_for_them(worker, tiny, builder, arc_training, tmp_path):
    made, _ = worker
    made.device, made.builder = "cpu", builder
    made.model = types.SimpleNamespace(variant=lambda dtype: types.SimpleNamespace(folder=tiny, rescale=None), adapter=None)
    for dtype, wanted in (("float16", {"steps", "peaks"}), ("bfloat16", {"steps"}), ("float32", {"steps"})):
        made.job = dataclasses.replace(made.job, dtype=dtype, ttt_steps=1, ttt_batch=1, ttt_lr=1e-3, lora_rank=4, max_seq_len=4096, seed=0)
        assert made._load_trainer(["float32"])
        trained(made._trainer, arc_training.tasks["25ff71a9"], tmp_path / dtype)
        assert json.loads((tmp_path / dtype / "range.json").read_text()).keys() == wanted
        assert adapt.steps_taken(tmp_path / dtype) == 1


def test_task_too_long_for_the_gpu_is_trained_with_shorter_examples_and_the_next_as_before(worker, tmp_path, arc_training):
    made, said = worker

    def train(task, folder, on_step, on_trouble, seconds):
        if made._trainer.recipe.max_seq_len > 2500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        on_step(1, 1.0, 10)
        return {"steps": 1}

    made._trainer, made.device = types.SimpleNamespace(train=train, dtype="float32", recipe=RECIPE), "cpu"
    made._adapt(arc_training.tasks["d037b0a7"], 1.0)
    assert [e["event"] for e in said()] == ["precision", "precision", "loss", "adapted"] and made._trainer.recipe == RECIPE
    assert "CUDA out of memory" in said()[1]["text"] and "up to 2304 tokens" in said()[1]["text"]


@pytest.mark.parametrize("error, again", [
    (OSError(errno.ENOSPC, "No space left on device"), True), (ValueError("odd"), False),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True)])
def test_task_whose_adapter_the_disk_had_no_room_for_is_trained_by_a_next_start(worker, arc_training, error, again):
    made, said = worker

    def train(*_, **__):
        raise error

    made._trainer, made.device = types.SimpleNamespace(train=train, dtype="float32", recipe=RECIPE), "cpu"
    made._adapt(arc_training.tasks["d037b0a7"], 1.0)
    assert [(e["event"], e["again"]) for e in said()] == [("adapt-failed", again)]


def test_loss_curve_is_whole_where_the_trainer_says_something_or_goes_back(worker, arc_training):
    made, said = worker

    def train(task, folder, on_step, on_trouble, seconds):
        for step, trouble in ((1, ""), (2, "no CUDA graphs any more"), (3, ""), (4, "back to step 2"), (3, ""), (4, ""), (5, ""), (6, "")):
            on_step(step, float(step), 10)
            if trouble:
                on_trouble(trouble)
        return {"steps": 6}

    made._trainer = types.SimpleNamespace(train=train, dtype="float32", recipe=RECIPE)
    made._adapt(arc_training.tasks["d037b0a7"], 1.0)
    assert events.losses(said()) == {"d037b0a7": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
