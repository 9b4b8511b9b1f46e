"""Voting against scoring: which rule finds the right grid among the candidates of finished runs.

    python -m benchmarks.selection runs/a [runs/b ...]

Each candidate of a test input is scored by the task's own model and adapter: its logprob (nats) as the answer under each
of the views that were asked, as if that view had given it. Rules then pick two attempts: `vote`, what `solve` does; `score`, the
sum over views (a product of experts); `vote, score`, where scores part candidates with equal votes. To see more than one draw of
views, each rule is also given the answers and scores of fewer views, the mean of CHOICES draws. `first` and
`two` are right outputs by one and by two attempts, `any` what a perfect rule would find. Everything in float32; on 2 cores a test
input of 8 views and 5 candidates takes 20 s.

Source: product of experts over augmentations, Franzen et al. 2025, "Product of Experts with LLMs: Boosting Performance on ARC Is a
Matter of Perspective".
"""

import argparse
import copy
import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from arc_kernel import checkpoint, progress
from arc_kernel.device import device_name
from arc_kernel.prompts import PromptBuilder
from arc_kernel.run_folder import RunFolder, read_run
from arc_kernel.tasks import Grid, Task
from arc_kernel.views import View

SIZES = (2, 4, 6, 8, 16, 32)  # views of which rules are given the answers
CHOICES = 200  # draws of fewer views


@dataclass(frozen=True)
class Scored:
    """A test input's candidates under its views: `scores` [views, candidates], logprobs in nats; `gave` bool [views, candidates], which
    view's answer the candidate is; `own` [views], each view's logprob per token of its own answer; `right` bool [candidates]."""

    scores: np.ndarray
    gave: np.ndarray
    own: np.ndarray
    right: np.ndarray


def logprobs(model, prompt: list[int], answers: list[list[int]]) -> list[float]:
    """The logprob (nats) of each answer after the prompt."""
    found, whole = [], lambda ids: torch.tensor([ids], device=model.device)
    with torch.no_grad():
        read = model(input_ids=whole(prompt), use_cache=True, logits_to_keep=1)
        for answer in answers:
            rest = model(input_ids=whole(answer[:-1]), past_key_values=copy.deepcopy(read.past_key_values), use_cache=True)
            logits = torch.cat([read.logits[0, -1:], rest.logits[0]]).float().log_softmax(-1)
            found.append(float(logits.gather(1, whole(answer)[0, :, None]).sum()))
    return found


def scored(run: RunFolder, builder: PromptBuilder, model, task: Task, index: int) -> Scored:
    """One test input of a task with some candidates, by the model with the task's adapter."""
    found, right = run.candidates[task.id][index], task.test[index].output
    kept = builder.fit(task.train, task.test[index].input, builder.longest_answer, run.settings.max_seq_len)
    fitted = Task(task.id, tuple(task.train[k] for k in kept), task.test)
    answers = {c.view: c.logprob / max(1, c.tokens) for c in run.answers(task.id, index)}
    each = lambda view: logprobs(model, builder.prompt(view, fitted, index), [builder.answer_ids(view.apply_grid(c.grid)) for c in found])
    return Scored(np.array([each(View.parse(v)) for v in answers]), np.array([[v in c.views for c in found] for v in answers]),
                  np.array(list(answers.values())), np.array([np.array_equal(c.grid, right) for c in found]))


def picked(one: Scored, views: np.ndarray) -> dict[str, tuple[bool, bool, bool]]:
    """By rule whether the first and one of two attempts is right, and whether any candidate is, of these views' answers."""
    gave, scores = one.gave[views], one.scores[views].sum(0)
    votes = gave.sum(0)
    there = np.flatnonzero(votes)
    logprob = (gave * one.own[views, None]).sum(0) / np.maximum(1, votes)
    keys = {"vote": (logprob, votes), "score": (scores,), "vote, score": (scores, votes)}
    orders = {rule: there[np.lexsort([-k[there] for k in key])] for rule, key in keys.items()}
    return {rule: (bool(one.right[o[:1]].any()), bool(one.right[o[:2]].any()), bool(one.right[o].any())) for rule, o in orders.items()}


def table(found: list[Scored]) -> list[str]:
    """Right outputs by number of views and rule."""
    lines = [f"{'views':>5}  {'rule':12} {'first':>6} {'two':>6} {'any':>6}   of {len(found)} test inputs with candidates"]
    most = max(len(one.gave) for one in found)
    for size in [s for s in SIZES if s < most] + [most]:
        sums = defaultdict(lambda: np.zeros(3))
        for one in found:
            draw, count = np.random.default_rng(0), len(one.gave)
            choices = [draw.permutation(count)[:size] for _ in range(CHOICES)] if size < count else [np.arange(count)]
            for rule, right in itertools.chain.from_iterable(picked(one, views).items() for views in choices):
                sums[rule] += np.array(right) / len(choices)
        lines += [f"{size:5}  {rule:12} {first:6.2f} {two:6.2f} {some:6.2f}" for rule, (first, two, some) in sums.items()]
    return lines


def score_run(run: RunFolder) -> list[Scored]:
    """Every test input of a run that has candidates and a known solution."""
    folder = checkpoint.open_model(run.settings.model)
    builder = PromptBuilder(checkpoint.load_tokenizer(folder), run.encoder, run.settings.prompt)
    base, found = checkpoint.load_model(folder, "float32", device_name()), []
    asked = [(run.challenges.tasks[i], k) for i in run.completions for k in range(run.challenges.outputs[i]) if run.candidates[i][k]]
    asked = [(task, k) for task, k in asked if task.test[k].output is not None]
    with progress.bar(len(asked), str(run.path), "test input") as bar:
        for task, group in itertools.groupby(asked, key=lambda a: a[0]):
            adapter = next((a for a in (run.path / "adapters" / task.id, run.settings.adapter) if a and Path(a).is_dir()), None)
            model = PeftModel.from_pretrained(base, adapter).eval() if adapter else base
            for _, index in group:
                found.append(scored(run, builder, model, task, index))
                bar.update()
            base = model.unload() if adapter else base
    return found


def main() -> None:
    """Print the table of all runs' test inputs together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs, made without --scratch")
    found = [one for path in parser.parse_args().runs for one in score_run(read_run(path))]
    print("\n".join(table(found)) if found else "no test input has candidates and a known solution")


if __name__ == "__main__":
    main()
