"""`precision --bench`: is float32, or bfloat16, slower here? Seconds of training and inference in each dtype, measured.

Each figure as a ratio to the fastest dtype, beside the speed of a large matrix product in that dtype, which bounds it.
"""

from __future__ import annotations

import os
import time

from tqdm import tqdm

from . import ceilings, measure
from .adapt import TaskTrainer
from .device import device_model, native_bfloat16
from .dtypes import Model
from .engine import EngineSettings
from .errors import ArcKernelError, first_line
from .generate import chosen_backend, start_engine
from .memory import free_memory

TOKENS, STEPS = 1024, 4  # of training; the first step is left out, it is slower
PROMPTS, PROMPT_TOKENS = 8, 257
NEW_TOKENS = 24
SECONDS = 60.0  # that training, or inference, in one dtype may take, as far as can be foreseen


def bench_dtypes(model: Model, backend: str) -> list[dict]:
    """Measure every dtype on this device, print the table, return its rows (`dtype`, `gemm` FLOP/s, `step` seconds,
    `train`, `prefill` and `decode` tokens/s, `note`)."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    backend = chosen_backend(backend)
    begun, rows = time.perf_counter(), []
    with tqdm(total=3 * len(ceilings.DTYPES), desc="bench", unit="part") as bar:
        for dtype in ceilings.DTYPES:
            row = {"dtype": dtype, "note": "", "gemm": ceilings.gemm(dtype, model.device)}
            bar.update()
            for part in (lambda: train(model, dtype, row["gemm"]), lambda: infer(model, dtype, backend, row["gemm"])):
                bar.set_postfix_str(dtype)
                try:
                    row |= part()
                except (ArcKernelError, RuntimeError) as error:
                    row["note"] = first_line(error)[:100]
                free_memory()
                bar.update()
            rows.append(row)
    print(table(rows))
    if not native_bfloat16(model.device):
        print("bfloat16 is emulated on this device: it costs what its row says and gains nothing")
    print(f"{device_model(model.device)}, {backend}, {time.perf_counter() - begun:.0f} s")
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text; in brackets the ratio to the fastest dtype (1.00; smaller is slower)."""
    best = {k: max((r[k] for r in rows if r.get(k)), default=0.0) for k in ("gemm", "train", "prefill", "decode")}

    def cell(row: dict, key: str, unit: float) -> str:
        return f"{row[key] / unit:12,.{1 if row[key] / unit < 10 else 0}f} ({row[key] / best[key]:.2f})" if row.get(key) else f"{'-':>19}"

    lines = [f"{'dtype':10}{'GEMM, GFLOP/s':>19}{'TTT, tokens/s':>19}{'s a step':>10}{'prefill, tokens/s':>19}{'decode, tokens/s':>19}"]
    for r in rows:
        step = f"{r['step']:10.2f}" if r.get("step") else f"{'-':>10}"
        rates = cell(r, "prefill", 1) + cell(r, "decode", 1)
        lines.append(f"{r['dtype']:10}{cell(r, 'gemm', 1e9)}{cell(r, 'train', 1)}{step}{rates}  {r['note']}")
    return "\n".join(lines)


def train(model: Model, dtype: str, flops: float) -> dict:
    """Seconds and tokens/s of a training step on TOKENS tokens; on a quarter of them where that takes too long.

    `flops` are those of a large product in this dtype; where they alone would make a short step too long, none is taken.
    """
    shape, short = ceilings.shape_of(model.folder), TOKENS // 4
    floor = measure.step_flop(shape, short) / flops
    if floor > SECONDS:
        return {"note": f"no step measured: its matrix products alone take over {floor:.0f} s"}
    trainer = measure.trainer(model, measure.fitting(model, dtype))
    first = _step(trainer, model, short, 2)
    if first["step"] * TOKENS / short * STEPS > SECONDS:
        return first | {"note": f"a step of {short} tokens"}
    return _step(trainer, model, TOKENS, STEPS)


def _step(trainer: TaskTrainer, model: Model, tokens: int, count: int) -> dict:
    """Seconds of the fastest of `count` steps, the first left out, and tokens/s in it."""
    times, examples = [], (measure.example(model, tokens, i) for i in range(count))
    measure.timed_steps(trainer, model.tasks[0], examples, [1] * count, lambda _, seconds, loss: times.append(seconds))
    return {"step": min(times[1:]), "train": tokens / min(times[1:])}


def infer(model: Model, dtype: str, backend: str, flops: float) -> dict:
    """tokens/s of prefill and of decoding in a batch, through the engine a run would use; of one prompt where `flops` are few."""
    variant, shape = measure.fitting(model, dtype), ceilings.shape_of(model.folder)
    count = PROMPTS if 3 * ceilings.prefill_flop(shape, PROMPTS, PROMPT_TOKENS, 0) / flops < SECONDS else 1
    engine = start_engine(backend, EngineSettings(variant.folder, dtype, 2048, model.builder.end_token, 0, variant.rescale,
                                                   drafts=False), model.device)
    try:
        measure.answer_seconds(engine, measure.prompts(model, 1, PROMPT_TOKENS, 0, None), 2)
        asked = measure.prompts(model, count, PROMPT_TOKENS, 1, None)
        prefill, _ = measure.answer_seconds(engine, asked, 1)
        step = measure.decode_seconds(engine, asked, NEW_TOKENS)
    finally:
        engine.close()
    return {"prefill": count * PROMPT_TOKENS / prefill} | ({"decode": count / step} if step else {})
