"""The order of dtypes, the canary's judgement and the verdict's file: `python -m pytest tests/test_precision.py`."""

import math

import pytest
import torch

from arc_kernel.precision import verdict

REFERENCE = [([5, 6, 7, 8, 9], [-0.1] * 5), ([1, 2, 3, 4, 5], [-0.2] * 5)]


def answers(*changes):
    """The reference's answers with (prompt, position, token, logprob) changed."""
    made = [(list(ids), list(logprobs)) for ids, logprobs in REFERENCE]
    for prompt, position, token, logprob in changes:
        made[prompt][0][position], made[prompt][1][position] = token, logprob
    return made


def test_answers_like_the_reference_are_healthy():
    judged = verdict.judge(answers((1, 0, 1, -0.21)), REFERENCE, last=False)
    assert (judged.wrong, judged.agreement) == ("", 1.0) and judged.difference == pytest.approx(0.01)


def test_a_logprob_that_is_not_finite_is_wrong_in_every_dtype():
    for last in (False, True):
        for prompt, token, bad in ((1, 4, math.nan), (1, 4, -math.inf), (0, 8, math.nan)):
            assert verdict.judge(answers((prompt, 3, token, bad)), REFERENCE, last).wrong == "logprob is not finite"


def test_nan_answers_of_token_0_are_wrong():
    assert "not finite" in str(verdict.judge([([0], [math.nan])] * 2, REFERENCE, last=False))


def test_other_tokens_are_wrong_while_another_dtype_is_left_unless_they_tie():
    far, near = (answers((0, 0, 1, x), (1, 1, 9, x)) for x in (-3.0, -0.15))
    judged = verdict.judge(far, REFERENCE, last=False)
    assert judged.wrong == "answers differ from float32" and judged.agreement == pytest.approx(1 / 3)
    assert "33.3% of the reference's tokens, logprobs within 2.9" in str(judged)
    assert verdict.judge(far, REFERENCE, last=True).wrong == "" == verdict.judge(near, REFERENCE, last=False).wrong


def test_answer_that_ends_where_the_reference_goes_on_is_another_one():
    at_once, later = [([], [-0.6])] * 2, [(ids[:2], [*logprobs[:2], -3.0]) for ids, logprobs in REFERENCE]
    for ended, agreed in ((at_once, 0.0), (later, 2 / 3)):
        judged = verdict.judge(ended, REFERENCE, last=False)
        assert judged.wrong == "answers differ from float32" and judged.agreement == pytest.approx(agreed)
    assert verdict.judge(later, later, last=False).agreement == 1.0


def test_what_follows_the_first_difference_does_not_count():
    judged = verdict.judge(answers((0, 4, 1, -3.0)), REFERENCE, last=False)
    assert (judged.wrong, judged.agreement) == ("", 0.9)  # one token in ten, however far off, is no fault of a dtype
    later = verdict.judge(answers((0, 1, 1, -0.1), (0, 2, 77, -9.0)), REFERENCE, last=False)
    assert later.agreement == pytest.approx(6 / 7) and later.difference == pytest.approx(0.1 - 0.1)


@pytest.mark.parametrize("native, wanted, tried", [
    (True, "float16", ["float16", "bfloat16", "float32"]), (False, "float16", ["float16", "float32"]),
    (True, "bfloat16", ["bfloat16", "float32"]), (False, "bfloat16", ["bfloat16", "float32"]), (True, "float32", ["float32"])])
def test_dtypes_start_with_the_wanted_one_and_end_with_float32(monkeypatch, native, wanted, tried):
    monkeypatch.setattr(verdict, "native_bfloat16", lambda device: native)
    assert verdict.candidates(wanted, "cpu") == tried


@pytest.mark.parametrize("native, float32_costs, tried", [
    (True, 1.0, ["bfloat16", "float32"]), (False, 8.0, ["float16", "float32"]), (False, 1.1, ["float32"]), (False, 0.01, ["float32"])])
def test_auto_takes_the_fastest_dtype_of_the_device(monkeypatch, native, float32_costs, tried):
    """8.0 is a T4's ratio, 0.01 that of a CPU which emulates both 16-bit types; 1.1 is not worth float16's range."""
    monkeypatch.setattr(verdict, "native_bfloat16", lambda device: native)
    monkeypatch.setattr(verdict, "product_seconds", lambda dtype, *shape: float32_costs if dtype == "float32" else 1.0)
    verdict.fast_float16.cache_clear()
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert verdict.candidates("auto", "cpu") == tried
    assert threads == ([] if native else [1, torch.get_num_threads()]), "timed on one thread, and the others given back"
    verdict.fast_float16.cache_clear()


def test_verdict_is_taken_up_again_only_for_what_it_is_about(tmp_path):
    made = verdict.Precision("float32", None, None, ({"dtype": "float16", "ok": False, "seen": "logprob is not finite"},),
                             {"weights": "ab"})
    made.save(tmp_path / "precision.json")
    assert verdict.Precision.load(tmp_path / "precision.json", {"weights": "ab"}) == made
    assert verdict.Precision.load(tmp_path / "precision.json", {"weights": "other"}) is None
    (tmp_path / "precision.json").write_text("{")
    assert verdict.Precision.load(tmp_path / "precision.json", {"weights": "ab"}) is None
    assert verdict.Precision.load(tmp_path / "missing.json", {}) is None
