"""What fewer predictions of a test input would have given. Knows completions and votes; nothing of runs or files.

pass_n of k out of n predictions is an exact expectation over all subsets, 1 - C(n - c, k) / C(n, k) with c right ones
(Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1). Votes have no such form: they are the
mean over all subsets where these are few, else over seeded random ones. What early stop left out is no random choice: up to
the number made, the figures of such an output are those of the predictions that came first.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from .select import Voted, place
from .tasks import Grid
from .views import task_rng

CURVE = ("pass_n", "vote_1", "vote_2")
SUBSETS = 128  # of each size: a vote's share in one output is known to 0.05, in the mean over 400 to 0.003


def sizes(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, and `most`."""
    return [*itertools.takewhile(lambda k: k < most, (2**i for i in itertools.count())), most]


def with_fewer(found: list[Voted], predictions: int, truth: Grid, k: int, where: tuple[str, int]) -> dict[str, float]:
    """Expected pass_n, vote_1 and vote_2 of `k` of the `predictions` made; all of them where there are no more than `k`.

    `found` are the votes of those that ended well; `where` (task id, test index) seeds the subsets.
    """
    right = next((i for i, (grid, _, _) in enumerate(found) if np.array_equal(grid, truth)), None)
    if right is None:
        return dict.fromkeys(CURVE, 0.0)
    k, count = min(k, predictions), len(found[right][1])
    none_right = math.comb(predictions - count, k) / math.comb(predictions, k)
    ballots = [(i, logprob) for i, (_, logprobs, _) in enumerate(found) for logprob in logprobs]
    ranks = [_rank(found, right, [ballots[b] for b in subset if b < len(ballots)]) for subset in _subsets(predictions, k, where)]
    return {"pass_n": 1 - none_right, "vote_1": _share(ranks, 1), "vote_2": _share(ranks, 2)}


def _subsets(n: int, k: int, where: tuple[str, int]):
    """Subsets of k of n predictions: all of them where there are at most SUBSETS, else as many random ones."""
    if math.comb(n, k) <= SUBSETS:
        return itertools.combinations(range(n), k)
    rng = task_rng(0, where[0], f"subsets {where[1]} {k}")
    return (rng.permutation(n)[:k].tolist() for _ in range(SUBSETS))


def _rank(found: list[Voted], right: int, ballots: list[tuple[int, float]]) -> float:
    """How many candidates of these ballots are placed before the right one; infinite where it has no vote."""
    votes: dict[int, list[float]] = {}
    for i, logprob in ballots:
        votes.setdefault(i, []).append(logprob)
    if right not in votes:
        return math.inf
    places = {i: place(found[i][0], len(of), math.fsum(of)) for i, of in votes.items()}
    return sum(other < places[right] for other in places.values())


def _share(ranks: list[float], best: int) -> float:
    return sum(r < best for r in ranks) / len(ranks)
