"""Prompts are exact token ids, and training and inference agree on them: `python -m pytest tests/test_prompts.py`."""

import copy
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import standin
from strategies import grids, small_tasks, views

from arc_kernel.checkpoint import load_tokenizer
from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import ENCODERS, GridEncoder
from arc_kernel.prompts import IGNORED, QUESTION, SYSTEM, PromptBuilder, default_builder
from arc_kernel.settings import PROMPTS
from arc_kernel.tasks import Pair, Task, task_from_json, task_to_json
from arc_kernel.views import View, random_view

KINDS_AND_ENCODERS = [(kind, name) for kind in PROMPTS for name in ("digits", "shape+rows+digits", "rows+spaced", "fenced+shape+digits")]
TASK_IDS = ("007bbfb7", "0520fde7", "d037b0a7", "68b16354", "ff28f65a")


@pytest.fixture(scope="module")
def build(tokenizer):
    return functools.cache(lambda kind, name: PromptBuilder(tokenizer, GridEncoder.from_name(name), kind))


def identity(task):
    return View(0, tuple(range(10)), tuple(range(len(task.train))))


def grid(rows, columns, colour=0):
    return np.full((rows, columns), colour, np.int8)


@pytest.mark.parametrize("kind, name", KINDS_AND_ENCODERS)
@given(data=st.data(), task_id=st.sampled_from(TASK_IDS))
@settings(max_examples=10)
def test_training_examples_begin_with_the_inference_prompt_and_take_loss_on_the_answer_only(build, arc_training, kind, name, data, task_id):
    builder, task = build(kind, name), arc_training.tasks[task_id]
    view = data.draw(views(len(task.train)))
    prompt, seen = builder.prompt(view, task, 0), view.apply(task)
    example = builder.example(seen.train, seen.test[0])
    ids, labels = example.input_ids, example.labels
    assert ids.dtype == labels.dtype == np.int64 and ids.shape == labels.shape
    assert ids[:len(prompt)].tolist() == prompt
    assert set(labels[:len(prompt)].tolist()) == {IGNORED}
    assert labels[len(prompt):].tolist() == ids[len(prompt):].tolist() == builder.answer_ids(seen.test[0].output)


@given(task=small_tasks(), kind_and_name=st.sampled_from(KINDS_AND_ENCODERS))
def test_training_and_inference_agree_for_any_number_of_pairs(build, task, kind_and_name):
    builder = build(*kind_and_name)
    prompt, example = builder.prompt(identity(task), task, 0), builder.example(task.train, task.test[0])
    assert example.input_ids[:len(prompt)].tolist() == prompt
    assert (example.labels != IGNORED).sum() == len(example.input_ids) - len(prompt) == len(builder.answer_ids(task.test[0].output))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_ids_are_what_the_tokenizer_makes_of_the_whole_text(build, arc_training, tokenizer, kind, name):
    builder = build(kind, name)
    for task_id in TASK_IDS[:3]:
        task = arc_training.tasks[task_id]
        ids = builder.example(task.train, task.test[0]).input_ids.tolist()
        assert tokenizer(builder.text_of(ids), add_special_tokens=False).input_ids == ids


@given(task=small_tasks(), kind_and_name=st.sampled_from(KINDS_AND_ENCODERS))
def test_ids_of_any_task_are_what_the_tokenizer_makes_of_the_whole_text(build, tokenizer, task, kind_and_name):
    builder = build(*kind_and_name)
    ids = builder.prompt(identity(task), task, 0)
    assert tokenizer(builder.text_of(ids), add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize("name", ENCODERS)
@given(grid=grids())
@settings(max_examples=10)
def test_an_answer_without_its_closing_token_is_the_encoded_grid(build, name, grid):
    builder = build("chat", name)
    *answer, end = builder.answer_ids(grid)
    assert end == builder.end_token and builder.text_of(answer) == builder.encoder.encode(grid)


@pytest.mark.parametrize("kind, name", KINDS_AND_ENCODERS)
@given(grid=grids())
@settings(max_examples=10)
def test_no_answer_is_longer_than_the_longest(build, kind, name, grid):
    builder = build(kind, name)
    assert len(builder.answer_ids(grid)) <= builder.longest_answer == len(builder.answer_ids(np.full((30, 30), 9, np.int8)))


def test_a_compact_prompt_is_grids_and_separators_and_closes_each_output_like_an_answer(build, tokenizer):
    task = Task("t", (Pair(grid(1, 2, 1), grid(2, 1, 2)),), (Pair(grid(1, 1, 3), None),))
    builder = build("compact", "digits")
    end = tokenizer.eos_token
    assert builder.text_of(builder.prompt(identity(task), task, 0)) == f"I\n11\nO\n2\n2{end}I\n3\nO\n"
    learnt = builder.example(task.train * 2, task.train[0], True)
    assert builder.text_of(learnt.labels[learnt.labels != IGNORED].tolist()) == f"2\n2{end}2\n2{end}"


def test_a_chat_prompt_is_the_template_of_the_model_with_a_turn_for_each_pair_and_each_output_closed_by_it(build, tokenizer):
    task = Task("t", (Pair(grid(1, 2, 1), grid(2, 1, 2)), Pair(grid(1, 1, 4), grid(1, 1, 5))), (Pair(grid(1, 1, 3), None),))
    said = f"{QUESTION}\nInput 1:\n11", "2\n2", "Input 2:\n4", "5", "Test input:\n3"
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, (SYSTEM, *said), strict=True)]
    builder = build("chat", "digits")
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert builder.text_of(builder.prompt(identity(task), task, 0)) == whole
    assert builder.end_token == tokenizer.convert_tokens_to_ids("<|im_end|>")
    learnt = builder.example(task.train, task.train[0], True)
    assert builder.text_of(learnt.labels[learnt.labels != IGNORED].tolist()) == "5<|im_end|>2\n2<|im_end|>"


def test_a_compact_prompt_begins_as_the_models_tokenizer_begins_a_text(build, arc_training, tmp_path):
    llama = load_tokenizer(standin("AMD-Llama-135m", tmp_path / "llama"))
    builder, task = PromptBuilder(llama, GridEncoder.from_name("digits"), "compact"), arc_training.tasks["d037b0a7"]
    for ids in (builder.prompt(identity(task), task, 0), builder.example(task.train, task.train[0]).input_ids.tolist(),
                builder.side_example("inputs", (grid(1, 1),), grid(1, 2)).input_ids.tolist()):
        assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1
    own = build("compact", "digits")
    assert own.text_of(own.prompt(identity(task), task, 0)).startswith("I\n"), "this model's puts nothing there"


def test_a_chat_answer_closes_as_the_template_closes_it_whatever_the_end_of_sequence_token(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|endoftext|>"
    ends = [PromptBuilder(other, GridEncoder.from_name("digits"), kind).end_token for kind in PROMPTS]
    assert other.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_each_test_input_has_its_own_prompt_and_no_prompt_shows_a_test_output(build, arc_training):
    task, builder = arc_training.tasks["ff28f65a"], build("chat", "digits")
    prompts = [builder.prompt(identity(task), task, i) for i in range(len(task.test))]
    assert len({tuple(p) for p in prompts}) == len(task.test) > 1
    assert prompts == [builder.prompt(identity(task), task_from_json(task_to_json(task)), i) for i in range(len(task.test))]


def test_fit_keeps_every_pair_where_there_is_room(build, arc_training):
    builder = build("chat", "shape+rows+digits")
    for task in list(arc_training.tasks.values())[:30]:
        assert builder.fit(task.train, task.test[0].input, builder.longest_answer, 1 << 20) == tuple(range(len(task.train)))


@pytest.mark.parametrize("kind, name", KINDS_AND_ENCODERS)
def test_fit_drops_the_longest_pairs_first_and_keeps_the_order(build, kind, name):
    builder = build(kind, name)
    train = tuple(Pair(grid(side, side), grid(side, side)) for side in (5, 9, 3, 8, 4))
    kept = dict.fromkeys(builder.fit(train, grid(2, 2), 10, limit) for limit in range(2000, 0, -7))
    assert list(kept) == [(0, 1, 2, 3, 4), (0, 2, 3, 4), (0, 2, 4), (2, 4), (2,), None]


@given(task=small_tasks(side=12), kind_and_name=st.sampled_from(KINDS_AND_ENCODERS), limit=st.integers(50, 1500))
@settings(max_examples=60)
def test_what_fits_whole_fits_under_every_symmetry(build, task, kind_and_name, limit):
    builder, order = build(*kind_and_name), identity(task).order
    if builder.fit(task.train, task.test[0].input, 20, limit) == order:
        assert max(len(builder.prompt(View(s, tuple(range(10)), order), task, 0)) for s in range(8)) + 20 <= limit


@given(seed=st.integers(0, 99), task_id=st.sampled_from(TASK_IDS), kind_and_name=st.sampled_from(KINDS_AND_ENCODERS),
       share=st.floats(0.4, 1))
def test_the_kept_pairs_of_real_tasks_fit_under_every_view(build, arc_training, seed, task_id, kind_and_name, share):
    builder, task = build(*kind_and_name), arc_training.tasks[task_id]
    limit = int(share * (len(builder.prompt(identity(task), task, 0)) + builder.longest_answer))
    kept = builder.fit(task.train, task.test[0].input, builder.longest_answer, limit)
    if kept is not None:
        fitted = Task(task.id, tuple(task.train[i] for i in kept), task.test)
        view = random_view(len(kept), np.random.default_rng(seed))
        assert list(kept) == sorted(kept)
        assert len(builder.prompt(view, fitted, 0)) + builder.longest_answer <= limit


@pytest.mark.parametrize("kind, name", KINDS_AND_ENCODERS)
def test_a_likely_answer_is_as_long_as_the_longest_output_or_the_test_input_under_every_view(build, kind, name):
    builder = build(kind, name)
    task = lambda output, test_input: Task("t", (Pair(grid(9, 9), grid(*output)),), (Pair(grid(*test_input), None),))
    likely = lambda *shapes: builder.likely_answer(task(*shapes), 0)
    longest = max(len(builder.answer_ids(grid(*shape))) for shape in ((2, 8), (8, 2)))
    assert likely((2, 8), (3, 3)) == likely((8, 2), (3, 3)) == likely((3, 3), (2, 8)) == longest


@pytest.mark.parametrize("kind, name", KINDS_AND_ENCODERS)
def test_a_wide_task_fits_as_it_is_only_where_it_fits_turned_too(build, kind, name):
    builder, turned = build(kind, name), View(1, tuple(range(10)), (0,))
    for shape in ((2, 30), (30, 2)):
        task = Task("wide", (Pair(grid(*shape), grid(*shape)),), (Pair(grid(*shape), None),))
        longest = max(len(builder.prompt(v, task, 0)) for v in (turned, identity(task)))
        assert builder.fit(task.train, task.test[0].input, 10, longest + 9) is None
        assert builder.fit(task.train, task.test[0].input, 10, longest + 10 + 20) == (0,)


def test_fit_of_a_task_without_pairs_is_the_test_input_alone_or_nothing(build):
    builder = build("compact", "digits")
    needed = len(builder.prompt_ids((), grid(5, 5))) + 10
    assert builder.fit((), grid(5, 5), 10, needed - 1) is None
    assert builder.fit((), grid(5, 5), 10, needed + 10) == ()


def test_fit_is_none_where_not_even_the_shortest_pair_fits(build):
    builder = build("compact", "digits")
    pairs = (Pair(grid(9, 9), grid(9, 9)), Pair(grid(8, 8), grid(8, 8)))
    needed = len(builder.prompt_ids(pairs[1:], grid(1, 1))) + 10
    assert builder.fit(pairs, grid(1, 1), 10, needed - 1) is None
    assert builder.fit(pairs, grid(1, 1), 10, needed + 20) == (1,)


def templated(tokenizer, template):
    """A copy of the tokenizer with this chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def message_of(tokenizer, kind):
    with pytest.raises(ArcKernelError) as raised:
        PromptBuilder(tokenizer, GridEncoder.from_name("digits"), kind)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_model_folder_without_chat_template_is_told_to_use_compact(tokenizer, tmp_path):
    templated(tokenizer, None).save_pretrained(tmp_path)
    reloaded = load_tokenizer(tmp_path)
    message = message_of(reloaded, "chat")
    assert str(tmp_path) in message and "no chat template" in message and "prompt=compact" in message
    assert PromptBuilder(reloaded, GridEncoder.from_name("digits"), "compact").longest_answer == 930
    assert (default_builder(reloaded, "digits").kind, default_builder(tokenizer, "digits").kind) == ("compact", "chat")


@pytest.mark.parametrize("template, said", [
    ("{{ raise_exception('first\nsecond') }}", "fails: first second"),
    ("{% if %}", "fails"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves messages out"),
])
def test_a_chat_template_that_cannot_be_used_is_one_line_that_advises_compact(tokenizer, template, said):
    message = message_of(templated(tokenizer, template), "chat")
    assert said in message and "prompt=compact" in message


def test_a_chat_template_that_knows_no_system_role_is_used_without_it(tokenizer):
    other = templated(tokenizer, "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                                 "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
                                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    builder = PromptBuilder(other, GridEncoder.from_name("digits"), "chat")
    text = builder.text_of(builder.prompt_ids((), grid(1, 1, 3)))
    assert text == f"<|im_start|>user\n{QUESTION}\nTest input:\n3<|im_end|><|im_start|>assistant\n"


@pytest.mark.parametrize("closer, context, answer", [
    ("<file_sep>\n", "<file_sep>", "<file_sep>"),  # special, but no role of the tokenizer's, as Gemma 3's <end_of_turn>
    (" <|im_end|>", "", "<|im_end|>"),  # Llama-2's: a space before the marker
    ("\nEND\n", "", "<|im_end|>"),
])
def test_no_output_is_taught_to_end_with_what_ends_no_answer(tokenizer, closer, context, answer):
    other = templated(tokenizer, "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + closer + "{% endfor %}"
                                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    builder, pair = PromptBuilder(other, GridEncoder.from_name("digits"), "chat"), Pair(grid(1, 1, 4), grid(1, 1, 5))
    sides = builder.side_example("outputs", (pair.output, pair.output), pair.output, True)
    for example in (builder.example((pair, pair), pair, True), sides):
        assert builder.text_of(example.labels[example.labels != IGNORED].tolist()) == f"5{context}5{answer}"
    assert other.convert_ids_to_tokens(builder.end_token) == answer and builder.end_token in builder.special_tokens


def test_an_answer_in_a_template_that_closes_with_plain_text_ends_with_the_end_of_sequence_token(tokenizer):
    other = templated(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    assert PromptBuilder(other, GridEncoder.from_name("digits"), "chat").end_token == other.eos_token_id


def test_a_tokenizer_without_end_token_is_told_what_to_set(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    assert "eos_token" in message_of(other, "compact")


@pytest.mark.parametrize("kind", ["chat", "compact"])
def test_all_outputs_are_labelled_but_the_first_each_with_the_token_that_ends_it(tokenizer, kind, arc_training):
    builder = PromptBuilder(tokenizer, GridEncoder.from_name("shape+rows+digits"), kind)
    pairs, target = arc_training.tasks["d037b0a7"].train[:2], arc_training.tasks["d037b0a7"].train[2]
    one, every = builder.example(pairs, target), builder.example(pairs, target, all_outputs=True)
    assert (one.input_ids == every.input_ids).all()
    context = np.where(one.labels == IGNORED, every.labels, IGNORED)
    labelled = context[context != IGNORED]
    assert builder.text_of(labelled.tolist()).startswith(builder.encoder.encode(pairs[1].output))
    assert len(labelled) == len(builder.grid_ids(pairs[1].output)) + 1
    assert (every.labels[one.labels != IGNORED] == one.labels[one.labels != IGNORED]).all()


@pytest.mark.parametrize("side, name", [("inputs", "Input"), ("outputs", "Output")])
def test_grids_of_one_side_are_these_texts_and_each_learnt_one_has_the_token_that_ends_it(build, tokenizer, side, name):
    shown, asked, end = (grid(1, 2, 1), grid(2, 1, 2)), grid(1, 1, 3), tokenizer.eos_token
    compact, chat = build("compact", "digits"), build("chat", "digits")
    made = compact.side_example(side, shown, asked, True)
    assert compact.text_of(made.input_ids[:-1].tolist()) == "{0}\n11{1}{0}\n2\n2{1}{0}\n3".format(name[0], end)
    assert compact.text_of(made.labels[made.labels != IGNORED].tolist()) == f"2\n2{end}3{end}"
    made, one_more = chat.side_example(side, shown, asked, True), f"New {name.lower()}:"
    said = f"Find what these {side} have in common and write one more.\n{one_more}", "11", one_more, "2\n2", one_more
    roles = ("system", "user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, (SYSTEM, *said), strict=True)]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.text_of(made.input_ids.tolist()) == f"{whole}3{end}"
    assert chat.text_of(made.labels[made.labels != IGNORED].tolist()) == f"2\n2{end}3{end}"
