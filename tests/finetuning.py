"""What tests of fine-tuning runs share: a tiny random model of the real architecture, a pool of tasks, settings, a kill at a step."""

import json

import numpy as np
import pytest

from arc_kernel import ceilings
from arc_kernel.events import read_events
from arc_kernel.finetune import page, run
from arc_kernel.finetune.settings import FinetuneSettings
from arc_kernel.prepare import vocabulary
from arc_kernel.prepare.make import prepare
from models import tiny_model


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    """A tiny model with the tokens of ARC prompts only, so that the head costs nothing."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHECKED", {})  # its comparison on real tasks is test_vocabulary's
        prepare(str(tiny_model(model_folder, folder / "full")), str(folder / "arc"), vocabulary="arc")
    return folder / "arc"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("pool") / "pool.jsonl"
    pair = lambda side: {"input": rng.integers(10, size=(side, side)).tolist(), "output": rng.integers(10, size=(1, side)).tolist()}
    path.write_text("".join(json.dumps({"id": f"t{n}", "pairs": [pair(2 + n % 4) for _ in range(6)]}) + "\n" for n in range(8)))
    return path


@pytest.fixture(autouse=True)
def nothing_that_takes_seconds(monkeypatch, request):
    """No timing of products; the page of a run only where it is looked at."""
    monkeypatch.setattr(ceilings, "gemm", lambda *_, **__: 1e11)
    if "report" not in request.node.name:
        monkeypatch.setattr(page, "write_report", lambda out, settings: out / "report.html")


@pytest.fixture
def settings(tiny, pool, tmp_path):
    return FinetuneSettings(data=(str(pool), f"{pool}:inputs:0.5"), model=str(tiny), out=str(tmp_path / "run"), dtype="float32",
                            grid_encoder="digits", prompt="compact", lora_rank=4, steps=20, batch=3, micro_tokens=256, lr=1e-2,
                            evaluation_tasks="", save_every=5, sample_every=4)


@pytest.fixture(scope="module")
def prepared(tiny, pool):
    return run.prepare(FinetuneSettings(data=(str(pool), f"{pool}:inputs:0.5"), model=str(tiny), grid_encoder="digits",
                                        prompt="compact", evaluation_tasks=""))


@pytest.fixture
def killed_at(monkeypatch):
    """A function that makes the next run die at a step, and the one after it live."""
    whole = run.Run._step

    def kill(step, how=KeyboardInterrupt):
        def dying(self, number, facts):
            whole(self, number, facts)
            if number == step:
                monkeypatch.setattr(run.Run, "_step", whole)
                raise how

        monkeypatch.setattr(run.Run, "_step", dying)

    return kill


def rows_of(settings):
    return page.steps(read_events(settings.out_path))


def losses_of(settings):
    return [(r["step"], r["loss"], r["gradient"], r["lr"], r["kinds"]) for r in rows_of(settings)]
