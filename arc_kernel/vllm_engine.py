"""The vLLM backend: one engine for the life of a worker, every task's adapter a LoRA request, greedy decoding on token ids."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import inspect
import itertools
import logging
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Callable, Iterable, Iterator

from . import cpu_drafts, cpu_lora, cpu_norm, cpu_prefill, loopback
from .checkpoint import read_config
from .device import cores, wide_sums
from .engine import Answer, EngineSettings, Prompt, ServedAdapters, Viable, Wanted, due, failed
from .errors import ArcKernelError
from .kaggle import profiles
from .memory import free_memory, importing, keep_memory, mend_generators

# How a T4's LoRA products are cut, as vLLM reads it (get_lora_op_configs in vllm/lora/ops/triton_ops/utils.py): as vLLM would cut them
# 0.8 to 8 KB a thread spill out of its registers, as it is here nothing does (`benchmarks.t4_kernels`; not timed on a T4).
LORA_TILES = Path(__file__).parent / "lora_tiles"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
CPU_BLOCK = 32  # tokens; a prompt is found in the prefix cache by whole blocks, of which vLLM's CPU build has 128 tokens unasked
# Tokens that followed the same 2 to 6 tokens before, in prompt or answer, are checked together in one step (prompt lookup,
# github.com/apoorvumang/prompt-lookup-decoding): answers copy much of their prompt. Faster with 4 to 32 of them (benchmarks/LOG.md).
CPU_DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 6}
CPU_KV_BYTES = 3 << 29  # 1.5 GiB; vLLM's CPU build would size it by NUMA node, a fraction or a multiple of what is free


class VllmEngine:
    """vLLM (run with 0.11.2, 0.19.1 and 0.32 on a CPU and 0.20 on a GPU; written for 0.11.2 to 0.33), stepped by hand, so that answers
    stream, hopeless ones are cut, and prompts join as others leave."""

    def __init__(self, settings: EngineSettings, device: str):
        _prepare_environment(device)
        with importing("vllm"):
            from vllm import LLM
            from vllm.engine.arg_utils import EngineArgs

        known = {f.name for f in dataclasses.fields(EngineArgs)}
        profile = profiles.matching(_capability(device)) if settings.profile == "auto" else profiles.load(settings.profile)
        asked = profile.engine
        self.in_flight, self.adapters = settings.in_flight or asked["max_num_seqs"], asked["max_loras"]
        self.batch = self.in_flight
        args = dict(model=str(settings.model), dtype=settings.dtype, max_model_len=settings.max_seq_len,
                    max_num_seqs=self.in_flight, enable_prefix_caching=True, disable_log_stats=True, seed=0)
        if "vision_config" not in read_config(settings.model):  # prompts are ids; a model with images asks its tokenizer for their places
            args.update(skip_tokenizer_init=True)
            logging.getLogger("vllm.renderers.base").addFilter(_is_error)
        if settings.lora_rank:
            rank = next((r for r in LORA_RANKS if r >= settings.lora_rank), None)
            if rank is None:
                raise ArcKernelError(f"lora_rank {settings.lora_rank}: vLLM takes at most {LORA_RANKS[-1]}: use backend=transformers")
            args.update(enable_lora=True, max_loras=self.adapters, max_lora_rank=rank)
        args.update(enforce_eager=asked["enforce_eager"])
        if device == "cpu":
            if not cpu_lora.install():
                print("this vLLM's LoRA on a CPU is another than arc_kernel.cpu_lora knows: its own is used, up to 8 times slower",
                      file=sys.stderr, flush=True)
            cpu_norm.install()
            cpu_prefill.install()
            keep_memory()
            args.update(kv_cache_memory_bytes=CPU_KV_BYTES, block_size=CPU_BLOCK)
            if settings.drafts:
                cpu_drafts.install()
                args.update(speculative_config=CPU_DRAFTS)
            _hide_llvmlite()
        else:
            wide_sums()
            if float(_capability(device)) < 8:
                os.environ.setdefault("VLLM_TUNED_CONFIG_FOLDER", str(LORA_TILES))
            args.update(gpu_memory_utilization=_share(asked["gpu_memory_utilization"], *_gpu_memory()))
            if asked["attention_backend"]:
                if "attention_backend" in known:
                    args["attention_backend"] = asked["attention_backend"]
                else:
                    os.environ["VLLM_ATTENTION_BACKEND"] = asked["attention_backend"]
        _load_class(settings.model)
        start = lambda: LLM(**args)
        self._llm, trouble = _started(start, args["enforce_eager"])
        # The CPU builds of 0.19 and before take no drafts; compiling for this device, or its CUDA graphs, may fail too.
        for name, value, words in (("speculative_config", None, "without drafts"), ("enforce_eager", True, "without compiling")):
            if trouble and args.get(name, value) != value:
                print(f"vLLM does not start in {settings.dtype} ({trouble}): tried {words}", file=sys.stderr, flush=True)
                args[name] = value
                self._llm, trouble = _started(start, args["enforce_eager"])
        if trouble:
            raise ArcKernelError(f"{settings.model}: vLLM does not start in {settings.dtype}: {_lacking(device) or trouble}")
        self._end, self._special = settings.end_token, settings.special
        self._numbers = itertools.count(1)
        self._requests: dict[Path, object] = {}
        self._adapters = ServedAdapters(settings.rescale, self.adapters)

    def answer(self, prompts: Iterable[Prompt | None], max_new_tokens: int, viable: Viable | None = None,
               wanted: Wanted | None = None) -> Iterator[Answer]:
        """Answer prompts as they finish, in any order. `prompts` is read only as room appears; None in it means: none yet.

        A prompt that is no longer wanted is given up and, but for answers of the same step, has none.
        """
        from vllm import SamplingParams

        engine, source, running, lengths = self._llm.llm_engine, iter(prompts), {}, {}
        params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, logprobs=0, stop_token_ids=[self._end],
                                detokenize=False, skip_special_tokens=False)
        exhausted = False
        while running or not exhausted:
            unwanted = [number for number, prompt in running.items() if wanted and not wanted(prompt)]
            if unwanted:
                engine.abort_request(unwanted)
                running = {number: prompt for number, prompt in running.items() if number not in unwanted}
            while not exhausted and len(running) < self.in_flight:
                prompt = next(source, StopIteration)
                if prompt is StopIteration:
                    exhausted = True
                elif prompt is None:
                    break
                else:
                    number = str(next(self._numbers))
                    engine.add_request(number, {"prompt_token_ids": list(prompt.token_ids)}, params,
                                       lora_request=self._lora(prompt.adapter, {p.adapter for p in running.values()}))
                    running[number], lengths[number] = prompt, 0
            if not running:
                time.sleep(0 if exhausted else 0.05)
                continue
            for output in engine.step():
                number = output.request_id
                if number not in running:
                    continue
                before, lengths[number] = lengths[number], len(output.outputs[0].token_ids)
                answer = self._look(running[number], output, before, viable)
                if answer is not None:
                    del running[number]
                    if not output.finished:
                        engine.abort_request([number])
                    yield answer

    def _look(self, prompt: Prompt, output, before: int, viable: Viable | None) -> Answer | None:
        """The answer, which had `before` tokens a step ago, where it is finished, NaN or no longer viable; None where it goes on."""
        result = output.outputs[0]
        logprob = math.nan if result.cumulative_logprob is None else result.cumulative_logprob
        look = output.finished or due(len(result.token_ids), len(result.token_ids) - before)
        if not look and math.isfinite(logprob):
            return None
        ids, status = list(result.token_ids), ""
        if ids and failed(ids, logprob, self._special):
            status = "nan"
        elif output.finished:
            status = "ok" if ids and ids[-1] == self._end else "truncated"
        elif viable and not viable(ids):
            status = "stopped"
        if not status:
            return None
        logprobs = tuple(step[token].logprob for token, step in zip(ids, result.logprobs or ()))
        return Answer(prompt, ids[:-1] if status == "ok" else ids, logprob, status, logprobs, output.num_cached_tokens or 0)

    def _lora(self, adapter: Path | None, busy: set[Path | None]):
        """A LoRA request with an id, name and path of its own: a reused id is not loaded again, and a copy that was removed not found.
        `busy` are the adapters of prompts under way."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        folder = self._adapters.folder(adapter, busy)
        if folder not in self._requests:
            number = len(self._requests) + 1
            self._requests[folder] = LoRARequest(f"{adapter.name}-{number}", number, str(folder))
        return self._requests[folder]

    def close(self, last: bool = False) -> None:
        """Free the engine's memory. Of the `last` one of a process that ends at once only what lies on the disk is removed: to take vLLM
        apart takes seconds. Not where it is a process of its own, which would outlive this one."""
        self._adapters.close()
        if last and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            return
        core = getattr(self._llm.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        del core, self._llm  # the core holds all there is
        _forget_compiled()
        free_memory()


def _prepare_environment(device: str) -> None:
    """Settings vLLM reads only from the environment, set before its first import; what the user set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # in 0.33 on unasked, and compiled at the start (issue 50705); greedy does without
    if device == "cpu":  # without it vLLM's CPU build falls back to one thread
        defaults["OMP_NUM_THREADS"] = str(len(cores()))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    loopback.ensure()


def _is_error(record: logging.LogRecord) -> bool:
    """Whether a line of vLLM's belongs into the log: that it can try no chat template without a tokenizer, it warns of with a traceback."""
    return record.levelno >= logging.ERROR


def _load_class(model: Path) -> None:
    """Load vLLM's class of a model here. vLLM loads it in another process, to keep CUDA out of this one, where training had it before,
    and that one imports vLLM once more, wherever no run left a cache of what it told (vLLM issue 19317). What cannot be loaded
    here is left to vLLM."""
    with contextlib.suppress(Exception):
        from vllm import ModelRegistry

        for architecture in read_config(model)["architectures"]:
            listed = ModelRegistry.models[architecture]
            ModelRegistry.register_model(architecture, listed.load_model_cls())


def _hide_llvmlite() -> None:
    """Let another engine start in this process after one with drafts, for which vLLM loads numba and llvmlite: it looks for kernels
    in the `__dict__` of everything in every module, and llvmlite's library gives a function for whatever name it is asked for."""
    known = getattr(getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None), "_fntab", None)
    if isinstance(known, dict):
        known["__dict__"] = {}


def _started(make: Callable[[], object], eager: bool) -> tuple[object | None, str]:
    """The engine, or why there is none; what it had taken, up to 0.9 of a GPU's memory, is then free for the next one.

    With `eager` nothing is compiled, from here to `_forget_compiled`. vLLM's `enforce_eager` is about the model alone: the rank of
    each token, a comparison and a sum, is compiled for the first answer, on a CPU with g++ and torch's headers.
    """
    import torch

    if eager:
        torch.compiler.set_stance("force_eager")
    try:
        return make(), ""
    except Exception as error:
        traceback.print_exc()  # its frames hold the engine as far as it came, so they go no further
        trouble = _reason(error)
    _forget_compiled()
    mend_generators()
    free_memory()
    return None, trouble


def _forget_compiled() -> None:
    """Let go of what keeps a closed engine's compiled model, and with it the GPU's memory: torch's hooks on compiled code, slots of
    adapters that vLLM's LoRA products know by address, models that some releases (0.11.2, 0.19.1) were asked about and remember, and
    objects that vLLM has frozen out of the garbage collector's sight (vLLM issue 21073). What others compile is compiled again."""
    import torch

    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    getattr(sys.modules.get("torch._dynamo.convert_frame"), "_bytecode_hooks", {}).clear()
    for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
        getattr(sys.modules.get("vllm.lora.ops.triton_ops.utils"), name, {}).clear()
    remembered = getattr(sys.modules.get("vllm.utils.func_utils"), "supports_kw", None)
    if hasattr(remembered, "cache_clear"):
        remembered.cache_clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for kind in [k for k in vars(module).values() if isinstance(k, type) and k.__module__ == name and _vllms(k.__init__)]:
                _undecorate(kind)
    gc.unfreeze()


def _vllms(part) -> bool:
    return (getattr(part, "__module__", None) or "").startswith("vllm.")


def _undecorate(kind: type) -> None:
    """Give a decoder class of transformers back what vLLM decorated for torch.compile where it opens architectures through transformers
    (SmolLM3, OLMo, ...): no model of that class could be opened in this process otherwise, by the next backend, say."""
    own = inspect.getclosurevars(kind.__init__).nonlocals.get("old_init")
    if own is None:  # decorated otherwise, by a release that is not known here
        return
    kind.__init__ = own
    kind.__bases__ = tuple(base for base in kind.__bases__ if not _vllms(base))
    for name in [name for name, part in vars(kind).items() if inspect.isfunction(part) and _vllms(part)]:
        delattr(kind, name)


def _capability(device: str) -> str:
    """The GPU's compute capability, major.minor; empty on a CPU."""
    import torch

    return ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else ""


def _gpu_memory() -> tuple[int, int]:
    """Bytes of the GPU that are free, and all."""
    import torch

    return torch.cuda.mem_get_info()


def _share(asked: float, free: int, total: int) -> float:
    """Of a GPU's memory what was asked for, or a hundredth less than what is free: vLLM refuses to start where it is not there."""
    return min(asked, math.floor(1000 * free / total - 10) / 1000)


def _lacking(device: str) -> str:
    """The library that vLLM's CPU build needs of the system, where it is not there; vLLM goes on without its operators then."""
    if device == "cpu":
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            return "the system has no libnuma.so.1: install libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora)"
    return ""


def _reason(error: BaseException) -> str:
    """The line of an error that says something: of pydantic's, which begin with a count, the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines["validation error" in lines[0] and len(lines) > 1][:200]
