"""A chat template for a model without one: its special tokens, their rows in embedding and head, where generation stops.

Knows templates and token ids, nothing of prompts but the token that closes an answer.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ..errors import ArcKernelError
from ..grids import ENCODERS, GridEncoder
from ..prompts import PromptBuilder
from .draft import ROWS, Draft, Weights

# ChatML: github.com/openai/openai-python, chatml.md (v0.28); the loop is that of transformers' documentation on chat templates.
CHATML = ("{% for message in messages %}"
          "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# Llama 3: llama.com/docs/model-cards-and-prompt-formats/meta-llama-3: header of the role, two newlines, content, <|eot_id|>.
LLAMA3 = ("{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
          " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3}
BEGIN = "<|begin_of_text|>"  # Llama 3's bos_token, for a tokenizer that has none
MARKER = re.compile(r"<\|[^|<>\s]+\|>")  # what a template's special tokens look like


def add(draft: Draft, name: str) -> None:
    """Give the draft the chat template `name` (chatml, llama3, or a Jinja file) and what it needs.

    Markers it writes (`<|...|>`) become special tokens where they are none yet; the token that closes an answer becomes the end
    token, in config.json, generation_config.json and the tokenizer; pad token is the tokenizer's own where that is not the end
    token, else the end token of before. Raises ArcKernelError where the file cannot be read or the template cannot be used.
    """
    text = TEMPLATES.get(name) or _read(name)
    old_end, before = draft.tokenizer.get("eos_token"), draft.template
    if "bos_token" in text and not draft.tokenizer.get("bos_token"):
        draft.tokenizer["bos_token"] = BEGIN
    known = draft.ids()
    markers = list(dict.fromkeys([t for t in (draft.tokenizer.get("bos_token"),) if t == BEGIN] + MARKER.findall(text)))
    draft.backend.add_special_tokens(markers)
    draft.tokenizer["additional_special_tokens"] = list(dict.fromkeys([*draft.tokenizer.get("additional_special_tokens", []), *markers]))
    draft.template = text
    draft.report.append(f"chat template: {name}, {'instead of the one there was' if before else 'there was none'}")
    loaded = draft.load_tokenizer()
    try:
        end = loaded.convert_ids_to_tokens(PromptBuilder(loaded, GridEncoder.from_name(ENCODERS[0]), "chat").end_token)
    except ArcKernelError as error:  # it names the folder in the making, and another prompt as the mend
        reason = str(error).removeprefix(f"{draft.folder}: ").rpartition(": ")[0]
        raise ArcKernelError(f"{name}: {reason}: give another template") from None
    _name_roles(draft, old_end, end)
    named = (end, draft.tokenizer.get("bos_token"))
    draft.tokenizer["additional_special_tokens"] = [t for t in draft.tokenizer["additional_special_tokens"] if t not in named]
    new = [t for t in markers if t not in known]
    _cover(draft, sorted(draft.backend.token_to_id(t) for t in new), end if end in new else None, known)


def cover(draft: Draft) -> None:
    """Give every token of the tokenizer a row in embedding and head, where there are fewer rows than ids."""
    known, rows = draft.ids(), int(draft.config.get("vocab_size") or 0)
    _cover(draft, sorted(i for i in known.values() if rows and i >= rows), None, known)


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        kinds, reason = " nor ".join(TEMPLATES), getattr(error, "strerror", None) or error
        raise ArcKernelError(f"{name}: neither {kinds} nor a template that can be read ({reason}): give one of these") from None


def _name_roles(draft: Draft, old_end: str | None, end: str) -> None:
    pad = draft.tokenizer.get("pad_token")
    if pad in (None, end) or draft.backend.token_to_id(pad) is None:
        pad = old_end or end
    shown = lambda token: "none" if token is None else f"{token} ({draft.backend.token_to_id(token)})"
    padding = f"{shown(draft.tokenizer.get('pad_token'))} -> {shown(pad)}"
    draft.report.append(f"end token: {shown(old_end)} -> {shown(end)}, pad token: {padding}, "
                        "in config.json, generation_config.json and tokenizer")
    draft.name_token("eos_token", end)
    draft.name_token("pad_token", pad)
    if draft.tokenizer.get("bos_token"):
        draft.name_token("bos_token", draft.tokenizer["bos_token"])


def _cover(draft: Draft, new: list[int], end: str | None, known: dict[str, int]) -> None:
    """Plan rows for the tokens `new`; `end` is the one among them that closes an answer, `known` are the tokens of before."""
    if not new:
        return
    rows = int(draft.config["vocab_size"])
    size, old = max(rows, new[-1] + 1), sorted(i for i in known.values() if i < rows and i not in new)
    draft.stages.append(functools.partial(_grown, size=size, old=old, new=new, end=draft.backend.token_to_id(end) if end else None))
    draft.config["vocab_size"] = size
    names = ", ".join(f"{draft.backend.id_to_token(i)} ({i})" for i in new)
    grown = f"{rows} -> {size} rows" if size > rows else f"in {rows} rows, some without a token"
    apart = f"; {end}'s moved off it at random by as much as rows differ, or its logit would be that of the other new tokens" if end else ""
    draft.report.append(f"new tokens: {names}; embedding (and an untied head) {grown}, "
                        f"theirs from the mean of the {len(old)} known tokens' rows{apart}")


def _grown(weights: Weights, size: int, old: list[int], new: list[int], end: int | None) -> Weights:
    """The stream with embedding and head at `size` rows, those of `new` from the mean of `old`.

    Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models": with the mean, a new token changes
    the odds of the others little. `end` gets the mean plus noise of the rows' own spread: a LoRA trains no rows, so a head with
    equal rows could never choose it over the other new tokens.
    """
    import torch

    for name, tensor in weights:
        if name.endswith(ROWS):
            wide, noise = tensor.new_zeros(size, *tensor.shape[1:]), torch.Generator().manual_seed(0)
            wide[: len(tensor)] = tensor
            spread, mean = torch.std_mean(tensor[old].float(), dim=0)
            wide[new] = mean.to(tensor.dtype)
            if end is not None:
                wide[end] = (mean + spread * torch.randn(mean.shape, generator=noise)).to(tensor.dtype)
            tensor = wide
        yield name, tensor
