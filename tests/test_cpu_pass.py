"""A whole pass in C against the same from autograd's nodes: `python -m pytest tests/test_cpu_pass.py`."""

import pytest
import torch

from arc_kernel import adapt, cpu_attention, cpu_pass, fused_layer, lora_linear
from arc_kernel.answer_loss import answer_losses
from arc_kernel.flat_weights import FlatWeights
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
def test_gradients_of_passes_are_added_up():
    base, fused, flat = rounded("llama")
    decoder, given = cpu_pass.Decoder(base, fused, flat), batch(2, 33)
    losses(base, flat, *given, decoder).backward()
    once = flat.tensor.grad.clone()
    first, second = (losses(base, flat, *given, decoder) for _ in range(2))  # both are under way at once
    second.backward(), first.backward()
    assert torch.allclose(flat.tensor.grad, 3 * once, rtol=1e-5, atol=1e-6)


@made_here
def test_a_trainer_takes_it(model_folder, tokenizer, tmp_path):
    from arc_kernel.grids import GridEncoder
    from arc_kernel.prompts import PromptBuilder

    builder = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")
    made = lambda rank, dtype: adapt.TaskTrainer(model_folder, builder, adapt.Recipe(1, 1, 1e-3, rank, 512, False, 0), None, "cpu", dtype)
    assert isinstance(made(16, "int8")._decoder, cpu_pass.Decoder)
    assert made(8, "int8")._decoder is None and made(16, "bfloat16")._decoder is None
