"""From a checkpoint (folder, GGUF, or the embedded model) to a clean model folder: every change asked for, in one pass.

The only module here that knows all the steps and their order.
"""

from __future__ import annotations

import contextlib
import filecmp
import tempfile
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

from .. import checkpoint
from ..errors import ArcKernelError
from ..files import whole_folder, write_json
from ..rope import write_both_forms
from . import context as longer
from . import openelm, template
from .draft import Draft
from .needed import check_names, check_weights, needed_shapes
from .vocabulary import shrink


def prepare(model: str, out: str, chat_template: str = "", context: int = 0, rope_theta: float = 0.0,
            vocabulary: str = "full", only: tuple[str, str] | None = None) -> list[str]:
    """Write `model` as the clean folder `out` with what is asked for; one line per thing changed, then the folder's.

    With the vocabulary "arc" tokens of all prompts are kept, or those of `only` one prompt kind and grid encoder.
    Without `out` the model is only checked. A folder that holds just this already is left alone. Raises ArcKernelError in one
    line, and then leaves nothing behind.
    """
    if rope_theta and not context:
        raise ArcKernelError("prepare: --rope-theta goes with --context: give both")
    if context < 0 or rope_theta < 0:
        raise ArcKernelError("prepare: --context and --rope-theta are positive: give tokens and a base")
    if not out:
        if chat_template or context or vocabulary != "full" or model.endswith(".gguf"):
            raise ArcKernelError("prepare: nowhere to write the changed model: give --out, a folder")
        folder = checkpoint.open_model(model)
        check_weights(folder)
        return [f"{folder}: {summary(folder)}"]
    target = Path(out)
    other = lambda: any(target.iterdir()) and not (target / "config.json").is_file()
    if target.exists() and (not target.is_dir() or target.resolve() == Path(model).resolve() or other()):
        raise _taken(target)
    try:
        with _opened(model) as source, whole_folder(target) as fresh:
            draft = Draft.open(source, fresh)
            _change(draft, chat_template, context, rope_theta)
            if vocabulary == "arc":
                shrink(draft, only)
            draft.write()
            checkpoint.check_model(fresh)
            _refuse_other(target, fresh)
            return [*draft.report, f"{out}: {size(source)} -> {summary(fresh)}"]
    except (OSError, SafetensorError) as error:
        raise ArcKernelError(f"{out}: cannot be written ({error}): give another --out, or make room") from None


def _change(draft: Draft, chat_template: str, context: int, rope_theta: float) -> None:
    """Take the steps before tokens are left out, in the order in which each finds what it needs: architecture, tokens, angles."""
    if draft.config.get("model_type") == "openelm":
        openelm.convert(draft)
    else:
        _check_source(draft)
    template.cover(draft)
    if chat_template:
        template.add(draft, chat_template)
    if context:
        longer.stretch(draft, context, rope_theta)
    write_both_forms(draft.config)


def size(folder: Path) -> str:
    """A folder's weights in words: how many, how many bytes."""
    bytes_ = sum(f.stat().st_size for f in folder.glob(checkpoint.WEIGHTS))
    return f"{checkpoint.parameter_count(folder) / 1e6:.1f}M weights ({bytes_ / 1e6:.0f} MB)"


def summary(folder: Path) -> str:
    """A checked folder in words: its size and context."""
    return f"{size(folder)}, context {checkpoint.context_length(folder)}"


@contextlib.contextmanager
def _opened(model: str) -> Iterator[Path]:
    """The folder of a model's weights; those of a GGUF are dequantized into a temporary one."""
    if model == checkpoint.EMBEDDED:
        yield checkpoint.embedded_model()
        return
    path = Path(model)
    if not (path.is_file() if path.suffix == ".gguf" else path.is_dir()):
        raise ArcKernelError(f"{path}: no such model: give a folder with safetensors, a .gguf file, or {checkpoint.EMBEDDED}")
    if path.suffix != ".gguf":
        yield path
        return
    with checkpoint.parsed_once(path), tempfile.TemporaryDirectory(prefix="arc-kernel-") as scratch:
        try:
            checkpoint.import_gguf(path, Path(scratch), None)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise ArcKernelError(f"{path}: not imported: {' '.join(str(error).split())[:200]}: take the model as safetensors") from None
        yield Path(scratch)


def _check_source(draft: Draft) -> None:
    """Raise ArcKernelError unless transformers knows the architecture; a missing tensor is named before anything is computed."""
    write_json(draft.folder / "config.json", draft.config)
    try:
        needed = needed_shapes(draft.folder)
    except ArcKernelError as error:
        raise ArcKernelError(str(error).replace(str(draft.folder), str(draft.source))) from None
    check_names(draft.source, needed, checkpoint.weight_shapes(draft.source), draft.config)


def _refuse_other(target: Path, fresh: Path) -> None:
    """Raise ArcKernelError where `target` exists and holds anything but the files of `fresh`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    names = sorted(f.name for f in fresh.iterdir())
    same_names = target.is_dir() and names == sorted(f.name for f in target.iterdir())
    if not same_names or filecmp.cmpfiles(target, fresh, names, shallow=False)[0] != names:
        raise _taken(target)


def _taken(target: Path) -> ArcKernelError:
    return ArcKernelError(f"{target}: exists and holds something else: give another --out, or remove it")
