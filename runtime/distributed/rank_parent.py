"""The parent of one rank: starts it, tells the launcher how it ended, and ends it when the launcher lets go of it.

MPI's own launcher kills all ranks as soon as it sees one end, and who was the first is then anybody's guess. It sees this
process instead, which stays until the launcher has heard. Run as a script, without the package, per rank:

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
        return 1  # the launcher has ended: there is nobody to tell
    rank = subprocess.Popen(command, close_fds=False)  # MPI's launcher has left it a line as well
    handle = os.pidfd_open(rank.pid)
    with contextlib.suppress(OSError):  # then the launcher is gone, and the line can be read
        line.sendall(json.dumps(["started", [os.getpid(), rank.pid]]).encode() + b"\n")
    ready, _, _ = select.select([handle, line.fileno()], [], [])
    if handle not in ready:
        rank.kill()  # the launcher has let go
    code = rank.wait()
    with contextlib.suppress(OSError):
        line.sendall(json.dumps(["ended", [code, time.monotonic()]]).encode() + b"\n")
        line.recv(1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
