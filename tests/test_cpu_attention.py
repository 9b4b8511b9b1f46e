"""Attention as products against torch's kernel: `python -m pytest tests/test_cpu_attention.py`."""

import pytest
import torch

from arc_kernel import cpu_attention, fused_layer
from arc_kernel.cpu_attention import kernel, products

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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients_are_those_of_the_kernel(shape):
    for mine, wanted in zip(results(products, shape), results(kernel, shape)):
        assert mine.shape == wanted.shape and torch.allclose(mine, wanted, rtol=1e-4, atol=1e-6 + 1e-5 * wanted.abs().max().item())


def test_sixteen_bits_are_about_as_near_to_float32_as_the_kernel_is():
    shape = SHAPES["three blocks, shared keys"]
    exact, mine, theirs = results(kernel, shape), results(products, shape, torch.bfloat16), results(kernel, shape, torch.bfloat16)
    away = lambda found: [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
    assert all(a < 3 * b for a, b in zip(away(mine), away(theirs)))


def test_no_token_sees_what_follows():
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


@pytest.mark.parametrize("faster", (True, False))
def test_training_takes_what_is_faster_in_sixteen_bits_and_the_kernel_in_float32(monkeypatch, faster):
    shape, called = SHAPES["three blocks, shared keys"], []
    monkeypatch.setattr(cpu_attention, "products_are_faster", lambda *what: called.append(what) or faster)
    ways = {dtype: results(fused_layer._attend, shape, dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert called == [(torch.bfloat16, 9, 3, 64)]
    assert all(map(torch.equal, ways[torch.bfloat16], results(products if faster else kernel, shape, torch.bfloat16)))
    assert all(map(torch.equal, ways[torch.float32], results(kernel, shape)))


def test_the_trial_finds_the_faster_one(monkeypatch):
    """Without the clock, which other processes share: with seconds as they were said to be."""
    for of_kernel, of_products, wanted in ((0.3, 0.1, True), (0.3, 0.29, False), (0.1, 0.3, False)):
        monkeypatch.setattr(cpu_attention, "seconds",
                            lambda way, *what: of_products if way == products else of_kernel)
        cpu_attention.products_are_faster.cache_clear()
        assert cpu_attention.products_are_faster(torch.bfloat16, 9, 3, 64) is wanted
    monkeypatch.undo()
    cpu_attention.products_are_faster.cache_clear()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert cpu_attention.products_are_faster(torch.bfloat16, 4, 2, 16) in (True, False)
    assert torch.equal(state, torch.random.get_rng_state())
