"""What a person choosing a model wants to know, read from its folder: no weight is loaded, nothing is run.

Knows folders, tokenizers and what a probe left in the cache; nothing of how well a model does.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import median

from .. import checkpoint, trained_prompt
from ..files import cache_folder, read_json
from ..precision import probe, verdict
from ..prompts import default_builder
from ..rope import theta_of
from ..tasks import Task, load_challenges
from ..views import View
from . import context
from .draft import ROWS
from .needed import check_weights

SAMPLE = 40  # tasks whose prompts are counted
COLUMNS = {"model": "model", "parameters": "weights", "without_embeddings": "no emb.", "context": "context", "rope_theta": "theta",
           "heads": "heads/kv", "halves": "by 2", "head_size": "size", "layers": "layers", "vocabulary": "tokens", "tied": "tied",
           "chat_template": "template", "digits": "digits", "task_tokens": "task", "float16_headroom": "fp16 bits", "licence": "licence"}


def inspect(models: list[str], tasks: str) -> dict:
    """`models`: a dict of facts for each; `tasks`, `sampled`, `grid_encoder`: whose tokens `task_tokens` is the median of.

    Raises ArcKernelError for the first model that is no readable folder, or whose config.json lacks its sizes.
    """
    sample = _sample(list(load_challenges(tasks).tasks.values()))
    encoder = trained_prompt.FRESH["grid_encoder"]
    rows = [_facts(name, sample, encoder) for name in models]
    return {"models": rows, "tasks": tasks, "sampled": len(sample), "grid_encoder": encoder}


def text(facts: dict) -> str:
    """The facts as a table, with what its columns mean below."""
    joined = lambda row: row | {"heads": f"{row['heads']}/{row['kv_heads']}"}
    rows = [list(COLUMNS.values())] + [[_shown(key, joined(row)[key]) for key in COLUMNS] for row in facts["models"]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([*lines, "", f"task: prompt tokens of a median task, {facts['sampled']} of {facts['tasks']}, {facts['grid_encoder']}, "
                      "chat where there is a template, else compact",
                      "by 2: whether heads and kv heads can be shared by two devices; digits: whether each is a token of its own",
                      "fp16 bits: log2 of float16's limit over the largest activation the probe saw (command precision)"])


def _facts(name: str, sample: list[Task], encoder: str) -> dict:
    folder = checkpoint.open_model(name)
    check_weights(folder)
    config, shapes, tokenizer = checkpoint.decoder_config(folder), checkpoint.weight_shapes(folder), checkpoint.load_tokenizer(folder)
    heads, kv = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    builder = default_builder(tokenizer, encoder)
    lengths = [len(builder.prompt(View.identity(len(task.train)), task, 0)) for task in sample]
    return {"model": name if name == checkpoint.EMBEDDED else folder.name, "parameters": checkpoint.parameter_count(folder),
            "without_embeddings": sum(math.prod(s) for n, s in shapes.items() if not n.endswith(ROWS)),
            "context": checkpoint.context_length(folder), "rope_theta": theta_of(config), "heads": heads, "kv_heads": kv,
            "halves": heads % 2 == 0 and kv % 2 == 0, "head_size": checkpoint.head_size(config), "layers": config["num_hidden_layers"],
            "sliding_window": context.window_of(config), "vocabulary": len(tokenizer),
            "tied": not any(n.endswith(ROWS[1]) for n in shapes), "chat_template": _template(tokenizer.chat_template),
            "digits": [len(builder.ids_of(d)) for d in "0123456789"] == [1] * 10 and len(builder.ids_of("0123456789")) == 10,
            "task_tokens": int(median(lengths)) if lengths else None, "float16_headroom": _headroom(folder),
            "licence": _licence(folder)}


def _sample(tasks: list[Task]) -> list[Task]:
    """Up to SAMPLE tasks, evenly from those sorted by id."""
    order = sorted(tasks, key=lambda t: t.id)
    return order[:: max(1, len(order) // SAMPLE)][:SAMPLE]


def _template(template) -> str:
    if not template:
        return "none"
    known = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
    return next((name for marker, name in known.items() if marker in str(template)), "other")


def _headroom(folder: Path) -> float | None:
    """Bits left below float16's limit in the tightest range a probe of these weights has seen; None where none was kept."""
    key = {"weights": checkpoint.weights_sha256(folder), "adapter": None}
    files = (cache_folder() / "precision" / verdict.digest(key)).glob("ranges-*.json")
    seen = [probe.headroom(peak) for f in files for peaks in read_json(f)["peaks"].values() for peak in peaks]
    return min(seen, default=None)


def _licence(folder: Path) -> str:
    """The licence a folder states: in its README's front matter, else the first line of its LICENSE; else empty."""
    readme = folder / "README.md"
    stated = re.search(r"^license:\s*(\S+)", readme.read_text(encoding="utf-8", errors="replace"), re.M) if readme.is_file() else None
    if stated:
        return stated[1].strip("\"'")
    texts = (f.read_text(encoding="utf-8", errors="replace") for f in sorted(folder.glob("LICENSE*")) if f.is_file())
    return next((line.strip() for text in texts for line in text.splitlines() if line.strip()), "")


def _shown(key: str, value) -> str:
    if key in ("parameters", "without_embeddings"):
        return f"{value / 1e6:.1f}M"
    if value is None or value == "":
        return "not probed" if key == "float16_headroom" else "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if key == "float16_headroom" else f"{value:g}" if isinstance(value, float) else str(value)
