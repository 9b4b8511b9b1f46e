"""Do vLLM and transformers give the same answers, with and without a LoRA, for the architectures that small models have?

    python -m benchmarks.architectures [--only olmo2,smollm3]       # half a minute each on a core

A model of four layers is made of each with random weights, and a LoRA of random matrices on the projections that test-time training
adapts. Both backends answer the same prompts in float32, base and LoRA in one batch; printed are how many of the answers are equal, and
how far the logprobs of the tokens before the first difference are apart (nats; seen where all is well: up to 0.001). Where vLLM refuses a
model, its words stand there; a run answers it with transformers then. Each row is a process of its own. To be run where the release of
vLLM or transformers changes; it needs no GPU, and says nothing of a GPU's kernels.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from arc_kernel import generate, vllm_engine
from arc_kernel.adapt import TARGET_MODULES
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.errors import first_line
from arc_kernel.settings import LongHelp

SIZES = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
         "initializer_range": 0.15}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
WINDOW = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
SCALED = {"embedding_multiplier": 6.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.05}
MADE = {  # what is shown: model_type and what its config has beside SIZES
    "llama": ("llama", {}), "llama, tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}), "mistral, window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}), "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {}), "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 64}),
    "gemma3_text": ("gemma3_text", WINDOW), "smollm3": ("smollm3", {"no_rope_layer_interval": 2}), "granite": ("granite", SCALED),
    "olmo": ("olmo", {"clip_qkv": 3.0}), "olmo2": ("olmo2", {}), "olmo3": ("olmo3", {"sliding_window": 64}), "phi3": ("phi3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 64}), "ernie4_5": ("ernie4_5", {"use_bias": False}), "helium": ("helium", {}),
    "exaone4": ("exaone4", {"sliding_window": 64, "sliding_window_pattern": 4}), "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "seed_oss": ("seed_oss", {}), "nemotron": ("nemotron", {}), "cohere": ("cohere", {"logit_scale": 0.5}), "arcee": ("arcee", {}),
    "glm4": ("glm4", {"attention_bias": True}), "apertus": ("apertus", {}), "vaultgemma": ("vaultgemma", {"sliding_window": 64}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}), "gpt_neox": ("gpt_neox", {})}
RANK, ANSWER, CONTEXT, END = 8, 12, 512, 2
KEYS_AND_VALUES = 1 << 28  # bytes


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """A model of the kind, and a LoRA for it, as folders."""
    kind, more = MADE[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | more)).float()
    model.save_pretrained(folder / "model")
    targets = [t for t in TARGET_MODULES if any(n.endswith(f".{t}") for n, _ in model.named_modules())]
    if targets:
        adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM"))
        for weight in (p for n, p in adapted.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(weight, std=0.1)
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "model", folder / "adapter" if targets else None


def compared(name: str) -> str:
    """The row of an architecture."""
    with tempfile.TemporaryDirectory() as scratch:
        model, adapter = made(name, Path(scratch))
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in (100, 90, 120)]
        prompts = [Prompt((i, str(a)), ids, a) for i, ids in enumerate(tokens) for a in dict.fromkeys([None, adapter])]
        settings = EngineSettings(model, "float32", CONTEXT, END, RANK if adapter else 0)
        vllm_engine.CPU_KV_BYTES = KEYS_AND_VALUES
        given = {}
        for backend in ("transformers", "vllm"):
            try:
                engine = generate.start_engine(backend, settings, "cpu")
                given[backend] = {a.prompt.key: a for a in engine.answer(iter(prompts), ANSWER)}
                engine.close()
            except Exception as error:
                return f"{backend}: {type(error).__name__}: {first_line(error)}"[:150]
    equal, apart = 0, 0.0
    for key, one in given["vllm"].items():
        other = given["transformers"][key]
        same = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids)) if a != b), len(one.token_ids))
        equal += one.token_ids == other.token_ids
        apart = max([apart, *(abs(a - b) for a, b in zip(one.logprobs[:same + 1], other.logprobs))])
    return f"{equal} of {len(prompts)} answers equal, {'base and LoRA' if adapter else 'no LoRA'}, logprobs within {apart:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--only", default="", help="names of the table, comma-separated; for variants the name before the comma")
    parser.add_argument("--one", default="", help="one row, in this process")
    options = parser.parse_args()
    if options.one:
        print(f"row: {compared(options.one)}")
        return
    asked = [name for name in MADE if not options.only or name.partition(",")[0] in options.only.split(",")]
    if not asked:
        raise SystemExit(f"--only: none of {', '.join(MADE)}")
    for name in asked:
        done = subprocess.run([sys.executable, "-m", "benchmarks.architectures", "--one", name], capture_output=True, text=True)
        rows = [line.removeprefix("row: ") for line in done.stdout.splitlines() if line.startswith("row: ")]
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        print(f"{name:26}{rows[0] if rows else f'ended with status {done.returncode}: {last[:100]}'}", flush=True)


if __name__ == "__main__":
    main()
