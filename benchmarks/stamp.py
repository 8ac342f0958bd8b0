"""One line that says what a benchmark ran on."""

import platform
from datetime import date
from pathlib import Path

import torch


def stamp(command: str) -> str:
    """Command, date, processor, threads and versions."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    return (
        f"{date.today()}  {command}\n{processor}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
