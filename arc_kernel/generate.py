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
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator

from . import cpu_lora, loopback
from .checkpoint import free_memory, load_model
from .errors import ArcKernelError
from .precision.rescale import Rescale, convert_adapter

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

    `logprobs` has one entry per generated token, the closing token included. `status` is `ok` (closing token reached),
    `truncated` (out of tokens), `stopped` (not viable) or `nan` (see `failed`).
    """

    prompt: Prompt
    token_ids: list[int]
    logprob: float
    status: str
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with: model folder, dtype, tokens of prompt plus answer, closing token, LoRA rank (0: none).

    `rescale`: the model's weights are rescaled so; adapters are converted as they are loaded. `special`: ids of the
    tokenizer's special tokens, for the guard.
    """

    model: Path
    dtype: str
    max_seq_len: int
    end_token: int
    lora_rank: int
    rescale: Rescale | None = None
    special: frozenset[int] = frozenset()


Viable = Callable[[list[int]], bool]


def vllm_installed() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def failed(token_ids: list[int], logprob: float, special: frozenset[int]) -> bool:
    """The guard on every answer: a logprob that is not finite, or one special token over and over from the first on.

    The second is what NaN logits look like where an engine hides their logprob: greedy decoding takes token 0.
    """
    if not math.isfinite(logprob):
        return True
    return len(token_ids) >= CHECK_EVERY and token_ids[0] in special and token_ids.count(token_ids[0]) == len(token_ids)


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
        self._end, self._special = settings.end_token, settings.special
        self._numbers = itertools.count(1)
        self._requests: dict[Path, object] = {}
        self._adapters = ServedAdapters(settings.rescale)

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
        logprob = math.nan if result.cumulative_logprob is None else result.cumulative_logprob
        look = output.finished or len(result.token_ids) % CHECK_EVERY == 0
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
        return Answer(prompt, ids[:-1] if status == "ok" else ids, logprob, status, logprobs)

    def _lora(self, adapter: Path | None):
        """A LoRA request with an id, name and path of its own: a reused id is not loaded again."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        folder = self._adapters.folder(adapter)
        if adapter not in self._requests:
            number = len(self._requests) + 1
            self._requests[adapter] = LoRARequest(f"{adapter.name}-{number}", number, str(folder))
        return self._requests[adapter]

    def close(self) -> None:
        """Free the engine's memory."""
        core = getattr(self._llm.llm_engine, "engine_core", None)
        if hasattr(core, "shutdown"):
            core.shutdown()
        del self._llm
        self._adapters.close()
        free_memory()


class TransformersEngine:
    """transformers' own generate with peft adapters: slow, plain, and independent of vLLM.

    In float32 adapters are merged into the weights and taken out again by putting the old weights back; 16-bit weights
    would lose what is merged.
    """

    def __init__(self, settings: EngineSettings, device: str):
        self._model, self._device, self._end = load_model(settings.model, settings.dtype, device), device, settings.end_token
        self._max_seq_len, self._special, self._adapter = settings.max_seq_len, settings.special, None
        self._adapters, self._merge, self._old = ServedAdapters(settings.rescale), settings.dtype == "float32", {}

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
                if not bad and length % CHECK_EVERY == 0 and self._end not in generated:
                    bad = failed(generated, 0.0, self._special) or bool(viable and not viable(generated))
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
            logprobs = tuple(float(step[i]) for step in scores[:length])
            answer, logprob = generated[:length - 1] if closed else generated[:length], sum(logprobs)
            bad = failed(answer, logprob, self._special)
            status = "nan" if bad else "ok" if closed else "stopped" if stopped[i] else "truncated"
            yield Answer(prompt, answer, logprob, status, logprobs)

    def _use(self, adapter: Path | None) -> None:
        from peft import PeftModel

        if adapter == self._adapter:
            return
        if self._merge:
            for weight, old in self._old.items():
                weight.data.copy_(old)
        elif self._adapter is not None:
            self._model = self._model.unload()
        if adapter is not None:
            model = PeftModel.from_pretrained(self._model, self._adapters.folder(adapter))
            if self._merge:
                touched = (m.get_base_layer().weight for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "lora_A"))
                self._old = {w: self._old[w] if w in self._old else w.detach().clone() for w in touched}
                model = model.merge_and_unload()
            self._model = model.eval()
        self._adapter = adapter

    def close(self) -> None:
        """Free the model's memory."""
        del self._model, self._old
        self._adapters.close()
        free_memory()


class ServedAdapters:
    """Adapter folders as an engine's weights want them: themselves, or converted for rescaled weights when first asked for.

    Converted copies of the last IN_FLIGHT adapters are kept; more cannot have prompts in flight.
    """

    def __init__(self, rescale: Rescale | None):
        self._rescale, self._made = rescale, {}
        self._scratch = tempfile.TemporaryDirectory(prefix="arc-kernel-") if rescale else None

    def folder(self, adapter: Path) -> Path:
        """The folder to load for an adapter."""
        if self._rescale is None:
            return adapter
        if adapter in self._made:
            self._made[adapter] = self._made.pop(adapter)  # the newest now
            return self._made[adapter]
        self._made[adapter] = Path(tempfile.mkdtemp(dir=self._scratch.name)) / adapter.name
        convert_adapter(adapter, self._made[adapter], self._rescale)
        while len(self._made) > IN_FLIGHT:
            shutil.rmtree(self._made.pop(next(iter(self._made))))
        return self._made[adapter]

    def close(self) -> None:
        """Remove what was converted."""
        if self._scratch:
            self._scratch.cleanup()


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
