"""The model that is fine-tuned: opened in full or with a LoRA, its loss on a batch, its weights saved and loaded.

Knows torch, peft and model folders; nothing of data or of the loop.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import decoder_pass, fused_layer
from ..adapt import left_out, save_adapter, with_lora
from ..adapter_fit import check_fit
from ..answer_loss import LOOKED_AT, answer_losses, plain_head
from ..checkpoint import TRAINED_PROMPT, copy_texts, load_model, read_config, stored_tensors, weight_shapes
from ..device import prepare_for
from ..errors import ArcKernelError
from ..files import whole_folder, write_json
from ..flat_weights import FlatWeights

ADAPTER, MODEL = "adapter", "model"  # folders of the result in a run's folder, and of the weights in a checkpoint
GRAPHS = ("cuda",)  # devices whose passes can be graphs


class Learner(torch.nn.Module):
    """A causal language model and its loss, as one module, so that Trainer and DDP see a plain forward.

    With a LoRA of `rank` above 0 (or the one in `start`) the base is frozen in `dtype`; with rank 0 all weights are float32.
    A LoRA's passes are CUDA graphs (`decoder_pass`) where they can be: on a GPU, in one process (the hooks by which DDP sums gradients
    see nothing of a graph's), and where activations are kept.
    `left_out` says what gets none (see `adapt`). It is made on the CPU; `device` is where it will be trained. Raises ArcKernelError
    where `start` was made for another model, and where all weights of a model would be trained that transformers 5 holds under other names.
    """

    def __init__(self, folder: Path, rank: int, start: Path | None, dtype: str, gradient_checkpointing: bool = False, device: str = "cpu"):
        super().__init__()
        prepare_for(device)
        self.folder = folder
        if start is not None:
            check_fit(start, folder)
        base = load_model(folder, dtype if rank else "float32", "cpu")
        if not rank:
            _check_names(base, folder)
        base.config.use_cache = False
        plain_head(base, torch.arange(LOOKED_AT)[None])  # looked at now, as in `adapt`, and by no watched step
        self.left_out = left_out(base) if rank and start is None else ""
        self.network = with_lora(base, folder, rank, start) if rank else base
        if gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._again, self._fused = gradient_checkpointing, False
        self._flat: FlatWeights | None = None
        self._decoder: decoder_pass.Decoder | None = None
        self.result = ADAPTER if rank else MODEL

    @property
    def base(self):
        """The causal language model of transformers, with the LoRA's layers in it."""
        return self.network.get_base_model() if self.result == ADAPTER else self.network

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, watched: bool = False):
        """`answer_losses` of a batch [B, T], padded on the right. `watched`: hooks look at the layers, which a graph passes by."""
        if self.result == ADAPTER and not self._fused:  # now it is on the device where it is trained
            self._fuse(ids.device.type)
        if self._decoder is None or watched:
            return answer_losses(self.base, ids, labels)
        with torch.autocast(ids.device.type, enabled=False):  # its casts would be taken into a graph once and for all
            return answer_losses(self.base, ids, labels, self._decoder)

    def _fuse(self, device: str) -> None:
        self._fused, fused = True, fused_layer.install(self.network)
        if device in GRAPHS and int(os.environ.get("WORLD_SIZE", 1)) == 1 and not self._again and decoder_pass.fits(self.base, fused):
            self._flat = FlatWeights([p for p in self.parameters() if p.requires_grad], fused.groups)
            self._decoder = decoder_pass.Decoder(self.base, fused, self._flat)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's own; gradients that graphs write to stay where they are."""
        if self._flat is None:
            super().zero_grad(set_to_none)
        else:
            self._flat.zero_grad()

    def make_room(self, reason: str) -> bool:
        """Give the graphs' memory back, as `Decoder.make_room`; False: there are none."""
        return self._decoder is not None and self._decoder.make_room(reason)

    def trouble(self) -> str:
        """As `Decoder.told`; empty where there are no graphs."""
        return "" if self._decoder is None else self._decoder.told()

    def save(self, folder: Path) -> None:
        """Write the weights, float32, as `folder`/adapter or `folder`/model."""
        if self.result == ADAPTER:
            save_adapter(self.network, folder / ADAPTER)
        else:
            (folder / MODEL).mkdir(parents=True, exist_ok=True)
            save_file(stored_tensors(self.network), folder / MODEL / "model.safetensors", metadata={"format": "pt"})

    def save_result(self, out: Path, prompt: dict[str, str]) -> Path:
        """Write what `solve` and vLLM load, by write-then-rename: `out`/adapter, or `out`/model in the dtype the model had; beside
        the weights the `prompt` they were trained with."""
        if self.result == ADAPTER:
            save_adapter(self.network, out / ADAPTER, {TRAINED_PROMPT: prompt})
            return out / ADAPTER
        config = read_config(self.folder)
        dtype = getattr(torch, str(config.get("torch_dtype") or config.get("dtype") or "float32"))
        with whole_folder(out / MODEL, replace=True) as fresh:
            weights = {name: weight.detach().to(dtype) for name, weight in stored_tensors(self.network).items()}
            save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
            copy_texts(self.folder, fresh)
            write_json(fresh / TRAINED_PROMPT, prompt)
        return out / MODEL

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote; raises ArcKernelError where it is not all there."""
        file = folder / self.result / ("adapter_model.safetensors" if self.result == ADAPTER else "model.safetensors")
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ArcKernelError(f"{file}: cannot be read ({error}): delete {folder} to go on from the one before it") from None
        if self.result == ADAPTER:
            from peft import set_peft_model_state_dict

            left = set_peft_model_state_dict(self.network, weights)
            wrong = [*left.unexpected_keys, *(k for k in left.missing_keys if "lora_" in k)]
        else:
            wrong = sorted(weights.keys() ^ stored_tensors(self.network).keys())
            self.network.load_state_dict(weights, strict=False)
        if wrong:
            raise ArcKernelError(f"{file}: not of this run ({', '.join(wrong[:3])}): delete {folder} to go on from the one before it")


def _check_names(base, folder: Path) -> None:
    """Raise ArcKernelError where transformers holds weights under other names than the folder has, by which vLLM and 4.57 read them."""
    there, prefix = weight_shapes(folder), f"{base.base_model_prefix}."  # which a model saved without its head lacks
    if renamed := sorted(name for name in stored_tensors(base) if not {name, name.removeprefix(prefix)} & there.keys()):
        raise ArcKernelError(f"{folder}: transformers has {renamed[0]} under a name that is none of the folder's, so that what is trained "
                             "in full would not be read as this model: train a LoRA (--lora-rank above 0)")
