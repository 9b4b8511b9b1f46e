"""A model is asked as it was fine-tuned: `python -m pytest tests/test_trained_prompt.py`."""

import json

import pytest

from arc_kernel import merge, trained_prompt
from arc_kernel.errors import ArcKernelError
from arc_kernel.finetune import run as finetuning
from arc_kernel.finetune.settings import FinetuneSettings
from arc_kernel.kaggle import datasets
from arc_kernel.run import Run
from arc_kernel.settings import Settings
from models import tiny_model
from runs import SMALL, TRAINING

COMPACT = {"prompt": "compact", "grid_encoder": "digits"}


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A LoRA of one step with compact prompts."""
    settings = FinetuneSettings(data=(TRAINING,), model=str(tiny), out=str(tmp_path_factory.mktemp("runs") / "run"), steps=1, batch=1,
                                lora_rank=4, evaluation_tasks="", max_seq_len=512, max_too_long=1.0, **COMPACT)
    return finetuning.finetune(settings)["result"]


def asked(tmp_path, **options):
    """Prompt and encoder that a run with these settings uses and stores."""
    made = Run(Settings(tasks=TRAINING, task_ids=SMALL, out=str(tmp_path), **options))
    stored = json.loads((tmp_path / "settings.json").read_text())
    assert (stored["prompt"], stored["grid_encoder"]) == (made.settings.prompt, made.encoder.name)
    return {"prompt": made.settings.prompt, "grid_encoder": made.encoder.name}


def test_adapter_and_merged_model_and_their_bundles_are_asked_as_they_were_trained(tiny, adapter, tmp_path):
    merge.merge(tiny, adapter, tmp_path / "merged")
    say = lambda line: None
    weights = datasets.build_weights(tmp_path / "bundles", str(tmp_path / "merged"), "someone", say) / "model"
    lora = datasets.build_adapter(tmp_path / "bundles", adapter, "someone", say) / "adapter"
    for number, (model, start) in enumerate(((tiny, adapter), (tmp_path / "merged", ""), (weights, ""), (tiny, lora))):
        assert asked(tmp_path / str(number), model=str(model), adapter=str(start)) == COMPACT


def test_what_was_never_fine_tuned_is_asked_by_chat_and_who_says_otherwise_is_obeyed(tiny, adapter, tmp_path):
    assert asked(tmp_path / "plain", model=str(tiny)) == trained_prompt.FRESH
    told = {"prompt": "chat", "grid_encoder": "rows+spaced"}
    assert asked(tmp_path / "told", model=str(tiny), adapter=str(adapter), **told) == told


def test_fine_tuning_goes_on_as_it_began(tiny, adapter):
    going_on = trained_prompt.resolved(FinetuneSettings(data=(TRAINING,), model=str(tiny), adapter=str(adapter)))
    assert {"prompt": going_on.prompt, "grid_encoder": going_on.grid_encoder} == COMPACT


def test_adapter_says_how_it_is_asked_before_the_model(tmp_path):
    for name, encoder in (("model", "digits"), ("adapter", "spaced")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trained_prompt.json").write_text(json.dumps(COMPACT | {"grid_encoder": encoder}))
    assert trained_prompt.choose("auto", "auto", str(tmp_path / "model"), str(tmp_path / "adapter")) == ("compact", "spaced")


@pytest.mark.parametrize("text", ["{", "[]", '{"prompt": "compact"}', '{"prompt": "loud", "grid_encoder": "digits"}'])
def test_damaged_record_is_named(tmp_path, text):
    (tmp_path / "trained_prompt.json").write_text(text)
    with pytest.raises(ArcKernelError, match="trained_prompt.json: not the prompt of a fine-tuning run: delete it"):
        trained_prompt.choose("auto", "auto", str(tmp_path), "")
