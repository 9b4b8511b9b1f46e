"""Progress bars with tokens/s, done tasks and ETA: every half second on a terminal, every ten seconds in a log."""

from __future__ import annotations

import sys
from typing import Iterable

from tqdm import tqdm


def bar(total: int, name: str, unit: str, done: int = 0) -> tqdm:
    """A bar over `total` units, of which some were `done` before; none where there is nothing to do."""
    return tqdm(total=total, initial=done, desc=name, unit=unit, disable=not total, mininterval=0.5 if sys.stderr.isatty() else 10.0,
                dynamic_ncols=True, smoothing=0.05)


def move(shown: tqdm, done: int, tokens: int, tasks: str, stages: Iterable[str] = ()) -> None:
    """Bring a bar to `done` units, with tokens/s and tasks done behind it; before the first unit with the `stages` that are over."""
    rate, before = f"{tokens / max(1e-9, shown.format_dict['elapsed']):.0f} tok/s", ", ".join(stages)
    shown.set_postfix_str(f"{tasks}; over: {before}" if before and not done else f"{rate}, {tasks}", refresh=False)
    shown.update(done - shown.n)
