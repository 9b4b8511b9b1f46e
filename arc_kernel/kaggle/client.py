"""Kaggle's own client as a subprocess: what it prints becomes an answer, or one line that says what Kaggle refused.

The client finds its credentials itself; nothing here reads one. Written to kaggle 2.2.5, which exits 0 on most refusals.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from ..errors import ArcKernelError

QUICK = 120.0  # seconds for a question; an upload may take as long as it takes
EVERY = 15.0  # seconds between two lines of an upload's progress
LOUD = ("VERBOSE", "VERBOSE_OUTPUT")  # with these the client prints every request, the credentials in it too
ABSENT = ("The resource was not found", "You don't have access to this resource")  # its hints on 404 and 403: _HTTP_ERROR_HINTS
# What a refusal means, by what the client prints, and the mend; the first that fits counts.
MENDS = ((r"\b401\b|Unauthori[sz]ed|Authentication required|Unauthenticated", "Kaggle does not take the credentials",
          "make a new API token in your Kaggle settings and give it to the client (KAGGLE_API_TOKEN, or kaggle auth login)"),
         (r"(?i)\b429\b|too many requests|rate limited", "too many requests", "wait some minutes and push again"),
         (r"(?i)session count|quota", "the accelerator quota is used up", "wait, or stop a session; kaggle quota says what is left"),
         (r"already in use", "the name is taken", "choose another title and id"),
         (r"Slug can only|(?i:invalid slug)", "Kaggle does not take the id", "use lowercase letters, digits and hyphens in it"),
         (r"not valid (?:dataset|competition|kernel) sources", "pushed without all of its inputs",
          "mend the ids of the sources and push again"),
         (r"No module named", "the Kaggle client is incomplete", "pip install 'kaggle>=2.2.5' six"),
         (r"ConnectionError|Max retries exceeded|ProxyError|SSLError|no answer within", "Kaggle cannot be reached",
          "look at the network and push again"),
         (r"You don't have access|\b403\b", "no access", "accept the competition's rules on Kaggle, and look at the ids"))
REFUSED = (r"^(?:Dataset (?:version )?creation error|Kernel push error): *(.*)"
           r"|^The following are (not valid (?:dataset|competition|kernel) sources.*)")


def command(*arguments: str) -> str:
    """The client's call as a user would type it."""
    return shlex.join(("kaggle", *arguments))


def check_installed() -> None:
    """Raise ArcKernelError unless the client can be started by this interpreter."""
    if importlib.util.find_spec("kaggle") is None:  # not imported: that alone would look for credentials
        raise ArcKernelError("kaggle: Kaggle's client is not installed: pip install 'kaggle>=2.2.5' six")


def ask(*arguments: str) -> str | None:
    """What the client prints for a question; None where Kaggle has no such thing, or not for this user."""
    code, printed = _run(arguments, None, QUICK)
    if code and any(hint in printed for hint in ABSENT):
        return None
    _raise_if_refused(arguments, code, printed)
    return printed.strip()


def do(*arguments: str, success: str, say: Callable[[str], None]) -> str:
    """Let the client change something on Kaggle; `say` gets its lines. Returns the line that holds `success`.

    Raises ArcKernelError in one line for every refusal, also those after which the client exits 0.
    """
    code, printed = _run(arguments, say, None)
    _raise_if_refused(arguments, code, printed)
    line = next((line for line in printed.splitlines() if success in line), None)
    if line is None:
        raise ArcKernelError(f"{command(*arguments)}: no word of success ({_reason(printed)}): look at its lines and push again")
    return line


def _raise_if_refused(arguments: Sequence[str], code: int, printed: str) -> None:
    refused = re.search(REFUSED, printed, re.MULTILINE)
    if not code and not refused:
        return
    reason = (refused[1] or refused[2]) if refused else _reason(printed)
    for pattern, what, mend in MENDS:
        if re.search(pattern, reason if refused else printed):
            raise ArcKernelError(f"{command(*arguments)}: {what} ({reason.rstrip('.')}): {mend}")
    raise ArcKernelError(f"{command(*arguments)}: Kaggle refused ({reason.rstrip('.')}): mend that and push again")


def _reason(printed: str) -> str:
    """The line that says most: an error's, else the last one with words that is not one of the client's hints."""
    lines = [line.strip() for line in printed.splitlines() if re.search(r"\w", line) and not line.startswith(("Request failed", " "))]
    errors = [line for line in lines if re.search(r"(?i)error\b|\b[45]\d\d\b|required|No module named", line)]
    return (errors or lines or ["it printed nothing"])[-1][:300]


def _run(arguments: Sequence[str], say: Callable[[str], None] | None, limit: float | None) -> tuple[int, str]:
    """The client's exit code and all it printed; it is ended after `limit` seconds. Progress bars are said now and then."""
    environment = {key: value for key, value in os.environ.items() if key not in LOUD} | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, "-P", "-m", "kaggle", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", env=environment)
    timer = threading.Timer(limit or 0, process.kill)
    if limit:
        timer.start()
    lines, said = [], 0.0
    try:
        for line in process.stdout:  # universal newlines: a progress bar's carriage returns end lines too
            bar = re.match(r"\s*\d+%\|", line)
            if not bar:
                lines.append(line)
            if say and line.strip() and (not bar or time.monotonic() - said > EVERY):
                say(f"  {line.rstrip()}")
                said = time.monotonic()
        code = process.wait()
        if limit and code < 0:  # ended by the timer: the client's own requests wait for ever
            lines.append(f"no answer within {limit:g} s\n")
        return code, "".join(lines)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
