"""Test-time fine-tuning: one task's LoRA from the task's own pairs.

Everything turns around `TaskTrainer`: the base model is loaded once, the adapter is reset per task, each training step
asks for one pair's output given the others (leave-one-out) under a random view, and with `all_outputs` for every output but
the first, given the pairs before it. Test outputs are never read. Knows nothing of inference.

Sources: per-task fine-tuning with leave-one-out tasks is Akyürek et al. 2024, "The Surprising Effectiveness of Test-Time
Training for Abstract Reasoning"; recipe and constants are arc24's (github.com/ironbar/arc24).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np

from .adapter_fit import open_adapter
from .checkpoint import check_adapter, load_model
from .errors import ArcKernelError, first_line
from .files import read_json, whole_folder, write_json
from .memory import exhausted
from .passes import answer_tokens, padded, together
from .precision.probe import UnknownLayout, check_layout, collected, recording
from .precision.rescale import Rescale
from .prompts import Example, PromptBuilder
from .tasks import COLOURS, Pair, Task
from .views import random_view, task_rng

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LOSS_SCALE = 2.0**12  # float16's first loss scale; halved when a gradient does not fit, doubled after 2,000 steps (torch's)
SKIPS = 12  # float16 steps in a row without a finite gradient: the scale has come down to 1
KEEP_EVERY = 10  # steps between two states of the adapter to go back to
ROLLBACKS = 3  # of a task before its dtype is given up
LR_DROP = 0.5  # of the learning rate at each of them
GRADIENT_NORM = 1.0  # transformers' TrainingArguments.max_grad_norm, which arc24 keeps
WARMUP = 0.05  # share of the steps
MADE_UP = (3, 3), (4, 6), (5, 5), (7, 8)  # sides of grids to look at: some 500 tokens of a prompt ...
MADE_UP_TOKENS = 1024  # ... and room for it, however little the recipe leaves


def default_lr(parameters: int) -> float:
    """Peak learning rate for a model of so many weights: 8e-5 at 494M, 8e-4 at 135M, a power law through both, held outside.

    Source: arc24's final recipe (8e-5 for Qwen2.5-0.5B, 320 steps) and its iteration 46 (small models want about ten
    times as much).
    """
    size = min(max(parameters, 135e6), 494e6)
    return 8e-5 * 10 ** (math.log(494e6 / size) / math.log(494e6 / 135e6))


def fewest_steps(steps: int) -> int:
    """Of so many steps the fewest a task is trained for where its time is short: 40 of 320. A guess: one or two teach nothing."""
    return min(steps, max(8, steps // 8))


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: steps, examples per step, peak learning rate, LoRA rank, context, background, seed, loss on all outputs."""

    steps: int
    batch: int
    lr: float
    rank: int
    max_seq_len: int
    permute_background: bool
    seed: int
    all_outputs: bool = False


class CannotTrain(ArcKernelError):
    """The task gives no training example; it is answered without an adapter."""


class TaskTrainer:
    """A base model and one LoRA that is reset for each task. `start` names a trained LoRA to start each task from.

    Where `model` holds weights rescaled by `rescale`, each layer's LoRA is scaled like its weight, so that A and B, their
    gradients, and what is saved are those of the original weights. `left_out` says what gets no LoRA (see the function). On a
    GPU passes are CUDA graphs where they can be (`decoder_pass`), unless `graphs` is False; `slow` says what a CPU lacks. In `int8` the
    frozen weights are multiplied with in 8 bits, all else is in `int8.rest`, and passes are in C where they can be (`cpu_pass`). `peaks`:
    how large activations get with an adapter is looked at and saved, for an engine in float16; it takes as long as a step.
    """

    def __init__(self, model: Path, builder: PromptBuilder, recipe: Recipe, start: Path | None, device: str, dtype: str,
                 rescale: Rescale | None = None, graphs: bool = True, peaks: bool = True):
        import torch

        from . import cpu_kernels, cpu_pass, decoder_pass, fused_layer, int8  # import torch, which `run` can do without
        from .answer_loss import LOOKED_AT, plain_head
        from .flat_weights import FlatWeights

        self.recipe, self.builder, self.device, self.dtype, self.rescale, self.peaks = recipe, builder, device, dtype, rescale, peaks
        rest = int8.rest(dtype, device)
        self._rest, base = getattr(torch, rest), load_model(model, rest, device)
        self.slow = cpu_kernels.missing() if device == "cpu" and rest == "bfloat16" else ""
        try:
            check_layout(base)
        except UnknownLayout as error:
            raise ArcKernelError(f"{error}: set ttt_steps=0") from None
        base.config.use_cache = False
        self.left_out = left_out(base) if start is None else ""
        plain_head(base, torch.arange(LOOKED_AT, device=device)[None])  # looked at now: the base by itself, outside of any graph or cast
        self.model = with_lora(base, model, recipe.rank, start).eval()  # to train, too: dropout would draw on what tasks before left
        if rescale is not None:
            for name, module in self.model.get_base_model().named_modules():
                if hasattr(module, "lora_A"):
                    module.scaling["default"] *= 2.0 ** rescale.exponent(f"{name}.weight")
        fused = fused_layer.install(self.model)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self._flat = FlatWeights(self.weights, fused.groups)
        self._start = None if start is None else self._flat.tensor.detach().clone()
        graphs = graphs and device == "cuda" and decoder_pass.fits(base, fused)
        self._decoder = decoder_pass.Decoder(base, fused, self._flat) if graphs else None
        if dtype == "int8":
            self._round(fused.groups)
            self._decoder = cpu_pass.Decoder(base, fused, self._flat) if cpu_pass.fits(base, fused) else None

    def _round(self, groups: list) -> None:
        """Multiply with the frozen weights in 8 bits, those of layers that a pass goes through, the head aside. What is usual there is
        looked at on an example of its own, the same for all tasks and workers."""
        from .lora_linear import watched

        rng = np.random.default_rng(0)
        grids = [rng.integers(COLOURS, size=sides).astype(np.int8) for sides in MADE_UP]
        task = Task("made up", tuple(Pair(grid, np.fliplr(grid)) for grid in grids), ())
        recipe = dataclasses.replace(self.recipe, max_seq_len=max(self.recipe.max_seq_len, MADE_UP_TOKENS))
        with watched(groups) as found:
            self._loss([next(leave_one_out(task, self.builder, recipe, rng))]).backward()
        self._flat.tensor.grad.zero_()
        head = self.model.get_base_model().get_output_embeddings().weight
        for group, columns in found.items():
            if len(columns) == 2 and group.weight is not head:  # forward and back
                group.round_weight(*columns)

    def train(self, task: Task, folder: Path, on_step: Callable[[int, float, int], None],
              on_trouble: Callable[[str], None] = lambda text: None, examples: Iterator[Example] | None = None,
              seconds: float = math.inf) -> dict:
        """Fine-tune on `task` and save the adapter as `folder` by write-then-rename, with its range.json.

        Where the recipe's steps do not fit into `seconds`, there are fewer, `fewest_steps` at least: the learning rate then falls
        with the time instead of the steps, so that it has come down when the time is over.

        `on_step(step, loss, tokens)` is called after each step with its mean loss per answer token (nats) and its tokens.
        Where a loss or gradient is not finite, the adapter goes back to its last good state and on at a lower learning
        rate; `on_trouble` is told. `examples` are trained on instead of the task's own, for benchmarks. Returns the `steps`
        taken, and how often: `rollbacks`, and `skipped`, float16 steps lost to loss scaling. Raises CannotTrain where the
        task gives no example, FloatingPointError where ROLLBACKS did not help.
        """
        import torch

        rng = task_rng(self.recipe.seed, task.id, "adapt")
        examples = leave_one_out(task, self.builder, self.recipe, rng) if examples is None else examples
        self._reset(int(rng.integers(2**31)))
        flat = self._flat.tensor
        optimizer = torch.optim.AdamW([flat], lr=self.recipe.lr, weight_decay=0.0, fused=True)
        scaler = torch.amp.GradScaler(self.device, init_scale=LOSS_SCALE, enabled=self.dtype == "float16")
        good, step, factor, facts, skips = None, 0, 1.0, {"rollbacks": 0, "skipped": 0}, 0
        begun, steps = time.perf_counter(), self.recipe.steps
        by_time = lambda: steps * min((time.perf_counter() - begun) / seconds, step / fewest_steps(steps))
        while (done := max(step, by_time())) < steps:
            drawn = [next(examples) for _ in range(self.recipe.batch)]
            loss = self._backward(drawn, scaler)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(flat, GRADIENT_NORM)
            loss, norm = torch.stack([loss, norm]).tolist()  # both at once: a GPU is waited for once
            finite = math.isfinite(loss)
            overflowed = finite and not math.isfinite(norm) and self.dtype == "float16" and skips < SKIPS
            if overflowed:  # the scaled gradient did not fit: once more with a smaller scale
                skips, facts["skipped"] = skips + 1, facts["skipped"] + 1
                scaler.step(optimizer)
                scaler.update()
                flat.grad.zero_()
                continue
            if not finite or not math.isfinite(norm):
                seen = f"{'gradient' if finite else 'loss'} is not finite at step {step + 1} in {self.dtype}"
                if good is None or facts["rollbacks"] >= ROLLBACKS:
                    raise FloatingPointError(seen)
                facts["rollbacks"] += 1
                factor *= LR_DROP
                step, skips = self._go_back(good, optimizer), 0
                scaler = torch.amp.GradScaler(self.device, init_scale=LOSS_SCALE, enabled=self.dtype == "float16")
                on_trouble(f"{seen}: back to step {step} at {factor:g} of the learning rate")
                continue
            if step % KEEP_EVERY == 0:
                good = self._keep(step, optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * factor * _schedule(done, steps)
            scaler.step(optimizer)
            scaler.update()
            flat.grad.zero_()
            step, skips = step + 1, 0
            on_step(step, loss, sum(len(e.input_ids) for e in drawn))
            if self._decoder and (trouble := self._decoder.told()):
                on_trouble(trouble)
        if not torch.isfinite(flat).all():
            raise FloatingPointError(f"adapter weights are not finite after training in {self.dtype}")
        save_adapter(self.model, folder, {"range.json": {"steps": step} | ({"peaks": self._peaks(task)} if self.peaks else {})})
        return {"steps": step} | facts

    def _keep(self, step: int, optimizer) -> tuple:
        """A copy of the adapter and the optimizer's state before the update of `step`."""
        return step, self._flat.tensor.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def _go_back(self, good: tuple, optimizer) -> int:
        """Put a kept state back; its step."""
        step, weights, state = good
        self._flat.tensor.data.copy_(weights)
        optimizer.load_state_dict(copy.deepcopy(state))
        self._flat.tensor.grad.zero_()
        return step

    def _peaks(self, task: Task) -> dict[str, list[float]]:
        """Peaks by site and layer of the adapted model on the task's own first prompt, as they are without rescaling."""
        import torch

        kept = self.builder.fit(task.train, task.test[0].input, 1, self.recipe.max_seq_len)
        pairs = tuple(task.train[k] for k in kept or ())
        ids = self.builder.prompt_ids(pairs, task.test[0].input)[: self.recipe.max_seq_len]
        with (torch.no_grad(), recording(self.model) as peaks, self._flat.cast(self._rest),
              torch.autocast(self.device, self._rest, enabled=self._rest != torch.float32)):
            self.model(input_ids=torch.tensor([ids], device=self.device), logits_to_keep=1)
        found = collected(peaks)
        return self.rescale.scaled(found, back=True) if self.rescale else found

    def _backward(self, drawn: list[Example], scaler):
        """Add a step's gradient to the weights'; its mean loss per answer token, on the device."""
        count = sum(map(answer_tokens, drawn))
        try:
            loss = 0.0
            for group in together(drawn, self.recipe.max_seq_len):
                part = self._loss([drawn[i] for i in group]) / count
                scaler.scale(part).backward()
                loss += part.detach()
            return loss
        except RuntimeError as error:
            if not (exhausted(error) and self._decoder and self._decoder.make_room(first_line(error))):
                raise
        self._flat.tensor.grad.zero_()  # of passes before
        return self._backward(drawn, scaler)

    def _loss(self, examples: list[Example]):
        """Cross entropy (nats) summed over the labelled positions of the examples of a pass."""
        import torch

        from .answer_loss import answer_losses

        ids, labels = (torch.from_numpy(a).to(self.device) for a in padded(examples))
        base = self.model.get_base_model()
        if self._decoder:
            return answer_losses(base, ids, labels, self._decoder)[0]
        with self._flat.cast(self._rest), torch.autocast(self.device, self._rest, enabled=self._rest != torch.float32):
            return answer_losses(base, ids, labels)[0]

    def _reset(self, seed: int) -> None:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in self.model.modules():
                if self._start is None and hasattr(module, "reset_lora_parameters"):
                    module.reset_lora_parameters("default", init_lora_weights=True)
        if self._start is not None:
            self._flat.tensor.data.copy_(self._start)
        self._flat.tensor.grad.zero_()


def nothing_to_adapt(model: Path | str) -> ArcKernelError:
    """The error for a model without any of TARGET_MODULES."""
    return ArcKernelError(f"{model}: none of {', '.join(TARGET_MODULES)} in this architecture: no LoRA can be trained on it (solve answers "
                          "without one where ttt_steps=0)")


def left_out(base) -> str:
    """What to say of a model's linear modules, its head aside, that are none of TARGET_MODULES, and of weights that are several
    matrices at once, as experts'; empty where there are none. Where an architecture names its layers otherwise, as Phi-3 its
    qkv_proj, a fresh LoRA leaves them as they are."""
    import torch

    head = base.get_output_embeddings()
    linear = {name.rpartition(".")[2] for name, module in base.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not head}
    stacked = {name.rpartition(".")[2] for name, weight in base.named_parameters() if weight.ndim == 3 and not name.endswith(".weight")}
    others = [*sorted(linear - set(TARGET_MODULES)), *(f"experts' {name}" for name in sorted(stacked))]
    return f"no LoRA on {', '.join(others)}: {', '.join(TARGET_MODULES)} alone are adapted" if others else ""


def with_lora(base, folder: Path, rank: int, start: Path | None):
    """The model of `folder`, loaded as `base`, with a LoRA in fp32, whatever the model computes in: a fresh one of this
    `rank`, or the one in `start`.

    Raises ArcKernelError where none of the architecture's layers can be adapted, and where `start` is not opened.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if start is None:
        present = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        targets = [t for t in TARGET_MODULES if t in present]
        if not targets:
            raise nothing_to_adapt(folder)
        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
    else:
        model = open_adapter(base, start, is_trainable=True)
        model.peft_config["default"].lora_dropout = 0.0
        for module in (m for m in model.modules() if hasattr(m, "lora_dropout")):
            module.lora_dropout["default"] = torch.nn.Identity()
    model.peft_config["default"].base_model_name_or_path = folder.name  # a name, not a machine's path
    for weight in (p for p in model.parameters() if p.requires_grad):
        weight.data = weight.data.to(torch.float32)
    return model


def save_adapter(model, folder: Path, beside: dict[str, dict] | None = None) -> None:
    """Write the LoRA of a peft model as `folder` by write-then-rename, with JSON files `beside` its weights."""
    with whole_folder(folder, replace=True) as fresh:
        model.save_pretrained(fresh, save_embedding_layers=False)  # "auto" asks a hub
        with contextlib.suppress(FileNotFoundError):
            (fresh / "README.md").unlink()  # peft's empty model card
        config = read_json(fresh / "adapter_config.json")
        if isinstance(config["target_modules"], list):  # peft's set, in another order each time; a start adapter's may be a pattern
            config["target_modules"].sort()
        (fresh / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        for name, facts in (beside or {}).items():
            write_json(fresh / name, facts)


def set_aside(folder: Path) -> None:
    """Put a task's adapter where no engine looks for it, while another is trained; a damaged one goes."""
    if steps_taken(folder):
        folder.replace(_aside(folder))
    shutil.rmtree(folder, ignore_errors=True)


def keep_longer(folder: Path) -> int:
    """Of a task's adapter and one that was set aside keep that of more steps, as `folder`; the steps where it was set aside, else 0."""
    old, kept = _aside(folder), 0
    if old.is_dir():
        if (steps := steps_taken(old)) > steps_taken(folder):
            shutil.rmtree(folder, ignore_errors=True)
            old.replace(folder)
            kept = steps
        shutil.rmtree(old, ignore_errors=True)
    return kept


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.aside")


def steps_taken(folder: Path) -> int:
    """The steps a task's saved adapter was trained for; 0 where there is none, none that says so, or a damaged one."""
    try:
        check_adapter(folder)
        return int(read_json(folder / "range.json")["steps"])
    except (ArcKernelError, OSError, ValueError, TypeError, KeyError):
        return 0


def leave_one_out(task: Task, builder: PromptBuilder, recipe: Recipe, rng: np.random.Generator) -> Iterator[Example]:
    """Endless training examples of a task: in each round every train pair is the target once, in random order and view.

    A target's context loses its longest pairs where the example would pass `max_seq_len`; a target that does not fit with
    one context pair is left out. Raises CannotTrain where no target is left. Never reads a test pair.
    """
    contexts = {}
    for target, pair in enumerate(task.train):
        others = tuple(i for i in range(len(task.train)) if i != target)
        kept = builder.fit_example(tuple(task.train[i] for i in others), pair, recipe.max_seq_len)
        if kept is not None:
            contexts[target] = tuple(others[k] for k in kept)
    if not contexts:
        reason = "no train pair" if not task.train else f"no train pair fits into max_seq_len {recipe.max_seq_len}"
        raise CannotTrain(f"task {task.id}: {reason}: answered without an adapter")

    def rounds():
        while True:
            for target in rng.permutation(list(contexts)):
                context = contexts[int(target)]
                view = random_view(len(context), rng, recipe.permute_background)
                shown = tuple(view.apply_pair(task.train[context[k]]) for k in view.order)
                yield builder.example(shown, view.apply_pair(task.train[int(target)]), recipe.all_outputs)

    return rounds()


def _schedule(done: float, steps: int) -> float:
    """Share of the peak learning rate after so many of the steps: linear warmup, then linear to zero."""
    warmup = max(1, round(WARMUP * steps))
    return min((done + 1) / warmup, max(0.0, steps - done) / max(1, steps - warmup))
