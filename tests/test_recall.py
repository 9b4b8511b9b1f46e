"""Recall over a distance: what is asked, and how it is judged: `python -m pytest tests/test_recall.py`."""

import json

import numpy as np
import pytest
import torch

from arc_kernel import checkpoint
from arc_kernel.errors import ArcKernelError
from arc_kernel.finetune import recall
from arc_kernel.prompts import IGNORED, default_builder
from models import tiny_model
from standins import standin


@pytest.mark.parametrize("tokens", (60, 100, 1000))
def test_an_example_states_a_number_once_near_its_start_and_asks_for_it_at_its_end(tokenizer, tokens):
    for example in recall.recall_examples(default_builder(tokenizer, "digits"), tokens, 5, 0):
        assert len(example.input_ids) == tokens
        at = np.flatnonzero(example.labels != IGNORED)
        number = tokenizer.decode(example.input_ids[at[:-1]])
        text = tokenizer.decode(example.input_ids)
        assert len(number) == recall.DIGITS and number.isdigit() and (example.input_ids[at] == example.labels[at]).all()
        assert (text.count(number) == 3 and f"The pass key is {number}. Remember it." in text
                and text.endswith(f"The pass key is {number}<|im_end|>"))
        assert text.index(number) < 80 and at[-1] == tokens - 1 and example.labels[-1] == tokenizer.eos_token_id


def test_a_tokenizer_that_begins_each_text_with_a_space_puts_none_into_the_number(tmp_path):
    tokenizer = checkpoint.load_tokenizer(standin("AMD-Llama-135m", tmp_path / "amd"))
    for example in recall.recall_examples(default_builder(tokenizer, "digits"), 200, 3, 0):
        number = tokenizer.convert_ids_to_tokens(example.input_ids[example.labels != IGNORED][:-1].tolist())
        assert len(number) == recall.DIGITS and "".join(number).isdigit()
        assert f"The pass key is {''.join(number)}. Remember it." in tokenizer.decode(example.input_ids)


def test_examples_are_different_and_repeatable_and_too_few_tokens_are_refused(tokenizer):
    one, other = (recall.recall_examples(default_builder(tokenizer, "digits"), 100, 8, seed=3) for _ in range(2))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, other))
    assert len({e.input_ids.tobytes() for e in one}) == 8
    with pytest.raises(ArcKernelError, match=r"recall:20: shorter than statement and question: give \d\d or more tokens"):
        recall.recall_examples(default_builder(tokenizer, "digits"), 20, 1, 0)


def test_recall_is_what_greedy_decoding_gives(tokenizer, model_folder):
    """The embedded model at a short distance: exactly recalled where generate gives the number."""
    from arc_kernel.checkpoint import load_model

    rows = recall.recall_by_distance(model_folder, None, [64, 120], 2, 1, "float32", "cpu")
    model = load_model(model_folder, "float32", "cpu")
    for row in rows:
        right = 0
        for example in recall.recall_examples(default_builder(tokenizer, "digits"), row["tokens"], 2, 1):
            asked = int((example.labels != IGNORED).argmax())
            made = model.generate(torch.from_numpy(example.input_ids[None, :asked]), attention_mask=torch.ones(1, asked, dtype=torch.long),
                                  max_new_tokens=recall.DIGITS, do_sample=False, pad_token_id=0)[0, asked:]
            right += made.tolist() == example.labels[asked:-1].tolist()
        assert row["recalled"] == right / 2 and row["count"] == 2
    assert rows[0]["distance"] < rows[1]["distance"] < 120 and sum(r["recalled"] for r in rows) > 0


def test_a_model_that_knows_nothing_recalls_nothing(model_folder, tmp_path):
    (row,) = recall.recall_by_distance(tiny_model(model_folder, tmp_path / "tiny"), None, [80], 2, 0, "float32", "cpu")
    assert row["recalled"] == 0 and row["loss"] > 5


def test_evaluate_recall_prints_a_row_a_length_and_says_what_it_needs(model_folder, tmp_path, capsys):
    from arc_kernel.__main__ import main

    tiny, out = str(tiny_model(model_folder, tmp_path / "tiny")), tmp_path / "recall.json"
    assert main(["evaluate", "--tasks", "recall:80,120", "--model", tiny, "--count", "2", "--json", str(out)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["tokens", "distance", "recalled"] and [r.split()[0] for r in rows] == ["80", "120"]
    assert [r["tokens"] for r in json.loads(out.read_text())["rows"]] == [80, 120]
    for arguments, said in ((["--tasks", "recall:x", "--model", tiny], "recall takes numbers of tokens"),
                            (["--tasks", "recall:80"], "give --model"), ([], "give output folders of solve"),
                            ([str(tmp_path), "--model", tiny], "go with --tasks recall")):
        assert main(["evaluate", *arguments]) == 1
        assert said in capsys.readouterr().err
