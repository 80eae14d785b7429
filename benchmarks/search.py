"""Measure BM25 search and reading of collections: `python -m inpars_lib.bm25 search` and Pyserini, whole processes.

    python benchmarks/search.py --corpus collection.tsv --topics topics.tsv

Both write a run of 1,000 hits per topic. Documents, ranks and scores must be the same. Then one million lines of 350
characters are read by `read_collection`, all of them and 10,000 wanted ones, and by a loop of `line.split`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from timing import time_commands

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PYSERINI = """
import os, sys
os.environ.setdefault("OPENAI_API_KEY", "not-a-key")
sys.path.insert(0, sys.argv[1])
from inpars_lib.lucene import start_lucene
start_lucene()  # Pyserini alone would need a Java with the vector module
from pyserini.search.lucene import LuceneSearcher
topics = [line.rstrip("\\n").split("\\t") for line in open(sys.argv[3])]
searcher = LuceneSearcher(sys.argv[2])
found = searcher.batch_search([text for _, text in topics], [i for i, _ in topics], k=1000, threads=int(sys.argv[5]))
with open(sys.argv[4], "w") as file:
    for query_id, _ in topics:
        for rank, hit in enumerate(found[query_id], 1):
            file.write(f"{query_id} Q0 {hit.docid} {rank} {hit.score:.6f} bm25\\n")
"""
READ = """
import sys
sys.path.insert(0, sys.argv[1])
from inpars_lib.formats import read_collection
wanted = {str(i) for i in range(0, 1_000_000, int(sys.argv[3]))} if int(sys.argv[3]) else None
for doc in read_collection(sys.argv[2], wanted):
    pass
"""
SPLIT = """
import sys
for line in open(sys.argv[1], encoding="utf-8"):
    doc_id, text = line.rstrip().split("\\t")
"""


def same(path: Path, other: Path) -> bool:
    """Return whether two runs have the same documents, ranks and, to six decimals, scores."""
    with path.open() as file, other.open() as second:
        for a, b in zip(file, second, strict=True):
            ours, theirs = a.split(), b.split()
            if ours[:4] != theirs[:4] or abs(float(ours[4]) - float(theirs[4])) > 1e-6:
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="collection to index")
    parser.add_argument("--topics", required=True, help="topics, TSV")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args()
    from inpars_lib.bm25.config import BM25Config
    from inpars_lib.bm25.index import build_index

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_index(args.corpus, str(folder / "index"), BM25Config())
        search = [
            "-m",
            "inpars_lib.bm25",
            "search",
            "--index",
            folder / "index",
            "--topics",
            Path(args.topics).resolve(),
        ]
        search += ["--output", folder / "ours.txt", "--threads", 2]
        peer = ["-c", PYSERINI, ROOT, folder / "index", args.topics, folder / "peer.txt", 2]
        lines = folder / "lines.tsv"
        with lines.open("w") as file:
            file.writelines(f"{i}\t{'some words of a passage ' * 15}\n" for i in range(1_000_000))
        for title, commands in (
            ("search", {"ours": search, "Pyserini": peer}),
            ("reading", {"all": ["-c", READ, ROOT, lines, 0], "wanted": ["-c", READ, ROOT, lines, 100],
                         "split loop": ["-c", SPLIT, lines]}),
        ):  # fmt: skip
            print(f"\n| {title} | seconds | peak memory |\n|---|---:|---:|")
            for command, timing in time_commands(commands, args.rounds).items():
                print(f"| {command} | {timing} |", flush=True)
        print("\nsame run" if same(folder / "ours.txt", folder / "peer.txt") else "\nOTHER RUN")


if __name__ == "__main__":
    main()
