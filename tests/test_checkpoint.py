"""Model folders and the embedded model: `python -m pytest tests/test_checkpoint.py`."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.integrations import sdpa_attention

from arc_kernel import checkpoint
from arc_kernel.device import repeat_keys, require_own_gpu
from arc_kernel.errors import ArcKernelError
from arc_kernel.files import whole_folder, write_json
from arc_kernel.precision import probe
from models import save, tiny_model
from standins import standin


def test_embedded_model_is_whole_and_is_converted_only_once(model_folder):
    before = {p: p.stat().st_mtime_ns for p in model_folder.iterdir()}
    assert checkpoint.embedded_model().resolve() == model_folder.resolve()
    assert {p: p.stat().st_mtime_ns for p in model_folder.iterdir()} == before
    assert checkpoint.parameter_count(model_folder) == 134_515_008
    assert checkpoint.context_length(model_folder) == 8192
    assert not [p for p in model_folder.parent.iterdir() if p.name.startswith(f".{model_folder.name}")]


def test_embedded_model_reads_the_same_on_transformers_4_and_5(model_folder):
    config = checkpoint.read_config(model_folder)
    assert config["rope_theta"] == 100_000 and "rope_parameters" not in config and config["torch_dtype"] == "bfloat16"
    assert json.loads((model_folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_embedded_tokenizer_has_the_special_tokens_of_its_chat_template(tokenizer):
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token) == ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    ids = tokenizer("3x3\n1 0<|im_end|>", add_special_tokens=False).input_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids) == "3x3\n1 0<|im_end|>"


def test_model_of_transformers_5_is_refused_where_4_would_misread_it(model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = checkpoint.read_config(folder)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.6")
    with pytest.raises(ArcKernelError, match="rope_parameters.*prepare"):
        checkpoint.check_model(folder)
    checkpoint.make_portable(folder)
    checkpoint.check_model(folder)
    assert checkpoint.read_config(folder)["rope_theta"] == 100_000


def test_special_tokens_without_a_role_read_the_same_on_transformers_4_and_5(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<file_sep>"]}))
    checkpoint.make_portable(folder)
    assert "<file_sep>" in checkpoint.load_tokenizer(folder).all_special_tokens


def test_opening_a_model_shows_no_bar_and_leaves_those_of_others(model_folder, tmp_path, capfd):
    folder = tiny_model(model_folder, tmp_path / "tiny")
    capfd.readouterr()
    checkpoint.load_model(folder, "float32", "cpu")
    assert not capfd.readouterr().err and transformers.utils.logging.is_progress_bar_enabled()


def test_old_gpus_attend_with_a_key_for_every_query_and_compute_the_same(model_folder, tmp_path, monkeypatch):
    model = checkpoint.load_model(tiny_model(model_folder, tmp_path / "tiny"), "float32", "cpu")
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)  # put back afterwards
    attend, heads = torch.nn.functional.scaled_dot_product_attention, []

    def seen(query, key, value, **options):
        heads.append((query.shape[1], key.shape[1]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        heads.clear()
        repeat_keys()
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    assert heads == [(2, 2)] * 2


def test_scores_are_capped_where_the_config_says_so_and_looking_at_them_changes_nothing(model_folder, tmp_path):
    """Gemma 2's attention: transformers' sdpa passes the cap over."""
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=32,
                          num_key_value_heads=1, initializer_range=0.5, query_pre_attn_scalar=1, attn_logit_softcapping=50.0)
    folder, ids, found = save(Gemma2ForCausalLM(config), model_folder, tmp_path / "gemma2"), torch.arange(100, 140)[None], []
    for cap in (50.0, 0.5):
        write_json(folder / "config.json", checkpoint.read_config(folder) | {"attn_logit_softcapping": cap})
        model = checkpoint.load_model(folder, "float32", "cpu")
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with probe.recording(model, scores=True) as peaks:
                during = model(input_ids=ids).logits
            after = model(input_ids=ids).logits
        assert torch.equal(before, during) and torch.equal(before, after) and probe.collected(peaks)["scores"][0] > 0.5
        found.append(before)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_tensor_of_another_shape_is_named_with_both(model_folder, tmp_path):
    folder = tiny_model(model_folder, tmp_path / "tiny")
    checkpoint.check_model(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArcKernelError, match=r"tensor model.norm.weight has shape \[3\], config.json says \[64\]: copy the model again"):
        checkpoint.load_model(folder, "float32", "cpu")


def test_tokenizer_that_transformers_5_saved_opens_on_4(model_folder, tmp_path):
    """Under the class it names there, with the special tokens without a role in a list."""
    folder = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<file_sep>"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    asked, found = (checkpoint.load_tokenizer(f) for f in (model_folder, folder))
    text = [{"role": "user", "content": "Input 1:\n 3x3\n\n1 123 4\n"}]
    assert found.apply_chat_template(text, tokenize=False) == asked.apply_chat_template(text, tokenize=False)
    assert found(checkpoint.SAMPLE).input_ids == asked(checkpoint.SAMPLE).input_ids
    assert found.eos_token == asked.eos_token and "<file_sep>" in found.all_special_tokens


def test_a_reason_that_begins_with_an_empty_line_is_told_and_one_without_words_by_its_name(tmp_path, monkeypatch):
    for error, said in ((ImportError("\nneeds sentencepiece:\npip install it"), "needs sentencepiece:"), (RuntimeError(), "RuntimeError")):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(ArcKernelError, match=f"tokenizer cannot be loaded: {said}$"):
            checkpoint.load_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "GPT2Tokenizer"])
def test_prompt_keeps_its_spaces_and_lines_whatever_class_the_config_names(model_folder, tmp_path, named):
    folder = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    text = [{"role": "user", "content": "Input 1:\n 3x3\n\n1 123 4\n"}]
    asked, found = (checkpoint.load_tokenizer(f) for f in (model_folder, folder))
    assert found.apply_chat_template(text, tokenize=False) == asked.apply_chat_template(text, tokenize=False)
    prompt = found.apply_chat_template(text, tokenize=False)
    ids = found(prompt, add_special_tokens=False).input_ids
    assert ids == asked(prompt, add_special_tokens=False).input_ids and found.decode(ids) == prompt
    assert (found.eos_token, found.eos_token_id) == (asked.eos_token, asked.eos_token_id)


@pytest.mark.parametrize("legacy", [False, True, None])
def test_space_after_a_special_token_is_the_files_whatever_the_class_makes_of_legacy(tmp_path, legacy):
    folder = standin("AMD-Llama-135m", tmp_path / "llama")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizerFast", "legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found, published = checkpoint.load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"{found.bos_token}user\n1 2{found.eos_token}\n3"
    assert found(text, add_special_tokens=False).input_ids == published.encode(text, add_special_tokens=False).ids


def test_shard_named_by_the_index_and_missing_is_named(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ArcKernelError, match="model-00002-of-00002.safetensors: named by the index and missing"):
        checkpoint.check_model(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.bias": "model.safetensors"}}))
    with pytest.raises(ArcKernelError, match="tensor model.norm.bias is missing: model.safetensors.index.json needs it"):
        checkpoint.check_model(folder)
    for damaged in ('{"weight_map": ', "{}", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(ArcKernelError, match="model.safetensors.index.json: damaged .*: copy the model again"):
            checkpoint.check_model(folder)


def test_folder_that_nothing_can_replace_is_an_error_and_one_that_another_process_made_first_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError), whole_folder(Path(".")) as fresh:
        (fresh / "mine").touch()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "model") as fresh:
        (fresh / "mine").touch()
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["theirs"]


@pytest.mark.parametrize("changes, words", [
    ({"quantization_config": {"quant_method": "gptq"}}, "config.json: weights are quantized (gptq): take the checkpoint"),
    ({"hidden_act": "nothing"}, "model cannot be loaded: KeyError: 'nothing'")])
def test_config_no_model_can_be_made_of_is_one_line(model_folder, tmp_path, changes, words):
    folder = tiny_model(model_folder, tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps(checkpoint.read_config(folder) | changes))
    with pytest.raises(ArcKernelError) as raised:
        checkpoint.load_model(checkpoint.open_model(str(folder)), "float32", "cpu")
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_what_a_killed_process_left_of_a_folder_is_removed_where_it_is_made_again(tmp_path):
    for name, age in {".model.making-old": 7200, ".model.making-new": 60, ".model.mine": 7200, ".other.making-old": 7200}.items():
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with whole_folder(tmp_path / "model"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"model", ".model.making-new", ".model.mine", ".other.making-old"}


@pytest.mark.parametrize("device, given, cuda, lost", [("cpu", "1", "12.8", True), ("cpu", "1", None, False), ("cpu", "", "12.8", False),
                                                       ("cpu", "-1", "12.8", False), ("cuda", "1", "12.8", False)])
def test_worker_whose_gpu_is_lost_does_not_go_on_on_the_cpu(monkeypatch, device, given, cuda, lost):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(RuntimeError, match="GPU 1 cannot be used any more") if lost else contextlib.nullcontext():
        require_own_gpu(device)
