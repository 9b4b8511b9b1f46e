"""Intervals of a mean over tasks, by drawing tasks again. Knows numbers; nothing of grids.

Source: the percentile bootstrap, Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. What is drawn is
tasks, not test outputs, as the outputs of a task stand or fall together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 95.0  # per cent


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval, which has no width where all tasks are alike: that is no certainty."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Draws `tasks` tasks with replacement, `resamples` times, the same ones for whatever is asked of it.

    As the draws are the same, the interval of a difference of two runs on the same tasks is paired.
    """

    def __init__(self, tasks: int, resamples: int, seed: int):
        rng = np.random.default_rng(seed)
        self._drawn = rng.multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples)  # [resamples, tasks]: how often

    def interval(self, sums: np.ndarray, counts: np.ndarray) -> Interval | None:
        """The interval of sum(sums) / sum(counts), both float [tasks]; None where nothing is counted.

        A resample in which nothing is counted is left out.
        """
        if not counts.sum():
            return None
        over = self._drawn @ counts
        means = (self._drawn @ sums)[over > 0] / over[over > 0]
        low, high = np.percentile(means, [50 - LEVEL / 2, 50 + LEVEL / 2])
        return Interval(float(sums.sum() / counts.sum()), float(low), float(high))
