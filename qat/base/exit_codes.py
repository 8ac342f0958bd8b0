"""The exit codes of all commands.

| code | meaning |
| --- | --- |
| 0 | done |
| 1 | an internal error of the program; export.lint: the file has errors |
| 2 | a mistake that the user can correct, reported in one line |
| 3 | deploy.build: a layer that the ONNX file declares INT8 is not INT8 in the engine |
| 4 | deploy.evaluate: the engine disagrees with ONNX Runtime or PyTorch; deploy.migrate: the explicit one is worse |
| 130 | interrupted |
"""

from __future__ import annotations

DONE = 0
FAULT = 1
LINT_ERRORS = 1
USER_ERROR = 2
NOT_INT8 = 3
DISAGREES = 4
INTERRUPTED = 130
