"""127.0.0.1 brought up where it is down, as in a fresh network namespace (`unshare -n`).

vLLM's process group and Jupyter's channels talk over it even inside one machine; nothing here reaches further.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP (linux/sockios.h, linux/if.h)


def ensure() -> None:
    """Bring the loopback interface up where it is down and this process may; otherwise change nothing."""
    if not sys.platform.startswith("linux"):
        return
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14s", b"lo", 0, b"")
        flags = struct.unpack("16sH14s", fcntl.ioctl(control, GET_FLAGS, request))[1]
        if not flags & UP:
            fcntl.ioctl(control, SET_FLAGS, struct.pack("16sH14s", b"lo", flags | UP, b""))
