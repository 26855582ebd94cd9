"""The parent of one rank: starts it, reports to our launcher how it ended, and kills it when the launcher disconnects.

MPI's own launcher kills all ranks as soon as it sees one end, after which it is unknown which one ended first. It sees this
process instead, which stays until our launcher has its report. Each rank has one, run as a script without the package:

    python -I -S rank_parent.py SOCKET COMMAND...
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time


def main() -> int:
    address, *command = sys.argv[1:]
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(address)
    except OSError:
        return 1  # the launcher has ended, so there is nothing to report to
    rank = subprocess.Popen(command, close_fds=False)  # the rank inherits its connection to MPI's launcher
    handle = os.pidfd_open(rank.pid)
    with contextlib.suppress(OSError):  # then the launcher is gone, and `select` returns at once
        line.sendall(json.dumps(["started", [os.getpid(), rank.pid]]).encode() + b"\n")
    ready, _, _ = select.select([handle, line.fileno()], [], [])
    if handle not in ready:
        rank.kill()  # the launcher has closed the connection
    code = rank.wait()
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(["ended", [code, time.monotonic()]]).encode() + b"\n")
        line.recv(1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
