"""The `precision` command: a model's ranges, what float16 needs, the verdict on this device; shown, and written down."""

from __future__ import annotations

import dataclasses
import html
import os
import shutil
import sys
import time
from pathlib import Path

from . import report, trained_prompt
from .checkpoint import check_adapter, load_tokenizer, open_model
from .chooser import Chooser
from .device import device_model, device_name, native_bfloat16
from .dtypes import Model
from .errors import ArcKernelError
from .files import replacing
from .generate import chosen_backend
from .grids import GridEncoder
from .precision import probe, rescale
from .prompts import PromptBuilder
from .tasks import load_challenges


MOST_HEADROOM = 12  # bits: float16 has 30 above its smallest number of full precision


def open_checked(model: str, adapter: str, tasks: str, grid_encoder: str, prompt: str, max_seq_len: int, headroom: float) -> Model:
    """The model to be looked at, with a short, a middling and a long task of a set; raises ArcKernelError in one line."""
    if not 0 <= headroom <= MOST_HEADROOM:
        raise ArcKernelError(f"precision: --headroom {headroom:g}: give 0 to {MOST_HEADROOM} bits")
    folder = open_model(model)
    if adapter:
        check_adapter(Path(adapter))
    sample = probe.sample(load_challenges(tasks).tasks.values())
    if not sample:
        raise ArcKernelError(f"{tasks}: no task with a train pair to probe the model on: give another --tasks")
    prompt, grid_encoder = trained_prompt.choose(prompt, grid_encoder, model, adapter)
    builder = PromptBuilder(load_tokenizer(folder), GridEncoder.from_name(grid_encoder), prompt)
    return Model(folder, Path(adapter).resolve() if adapter else None, builder, sample, device_name(), max_seq_len, headroom)


def check(model: Model, dtype: str, backend: str, out: Path, rescaled: str) -> None:
    """Probe, plan and judge `model`; print what is seen; write report.html and precision.json into `out`.

    `rescaled` names a folder for the rescaled model (empty: none is wanted).
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    begun = time.perf_counter()
    print(f"probing {model.folder.name} in float32", file=sys.stderr, flush=True)
    ranges = model.ranges
    print(f"{probe.table(ranges)}\n{ranges.tokens} tokens of real prompts, float32, {time.perf_counter() - begun:.1f} s", flush=True)
    made, reason = None, ""
    try:
        made = model.plan()
        print(f"float16, {model.headroom:g} bits of headroom: {made or 'fits as it is'}", flush=True)
    except rescale.Refused as refused:
        reason = str(refused)
        print(f"float16 cannot hold it: {reason}", flush=True)
    if rescaled and made:
        try:
            lost = model.write_rescaled(made, Path(rescaled))
            print(f"{rescaled}: written; float16 changes no label's logits by more than {lost:.2g} through underflow")
        except rescale.Refused as refused:
            shutil.rmtree(rescaled, ignore_errors=True)
            made, reason = None, str(refused)
            print(f"float16 cannot hold it: {reason}", flush=True)
    backend = chosen_backend(backend)
    chooser = Chooser(model, dtype, backend, model.max_seq_len, 0, None, lambda event, **facts: None,
                      lambda stage, **facts: print(f"  {stage}: {time.perf_counter() - begun:.0f} s", file=sys.stderr))
    for engine, _, _ in chooser.engines():
        engine.close()
        break
    settled = chooser.settled
    for e in settled.evidence:
        print(f"{e['dtype']} ({e['backend']}): {'healthy' if e['ok'] else 'dropped'}: {e['seen']}")
    print(f"verdict for dtype={dtype} on {device_model(model.device)}: {settled.dtype or 'no dtype gives finite answers'}")
    elsewhere = ""
    if settled.dtype and (model.device == "cpu" or native_bfloat16(model.device)):
        elsewhere = without_bfloat16(made, reason, model.headroom)
        print(elsewhere)
    dataclasses.replace(settled, peaks=ranges.peaks).save(out / "precision.json")
    shown = dataclasses.asdict(settled) | {"peaks": ranges.peaks}
    body = (f"<pre>{html.escape(probe.table(ranges))}</pre><p>{html.escape(reason or str(made or 'float16 holds it as it is'))}</p>"
            f"{report.precision_html(shown, made)}{f'<p>{html.escape(elsewhere)}</p>' if elsewhere else ''}")
    with replacing(out / "report.html") as file:
        file.write(report.page(f"Precision of {model.folder.name}", body))
    print(f"{time.perf_counter() - begun:.0f} s in all\nreport: {out / 'report.html'}")
    if rescaled and not made:
        raise ArcKernelError(f"{rescaled}: not written: {reason or 'the model fits float16 as it is'}")


def without_bfloat16(made: rescale.Rescale | None, reason: str, headroom: float) -> str:
    """What to expect on a GPU that has no bfloat16, from the probe alone: float16 as `made` rescales it, or not, for a `reason`."""
    if reason:
        what = f"float16 refused: {reason}: float32, whose products are about 8 times slower"
    elif made:
        what = f"float16, rescaled ({str(made).partition(': ')[2]}), which solve does by itself"
    else:
        what = "float16, weights as they are"
    return f"on a GPU without bfloat16 (T4): {what} (by the probe with {headroom:g} bits of headroom; no engine has answered there)"
