"""The learning-rate study: the same data and seed at several learning rates, one run after the other, and one page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import report
from . import page
from .run import MAIN, finetune, prepare
from .settings import FinetuneSettings


def study(settings: FinetuneSettings, rates: list[float]) -> Path | None:
    """Run `settings` at each learning rate in `out`/lr-<rate> and write study.html and study.json; the page's path.

    A killed study started again goes on with the run it was in. The page is written after each run. Raises ArcKernelError as
    `finetune` does, but a run whose gradients stay infinite ends that run only.
    """
    prepared, written = prepare(settings), None
    for rate in rates:
        finetune(dataclasses.replace(settings, lr=rate, out=str(_folder(settings, rate))), prepared)
        if MAIN:
            done = {r: report.read_events(_folder(settings, r)) for r in rates if (_folder(settings, r) / "events.jsonl").is_file()}
            written = page.write_study(settings.out_path, done)
    return written


def _folder(settings: FinetuneSettings, rate: float) -> Path:
    return settings.out_path / f"lr-{rate:g}"
