"""Prompt lookup in vLLM's CPU build by numpy, instead of a search that numba compiles anew in each process.

vLLM's own (vllm/v1/spec_decode/ngram_proposer.py, read in 0.32) takes 3 s of each process's first answer to be compiled, and then
less than a step of a small model does not notice; so does this, which finds the same drafts.
"""

from __future__ import annotations

import inspect

import numpy as np


def install() -> None:
    """Exchange vLLM's search; nothing changes where vLLM has moved it, and then it is compiled."""
    try:
        from vllm.v1.spec_decode import ngram_proposer
    except ImportError:
        return
    theirs = getattr(ngram_proposer, "batch_propose_numba", None)
    if list(inspect.signature(getattr(theirs, "py_func", install)).parameters) == list(inspect.signature(propose).parameters):
        ngram_proposer.batch_propose_numba = propose


def propose(valid_ngram_requests, num_tokens_no_spec, token_ids_cpu, min_n, max_n, max_model_len, k, valid_ngram_draft, valid_ngram_num_drafts):
    """Write the drafts of each request in `valid_ngram_requests`, by their names in vLLM: of the first `num_tokens_no_spec` of its
    `token_ids_cpu` [requests, tokens] into `valid_ngram_draft` [requests, k], their number into `valid_ngram_num_drafts` [requests]."""
    for request in valid_ngram_requests:
        tokens = token_ids_cpu[request, :num_tokens_no_spec[request]]
        draft = followed(tokens, min_n, max_n)[:max(0, min(k, max_model_len - len(tokens)))]
        valid_ngram_draft[request, :len(draft)], valid_ngram_num_drafts[request] = draft, len(draft)


def followed(tokens: np.ndarray, fewest: int, most: int) -> np.ndarray:
    """What follows the first place in `tokens` [n] where the longest run of `fewest` to `most` tokens stands that they end with; else
    nothing."""
    ends = np.flatnonzero(tokens[:-1] == tokens[-1:])  # where such runs end, a token longer each time
    for length in range(1, most):
        longer = ends[ends >= length]
        if len(longer):
            longer = longer[tokens[longer - length] == tokens[-1 - length]]
        if not len(longer):
            break
        ends = longer
    else:
        length = most
    return tokens[ends[0] + 1:] if len(ends) and length >= fewest else tokens[:0]
