"""Keep onnxruntime from reporting to its maker. Standard library only; imported before anything that imports it.

From 1.29 on, onnxruntime for Linux starts a thread when it is imported, writes a device id and a database of events
below the user's cache folder and sends them to Microsoft, unless this variable is set before; later is too late for
thread and files. Processes that this one starts inherit it. A user who wants to report sets it to 0.

Source: seen with onnxruntime 1.31.1, in strace.
"""

from __future__ import annotations

import os

DISABLE_TELEMETRY = "ORT_DISABLE_TELEMETRY"

if not os.environ.get(DISABLE_TELEMETRY):  # an empty one disables nothing
    os.environ[DISABLE_TELEMETRY] = "1"
