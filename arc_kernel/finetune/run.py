"""One fine-tuning run on one output folder, and what comes before it: data read, looked through and measured.

`prepare` reads data once, also for several runs; `run` trains on it. The files in the folder are the state: a killed run started
again on it goes on from its last whole checkpoint. Under torchrun the first process alone writes and speaks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from .. import ceilings, checkpoint, progress, trained_prompt
from ..device import device_model, device_name
from ..errors import ArcKernelError, counted
from ..events import EventLog, read_events
from ..files import read_json, replacing, take_folder, write_json
from ..grids import GridEncoder
from ..precision import verdict
from ..precision.verdict import digest
from ..prompts import PromptBuilder
from ..tasks import Task, is_task_id, load_challenges, task_to_json
from . import overlap, page
from .data import CONTEXT, Source, open_source
from .settings import FinetuneSettings
from .stream import Stream, check_lengths

HELD_OUT = "held_out.json"
PAGE_SECONDS = 60.0  # at least, from one page of a run that goes on to the next
MAIN = int(os.environ.get("RANK", 0)) == 0


@dataclass(frozen=True)
class Prepared:
    """What runs on the same data share: the model's folder, the stream, sampled lengths, tasks held out, what was seen."""

    folder: Path
    stream: Stream
    lengths: np.ndarray
    held_out: tuple[Task, ...]
    notes: tuple[str, ...]


def prepare(s: FinetuneSettings) -> Prepared:
    """Read the data, take out what is held out, look for evaluation tasks in it, measure its lengths.

    Raises ArcKernelError in one line for data that cannot be used, that holds evaluation tasks, or that is too long.
    """
    folder, s = checkpoint.open_model(s.model), trained_prompt.resolved(s)
    longest = min(s.max_seq_len, checkpoint.context_length(folder))
    limit = min(s.max_tokens or longest, longest)
    builder = PromptBuilder(checkpoint.load_tokenizer(folder), GridEncoder.from_name(s.grid_encoder), s.prompt)
    sources = [open_source(argument) for argument in s.data]
    for source in (source for source in sources if source.tokens > limit):
        raise ArcKernelError(f"--data {source.name}: longer than the {limit} tokens of an example: "
                             f"raise max_seq_len (and the model's context), or give fewer")
    notes = [f"{source.name}: {counted(len(source.groups), 'task')} as {source.kind}, weight {source.weight:g}" if source.groups else
             f"{source.name}: made as drawn, weight {source.weight:g}" for source in sources]
    notes += [f"{source.name}: left out: {source.broken}" for source in sources if source.broken]
    held_out = hold_out(sources, s.hold_out, s.seed, builder, limit)
    if held_out:
        named = {t.id for t in held_out}
        twins = overlap.find(held_out, [source.without(named) for source in sources])  # the same under another name
        sources = [source.without(named | {f.group for f in twins if f.source == source.name}) for source in sources]
        notes.append(f"{counted(len(held_out), 'task')} held out: {HELD_OUT}")
    if s.evaluation_tasks and any(source.groups for source in sources):
        evaluation = load_challenges(s.evaluation_tasks)
        for error in evaluation.broken.values() if not s.allow_overlap else ():
            raise ArcKernelError(f"finetune: an evaluation task cannot be looked for in the data: {error}: mend it, or --allow-overlap")
        found = overlap.find(evaluation.tasks.values(), sources)
        if found and not s.allow_overlap and not s.drop_overlap:
            raise ArcKernelError(f"finetune: {overlap.text(found)}: leave them out with --drop-overlap, or train on them knowingly "
                                 f"with --allow-overlap")
        if s.drop_overlap:
            sources = [source.without({f.group for f in found if f.source == source.name}) for source in sources]
        notes.append(overlap.text(found) + ", left out" * bool(found and s.drop_overlap))
    stream = Stream(sources, builder, s.seed, longest, s.compose, s.max_tokens, s.loss == "all", s.background == "permuted")
    lengths = stream.lengths()
    notes.append(check_lengths(lengths, limit, s.max_too_long))
    return Prepared(folder, stream, lengths, held_out, tuple(notes))


def hold_out(sources: list[Source], count: int, seed: int, builder: PromptBuilder, longest: int) -> tuple[Task, ...]:
    """`count` tasks drawn from the pools, each of 2 to 4 train pairs and a test pair, that fit into `longest` tokens.

    Raises ArcKernelError where the pools have fewer.
    """
    pools = {g.id: g for source in sources for g in source.groups if not g.whole}
    rng, tasks = np.random.default_rng((seed, len(pools))), []
    for i in rng.permutation(len(pools)) if count else ():
        group = pools[sorted(pools)[i]]
        shown = 1 + int(rng.integers(min(CONTEXT), max(CONTEXT)))
        small = [p for p in group.variations[0] if (p.input.size + p.output.size) * shown <= longest]
        pairs = [small[k] for k in rng.permutation(len(small))[:shown]]
        if len(pairs) <= min(CONTEXT):
            continue
        if builder.fit_example(tuple(pairs[:-1]), pairs[-1], longest) == tuple(range(len(pairs) - 1)):
            if not is_task_id(group.id):
                raise ArcKernelError(f"finetune: hold_out {count}: {group.id!r} cannot be a task's id: use letters, digits, '_', '-', '.'")
            tasks.append(Task(group.id, tuple(pairs[:-1]), (pairs[-1],)))
        if len(tasks) == count:
            return tuple(tasks)
    if count and not pools:
        raise ArcKernelError(f"finetune: hold_out {count}: tasks are held out of pools (JSON lines with many pairs a task), and none is "
                             "given: leave it out")
    if count:
        raise ArcKernelError(f"finetune: hold_out {count}: only {len(tasks)} tasks of pools fit into {longest} tokens: hold out fewer")
    return ()


class Run:
    """One run with everything resolved: its folder claimed, its events told."""

    def __init__(self, settings: FinetuneSettings, prepared: Prepared):
        self.s, self.prepared, self.out = trained_prompt.resolved(settings), prepared, settings.out_path
        self.log = EventLog(self.out, time.perf_counter(), silent=not MAIN)
        self.tokens, self.seconds, self._shown = 0, 0.0, time.perf_counter()
        self._lock = FileLock(self.out / ".lock", timeout=0)
        if MAIN:
            self._claim_folder()
        for text in prepared.notes:
            self.log.say("data", text=text)

    def train(self) -> dict:
        """Train, write adapter or model and report.html; returns their paths, the last loss, tokens/s and the share of peak."""
        import torch

        from ..cpu_kernels import missing
        from .learner import Learner
        from .train import CHECKPOINTS, Diverged, found_checkpoints, step_of, train

        s, folder, device = self.s, self.prepared.folder, device_name()
        if device == "cuda":  # before anything is measured or put there
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dtype = training_dtype(s.dtype, device)
        torch.manual_seed(s.seed)
        learner = Learner(folder, s.lora_rank, Path(s.adapter) if s.adapter else None, dtype, s.gradient_checkpointing, device)
        slow = missing() if (device, dtype) == ("cpu", "bfloat16") else ""
        for text in filter(None, (learner.left_out, slow)):
            self.log.say("data", text=text)
        trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
        self.peak = ceilings.gemm(dtype, device, repeats=3)
        self.log.say("start", text=f"{trained / 1e6:.1f}M weights trained in {dtype} on {device_model(device)}, "
                                f"products at {self.peak / 1e9:.0f} GFLOP/s", dtype=dtype, trained=trained, peak=self.peak)
        before = max(map(step_of, found_checkpoints(self.out / CHECKPOINTS)), default=0)
        with progress.bar(s.steps if MAIN else 0, "finetune", "step", min(s.steps, before)) as self._bar:
            try:
                reached = train(learner, self.prepared.stream, s, self.prepared.lengths, ceilings.shape_of(folder), dtype, device,
                                self._step, self._callbacks())
            except Diverged as error:
                self.log.add("diverged", text=str(error))
                if MAIN:
                    page.write_report(self.out, s)
                raise
        if not MAIN:
            return {}
        result = learner.save_result(self.out, {"prompt": s.prompt, "grid_encoder": s.grid_encoder})
        if reached < s.steps:
            self.log.say("out-of-time", text=f"stopped at step {reached} of {s.steps} after {s.time_budget:g} s: start again to go on")
        return {"result": result, "step": reached, "report": page.write_report(self.out, s)} | page.figures(read_events(self.out))

    def _step(self, step: int, facts: dict) -> None:
        """Tell of a step: tokens/s and share of the product peak of all processes from its seconds."""
        if not MAIN:
            return
        world = int(os.environ.get("WORLD_SIZE", 1))
        peaks, seconds, flop, trouble = facts.pop("peaks"), facts["seconds"], facts.pop("flop"), facts.pop("trouble")
        facts |= {"tokens_per_second": facts["tokens"] / seconds, "peak_share": flop / seconds / self.peak / world}
        if peaks:
            site, values = max(peaks.items(), key=lambda item: max(item[1]))
            facts |= {"largest": max(values), "site": site}
        self.log.add("step", step=step, **facts)
        if facts["skipped"]:
            self.log.say("skipped", text=f"step {step}: the gradient is not finite: no weight was changed", step=step)
        if trouble:
            self.log.say("slow", text=f"step {step}: {trouble}", step=step)
        self.tokens, self.seconds = self.tokens + facts["tokens"], self.seconds + seconds
        self._bar.set_postfix_str(f"{self.tokens / self.seconds:.0f} tok/s, loss {facts['loss']:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)
        if step % self.s.save_every == 0 and time.perf_counter() - self._shown > PAGE_SECONDS:
            page.write_report(self.out, self.s)  # as it stands, for who looks before the end
            self._shown = time.perf_counter()

    def _callbacks(self) -> list:
        """TensorBoard's, where it is installed: the same figures, in `out`/tensorboard."""
        if not MAIN or not importlib.util.find_spec("tensorboard"):
            return []
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(log_dir=str(self.out / "tensorboard")))]

    def _claim_folder(self) -> None:
        """Make the output folder this run's: refuse one that cannot be written, or holds a run with other settings."""
        path, prepared = self.out / "settings.json", self.prepared
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            take_folder(self._lock, self.out)
            weights = [checkpoint.weights_sha256(folder) for folder in (prepared.folder, *[Path(self.s.adapter)] * bool(self.s.adapter))]
            data = [[source.sha256() for source in prepared.stream.sources], [with_solutions(t) for t in prepared.held_out]]
            made_of = {"data_sha256": digest(data), "weights_sha256": digest(weights)}
            if path.is_file():
                check_settings(self.s)
                stored = read_json(path)
                if changed := [name for name in made_of if stored.get(name, made_of[name]) != made_of[name]]:
                    raise ArcKernelError(f"{self.out}: holds a run with other {' and '.join(n.removesuffix('_sha256') for n in changed)} "
                                         "under the same name: give another --out, or delete it")
            write_json(path, json.loads(self.s.to_json()) | made_of)
            if self.prepared.held_out:
                with replacing(self.out / HELD_OUT) as file:
                    json.dump({t.id: with_solutions(t) for t in self.prepared.held_out}, file)
        except OSError as error:
            self.stop()
            raise ArcKernelError(f"{self.out}: cannot be written ({error.strerror}): give another --out") from None
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Let others have the folder."""
        self._lock.release(force=True)


def training_dtype(wanted: str, device: str) -> str:
    """The dtype products are computed in: `auto` is bfloat16 where native, else float16 on a GPU, float32 on a CPU.

    Raises ArcKernelError for float16 on a CPU, where Trainer has no loss scaling.
    """
    if wanted == "float16" and device == "cpu":
        raise ArcKernelError("finetune: dtype float16 needs a GPU: give float32, or bfloat16 where the CPU has it")
    first = verdict.candidates(wanted, device)[0]
    return "float32" if first == "float16" and device == "cpu" else first


def with_solutions(task: Task) -> dict:
    """A task as Kaggle's challenges have it, with its test outputs in the test pairs: `solve` reads, hides and scores them."""
    made = task_to_json(task)
    del made["id"]
    for shown, pair in zip(made["test"], task.test):
        shown["output"] = pair.output.tolist()
    return made


def check_settings(s: FinetuneSettings) -> None:
    """Raise ArcKernelError where the output folder of these settings holds a run with others."""
    if lines := trained_prompt.resolved(s).differences(stored_settings(s.out_path)):
        raise ArcKernelError(f"{s.out_path}: holds a run with other settings ({'; '.join(lines)}): give another --out, or delete it")


def stored_settings(out: Path) -> FinetuneSettings:
    """The settings of a run folder; raises ArcKernelError naming the file."""
    path = out / "settings.json"
    try:
        stored = read_json(path)
        return FinetuneSettings.from_parameters({k: v for k, v in stored.items() if not k.endswith("_sha256")})
    except FileNotFoundError:
        raise ArcKernelError(f"{path}: no such file: give the output folder of a fine-tuning run") from None
    except (OSError, ValueError, TypeError, AttributeError, ArcKernelError) as error:
        raise ArcKernelError(f"{path}: not the settings of a fine-tuning run ({error}): give another --out") from None


def finetune(settings: FinetuneSettings, prepared: Prepared | None = None) -> dict:
    """The whole run; returns what `Run.train` returns. Raises ArcKernelError in one line."""
    from safetensors import SafetensorError

    run = None
    try:
        run = Run(settings, prepared or prepare(settings))
        return run.train()
    except (OSError, SafetensorError) as error:
        raise ArcKernelError(f"{settings.out}: cannot be written ({error}): free some disk and start again: it goes on from its "
                             f"last checkpoint") from None
    finally:
        if run is not None:
            run.stop()
