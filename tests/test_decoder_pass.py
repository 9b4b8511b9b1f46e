"""The decoder as graphs of fixed sizes: what can be seen without a GPU, and the graphs themselves where there is one."""

import pytest
import torch

from arc_kernel import decoder_pass, elementwise, fused_layer
from arc_kernel.answer_loss import answer_losses
from arc_kernel.decoder_pass import Decoder, fits, size_of
from arc_kernel.flat_weights import FlatWeights
from test_fused_layer import batch, gradients, network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU every capture fails


def decoder_of(name, dtype=torch.float32):
    model = network(name, dtype).to(DEVICE)
    fused = fused_layer.install(model)
    flat = FlatWeights([p for p in model.parameters() if p.requires_grad], fused.groups)
    return model, fused, flat, Decoder(model.get_base_model(), fused, flat)


def test_sizes_hold_the_tokens_and_little_more_and_are_few():
    sizes = [size_of(n) for n in range(1, 8193)]
    assert all(s >= n and s % decoder_pass.SMALLEST == 0 for n, s in enumerate(sizes, 1))
    assert all(s - n < max(decoder_pass.SMALLEST, n / decoder_pass.PARTS) for n, s in enumerate(sizes, 1))
    assert size_of(8192) == 8192 and len(set(sizes)) < 100 and [size_of(s) for s in sorted(set(sizes))] == sorted(set(sizes))


@pytest.mark.parametrize("name, may", [("llama", True), ("qwen2", True), ("llama, biases", True), ("mistral", True), ("qwen3", True),
                                       ("mistral, window", False), ("gemma", False)])
def test_only_models_that_are_causal_fused_layers_and_no_more(name, may):
    model = network(name)
    assert fits(model.get_base_model(), fused_layer.install(model)) is may


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_angles_go_by_the_length_of_a_pass_does_not_fit(kind):
    model = network("llama")
    model.get_base_model().model.rotary_emb.rope_type = kind
    assert not fits(model.get_base_model(), fused_layer.install(model))


def test_a_model_with_a_layer_that_is_not_fused_does_not_fit():
    model = network("llama", targets=("q_proj", "v_proj"))
    assert not fits(model.get_base_model(), fused_layer.install(model))


def test_a_model_that_trains_more_than_its_layers_does_not_fit():
    model = network("llama")
    model.get_base_model().base_model.norm.weight.requires_grad_()
    assert not fits(model.get_base_model(), fused_layer.install(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_losses_and_gradients_of_every_pass_are_the_model_s_own(name):
    """The second pass of a size is the first from a graph, where graphs can be made; weights change between passes. The loss of
    the pass before is still alive, and with it autograd's node of the weights, on the stream of that pass."""
    model, _, flat, decoder = decoder_of(name)
    plain = network(name)
    theirs = [p for p in plain.parameters() if p.requires_grad]
    ids, labels = (t.to(DEVICE) for t in batch())
    for number in range(5):
        wanted_loss, wanted = gradients(plain)
        total, each, _ = answer_losses(model.get_base_model(), ids, labels, decoder)
        total.backward()
        assert (total / len(each)).item() == pytest.approx(wanted_loss, rel=1e-4)
        other = torch.cat([g.flatten() for g in wanted]).to(DEVICE)
        assert torch.allclose(flat.tensor.grad, other, rtol=1e-3, atol=1e-3 * other.abs().max())
        flat.tensor.grad.zero_()
        change = torch.randn(len(other), generator=torch.Generator().manual_seed(number)) * 0.01
        flat.tensor.data += change.to(DEVICE)
        for weight, part in zip(theirs, change.split([w.numel() for w in theirs])):
            weight.data += part.view(weight.shape)
    assert ("graphs" in decoder.trouble) is (DEVICE == "cpu"), decoder.trouble


def test_a_compiled_piece_that_fails_is_done_plainly_and_told(monkeypatch):
    model, _, _, decoder = decoder_of("llama")
    ids, labels = (t.to(DEVICE) for t in batch())
    wanted = answer_losses(model.get_base_model(), ids, labels, decoder)[0].item()

    def fails(*given):
        raise ValueError("no such layout")

    monkeypatch.setattr(elementwise, "compiled", {elementwise.swiglu.plain: fails})
    ids = torch.nn.functional.pad(ids, (0, 64))  # of another size
    labels = torch.nn.functional.pad(labels, (0, 64), value=-100)
    for _ in range(2):
        assert answer_losses(model.get_base_model(), ids, labels, decoder)[0].item() == pytest.approx(wanted)
    assert not elementwise.compiled and not elementwise.trouble and "compiled" in decoder.trouble and "no such layout" in decoder.trouble


@pytest.mark.parametrize("head_norm", [False, True])
@pytest.mark.parametrize("compiler, said", [(lambda plain: plain, ""),
                                            (lambda plain: lambda *given: changed(plain(*given)), "norm compiled"),
                                            (lambda plain: lambda *given: missing(), "RuntimeError: no gcc")])
def test_pieces_are_compiled_only_where_they_compute_the_same(compiler, said, head_norm, monkeypatch):
    monkeypatch.setattr(elementwise, "compiled", {})
    monkeypatch.setattr(torch, "compile", lambda plain, **options: compiler(plain))
    found = elementwise.compile_on_gpu.__wrapped__(torch.bfloat16, DEVICE, 48, 80, 6, 2, 8, head_norm)
    assert found.startswith(said) and bool(found) is bool(said) and len(elementwise.compiled) == (0 if said else 6)


def changed(found):
    return tuple(t * 1.1 for t in found) if isinstance(found, tuple) else found * 1.1


def missing():
    raise RuntimeError("no gcc")


def test_two_passes_of_a_step_add_up():
    model, _, flat, decoder = decoder_of("llama")
    ids, labels = (t.to(DEVICE) for t in batch())
    answer_losses(model.get_base_model(), ids, labels, decoder)[0].backward()
    once = flat.tensor.grad.clone()
    answer_losses(model.get_base_model(), ids, labels, decoder)[0].backward()
    assert once.abs().max() > 0 and torch.allclose(flat.tensor.grad, 2 * once, rtol=1e-4, atol=1e-5)


def test_a_gpu_that_cannot_capture_trains_on_and_says_so(monkeypatch):
    model, _, flat, decoder = decoder_of("llama")
    ids, labels = (t.to(DEVICE) for t in batch())
    own = Decoder._plain
    waits = lambda self, ids, leaf=None: own(self, ids, leaf) + float(ids.sum()) * 0  # the CPU waits for the GPU, which no capture allows
    monkeypatch.setattr(Decoder, "_plain", waits)
    losses = [answer_losses(model.get_base_model(), ids, labels, decoder)[0].item() for _ in range(6)]
    assert losses == pytest.approx(losses[:1] * 6) and decoder.trouble.startswith("passes are not captured as CUDA graphs")
    assert torch.randn(4, device=DEVICE).isfinite().all()  # the generator is of use again


def test_a_gpu_without_room_keeps_half_as_many_graphs_and_in_the_end_none():
    model, _, _, decoder = decoder_of("llama")
    assert not decoder.make_room("nothing to give back")
    kept = []
    while not decoder.trouble:
        for number in range(10):
            decoder._captured[(1, number)] = None
        while len(decoder._captured) > decoder._kept:
            decoder._captured.popitem()
        assert decoder.make_room("no memory") and not decoder._captured
        kept.append(decoder._kept)
    assert kept == [5, 2] and decoder.trouble.endswith("slower: no memory")
