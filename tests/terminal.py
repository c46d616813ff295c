"""A terminal for a process, as wide as 90 characters."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from contextlib import nullcontext


def on_terminal(command, stdout=None):
    """What a terminal gets from a command; its standard output may go to a file instead."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    got = b""
    with (
        nullcontext(slave) if stdout is None else open(stdout, "w") as out,
        subprocess.Popen(command, stdin=slave, stdout=out, stderr=slave) as process,
    ):
        os.close(slave)
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # Linux's end of a terminal
                break
            if not part:
                break
            got += part
    os.close(master)
    assert process.returncode == 0, got.decode()
    return got.decode()
