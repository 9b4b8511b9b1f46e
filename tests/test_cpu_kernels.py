"""C functions for training on a CPU, against what they replace: `python -m pytest tests/test_cpu_kernels.py`."""

import os
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from arc_kernel import adapt, cpu_attention, cpu_kernels, elementwise, fused_layer
from arc_kernel.answer_loss import answer_losses
from arc_kernel.flat_weights import FlatWeights

made_here = pytest.mark.skipif(bool(cpu_kernels.refused()), reason=cpu_kernels.refused() or "used here")
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, max_position_embeddings=256)
MODELS = {"llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
          "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
          "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1})),
          "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES))}


def some(*sides, seed=0):
    return torch.randn(sides, generator=torch.Generator().manual_seed(sum(sides) + seed)).bfloat16()


def apart(found, wanted) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def pieces(batch: int, tokens: int):
    """Each elementwise piece with what it is given."""
    rows, both = batch * tokens, some(batch, tokens, 9, 64)[:, :, :-2]
    for angles in (1, batch):
        turn = some(angles, tokens, 1, 64), some(angles, tokens, 1, 64, seed=1)
        yield elementwise.rotate, (both, *turn)
        yield elementwise.rotate_back, (*(some(batch, tokens, n, 64) for n in (5, 2, 2)), *turn)
    yield elementwise.norm, (3 * some(rows, 80), some(80), torch.tensor(1e-5))
    for beside in ((), (some(rows, 80, seed=2),)):
        yield elementwise.norm_back, (some(rows, 80), some(rows, 80, seed=1), some(rows, 1).float().abs(), some(80), *beside)
    yield elementwise.swiglu, (9 * some(rows, 96),)
    yield elementwise.swiglu_back, (some(rows, 48), 9 * some(rows, 96))


@made_here
@pytest.mark.parametrize("batch, tokens", [(1, 1), (1, 70), (3, 33)])
def test_pieces_are_the_plain_ones_rounded_once(batch, tokens):
    for piece, given in pieces(batch, tokens):
        before = [g.clone() for g in given]
        found, exact = getattr(cpu_kernels, piece.__name__)(*given), piece.plain(*(g.float() for g in given))
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, exact))):
            assert one.shape == other.shape and apart(one, other) < 0.005, piece.__name__  # bfloat16 rounds by 0.0017 on average
        assert all(map(torch.equal, given, before))


@made_here
def test_a_piece_that_cannot_be_made_is_left_to_torch(monkeypatch):
    elementwise.take_kernels.__wrapped__(64, 96, 4, 2, 32, False)
    assert elementwise.compiled
    for given in (some(7, 2 * 24), some(7, 96).float(), some(96, 7).T):  # too narrow, another dtype, not row by row
        assert cpu_kernels.swiglu(given) is NotImplemented
        assert torch.equal(elementwise.swiglu(given), elementwise.swiglu.plain(given))


@made_here
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 33, 160])
@pytest.mark.parametrize("outputs, ranks", [([96], [16]), ([64, 16, 48], [32, 16, 64]), ([176, 176], [48, 48])])
def test_products_of_a_lora_are_torchs(outputs, ranks, tokens, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs, scales = 80, [0.5, 2.0, 1.25][:len(ranks)]
    x, residual, grad, factor = some(tokens, inputs), some(tokens, sum(outputs)), some(tokens, sum(outputs), seed=1), some(inputs)
    masters = [w for rank, out in zip(ranks, outputs) for w in (some(rank, inputs), some(out, rank))]
    lora = cpu_kernels.Lora(inputs, outputs, ranks)
    y, of_x = some(tokens, sum(outputs), seed=2), some(tokens, inputs, seed=3)
    wanted_y, wanted_x, wide = y.float() + residual.float(), of_x.float(), [m.float() for m in masters]
    h = lora.forward(x, y, masters, scales, residual)
    to_h = lora.to_input(grad, of_x, masters, scales)
    assert torch.equal(lora.to_input(grad, None, masters, scales), to_h)
    sums = [torch.ones(m.shape) for m in masters]
    lora.to_masters(grad, to_h, x, factor, h, masters, scales, sums)
    for number, (rank, out, scale) in enumerate(zip(ranks, outputs, scales)):
        low, part = slice(sum(ranks[:number]), sum(ranks[:number + 1])), slice(sum(outputs[:number]), sum(outputs[:number + 1]))
        a, b = wide[2 * number:2 * number + 2]
        assert apart(h[:, low], scale * x.float() @ a.T) < 0.005
        wanted_y[:, part] += h[:, low].float() @ b.T
        assert apart(to_h[:, low], scale * grad[:, part].float() @ b) < 0.005
        wanted_x += to_h[:, low].float() @ a
        assert apart(sums[2 * number], 1 + to_h[:, low].float().T @ x.float() * factor.float()) < 1e-3
        assert apart(sums[2 * number + 1], 1 + grad[:, part].float().T @ h[:, low].float()) < 1e-3
    assert apart(y, wanted_y) < 0.005 and apart(of_x, wanted_x) < 0.005


@made_here
def test_layers_whose_sides_are_no_multiples_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    fits = lambda outputs, inputs=64, ranks=(16, 16), dtype=torch.bfloat16: cpu_kernels.Lora.fits(
        torch.zeros(sum(outputs), inputs, dtype=dtype), outputs, ranks)
    assert fits([64, 16]) and not fits([200, 200]) and not fits([64, 16], 72)
    assert not fits([64, 16], ranks=(16, 8)) and not fits([64, 16], dtype=torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not fits([64, 16])


def frozen(outputs: int, inputs: int, factor):
    """A weight in 8 bits, and the weight that is."""
    scales, weight = some(outputs).float().abs() / 127, torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8,
                                                                      generator=torch.Generator().manual_seed(outputs))
    return cpu_kernels.Frozen(weight, scales, factor), weight * scales[:, None]


@made_here
@pytest.mark.parametrize("factor", [None, some(96).abs()])
def test_products_in_8_bits_round_each_row_by_itself(factor):
    x = some(37, 96) * torch.logspace(-4, 4, 37)[:, None].bfloat16()
    x[5], x[6, 3] = 0, torch.nan
    product, weight = frozen(48, 96, factor)
    found, wide = product(x), x.float() if factor is None else x.float() * factor.float()
    step = wide.abs().amax(1, keepdim=True) / 127
    wanted = (wide / step).round() * step @ weight.T
    good = torch.tensor([row not in (5, 6) for row in range(37)])
    assert apart(found[good], wanted[good]) < 0.003 and not found[5].any() and found[6].isnan().all()


@made_here
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 33, 160, 300])
@pytest.mark.parametrize("outputs, ranks", [([96], [16]), ([64, 16, 48], [32, 16, 64]), ([176, 176], [48, 48])])
def test_products_in_8_bits_with_those_of_a_lora_are_one_after_the_other(outputs, ranks, tokens, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs, many, scales = 80, sum(outputs), [0.5, 2.0, 2.0][:len(ranks)]
    x, residual, grad = some(tokens, inputs), some(tokens, many), some(tokens, many, seed=1)
    masters = [w for rank, out in zip(ranks, outputs) for w in (some(rank, inputs), some(out, rank))]
    lora, there, back = cpu_kernels.Lora(inputs, outputs, ranks), frozen(many, inputs, some(inputs))[0], frozen(inputs, many, None)[0]
    y, of_x, wanted_y, wanted_x = some(tokens, many, seed=2), some(tokens, inputs, seed=3), there(x), back(grad)
    wanted_h, wanted_to_h = lora.forward(x, wanted_y, masters, scales, residual), lora.to_input(grad, wanted_x, masters, scales)
    assert torch.equal(lora.forward(x, y, masters, scales, residual, there), wanted_h)
    assert torch.equal(lora.to_input(grad, of_x, masters, scales, back), wanted_to_h)
    assert torch.equal(lora.to_input(grad, None, masters, scales, back), wanted_to_h)
    assert apart(y, wanted_y) < 0.003 and apart(of_x, wanted_x) < 0.003


def network(name: str, dtype):
    """A model with a LoRA none of whose weights is zero."""
    torch.manual_seed(1)
    base = MODELS[name]()
    for norm in (p for n, p in base.named_parameters() if "norm" in n or n.endswith("bias")):
        torch.nn.init.normal_(norm, 1.0, 0.3)
    model = get_peft_model(base.to(dtype), LoraConfig(r=16, lora_alpha=6, target_modules=list(adapt.TARGET_MODULES))).train()
    for number, weight in enumerate(p for p in model.parameters() if p.requires_grad):
        weight.data = torch.empty(weight.shape).normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    return model


def trained(name: str, dtype, flat: bool):
    """Loss and gradients of a step of a model whose layers are fused."""
    model = network(name, dtype)
    masters = [p for p in model.parameters() if p.requires_grad]
    fused = fused_layer.install(model)
    assert len(fused.layers) == 2
    ids = torch.randint(0, 128, (2, 75), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(75) < 9, -100, ids)
    if flat:
        weights = FlatWeights(masters, fused.groups)
        with weights.cast(dtype), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, _, _ = answer_losses(model.get_base_model(), ids, labels)
    else:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            total, _, _ = answer_losses(model.get_base_model(), ids, labels)
    total.backward()
    return total.item(), [m.grad.clone() for m in masters]


@made_here
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_with_them_is_no_further_from_float32_than_one_without(name, flat, monkeypatch):
    exact, wanted = trained(name, torch.float32, flat)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(cpu_attention, "fastest", lambda dtype: cpu_attention.compiled)
    calls, run = set(), cpu_kernels._run
    monkeypatch.setattr(cpu_kernels, "_run", lambda called, *given: calls.add(called) or run(called, *given))
    loss, found = trained(name, torch.bfloat16, flat)
    assert {"attention_backward", "lora_to_masters", "swiglu_back", "rotate_back", "norm_back"} <= calls
    monkeypatch.setattr(cpu_kernels, "refused", lambda: "left out")
    monkeypatch.setattr(cpu_attention, "fastest", lambda dtype: cpu_attention.kernel)
    monkeypatch.setattr(elementwise, "compiled", {})
    monkeypatch.setattr(elementwise, "take_kernels", lambda *sizes: "left out")
    calls.clear()
    _, plain = trained(name, torch.bfloat16, flat)
    assert not calls and loss == pytest.approx(exact, rel=0.01)
    flatten = lambda grads: torch.cat([g.flatten() for g in grads])
    assert apart(flatten(found), flatten(wanted)) < 1.1 * apart(flatten(plain), flatten(wanted)) < 0.2


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """A cache with nothing in it, for a process that has tried nothing."""
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    cached = cpu_kernels.refused, cpu_kernels._library
    for each in cached:
        each.cache_clear()
    yield tmp_path / "kernels"
    for each in cached:
        each.cache_clear()


@made_here
def test_they_are_compiled_once(anew):
    assert not cpu_kernels.refused()
    made, = anew.iterdir()
    before = made.stat()
    program = "from arc_kernel import cpu_kernels; assert not cpu_kernels.refused()"
    without = os.environ | {"PATH": ""}  # a compiler
    first, second = (subprocess.Popen([sys.executable, "-c", program], env=without) for _ in range(2))
    assert first.wait() == second.wait() == 0
    assert made.stat() == before or made.stat().st_mtime == before.st_mtime


@made_here
def test_processes_that_compile_at_once_do_not_disturb_each_other(anew):
    program = "from arc_kernel import cpu_kernels; assert not cpu_kernels.refused()"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert all(each.wait() == 0 for each in running) and [p.suffix for p in anew.iterdir()] == [".so"]


@made_here
def test_a_machine_without_a_compiler_trains_without_and_says_what_is_missing(anew, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "no C compiler (gcc or cc)" in cpu_kernels.refused() and cpu_kernels.missing().endswith(": install gcc")
    assert not cpu_kernels.Lora.fits(some(64, 64), [64], [16]) and not cpu_kernels.multiplies(some(64, 64))
    assert cpu_attention.compiled not in cpu_attention.ways_of(torch.bfloat16)


@made_here
@pytest.mark.parametrize("script, said", [("echo a.c:1: error: no such flag >&2; exit 1", "a.c:1: error: no such flag"),
                                          ("exit 3", "code 3"), ("sleep 9", "timed out"), ("exit 0", "FileNotFoundError"),
                                          ('while [ $# -gt 0 ]; do [ "$1" = -o ] && echo junk > "$2"; shift; done', "OSError")])
def test_a_compiler_that_fails_is_no_error_of_the_run(anew, script, said, tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "gcc"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(cpu_kernels, "PATIENCE", 1)
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    assert said in cpu_kernels.refused() and time.monotonic() - begun < 5
    assert not anew.exists() or not [p for p in anew.iterdir() if p.suffix != ".so"]
    monkeypatch.undo()  # the compiler is mended, and what it left is not loaded
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(anew.parent))
    cpu_kernels.refused.cache_clear()
    assert not cpu_kernels.refused()


@made_here
def test_a_library_that_was_cut_off_is_made_again(anew):
    assert not cpu_kernels.refused()
    made, = anew.iterdir()
    whole = made.read_bytes()
    for kept in (50, len(whole) - 1):
        made.unlink()  # not written over: it is in use
        made.write_bytes(whole[:kept])
        cpu_kernels._library.cache_clear()
        cpu_kernels._library()
        assert len(made.read_bytes()) == len(whole)


def test_a_user_without_a_home_trains_without(anew, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpu_kernels, "_suited", lambda: True)
    monkeypatch.delenv("ARC_KERNEL_CACHE")
    monkeypatch.setattr(cpu_kernels.Path, "home", homeless)
    assert "set ARC_KERNEL_CACHE" in cpu_kernels.missing()


@made_here
def test_what_another_user_put_there_is_not_loaded(anew, monkeypatch):
    assert not cpu_kernels.refused()
    made, = anew.iterdir()
    made.unlink()  # not written over: it is in use
    made.write_bytes(b"something else")
    cpu_kernels._library.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: made.stat().st_uid + 1)
    cpu_kernels._library()
    assert made.read_bytes()[:4] == b"\x7fELF"


def test_a_cpu_that_has_no_such_instructions_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "avx512_bf16" in cpu_kernels.refused.__wrapped__() and not cpu_kernels.missing()
