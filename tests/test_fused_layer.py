"""The fused decoder layer against transformers' own with peft: `python -m pytest tests/test_fused_layer.py`."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

from arc_kernel import adapt, fused_layer, lora_linear
from arc_kernel.answer_loss import answer_losses
from arc_kernel.precision.probe import collected, recording

SIZES = dict(vocab_size=128, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=256)
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, one key head": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
    "llama, all key heads": lambda: LlamaForCausalLM(LlamaConfig(**SIZES | {"num_key_value_heads": 6})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8)),
}
FUSED = {"gemma": 0}  # layers exchanged, where not all are; that a window is a mask, each call sees


def network(name: str, dtype=torch.float32, targets=adapt.TARGET_MODULES, bias="none"):
    torch.manual_seed(1)
    base = MODELS[name]()
    for norm in (p for n, p in base.named_parameters() if "norm" in n or n.endswith("bias")):
        torch.nn.init.normal_(norm, 1.0, 0.3)
    made = get_peft_model(base.to(dtype), LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), bias=bias))
    # B starts at zero, which would hide half of the gradients
    for number, weight in enumerate(p for p in made.parameters() if p.requires_grad):
        weight.data = torch.empty(weight.shape).normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return made.train()


def batch():
    ids = torch.randint(0, 128, (2, 21), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :9] = -100
    return ids, labels


def gradients(model, cast=contextlib.nullcontext):
    with cast():
        total, each, _ = answer_losses(model.get_base_model(), *batch())
    total.backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    return (total / len(each)).item(), found


class Operations(TorchDispatchMode):
    """Counts what is computed, views left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.count += not call.is_view
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("wider", [False, True])  # how products with A and B are put together on a CPU, and on a GPU
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_transformers_and_peft(name, wider, monkeypatch):
    monkeypatch.setattr(lora_linear, "_wider", lambda x, many, few: wider and many > few)
    model = network(name)
    loss, wanted = gradients(model)
    assert len(fused_layer.install(model).layers) == FUSED.get(name, 2)
    mine, found = gradients(model)
    assert mine == pytest.approx(loss, rel=1e-5) and len(found) == 2 * 7 * 2
    for one, other in zip(found, wanted):
        assert other.abs().max() > 0 and torch.allclose(one, other, rtol=1e-3, atol=1e-3 * other.abs().max())


def test_sixteen_bits_follow_float32():
    _, wanted = gradients(network("llama"))
    model = network("llama", torch.bfloat16)
    fused_layer.install(model)
    _, found = gradients(model, lambda: torch.autocast("cpu", torch.bfloat16))
    along = torch.nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in side]) for side in (found, wanted)), dim=0)
    assert all(g.dtype == torch.float32 for g in found) and along > 0.995


def test_a_fused_layer_is_far_fewer_operations():
    model = network("llama")
    with Operations() as plain:
        gradients(model)
    lora_linear.install(model)
    with Operations() as linears:
        gradients(model)
    fused_layer.install(model)
    with Operations() as fused:
        gradients(model)
    assert fused.count < 0.75 * linears.count and linears.count < plain.count


def test_a_mask_is_used_where_it_is_more_than_causal():
    model, (ids, labels) = network("llama"), batch()
    seen = torch.ones_like(ids)
    seen[1, :4] = 0  # padded on the left

    def loss():
        return model(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss.item()

    wanted = loss()
    fused_layer.install(model)
    assert loss() == pytest.approx(wanted, rel=1e-6)
    seen[:] = 1
    with Operations() as fused:
        loss()
    seen[1, :4] = 0
    with Operations() as own:
        loss()
    assert fused.count < own.count


def test_the_first_layer_computes_no_gradient_below_it(monkeypatch):
    asked, own = [], lora_linear.Group.to_input
    monkeypatch.setattr(lora_linear.Group, "to_input", lambda *a, **k: asked.append(own(*a, **k)[0] is None) or own(*a, **k))
    model = network("llama")
    fused_layer.install(model)
    gradients(model)
    assert asked == [False] * 7 + [True]


def test_scaling_changed_after_installing_counts():
    model = network("llama")
    fused_layer.install(model)
    for module in (m for m in model.modules() if hasattr(m, "lora_A")):
        module.scaling["default"] *= 4
    mine, found = gradients(model)
    fresh = network("llama")
    for module in (m for m in fresh.modules() if hasattr(m, "lora_A")):
        module.scaling["default"] *= 4
    loss, wanted = gradients(fresh)
    assert mine == pytest.approx(loss, rel=1e-5) and torch.allclose(found[3], wanted[3], rtol=1e-3, atol=1e-6)


def test_what_is_recorded_while_training_is_seen_as_before():
    model = network("llama")
    gradients(model)  # which looks at the model once
    with recording(model) as peaks:
        loss, _ = gradients(model)
    wanted = collected(peaks)
    fused_layer.install(model)
    with recording(model) as peaks:
        mine, _ = gradients(model)
    found = collected(peaks)
    assert mine == pytest.approx(loss, rel=1e-5) and found.keys() == wanted.keys()
    assert all(found[site] == pytest.approx(wanted[site], rel=1e-4) for site in wanted)


def test_answers_without_gradients_and_with_a_cache_are_the_layers_own():
    model, (ids, _) = network("qwen2"), batch()
    wanted = model(input_ids=ids).logits
    fused_layer.install(model)
    with torch.no_grad():
        model.eval()
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)
        first = model(input_ids=ids[:, :10], use_cache=True)
        rest = model(input_ids=ids[:, 10:], past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, wanted[:, 10:], atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = network("llama")
    fused_layer.install(model)
    loss, wanted = gradients(model)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mine, found = gradients(model)
    assert mine == pytest.approx(loss) and all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(found, wanted))


def test_weights_are_not_held_twice_and_keep_their_names():
    model = network("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused_layer.install(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    kept = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in model.parameters()}
    assert sum(kept.values()) == sum(w.numel() * w.element_size() for w in model.parameters())


@pytest.mark.parametrize("name, how", [("llama", {"targets": ("q_proj", "v_proj")}), ("qwen2", {"bias": "all"}),
                                       ("qwen2", {"bias": "lora_only"})])
def test_layers_that_are_adapted_in_part_or_with_their_biases_are_left_to_their_linear_layers(name, how):
    model = network(name, **how)
    loss, wanted = gradients(model)
    assert not fused_layer.install(model).layers
    mine, found = gradients(model)
    assert mine == pytest.approx(loss, rel=1e-5) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, wanted))


class OnGpu:
    """Heads that say they are on a GPU."""

    def __init__(self, heads):
        self.device, self.shape, self._heads = SimpleNamespace(type="cuda"), heads.shape, heads

    def __getitem__(self, key):
        return self._heads[key]


def test_a_gpu_without_flash_attention_gets_repeated_keys(monkeypatch):
    """Seen through the call, since there may be no GPU here: as many key heads as query heads, and the same numbers."""
    heads = [torch.randn(1, n, 12, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 2, 2)]
    wanted, called = fused_layer._attend(*heads, 0.3), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    on_gpu = [OnGpu(h) for h in heads]
    monkeypatch.setattr(fused_layer, "scaled_dot_product_attention",
                        lambda q, k, v, **how: called.append((k.shape, v.shape, how["enable_gqa"])) or
                        torch.nn.functional.scaled_dot_product_attention(heads[0], k, v, **how))
    assert torch.allclose(fused_layer._attend(*on_gpu, 0.3), wanted, atol=1e-6) and called == [((1, 6, 12, 8), (1, 6, 12, 8), False)]
