"""Measure throughput and peak memory of generate_triples_train.py and of the original script's loop on one index.

    python benchmarks/mining.py --corpus collection.tsv --documents 1000000 --queries 10000

The collection is generated: 40 to 80 words per document, sampled from --corpus. A query is 6 words of a document. The
original loop holds the collection in a dict, retrieves 1,000 hits for one query at a time and samples one; it is timed
on --peer_queries queries, without the start of Java. Ours is the whole command, with the start of Java. Indexing is not
timed. The last column is our memory without the memory-mapped files of the index, which the system reclaims on demand.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PEER = """
import os, random, resource, sys, time
os.environ.setdefault("OPENAI_API_KEY", "not-a-key")  # Pyserini builds a client on import
sys.path.insert(0, sys.argv[1])
from inpars_lib import formats
from inpars_lib.bm25 import lucene
lucene.start_lucene()
from pyserini.search.lucene import LuceneSearcher
searcher = LuceneSearcher(sys.argv[2])
queries = list(formats.read_synthetic_queries(sys.argv[3]))[: int(sys.argv[5])]
started = time.monotonic()
texts = {}
for line in open(sys.argv[4], encoding="utf-8"):
    doc_id, text = line.rstrip().split("\\t")
    texts[doc_id] = text
read = time.monotonic() - started
started = time.monotonic()
for query in queries:
    hits = searcher.search(query.question, k=1000)
    for i in random.sample(range(min(1000, len(hits))), min(1, len(hits))):
        if hits[i].docid != query.doc_id:
            texts[hits[i].docid]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(time.monotonic() - started, read, peak)
"""


def generate(folder: Path, corpus: str, documents: int, queries: int) -> None:
    from inpars_lib.formats.collection import read_collection

    generator = random.Random(0)
    words = [word for doc in read_collection(corpus) for word in doc.text.split()]
    sampled = set(generator.sample(range(documents), queries))
    with (folder / "collection.tsv").open("w") as file, (folder / "queries.jsonl").open("w") as out:
        for i in range(documents):
            text = " ".join(generator.choices(words, k=generator.randint(40, 80)))
            file.write(f"{i}\t{text}\n")
            if i in sampled:
                question = " ".join(generator.sample(text.split(), 6))
                out.write(json.dumps({"doc_id": str(i), "doc_text": text, "question": question}) + "\n")


def memory(pid: int, field: str) -> float:
    """Return a memory figure of a process from /proc, in MiB."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="collection whose words are used")
    parser.add_argument("--documents", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument(
        "--peer_queries", type=int, default=1000, help="0 skips the original loop (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, args.corpus, args.documents, args.queries)
        files = {f: folder / n for f, n in (("--corpus", "collection.tsv"), ("--index", "index"))}
        flags = [word for pair in files.items() for word in map(str, pair)]
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "inpars_lib.bm25", "index", *flags], check=True, cwd=ROOT, stderr=subprocess.DEVNULL
        )
        print(f"{args.documents:,} documents indexed in {time.monotonic() - started:.0f} s", flush=True)
        command = [sys.executable, ROOT / "generate_triples_train.py", "--input", folder / "queries.jsonl", *flags]
        command += ["--output", folder / "triples.tsv", "--output_ids", folder / "ids.tsv"]
        started = time.monotonic()
        peak = own = 0.0
        with (folder / "said").open("w+") as said:
            done = subprocess.Popen([*map(str, command)], stderr=said)
            while done.poll() is None:
                peak, own = max(peak, memory(done.pid, "VmHWM")), max(own, memory(done.pid, "RssAnon"))
                time.sleep(0.2)
            whole = time.monotonic() - started
            if done.returncode:
                sys.exit((folder / "said").read_text())
        print(f"\n| {args.documents:,} documents | queries/s | peak memory, MiB | without mapped files |")
        print("|---|---:|---:|---:|")
        print(f"| ours | {args.queries / whole:.1f} | {peak:,.0f} | {own:,.0f} |", flush=True)
        if args.peer_queries:
            words = [ROOT, folder / "index", folder / "queries.jsonl", folder / "collection.tsv", args.peer_queries]
            peer = [sys.executable, "-c", PEER, *map(str, words)]
            answer = subprocess.run(peer, check=True, capture_output=True, text=True).stdout
            seconds, read, peak = map(float, answer.split())
            whole = args.queries * seconds / args.peer_queries + read
            print(f"| the original loop | {args.queries / whole:.1f} | {peak:,.0f} | |")


if __name__ == "__main__":
    main()
