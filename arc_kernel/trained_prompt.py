"""The prompt a model or LoRA was fine-tuned with, written beside its weights, and what `auto` means where it is used.

Knows one small file; knows nothing of what prompts look like.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .checkpoint import EMBEDDED, TRAINED_PROMPT
from .errors import ArcKernelError
from .files import read_json
from .settings import AUTO, PROMPTS

FRESH = {"prompt": "chat", "grid_encoder": "shape+rows+digits"}  # of a model that no prompt was trained into


def choose(prompt: str, grid_encoder: str, model: str, adapter: str) -> tuple[str, str]:
    """Prompt kind and grid encoder, `auto` replaced by what the adapter was trained with, else the model, else by FRESH."""
    known = FRESH | recorded(model, adapter)
    return tuple(known[name] if given == AUTO else given for name, given in zip(FRESH, (prompt, grid_encoder)))


def resolved(settings):
    """Settings of `solve` or of a fine-tuning run, `auto` replaced as `choose` does."""
    prompt, encoder = choose(settings.prompt, settings.grid_encoder, settings.model, settings.adapter)
    return dataclasses.replace(settings, prompt=prompt, grid_encoder=encoder)


def recorded(model: str, adapter: str) -> dict[str, str]:
    """What the adapter was trained with, else the model; empty where neither says. Raises ArcKernelError for a damaged file."""
    folders = [adapter, model if model != EMBEDDED else ""]
    path = next((p for folder in folders if folder and (p := Path(folder) / TRAINED_PROMPT).is_file()), None)
    if path is None:
        return {}
    try:
        stored = read_json(path)
        found = {name: stored[name] for name in FRESH}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    if found.get("prompt") not in PROMPTS or not isinstance(found["grid_encoder"], str):
        raise ArcKernelError(f"{path}: not the prompt of a fine-tuning run: delete it, and give prompt and grid_encoder")
    return found
