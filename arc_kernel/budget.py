"""The time budget of a run: by which clock which of its stages ends. Knows seconds and nothing of what is done in them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

ADAPT_SHARE = 0.6  # of the budget; the rest is for engine and answers, which took 0.28 of a run's seconds on a CPU (README)
# Of the budget, for votes, score and report: at least so many seconds, but no more of a short one than a tenth.
FINISH_SHARE, FINISH_SECONDS, FINISH_MOST = 0.02, 20.0, 0.1
GRACE_SHARE = 0.05  # of the budget, for what workers hold when no more tasks are given out


@dataclass(frozen=True)
class Budget:
    """`seconds` of a run that began at `begun` (`time.perf_counter`); 0: no limit. Its clocks (`time.time`) are infinite then."""

    begun: float
    seconds: float

    def until(self, share: float) -> float:
        """The clock at which this share of the budget is over."""
        return time.time() - (time.perf_counter() - self.begun) + share * self.seconds if self.seconds else math.inf

    @property
    def grace(self) -> float:
        """Seconds given to tasks that workers hold when no more are given out."""
        return GRACE_SHARE * self.seconds

    @property
    def adapt_until(self) -> float:
        """The clock at which training ends."""
        return self.until(ADAPT_SHARE)

    @property
    def last_call(self) -> float:
        """The clock at which no more tasks are given out to be answered."""
        return self.workers_until - self.grace

    @property
    def answer_until(self) -> float:
        """The clock at which nothing more is asked of an engine."""
        return self.last_call + self.grace / 2

    @property
    def workers_until(self) -> float:
        """The clock at which workers end, whatever they do: what is left is for votes, score and report."""
        return self.until(1.0) - max(FINISH_SHARE * self.seconds, min(FINISH_SECONDS, FINISH_MOST * self.seconds))


def share(size: float, waiting: float, workers: int) -> float:
    """The share of the time left of a stage (0 to 1) that one of so many workers may take for a task given out now, beside what waits; the
    others are taken to be at tasks of the same size.

    Shortest first, a task should need no more than those that wait do on average: where the time is enough for all, none is cut short, and
    what a short one leaves goes to the longer ones.
    """
    return workers * size / (workers * size + waiting)
