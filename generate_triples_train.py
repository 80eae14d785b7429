"""Stage 3: for each synthetic query a positive, its own document, and a negative that BM25 finds for it.

Reads   filtered synthetic queries, the collection, a BM25 index of it
Writes  triples, TSV: query, positive text, negative text
        their ids, TSV: line of the input (counted from 0), positive id, negative id

    python generate_triples_train.py --input data/msmarco/filtered_synthetic_queries.jsonl \\
        --output data/msmarco/synthetic.triples.train.tsv --output_ids data/msmarco/synthetic.triples.train.ids.tsv \\
        --corpus data/msmarco/collection.tsv --index msmarco-passage

--index is the folder of a Lucene index, the name of a prebuilt one of Pyserini, or a path that does not exist yet:
then the corpus is indexed there. No Java has to be installed. Negatives are drawn from the first --max_hits hits.
"""

import argparse
import os
import random
import sys

from formats import (
    InputError,
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
    add("--corpus", required=True, help="the collection that the queries were written for")
    add("--index", default="msmarco-passage", help="BM25 index of the corpus (default: %(default)s)")
    add("--max_hits", type=int, default=1000, help="hits that negatives are drawn from (default: %(default)s)")
    add("--n_samples", type=int, default=1, help="negatives a query (default: %(default)s, as in the paper)")
    add("--holdout", type=int, default=0, metavar="N", help="queries kept from training, in OUTPUT.holdout.jsonl")
    add("--seed", type=int, default=1, help="which hits are drawn (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count(), help="default: one a core")
    args = parser.parse_args()
    if min(args.max_hits, args.n_samples, args.threads) < 1:
        parser.error("--max_hits, --n_samples and --threads are 1 or more")
    if args.holdout < 0:
        parser.error("--holdout is 0 or more")
    return args


def clean(text: str) -> str:
    """Mend broken encodings, and make one blank of whatever would break a line of TSV."""
    import ftfy

    return " ".join(ftfy.fix_text(text).split())


def mine(queries: list[SyntheticQuery], args: argparse.Namespace) -> list[list[str]]:
    """The ids of the negatives of each query, drawn from its BM25 hits without its own document.

    A draw depends on the seed and the query's line alone, so the number of threads does not change it.
    """
    import bm25

    searcher = bm25.open_index(args.index, args.corpus, args.threads)
    negatives = []
    reciprocal_ranks = recalled = 0.0
    # One hit more than asked for: the query's own document may take a place.
    hits_of = bm25.search(searcher, {str(q.line): q.question for q in queries}, args.max_hits + 1, args.threads)
    for query, (_, hits) in zip(queries, hits_of, strict=True):
        ids = [hit.doc_id for hit in hits]
        rank = ids.index(query.doc_id) + 1 if query.doc_id in ids else None
        reciprocal_ranks += 1 / rank if rank and rank <= 10 else 0
        recalled += rank is not None and rank <= args.max_hits
        others = [doc_id for doc_id in ids if doc_id != query.doc_id][: args.max_hits]
        chosen = random.Random(f"{args.seed} {query.line}").sample(others, min(args.n_samples, len(others)))
        negatives.append(chosen)
    print(
        f"BM25 on the synthetic queries: MRR@10 {reciprocal_ranks / len(queries):.4f} and R@{args.max_hits} "
        f"{recalled / len(queries):.4f} of the document that each was written for",
        file=sys.stderr,
    )
    return negatives


def main() -> None:
    args = parse_args()
    rows = list(read_synthetic_queries(args.input))
    queries = [row._replace(question=clean(row.question), doc_text=clean(row.doc_text)) for row in rows]
    queries = [query for query in queries if query.question and query.doc_text]
    if not queries:
        raise InputError(f"{args.input}: no row has both a question and a document text")
    if args.holdout:
        if args.holdout >= len(queries):
            raise InputError(f"{args.input} has {len(queries):,} usable rows; --holdout {args.holdout} leaves none")
        held = set(random.Random(f"{args.seed} holdout").sample([query.line for query in queries], args.holdout))
        with whole_file(f"{args.output}.holdout.jsonl") as file:
            file.writelines(json_line(query.row) for query in queries if query.line in held)
        queries = [query for query in queries if query.line not in held]
    negatives = mine(queries, args)

    wanted = {doc_id for ids in negatives for doc_id in ids}
    texts = {doc_id: clean(text) for doc_id, text in read_texts(args.corpus, wanted, desc="Reading texts").items()}
    absent = sorted(doc_id for doc_id in wanted if not texts.get(doc_id))
    if len(absent) == len(wanted) > 0:
        raise InputError(
            f"none of the {len(wanted):,} documents drawn from the index {args.index} has a text in {args.corpus} "
            f"(one is {absent[0]}); the index is one of another collection: name a path that does not exist yet, to "
            "index this one"
        )
    written = 0
    with whole_file(args.output) as output, whole_file(args.output_ids) as output_ids:
        for query, ids in zip(queries, negatives, strict=True):
            for doc_id in ids:
                if text := texts.get(doc_id):
                    output.write(tsv_line(query.question, query.doc_text, text))
                    output_ids.write(tsv_line(str(query.line), query.doc_id, doc_id))
                    written += 1
        if not written:
            raise InputError(
                f"no query had a hit in {args.index} other than its own document; is it the index of {args.corpus}?"
            )

    if len(queries) < len(rows):
        warn(f"{len(rows) - len(queries):,} rows without a question or a document text left out")
    if absent:
        warn(f"{len(absent):,} documents of the index have no text in {args.corpus} (the first: {absent[0]})")
    unserved = sum(not any(texts.get(doc_id) for doc_id in ids) for ids in negatives)
    print(f"{args.output}: {written:,} triples; {unserved:,} queries had no usable hit", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
