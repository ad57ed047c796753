"""What a signal does to the screen; what it does to a run is in test_resume.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys

from tests.helpers.children import environment

ON_A_TERMINAL = """
import os, signal
from qlora_jax.base.console import make_console
from qlora_jax.training.display import RunDisplay
from qlora_jax.training.signals import Signals

with RunDisplay(make_console(), 3).live(), Signals():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_second_ctrl_c_leaves_the_terminal_its_cursor() -> None:
    """The progress bar hides it."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL]
    children = environment(JAX_PLATFORMS="cpu", TERM="xterm")
    assert subprocess.run(command, env=children, stdout=theirs, stderr=theirs).returncode == -signal.SIGINT
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the end of what a terminal that nobody has open any more said
        while piece := os.read(ours, 4096):
            printed += piece
    os.close(ours)
    assert re.findall(rb"\x1b\[\?25[lh]", printed) == [b"\x1b[?25l", b"\x1b[?25h"]
