"""Runs command lines without paying for torch's import each time: a process that has it, and forks for each of them.

Each child is a process of its own that runs ``python -m MODULE ARGUMENTS``: its exit code, its signals, its standard
output and its standard error are real. One request is a line of JSON on standard input, its answer is the exit code.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
from typing import Any


def serve() -> None:
    """Answers requests until standard input ends."""
    import onnx_ir  # noqa: F401
    import torch.onnx  # noqa: F401

    import qat.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(request: dict[str, Any]) -> None:
    """Runs the command in this process, which ends with it."""
    for stream, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR), stream)
    os.environ |= request["environment"]
    if request["file_size"] is not None:  # writing more fails; Python ignores the signal that comes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    sys.modules.pop(request["module"], None)
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve()
