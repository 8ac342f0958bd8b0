"""Kills and interrupts commands at random moments, runs them again, and compares what they write bit by bit.

    python -m benchmarks.kills --rounds 200 --seed 1

A round is one command (train, calibrate, export, quantize, build) and one to three signals (SIGKILL, SIGINT, SIGTERM,
SIGHUP), each at a random moment of a run; train continues with --resume where something was saved. The last run is left
alone. Then there must be the same files with the same bytes as of a run that was never stopped, and no others. (Two
builds of TensorRT-RTX differ by themselves: engines must be of one length, belong to their sidecars and have the same
layers.) After a signal other than SIGKILL the exit code is 130 in one line, and nothing half-written is left either.

Most runs are forked from a process that has torch imported, so that the moments lie in the work; every tenth starts
Python anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import launcher  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

import qat.run  # noqa: E402, F401  what the forked runs have imported; nothing of ONNX, whose threads do not survive
from benchmarks.stamp import stamp  # noqa: E402
from qat.checkpoint import save_tensors  # noqa: E402
from qat.models import ModelSpec, build_model  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 300.0  # seconds of a run
ANEW = 10
_DIFFER = ("made_by", "date", "seconds", "log", "sidecar_sha256")  # entries of sidecars that two good runs do not share


@dataclass(frozen=True)
class Job:
    """A command, with the files that it reads in the folder of its name and writes to ``out/`` there."""

    module: str
    arguments: tuple[str, ...]
    resumes: Path | None = None


@dataclass
class Tally:
    """What happened: signals by the command and what they met; and what went wrong."""

    met: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def jobs(folder: Path) -> dict[str, Job]:
    """The commands, by name; makes their inputs in ``folder``."""
    options = tiny.options(folder, float_epochs=8, qat_epochs=8, save_seconds=0.02, output=Path("out/model.qat"))
    images = ("--data", str(folder / "images.npz"))
    inputs = folder / "inputs"
    run(Job("qat.train", tuple(tiny.flags(options | {"output": inputs / "model.qat", "qat_epochs": 1}))), folder)
    run(Job("export.onnx", (str(inputs / "model.qat"),)), folder)
    run(Job("export.onnx", (str(inputs / "model.qat"), "--precision", "float32")), folder)
    network = build_model(ModelSpec(str(options["model"]), len(tiny.CLASSES)))
    save_tensors(inputs / "float.safetensors", network.state_dict())
    calibrate = ("--model", str(options["model"]), "--weights", str(inputs / "float.safetensors"), "--adaround", "20")
    found = {
        "train": Job("qat.train", tuple(tiny.flags(options)), Path("out/model.qat.state")),
        "calibrate": Job("qat.calibrate", (*calibrate, *images, "--device", "cpu", "--output", "out/model.qat")),
        "export": Job("export.onnx", (str(inputs / "model.qat"), "--output", "out/model.onnx")),
        "quantize": Job(
            "export.quantize", (str(inputs / "model.float32.onnx"), *images, "--output", "out/model.int8.onnx")
        ),
    }
    build = ("--builder", "tensorrt-rtx", "--compute-capabilities", "8.9", "--output", "out/model.engine")
    found["build"] = Job("deploy.build", (str(inputs / "model.onnx"), *build))
    return found


def start(job: Job, folder: Path, *, resume: bool = False, anew: bool = False) -> int:
    """Starts a run in ``folder``, in a session of its own; returns its process."""
    arguments = [*job.arguments, *(["--resume"] if resume else [])]
    environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(ROOT)}
    (folder / "tmp").mkdir(exist_ok=True)
    streams = {name: str(folder / f"{name}.txt") for name in ("stdout", "stderr")}
    for name in streams.values():
        Path(name).write_text("")
    if anew:
        with open(streams["stdout"], "w") as out, open(streams["stderr"], "w") as errors:
            command = [sys.executable, "-m", job.module, *arguments]
            return subprocess.Popen(
                command, cwd=folder, env=os.environ | environment, stdout=out, stderr=errors, start_new_session=True
            ).pid
    child = os.fork()
    if child == 0:
        os.setsid()
        tempfile.tempdir = None
        request = {"module": job.module, "arguments": arguments, "environment": environment, "folder": str(folder)}
        launcher.become(request | streams | {"file_size": None})
    return child


def wait(process: int) -> int:
    """The exit code of a run, negative for a signal."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise TimeoutError(f"process {process} did not end in {LONGEST:g} s")


def run(job: Job, folder: Path, *, resume: bool = False) -> float:
    """Runs a command to its end, which must be a good one. Returns its seconds."""
    begin = time.monotonic()
    code = wait(start(job, folder, resume=resume))
    if code:
        raise RuntimeError(f"{job.module} ended with {code}: {(folder / 'stderr.txt').read_text()}")
    return time.monotonic() - begin


def written(folder: Path) -> dict[str, str]:
    """Digest of each file in ``out/`` and ``tmp/``, by its name; of sidecars without what differs in any two runs."""
    found = {}
    for path in sorted(path for name in ("out", "tmp") for path in (folder / name).rglob("*") if path.is_file()):
        if path.name == ".ses":  # ONNX Runtime's own
            continue
        content = path.read_bytes()
        if path.name.endswith((".qat.json", ".onnx.json", ".engine.json")):
            record = json.loads(content)
            if path.name.endswith(".engine.json"):
                engine = path.with_suffix("")
                whole = engine.is_file() and record.pop("sha256") == hashlib.sha256(engine.read_bytes()).hexdigest()
                record["whole"] = whole
            content = json.dumps(_comparable(record), sort_keys=True).encode()
        if path.suffix == ".engine":
            content = str(len(content)).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def _comparable(entry: object) -> object:
    if isinstance(entry, dict):
        return {key: _comparable(value) for key, value in entry.items() if not any(word in key for word in _DIFFER)}
    return [_comparable(one) for one in entry] if isinstance(entry, list) else entry


def one_round(
    name: str, job: Job, folder: Path, wanted: dict[str, str], seconds: float, chance: random.Random, tally: Tally
) -> None:
    """Stops a command one to three times, lets it end, and adds what is wrong to ``tally``."""
    said = []
    for _ in range(chance.randint(1, 3)):
        anew = chance.randrange(ANEW) == 0
        resume = job.resumes is not None and (folder / job.resumes).exists()
        number, moment = chance.choice(SIGNALS), chance.uniform(0, 1) * (seconds + 4 * anew)
        said.append(f"{number.name} after {moment:.3f} s{' anew' if anew else ''}{' resumed' if resume else ''}")
        before = set(written(folder))
        process = start(job, folder, resume=resume, anew=anew)
        time.sleep(moment)
        os.kill(process, number)
        code = wait(process)
        errors = (folder / "stderr.txt").read_text()
        tally.met[f"{name}: {number.name} {_what_met(code)}"] += 1
        if number != signal.SIGKILL:
            tally.faults += [
                f"{name}, {', '.join(said)}: {fault}" for fault in _faults(code, errors, folder, before | set(wanted))
            ]
        if code == 0:
            break
    else:
        run(job, folder, resume=job.resumes is not None and (folder / job.resumes).exists())
    found = written(folder)
    if found != wanted:
        names = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
        tally.faults.append(f"{name}, {', '.join(said)}: {', '.join(names)} differ from those of a run never stopped")


def _what_met(code: int) -> str:
    return {0: "came too late", 130: "was heeded"}.get(code, "ended it" if code < 0 else f"gave exit code {code}")


def _faults(code: int, errors: str, folder: Path, known: set[str]) -> Iterator[str]:
    """What is wrong behind an interrupt, which may come before the program has begun or after it has ended."""
    begun = "Traceback" not in errors or "run_command" in errors
    if code > 0 and code != 130 and begun:
        yield f"exit code {code}: {errors}"
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    if code == 130 and not (len(lines) == 1 and lines[0].startswith("interrupted: ")):
        yield f"not one line: {errors}"
    left = [name for name in written(folder) if name not in known and not name.endswith(".state")]
    if left and code:
        yield f"left {', '.join(left)}"


def kill_rounds(rounds: int, seed: int, only: list[str], folder: Path) -> Tally:
    """Runs so many rounds, the commands in turns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and so does what nohup runs
    torch.set_num_threads(1)  # of the forked runs too
    tally, chance = Tally(), random.Random(seed)
    all_jobs = jobs(folder)
    chosen = {name: job for name, job in all_jobs.items() if name in only}
    wanted, seconds = {}, {}
    for name, job in chosen.items():
        for time_of_two in ("first", "again"):
            place = folder / name / time_of_two
            place.mkdir(parents=True)
            seconds[name] = min(run(job, place), seconds.get(name, LONGEST))
        first, wanted[name] = (written(folder / name / one) for one in ("first", "again"))
        if first != wanted[name]:
            differing = [path for path in first if first[path] != wanted[name].get(path)]
            raise RuntimeError(f"{name}: two runs that were never stopped differ in {', '.join(differing)}")
    for index in range(rounds):
        name = list(chosen)[index % len(chosen)]
        place = folder / name / str(index)
        place.mkdir()
        one_round(name, chosen[name], place, wanted[name], seconds[name], chance, tally)
    return tally


def main() -> int:
    """Prints what the signals met and all faults; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    names = ["train", "calibrate", "export", "quantize", "build"]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_rounds(options.rounds, options.seed, options.only, Path(folder))
    print(stamp(f"python -m benchmarks.kills --rounds {options.rounds} --seed {options.seed}"))
    print(f"{options.rounds} rounds, {tally.met.total()} signals, {len(tally.faults)} faults")
    for line, count in sorted(tally.met.items()):
        print(f"  {count:4} {line}")
    for fault in tally.faults:
        print(f"FAULT {fault}")
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())
