"""What an interruption leaves behind."""

from __future__ import annotations

import subprocess
import sys

HALF_MADE = """
import os, signal
from runtimes.signals import Interrupted, interruptible

class Bar:
    def __init__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self.place = 0
    def __del__(self):
        print("closed at", self.place)

try:
    with interruptible():
        Bar()
except Interrupted as error:
    code = error.exit_code
raise SystemExit(code)
"""


def test_an_object_that_was_being_made_says_nothing_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", HALF_MADE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")
