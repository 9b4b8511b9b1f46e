"""The tensors an architecture needs, by name and shape, and whether a model folder holds them; no weight is read.

Knows configs and safetensors headers, nothing of tokenizers.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import HEAD, missing_tensors, read_config, stored_tensors, weight_shapes, wrong_shape
from ..errors import ArcKernelError


def known_architecture(config: dict) -> bool:
    """Whether transformers has code of its own for a config's `model_type`."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def needed_shapes(folder: Path) -> dict[str, list[int]]:
    """The shape of each tensor the architecture in a folder's config.json needs, by name; one for tied ones.

    The model is built on torch's meta device, so without memory for weights. Raises ArcKernelError where transformers has no
    code for the architecture or refuses the config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = read_config(folder)
    if not known_architecture(config):
        raise ArcKernelError(f"{folder / 'config.json'}: transformers has no code for model_type {config.get('model_type')!r}, "
                             "and code that comes with a checkpoint (auto_map) is not run: take a model of a known architecture")
    try:
        made = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=False)
    except Exception as error:  # a config's values can be wrong in as many ways as there are architectures
        raise ArcKernelError(f"{folder / 'config.json'}: no model can be made of it: {_line(error)}: copy the model again") from None
    return {name: list(weight.shape) for name, weight in stored_tensors(model).items()}


def check_names(folder: Path, needed: dict[str, list[int]], there: dict[str, list[int]], config: dict) -> None:
    """Raise ArcKernelError naming the first tensor that is needed and not there, and one of its shape that is there in its stead."""
    if missing := needed.keys() - there.keys():
        others = sorted(name for name in there.keys() - needed.keys() if name != HEAD and there[name] == needed[min(missing)])
        raise missing_tensors(folder, missing, (config.get("architectures") or ["the architecture"])[0], others[:1])


def check_weights(folder: Path) -> None:
    """Raise ArcKernelError naming the first tensor that is missing in a model folder or has another shape than its config says."""
    needed, there = needed_shapes(folder), weight_shapes(folder)
    check_names(folder, needed, there, read_config(folder))
    for name, shape in sorted(needed.items()):
        if there[name] != shape:
            raise wrong_shape(folder, name, there[name], shape)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
