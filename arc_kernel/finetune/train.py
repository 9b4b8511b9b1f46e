"""The training loop: transformers' Trainer over the stream, with whole checkpoints and a guard on what is not finite.

A step is `batch` examples of the stream, put together to passes of at most `micro_tokens` tokens each; its loss is the mean over
all its answer tokens, on any number of GPUs. Under torchrun each process takes every n-th example of a step by length, and all
draw all of them, so that the number of GPUs changes nothing but the order of sums.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
import zipfile
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..adapt import SKIPS
from ..ceilings import Shape, train_flop
from ..errors import ArcKernelError, first_line
from ..files import read_json
from ..memory import exhausted
from ..passes import answer_tokens, padded, together
from ..precision.probe import UnknownLayout, check_layout, collected, recording
from . import data
from .learner import Learner
from .settings import FinetuneSettings
from .stream import Stream, growing_limit

KINDS = (*data.KINDS, "recall")
CHECKPOINTS = "checkpoints"
KEPT = 2  # checkpoints of a run
WORKERS = 4  # processes that draw examples for a GPU, 5 to 10 ms each
BROKEN = 3  # steps in a row without a finite gradient before the run ends, in other dtypes than float16


class Diverged(ArcKernelError):
    """Gradients stayed infinite: going on makes no sense."""


class Steps(Dataset):
    """The steps of a run as one process sees them: passes (ids, labels int64 [B, T], kinds [B]), and counts over all processes."""

    def __init__(self, stream: Stream, settings: FinetuneSettings, lengths: np.ndarray, shape: Shape, rank: int, world: int):
        self.stream, self.settings, self.lengths, self.shape, self.rank, self.world = stream, settings, lengths, shape, rank, world

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> dict:
        s = self.settings
        limit = growing_limit(self.lengths, step, s.steps, s.short_first)
        drawn = sorted((self.stream.draw(step * s.batch + i, limit) for i in range(s.batch)), key=lambda d: -len(d.example.input_ids))
        mine = drawn[self.rank::self.world]
        passes = [(*map(torch.from_numpy, padded([mine[i].example for i in group])),
                   torch.tensor([KINDS.index(mine[i].kind) for i in group]))
                  for group in together([d.example for d in mine], s.micro_tokens)]
        sizes = [(len(d.example.input_ids), answer_tokens(d.example)) for d in drawn]
        return {"passes": passes, "answers": sum(n for _, n in sizes), "tokens": sum(n for n, _ in sizes),
                "flop": sum(self._flop(*n) for n in sizes)}

    def _flop(self, tokens: int, labels: int) -> float:
        """FLOP of an example as `ceilings` counts them; in full training also those of the gradients to all weights."""
        shape, rank = self.shape, self.settings.lora_rank
        to_weights = 0.0 if rank else 2.0 * shape.weights * tokens + 2.0 * shape.vocabulary * shape.hidden * labels
        return sum(train_flop(shape, tokens, labels, rank).values()) + to_weights


class StepTrainer(Trainer):
    """Trainer whose batch is a whole step. `facts` holds what is known of the last step beside Trainer's own log."""

    def __init__(self, learner: Learner, steps: Steps, arguments: TrainingArguments, sample_every: int, ends: float, callbacks: list):
        super().__init__(model=learner, args=arguments, train_dataset=steps, callbacks=callbacks)
        self.remove_callback(PrinterCallback)
        self.facts, self.sample_every = {}, sample_every
        self.ends, self.over = ends, False  # the time; whether it has come for any process, so that all stop after the same step

    def get_train_dataloader(self) -> DataLoader:
        on_gpu = self.args.device.type == "cuda"  # on a CPU they would take the model's cores
        workers = min(WORKERS, (os.cpu_count() or 1) - 1) if on_gpu else 0
        return DataLoader(self.train_dataset, batch_size=1, collate_fn=_only, num_workers=workers, persistent_workers=False)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a step; gradients are summed over processes in its last pass only."""
        model.train()
        step, sums = self._prepare_inputs(inputs), torch.zeros(len(KINDS) + 1, 2, dtype=torch.float64, device=self.args.device)
        sampled = bool(self.sample_every) and self.state.global_step % self.sample_every == 0
        with recording(self.model.network) if sampled else contextlib.nullcontext({}) as peaks:
            for each, kinds in self._backward(model, step, sampled):
                sums.index_add_(0, kinds, torch.stack([each, torch.ones_like(each)], 1).double())
        sums[-1, 0] = time.perf_counter() > self.ends
        *sums, (over, _) = self.accelerator.reduce(sums).tolist()
        self.over = over > 0
        loss = sum(lost for lost, _ in sums) / step["answers"]
        self.facts = {"loss": loss, "kinds": {kind: lost / count for kind, (lost, count) in zip(KINDS, sums) if count},
                      "tokens": step["tokens"], "flop": step["flop"], "peaks": collected(peaks) if sampled else None,
                      "trouble": self.model.trouble()}
        return torch.tensor(loss, device=self.args.device)

    def _backward(self, model, step: dict, sampled: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Add a step's gradient to the weights'; loss and kind of each answer token of each pass. Where a GPU has no room for
        a pass beside its graphs, they go."""
        found = []
        try:
            for number, (ids, labels, kinds) in enumerate(step["passes"], 1):
                with self.accelerator.no_sync(model) if number < len(step["passes"]) else contextlib.nullcontext():
                    with self.compute_loss_context_manager():
                        total, each, rows = model(ids, labels, sampled)
                    self.accelerator.backward(total * (self.args.world_size / step["answers"]))
                found.append((each, kinds[rows]))
            return found
        except RuntimeError as error:
            if not (exhausted(error) and self.model.make_room(first_line(error))):
                raise
        self.model.zero_grad()  # of passes before
        return self._backward(model, step, sampled)

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, in a folder of another name until it is whole; the last KEPT stay."""
        out, step = Path(self.args.output_dir), self.state.global_step
        part = out / f".part-{step}"
        try:
            self.args.output_dir = str(part)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(out / f"checkpoint-{step}", ignore_errors=True)
                (part / f"checkpoint-{step}").rename(out / f"checkpoint-{step}")
                for old in found_checkpoints(out)[:-KEPT]:
                    shutil.rmtree(old)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = next(reversed(found_checkpoints(out)), None)
            raise ArcKernelError(f"{out}: checkpoint of step {step} cannot be saved ({' '.join(str(error).split())[:200]}): free some disk "
                                 f"and start again: it goes on from {last.name if last else 'the beginning'}") from None
        finally:
            self.args.output_dir = str(out)
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)

    def _save(self, output_dir=None, state_dict=None) -> None:
        self.model.save(Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self.model.load(Path(resume_from_checkpoint))


class Watch(TrainerCallback):
    """Guards each update and tells of each step. A step whose gradient is not finite changes no weight; several in a row end
    the run with `Diverged`, which names the last good checkpoint."""

    def __init__(self, dtype: str, out: Path, on_step: Callable[[int, dict], None]):
        self.dtype, self.out, self.on_step, self.lr, self.skipped, self.broken = dtype, out, on_step, 0.0, False, 0
        self.begun = time.perf_counter()
        self.trainer: StepTrainer | None = None

    def on_train_begin(self, args, state, control, **_):
        self.begun = time.perf_counter()
        state.save_steps = args.save_steps  # a checkpoint's would stay

    def on_pre_optimizer_step(self, args, state, control, **_):
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.lr = self.trainer.optimizer.param_groups[0]["lr"]
        self.skipped = not math.isfinite(torch.nn.utils.get_total_norm(gradients))
        self.broken = self.broken + 1 if self.skipped else 0
        if self.broken >= (SKIPS if self.dtype == "float16" else BROKEN):
            last = next(reversed(found_checkpoints(self.out)), None)
            raise Diverged(f"finetune: step {state.global_step + 1}: gradients are not finite {self.broken} steps in a row "
                           f"in {self.dtype}: the last good checkpoint is {last or 'none'}: lower lr, or give another dtype")
        if self.skipped and self.dtype != "float16":  # float16's loss scaling skips, and lowers its scale, by itself
            for p in self.trainer.model.parameters():
                p.grad = None

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in (logs or {}):
            return
        now, facts = time.perf_counter(), self.trainer.facts
        seconds, self.begun = now - self.begun, now
        self.on_step(state.global_step, {"gradient": logs.get("grad_norm"), "lr": self.lr, "seconds": seconds, "skipped": self.skipped,
                                         **facts})
        if self.trainer.over and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        self.begun = time.perf_counter()


def arguments(s: FinetuneSettings, out: Path, dtype: str, device: str) -> TrainingArguments:
    """Trainer's arguments for a run's settings. AdamW is torch's fused one, which CPUs and GPUs have."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")  # whatever was there
    made = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=s.steps, learning_rate=s.lr,
        lr_scheduler_type=s.schedule, lr_scheduler_kwargs={"num_cycles": s.restarts} if s.schedule == "cosine_with_restarts" else {},
        warmup_steps=round(s.warmup * s.steps), weight_decay=s.weight_decay, max_grad_norm=s.clip, optim="adamw_torch_fused", seed=s.seed,
        bf16=dtype == "bfloat16", fp16=dtype == "float16", use_cpu=device == "cpu", save_strategy="steps", save_steps=s.save_every,
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True, report_to="none", log_level="error",
        ddp_find_unused_parameters=False)
    made._n_gpu = min(made.n_gpu, 1)  # without torchrun one GPU is used; Trainer would take all with DataParallel
    return made


def train(learner: Learner, stream: Stream, settings: FinetuneSettings, lengths: np.ndarray, shape: Shape, dtype: str, device: str,
          on_step: Callable[[int, dict], None], callbacks: list) -> int:
    """Train until the last step or the end of the time budget, from the last whole checkpoint where there is one; the step
    that was reached.

    `on_step(step, facts)` is called in each process after each step. Raises Diverged where gradients stay infinite, ArcKernelError
    where a checkpoint cannot be saved.
    """
    out = settings.out_path / CHECKPOINTS
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch < world:
        raise ArcKernelError(f"finetune: a batch of {settings.batch} is less than an example for each of {world} processes: raise batch")
    if settings.sample_every:
        try:
            check_layout(learner.base)
        except UnknownLayout as error:
            raise ArcKernelError(f"{error}: set sample_every=0") from None
    for left in out.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    ends = time.perf_counter() + settings.time_budget if settings.time_budget else math.inf
    watch = Watch(dtype, out, on_step)
    steps = Steps(stream, settings, lengths, shape, rank, world)
    trainer = StepTrainer(learner, steps, arguments(settings, out, dtype, device), settings.sample_every, ends,
                          [watch, *callbacks])
    watch.trainer = trainer
    last = next(reversed(found_checkpoints(out)), None)
    if last and step_of(last) >= settings.steps:
        learner.load(last)
        return settings.steps
    if last:
        check_whole(last)
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        return trainer.state.global_step
    finally:
        watch.trainer = None


def found_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    numbered = [f for f in folder.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdecimal() and f.is_dir()]
    return sorted(numbered, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def check_whole(checkpoint: Path) -> None:
    """Raise ArcKernelError where a file of the Trainer's is missing, broke off, as in a copy that was not finished, or is damaged.
    `Learner.load` looks at weights."""
    for file in sorted({*checkpoint.glob("*.pt*"), checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"}):
        try:  # torch's archives: the table of contents comes last, and each part has a checksum
            with zipfile.ZipFile(file) as archive:
                wrong = archive.testzip() and "damaged"
        except (OSError, zipfile.BadZipFile, RuntimeError) as error:  # the last: flags and methods that zipfile does not know
            wrong = f"broken off ({first_line(error)})" if file.is_file() else "not there"
        if wrong:
            raise ArcKernelError(f"{file}: {wrong}: delete {checkpoint} to go on from the one before it")
    file = checkpoint / "trainer_state.json"
    try:
        state = read_json(file)
        if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
            raise ValueError("not of this step")
    except (OSError, ValueError) as error:
        seen = first_line(error)
        raise ArcKernelError(f"{file}: cannot be read ({seen}): delete {checkpoint} to go on from the one before it") from None


def _only(rows: list) -> dict:
    """The one step of a batch of one."""
    return rows[0]
