"""Models for tests: a tiny random one of the real architecture with the real tokenizer, and ones that overflow or are NaN."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def tiny_model(real: Path, folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """A random Llama of 3M weights (6M where the head is not `tied`) with the tokenizer of `real`, saved in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2)
    return save(LlamaForCausalLM(config).to(torch.bfloat16), real, folder)


def model_with_buffers(real: Path, folder: Path) -> Path:
    """A random Gemma 4 for text, which scales each layer by a number that is no parameter; transformers 5 only."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    config = Gemma4TextConfig(vocab_size=49152, vocab_size_per_layer_input=49152, hidden_size=64, hidden_size_per_layer_input=16,
                              intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                              global_head_dim=32, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
                              sliding_window=16, initializer_range=0.2, max_position_embeddings=8192)
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.5)
    return save(model, real, folder)


def overflowing_model(real: Path, folder: Path, log2: int = 6) -> Path:
    """`real` with its residual stream times 2**log2: the same function, beyond float16's range at 6."""
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16)
    scale = 2.0**log2
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
        model.model.norm.weight.div_(scale)
    model.config.rms_norm_eps *= scale**2
    return save(model, real, folder)


def nan_model(tiny: Path, folder: Path) -> Path:
    """A tiny model whose last norm is NaN: no dtype helps it."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return save(model, tiny, folder)


def save(model, tokenizer_from: Path, folder: Path) -> Path:
    """Write a model of transformers with the tokenizer of another folder."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copy(tokenizer_from / name, folder)
    return folder
