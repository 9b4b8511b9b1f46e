"""Recall over a distance: a number at the start, filler up to a given length, the question at the end. Does a context work?

`recall:<tokens>` is training data for `finetune` and a test for `evaluate`. Exact recall is judged from one forward pass over the
whole text: greedy decoding gives the number exactly where each of its tokens is the most likely one after those before it.

Source: the passkey task of Mohtashami and Jaggi 2023, "Landmark Attention" (arXiv 2305.16300, section 4.2), with its words.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import progress
from ..adapter_fit import check_fit, open_adapter
from ..checkpoint import load_model, load_tokenizer
from ..errors import ArcKernelError
from ..memory import free_memory
from ..prompts import IGNORED, Example, PromptBuilder, default_builder

DIGITS = 5
STATED = "The pass key is {}. Remember it. {} is the pass key.\n"
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
ASKED = "\nWhat is the pass key? The pass key is {}"
SPLIT = " "  # the answer's first digit comes after it, in a token of its own


def recall_examples(builder: PromptBuilder, tokens: int, count: int, seed: int) -> list[Example]:
    """`count` examples of `tokens` tokens each; loss is taken on the number and the end token.

    Raises ArcKernelError where so few tokens hold no question.
    """
    return [example(builder, tokens, np.random.default_rng((seed, index))) for index in range(count)]


def example(builder: PromptBuilder, tokens: int, rng: np.random.Generator) -> Example:
    """One example of exactly `tokens` tokens: the statement after none to two sentences, filler, the question, number, end."""
    ids_of = builder.ids_of
    number = str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))
    start = [t for _ in range(int(rng.integers(3))) for t in ids_of(FILLER[rng.integers(len(FILLER))] + " ")]
    stated = [t for part in STATED.replace("{}", "\0{}\0").split("\0") for t in (_digits(ids_of, number) if part == "{}" else ids_of(part))]
    question = list(ids_of(ASKED.format("").rstrip())) + list(ids_of(SPLIT))
    answer = [*_digits(ids_of, number), builder.end_token]
    room = tokens - len(stated) - len(question) - len(answer)
    if room < 0:
        raise ArcKernelError(f"recall:{tokens}: shorter than statement and question: give {tokens - room} or more tokens")
    start = start if len(start) <= room else []
    filler: list[int] = []
    while len(filler) < room - len(start):
        filler += ids_of(FILLER[rng.integers(len(FILLER))] + " ")
    ids = np.array([*start, *stated, *filler[: room - len(start)], *question, *answer], np.int64)
    labels = np.full(len(ids), IGNORED)
    labels[-len(answer):] = answer
    return Example(ids, labels)


def lengths_of(tasks: str) -> list[int]:
    """The lengths of `recall:<tokens>[,<tokens>...]`; raises ArcKernelError for anything else."""
    lengths = tasks.removeprefix("recall:").split(",")
    if not all(n.isdecimal() and int(n) for n in lengths):
        raise ArcKernelError(f"--tasks {tasks}: recall takes numbers of tokens: for example recall:2000,8000")
    return [int(n) for n in lengths]


def table(rows: list[dict]) -> str:
    """The rows of `recall_by_distance` as text."""
    lines = [f"{'tokens':>8}{'distance':>10}{'recalled':>10}{'of':>5}{'loss, nats/token':>18}"]
    return "\n".join(lines + [f"{r['tokens']:8}{r['distance']:10}{r['recalled']:10.0%}{r['count']:5}{r['loss']:18.3f}" for r in rows])


def recall_by_distance(model: Path, adapter: Path | None, lengths: list[int], count: int, seed: int, dtype: str, device: str) -> list[dict]:
    """For each length in tokens, the share of `count` numbers a model folder (with a LoRA, if any) recalls exactly.

    Rows {"tokens", "distance", "recalled", "count", "loss"}: `distance` is the mean number of tokens from the number's end to its
    question's, `loss` the nats per token of the number. Logits exist at the answer only, and no keys and values are kept, so that
    memory is that of one layer's activations.
    """
    import torch

    builder = default_builder(load_tokenizer(model), "digits")
    network = load_model(model, dtype, device)
    if adapter is not None:
        check_fit(adapter, model)
        network = open_adapter(network, adapter).eval()
    rows, shown = [], progress.bar(len(lengths) * count, "recall", "text")
    for tokens in lengths:
        made, right, lost, away = recall_examples(builder, tokens, count, seed), 0, 0.0, 0
        for one in made:
            at = np.flatnonzero(one.labels != IGNORED)[:-1]  # the number without the end token
            wanted = torch.from_numpy(one.labels[at]).to(device)
            with torch.no_grad():
                logits = network(input_ids=torch.from_numpy(one.input_ids[None, : at[-1] + 1]).to(device), use_cache=False,
                                 logits_to_keep=torch.from_numpy(at - 1).to(device)).logits[0].float()
            right += bool((logits.argmax(-1) == wanted).all())
            lost += float(torch.nn.functional.cross_entropy(logits, wanted))
            away += int(at[0]) - _stated_end(one.input_ids, one.labels[at])
            shown.update()
        rows.append({"tokens": tokens, "distance": round(away / count), "recalled": right / count, "count": count, "loss": lost / count})
    shown.close()
    del network
    free_memory()
    return rows


def _digits(ids_of, number: str) -> list[int]:
    """Token ids of a number, digit by digit, so that stated and asked for it is the same ids in any tokenizer."""
    return [t for digit in number for t in ids_of(digit)]


def _stated_end(ids: np.ndarray, number: np.ndarray) -> int:
    """Where the last statement of a number ends, before its question."""
    size = len(number)
    found = [i for i in range(len(ids) - 2 * size) if np.array_equal(ids[i:i + size], number)]
    return found[-1] + size
