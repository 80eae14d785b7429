"""Stage 3: for each synthetic query a positive, its own document, and a negative that BM25 finds for it.

Reads   filtered synthetic queries, the collection, a BM25 index of it
Writes  triples, TSV: query, positive text, negative text
        their ids, TSV: line of the input (counted from 0), positive id, negative id

    python generate_triples_train.py --input data/msmarco/filtered_synthetic_queries.jsonl \\
        --output data/msmarco/synthetic.triples.train.tsv --output_ids data/msmarco/synthetic.triples.train.ids.tsv \\
        --corpus data/msmarco/collection.tsv --index msmarco-passage

--index is the folder of a Lucene index, the name of a prebuilt one of Pyserini, or a path that does not exist yet:
then the corpus is indexed there. No Java has to be installed. Negatives are drawn from the first --max_hits hits; a
document with the same text as the positive is none. Killed at any moment, the same command goes on where it was.
"""

import argparse
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from itertools import islice

import bm25
from formats import (
    InputError,
    Journal,
    SyntheticQuery,
    json_line,
    read_synthetic_queries,
    read_texts,
    run_script,
    tsv_line,
    warn,
    whole_file,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", required=True, help="synthetic queries, filtered")
    add("--output", required=True, help="triples of texts")
    add("--output_ids", required=True, help="triples of ids")
    add("--corpus", help="the collection that the queries were written for")
    add("--texts_from_index", action="store_true", help="texts of negatives come from an index that stores them")
    add("--index", default="msmarco-passage", help="BM25 index of the corpus (default: %(default)s)")
    add("--max_hits", type=int, default=1000, help="hits that negatives are drawn from (default: %(default)s)")
    add("--n_samples", type=int, default=1, help="negatives a query (default: %(default)s, as in the paper)")
    add("--holdout", type=int, default=0, metavar="N", help="queries kept from training, in OUTPUT.holdout.jsonl")
    add("--seed", type=int, default=1, help="which hits are drawn (default: %(default)s)")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from what a run with the same input and settings left (default: yes)",
    )
    bm25.add_arguments(parser)
    args = parser.parse_args()
    args.searching = bm25.searching(parser, args)
    if min(args.max_hits, args.n_samples) < 1:
        parser.error("--max_hits and --n_samples are 1 or more")
    if not args.corpus and not args.texts_from_index:
        parser.error("one of --corpus and --texts_from_index is needed")
    if args.holdout < 0:
        parser.error("--holdout is 0 or more")
    return args


def clean(text: str) -> str:
    """Mend broken encodings, and make one blank of whatever would break a line of TSV."""
    import ftfy

    return " ".join(ftfy.fix_text(text).split())


def mine(queries: list[SyntheticQuery], args: argparse.Namespace) -> list[list[str]]:
    """The ids of the negatives of each query, drawn from its BM25 hits without its own document.

    A draw depends on the seed and the query's line alone: neither the number of threads nor a kill changes it.
    """
    from tqdm import tqdm

    searcher = bm25.open_index(args.index, args.corpus, args.searching)
    asked = hashlib.sha256(bm25.stamp(args.index).encode())
    for query in queries:
        asked.update(f"{query.line}\t{query.doc_id}\t{query.question}\n".encode(errors="replace"))
    settings = {name: getattr(args, name) for name in ("index", "max_hits", "n_samples", "seed", "k1", "b", "language")}
    journal = Journal(f"{args.output}.mined.jsonl", {**settings, "queries": asked.hexdigest()})
    if not args.resume and os.path.exists(journal.path):
        os.remove(journal.path)
    mined = list(islice(journal.rows(), len(queries)))
    journal.open()
    if len(mined) < len(queries):
        rest = queries[len(mined) :]

        def ranks(number: int, hits: int) -> Iterator[int]:
            draw, left = random.Random(f"{args.seed} {rest[number].line}"), list(range(hits))
            while left:
                yield left.pop(draw.randrange(len(left)))

        asking = [(query.question, query.doc_id) for query in rest]
        found = bm25.draw(searcher, asking, args.max_hits, args.n_samples, ranks, args.threads)
        for row in tqdm(found, desc="BM25", total=len(queries), initial=len(mined), unit=" queries"):
            mined.append(row._asdict())
            journal.write(mined[-1])
    reciprocal_rank = sum(1 / row["rank"] for row in mined if row["rank"]) / len(queries)
    print(
        f"BM25 on the synthetic queries: MRR@10 {reciprocal_rank:.4f} and R@{args.max_hits} "
        f"{sum(row['found'] for row in mined) / len(queries):.4f} of the document that each was written for",
        file=sys.stderr,
    )
    return [row["doc_ids"] for row in mined]


def read_negatives(args: argparse.Namespace, wanted: set[str]) -> dict[str, str]:
    """The texts of the documents drawn."""
    if args.texts_from_index:
        from tqdm import tqdm

        searcher = bm25.open_index(args.index, args.corpus, args.searching)
        stored = bm25.read_stored_texts(searcher, wanted, args.index)
        texts = dict(tqdm(stored, desc="Reading texts", total=len(wanted), unit=" docs"))
    else:
        texts = read_texts(args.corpus, wanted, desc="Reading texts")
    return {doc_id: clean(text) for doc_id, text in texts.items()}


def main() -> None:
    args = parse_args()
    rows = list(read_synthetic_queries(args.input))
    queries = [row._replace(question=clean(row.question), doc_text=clean(row.doc_text)) for row in rows]
    queries = [query for query in queries if query.question and query.doc_text]
    if not queries:
        raise InputError(f"{args.input}: no row has both a question and a document text")
    if len(queries) < len(rows):
        warn(f"{len(rows) - len(queries):,} rows without a question or a document text left out")
    if args.holdout:
        if args.holdout >= len(queries):
            raise InputError(f"{args.input} has {len(queries):,} usable rows; --holdout {args.holdout} leaves none")
        held = set(random.Random(f"{args.seed} holdout").sample([query.line for query in queries], args.holdout))
        with whole_file(f"{args.output}.holdout.jsonl") as file:
            file.writelines(json_line(query.row) for query in queries if query.line in held)
        queries = [query for query in queries if query.line not in held]
    negatives = mine(queries, args)

    wanted = {doc_id for ids in negatives for doc_id in ids}
    texts = read_negatives(args, wanted)
    absent = sorted(doc_id for doc_id in wanted if not texts.get(doc_id))
    if len(absent) == len(wanted) > 0:
        raise InputError(
            f"none of the {len(wanted):,} documents drawn from the index {args.index} has a text in {args.corpus} "
            f"(one is {absent[0]}); the index is one of another collection: name a path that does not exist yet, to "
            "index this one"
        )
    written = unserved = 0
    with whole_file(args.output) as output, whole_file(args.output_ids) as output_ids:
        for query, ids in zip(queries, negatives, strict=True):
            usable = [doc_id for doc_id in ids if texts.get(doc_id) not in (None, "", query.doc_text)]
            for doc_id in usable:
                output.write(tsv_line(query.question, query.doc_text, texts[doc_id]))
                output_ids.write(tsv_line(str(query.line), query.doc_id, doc_id))
            written += len(usable)
            unserved += not usable
        if not written:
            raise InputError(
                f"no query had a hit in {args.index} other than its own document; is it the index of {args.corpus}?"
            )

    if absent:
        warn(f"{len(absent):,} documents of the index have no text in {args.corpus} (the first: {absent[0]})")
    os.remove(f"{args.output}.mined.jsonl")
    print(f"{args.output}: {written:,} triples; {unserved:,} queries had no usable hit", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
