"""Time of --help of every command, from the start of the process to its end.

python benchmarks/help_time.py
"""

import subprocess
import sys
import time

from stamp import stamp

COMMANDS = ("qat.train", "export.onnx", "deploy.build", "deploy.report")
ROUNDS = 5


def seconds(command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", command, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    print(stamp("python benchmarks/help_time.py"))
    for command in COMMANDS:
        taken = sorted(seconds(command) for _ in range(ROUNDS))
        print(f"  python -m {command:14} --help   median {taken[ROUNDS // 2]:.2f} s, slowest {taken[-1]:.2f} s")


if __name__ == "__main__":
    main()
