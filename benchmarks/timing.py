"""Time whole commands in turn, several rounds, with their peak memory."""

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


class Timing(NamedTuple):
    """Seconds of all rounds, and the highest peak memory in MiB."""

    seconds: list[float]
    memory: float

    @property
    def median(self) -> float:
        """Median of the rounds in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.2f} s ({min(self.seconds):.2f} to {max(self.seconds):.2f}) | {self.memory:,.0f} MiB"


def time_commands(commands: Mapping[str, Sequence[object]], rounds: int) -> dict[str, Timing]:
    """Return the timing of each command. Every round runs all commands, so that a slow minute meets all of them."""
    timings = {name: Timing([], 0.0) for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            words = [sys.executable, "-c", MEASURE, sys.executable, *map(str, command)]
            started = time.monotonic()
            peak = float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout)
            timings[name].seconds.append(time.monotonic() - started)
            timings[name] = timings[name]._replace(memory=max(peak, timings[name].memory))
    return timings
