"""The loss on label positions, against torch's on whole logits: `python -m pytest tests/test_answer_loss.py`."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from arc_kernel import answer_loss, lora_linear
from models import tiny_model


def by_torch(model, ids, labels):
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)


def ours(model, ids, labels):
    total, each, _ = answer_loss.answer_losses(model, ids[None], labels[None])
    return total / len(each)


def loss_and_gradient(loss, model, ids, labels):
    model.zero_grad()
    weight = model.model.layers[0].self_attn.q_proj.weight
    value = loss(model, ids, labels)
    value.backward()
    return value.item(), weight.grad.clone()


@pytest.fixture(scope="module")
def example():
    ids = torch.randint(0, 300, (700,), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(700) % 10 < 8, ids, -100)  # more labels than two chunks hold
    return ids, labels


def assert_alike(model, example):
    model.get_output_embeddings().requires_grad_(False)
    value, gradient = loss_and_gradient(ours, model, *example)
    expected, wanted = loss_and_gradient(by_torch, model, *example)
    assert value == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-7) and wanted.abs().max() > 0


def test_loss_and_gradient_are_torchs(model_folder, tmp_path, example):
    assert_alike(AutoModelForCausalLM.from_pretrained(tiny_model(model_folder, tmp_path / "tiny"), dtype=torch.float32), example)


def one_layer(config, **asked):
    """A random model of an architecture with one small layer and 300 tokens."""
    made = getattr(transformers, f"{config}Config")(**asked, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                    num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    made.num_key_value_heads = 1
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made).float()


@pytest.mark.parametrize("name", ["Gemma3Text", "Qwen3", "GPTNeoX"])  # their decoders go by other names
def test_loss_and_gradient_are_torchs_whatever_the_decoder_is_called(example, name):
    model = one_layer(name)
    assert answer_loss.plain_head(model, example[0][None])
    model.get_output_embeddings().requires_grad_(False)
    weight = next(w for n, w in model.named_parameters() if n.endswith(("down_proj.weight", "dense_4h_to_h.weight")))
    found = []
    for loss in (ours, by_torch):
        weight.grad = None
        value = loss(model, *(part[-150:] for part in example))
        value.backward()
        found.append((value.item(), weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5) and found[1][1].abs().max() > 0
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name, asked", [
    ("Cohere", {"logit_scale": 0.25}), ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 16}),
    # A layer between decoder and head, and no field that says so.
    pytest.param("ModernBertDecoder", {}, marks=pytest.mark.skipif(transformers.__version__ == "5.7.0", reason="refuses its own config")),
])
def test_a_model_that_does_more_than_its_heads_product_has_its_own_loss(example, name, asked):
    model = one_layer(name, **asked)
    ids, labels = (part[-150:] for part in example)
    with torch.no_grad():
        assert ours(model, ids, labels).item() == pytest.approx(by_torch(model, ids, labels).item(), abs=1e-4)


def test_head_with_a_lora_is_trained_as_it_is_served(model_folder, tmp_path, example):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(model_folder, tmp_path / "tiny", tied=False), dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config).get_base_model()
    lora_linear.install(model)
    of_head = model.lm_head.lora_B["default"].weight
    found = []
    for loss in (ours, by_torch):
        of_head.grad = None
        value = loss(model, *example)
        value.backward()
        found.append((value.item(), of_head.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-6) and found[1][1].abs().max() > 0


def test_logits_of_all_positions_are_never_held_at_once(model_folder, tmp_path, example, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(model_folder, tmp_path / "tiny"), dtype=torch.float32)
    model.get_output_embeddings().requires_grad_(False)
    ours(model, *example)  # looks at the model once
    rows, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear",
                        lambda x, w, b=None: (rows.append(len(x)) if len(w) == 49152 else None) or linear(x, w, b))
    ours(model, *example)
    assert sum(rows) == (example[1][1:] >= 0).sum() and max(rows) == answer_loss.CHUNK["cpu"] // 49152


def test_a_batch_padded_on_the_right_has_the_losses_of_its_rows_and_a_trained_head_its_gradient(model_folder, tmp_path, example):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(model_folder, tmp_path / "tiny", tied=False), dtype=torch.float32)
    short = tuple(part[:300] for part in example)
    pad = lambda row, value: torch.cat([row, row.new_full((400,), value)])
    alone = [by_torch(model, *one) * (one[1][1:] >= 0).sum() for one in (example, short)]
    sum(alone).backward()
    wanted = model.lm_head.weight.grad.clone()
    for frozen in (False, True):
        model.zero_grad()
        model.lm_head.requires_grad_(not frozen)
        batch = torch.stack([example[0], pad(short[0], 0)]), torch.stack([example[1], pad(short[1], -100)])
        total, each, rows = answer_loss.answer_losses(model, *batch)
        total.backward()
        assert torch.allclose(torch.stack([each[rows == i].sum() for i in (0, 1)]), torch.stack(alone).detach(), rtol=1e-5)
        assert frozen or torch.allclose(model.lm_head.weight.grad, wanted, rtol=1e-3, atol=1e-6)
