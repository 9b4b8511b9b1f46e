"""The engine: prompts plus adapters in, scored answers out, by one of two backends (see `engine` for what they share)."""

from __future__ import annotations

import importlib.util

from .engine import EngineSettings
from .errors import ArcKernelError
from .transformers_engine import TransformersEngine
from .vllm_engine import VllmEngine


def vllm_installed() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return importlib.util.find_spec("vllm") is not None


def chosen_backend(asked: str) -> str:
    """The backend for a setting: `auto` is vLLM where it is installed. Raises ArcKernelError where it is asked for and is not."""
    if asked == "vllm" and not vllm_installed():
        raise ArcKernelError("settings: backend is vllm, which is not installed: use backend=transformers")
    return ("vllm" if vllm_installed() else "transformers") if asked == "auto" else asked


def start_engine(backend: str, settings: EngineSettings, device: str) -> VllmEngine | TransformersEngine:
    """A started engine of `backend` (`vllm` or `transformers`); it has `answer` and `close`."""
    return VllmEngine(settings, device) if backend == "vllm" else TransformersEngine(settings, device)
