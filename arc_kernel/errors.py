"""The one exception a user is meant to read: a single line `where: what is wrong: what to do`. And what stands in such lines: another
exception's reason, numbers."""


class ArcKernelError(Exception):
    """Bad input, a bad setting or a broken file; the message is one line that names the place and the mend."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something; its type's name where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """`OSError: no space left`: the exception's type, and its first line where it has one."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def os_line(error: OSError) -> str:
    """The line for a file or folder that the system refuses: `x/y: Permission denied: ...`."""
    name = str(error.filename)
    return f"{name if len(name) < 256 else name[:60] + '...'}: {error.strerror}: give another, or let it be read and written"


def counted(count: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
