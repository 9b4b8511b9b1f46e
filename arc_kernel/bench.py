"""`precision --bench`: is float32, or bfloat16, slower here? Seconds of training and inference in each dtype, measured.

Each figure as a ratio to the fastest dtype, beside the speed of a large matrix product in that dtype, which bounds it.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from . import adapt
from .checkpoint import free_memory, parameter_count
from .dtypes import Model, Variant
from .engine import EngineSettings, Prompt
from .errors import ArcKernelError
from .generate import start_engine, vllm_installed
from .precision import verdict
from .tasks import Task, cells

DTYPES = ("bfloat16", "float16", "float32")
SIDE, ROWS = 2048, 512  # of the matrix product: a prompt's rows through a layer
REPEATS = 30  # of it
STEPS = 4  # of training; the first is left out, it is slower
PROMPTS, PROMPT_TOKENS = 8, 256
NEW_TOKENS = 24
SECONDS = 60.0  # that training, or inference, in one dtype may take, as far as can be foreseen
TRAIN_FLOP = 4  # per weight and token: forward, and backward to the inputs of frozen weights


def bench_dtypes(model: Model, backend: str) -> list[dict]:
    """Measure every dtype on this device, print the table, return its rows (`dtype`, `gemm` FLOP/s, `step` seconds,
    `step_tokens`, `prefill` and `decode` tokens/s, `note`)."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    backend = ("vllm" if vllm_installed() else "transformers") if backend == "auto" else backend
    begun, rows = time.perf_counter(), []
    with tqdm(total=3 * len(DTYPES), desc="bench", unit="part") as bar:
        for dtype in DTYPES:
            row = {"dtype": dtype, "note": "", "gemm": gemm(dtype, model.device)}
            bar.update()
            for part in (lambda: train(model, dtype, row["gemm"]), lambda: infer(model, dtype, backend, row["gemm"])):
                bar.set_postfix_str(dtype)
                try:
                    row |= part()
                except (ArcKernelError, RuntimeError) as error:
                    row["note"] = str(error).splitlines()[0][:100]
                free_memory()
                bar.update()
            rows.append(row)
    print(table(rows))
    if not verdict.native_bfloat16(model.device):
        print("bfloat16 is emulated on this device: it costs what its row says and gains nothing")
    print(f"{verdict.device_model(model.device)}, {backend}, {time.perf_counter() - begun:.0f} s")
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text; in brackets the ratio to the fastest dtype (1.00; smaller is slower)."""
    best = {k: max((r[k] for r in rows if r.get(k)), default=0.0) for k in ("gemm", "train", "prefill", "decode")}

    def cell(row: dict, key: str, unit: float) -> str:
        return f"{row[key] / unit:12,.{1 if row[key] / unit < 10 else 0}f} ({row[key] / best[key]:.2f})" if row.get(key) else f"{'-':>19}"

    lines = [f"{'dtype':10}{'GEMM, GFLOP/s':>19}{'TTT, tokens/s':>19}{'s a step':>10}{'prefill, tokens/s':>19}{'decode, tokens/s':>19}"]
    for r in rows:
        step = f"{r['step']:10.2f}" if r.get("step") else f"{'-':>10}"
        lines.append(f"{r['dtype']:10}{cell(r, 'gemm', 1e9)}{cell(r, 'train', 1)}{step}{cell(r, 'prefill', 1)}{cell(r, 'decode', 1)}  {r['note']}")
    return "\n".join(lines)


def gemm(dtype: str, device: str) -> float:
    """FLOP/s of a product [512, 2048] x [2048, 2048]; of a small one where that would take seconds."""
    small = verdict.product_seconds(dtype, device, *verdict.PRODUCT["cpu"]) / (2 * verdict.PRODUCT["cpu"][0] * verdict.PRODUCT["cpu"][1] ** 2)
    rows, side = (ROWS, SIDE) if small * 2 * ROWS * SIDE * SIDE < 0.1 else verdict.PRODUCT["cpu"]
    return 2 * rows * side * side / verdict.product_seconds(dtype, device, rows, side, REPEATS)


def train(model: Model, dtype: str, flops: float) -> dict:
    """Seconds and tokens/s of a training step of the model's middling probe task; of its short one where that takes too long.

    `flops` are those of a large product in this dtype; where they alone would make a step too long, none is taken.
    """
    floor = TRAIN_FLOP * parameter_count(model.folder) * len(model.builder.prompt_ids(model.tasks[0].train[:1], model.tasks[0].train[0].input)) / flops
    if floor > SECONDS:
        return {"note": f"no step measured: its matrix products alone take over {floor:.0f} s"}
    variant = _variant(model, dtype)
    trainer = adapt.TaskTrainer(variant.folder, model.builder, _recipe(model, 2), model.adapter, model.device, dtype, variant.rescale)
    first = _steps(trainer, model.tasks[0])
    if first["step"] * cells(_middling(model)) / cells(model.tasks[0]) * STEPS > SECONDS:
        return first | {"note": f"a step of {first['step_tokens']:.0f} tokens"}
    trainer.recipe = _recipe(model, STEPS)
    return _steps(trainer, _middling(model))


def _recipe(model: Model, steps: int) -> adapt.Recipe:
    return adapt.Recipe(steps, 1, 1e-4, 32, model.max_seq_len, False, 0)


def _steps(trainer: adapt.TaskTrainer, task: Task) -> dict:
    """Train a task; seconds, tokens and tokens/s of its steps, the first left out where there are more."""
    marks = [(time.perf_counter(), 0)]
    with tempfile.TemporaryDirectory() as scratch:
        trainer.train(task, Path(scratch) / "adapter", lambda step, loss, tokens: marks.append((time.perf_counter(), tokens)))
    marks = marks[1:] if len(marks) > 2 else marks
    seconds, tokens, steps = marks[-1][0] - marks[0][0], sum(t for _, t in marks[1:]), len(marks) - 1
    return {"step": seconds / steps, "step_tokens": tokens / steps, "train": tokens / seconds}


def infer(model: Model, dtype: str, backend: str, flops: float) -> dict:
    """tokens/s of prefill and of decoding in a batch, through the engine a run would use; of one prompt where `flops` are few."""
    variant = _variant(model, dtype)
    prompts = PROMPTS if 3 * 2 * parameter_count(model.folder) * PROMPTS * PROMPT_TOKENS / flops < SECONDS else 1
    engine = start_engine(backend, EngineSettings(variant.folder, dtype, 2048, model.builder.end_token, 0, variant.rescale), model.device)
    try:
        list(engine.answer(_prompts(model, 0)[:1], 2))
        marks = [time.perf_counter()]
        list(engine.answer(_prompts(model, 1)[:prompts], 1))
        marks.append(time.perf_counter())
        answers = list(engine.answer(_prompts(model, 2)[:prompts], NEW_TOKENS))
        marks.append(time.perf_counter())
    finally:
        engine.close()
    prefill, both = marks[1] - marks[0], marks[2] - marks[1]
    new = sum(len(a.logprobs) for a in answers) - len(answers)
    return {"prefill": prompts * PROMPT_TOKENS / prefill} | ({"decode": new / (both - prefill)} if both > prefill and new else {})


def _variant(model: Model, dtype: str) -> Variant:
    """The model as a run would load it in this dtype; as it is where float16 cannot hold it, for speed does not ask."""
    try:
        return model.variant(dtype)
    except ArcKernelError:
        return Variant(dtype, model.folder)


def _middling(model: Model) -> Task:
    return model.tasks[len(model.tasks) // 2]


def _prompts(model: Model, start: int) -> list[Prompt]:
    """Prompts of PROMPT_TOKENS tokens of real grids, each with a first token of its own, so that no prefix is cached."""
    builder, task = model.builder, _middling(model)
    ids = builder.prompt_ids(task.train, task.train[0].input)
    ids = (ids * (PROMPT_TOKENS // len(ids) + 1))[: PROMPT_TOKENS - 1]
    return [Prompt((start, i), [1000 + start * PROMPTS + i, *ids]) for i in range(PROMPTS)]
