"""Measure peak memory and time of rerank.py --dry_run at the size of the MS MARCO dev set.

    python benchmarks/scale.py --model t5-small --corpus collection.tsv --documents 8800000 --queries 6980

The collection is generated: 40 to 80 words per document, sampled from --corpus. So is the run: 1,000 random hits per
query. A real run has fewer distinct documents and needs less memory. A million documents take 0.4 GB of temporary disk.
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
    parser.add_argument("--model", required=True, help="reranker that counts the tokens and scores three blocks")
    parser.add_argument("--corpus", required=True, help="collection whose words are used")
    parser.add_argument("--documents", type=int, default=8_800_000, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=6980, help="default: %(default)s")
    args = parser.parse_args()

    root = Path(__file__).parent.parent
    sys.path.insert(0, str(root))
    from inpars_lib.formats.collection import read_collection

    generator = random.Random(0)
    words = [word for doc in read_collection(args.corpus) for word in doc.text.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "collection.tsv").open("w") as file:
            for i in range(args.documents):
                at = generator.randrange(len(words) - 80)
                file.write(f"{i}\t{i} {' '.join(words[at : at + generator.randint(40, 80)])}\n")
        with (folder / "topics.tsv").open("w") as topics, (folder / "run.tsv").open("w") as run:
            for i in range(args.queries):
                at = generator.randrange(len(words) - 6)
                topics.write(f"{i}\t{' '.join(words[at : at + 6])}\n")
                run.writelines(
                    f"{i}\t{d}\t{n}\n" for n, d in enumerate(generator.sample(range(args.documents), HITS), 1)
                )
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
