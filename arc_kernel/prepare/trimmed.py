"""The model as a run opens it: without the tokens its prompts do not hold, made once and kept in the cache.

Knows on what such a copy depends, when one goes again, and when a model is left as it is; how a copy is made stands in `make`. What
is kept computes what it did, and embedding and head, more than a quarter of a small model's weights, all but go.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import time
import traceback
from pathlib import Path
from typing import Callable

from filelock import FileLock

from .. import checkpoint
from ..errors import ArcKernelError, counted, named_line
from ..files import cache_folder, read_json
from ..precision.verdict import digest
from .draft import ROWS
from .make import prepare
from .vocabulary import USE_FULL, byte_tokens

# what a copy is made by, from this folder: another one is made where it changes
CODE = ("*.py", "../checkpoint.py", "../grids.py", "../prompts.py", "../rope.py")
FORGOTTEN = 7  # days without use after which a copy is removed where another is made; a run on a CPU can take some of them
DATED = b"strftime_now"  # the function by which a chat template tells the day, in tokens another day may not have


def trimmed(folder: Path, vocabulary: str, prompt: str, grid_encoder: str, adapter: str, say: Callable[[str], None]) -> Path:
    """The folder of the model in `folder` with the tokens of one prompt kind and grid encoder; `folder` itself for the vocabulary "full".

    Also itself where `prepare --vocabulary arc` made it, and where it cannot lose tokens, or not with this adapter: `say` is told why.
    """
    if vocabulary == "full" or checkpoint.is_trimmed(folder):
        return folder
    try:
        _check_adapter(adapter)
        target = cache_folder() / "arc" / _key(folder, prompt, grid_encoder) / folder.resolve().name
        if not target.is_dir():
            _check_tokenizer(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.parent / ".lock"):  # of workers that start together the first makes it
                if not target.is_dir():
                    say(f"{folder.name}: a copy is made without the tokens that no prompt here holds, once; it is kept in "
                        f"{target.parent.parent}")
                    say(prepare(str(folder), str(target), vocabulary="arc", only=(prompt, grid_encoder))[-1])
                    _forget(target.parent.parent, say)
        checkpoint.check_model(target)
        with contextlib.suppress(OSError):  # a cache that cannot be written to
            os.utime(target.parent)
        return target
    except ArcKernelError as error:
        say(f"all tokens are kept: {error}")
    except Exception as error:  # no reason for which a run should not go on
        traceback.print_exc()
        say(f"all tokens are kept: {folder}: {named_line(error)}")
    return folder


def _forget(copies: Path, say: Callable[[str], None]) -> None:
    """Remove the copies that no run has opened for FORGOTTEN days: other models' and prompts', and those of other code."""
    old = []
    for folder in copies.iterdir():
        with contextlib.suppress(OSError):  # another run removes it
            if time.time() - folder.stat().st_mtime > FORGOTTEN * 86400:
                old.append(folder)
                shutil.rmtree(folder, ignore_errors=True)
    if old:
        say(f"removed from {copies}, since no run opened them for {FORGOTTEN} days: {counted(len(old), 'folder')}")


def _check_tokenizer(folder: Path) -> None:
    """Raise ArcKernelError at once where `prepare` would after seconds, in every run, once its libraries are loaded."""
    state = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    if "type" in state.get("model", ()):  # old files leave it out
        byte_tokens(state, folder)


def _check_adapter(adapter: str) -> None:
    """Raise ArcKernelError where an adapter has rows of its own for tokens."""
    names = checkpoint.tensor_shapes(Path(adapter), "adapter_model.safetensors") if adapter else ()
    for name in (n for n in names if any(row.partition(".")[0] in n for row in ROWS)):
        raise ArcKernelError(f"{adapter}: changes {name}, which goes by the tokens: {USE_FULL}")


def _key(folder: Path, prompt: str, grid_encoder: str) -> str:
    """What a copy depends on, as a name: the files, the prompts, the code; the day where a template tells it."""
    texts = {f.name: f.read_bytes() for pattern in checkpoint.TEXTS for f in sorted(folder.glob(pattern)) if f.is_file()}
    dated = any(DATED in text for text in texts.values())
    return digest({"weights": checkpoint.weights_sha256(folder), "prompt": prompt, "grid_encoder": grid_encoder, "code": _code(),
                   "texts": {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()},
                   "day": time.strftime("%Y-%m-%d") if dated else ""})


@functools.cache
def _code() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join(f.read_bytes() for pattern in CODE for f in sorted(here.glob(pattern)))).hexdigest()
