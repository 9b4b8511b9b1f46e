"""The learning-rate study: the same data and seed at several learning rates, one run after the other, and one page."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from ..events import read_events
from ..memory import free_memory
from . import page
from .run import MAIN, finetune, prepare
from .settings import FinetuneSettings


def study(settings: FinetuneSettings, rates: list[float]) -> Path | None:
    """Run `settings` at each learning rate in `out`/lr-<rate> and write study.html and study.json; the page's path.

    A killed study started again goes on with the run it was in. The page is written after each run. Raises ArcKernelError as
    `finetune` does; where gradients stay infinite, that run alone ends.
    """
    from .train import Diverged

    prepared, written = prepare(settings), None
    folders = {rate: settings.out_path / f"lr-{rate:g}" for rate in rates}
    for rate, folder in folders.items():
        if any(e["event"] == "diverged" for e in read_events(folder)):
            continue
        try:
            finetune(dataclasses.replace(settings, lr=rate, out=str(folder)), prepared)
        except Diverged as error:
            print(f"lr {rate:g}: {error}", file=sys.stderr)
        free_memory()  # of this run's model and graphs
        if MAIN:
            written = page.write_study(settings.out_path, {r: read_events(f) for r, f in folders.items() if f.is_dir()})
    return written

