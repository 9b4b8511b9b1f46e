"""Products with frozen weights in 8 bits, in training: `python -m pytest tests/test_int8.py`."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear

from arc_kernel import adapt, cpu_operators, int8, lora_linear
from arc_kernel.checkpoint import load_model
from arc_kernel.dtypes import Model
from arc_kernel.fused_layer import install
from arc_kernel.grids import ENCODERS, GridEncoder
from arc_kernel.precision import verdict
from arc_kernel.precision.rescale import Refused
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import PROMPTS
from models import nan_model, tiny_model
from test_fused_layer import MODELS, batch, gradients, network

made_here = pytest.mark.skipif(bool(int8.refused("cpu")), reason=int8.refused("cpu") or "used here")
REST = getattr(torch, int8.rest("int8", "cpu"))


def some(*sides):
    return torch.randn(sides, generator=torch.Generator().manual_seed(sum(sides)))


@made_here
@pytest.mark.parametrize("dtype, outputs", [(torch.bfloat16, 160), (torch.bfloat16, 150), (torch.float32, 160)])
def test_product_is_the_exact_one_up_to_rounding_and_no_token_disturbs_another(dtype, outputs):
    x, weight = some(70, 96).to(dtype), some(outputs, 96).to(dtype)
    x[3] *= 1000
    x[4] = 0
    product = int8.Product(weight)
    y, exact = product(x), linear(x.double(), weight.double())
    assert y.dtype == dtype and y[4].abs().max() == 0
    assert all((y[i] - exact[i]).norm() < 0.03 * exact[i].norm() for i in range(70) if i != 4)
    assert torch.equal(product(x.T.contiguous().T), y) and product(x[:0]).shape == (0, outputs)
    assert torch.equal(int8.Product(weight.T.contiguous().T)(x), y)
    evened = int8.Product(weight, x.float().square().mean(0).sqrt())
    assert torch.equal(evened(x.T.contiguous().T), evened(x))


@made_here
@pytest.mark.parametrize("isa", ["AVX2", "ALL"])
def test_where_sums_saturate_weights_are_smaller_and_products_as_right(isa):
    """As on a CPU without VNNI, in a process of its own: oneDNN reads this once."""
    code = ("import torch; from arc_kernel import int8; x, w = torch.full((3, 640), 2.0), torch.randn(5, 640).sign() * 3; "
            "print(int8._largest(), (int8.Product(w)(x) - x @ w.T).abs().max().item(), int8.refused('cpu'))")
    largest, apart, *refused = subprocess.run([sys.executable, "-c", code], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa}, text=True,
                                              check=True, stdout=subprocess.PIPE).stdout.split()
    assert int(largest) == (64 if isa == "AVX2" else int8._largest()) and float(apart) < 1e-3 * 6 * 640 and "off" not in refused


@made_here
@pytest.mark.parametrize("name", MODELS)
def test_gradients_follow_those_of_exact_products_and_answers_are_exact(name):
    model, rounded = network(name, REST), network(name, REST)
    install(model)
    cast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=REST != torch.float32)
    with lora_linear.watched(install(rounded).groups) as found:
        gradients(rounded, cast)
    assert len(found) == (7 * 2 if name in ("gemma", "mistral, window") else 4 * 2)
    for group, columns in found.items():
        group.round_weight(*columns)
    (loss, wanted), (mine, grads) = gradients(model, cast), gradients(rounded, cast)
    along = torch.nn.functional.cosine_similarity(*(torch.cat([g.flatten() for g in side]) for side in (grads, wanted)), dim=0)
    assert mine == pytest.approx(loss, rel=0.01) and along > 0.99
    assert not any(torch.equal(*pair) for pair in zip(grads, wanted))
    with torch.no_grad(), cast():
        assert torch.equal(*(m(input_ids=batch()[0]).logits for m in (model, rounded)))


@made_here
def test_columns_that_are_large_do_not_take_the_bits_of_the_others():
    x, weight = some(400, 96), some(160, 96)
    x[:, 5] *= 100
    weight[:, 5] /= 10
    columns = x.square().mean(0).sqrt()
    columns[7], columns[8], columns[9] = 0, torch.nan, torch.inf
    exact = linear(x, weight)
    plain, evened = ((int8.Product(weight, of)(x) - exact).norm() / exact.norm() for of in (None, columns))
    assert evened < 0.5 * plain


@made_here
@pytest.mark.parametrize("kind", PROMPTS)
def test_what_is_usual_is_looked_at_in_the_shortest_context_too(model_folder, tokenizer, tmp_path, kind):
    tiny = tiny_model(model_folder, tmp_path / "tiny")
    for name in ENCODERS:
        builder = PromptBuilder(tokenizer, GridEncoder.from_name(name), kind)
        trainer = adapt.TaskTrainer(tiny, builder, adapt.Recipe(1, 1, 1e-3, 4, 256, False, 0), None, "cpu", "int8")
        assert trainer._flat.tensor.grad.abs().max() == 0 and trainer.dtype == "int8"


@made_here
def test_a_head_with_a_lora_is_not_rounded(model_folder, tokenizer, tmp_path):
    tiny = tiny_model(model_folder, tmp_path / "tiny")
    made = get_peft_model(load_model(tiny, "float32", "cpu"), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    adapt.save_adapter(made, tmp_path / "start")
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")
    trainer = adapt.TaskTrainer(tiny, builder, adapt.Recipe(1, 1, 1e-3, 4, 1024, False, 0), tmp_path / "start", "cpu", "int8")
    groups = {id(group): group for group, *_ in trainer._flat._groups}.values()
    rounded = {group.weight.shape: group._rounded is not None for group in groups if group.masters}
    head = trainer.model.get_base_model().lm_head.weight.shape
    assert not rounded.pop(head) and rounded and all(rounded.values())


@made_here
def test_training_in_int8_learns_what_training_in_the_rest_learns(model_folder, tokenizer, arc_training, tmp_path):
    tiny = tiny_model(model_folder, tmp_path / "tiny")
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), "chat")
    recipe, losses = adapt.Recipe(30, 1, 1e-2, 4, 4096, False, 5), {}
    for dtype in ("int8", int8.rest("int8", "cpu")):
        trainer, losses[dtype] = adapt.TaskTrainer(tiny, builder, recipe, None, "cpu", dtype), []
        trainer.train(arc_training.tasks["25ff71a9"], tmp_path / dtype, lambda step, loss, tokens: losses[dtype].append(loss))
    mine, other = losses.values()
    apart = np.abs(np.subtract(mine, other))  # which grows from step to step, as between any two roundings
    assert mine != other and apart[:10].max() < 0.05 and np.mean(apart) < 0.1 and np.mean(mine[-5:]) < np.mean(mine[:5]) - 0.2
    sick = adapt.TaskTrainer(nan_model(tiny, tmp_path / "nan"), builder, dataclasses.replace(recipe, steps=1), None, "cpu", "int8")
    with pytest.raises(FloatingPointError, match="loss is not finite at step 1 in int8"):
        sick.train(arc_training.tasks["25ff71a9"], tmp_path / "a", lambda *_: None)


@made_here
def test_a_value_that_is_not_finite_stays_visible_in_the_residual():
    group = lora_linear.Group([network("llama", REST).base_model.model.model.layers[0].self_attn.o_proj])
    group.round_weight(*(torch.ones(side) for side in reversed(group.weight.shape)))
    hidden = some(5, group.weight.shape[0]).to(REST)
    hidden[2] = torch.nan
    with torch.no_grad():  # as in an autograd function
        y, _ = group.forward(some(5, group.weight.shape[1]).to(REST), group.masters, hidden)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]


@pytest.fixture
def anew():
    """As in a new process: nothing has been tried."""
    yield int8.refused.cache_clear() or cpu_operators.load.cache_clear()
    int8.refused.cache_clear()
    cpu_operators.load.cache_clear()


@pytest.mark.parametrize("instead, reason", [
    ({"cpu_operators": SimpleNamespace(load=lambda: "vLLM is not installed")}, "there are no 8-bit products: vLLM is not installed"),
    ({"product_seconds": lambda *_: (1.0, 1.1)}, "8-bit products are not faster than"),
    ({"APART": 0.001}, "% off on this CPU"),
    ({"Product": lambda weight: weight.no_such_operator}, "there are no 8-bit products: AttributeError: 'Tensor' object has no attribute"),
])
def test_where_8_bits_are_of_no_use_it_is_said_why_and_the_next_dtype_is_taken(instead, reason, anew, monkeypatch):
    if "cpu_operators" not in instead and cpu_operators.load():
        pytest.skip(cpu_operators.load())
    for name, value in instead.items():
        monkeypatch.setattr(int8, name, value)
    monkeypatch.setattr(int8.cpu_kernels, "multiplies", lambda weight: False)
    assert reason in int8.refused("cpu")
    assert verdict.training_candidates("auto", "cpu") == verdict.candidates("auto", "cpu")
    assert verdict.training_candidates("int8", "cpu") == ["int8", *verdict.candidates("auto", "cpu")]
    with pytest.raises(Refused, match=reason.replace("(", r"\(")):
        Model.variant(SimpleNamespace(device="cpu"), "int8")


def test_without_vllm_or_with_one_for_a_gpu_there_are_none(anew, monkeypatch, tmp_path):
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for found, reason in ((None, "vLLM is not installed"), (empty, "this vLLM has no _C")):
        cpu_operators.load.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        assert cpu_operators.load().startswith(reason)
    for path in ("_C", "_C_AVX512", "_C_AVX2"):
        (tmp_path / f"{path}.abi3.so").write_bytes(b"no library")
    cpu_operators.load.cache_clear()
    assert "Could not load this library" in cpu_operators.load()
    assert int8.refused("cuda")


@made_here
def test_auto_trains_in_int8_and_goes_on_in_what_auto_was_before():
    assert verdict.training_candidates("auto", "cpu") == ["int8", *verdict.candidates("auto", "cpu")]
    assert verdict.training_candidates("float32", "cpu") == ["float32"]
