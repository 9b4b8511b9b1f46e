"""The transformers backend: used where vLLM is missing, and as the independent check of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Iterable, Iterator

from .adapter_fit import open_adapter
from .checkpoint import load_model, on_transformers_4
from .engine import Answer, EngineSettings, Prompt, ServedAdapters, Viable, Wanted, due, failed
from .memory import free_memory

BATCH = 8  # prompts decoded together, all with the same adapter
ALONE = ("lfm2", "lfm2_moe")  # whose convolutions in transformers 4.57 see what a shorter prompt of a batch is padded with
IN_FLIGHT, ADAPTERS = 4 * BATCH, 4  # so that a batch is not smaller because a task sends no more


class TransformersEngine:
    """transformers' own generate with peft adapters: slow, plain, and independent of vLLM.

    In float32 adapters are merged into the weights and taken out again by putting the old weights back; 16-bit weights
    would lose what is merged, and a head tied to the input embedding would take the embedding with it.
    """

    def __init__(self, settings: EngineSettings, device: str):
        from transformers import GenerationConfig

        self._model, self._device, self._end = load_model(settings.model, settings.dtype, device), device, settings.end_token
        padding_seen = self._model.config.model_type in ALONE and on_transformers_4()
        self.batch = 1 if padding_seen else BATCH
        self._model.generation_config = GenerationConfig()  # greedy, whatever the model's own asks for
        self._max_seq_len, self._special, self._adapter = settings.max_seq_len, settings.special, None
        self.in_flight, self.adapters = settings.in_flight or IN_FLIGHT, ADAPTERS
        self._adapters, self._merge, self._old = ServedAdapters(settings.rescale, self.adapters), settings.dtype == "float32", {}

    def answer(self, prompts: Iterable[Prompt | None], max_new_tokens: int, viable: Viable | None = None,
               wanted: Wanted | None = None) -> Iterator[Answer]:
        """Answer prompts in batches of neighbours with the same adapter; see VllmEngine.answer. No batch is broken off; None ends one."""
        for (none, adapter), group in itertools.groupby(prompts, key=lambda p: (p is None, p and p.adapter)):
            if none:
                continue
            self._use(adapter)
            asked = (p for p in group if wanted is None or wanted(p))
            while batch := list(itertools.islice(asked, self.batch)):
                yield from self._batch(batch, max_new_tokens, viable)

    def _batch(self, prompts: list[Prompt], max_new_tokens: int, viable: Viable | None) -> Iterator[Answer]:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        width = max(len(p.token_ids) for p in prompts)
        ids = torch.tensor([[self._end] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts])
        scores, stopped = [], [False] * len(prompts)
        ends = [min(max_new_tokens, self._max_seq_len - len(p.token_ids)) for p in prompts]  # tokens at which answers are cut

        def record(_, logits):  # greedy decoding takes the largest logit; its logprob is kept, not the logits
            best = logits.float().max(-1).values - logits.float().logsumexp(-1)
            scores.append(best.cpu())
            return logits

        def hopeless(sequences, _):
            length = sequences.shape[1] - width
            for i, finite in enumerate(torch.isfinite(scores[-1]).tolist()):
                bad = not finite
                if finite and due(length) and self._end not in (generated := sequences[i, width:].tolist()):
                    bad = failed(generated, 0.0, self._special) or bool(viable and not viable(generated))
                if bad and not stopped[i] and length <= ends[i]:
                    stopped[i], ends[i] = True, length
            return torch.tensor([length >= end for end in ends], device=sequences.device)

        with torch.no_grad():
            out = self._model.generate(
                input_ids=ids.to(self._device), attention_mask=mask.to(self._device), do_sample=False, num_beams=1,
                max_new_tokens=max(ends), eos_token_id=self._end, pad_token_id=self._end,
                logits_processor=LogitsProcessorList([record]), stopping_criteria=StoppingCriteriaList([hopeless]))
        for i, prompt in enumerate(prompts):
            generated = out[i, width:width + ends[i]].tolist()  # what stands behind is padding, which looks like the closing token
            closed = self._end in generated
            length = generated.index(self._end) + 1 if closed else len(generated)
            logprobs = tuple(float(step[i]) for step in scores[:length])
            answer, logprob = generated[:length - 1] if closed else generated[:length], sum(logprobs)
            bad = failed(answer, logprob, self._special)
            status = "nan" if bad else "ok" if closed else "stopped" if stopped[i] else "truncated"
            yield Answer(prompt, answer, logprob, status, logprobs)

    def _use(self, adapter: Path | None) -> None:
        from peft import PeftModel

        if adapter == self._adapter:
            return
        for weight, old in self._old.items():
            weight.data.copy_(old)
        if isinstance(self._model, PeftModel):
            self._model = self._model.unload()
        if adapter is not None:
            embedding = self._model.get_input_embeddings().weight
            model = open_adapter(self._model, self._adapters.folder(adapter), torch_device=self._device)
            touched = [m.get_base_layer().weight for m in model.modules() if hasattr(m, "get_base_layer") and hasattr(m, "lora_A")]
            if self._merge and not any(weight is embedding for weight in touched):
                self._old = {w: self._old[w] if w in self._old else w.detach().clone() for w in touched}
                model = model.merge_and_unload()
            self._model = model.eval()
        self._adapter = adapter

    def close(self, last: bool = False) -> None:
        """Free the model's memory; see VllmEngine.close."""
        self._adapters.close()
        if not last:
            del self._model, self._old
            free_memory()
