"""Runs command lines without paying for torch's import each time: a process that has it, and forks for each of them.

Nothing of ONNX is imported before the fork: ONNX Runtime's threads do not survive one, and a child could not end.

Each child is a process of its own that runs ``python -m MODULE ARGUMENTS``: its exit code, its signals, its standard
output and its standard error are real. One request is a line of JSON on standard input, its answer is the exit code.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import traceback
from typing import Any, NoReturn


def serve() -> None:
    """Answers requests until standard input ends."""
    import qat.run  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(request: dict[str, Any]) -> NoReturn:
    """Runs the command in this process, which ends with it, at once: torch's tear-down would take longer than all."""
    for stream, path in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(path, os.O_RDWR), stream)
    os.environ |= request["environment"]
    os.chdir(request["folder"])
    if request["file_size"] is not None:  # writing more fails; Python ignores the signal that comes with it
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    sys.modules.pop(request["module"], None)
    sys.argv = [request["module"], *request["arguments"]]
    code: Any = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
