"""A whole pass in C against the same from autograd's nodes: `python -m pytest tests/test_cpu_pass.py`."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from arc_kernel import adapt, cpu_attention, cpu_pass, fused_layer, lora_linear
from arc_kernel.answer_loss import answer_losses
from arc_kernel.checkpoint import load_model
from arc_kernel.flat_weights import FlatWeights
from arc_kernel.grids import GridEncoder
from arc_kernel.prompts import PromptBuilder
from test_cpu_kernels import apart, made_here, network

FITS = {"llama": True, "llama, biases": True, "qwen2": True, "qwen3": False}


@pytest.fixture(autouse=True)
def in_c(monkeypatch):
    """All that can be made in C is, whatever is fastest here."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_attention, "fastest", lambda dtype: cpu_attention.compiled)


def rounded(name: str):
    """A model in bfloat16 whose frozen weights are multiplied with in 8 bits, what is fused of it, and its LoRA."""
    model = network(name, torch.bfloat16)
    fused = fused_layer.install(model)
    flat = FlatWeights([p for p in model.parameters() if p.requires_grad], fused.groups)
    with lora_linear.watched(fused.groups) as found:
        losses(model, flat, *batch(1, 40)).backward()
    for group, columns in found.items():
        group.round_weight(*columns)
    flat.tensor.grad.zero_()
    return model.get_base_model(), fused, flat


def batch(rows: int, tokens: int):
    ids = torch.randint(0, 128, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
    return ids, torch.where(torch.arange(tokens) < tokens // 3, -100, ids)


def losses(model, flat, ids, labels, decoder=None):
    model = getattr(model, "get_base_model", lambda: model)()
    if decoder:
        return answer_losses(model, ids, labels, decoder)[0]
    with flat.cast(torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
        return answer_losses(model, ids, labels)[0]


@made_here
@pytest.mark.parametrize("name", FITS)
def test_only_models_all_of_whose_layers_are_in_c(name, monkeypatch):
    base, fused, _ = rounded(name)
    assert cpu_pass.fits(base, fused) is FITS[name]
    monkeypatch.setattr(cpu_attention, "fastest", lambda dtype: cpu_attention.products)
    assert not cpu_pass.fits(base, fused)


@made_here
@pytest.mark.parametrize("rows, tokens", [(1, 5), (1, 200), (3, 75)])
@pytest.mark.parametrize("name", [name for name, fits in FITS.items() if fits])
def test_a_pass_gives_the_loss_and_gradients_of_autograd_s(name, rows, tokens):
    base, fused, flat = rounded(name)
    decoder, given = cpu_pass.Decoder(base, fused, flat), batch(rows, tokens)
    for _ in range(2):  # weights change from step to step
        found = []
        for each in (None, decoder):
            loss = losses(base, flat, *given, each)
            loss.backward()
            found.append((loss.item(), flat.tensor.grad.clone()))
            flat.tensor.grad.zero_()
        (wanted, grad), (mine, made) = found
        assert mine == pytest.approx(wanted, rel=2e-3) and apart(made, grad) < 0.02
        flat.tensor.data += 0.05 * torch.randn(flat.tensor.shape, generator=torch.Generator().manual_seed(0))


@made_here
@pytest.mark.parametrize("labelled", [(), (0,), (32,), (5, 6, 31), range(33)])
def test_only_what_is_labelled_is_computed_after_the_last_attention(labelled):
    base, fused, flat = rounded("llama")
    ids = batch(2, 34)[0]
    labels = torch.full_like(ids, -100)
    for row in range(2 if labelled else 0):
        labels[row, [at + 1 for at in labelled[:len(labelled) - row]]] = 7
    found = []
    for decoder in (None, cpu_pass.Decoder(base, fused, flat)):
        loss = losses(base, flat, ids, labels, decoder)
        if loss.requires_grad:
            loss.backward()
        found.append((loss.item(), flat.tensor.grad.clone()))
        flat.tensor.grad.zero_()
    (wanted, grad), (mine, made) = found
    assert mine == pytest.approx(wanted, rel=2e-3) and (made - grad).norm() <= 0.02 * grad.norm()


@made_here
def test_gradients_of_passes_are_added_up_and_each_is_gone_back_through_once():
    base, fused, flat = rounded("llama")
    decoder, given = cpu_pass.Decoder(base, fused, flat), batch(2, 33)
    losses(base, flat, *given, decoder).backward()
    once = flat.tensor.grad.clone()
    again = losses(base, flat, *given, decoder)
    again.backward(retain_graph=True)
    assert torch.allclose(flat.tensor.grad, 2 * once, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="used up"):
        again.backward()


@made_here
def test_a_pass_under_way_keeps_what_it_reads():
    base, fused, flat = rounded("llama")
    decoder = cpu_pass.Decoder(base, fused, flat)
    losses(base, flat, *batch(1, 40), decoder).backward()
    wanted, loss = flat.tensor.grad.clone(), losses(base, flat, *batch(1, 40), decoder)
    flat.tensor.grad.zero_()
    copy, sides = weakref.ref(decoder._copy), decoder._copy.shape
    del decoder
    gc.collect()
    others = [torch.full(sides, torch.nan, dtype=torch.bfloat16) for _ in range(20)]
    loss.backward()
    assert torch.equal(flat.tensor.grad, wanted) and copy() is not None and others


@made_here
def test_a_trainer_takes_it(model_folder, tokenizer, tmp_path):
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")
    made = lambda rank, dtype: adapt.TaskTrainer(model_folder, builder, adapt.Recipe(1, 1, 1e-3, rank, 512, False, 0), None, "cpu", dtype)
    assert isinstance(made(16, "int8")._decoder, cpu_pass.Decoder)
    assert made(8, "int8")._decoder is None and made(16, "bfloat16")._decoder is None


@made_here
def test_a_head_that_is_trained_itself_is_trained_behind_it(model_folder, tokenizer, arc_training, tmp_path):
    whole = LoraConfig(r=16, target_modules=list(adapt.TARGET_MODULES), modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapt.save_adapter(get_peft_model(load_model(model_folder, "float32", "cpu"), whole), tmp_path / "start")
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")
    trainer = adapt.TaskTrainer(model_folder, builder, adapt.Recipe(2, 1, 1e-3, 16, 1024, False, 0), tmp_path / "start", "cpu", "int8")
    losses, head = [], trainer.weights[-1].clone()
    assert isinstance(trainer._decoder, cpu_pass.Decoder) and head.shape[0] > 1000
    trainer.train(arc_training.tasks["d037b0a7"], tmp_path / "adapter", lambda step, loss, tokens: losses.append(loss))
    assert 0 < losses[1] < losses[0] and not torch.equal(trainer.weights[-1], head)
