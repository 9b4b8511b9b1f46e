"""One contract for both inference backends, on the real model with real adapters: `python -m pytest tests/test_engines.py`."""

import dataclasses
import math
import shutil
import types

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Olmo2Config, Olmo2ForCausalLM

from arc_kernel import adapt, cpu_drafts, cpu_kernels, cpu_prefill, generate, vllm_engine
from arc_kernel.engine import CHECK_EVERY, EngineSettings, Prompt, ServedAdapters
from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.views import random_view, task_rng
from arc_kernel.vllm_engine import VllmEngine
from models import nan_model, save, tiny_model

TASKS = ("d037b0a7", "3c9b0459", "25ff71a9")
NEW_TOKENS = 16
needs_vllm = pytest.mark.skipif(not generate.vllm_installed(), reason="no vLLM wheel for this platform")


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "compact")


@pytest.fixture(scope="module")
def adapters(model_folder, builder, arc_training, tmp_path_factory):
    """An adapter for each of TASKS: one trained just long enough to answer with a grid instead of words, two made of it."""
    recipe = adapt.Recipe(steps=4, batch=1, lr=2e-3, rank=8, max_seq_len=4096, permute_background=False, seed=0)
    trainer = adapt.TaskTrainer(model_folder, builder, recipe, None, "cpu", verdict.candidates("auto", "cpu")[0])
    folder = tmp_path_factory.mktemp("adapters")
    trainer.train(arc_training.tasks[TASKS[0]], folder / TASKS[0], lambda *_: None)
    for made, factor in zip(TASKS[1:], (0.5, 1.5)):
        path = shutil.copytree(folder / TASKS[0], folder / made) / "adapter_model.safetensors"
        save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def prompts(builder, arc_training, adapters):
    """A prompt with each task's own adapter and, in the same batch, some with none."""
    made = []
    for task_id in TASKS:
        task = arc_training.tasks[task_id]
        ids = builder.prompt(random_view(len(task.train), task_rng(0, task_id, "test")), task, 0)
        made.append(Prompt((task_id, "adapted"), ids, adapters / task_id))
        if len(made) < 4:
            made.append(Prompt((task_id, "base"), ids, None))
    return made


@pytest.fixture(scope="module")
def engines(model_folder, builder):
    """Both backends (one where vLLM has no wheel) in float32, where their arithmetic agrees."""
    settings = EngineSettings(model_folder, "float32", 4096, builder.end_token, 8)
    started = {b: generate.start_engine(b, settings, "cpu") for b in ("transformers", "vllm") if b != "vllm" or generate.vllm_installed()}
    yield started
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="module")
def answered(engines, prompts):
    """Both backends' answers to `prompts`."""
    return {backend: answers(engine, prompts) for backend, engine in engines.items()}


@pytest.fixture(scope="module")
def reference(answered):
    return answered["transformers"]


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=needs_vllm)])
def engine(request, engines):
    return engines[request.param]


def answers(engine, prompts, **options):
    return {a.prompt.key: a for a in engine.answer(iter(prompts), **({"max_new_tokens": NEW_TOKENS} | options))}


@needs_vllm
def test_vllm_gives_the_tokens_and_logprobs_of_transformers_for_mixed_adapters(answered, reference, prompts):
    given = answered["vllm"]
    assert set(given) == {p.key for p in prompts}
    for key, answer in given.items():
        assert (answer.token_ids, answer.status) == (reference[key].token_ids, reference[key].status), key
        assert answer.logprob == pytest.approx(reference[key].logprob, abs=5e-3), key


@needs_vllm
def test_an_adapter_in_the_place_of_another_is_answered_with(engines, prompts, adapters, tmp_path):
    """More adapters than vLLM has places for, one after the other: each answer is its own adapter's."""
    places, asked = engines["vllm"].adapters, prompts[0]
    weights = load_file(adapters / TASKS[0] / "adapter_model.safetensors")
    made = []
    for number in range(places + 2):
        folder = shutil.copytree(adapters / TASKS[0], tmp_path / f"adapter-{number}")
        factor = 1.5 * number / (places + 1)
        scaled = {k: v * factor if "lora_B" in k else v for k, v in weights.items()}
        save_file(scaled, folder / "adapter_model.safetensors", {"format": "pt"})
        made.append(Prompt((number,), asked.token_ids, folder))
    short = {"max_new_tokens": 5}
    first = {**answers(engines["vllm"], made[:places], **short), **answers(engines["vllm"], made[places:], **short)}
    assert len({a.logprob for a in first.values()}) == len(made)
    for key, answer in answers(engines["transformers"], made, **short).items():
        assert first[key].token_ids == answer.token_ids and first[key].logprob == pytest.approx(answer.logprob, abs=5e-3), key


def test_adapters_change_answers_and_the_base_model_is_left_alone(reference):
    bases = [task_id for task_id, kind in reference if kind == "base"]
    assert len(bases) == 2
    for task_id in bases:
        assert reference[task_id, "adapted"].token_ids != reference[task_id, "base"].token_ids


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=needs_vllm)])
def test_answer_ends_at_the_closing_token_or_says_truncated(answered, engines, backend, prompts, builder):
    given, engine = answered[backend], engines[backend]
    assert {a.status for a in given.values()} <= {"ok", "truncated"}
    for answer in given.values():
        assert builder.end_token not in answer.token_ids
        assert (len(answer.token_ids) == NEW_TOKENS) == (answer.status == "truncated")
        assert answer.logprob < 0
    short = answers(engine, prompts[:2], max_new_tokens=3)
    assert all(a.status == "truncated" and len(a.token_ids) == 3 for a in short.values())
    assert all(given[k].token_ids[:3] == a.token_ids for k, a in short.items())


def test_answer_that_is_not_viable_is_cut(engine, prompts, reference):
    hopeless = answers(engine, prompts[1:2], viable=lambda ids: False)
    assert [(a.status, len(a.token_ids)) for a in hopeless.values()] == [("stopped", CHECK_EVERY)]
    fine = answers(engine, prompts[1:2], viable=lambda ids: True)
    assert all(a.token_ids == reference[k].token_ids for k, a in fine.items())


@needs_vllm
def test_prompt_that_is_no_longer_wanted_is_given_up_and_the_others_go_on(engines, prompts, reference):
    begins = {key: answer.token_ids[:CHECK_EVERY] for key, answer in reference.items() if len(answer.token_ids) > CHECK_EVERY}
    cut, dropped = next((a, b) for a in begins for b in begins if begins[a] != begins[b])
    given = {}
    for answer in engines["vllm"].answer(iter(prompts), NEW_TOKENS, lambda ids: ids[:CHECK_EVERY] != begins[cut],
                                         lambda prompt: cut not in given or prompt.key != dropped):
        given[answer.prompt.key] = answer
    assert set(given) == set(reference) - {dropped} and given[cut].status == "stopped"
    assert all(a.token_ids == reference[k].token_ids[:len(a.token_ids)] for k, a in given.items())


@needs_vllm
def test_prompt_that_begins_like_its_neighbour_is_computed_from_where_they_part(engines, prompts):
    ids = (prompts[0].token_ids * 10)[:600]
    twins = [Prompt((start, i), [100 + start, *ids, 200 + i], None) for start in (0, 1) for i in (0, 1)]
    given = answers(engines["vllm"], twins, max_new_tokens=2)
    for start in (0, 1):
        assert given[start, 0].cached == 0 and 570 < given[start, 1].cached <= 601


@needs_vllm
def test_drafts_are_those_vllm_would_find_and_nothing_is_compiled_for_them(engines):
    from vllm.v1.spec_decode import ngram_proposer

    assert ngram_proposer.batch_propose_numba is cpu_drafts.propose
    search = ngram_proposer._find_longest_matched_ngram_and_propose_tokens.py_func
    rng, found = np.random.default_rng(0), 0
    for _ in range(500):
        length, kinds, fewest, count = (int(rng.integers(1, most)) for most in (40, 6, 4, 6))
        most, room = fewest + int(rng.integers(5)), length + int(rng.integers(4))
        tokens = rng.integers(kinds, size=(1, length), dtype=np.int32)
        drafts, counts = np.zeros((1, count), np.int32), np.zeros(1, np.int32)
        cpu_drafts.propose([0], np.array([length]), tokens, fewest, most, room, count, drafts, counts)
        assert drafts[0, :counts[0]].tolist() == list(search(tokens[0], fewest, most, room, count))
        found += counts[0]
    assert found > 200


def test_prompts_are_taken_as_they_come(engine, prompts, reference):
    def trickle():
        yield prompts[0]
        yield None
        yield prompts[2]

    given = answers(engine, trickle(), max_new_tokens=4)
    assert {k: a.token_ids for k, a in given.items()} == {p.key: reference[p.key].token_ids[:4] for p in (prompts[0], prompts[2])}


def test_engine_without_prompts_gives_no_answers(engine):
    assert answers(engine, []) == {}


def check_nan_is_no_answer(backend, settings, prompts):
    engine = generate.start_engine(backend, settings, "cpu")
    base = [p for p in prompts if p.adapter is None]
    given = answers(engine, base)
    engine.close()
    assert len(given) == len(base) > 0
    assert all(a.status == "nan" and not math.isfinite(a.logprob) and len(a.token_ids) <= 2 for a in given.values())


def test_transformers_marks_nan_logits_and_never_takes_them_for_an_answer(model_folder, builder, prompts, tmp_path):
    sick = nan_model(tiny_model(model_folder, tmp_path / "tiny"), tmp_path / "nan")
    check_nan_is_no_answer("transformers", EngineSettings(sick, "float32", 2048, builder.end_token, 0), prompts)


@needs_vllm
def test_vllm_that_does_not_start_says_why_and_holds_no_memory_nor_does_a_closed_one_which_marks_nan(
        model_folder, builder, prompts, tmp_path, monkeypatch):
    """It is found out after the cache for keys and values was taken: 1.5 GiB here, nine tenths of a GPU there, where the engine of the
    next dtype would have found nothing left. The next here is of a model whose logits are NaN."""
    tiny = tiny_model(model_folder, tmp_path / "tiny")
    settings = EngineSettings(tiny, "float32", 2048, builder.end_token, 0)
    with pytest.raises(ArcKernelError, match="tiny: vLLM does not start in float32: .*max_model_len"):
        generate.start_engine("vllm", dataclasses.replace(settings, max_seq_len=10**7), "cpu")
    from vllm.v1.worker.cpu_worker import CPUWorker

    before, largest = resident(), 0

    def no_kernel(*_):
        nonlocal largest
        largest = resident()
        raise RuntimeError("no kernel for this device\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(CPUWorker, "compile_or_warm_up_model", no_kernel)
        with pytest.raises(ArcKernelError, match="does not start in float32: no kernel for this device$"):
            generate.start_engine("vllm", settings, "cpu")
    assert largest > before + 1400 and resident() < before + 300
    check_nan_is_no_answer("vllm", dataclasses.replace(settings, model=nan_model(tiny, tmp_path / "nan")), prompts)
    assert resident() < before + 300


@pytest.mark.parametrize("last, processes, taken_apart", [(False, "0", True), (True, "0", False), (True, "1", True)])
def test_last_engine_goes_with_its_process_unless_it_would_outlive_it(last, processes, taken_apart, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    engine, shut = object.__new__(VllmEngine), []
    core = types.SimpleNamespace(shutdown=lambda: shut.append(core))
    engine._llm, engine._adapters = types.SimpleNamespace(llm_engine=types.SimpleNamespace(engine_core=core)), ServedAdapters(None, 1)
    engine.close(last)
    assert bool(shut) == taken_apart


def resident() -> float:
    """MiB of this process in memory."""
    return psutil.Process().memory_info().rss / 2**20


@needs_vllm
def test_transformers_answers_after_vllm_had_opened_the_architecture_through_it(model_folder, tmp_path, monkeypatch):
    """As where a canary finds vLLM wrong: vLLM changes transformers' own class of the decoder."""
    torch.manual_seed(0)
    config = Olmo2Config(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, initializer_range=0.2, max_position_embeddings=512)
    folder = save(Olmo2ForCausalLM(config), model_folder, tmp_path / "olmo2")
    monkeypatch.setattr(vllm_engine, "CPU_KV_BYTES", 1 << 27)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, which vLLM 0.19 goes by
    settings, given = EngineSettings(folder, "float32", 256, 2, 0), {}
    for backend in ("vllm", "transformers", "vllm"):
        engine = generate.start_engine(backend, settings, "cpu")
        given[backend, len(given)] = [a.token_ids for a in engine.answer([Prompt((0,), list(range(100, 140)))], NEW_TOKENS)]
        engine.close()
    assert len({str(found) for found in given.values()}) == 1


@needs_vllm
@pytest.mark.parametrize("heads, width, size, before", [(3, 64, 32, 100), (1, 32, 32, 64), (2, 128, 64, 1), (8, 80, 32, 33)])
def test_keys_and_values_of_before_are_those_vllm_keeps(heads, width, size, before):
    """Whatever order its cache has on this CPU; in blocks that are anywhere."""
    attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    custom, isa = pytest.importorskip("vllm._custom_ops"), attention._get_attn_isa(torch.bfloat16, size, width)
    order = cpu_prefill._order(isa, heads, size, width, torch.bfloat16)
    if order is None:
        pytest.skip("vLLM's own attention is used: its cache is in another order")
    written, blocks = torch.randn(2, before, heads, width).bfloat16(), torch.tensor([5, 0, 3, 6])[:-(-before // size)]
    cache, token = torch.full((7, heads, 2 * size, width), torch.nan).bfloat16(), torch.arange(before)
    custom.cpu_attn_reshape_and_cache(*written, *cache.chunk(2, 2), blocks[token // size] * size + token % size, isa)
    there, new = cache.view(7, heads, size, 2 * width)[blocks].contiguous(), torch.zeros(3, heads, width).bfloat16()
    for where, wanted in zip(order, written):
        assert torch.equal(cpu_prefill._behind(there, where, before, new), torch.cat([wanted, new]))


@needs_vllm
@pytest.mark.skipif(bool(cpu_kernels.refused()), reason=cpu_kernels.refused() or "used here")
def test_swiglu_is_vllms_for_rows_of_any_number():
    module = pytest.importorskip("vllm.model_executor.layers.activation").SiluAndMul
    for sides in ((5, 64), (2, 3, 64), (0, 64), (1, 0, 64), (64,), (5, 48)):
        x = torch.randn(sides).bfloat16()
        made, own = cpu_prefill._swiglu(types.SimpleNamespace(forward_native=module.forward_native), x), module.forward_native(x)
        torch.testing.assert_close(made, own, rtol=0.02, atol=0.02)


@needs_vllm
@pytest.mark.skipif(bool(cpu_kernels.refused()), reason=cpu_kernels.refused() or "used here")
def test_prompts_are_attended_to_in_c_no_less_exactly(engines, model_folder, builder, prompts, adapters, monkeypatch):
    """Also what goes on behind a cached prefix, and a prompt of several steps; beside them in the same steps prompts too short for it, and
    answers that are decoded."""
    cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    engine = VllmEngine(EngineSettings(model_folder, "bfloat16", 8192, builder.end_token, 8, in_flight=4), "cpu")
    if cpu_attn.CPUAttentionBackendImpl.forward.__module__ != cpu_prefill.__name__:
        engine.close()
        pytest.skip("vLLM's own attention is used: it is another here, or there is AMX")
    ids, calls, attention, split = prompts[0].token_ids * 30, [], cpu_kernels.attention, cpu_prefill._split
    monkeypatch.setattr(cpu_kernels, "attention",
                        lambda q, k, *given: calls.append((q.shape[2], k.shape[2] - q.shape[2])) or attention(q, k, *given))
    begun = [[200 + size % 37, *ids[:size]] for size in (700, 4300, 4200, 300, 40, 30)]
    found, asked = [], [Prompt((i,), made, adapters / TASKS[i % 2]) for i, made in enumerate([*begun, begun[0][:320] + ids[1:400]])]
    for turn in (0, 1):
        engine._llm.reset_prefix_cache()
        monkeypatch.setattr(cpu_prefill, "_split", split if turn else lambda *given: None)
        found.append(answers(engine, asked[:6], max_new_tokens=6) | answers(engine, asked[6:], max_new_tokens=6))
        assert bool(calls) == bool(turn)
    engine.close()
    befores = {before for _, before in calls}
    assert len(calls) % 30 == 0 and min(calls)[0] >= cpu_prefill.LEAST and {(701, 0), (301, 0)} <= set(calls)
    assert 320 in befores and any(before % 32 for before in befores)  # a prefix has whole blocks
    exact = answers(engines["transformers"], [prompt for prompt in asked if len(prompt.token_ids) < 1000], max_new_tokens=1)
    off, on = ([abs(mine[key].logprobs[0] - answer.logprobs[0]) for key, answer in exact.items()] for mine in found)
    assert len(on) == 5 and sum(on) < 3 * sum(off)  # other keys, or another adapter's, are nats away
    assert found[1][2,].logprobs[0] == pytest.approx(found[0][2,].logprobs[0], abs=0.3)
