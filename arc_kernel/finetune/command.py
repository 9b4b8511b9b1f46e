"""The `finetune` command. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from ..errors import ArcKernelError
from ..files import read_json
from ..settings import LongHelp
from .settings import FinetuneSettings

ABOUT = """Long fine-tuning over data sets, in full or as a LoRA. Writes OUT/adapter (for solve --adapter) or OUT/model, report.html,
events.jsonl and checkpoints; started again on OUT it goes on from the last one. Before the first step it looks for evaluation tasks
in the data and prints how long the examples are."""
TIMES = """How long: reading 40,000 pairs takes 4 s, looking for evaluation tasks in them 2 s. SmolLM2-135M with the tokens of ARC only
trains on about 80 tokens/s per core of a CPU with AVX2, in float32: 500 steps of 16 examples of 300 tokens are 4 hours on 2 of them.
The bar shows tokens/s and the time left; report.html which share of the machine's products that is.
Several GPUs: torchrun --nproc-per-node 2 -m arc_kernel finetune ... with the same options. Example, small grids on a CPU:
  python -m arc_kernel finetune --data pool.jsonl.gz --prompt compact --grid-encoder digits --max-tokens 400 --max-too-long 1
    --short-first 0.3 --hold-out 20 --steps 500 --lr 1e-4,3e-4,1e-3 --out runs/study"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `finetune` to the command line."""
    parser = commands.add_parser("finetune", help="train a model or a LoRA on data sets, at one or several learning rates",
                                 formatter_class=LongHelp, description=ABOUT, epilog=TIMES)
    types = typing.get_type_hints(FinetuneSettings)
    for f in dataclasses.fields(FinetuneSettings):
        name, wanted = "--" + f.name.replace("_", "-"), types[f.name]
        if f.name == "data":
            parser.add_argument(name, action="append", default=[], metavar="PATH[:kind][:weight]", help=f.metadata["help"])
        elif f.name == "lr":
            parser.add_argument(name, default=str(f.default), help=f.metadata["help"])
        elif wanted is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=f.default, help=f.metadata["help"])
        else:
            parser.add_argument(name, type=wanted, default=f.default, choices=f.metadata["choices"], help=f.metadata["help"])
    parser.set_defaults(command=_finetune, slow_start=True, goes_on=True)


def _finetune(lr: str, **options) -> None:
    try:
        rates = [float(rate) for rate in lr.split(",")]
    except ValueError:
        raise ArcKernelError(f"--lr {lr}: give a number, or several with commas: 1e-4,3e-4,1e-3") from None
    settings = [FinetuneSettings(lr=rate, **options) for rate in dict.fromkeys(rates)]
    if len(settings) > 1:
        from .page import study_text
        from .study import study

        page = study(settings[0], [s.lr for s in settings])
        if page:
            print(f"{study_text(read_json(page.with_name('study.json')), page.parent)}\nstudy: {page}")
        return
    from .run import finetune

    made = finetune(settings[0])
    if made:
        print(f"step {made['step']}: loss {made['loss']:.4f} over the last tenth, {made['tokens_per_second']:.0f} tokens/s, "
              f"{made['peak_share']:.1%} of the product peak\nresult: {made['result']}\nreport: {made['report']}")
