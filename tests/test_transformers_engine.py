"""The transformers backend on a tiny model, against the model's own logits.

Quick, so that it runs on both transformers versions in CI: `make test-transformers-4-quick`.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Lfm2Config, Lfm2ForCausalLM

from arc_kernel import checkpoint, engine
from arc_kernel.engine import CHECK_EVERY, EngineSettings, Prompt
from arc_kernel.transformers_engine import TransformersEngine
from models import nan_model, save, tiny_model

NEW_TOKENS, SEEN = 12, 64
PROMPTS = [list(range(start, start + length)) for start, length in ((100, 40), (900, 7), (5000, 23))]


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapters with weights that change every answer."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("first", "second")):
        torch.manual_seed(number)
        config = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(checkpoint.load_model(tiny, "float32", "cpu"), config).save_pretrained(folder / name, save_embedding_layers=False)
    return [folder / "first", folder / "second"]


def greedy(tiny, ids, adapter, answer):
    """The model's first choice at each position of an answer, and their summed logprob; the adapter is not merged."""
    model = checkpoint.load_model(tiny, "float32", "cpu")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        best = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1:-1].log_softmax(-1).max(-1)
    return best.indices.tolist(), float(best.values.sum())


def answers(engine, asked, **options):
    prompts = [Prompt((number,), ids, adapter) for number, (ids, adapter) in enumerate(asked)]
    return [a for _, a in sorted((a.prompt.key, a) for a in engine.answer(iter(prompts), **({"max_new_tokens": NEW_TOKENS} | options)))]


def started(folder, dtype, end=2):
    return TransformersEngine(EngineSettings(folder, dtype, SEEN, end, 8), "cpu")


def test_answers_are_the_greedy_tokens_of_the_model_with_each_prompts_adapter(tiny, adapters):
    asked = [(ids, adapter) for adapter in (None, adapters[0], adapters[1], None) for ids in PROMPTS]
    engine = started(tiny, "float32")
    given = answers(engine, asked)
    engine.close()
    assert len(given) == len(asked)
    for answer, (ids, adapter) in zip(given, asked):
        expected, logprob = greedy(tiny, ids, adapter, answer.token_ids)
        assert (answer.token_ids, len(expected), answer.status) == (expected, NEW_TOKENS, "truncated")
        assert answer.logprob == pytest.approx(logprob, abs=1e-3) == pytest.approx(sum(answer.logprobs), abs=1e-3)
    for number in range(len(PROMPTS)):
        assert len({tuple(a.token_ids) for a in given[number::len(PROMPTS)]}) == 3  # base, two adapters, base again


def test_what_a_models_generation_config_asks_for_changes_no_answer(tiny, tmp_path):
    asked = [(ids, None) for ids in PROMPTS]
    wanted = answers(started(tiny, "float32"), asked)
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({
        "eos_token_id": 2, "no_repeat_ngram_size": 1, "suppress_tokens": wanted[0].token_ids[:2],
        "bad_words_ids": [[wanted[1].token_ids[0]]],
        "return_dict_in_generate": True, "do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0}))
    assert [a.token_ids for a in answers(started(model, "float32"), asked)] == [a.token_ids for a in wanted]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_model_is_the_same_after_an_adapter_was_used(tiny, adapters, dtype):
    engine = started(tiny, dtype)
    before, adapted, after = (answers(engine, [(ids, adapter) for ids in PROMPTS]) for adapter in (None, adapters[0], None))
    engine.close()
    facts = lambda given: [(a.token_ids, a.logprobs) for a in given]
    assert facts(before) == facts(after) != facts(adapted)


def test_adapter_of_a_head_that_is_tied_leaves_the_embedding_as_it_is(tiny, adapters, tmp_path):
    torch.manual_seed(2)
    config = LoraConfig(r=8, lora_alpha=64, target_modules=["v_proj", "lm_head"], init_lora_weights=False)
    get_peft_model(checkpoint.load_model(tiny, "float32", "cpu"), config).save_pretrained(tmp_path, save_embedding_layers=False)
    asked = [(ids, adapter) for adapter in (tmp_path, adapters[0], tmp_path, None) for ids in PROMPTS[:2]]
    engine = started(tiny, "float32")
    given = answers(engine, asked)
    engine.close()
    for answer, (ids, adapter) in zip(given, asked):
        expected, logprob = greedy(tiny, ids, adapter, answer.token_ids)
        assert answer.token_ids == expected and answer.logprob == pytest.approx(logprob, abs=1e-3)


def test_answer_ends_at_the_closing_token_and_stays_inside_the_context(tiny):
    engine = started(tiny, "float32")
    free, long = (answers(engine, [(ids, None)])[0].token_ids for ids in (PROMPTS[1], PROMPTS[0] + PROMPTS[2][:20]))
    engine.close()
    engine = started(tiny, "float32", end=free[4])
    closed, = answers(engine, [(PROMPTS[1], None)])
    engine.close()
    place = free.index(free[4])
    assert (closed.token_ids, closed.status, len(closed.logprobs)) == (free[:place], "ok", place + 1)
    assert len(long) == SEEN - 60


def test_answers_of_a_batch_end_each_by_itself_where_the_context_ends_or_it_is_not_viable(tiny):
    engine, short, long = started(tiny, "float32"), PROMPTS[1], PROMPTS[0] + PROMPTS[2][:20]
    alone = [answers(engine, [(ids, None)], max_new_tokens=24)[0] for ids in (short, long)]
    together = answers(engine, [(short, None), (long, None)], max_new_tokens=24)
    assert [(len(a.token_ids), a.status) for a in together] == [(24, "truncated"), (SEEN - 60, "truncated")]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    cut, whole = answers(engine, [(short, None), (PROMPTS[2], None)], max_new_tokens=24,
                         viable=lambda ids: ids != alone[0].token_ids[:CHECK_EVERY])
    engine.close()
    assert [(len(a.token_ids), a.status) for a in (cut, whole)] == [(CHECK_EVERY, "stopped"), (24, "truncated")]


def test_looks_at_a_long_answer_are_further_apart_but_never_more_than_an_eighth_of_it():
    """A 30x30 grid is about 1,000 tokens, and each look reads all there are."""
    looks = [length for length in range(1, 1017) if engine.due(length)]
    assert looks[:8] == list(range(8, 65, 8)) and all(b - a <= max(8, a / 8) for a, b in zip(looks, looks[1:]))
    assert sum(looks) < sum(range(8, 1017, 8)) / 4


def test_answer_that_gains_several_tokens_at_once_is_looked_at_where_it_passed_a_look():
    passed = [length for length in range(5, 65, 5) if engine.due(length, 5)]
    assert passed == [10, 20, 25, 35, 40, 50, 60]


def test_answer_is_the_same_beside_a_longer_prompt_where_layers_see_the_padding(model_folder, tmp_path):
    """LFM2's convolutions do, in transformers 4.57."""
    torch.manual_seed(0)
    config = Lfm2Config(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                        num_key_value_heads=1, layer_types=["conv", "full_attention"], initializer_range=0.2)
    engine = started(save(Lfm2ForCausalLM(config), model_folder, tmp_path / "lfm2"), "float32")
    alone = [answers(engine, [(ids, None)])[0] for ids in PROMPTS]
    together = answers(engine, [(ids, None) for ids in PROMPTS])
    engine.close()
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.logprob for a in together] == pytest.approx([a.logprob for a in alone], abs=1e-3)


def test_prompt_that_is_not_wanted_when_its_batch_comes_is_not_answered(tiny):
    engine, done = started(tiny, "float32"), []
    prompts = [Prompt((number,), PROMPTS[number % 3], None) for number in range(20)]
    for answer in engine.answer(iter(prompts), 2, wanted=lambda p: not done or p.key[0] >= 15):
        done.append(answer.prompt.key[0])
    engine.close()
    assert done == [*range(8), *range(15, 20)]


def test_prompts_are_read_no_further_than_the_next_batch(tiny):
    engine, read = started(tiny, "float32"), []

    def source():
        for number in range(20):
            read.append(number)
            yield Prompt((number,), PROMPTS[1], None)

    seen = [len(read) for _ in engine.answer(source(), 2)]
    engine.close()
    assert max(seen[:8]) <= 9


def test_answer_that_is_not_viable_is_cut_and_nan_is_never_an_answer(tiny, tmp_path):
    engine = started(tiny, "float32")
    cut, = answers(engine, [(PROMPTS[0], None)], viable=lambda ids: False)
    engine.close()
    sick = started(nan_model(tiny, tmp_path / "nan"), "float32")
    bad = answers(sick, [(ids, None) for ids in PROMPTS])
    sick.close()
    assert (cut.status, len(cut.token_ids)) == ("stopped", 8)
    assert [a.status for a in bad] == ["nan"] * len(PROMPTS)


def test_prompts_are_answered_before_more_come_where_there_are_none_yet(tiny):
    """As serving feeds them that waits for the open tasks to end."""
    engine, done = started(tiny, "float32"), []

    def prompts():
        yield Prompt((0,), PROMPTS[0])
        while not done:
            yield None
        yield Prompt((1,), PROMPTS[1])

    for answer in engine.answer(prompts(), 4):
        done.append(answer.prompt.key)
    engine.close()
    assert done == [(0,), (1,)]


def test_converted_adapters_are_bounded_and_none_that_has_prompts_under_way_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "convert_adapter", lambda source, target, rescale: target.mkdir())
    served = engine.ServedAdapters(object(), 2)
    a, b, c, d = (tmp_path / name for name in "abcd")
    made = {x: served.folder(x, busy) for x, busy in ((a, set()), (b, {a}), (c, {a, b}))}
    assert all(folder.is_dir() for folder in made.values())  # three, since a and b are under way
    made[d] = served.folder(d, {a})
    assert [x.name for x, folder in made.items() if folder.is_dir()] == ["a", "d"] and served.folder(a) == made[a]
    served.close()
    assert not made[a].exists()
