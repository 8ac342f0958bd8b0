"""Training on all GPUs of a machine: tests, times of a step and of calibration, two GPUs against one, and CIFAR-10.

    python -m benchmarks.gpu_training CIFAR10.npz OUTPUT_FOLDER [--seeds 0 1 2]

Each job is a process with GPUs of its own; it starts when they are free and what it needs is there. The tables are
step.txt, calibration.txt, scaling-*.txt and accuracy.txt; rows/ has a line of JSON for each row of a seed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.accuracy import GROUPS

PYTHON = [sys.executable, "-u", "-m"]
TWO_GPUS = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
TESTS = ["tests/gpu/test_training.py", "--confcutdir=tests/gpu", "-p", "no:cacheprovider", "-q", "--show-capture=no"]


@dataclass(frozen=True)
class Job:
    """``after``: the name of the job that makes what this one needs."""

    name: str
    command: list[str]
    gpus: int = 1
    after: str | None = None


def jobs(data: Path, out: Path, seeds: list[int], groups: list[str]) -> list[Job]:
    """In the order in which they start, where nothing is waited for."""
    measure = [*PYTHON, "benchmarks.gpu_training_step", "--json", str(out / "step.json")]
    first = [Job("step", measure)]
    later = [
        Job("calibration", [*PYTHON, "benchmarks.calibration"]),
        Job("tests", [*PYTHON, "pytest", *TESTS]),
        Job("scaling-1", [*PYTHON, "benchmarks.gpu_scaling"]),
        Job("scaling-2", [*TWO_GPUS, "benchmarks.gpu_scaling"], gpus=2),
    ]
    for seed in seeds:
        for group in groups:
            gpus, start = (2, TWO_GPUS) if group == "parallel" else (1, PYTHON)
            about = [group, "cifar10", "--data", str(data), "--seed", str(seed), "--folder", str(out / "rows")]
            job = Job(f"{group}-{seed}", [*start, "benchmarks.accuracy", *about], gpus)
            if group == "float":
                first.append(job)
            else:
                later.append(Job(job.name, job.command, gpus, after=f"float-{seed}" if "float" in groups else None))
    return first + later


def run(waiting: list[Job], gpus: list[str], out: Path) -> bool:
    """All of ``waiting``; what fails is noted, and what needs it is left out. Whether all went well."""
    free, codes = list(gpus), dict[str | None, int]({None: 0})
    threads = str(max(1, (os.cpu_count() or 1) // (2 * len(gpus))))  # else each job's are as many as there are cores
    count = len(waiting)
    running: list[tuple[Job, list[str], subprocess.Popen[bytes], float]] = []
    while waiting or running:
        for job in list(waiting):
            if codes.get(job.after, 0):
                waiting.remove(job)
                note(out, f"{job.name} left out")
            elif job.after in codes and job.gpus <= len(free):
                waiting.remove(job)
                own = [free.pop() for _ in range(job.gpus)]
                seen = {"CUDA_VISIBLE_DEVICES": ",".join(own), "OMP_NUM_THREADS": threads}
                with open(out / f"{job.name}.txt", "wb") as log:
                    process = subprocess.Popen(job.command, stdout=log, stderr=log, env=os.environ | seen)
                running.append((job, own, process, time.monotonic()))
        time.sleep(0.5)
        for entry in list(running):
            job, own, process, start = entry
            if process.poll() is not None:
                running.remove(entry)
                free += own
                codes[job.name] = process.returncode
                failed = f", failed with {process.returncode}" if process.returncode else ""
                note(out, f"{job.name}: {time.monotonic() - start:.0f} s{failed}")
        stuck = not running and all(job.gpus > len(free) or job.after not in codes for job in waiting)
        for job in waiting if stuck else ():
            note(out, f"{job.name} left out: it needs {job.gpus} GPUs, and {job.after or 'nothing'}")
        waiting = [] if stuck else waiting
    return len(codes) == 1 + count and not any(codes.values())


def note(out: Path, text: str) -> None:
    """A line on the terminal and in the folder."""
    line = f"{time.strftime('%H:%M:%S')} {text}"
    print(line, flush=True)
    with open(out / "clock.txt", "a", encoding="utf-8") as file:
        print(line, file=file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every = [str(index) for index in range(torch.cuda.device_count())]
    gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else every
    if not gpus:
        parser.error("there is no GPU")
    well = run(jobs(options.data, options.out, options.seeds, options.groups), gpus, options.out)
    rows = sorted(map(str, (options.out / "rows").glob("*.jsonl")))
    table = subprocess.run([*PYTHON, "benchmarks.accuracy", "table", *rows], stdout=subprocess.PIPE, text=True).stdout
    (options.out / "accuracy.txt").write_text(table, encoding="utf-8")
    print(table)
    sys.exit(not well)


if __name__ == "__main__":
    main()
