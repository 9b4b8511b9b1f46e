"""The six checkpoints a person would start from, as tiny random ones in the layout in which they are published.

Config keys, tensor names and tokenizer kind are the public ones; sizes are cut to two layers and a small vocabulary. Head
sizes are those vLLM's CPU attention takes. Which quirk each has is said at its config.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from arc_kernel.prompts import QUESTION, SYSTEM

CHATML = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
          "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
WORDS = f"{QUESTION} {SYSTEM} Input Output Test input output system user assistant grid".replace(".", " .").split()
LLAMA = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
         "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "use_cache": True,
         "torch_dtype": "bfloat16", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
         "model_type": "qwen2", "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 448, "intermediate_size": 512,
         "num_hidden_layers": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
         "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
         "max_window_layers": 2, "sliding_window": 32768}

CONFIGS = {
    # a base model with Llama-2's tokenizer: no chat template, no markers, no pad token; a head of its own
    "AMD-Llama-135m": LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 384, "intermediate_size": 256,
                               "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
                               "tie_word_embeddings": False},
    # 9 heads, 3 key/value heads, tied
    "SmolLM-135M-Instruct": LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 288, "intermediate_size": 256,
                                     "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048,
                                     "tie_word_embeddings": True},
    # a sliding window of 32 tokens, four heads to a key/value head
    "TinyMistral-248M-Instruct": {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
                                  "hidden_act": "silu", "hidden_size": 256, "initializer_range": 0.02, "intermediate_size": 512,
                                  "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 8,
                                  "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
                                  "sliding_window": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    # code of its own, heads and feed-forward by layer, float32, and no tokenizer in its folder (Llama-2's is put there)
    "OpenELM-270M": {"activation_fn_name": "swish", "architectures": ["OpenELMForCausalLM"],
                     "auto_map": {"AutoConfig": "configuration_openelm.OpenELMConfig",
                                  "AutoModelForCausalLM": "modeling_openelm.OpenELMForCausalLM"},
                     "bos_token_id": 1, "eos_token_id": 2, "ffn_dim_divisor": 16, "ffn_multipliers": [0.5, 2.0, 4.0], "ffn_with_glu": True,
                     "head_dim": 32, "initializer_range": 0.02, "max_context_length": 2048, "model_dim": 64, "model_type": "openelm",
                     "normalization_layer_name": "rms_norm", "normalize_qk_projections": True, "num_gqa_groups": 4,
                     "num_kv_heads": [1, 2, 3], "num_query_heads": [4, 8, 12], "num_transformer_layers": 3,
                     "qkv_multipliers": [0.5, 1.0], "rope_freq_constant": 10000, "rope_max_length": 4096,
                     "share_input_output_layers": True, "torch_dtype": "float32", "use_cache": True},
    # biases of q, k and v, tied
    "NanoLM-0.3B-Instruct-v2": QWEN2 | {"max_position_embeddings": 4096},
    "Qwen2.5-0.5B-Instruct": QWEN2,
}
NEEDS_TEMPLATE = ("AMD-Llama-135m", "TinyMistral-248M-Instruct", "OpenELM-270M")


def standin(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the stand-in of a published checkpoint as `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(CONFIGS[name])
    make = sentencepiece_tokenizer if name in NEEDS_TEMPLATE else byte_level_tokenizer
    tokens = make(folder, config["model_type"])
    config["vocab_size"] = tokens + (64 if config["model_type"] == "qwen2" else 0)  # Qwen's embedding has more rows than there are tokens
    if config["model_type"] == "qwen2":
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id
        config |= {"bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>")}
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids("<|im_end|>"), ids("<|endoftext|>")],
                                                                   "pad_token_id": ids("<|endoftext|>")}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    torch.manual_seed(seed)
    weights = openelm_weights(config) if name.startswith("OpenELM") else native_weights(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def native_weights(folder: Path) -> dict:
    """Random weights for a config transformers knows, large enough for answers that are no ties."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    noise = {name: torch.randn(weight.shape) * 0.1 for name, weight in model.named_parameters()}
    return {name: (1 + part if "norm" in name else part).to(torch.bfloat16) for name, part in noise.items()}


def openelm_weights(config: dict) -> dict:
    """Random weights under OpenELM's names; its causal mask is no part of the checkpoint."""
    d, head, made = config["model_dim"], config["head_dim"], {}
    for i, (q, k, m) in enumerate(zip(config["num_query_heads"], config["num_kv_heads"], config["ffn_multipliers"])):
        units, at = int(m * d), f"transformer.layers.{i}."
        for part, shape in {"attn.qkv_proj": ((q + 2 * k) * head, d), "attn.out_proj": (d, q * head),
                            "ffn.proj_1": (2 * units, d), "ffn.proj_2": (d, units)}.items():
            made[f"{at}{part}.weight"] = torch.randn(shape) * 0.1
        made |= {f"{at}{part}.weight": 1 + 0.1 * torch.randn(size)
                 for part, size in {"attn.q_norm": head, "attn.k_norm": head, "attn_norm": d, "ffn_norm": d}.items()}
    return made | {"transformer.token_embeddings.weight": torch.randn(config["vocab_size"], d) * 0.3,
                   "transformer.norm.weight": 1 + 0.1 * torch.randn(d)}


def sentencepiece_tokenizer(folder: Path, kind: str) -> int:
    """Llama-2's kind: a BPE of pieces with U+2581 for a space, one in front of every text, bytes for what has no piece."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=list("0123456789x<|>_:`"), show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)),
              *(t for t in sorted(learnt["vocab"], key=learnt["vocab"].get) if t != "<unk>")]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(pieces)}, [tuple(m) for m in learnt["merges"]],
                                   unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    token = lambda t: {"__type": "AddedToken", "content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": token("<s>"), "clean_up_tokenization_spaces": False,
              "eos_token": token("</s>"), "legacy": False, "model_max_length": 1000000000000000019884624838656, "pad_token": None,
              "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": token("<unk>")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(pieces)


def byte_level_tokenizer(folder: Path, kind: str) -> int:
    """GPT-2's kind with digits one by one, as SmolLM (llama) and Qwen have it: markers in front, or behind the vocabulary."""
    qwen, markers = kind == "qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    words = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.normalizer, backend.decoder = normalizers.NFC() if qwen else None, decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated") if qwen else pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)])
    backend.train_from_iterator([" ".join(WORDS)],
                                trainers.BpeTrainer(vocab_size=500, special_tokens=[] if qwen else markers, show_progress=False,
                                                    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens(markers)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))
    config = {"tokenizer_class": "Qwen2Tokenizer" if qwen else "GPT2Tokenizer", "chat_template": CHATML, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>" if qwen else "<|im_end|>", "bos_token": None if qwen else "<|im_start|>",
              "unk_token": None if qwen else "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
              "clean_up_tokenization_spaces": False, "model_max_length": 2048, "errors": "replace", "add_prefix_space": False,
              "added_tokens_decoder": {str(backend.token_to_id(t)): {"content": t, "special": True} for t in markers}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return backend.get_vocab_size(with_added_tokens=True)


def gguf_of(folder, path):
    """Write a model folder of Llama's architecture as a GGUF in float32; returns the folder."""
    from gguf import GGUFWriter

    config, tokenizer, weights = (json.loads((folder / "config.json").read_text()),
                                  json.loads((folder / "tokenizer.json").read_text()),
                                  load_file(folder / "model.safetensors"))
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocab = tokenizer["model"]["vocab"]
    writer.add_token_list(sorted(vocab, key=vocab.get))
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(vocab))])
    writer.add_token_merges([" ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for name, weight in weights.items():
        inner = name.removesuffix(".weight")
        layer = inner.split(".")[2] if ".layers." in inner else None
        known = names[inner if layer is None else inner.split(".", 3)[3]]
        if known in ("attn_q", "attn_k"):  # GGUF keeps the two halves of a head's rope interleaved
            count = heads if known == "attn_q" else kv
            weight = weight.view(count, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{known}.weight" if layer is None else f"blk.{layer}.{known}.weight", weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder
