"""The one exception a user is meant to read: a single line `where: what is wrong: what to do`."""


class ArcKernelError(Exception):
    """Bad input, a bad setting or a broken file; the message is one line that names the place and the mend."""
