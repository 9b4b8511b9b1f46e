"""Whether a LoRA fits a model, from names and shapes in the headers; and its opening, whole or not at all."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from .checkpoint import EMBEDDINGS, HEAD, check_adapter, tensor_shapes, weight_shapes
from .errors import ArcKernelError, named_line
from .files import read_json
from .memory import exhausted

PREFIX = "base_model.model."  # of names in what peft saves
# init_lora_weights with which peft takes the LoRA's start off the base's weights; with the first two it finds the same start again
CHANGES_BASE, FOUND_AGAIN = ("pissa", "olora", "corda", "loftq", "lora_ga"), ("pissa", "olora")
A, B = ".lora_A.weight", ".lora_B.weight"  # [rank, in] and [out, rank] of a linear layer [out, in]
OTHER_BASE = "the adapter is for another base: give the model it was trained on"


def check_fit(adapter: Path, model: Path) -> tuple[dict[str, int], list[str]]:
    """The rank of each module a LoRA changes, and the names of tensors in it that are no LoRA matrix of a linear layer.

    Raises ArcKernelError naming adapter, tensor and both shapes where a matrix does not fit the model's weight, where the
    ranks of a module's two differ, where a module is in one of the folders only, and where the base it was trained on is not the
    model's (see CHANGES_BASE).
    """
    check_adapter(adapter)
    config, shapes, base = _read_config(adapter), tensor_shapes(adapter, "adapter_model.safetensors"), weight_shapes(model)
    if EMBEDDINGS in base:
        base.setdefault(HEAD, base[EMBEDDINGS])  # tied, and not stored
    _check_start(adapter, config)
    modules = dict.fromkeys(name.removesuffix(part) for name in shapes for part in (A, B) if name.endswith(part))
    others = [name for name in shapes if not name.endswith((A, B))]
    ranks = {}
    for module in modules:
        weight = f"{module.removeprefix(PREFIX)}.weight"
        for name in (module + A, module + B):
            if name not in shapes:
                raise ArcKernelError(f"{adapter}: no tensor {name}: copy the adapter again")
        if len(base.get(weight, ())) != 2:
            raise ArcKernelError(f"{adapter}: changes {weight}, which is no matrix of {model}: {OTHER_BASE}")
        (out, into), a, b = base[weight], shapes[module + A], shapes[module + B]
        for name, shape, wanted in ((module + A, a, [*a[:1], into]), (module + B, b, [out, *b[1:2]])):
            if shape != wanted:
                raise ArcKernelError(f"{adapter}: {name} is {shape}, beside {weight} {base[weight]} of {model}: {OTHER_BASE}")
        rank = a[0] if config.get("rank_pattern") else config.get("r")
        if not a[0] == b[1] == rank:
            raise ArcKernelError(f"{adapter}: {module + A} is {a}, {module + B} {b}, adapter_config.json says rank {rank}: copy it again")
        ranks[module.removeprefix(PREFIX)] = rank
    embedded = {name.removeprefix(PREFIX).removesuffix(".lora_embedding_A") for name in others}
    left = [] if config.get("layers_to_transform") or config.get("exclude_modules") else _left_out(config, {*ranks, *embedded}, base)
    if left:
        raise ArcKernelError(f"{adapter}: changes {len(ranks)} modules, but not {left[0]} of {model} ({len(left)} such): {OTHER_BASE}")
    return ranks, others


def check_served(adapter: Path, model: Path) -> None:
    """As `check_fit`; and raise ArcKernelError for a LoRA that cannot be put onto a model and taken off again, task by task."""
    check_fit(adapter, model)
    config = _read_config(adapter)
    if config.get("init_lora_weights") in FOUND_AGAIN:
        raise ArcKernelError(f"{adapter}: changes its base's weights as well (init_lora_weights {config['init_lora_weights']}): "
                             "merge it and give that model (python -m arc_kernel merge)")
    if config.get("rank_pattern") or config.get("alpha_pattern"):  # vllm/lora/peft_helper.py: read in 0.32, not in 0.19.1
        raise ArcKernelError(f"{adapter}: gives some modules a rank or alpha of their own (rank_pattern, alpha_pattern), which vLLM for a "
                             "T4 passes over: merge it and give that model (python -m arc_kernel merge)")
    if config.get("use_dora"):
        raise ArcKernelError(f"{adapter}: is a DoRA (use_dora), which vLLM does not serve: merge it and give that model "
                             "(python -m arc_kernel merge)")
    if config.get("lora_bias"):
        raise ArcKernelError(f"{adapter}: has biases (lora_bias), which no engine here serves: train it without")


def open_adapter(base, adapter: Path, **options):
    """The peft model of a causal language model `base` with the LoRA `adapter` on it; `options` are peft's.

    Raises ArcKernelError where peft cannot open it, and where a part of the model stays without the matrices that `adapter` has for it:
    experts, that transformers 4.57 has as layers each and 5 as one tensor. peft 0.21 translates for some architectures, passes over others.
    """
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(base, adapter, **options)
    except Exception as error:  # as many kinds as there are forms of LoRA
        if exhausted(error):
            raise
        raise ArcKernelError(f"{adapter}: peft {importlib.metadata.version('peft')} cannot open it: {named_line(error)}") from None
    layers = dict(model.get_base_model().named_modules())
    carrying = {part for name, layer in layers.items() if hasattr(layer, "lora_A") for part in _ancestors(name)}
    for name in tensor_shapes(adapter, "adapter_model.safetensors"):
        if name.endswith(A):
            wanted = name.removeprefix(PREFIX).removesuffix(A)
            if next(part for part in _ancestors(wanted) if part in layers) not in carrying:
                raise ArcKernelError(f"{adapter}: {wanted} would go without its LoRA, since transformers "
                                     f"{importlib.metadata.version('transformers')} has no such layer: merge it where it was trained")
    return model


def _ancestors(name: str) -> list[str]:
    """A module's name and those of the modules it is in, the whole model's, which is empty, last."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _check_start(adapter: Path, config: dict) -> None:
    """Raise ArcKernelError for a LoRA whose base peft changes when it is opened, by a start that is another each time."""
    began = config.get("init_lora_weights")
    if isinstance(began, str) and began.startswith(CHANGES_BASE) and began not in FOUND_AGAIN:
        raise ArcKernelError(f"{adapter}: goes with a base that training changed (init_lora_weights {began}): save it as a plain LoRA "
                             "(save_pretrained with peft's path_initial_model_for_weight_conversion)")


def adapter_rank(folder: Path) -> int:
    """The rank of a saved LoRA, the largest where its modules have several."""
    config = _read_config(folder)
    return int(max([config["r"], *(config.get("rank_pattern") or {}).values()]))


def _left_out(config: dict, changed: set[str], base: dict[str, list[int]]) -> list[str]:
    """Modules of the base that are targets by name, of which the adapter has no matrices."""
    targets = config.get("target_modules")
    named = tuple(f".{t}.weight" for t in targets) if isinstance(targets, list) else ()
    return [w.removesuffix(".weight") for w in base if f".{w}".endswith(named) and w.removesuffix(".weight") not in changed]


def _read_config(adapter: Path) -> dict:
    path = adapter / "adapter_config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise ArcKernelError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArcKernelError(f"{path}: holds a {type(config).__name__}, no fields: copy the adapter again")
    if config.get("peft_type") != "LORA":
        raise ArcKernelError(f"{path}: peft_type is {config.get('peft_type')}: give a LoRA")
    return config
