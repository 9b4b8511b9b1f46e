"""Tasks on their way to answers: what is asked of an engine, in which order, and what need not be asked.

Knows prompts and completions; knows nothing of engines but how much they take at once.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterable, Iterator

from .engine import Prompt
from .select import Completion
from .tasks import Task

FEWEST = 2  # predictions a test input where time is short: as many as attempts
PACED = 8  # answers from which their pace is told
LATER = "later"  # in place of a work: none beside those that are open


@dataclass
class Work:
    """A task on its way: prompts not sent yet, sent and not answered, answered with NaN; completions there are.

    `share` of the time left is the task's: `room` seconds of the engine. What would take longer, at the pace at which answers
    come, is left out: `cut` predictions. A prompt's key is the task's id and the predictions it stands for, each (test index,
    view): more than one where a task shows the same under several. `decided` are the test inputs no further prediction of which
    is needed; `kept_at` is when what is done was last written (`time.monotonic`), `before` what an earlier start or worker left
    of it (None: not looked at yet).
    """

    task: Task
    waiting: list[Prompt]
    adapter: Path | None = None
    share: float = 1.0
    room: float = math.inf
    cut: int = 0
    sent: dict[tuple, Prompt] = field(default_factory=dict)
    failed: list[Prompt] = field(default_factory=list)
    done: list[Completion] = field(default_factory=list)
    decided: set[int] = field(default_factory=set)
    kept_at: float = -math.inf
    before: list[Completion] | None = None

    def send(self) -> Prompt:
        """The next prompt, from now on under way."""
        prompt = self.waiting.pop(0)
        self.sent[prompt.key] = prompt
        return prompt

    def cut_short(self, pace: float) -> None:
        """Leave out what is not sent, where it has its share of `pace` answers/s, FEWEST predictions a test input, and some under way."""
        made = len(self.sent) + sum(c.status != "nan" for c in self.done)
        if self.sent and made >= max(FEWEST * len(self.task.test), self.room * pace):
            self.cut += sum(len(self.needed(p)) for p in self.waiting)
            self.waiting = []

    def take(self, prompt: Prompt, completions: list[Completion]) -> None:
        """Put the answer of a prompt under way, as the completions it stands for, where it belongs."""
        del self.sent[prompt.key]
        self.done += completions
        if completions[0].status == "nan":
            self.failed.append(prompt)

    def left(self) -> list[Prompt]:
        """Prompts without a finite answer."""
        return [*self.waiting, *self.sent.values(), *self.failed]

    def needed(self, prompt: Prompt) -> list[tuple[int, str]]:
        """The predictions of a prompt that are not decided."""
        return [p for p in prompt.key[1] if p[0] not in self.decided]

    def decide(self, test_index: int) -> None:
        """Leave out the prompts that were needed for this test input alone."""
        self.decided.add(test_index)
        self.waiting = list(filter(self.needed, self.waiting))
        self.sent = {key: p for key, p in self.sent.items() if self.needed(p)}
        self.failed = list(filter(self.needed, self.failed))


class Pace:
    """Answers/s of an engine as the `last` ones came, one by one or a batch at a time: prompts under way over the seconds each takes
    (Little's law), or no more than so many a second came: of the first batch the short ones come first."""

    def __init__(self, last: int):
        self._seen, self._under_way, self._area = time.time(), 0, 0.0  # prompts under way times seconds, up to when it was last looked
        self._sent: dict[tuple, tuple[float, float]] = {}  # when a prompt was sent, and the area then, by its key
        # When an answer came, the seconds it took, and the mean of the prompts under way meanwhile.
        self._last: deque[tuple[float, float, float]] = deque(maxlen=last)

    def sent(self, key: tuple, under_way: int) -> None:
        """A prompt is under way, one of so many."""
        self._sent[key] = self._look(under_way), self._area

    def answered(self, key: tuple, under_way: int) -> None:
        """Its answer has come; so many are under way still."""
        sent, area = self._sent.pop(key)
        seconds = self._look(under_way) - sent
        self._last.append((self._seen, seconds, (self._area - area) / seconds if seconds else 0.0))

    def rate(self) -> float:
        """Answers/s; infinite until PACED of them came."""
        if len(self._last) < PACED:
            return math.inf
        times, seconds, prompts = zip(*self._last)
        over = lambda amount, by: amount / by if by else math.inf
        return min(over(sum(prompts), sum(seconds)), over(len(times) - 1, times[-1] - times[0]))

    def _look(self, under_way: int) -> float:
        now = time.time()
        self._area += self._under_way * (now - self._seen)
        self._seen, self._under_way = now, under_way
        return now


class Feed:
    """What an `engine` is given: the prompts of `open` works, and new works as there is room for their adapters.

    `works` come in the order in which they are to be answered, LATER among them; those with an adapter of `left_out` become
    `unfinished` unanswered, as do those that have prompts without a finite answer. Nothing is sent after `until` (`time.time`).
    """

    def __init__(self, works: Iterable[Work | str], engine, left_out: set[Path], until: float):
        self.open: dict[str, Work] = {}
        self.unfinished: list[Work] = []
        self._works, self._adapters, self._left_out, self._until = iter(works), engine.adapters, left_out, until
        # Half of what is in flight is for one task: what is not sent yet need not be, once its vote is decided.
        self._share, self._enough = max(1, engine.in_flight // 2), max(1, engine.batch // 2)
        self._pace = Pace(engine.in_flight)

    def prompts(self) -> Iterator[Prompt | None]:
        """Prompts of the oldest task with room in its share, of a new one where the batch may hold its adapter; else None."""
        exhausted = False
        while self.in_time() and (not exhausted or any(w.waiting for w in self.open.values())):
            pace, under_way = self._pace.rate(), self._under_way()
            full = len({w.adapter for w in self.open.values()} - {None}) >= self._adapters  # no other task can come now
            for work in self.open.values() if under_way >= self._enough or not full else ():  # else the batch would be less than half full
                work.cut_short(pace)
            ready = next((w for w in self.open.values() if w.waiting and len(w.sent) < self._share), None)
            if ready:
                prompt = ready.send()
                self._pace.sent(prompt.key, under_way + 1)
                yield prompt
            elif exhausted or full:
                yield None
            elif (work := next(self._works, None)) is None or work == LATER and not self.open:
                exhausted = True
            elif work == LATER:
                yield None
            elif work.adapter in self._left_out:
                self.unfinished.append(work)
            else:
                before = under_way + sum(len(w.waiting) for w in self.open.values())
                work.room = work.share * max(0.0, self._until - time.time() - before / pace)
                self.open[work.task.id] = work

    def _under_way(self) -> int:
        """Prompts that are sent and not answered."""
        return sum(len(w.sent) for w in self.open.values())

    def in_time(self) -> bool:
        """Whether there is time left."""
        return time.time() < self._until

    def wanted(self, prompt: Prompt) -> bool:
        """Whether the answer to a prompt that was sent is still needed."""
        return self.in_time() and prompt.key[0] in self.open and prompt.key in self.open[prompt.key[0]].sent

    def answered(self, prompt: Prompt) -> Work:
        """The work of a wanted prompt whose answer has come."""
        self._pace.answered(prompt.key, self._under_way() - 1)
        return self.open[prompt.key[0]]

    def done(self, work: Work) -> bool:
        """Whether a work has all its answers, and is open no longer; where some are not finite it is unfinished then."""
        if work.waiting or work.sent:
            return False
        del self.open[work.task.id]
        if work.failed:
            work.waiting, work.failed = work.failed, []
            self.unfinished.append(work)
            return False
        return True

    def rest(self) -> Iterator[Work]:
        """All works that are not answered in whole."""
        return itertools.chain(self.open.values(), self.unfinished, (w for w in self._works if w != LATER))
