"""The canary's judgement and the order of dtypes: `python -m pytest tests/test_precision.py`."""

import json
import math

import pytest

from arc_kernel import precision

GRID = {32, 33}
CONSTANT = ([0] * precision.CANARY_TOKENS, -1.0)


def test_a_logprob_that_is_not_finite_is_wrong_in_every_dtype():
    for last in (False, True):
        for bad in (math.nan, -math.inf):
            assert "not finite" in precision.judge([([32, 33], -1.0), ([5], bad)], GRID, last)


def test_one_token_over_and_over_is_wrong_while_another_dtype_is_left():
    assert precision.judge([CONSTANT, CONSTANT], GRID, last=False) == "every answer repeats token 0"
    assert precision.judge([CONSTANT, CONSTANT], GRID, last=True) == ""


def test_a_grid_of_zeros_and_short_answers_are_healthy():
    assert precision.judge([([32] * precision.CANARY_TOKENS, -1.0)], GRID, last=False) == ""
    assert precision.judge([([7, 7], -1.0)], GRID, last=False) == ""
    assert precision.judge([CONSTANT, ([0, 5] * precision.CANARY_TOKENS, -1.0)], GRID, last=False) == ""


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32", "auto"])
def test_dtypes_start_with_the_wanted_one_and_end_with_float32(wanted):
    tried = precision.candidates(wanted, "cpu")
    native = precision.native_bfloat16("cpu")
    assert tried[0] == (wanted if wanted != "auto" else "bfloat16" if native else "float16")
    assert tried[-1] == "float32" and len(set(tried)) == len(tried)
    assert "float16" not in tried[1:] and ("bfloat16" not in tried[1:] or native)


def test_verdict_file_says_what_was_tried(tmp_path):
    precision.Precision("float32", ({"dtype": "float16", "ok": False, "seen": "logprob is not finite"},)).save(tmp_path / "precision.json")
    assert json.loads((tmp_path / "precision.json").read_text())["evidence"][0]["dtype"] == "float16"
