"""Measure throughput and peak memory of filter_queries_by_score.py and of the original script's method.

    python benchmarks/filter.py --rows 100000 1000000

The original script reads all rows into a list, sorts the list by score and writes the first rows.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER = """
import json, sys
rows = []
for line in open(sys.argv[1]):
    row = json.loads(line)
    if len(row["log_probs"]) < 3:
        continue
    row["score"] = sum(row["log_probs"]) / len(row["log_probs"])
    rows.append(row)
rows.sort(key=lambda row: row["score"], reverse=True)
with open(sys.argv[2], "w") as file:
    for row in rows[:10_000]:
        file.write(json.dumps(row) + "\\n")
"""
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def measure(command: list[object]) -> tuple[float, float]:
    """Return the seconds and the peak memory in MiB of a command."""
    started = time.monotonic()
    words = [sys.executable, "-c", MEASURE, sys.executable, *map(str, command)]
    peak = float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="default: %(default)s")
    args = parser.parse_args()
    generator = random.Random(0)
    print("| rows | ours, rows/s | ours, MiB | original, rows/s | original, MiB |")
    print("|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        data, output = Path(name) / "queries.jsonl", Path(name) / "out.jsonl"
        for count in args.rows:
            with data.open("w") as file:
                for i in range(count):
                    log_probs = [-generator.expovariate(2) for _ in range(generator.randint(2, 14))]
                    row = {"doc_id": str(i), "doc_text": "word " * 60, "question": "what is it", "log_probs": log_probs}
                    file.write(json.dumps(row) + "\n")
            ours = measure([ROOT / "filter_queries_by_score.py", "--input", data, "--output", output])
            peer = measure(["-c", PEER, data, output])
            cells = [f"{count / seconds:,.0f} | {peak:,.0f}" for seconds, peak in (ours, peer)]
            print(f"| {count:,} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
