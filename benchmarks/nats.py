"""What training seconds buy, told by few tasks: nats of the right answers under unseen views after test-time training.

    python -m benchmarks.nats --arm prompt=chat --arm prompt=compact,grid_encoder=shape+digits [--tasks 10] [--skip 44]
    python -m benchmarks.nats --arm ttt_lr=1e-3 --arm ttt_lr=2e-3 --model folder/of/prepare

Tasks, arms and equal seconds are those of `benchmarks.equal_seconds`. After each task the right answer of each test input is
read under `--views` views: its nats are what the adapted model takes for surprising in it, and it is `right` where each of
its tokens is the likeliest, so that greedy decoding gives it. Test outputs are read here, and nowhere in training.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from arc_kernel import checkpoint, progress
from arc_kernel.adapt import TaskTrainer
from arc_kernel.prompts import IGNORED
from arc_kernel.settings import LongHelp, Settings
from arc_kernel.tasks import Task
from arc_kernel.views import shared_views

from .equal_seconds import SET, arm_settings, chosen, step_seconds, trainer_of

SEED = 1  # of the views answers are read under, whatever seed an arm trains with


def answers(trainer: TaskTrainer, task: Task, count: int) -> np.ndarray:
    """Nats and rightness [answers, 2] of the task's right answers under `count` views, drawn apart from those of training."""
    rows = []
    trainer.model.eval()
    views = shared_views(task, range(len(task.test)), count, SEED, trainer.recipe.permute_background)
    for test_index, view in ((i, v) for i, several in views.items() for v in several):
        seen = view.apply(task)
        example = trainer.builder.example(seen.train, seen.test[test_index])
        ids, wanted = (torch.from_numpy(a).to(trainer.device) for a in (example.input_ids, example.labels[example.labels != IGNORED]))
        with torch.no_grad():
            logits = trainer.model(input_ids=ids[None], logits_to_keep=len(wanted) + 1).logits[0, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        rows.append((float(nats), bool((logits.argmax(-1) == wanted).all())))
    return np.array(rows)


def main() -> None:
    """Print nats and rightness by task and arm, then the means, and each arm against the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--arm", action="append", required=True, help="settings of an arm: name=value[,name=value]; repeat")
    parser.add_argument("--model", default=checkpoint.EMBEDDED, help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--tasks", type=int, default=10, help="so many of the smallest tasks")
    parser.add_argument("--skip", type=int, default=44, help="leave out so many of the smallest tasks")
    parser.add_argument("--steps", type=int, default=12, help="training steps per task of the first arm")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the arms that name none")
    parser.add_argument("--views", type=int, default=6, help="views under which each right answer is read")
    options = parser.parse_args()
    tasks = chosen(options.tasks, options.skip)
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(tasks=SET, model=options.model, ttt_dtype="float32", ttt_lr=options.lr, out=scratch)
        arms = {arm: arm_settings(settings, arm) for arm in options.arm}
        step = step_seconds(tasks, arms)
        print(f"{len(tasks)} tasks; seconds of a step: {', '.join(f'{arm} {s:.2f}' for arm, s in step.items())}", flush=True)
        steps = {arm: round(options.steps * step[options.arm[0]] / step[arm]) for arm in arms}
        trainers, seconds = {arm: trainer_of(s, steps[arm]) for arm, s in arms.items()}, dict.fromkeys(arms, 0.0)
        found = {arm: [] for arm in arms}
        shown = progress.bar(len(tasks) * sum(steps.values()), "nats", "step")
        for task in tasks:
            for arm, trainer in trainers.items():
                begun = time.perf_counter()
                trainer.train(task, Path(scratch) / "adapter", lambda *_: shown.update())
                seconds[arm] += time.perf_counter() - begun
                found[arm].append(answers(trainer, task, options.views).mean(0))
            shown.write(f"{task.id}  " + "  ".join(f"{found[arm][-1][0]:8.3f} {found[arm][-1][1]:4.0%}" for arm in arms), file=sys.stdout)
        shown.close()
    first = np.array(found[options.arm[0]])[:, 0]
    for arm, rows in found.items():
        nats, right = np.array(rows).T
        ratio = np.exp(np.mean(np.log(nats / first)))
        print(f"{arm}: {steps[arm]} steps, {seconds[arm]:.0f} s of training, {nats.mean():.2f} nats an answer, {right.mean():.1%} right; "
              f"of the first arm's nats {ratio:.3f} (geometric mean), fewer in {(nats < first).sum()} of {len(tasks)}", flush=True)


if __name__ == "__main__":
    main()
