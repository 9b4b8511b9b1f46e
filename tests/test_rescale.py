"""The range probe and exact rescaling on tiny random models of every architecture: `python -m pytest tests/test_rescale.py`."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from arc_kernel import checkpoint, dtypes
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import probe, rescale
from arc_kernel.precision.rescale import Refused, Rescale
from arc_kernel.prompts import IGNORED, Example, PromptBuilder
from arc_kernel.tasks import Task

SIZES = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256)
KINDS = {"llama": {}, "llama with biases": {"attention_bias": True, "mlp_bias": True}, "mistral": {"sliding_window": 16},
         "qwen2": {}, "qwen3": {"head_dim": 8}}
CASES = [(kind, tied) for kind in KINDS for tied in (True, False)]
IDS = [f"{kind}, {'tied' if tied else 'untied'}" for kind, tied in CASES]
MADE = Rescale(residual=7, product=(3, 0), value=(0, 4), tied=True, untie=False, qk_norm=False)


def random_model(folder, kind, tied=True, dtype=torch.float32, **more):
    """A model whose every weight, norms and biases too, is random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **SIZES | KINDS.get(kind, {}) | more, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    checkpoint.make_portable(folder)
    return folder


def examples(count=2, length=40):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = rng.integers(0, SIZES["vocab_size"], length)
        made.append(Example(ids, np.where(np.arange(length) < length - 8, IGNORED, ids)))
    return made


def logits(model):
    return torch.stack([probe.label_logits(model, e, "cpu") for e in examples()])


def load(folder, dtype="float32"):
    return checkpoint.load_model(folder, dtype, "cpu")


def made_for(folder, **exponents):
    base = rescale.unscaled(folder)
    return Rescale(**{**vars(base), **vars(MADE), "tied": base.tied, "qk_norm": base.qk_norm, **exponents})


@pytest.mark.parametrize("kind, tied", CASES, ids=IDS)
def test_rescaled_model_is_the_same_function_with_smaller_activations(tmp_path, kind, tied):
    folder = random_model(tmp_path / "model", kind, tied)
    made = made_for(folder)
    rescale.write_model(folder, made, tmp_path / "rescaled")
    assert torch.allclose(logits(load(folder)), logits(load(tmp_path / "rescaled")), rtol=1e-6, atol=1e-6)
    before, after = (probe.probe(f, examples(), "cpu") for f in (folder, tmp_path / "rescaled"))
    assert after.peaks.keys() == before.peaks.keys() and after.tokens == 80
    for site, row in made.scaled(before.peaks).items():
        assert after.peaks[site] == pytest.approx(row, rel=1e-5), site
    assert Rescale.from_json(json.loads((tmp_path / "rescaled" / "precision.json").read_text())["rescale"]) == made


def test_head_gets_weights_of_its_own_where_the_final_norm_would_overflow(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    made = made_for(folder, untie=True)
    rescale.write_model(folder, made, tmp_path / "rescaled")
    assert "lm_head.weight" in load_file(tmp_path / "rescaled" / "model.safetensors")
    assert torch.allclose(logits(load(folder)), logits(load(tmp_path / "rescaled")), rtol=1e-6, atol=1e-6)
    ranges = probe.probe(folder, examples(), "cpu")
    big = probe.Ranges(ranges.peaks | {"final norm out": [20000.0], "embedding": [300000.0]}, {}, 0)
    assert rescale.plan(big, rescale.unscaled(folder), 2.0).untie


@pytest.mark.parametrize("kind, tied", CASES, ids=IDS)
def test_model_that_overflows_is_planned_into_float16(tmp_path, kind, tied):
    folder = random_model(tmp_path / "model", kind, tied, dtype=torch.bfloat16)
    base = rescale.unscaled(folder)
    grown = Rescale(**{**vars(base), "residual": -16, "product": (-12, 0), "value": (0, -14)})
    rescale.write_model(folder, grown, tmp_path / "grown")
    ranges = probe.probe(tmp_path / "grown", examples(), "cpu")
    assert "overflows" in probe.table(ranges) and min(r["headroom"] for r in ranges.rows()) < 0
    assert not logits(load(tmp_path / "grown", "float16")).isfinite().all()
    made = rescale.plan(ranges, rescale.unscaled(tmp_path / "grown"), 2.0)
    assert made.residual > 0 and made.product[0] > 0 and made.value[1] > 0 and made.product[1] == made.value[0] == 0
    assert rescale.plan(ranges, rescale.unscaled(tmp_path / "grown"), 5.0).residual == made.residual + 3
    rescale.write_model(tmp_path / "grown", made, tmp_path / "fit")
    wanted = logits(load(folder))
    assert torch.equal(logits(load(tmp_path / "fit")), wanted)
    half = logits(load(tmp_path / "fit", "float16"))
    assert (half - wanted).abs().max() < 0.02 * wanted.abs().max()
    seen = made.scaled(ranges.peaks)
    assert all(probe.headroom(max(seen[s])) >= 2.0 for s in (*rescale.STREAM, *rescale.VALUE, *rescale.PRODUCT))
    smaller = Rescale(**{**vars(made), "residual": made.residual - 1})
    assert probe.headroom(max(max(smaller.scaled(ranges.peaks)[s]) for s in rescale.STREAM)) < 2.0
    lost = rescale.underflow(tmp_path / "grown", tmp_path / "fit", examples(), "cpu")
    assert lost["logit_change"] < rescale.TOLERANCE and 0 <= lost["flushed"] <= lost["subnormal"] < 0.5


def test_output_weights_that_would_underflow_are_helped_inside_their_layer(tmp_path):
    folder = random_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    base = rescale.unscaled(folder)
    rescale.write_model(folder, Rescale(**{**vars(base), "value": (-18, 0), "product": (0, -18)}), tmp_path / "grown")
    made = rescale.plan(probe.probe(tmp_path / "grown", examples(), "cpu"), base, 2.0)
    helped = rescale.balance(rescale.weight_sizes(tmp_path / "grown"), made)
    assert helped.value[0] > made.value[0] > 0 == helped.value[1] and helped.product[1] > made.product[1] > 0 == helped.product[0]
    changes = []
    for name, plan in (("plain", made), ("helped", helped)):
        rescale.write_model(tmp_path / "grown", plan, tmp_path / name)
        changes.append(rescale.underflow(tmp_path / "grown", tmp_path / name, examples(), "cpu")["logit_change"])
    assert changes[1] < changes[0] / 10
    assert rescale.balance(rescale.weight_sizes(folder), base) == base


def test_where_there_is_not_enough_for_both_the_middle_is_taken():
    made = Rescale(residual=10, product=(0,), value=(0,), tied=True, untie=False, qk_norm=False)
    sizes = {(0, "v_proj"): -10.0, (0, "o_proj"): -4.0, (0, "up_proj"): 0.0, (0, "down_proj"): -4.0}
    helped = rescale.balance(sizes, made)
    assert (helped.value, helped.product) == ((2,), (3,))


def test_underflow_is_seen(tmp_path):
    folder = random_model(tmp_path / "model", "llama", tied=False)
    rescale.write_model(folder, made_for(folder, residual=22), tmp_path / "tiny")
    lost = rescale.underflow(folder, tmp_path / "tiny", examples(), "cpu")
    assert lost["logit_change"] > rescale.TOLERANCE and lost["flushed"] > 0.05


def test_rescaled_model_whose_answers_would_change_is_refused(tmp_path):
    model = object.__new__(dtypes.Model)
    model.folder = random_model(tmp_path / "model", "llama", tied=False)
    model._made, model.device, model.key = examples(), "cpu", {"weights": ""}
    with pytest.raises(Refused, match="weights too small for float16"):
        model.write_rescaled(made_for(model.folder, residual=22), tmp_path / "tiny")


def lora(folder, target, modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")):
    model = get_peft_model(load(folder), LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(target, save_embedding_layers=False)
    return target


@pytest.mark.parametrize("kind, tied", CASES, ids=IDS)
def test_adapter_is_converted_exactly(tmp_path, kind, tied):
    folder = random_model(tmp_path / "model", kind, tied)
    made = made_for(folder)
    rescale.write_model(folder, made, tmp_path / "rescaled")
    adapter = lora(folder, tmp_path / "adapter")
    rescale.convert_adapter(adapter, tmp_path / "converted", made)
    wanted = logits(PeftModel.from_pretrained(load(folder), adapter).eval())
    assert not torch.allclose(wanted, logits(load(folder)), atol=0.1)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(tmp_path / "rescaled"), tmp_path / "converted").eval()), wanted,
                          rtol=1e-5, atol=1e-5)
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "converted"))
    factors = {k: (other[k] / one[k]).unique() for k in one}
    assert one.keys() == other.keys() and all(len(f) == 1 and f.log2() % 1 == 0 for f in factors.values())  # each a power of two
    assert any(f != 1 for f in factors.values())


def test_adapter_with_other_weights_is_refused(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    model.save_pretrained(tmp_path / "dora", save_embedding_layers=False)
    with pytest.raises(Refused, match="lora_magnitude_vector.*only plain LoRA"):
        rescale.convert_adapter(tmp_path / "dora", tmp_path / "converted", made_for(folder))


def test_model_whose_tasks_start_from_an_adapter_with_other_weights_is_not_rescaled(tmp_path, tokenizer, arc_training):
    """DoRA trained on the rescaled weights learnt from another loss: a norm of base and LoRA together is no power of two's multiple."""
    folder = random_model(tmp_path / "model", "llama", vocab_size=len(tokenizer))
    starts = [tmp_path / "plain", tmp_path / "dora"]
    for start in starts:
        made = get_peft_model(load(folder), LoraConfig(r=4, target_modules=["q_proj"], use_dora=start.name == "dora"))
        made.save_pretrained(start, save_embedding_layers=False)
    builder, big = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact"), {"final norm in": [1e5]}
    plain, dora = (dtypes.Model(folder, s, builder, [arc_training.tasks["d037b0a7"]], "cpu", 1024, 2.0) for s in starts)
    assert plain.plan([big]).residual > 0
    with pytest.raises(Refused, match="final norm in .*cannot be rescaled: .*lora_magnitude_vector.*only plain LoRA"):
        dora.plan([big])
    assert dora.plan() is None


@pytest.mark.parametrize("kind, more, reason", [
    ("gemma", {"head_dim": 8}, "1 \\+ weight"), ("gemma2", {"head_dim": 8}, "1 \\+ weight"),
    ("granite", {"residual_multiplier": 0.22}, "residual_multiplier, a factor"), ("phi", {}, "LayerNorm, not RMSNorm"),
    ("olmo2", {}, "model type olmo2: the rescaling knows llama"),
])
def test_architecture_that_cannot_be_rescaled_is_refused_with_the_reason(tmp_path, kind, more, reason):
    folder = random_model(tmp_path / "model", kind, **more)
    with pytest.raises(Refused, match=reason):
        rescale.unscaled(folder)


def test_architecture_transformers_has_no_code_for_is_refused(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    config = checkpoint.read_config(folder) | {"model_type": "openelm", "architectures": ["OpenELMForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="no code of its own for model type openelm"):
        rescale.unscaled(folder)


def test_quantized_weights_are_refused(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    config = checkpoint.read_config(folder) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="quantized"):
        rescale.unscaled(folder)


def test_weight_of_an_unknown_name_is_refused(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.embed_positions.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match="model.embed_positions.weight"):
        rescale.unscaled(folder)


def test_site_that_nothing_scales_is_refused_and_named(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    ranges, base = probe.probe(folder, examples(), "cpu"), rescale.unscaled(folder)
    for site in ("gate", "q", "input_layernorm out", "logits"):
        big = probe.Ranges(ranges.peaks | {site: [40000.0] * len(ranges.peaks[site])}, {}, 0)
        with pytest.raises(Refused, match=f"{site} of layer 0 peaks at 40,000"):
            rescale.plan(big, base, 2.0)
    scores = probe.Ranges(ranges.peaks | {"scores": [1e9, 1e9]}, {}, 0)
    assert rescale.plan(scores, base, 2.0).identity
    with pytest.raises(Refused, match="not finite"):
        rescale.plan(probe.Ranges(ranges.peaks | {"o": [math.nan, 1.0]}, {}, 0), base, 2.0)


@pytest.mark.parametrize("free, refused", [(0.99, True), (1.01, False)])
def test_site_that_nothing_scales_keeps_a_bit_free(free, refused):
    assert bool(rescale.overflows({"gate": [65504 / 2**free]})) == refused


def test_float16_weights_are_written_as_float32_and_keep_every_bit(tmp_path):
    folder = random_model(tmp_path / "model", "llama", tied=False, dtype=torch.float16)
    (folder / "config.json").write_text(json.dumps(checkpoint.read_config(folder) | {"torch_dtype": "float16"}))
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rescale.write_model(folder, made_for(folder, residual=20), tmp_path / "rescaled")
    assert checkpoint.read_config(tmp_path / "rescaled")["torch_dtype"] == "float32"
    assert not (tmp_path / "rescaled" / "model.safetensors.index.json").exists()
    assert {t.dtype for t in load_file(tmp_path / "rescaled" / "model.safetensors").values()} == {torch.float32}
    assert torch.allclose(logits(load(folder)), logits(load(tmp_path / "rescaled")), rtol=1e-6, atol=1e-6)


def test_probe_reports_the_site_the_layer_and_the_true_magnitude(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    model = load(folder)
    seen = {}
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(product=a[0].abs().max().item()))
    model.model.layers[0].self_attn.register_forward_hook(lambda m, a, k, out: seen.update(o=out[0].abs().max().item()), with_kwargs=True)
    made = examples(1)
    probe.label_logits(model, made[0], "cpu")
    peaks = probe.probe(folder, made, "cpu").peaks
    assert peaks["gate*up"][1] == pytest.approx(seen["product"]) and peaks["o"][0] == pytest.approx(seen["o"])
    assert len(peaks["scores"]) == 2 and 0 < peaks["scores"][0] <= peaks["q rotated"][0] * peaks["k rotated"][0] * 8 / math.sqrt(8)
    assert {"embedding", "logits", "final norm in", "attention"} <= peaks.keys()


def test_small_weights_are_counted(tmp_path):
    folder = random_model(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    weight = torch.ones_like(tensors["model.norm.weight"])
    weight[:3] = torch.tensor([0.0, 2.0**-26, 2.0**-15])
    total = sum(t.numel() for t in tensors.values())
    save_file({k: torch.ones_like(t) for k, t in tensors.items()} | {"model.norm.weight": weight},
              folder / "model.safetensors", metadata={"format": "pt"})
    found = probe.small_weights(folder)
    assert found == {"smallest": 2.0**-26, "flushed": 1 / total, "subnormal": 1 / total}


def test_tasks_without_a_fitting_example_still_give_something_to_probe(tokenizer, arc_training):
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), "chat")
    task = arc_training.tasks["d037b0a7"]
    for tasks, length in (([], 8192), ([Task("none", (), task.test)], 8192), ([task], 40)):
        made = probe.examples(tasks, builder, length)
        assert len(made) == 1 and (made[0].labels != IGNORED).sum() > 9
    assert len(probe.examples([task], builder, 8192)) == 2
