"""What a worker is started with: settings as `run` has resolved them; dtypes, profile (auto) and length of answers (0) are left to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """The settings of a worker; `probe_tasks` (as `tasks.task_to_json` gives them) are what precision is judged on.

    `adapters` is the folder of the tasks' adapters. `adapt_until` and `answer_until` are the clock (`time.time`) at which
    training and answering end; infinite without a time budget. `graphs` is False where a worker on this device died before: whatever
    it was, the next one trains without CUDA graphs and compiled kernels (`decoder_pass`).
    """

    model: str
    vocabulary: str
    adapter: str
    out: str
    adapters: str
    profile: str
    backend: str
    dtype: str
    ttt_dtype: str
    grid_encoder: str
    prompt: str
    permute_background: bool
    max_seq_len: int
    max_new_tokens: int
    views: int
    early_stop: bool
    seed: int
    ttt_steps: int
    ttt_batch: int
    ttt_lr: float
    ttt_loss: str
    lora_rank: int
    adapt_until: float
    answer_until: float
    probe_tasks: tuple[dict, ...]
    graphs: bool = True
