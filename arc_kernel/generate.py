"""The engine: prompts plus adapters in, scored answers out.

Two backends behind the same methods (`answer`, `close`): vLLM, one engine for the life of a worker with every task's
adapter as a LoRA request, and transformers, used where vLLM is missing and as the independent check. Greedy decoding on
token ids. Knows nothing of tasks or grids; the caller says with `viable` when going on with an answer is wasted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from . import cpu_lora, loopback
from .checkpoint import free_memory, load_model
from .errors import ArcKernelError

VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks
IN_FLIGHT = 32  # prompts decoded together: 4 tasks of 8 views
MAX_LORAS = 4  # adapters in one batch
CHECK_EVERY = 8  # generated tokens between two looks at whether an answer is still viable
CPU_KV_BYTES = 3 << 29  # 1.5 GiB; vLLM's CPU build would size it by NUMA node, a fraction or a multiple of what is free


@dataclass(frozen=True)
class Prompt:
    """Token ids to answer, with the adapter to answer them with (None: the base model); `key` comes back with the answer."""

    key: tuple
    token_ids: list[int]
    adapter: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What was generated: ids without the closing token, the summed logprob (nats), and how it ended.

    `status` is `ok` (closing token reached), `truncated` (out of tokens), `stopped` (not viable) or `nan`.
    """

    prompt: Prompt
    token_ids: list[int]
    logprob: float
    status: str


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with: model folder, dtype, tokens of prompt plus answer, closing token, LoRA rank (0: none)."""

    model: Path
    dtype: str
    max_seq_len: int
    end_token: int
    lora_rank: int


Viable = Callable[[list[int]], bool]


def vllm_installed() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def start_engine(backend: str, settings: EngineSettings, device: str):
    """A started engine of `backend` (`vllm` or `transformers`); it has `answer` and `close`."""
    return VllmEngine(settings, device) if backend == "vllm" else TransformersEngine(settings, device)


def adapter_rank(folder: Path) -> int:
    """The rank of a saved LoRA."""
    return int(json.loads((folder / "adapter_config.json").read_text())["r"])


class VllmEngine:
    """vLLM (run with 0.32; written for 0.11.2 to 0.33), stepped by hand, so that answers stream, hopeless ones are cut, and prompts join as others leave."""

    def __init__(self, settings: EngineSettings, device: str):
        _prepare_environment(device)
        import vllm
        from vllm.engine.arg_utils import EngineArgs

        known = {f.name for f in dataclasses.fields(EngineArgs)}
        args = dict(model=str(settings.model), dtype=settings.dtype, max_model_len=settings.max_seq_len,
                    max_num_seqs=IN_FLIGHT, enable_prefix_caching=True, disable_log_stats=True, seed=0)
        if settings.lora_rank:
            rank = next((r for r in VLLM_LORA_RANKS if r >= settings.lora_rank), None)
            if rank is None:
                raise ArcKernelError(f"lora_rank {settings.lora_rank}: vLLM takes at most {VLLM_LORA_RANKS[-1]}: use backend=transformers")
            args.update(enable_lora=True, max_loras=MAX_LORAS, max_lora_rank=rank)
        if device == "cpu":
            cpu_lora.install()
            args.update(enforce_eager=True, kv_cache_memory_bytes=CPU_KV_BYTES)
        elif _before_ampere():  # T4 (sm_75): FlashAttention needs sm_80
            if "attention_backend" in known:
                args["attention_backend"] = "TRITON_ATTN"
            else:
                os.environ["VLLM_ATTENTION_BACKEND"] = "TRITON_ATTN"
        try:
            self._llm = vllm.LLM(**args)
        except Exception as error:
            raise ArcKernelError(f"{settings.model}: vLLM does not start in {settings.dtype}: {_first_line(error)}") from error
        self._end = settings.end_token
        self._numbers = itertools.count(1)
        self._adapters: dict[Path, object] = {}

    def answer(self, prompts: Iterable[Prompt | None], max_new_tokens: int, viable: Viable | None = None) -> Iterator[Answer]:
        """Answer prompts as they finish, in any order. `prompts` is read only as room appears; None in it means: none yet."""
        from vllm import SamplingParams

        engine, source, running = self._llm.llm_engine, iter(prompts), {}
        params = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, logprobs=0, stop_token_ids=[self._end],
                                detokenize=False, skip_special_tokens=False)
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < IN_FLIGHT:
                prompt = next(source, StopIteration)
                if prompt is StopIteration:
                    exhausted = True
                elif prompt is None:
                    break
                else:
                    number = str(next(self._numbers))
                    engine.add_request(number, {"prompt_token_ids": list(prompt.token_ids)}, params,
                                       lora_request=self._lora(prompt.adapter))
                    running[number] = prompt
            if not running:
                time.sleep(0 if exhausted else 0.05)
                continue
            for output in engine.step():
                answer = self._look(running[output.request_id], output, viable) if output.request_id in running else None
                if answer is not None:
                    del running[output.request_id]
                    if not output.finished:
                        engine.abort_request([output.request_id])
                    yield answer

    def _look(self, prompt: Prompt, output, viable: Viable | None) -> Answer | None:
        """The answer where it is finished, NaN or no longer viable; None where it goes on."""
        result = output.outputs[0]
        ids, logprob = list(result.token_ids), result.cumulative_logprob
        logprob = math.nan if logprob is None else logprob
        if ids and not math.isfinite(logprob):
            return Answer(prompt, ids, logprob, "nan")
        if output.finished:
            closed = bool(ids) and ids[-1] == self._end
            return Answer(prompt, ids[:-1] if closed else ids, logprob, "ok" if closed else "truncated")
        if viable and len(ids) % CHECK_EVERY == 0 and not viable(ids):
            return Answer(prompt, ids, logprob, "stopped")
        return None

    def _lora(self, adapter: Path | None):
        """A LoRA request with an id, name and path of its own: a reused id is not loaded again."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        if adapter not in self._adapters:
            number = len(self._adapters) + 1
            self._adapters[adapter] = LoRARequest(f"{adapter.name}-{number}", number, str(adapter))
        return self._adapters[adapter]

    def close(self) -> None:
        """Free the engine's memory."""
        core = getattr(self._llm.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        del self._llm
        free_memory()


class TransformersEngine:
    """transformers' own generate with peft adapters: slow, plain, and independent of vLLM."""

    def __init__(self, settings: EngineSettings, device: str):
        self._model, self._device, self._end = load_model(settings.model, settings.dtype, device), device, settings.end_token
        self._max_seq_len, self._adapter = settings.max_seq_len, None

    def answer(self, prompts: Iterable[Prompt | None], max_new_tokens: int, viable: Viable | None = None) -> Iterator[Answer]:
        """Answer prompts in batches of neighbours with the same adapter; see VllmEngine.answer."""
        for adapter, group in itertools.groupby((p for p in prompts if p is not None), key=lambda p: p.adapter):
            self._use(adapter)
            group = list(group)
            for i in range(0, len(group), 8):
                yield from self._batch(group[i:i + 8], max_new_tokens, viable)

    def _batch(self, prompts: list[Prompt], max_new_tokens: int, viable: Viable | None) -> Iterator[Answer]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        width = max(len(p.token_ids) for p in prompts)
        ids = torch.tensor([[self._end] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        scores, stopped = [], torch.zeros(len(prompts), dtype=torch.bool)
        ends = [0] * len(prompts)  # tokens at which an answer was cut

        def record(_, logits):  # greedy decoding takes the largest logit; its logprob is kept, not the logits
            best = logits.float().max(-1).values - logits.float().logsumexp(-1)
            scores.append(best.cpu())
            return logits

        def hopeless(sequences, _):
            length = sequences.shape[1] - width
            for i in range(len(prompts)):
                bad = not bool(torch.isfinite(scores[-1][i]))
                generated = sequences[i, width:].tolist()
                if viable and not bad and length % CHECK_EVERY == 0 and self._end not in generated:
                    bad = not viable(generated)
                if bad and not stopped[i]:
                    stopped[i], ends[i] = True, length
            return stopped.to(sequences.device)

        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device), do_sample=False, num_beams=1,
                max_new_tokens=min(max_new_tokens, self._max_seq_len - width), eos_token_id=self._end, pad_token_id=self._end,
                temperature=None, top_p=None, top_k=None, repetition_penalty=None,
                logits_processor=LogitsProcessorList([record]), stopping_criteria=StoppingCriteriaList([hopeless]))
        for i, prompt in enumerate(prompts):
            generated = out[i, width:].tolist()
            closed = self._end in generated
            length = generated.index(self._end) + 1 if closed else ends[i] or len(generated)
            logprob = float(sum(float(step[i]) for step in scores[:length]))
            answer = generated[:length - 1] if closed else generated[:length]
            status = "nan" if not math.isfinite(logprob) else "ok" if closed else "stopped" if stopped[i] else "truncated"
            yield Answer(prompt, answer, logprob, status)

    def _use(self, adapter: Path | None) -> None:
        from peft import PeftModel

        if adapter == self._adapter:
            return
        if self._adapter is not None:
            self._model = self._model.unload()
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, adapter).eval()
        self._adapter = adapter

    def close(self) -> None:
        """Free the model's memory."""
        del self._model
        free_memory()


def _prepare_environment(device: str) -> None:
    """Settings vLLM reads only from the environment, set before its first import; what the user set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if device == "cpu":  # without it vLLM's CPU build falls back to one thread
        defaults["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    loopback.ensure()


def _before_ampere() -> bool:
    import torch

    return torch.cuda.get_device_capability() < (8, 0)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
