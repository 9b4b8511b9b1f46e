"""The one exception a user is meant to read: a single line `where: what is wrong: what to do`; and numbers in such lines."""


class ArcKernelError(Exception):
    """Bad input, a bad setting or a broken file; the message is one line that names the place and the mend."""


def counted(count: int, noun: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
