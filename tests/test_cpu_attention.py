"""Attention as products against torch's kernel: `python -m pytest tests/test_cpu_attention.py`."""

import pytest
import torch

from arc_kernel import cpu_attention, cpu_kernels, fused_layer
from arc_kernel.cpu_attention import compiled, half, kernel, products
from arc_kernel.cpu_kernels import refused

SHAPES = {"three blocks, shared keys": (1, 9, 3, 300, 64), "a batch": (2, 6, 2, 140, 8), "as many keys, odd width": (1, 4, 4, 257, 80),
          "one key head": (2, 4, 1, 128, 16), "one token": (1, 4, 2, 1, 16)}

made_here = pytest.mark.skipif(bool(refused()), reason=refused() or "used here")


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


@pytest.mark.parametrize("way, times", [(products, 3), pytest.param(compiled, 1.1, marks=made_here)])
def test_sixteen_bits_are_about_as_near_to_float32_as_the_kernel_is(way, times):
    shape = SHAPES["three blocks, shared keys"]
    exact, mine, theirs = results(kernel, shape), results(way, shape, torch.bfloat16), results(kernel, shape, torch.bfloat16)
    away = lambda found: [((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
    assert all(a < times * b for a, b in zip(away(mine), away(theirs)))


def rounded_inputs(q, k, v, scaling):
    """The kernel in float32 on heads in 16 bits."""
    return kernel(q.float(), k.float(), v.float(), scaling).to(q.dtype)


@made_here
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 6, 3, 64, 64), (1, 2, 1, 65, 256), (3, 8, 8, 130, 128), (1, 7, 7, 1, 32)], ids=str)
def test_compiled_attention_of_any_shape_and_threads(shape, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for mine, wanted in zip(results(compiled, shape, torch.bfloat16), results(rounded_inputs, shape, torch.bfloat16)):
        assert mine.shape == wanted.shape and mine.dtype == torch.bfloat16
        assert torch.allclose(mine.float(), wanted.float(), rtol=0.05, atol=0.02 * wanted.abs().max().item() + 1e-3)


@made_here
@pytest.mark.parametrize("scaling", [1e4, 1e6])
def test_gradients_of_scores_so_large_that_their_rounding_tells(scaling):
    (q, k, v), grad = heads((1, 4, 2, 150, 64), torch.bfloat16)
    of_values = torch.autograd.grad(compiled(q, k, v, scaling), v, grad)[0].float()
    wanted = grad.float().unflatten(1, (2, 2)).sum((2, 3))  # what queries give to values is 1 together, whatever its shares
    assert (of_values.sum(2) - wanted).norm() < 0.02 * wanted.norm()


@made_here
def test_a_value_that_is_not_finite_reaches_all_that_see_it():
    for which in range(3):
        inputs, _ = heads((1, 2, 1, 150, 32), torch.bfloat16)
        with torch.no_grad():
            inputs[which][0, 0, 100, 5] = torch.nan
            out = compiled(*inputs, 0.3)[0]
        assert out.isnan().any(-1)[0, 100:101 if which == 0 else 150].all()  # a query's own; a key's and a value's all after it


@made_here
@pytest.mark.parametrize("before", [1, 32, 64, 100, 149])
def test_queries_that_come_later_see_all_that_was_before_them(before):
    (q, k, v), _ = heads((2, 4, 2, 150, 64), torch.bfloat16)
    with torch.no_grad():
        wanted = cpu_kernels.attention(q, k, v, 0.3)[0][:, :, before:].float()
        found = cpu_kernels.attention(q[:, :, before:], k, v, 0.3)[0].float()
    assert (found - wanted).norm() < 0.003 * wanted.norm()  # of blocks that lie elsewhere sums are rounded elsewhere


@pytest.mark.parametrize("way", [products, pytest.param(compiled, marks=made_here)])
def test_what_was_given_is_left_as_it_was(way):
    for shape in SHAPES.values():
        given, grad = heads(shape, torch.bfloat16)
        before = [t.detach().clone() for t in (*given, grad)]
        torch.autograd.grad(way(*given, 0.3), given, grad)
        assert all(map(torch.equal, (*given, grad), before))


def test_memory_grows_with_the_tokens_beyond_what_is_kept(monkeypatch):
    held = []
    monkeypatch.setattr(cpu_attention, "KEPT", 4 << 20)
    for tokens in (512, 1024, 2048):
        (q, k, v), _ = heads((1, 6, 2, tokens, 8))
        node = products(q, k, v, 0.3).grad_fn
        held.append(sum(p.nbytes for p in node.kept))
    assert 0 < held[0] <= held[-1] <= 4 << 20  # of 54 MB


@pytest.mark.parametrize("way", [products, pytest.param(compiled, marks=made_here)])
def test_no_token_sees_what_follows(monkeypatch, way):
    monkeypatch.setattr(cpu_attention, "ROWS", 128)
    (q, k, v), _ = heads(SHAPES["three blocks, shared keys"], torch.bfloat16)
    before = way(q, k, v, 0.3)
    with torch.no_grad():
        k[:, :, 200:] = 100.0
        v[:, :, 200:] = 100.0
    after = way(q, k, v, 0.3)
    assert torch.equal(before[:, :, :200], after[:, :, :200]) and not torch.allclose(before[:, :, 200:], after[:, :, 200:])


@pytest.mark.parametrize("way", [products, pytest.param(compiled, marks=made_here)])
def test_a_large_score_is_no_overflow(way):
    (q, k, v), grad = heads(SHAPES["three blocks, shared keys"], torch.bfloat16)
    out = way(q, k, v, 1e4)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out, (q, k, v), grad)))


@pytest.mark.parametrize("way", (kernel, half, products, pytest.param(compiled, marks=made_here)))
def test_training_takes_what_is_fastest_in_sixteen_bits_and_the_kernel_in_float32(monkeypatch, way):
    shape, called = SHAPES["three blocks, shared keys"], []
    monkeypatch.setattr(cpu_attention, "fastest", lambda *what: called.append(what) or way)
    found = {dtype: results(fused_layer._attend, shape, dtype) for dtype in (torch.bfloat16, torch.float32)}
    assert called == [(torch.bfloat16,)]
    assert all(map(torch.equal, found[torch.bfloat16], results(way, shape, torch.bfloat16)))
    assert all(map(torch.equal, found[torch.float32], results(kernel, shape)))


def test_the_trial_finds_the_fastest(monkeypatch):
    """Without the clock, which other processes share: with seconds as they were said to be."""
    ways = kernel, half, products, compiled
    for times, wanted in (((0.3, 0.2, 0.1), products), ((0.3, 0.1, 0.1), half), ((0.3, 0.29, 0.28), kernel), ((0.3, 0.29, 0.2), products),
                          ((0.3, 0.2, 0.19), half), ((0.1, 0.2, 0.3), kernel), ((0.3, 0.2, 0.1, 0.05), compiled),
                          ((0.3, 0.2, 0.1, 0.09), products)):
        said = dict(zip(ways, times))
        monkeypatch.setattr(cpu_attention, "ways_of", lambda dtype: ways[:len(times)])
        monkeypatch.setattr(cpu_attention, "seconds", lambda way, *what: said[way])
        cpu_attention.fastest.cache_clear()
        assert cpu_attention.fastest(torch.bfloat16) is wanted
    monkeypatch.undo()
    cpu_attention.fastest.cache_clear()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        assert cpu_attention.fastest(torch.bfloat16) in ways
    assert torch.equal(state, torch.random.get_rng_state())


def test_there_is_compiled_attention_in_bfloat16_alone_and_where_it_can_be_compiled(monkeypatch):
    monkeypatch.setattr(cpu_attention.cpu_kernels, "refused", lambda: "")
    assert compiled in cpu_attention.ways_of(torch.bfloat16) and compiled not in cpu_attention.ways_of(torch.float16)
    monkeypatch.setattr(cpu_attention.cpu_kernels, "refused", lambda: "no compiler")
    assert compiled not in cpu_attention.ways_of(torch.bfloat16)
