"""A model folder in the making: opened from a checkpoint, changed step by step, written in one pass over the weights.

What the files will say is held here as values; weights stream through `stages` only when the folder is written. Knows file
layouts, and nothing of what is changed or why. Nothing in the checkpoint is run: no code (auto_map), no pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

from ..checkpoint import (CARD, PICKLED, TRAINED_PROMPT, WEIGHTS, check_plain, check_safetensors, copy_texts, load_tokenizer,
                          portable_config, read_config, says_tied_by_mistake, weight_shapes, weight_tensors)
from ..errors import ArcKernelError
from ..files import read_json, write_json
from ..progress import bar
from .needed import check_weights, known_architecture, needed_shapes

ROWS = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # ends of the names of weights with a row a token
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

Weights = Iterator[tuple]  # (name, torch tensor) of each weight


@dataclass
class Draft:
    """A model folder in the making. `source` is where its weights are, `folder` where it is written.

    `config`, `generation`, `tokenizer` become config.json, generation_config.json and tokenizer_config.json; `backend` (a
    tokenizers.Tokenizer) becomes tokenizer.json, `template` chat_template.jinja (None: there is none). `stages` turn the stream
    of weights into another, in their order. `report` has a line for each thing changed.
    """

    source: Path
    folder: Path
    config: dict
    generation: dict
    backend: object
    tokenizer: dict
    template: str | None
    stages: list[Callable[[Weights], Weights]] = field(default_factory=list)
    report: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, source: Path, folder: Path) -> "Draft":
        """The draft of what is in `source`.

        Raises ArcKernelError naming what is missing or not opened, with the mend.
        """
        config = portable_config(read_config(source))
        check_plain(source, config)
        check_safetensors(source, WEIGHTS)
        backend, roles, special, template = _tokenizer(source, config)
        context = config.get("max_position_embeddings") or config.get("max_context_length") or 1 << 20
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": context}
        tokenizer |= roles | ({"additional_special_tokens": special} if special else {})
        named = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
        generation = _generation(source / "generation_config.json") or named
        draft = cls(source, folder, config, generation, backend, tokenizer, template)
        if config.pop("auto_map", None):
            draft.report.append("auto_map: left out, no code of a checkpoint is run")
        if says_tied_by_mistake(source, draft.config):
            draft.config["tie_word_embeddings"] = False
            draft.report.append("tie_word_embeddings: false now, since the head that is stored is not the embeddings")
        if ignored := [f.name for pattern in PICKLED for f in sorted(source.glob(pattern))]:
            draft.report.append(f"{', '.join(ignored)}: not read, the safetensors are")
        return draft

    def ids(self) -> dict[str, int]:
        """Every token of the tokenizer and its id."""
        return self.backend.get_vocab(with_added_tokens=True)

    def name_token(self, role: str, token: str) -> None:
        """Make `token` the tokenizer's `role` (eos_token, ...) in all three configs."""
        self.tokenizer[role] = token
        for config in (self.config, self.generation):
            config[role + "_id"] = self.backend.token_to_id(token)

    def load_tokenizer(self):
        """The tokenizer as transformers loads it from the folder, written as it is now."""
        self.backend.save(str(self.folder / "tokenizer.json"))
        write_json(self.folder / "tokenizer_config.json", self.tokenizer)
        write_json(self.folder / "config.json", self.config)
        if self.template is not None:
            (self.folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        return load_tokenizer(self.folder)

    def write(self) -> None:
        """Write the folder, its weights as one safetensors file without what the architecture has no use for.

        Raises ArcKernelError naming the first tensor that is missing or has another shape than the config says.
        """
        from safetensors.torch import save_file

        self.load_tokenizer()
        write_json(self.folder / "generation_config.json", self.generation)
        copy_texts(self.source, self.folder, (*CARD, TRAINED_PROMPT))
        needed, tensors, unused = needed_shapes(self.folder), {}, []
        with bar(len(weight_shapes(self.source)), "weights", "tensor") as shown:
            weights = _counted(weight_tensors(self.source), shown)
            for stage in self.stages:
                weights = stage(weights)
            for name, tensor in weights:
                if name in needed:
                    tensors[name] = tensor.contiguous()
                else:
                    unused.append(name)
        if unused:
            some = ", ".join(unused[:3]) + ", ..." * (len(unused) > 3)
            self.report.append(f"tensors left out, for which the architecture has no use: {len(unused)} ({some})")
        save_file(tensors, self.folder / WEIGHTS.replace("*", ""), metadata={"format": "pt"})
        try:
            check_weights(self.folder)
        except ArcKernelError as error:
            raise ArcKernelError(str(error).replace(str(self.folder), str(self.source))) from None


def _generation(path: Path) -> dict:
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise ArcKernelError(f"{path}: not JSON: {error}: copy the model again") from None


def _counted(weights: Weights, shown) -> Weights:
    for weight in weights:
        yield weight
        shown.update()


def _tokenizer(source: Path, config: dict) -> tuple:
    """(tokenizers.Tokenizer, token of each role, other special tokens, chat template) of a checkpoint.

    tokenizer.json is taken as published: classes of transformers 5 build another from its vocabulary, classes of 4.57 do not.
    Without tokenizer_config.json the config's ids say which token has which role.
    """
    from tokenizers import Tokenizer

    if not any((source / name).is_file() for name in TOKENIZERS):
        raise ArcKernelError(f"{source}: no tokenizer (tokenizer.json): copy the one the model was trained with into the folder")
    published = source / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(published)) if published.is_file() else None
    except Exception as error:  # tokenizers raises bare Exception
        raise ArcKernelError(f"{published}: damaged ({error}): copy the model again") from None
    if backend is not None and not (source / "tokenizer_config.json").is_file():
        ids = {role: config.get(role + "_id") for role in ROLES}
        roles = {role: backend.id_to_token(i) for role, i in ids.items() if isinstance(i, int)}
        return backend, {role: token for role, token in roles.items() if token}, [], None
    if backend is not None and not known_architecture(config):  # AutoTokenizer wants a config it knows
        from transformers import PreTrainedTokenizerFast

        loaded = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    else:
        loaded = load_tokenizer(source)
    backend = backend or getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ArcKernelError(f"{source}: tokenizer has no fast form: save it with transformers' AutoTokenizer as tokenizer.json")
    roles = {role: getattr(loaded, role) for role in ROLES}
    special = [t for t in loaded.all_special_tokens if t not in roles.values()]
    template = loaded.chat_template
    return backend, roles, special, template.get("default") if isinstance(template, dict) else template
