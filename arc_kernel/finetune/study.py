"""The learning-rate study: the same data and seed at several learning rates, one run after the other, and one page."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ..errors import ArcKernelError
from ..events import read_events
from ..memory import free_memory
from . import page
from .run import MAIN, check_settings, finetune, prepare
from .settings import FinetuneSettings


def study(settings: FinetuneSettings, rates: list[float]) -> Path | None:
    """Run `settings` at each learning rate in `out`/lr-<rate> and write study.html and study.json; the page's path.

    A killed study started again goes on with the run it was in. The page is written after each run. Raises ArcKernelError as
    `finetune` does; where gradients stay infinite, that run alone ends.
    """
    from .train import Diverged

    prepared, written = prepare(settings), None
    folders = {rate: settings.out_path / f"lr-{rate:g}" for rate in rates}
    if len(set(folders.values())) < len(rates):
        raise ArcKernelError(f"finetune: two of the learning rates {', '.join(map(str, rates))} are called alike: give rates further apart")
    for rate, folder in folders.items():
        own = dataclasses.replace(settings, lr=rate, out=str(folder))
        if any(e["event"] == "diverged" for e in read_events(folder)):
            check_settings(own)
            continue
        try:
            finetune(own, prepared)
        except Diverged as error:
            print(f"lr {rate:g}: {error}", file=sys.stderr)
        free_memory()  # of this run's model and graphs
        if MAIN:
            written = page.write_study(settings.out_path, {r: read_events(f) for r, f in folders.items() if f.is_dir()})
    if written is None and MAIN:  # of an earlier start, all of them
        written = page.write_study(settings.out_path, {r: read_events(f) for r, f in folders.items()})
    return written

