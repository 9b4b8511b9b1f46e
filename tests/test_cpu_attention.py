"""Attention as products against torch's kernel: `python -m pytest tests/test_cpu_attention.py`."""

import pytest
import torch

from arc_kernel import cpu_attention, fused_layer
from arc_kernel.cpu_attention import half, kernel, products

SHAPES = {"three blocks, shared keys": (1, 9, 3, 300, 64), "a batch": (2, 6, 2, 140, 8), "as many keys, odd width": (1, 4, 4, 257, 80),
          "one key head": (2, 4, 1, 128, 16), "one token": (1, 4, 2, 1, 16)}


def heads(shape, dtype=torch.float32):
    """q, k, v and a gradient, as a fused layer has them: [B, T, n, width] in memory, [B, n, T, width] to read."""
    batch, n, m, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, tokens, h, width, generator=generator).to(dtype).transpose(1, 2) for h in (n, m, m, n)]
    return [t.requires_grad_() for t in made[:3]], made[3]


def results(way, shape, dtype=torch.float32):
    inputs, grad = heads(shape, dtype)
    out = way(*inputs, 0.3)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("kept", (0, 150_000, 1 << 30), ids=("nothing kept", "some kept", "all kept"))
@pytest.mark.parametrize("way", (half, products))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_the_kernel(shape, way, kept, monkeypatch):
    monkeypatch.setattr(cpu_attention, "ROWS", 100)
    monkeypatch.setattr(cpu_attention, "KEPT", kept)
    for mine, wanted in zip(results(way, shape), results(kernel, shape)):
        assert mine.shape == wanted.shape and torch.allclose(mine, wanted, rtol=1e-4, atol=1e-6 + 1e-5 * wanted.abs().max().item())


def test_sixteen_bits_are_about_as_near_to_float32_as_the_kernel_is():
    shape = SHAPES["three blocks, shared keys"]
    exact, mine, theirs = results(kernel, shape), results(products, shape, torch.bfloat16), results(kernel, shape, torch.bfloat16)
    away = lambda found: [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
    assert all(a < 3 * b for a, b in zip(away(mine), away(theirs)))


def test_what_was_given_is_left_as_it_was():
    for shape in SHAPES.values():
        given, grad = heads(shape)
        before = [t.detach().clone() for t in (*given, grad)]
        torch.autograd.grad(products(*given, 0.3), given, grad)
        assert all(map(torch.equal, (*given, grad), before))


def test_memory_grows_with_the_tokens_beyond_what_is_kept(monkeypatch):
    held = []
    monkeypatch.setattr(cpu_attention, "KEPT", 4 << 20)
    for tokens in (512, 1024, 2048):
        (q, k, v), _ = heads((1, 6, 2, tokens, 8))
        node = products(q, k, v, 0.3).grad_fn
        held.append(sum(p.nbytes for p in node.kept))
    assert 0 < held[0] <= held[-1] <= 4 << 20  # of 54 MB


def test_no_token_sees_what_follows(monkeypatch):
    monkeypatch.setattr(cpu_attention, "ROWS", 128)
    (q, k, v), _ = heads(SHAPES["three blocks, shared keys"])
    before = products(q, k, v, 0.3)
    with torch.no_grad():
        k[:, :, 200:] = 100.0
        v[:, :, 200:] = 100.0
    after = products(q, k, v, 0.3)
    assert torch.equal(before[:, :, :200], after[:, :, :200]) and not torch.allclose(before[:, :, 200:], after[:, :, 200:])


def test_a_large_score_is_no_overflow():
    (q, k, v), grad = heads(SHAPES["a batch"], torch.bfloat16)
    out = products(q, k, v, 1e4)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out, (q, k, v), grad)))


@pytest.mark.parametrize("way", (kernel, half, products))
def test_training_takes_what_is_fastest_in_sixteen_bits_and_the_kernel_in_float32(monkeypatch, way):
    shape, called = SHAPES["three blocks, shared keys"], []
    monkeypatch.setattr(cpu_attention, "fastest", lambda *what: called.append(what) or way)
    found = {dtype: results(fused_layer._attend, shape, dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert called == [(torch.bfloat16,)]
    assert all(map(torch.equal, found[torch.bfloat16], results(way, shape, torch.bfloat16)))
    assert all(map(torch.equal, found[torch.float32], results(kernel, shape)))


def test_the_trial_finds_the_fastest(monkeypatch):
    """Without the clock, which other processes share: with seconds as they were said to be."""
    for times, wanted in (((0.3, 0.2, 0.1), products), ((0.3, 0.1, 0.1), half), ((0.3, 0.29, 0.28), kernel), ((0.3, 0.29, 0.2), products),
                          ((0.3, 0.2, 0.19), half), ((0.1, 0.2, 0.3), kernel)):
        said = dict(zip((kernel, half, products), times))
        monkeypatch.setattr(cpu_attention, "seconds", lambda way, *what: said[way])
        cpu_attention.fastest.cache_clear()
        assert cpu_attention.fastest(torch.bfloat16) is wanted
    monkeypatch.undo()
    cpu_attention.fastest.cache_clear()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert cpu_attention.fastest(torch.bfloat16) in (kernel, half, products)
    assert torch.equal(state, torch.random.get_rng_state())
