"""The engine: prompts plus adapters in, scored answers out, by one of two backends (see `engine` for what they share)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from .engine import EngineSettings
from .transformers_engine import TransformersEngine
from .vllm_engine import VllmEngine


def vllm_installed() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def start_engine(backend: str, settings: EngineSettings, device: str) -> VllmEngine | TransformersEngine:
    """A started engine of `backend` (`vllm` or `transformers`); it has `answer` and `close`."""
    return VllmEngine(settings, device) if backend == "vllm" else TransformersEngine(settings, device)


def adapter_rank(folder: Path) -> int:
    """The rank of a saved LoRA."""
    return int(json.loads((folder / "adapter_config.json").read_text())["r"])
