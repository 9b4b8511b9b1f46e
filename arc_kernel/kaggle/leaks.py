"""What must not leave this machine with a bundle: credentials by file name or by look, .git, notebooks with outputs.

Reads the files it is given and nothing else; never reads or compares with a real credential.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from ..files import read_json

SMALL = 1 << 20  # bytes; larger files are tokenizers and weights
# Where Kaggle's client keeps credentials: kaggle_env.py and kaggle_creds.py in kagglesdk 0.1.38, kaggle_api_extended.py.
FILES = {"kaggle.json": "Kaggle API key", "access_token": "Kaggle access token", "access_token.txt": "Kaggle access token",
         "credentials.json": "Kaggle OAuth credentials", ".env": "environment file", ".env.*": "environment file",
         "*.env": "environment file",
         "*.pem": "private key or certificate", "*.key": "private key", "id_rsa*": "SSH key", "id_dsa*": "SSH key",
         "id_ecdsa*": "SSH key", "id_ed25519*": "SSH key", ".netrc": "password file",
         ".git-credentials": "password file", ".pypirc": "password file"}
SET = rb"[\"'\]\s,=:\\]{1,8}"  # between a name and its value: key="...", environ["KEY"] = "...", each also with a notebook's \"
TEXTS = {"a Kaggle API token": rb"KGAT_[0-9A-Za-z_-]{16,}",
         "a Kaggle API key": rb"(?i)(?:kaggle_key|api_?key|\bkey)\b" + SET + rb"[0-9a-f]{32}\b",
         "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
         "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b",
         "a Weights & Biases API key": rb"(?i)(?:wandb_api_key|wandb\.login\(\s*key)\b" + SET + rb"[0-9a-f]{40}\b",
         "an API key": rb"\b(?:sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,}|AKIA[0-9A-Z]{16}\b|glpat-[\w-]{20,})",
         "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"}


def leaks(folder: Path) -> list[str]:
    """A line `file: what is wrong: what to do` for each thing in `folder` that must not be uploaded."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if ".git" in name.parts:
            if name.parts[-1] == ".git":
                lines.append(f"{path}: version control of another folder: remove it")
        elif path.is_symlink() and path.is_dir():  # which Kaggle's client follows
            lines.append(f"{path}: a link to a folder, which would be uploaded: remove it")
        elif path.is_file():
            lines += _of_file(path)
    return lines


def _of_file(path: Path) -> list[str]:
    found = next((what for pattern, what in FILES.items() if fnmatch(path.name.lower(), pattern)), None)
    if found:
        return [f"{path}: {found}: remove it, and never upload it"]
    lines, texts = _of_notebook(path) if path.suffix == ".ipynb" else ([], [])
    if path.stat().st_size <= SMALL and b"\0" not in (data := path.read_bytes()):
        texts.append(data)
    return lines + [f"{path}: holds what looks like {what}: remove it, and revoke it if it is one"
                    for what, pattern in TEXTS.items() if any(re.search(pattern, text) for text in texts)]


def _of_notebook(path: Path) -> tuple[list[str], list[bytes]]:
    """Faults of an .ipynb, and the text of each cell as a person reads it; one that is no JSON, or has no cells, is named too."""
    try:
        notebook = read_json(path)
        texts = ["".join(cell["source"]).encode(errors="replace") for cell in notebook["cells"]]
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        named = "kaggle" in (notebook.get("metadata") or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{path}: not a notebook: write it again (python -m arc_kernel notebook)"], []
    lines = []
    if any(cell.get("outputs") for cell in cells):
        lines.append(f"{path}: has outputs of a run: write it again (python -m arc_kernel notebook)")
    if any(cell.get("execution_count") is not None for cell in cells):
        lines.append(f"{path}: has execution counts of a run: write it again (python -m arc_kernel notebook)")
    if named:  # can win over kernel-metadata.json (Kaggle/kaggle-cli issue 1197)
        lines.append(f"{path}: names a machine (metadata.kaggle): write it again (python -m arc_kernel notebook)")
    return lines, texts
