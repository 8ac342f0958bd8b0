"""The exit codes of all commands.

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | export.lint: the file has errors |
| 2 | a mistake that the user can correct, reported in one line |
| 3 | deploy.build: a layer that the ONNX file declares INT8 is not INT8 in the engine |
| 4 | deploy.evaluate: the engine disagrees with ONNX Runtime or PyTorch; deploy.migrate: the explicit one is worse |
| 70 | an internal error of the program |
| 130 | interrupted: by Ctrl-C, SIGTERM or SIGHUP |
| 141 | done, but what it printed could not be written: a closed pipe, a full disk |
"""

from __future__ import annotations

DONE = 0
LINT_ERRORS = 1
USER_ERROR = 2
NOT_INT8 = 3
DISAGREES = 4
FAULT = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
BROKEN_OUTPUT = 141  # as the shell reports a process that SIGPIPE ended
