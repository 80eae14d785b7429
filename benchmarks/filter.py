"""Measure seconds and peak memory of filter_queries_by_score.py and of the original script's method.

    python benchmarks/filter.py --rows 100000 300000 1000000

The original script reads all rows into a list, sorts the list by score and writes the first rows. A row has 1.4 kB.
Both outputs must be the same, byte for byte.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from timing import time_commands

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 300_000, 1_000_000], help="numbers of rows")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    generator = random.Random(0)
    print("| rows | ours | | original | | ratio |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        data, output, other = (Path(name) / file for file in ("queries.jsonl", "out.jsonl", "peer.jsonl"))
        for count in args.rows:
            with data.open("w") as file:
                for i in range(count):
                    log_probs = [-generator.expovariate(2) for _ in range(generator.randint(2, 14))]
                    row = {
                        "doc_id": str(i),
                        "doc_text": "word " * 230,
                        "question": "what is it",
                        "log_probs": log_probs,
                    }
                    file.write(json.dumps(row) + "\n")
            ours = [ROOT / "filter_queries_by_score.py", "--input", data, "--output", output]
            timings = time_commands({"ours": ours, "original": ["-c", PEER, data, other]}, args.rounds)
            assert output.read_bytes() == other.read_bytes()
            ratio = timings["original"].median / timings["ours"].median
            print(f"| {count:,} | {timings['ours']} | {timings['original']} | {ratio:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
