"""How benchmarks measure a trainer and an engine: real examples of an exact length, steps of the trainer's own loop, prefill
and decoding through the engine a run would use. `bench` and `precision --bench` share it.

An example of N tokens is N tokens in a row out of real training examples put one after the other, with labels at its last
LABELS positions: the length is exact, the tokens are real, and the loss is taken where an answer would stand.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterable, Sequence

import numpy as np

from . import adapt, ceilings
from .ceilings import Shape, shape_of, train_flop, train_seconds
from .device import synchronize
from .dtypes import Model, Variant
from .engine import Prompt
from .errors import ArcKernelError
from .files import write_json
from .memory import amounts
from .prompts import IGNORED, Example
from .tasks import Task

LABELS = 150  # tokens of an answer: a grid of about 11x11
RANK = 32  # of the LoRA, as a run's default
SERIES = 128  # prompts of a series at most


class _Enough(Exception):
    """Ends a training loop that has been measured."""


def fitting(model: Model, dtype: str) -> Variant:
    """The model as a run would load it in this dtype; as it is where float16 cannot hold it, for speed does not ask."""
    try:
        return model.variant(dtype)
    except ArcKernelError:
        return Variant(dtype, model.folder)


def trainer(model: Model, variant: Variant, lr: float = 1e-4) -> adapt.TaskTrainer:
    """A trainer as a worker has it, a LoRA of rank RANK; `timed_steps` sets steps and batch."""
    recipe = adapt.Recipe(1, 1, lr, RANK, model.max_seq_len, False, 0)
    return adapt.TaskTrainer(variant.folder, model.builder, recipe, model.adapter, model.device, variant.dtype, variant.rescale)


def example(model: Model, length: int, number: int) -> Example:
    """Example `number` of exactly `length` tokens of real tasks; different numbers begin at different tokens."""
    stream = _stream(model)
    start = int(np.random.default_rng(number).integers(len(stream)))
    ids = np.resize(np.roll(stream, -start), length)
    return Example(ids, np.where(np.arange(length) < length - _labels(length), IGNORED, ids))


def step_flop(shape: Shape, length: int) -> float:
    """FLOP of a training step on an `example` of this length, all parts of `train_flop` together."""
    return sum(train_flop(shape, length, _labels(length), RANK).values())


def step_bound(shape: Shape, length: int, frozen: float, others: float) -> float:
    """Seconds of these FLOP at these speeds (`train_seconds`)."""
    return train_seconds(train_flop(shape, length, _labels(length), RANK), frozen, others)


def step_speeds(dtype: str, device: str, repeats: int) -> tuple[float, float]:
    """FLOP/s of a large product, now, as training in this dtype makes those with frozen weights, and all others."""
    from . import int8  # imports torch, which `run` can do without

    frozen, others = ceilings.gemm(dtype, device, repeats), int8.rest(dtype, device)
    return frozen, frozen if others == dtype else ceilings.gemm(others, device, repeats)


def _labels(length: int) -> int:
    return min(LABELS, length - 1)


@functools.cache
def _stream(model: Model) -> np.ndarray:
    """Token ids of training examples of the model's probe tasks, one after the other: int64 [tokens]."""
    plan = adapt.Recipe(1, 1, 1e-4, RANK, 1 << 20, False, 0)
    made = (itertools.islice(adapt.leave_one_out(t, model.builder, plan, np.random.default_rng(0)), len(t.train)) for t in model.tasks)
    return np.concatenate([e.input_ids for e in itertools.chain.from_iterable(made)])


def timed_steps(trainer: adapt.TaskTrainer, task: Task, examples: Iterable[Example], batches: Sequence[int],
                seen: Callable[[int, float, float], bool]) -> None:
    """Train on `examples` by TaskTrainer.train itself, at most as many steps as `batches`, which says how many each takes.

    `seen(tokens, seconds, loss)` is called after each step, gradient and optimizer included; its own seconds are not counted.
    Where it returns True it is enough. The first step also resets the adapter and warms caches up.
    """
    trainer.recipe = dataclasses.replace(trainer.recipe, steps=len(batches), batch=batches[0])
    begun = time.perf_counter()

    def on_step(step: int, loss: float, tokens: int) -> None:
        nonlocal begun
        synchronize(trainer.device)
        if seen(tokens, time.perf_counter() - begun, loss) or step == len(batches):
            raise _Enough
        trainer.recipe = dataclasses.replace(trainer.recipe, batch=batches[step])
        begun = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        try:
            trainer.train(task, Path(scratch) / "adapter", on_step, examples=iter(examples))
        except _Enough:
            return


def prompts(model: Model, count: int, tokens: int, series: int, *adapters: Path | None) -> list[Prompt]:
    """Prompts of `tokens` tokens of real grids, for the adapters in turn; each of each series has two first tokens of its own, so that no
    prefix is cached.

    They end at different places, nearly always inside a grid, so that answers go on instead of closing at once.
    """
    vocabulary, numbers = shape_of(model.folder).vocabulary, range(series * SERIES, series * SERIES + count)
    return [Prompt((series, i), [i % vocabulary, i // vocabulary, *example(model, tokens - 2, i).input_ids.tolist()],
                   adapters[i % len(adapters)]) for i in numbers]


def answer_seconds(engine, asked: list[Prompt], new_tokens: int) -> tuple[float, int]:
    """Seconds until all prompts are answered with at most `new_tokens` tokens, and how many tokens that were."""
    begun = time.perf_counter()
    answers = list(engine.answer(asked, new_tokens))
    return time.perf_counter() - begun, sum(len(a.logprobs) for a in answers)


def decode_seconds(engine, asked: list[Prompt], new_tokens: int) -> float | None:
    """Seconds of one decoding step of a batch: `new_tokens` tokens each less one token each, after the prompts were read once.

    vLLM has them in its cache then; transformers reads them again both times. None where answers end too early to say.
    """
    short, first = answer_seconds(engine, asked, 1)
    whole, total = answer_seconds(engine, asked, new_tokens)
    steps = (total - first) / len(asked)
    return (whole - short) / steps if steps > new_tokens / 2 and whole > short else None


def write_adapter(shape: Shape, folder: Path, seed: int) -> Path:
    """Write a random LoRA of rank RANK on every adapted layer as a peft adapter: A and B normal, small enough to change little."""
    import torch
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, inputs, outputs in shape.adapted:
        for part, sides in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
            tensors[f"base_model.model.{name}.{part}.weight"] = torch.randn(sides, generator=generator) * 0.002
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name, _, _ in shape.adapted}), "base_model_name_or_path": ""})
    return folder


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, MiB (VmHWM); None where the system does not say."""
    return next((kib / 1024 for kib in amounts("/proc/self/status", "VmHWM:")), None)
