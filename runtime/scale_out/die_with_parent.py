"""`python -I -S die_with_parent.py PARENT COMMAND...` is COMMAND, which gets SIGTERM when process PARENT has ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent):  # it ended before
        return 1
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
