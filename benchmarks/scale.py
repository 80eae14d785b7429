"""Peak memory and time of rerank.py --dry_run for the whole of MS MARCO's development set, or for less of it.

    python benchmarks/scale.py --model t5-small --corpus collection.tsv --documents 8800000 --queries 6980

A collection of documents of 40 to 80 words of those of --corpus is generated, and a run of 1,000 hits a query, drawn at
random: the more different documents, the more memory, so that a real run takes less than this. Each million documents
takes 0.4 GB of disk in the folder for temporary files.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HITS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="reranker; its tokens are counted, three blocks are scored")
    parser.add_argument("--corpus", required=True, help="collection, for its words")
    parser.add_argument("--documents", type=int, default=8_800_000, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=6980, help="default: %(default)s")
    args = parser.parse_args()

    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root))
    from formats import read_collection

    draw = random.Random(0)
    words = [word for doc in read_collection(args.corpus) for word in doc.text.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "collection.tsv").open("w") as file:
            for i in range(args.documents):
                at = draw.randrange(len(words) - 80)
                file.write(f"{i}\t{i} {' '.join(words[at : at + draw.randint(40, 80)])}\n")
        with (folder / "topics.tsv").open("w") as topics, (folder / "run.tsv").open("w") as run:
            for i in range(args.queries):
                at = draw.randrange(len(words) - 6)
                topics.write(f"{i}\t{' '.join(words[at : at + 6])}\n")
                run.writelines(f"{i}\t{d}\t{n}\n" for n, d in enumerate(draw.sample(range(args.documents), HITS), 1))
        command = [sys.executable, root / "rerank.py", "--model", args.model, "--dry_run", "--output", folder / "out"]
        for flag in ("--corpus", "--queries", "--run"):
            command += [
                flag,
                folder / {"--corpus": "collection.tsv", "--queries": "topics.tsv", "--run": "run.tsv"}[flag],
            ]
        started = time.monotonic()
        done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(done.stdout.strip())
    print(f"{args.documents:,} documents, {HITS * args.queries:,} rows: {seconds:.0f} s, peak memory {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
