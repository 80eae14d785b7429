"""Stage 5: rerank the hits of a first stage with a trained model, and say in numbers whether it helped.

Reads   a model, topics, the collection, and a run or a BM25 index to make one with
Writes  a TREC run: the first --top_k documents of each query reranked, the others below in the order they had

    python rerank.py --model data/msmarco --queries data/msmarco/topics.dl20.txt --corpus data/msmarco/collection.tsv \\
        --index msmarco-passage --qrels data/msmarco/qrels.dl20-passage.txt --relevance_threshold 2 \\
        --output data/msmarco/run.dl20.monot5.txt

With --qrels it prints both rankings side by side: means, the p-value of a paired t-test over the queries, and how many
queries the reranker won, tied and lost.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping

from formats import (
    InputError,
    Qrel,
    ScoredDoc,
    read_qrels,
    read_run,
    read_texts,
    read_topics,
    run_script,
    warn,
    write_run,
)

FIRST_STAGE_HITS = 1000  # of BM25, with --index: those beyond --top_k stay below
BLOCK = 256  # pairs scored at a time, of whole queries: enough to batch pairs of like length


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a trained model, or a name on the Hugging Face hub")
    add("--queries", required=True, help="topics")
    add("--corpus", required=True, help="collection")
    first_stage = parser.add_mutually_exclusive_group(required=True)
    first_stage.add_argument("--run", help="first-stage run, TREC or MS MARCO")
    first_stage.add_argument("--index", help="BM25 index, as in generate_triples_train.py")
    add("--output", required=True, help="reranked run, TREC")
    add("--top_k", type=int, default=1000, help="documents a query to rerank (default: %(default)s)")
    add("--qrels", help="judgements: prints the table")
    add("--relevance_threshold", type=int, default=1, help="lowest relevant grade (default: %(default)s)")
    add("--batch_size", type=int, default=32, help="default: %(default)s")
    add("--max_length", type=int, default=512, help="tokens of query and document (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: %(default)s")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--token_true", help="T5-like models: word for relevant (default: the model's own)")
    add("--token_false", help="T5-like models: word for not relevant")
    add("--threads", type=int, default=os.cpu_count(), help="of the search with --index (default: one a core)")
    args = parser.parse_args()
    if min(args.top_k, args.batch_size, args.threads) < 1:
        parser.error("--top_k, --batch_size and --threads are 1 or more")
    if bool(args.token_true) != bool(args.token_false):
        parser.error("--token_true and --token_false come together")
    return args


def first_stage(args: argparse.Namespace, topics: Mapping[str, str]) -> dict[str, list[ScoredDoc]]:
    if args.index:
        import bm25

        searcher = bm25.open_index(args.index, args.corpus, args.threads)
        hits_of = bm25.search(searcher, topics, max(args.top_k, FIRST_STAGE_HITS), args.threads)
        run = {query_id: hits for query_id, hits in hits_of if hits}
        if not run:
            raise InputError(f"no query of {args.queries} has a hit in {args.index}")
    else:
        run = read_run(args.run, topics)
        if not run:
            raise InputError(f"{args.run} has hits for no query of {args.queries}; is it a run of other topics?")
    if len(run) < len(topics):
        warn(f"{len(topics) - len(run):,} of {len(topics):,} queries have no hits and will have no ranking")
    return {query_id: run[query_id] for query_id in topics if query_id in run}


def blocks(run: Mapping[str, list[ScoredDoc]], top_k: int) -> Iterator[list[ScoredDoc]]:
    """The documents to rerank, cut between queries into lists of about BLOCK."""
    block: list[ScoredDoc] = []
    for hits in run.values():
        block += hits[:top_k]
        if len(block) >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def compare(qrels: list[Qrel], before: list[ScoredDoc], after: list[ScoredDoc], threshold: int) -> str:
    """The table: both rankings under each measure, tested over the queries of `qrels`."""
    from scipy.stats import ttest_rel

    import ranking

    first, second = (ranking.per_query(qrels, run, threshold) for run in (before, after))
    lines = [f"{'':10}{'first stage':>12}{'reranked':>10}{'change':>9}{'p':>8}{'won':>6}{'tied':>6}{'lost':>6}"]
    for name, old in ranking.means(first).items():
        pairs = [(value, second[name][query_id]) for query_id, value in first[name].items()]
        new = sum(b for _, b in pairs) / len(pairs)
        won, lost = sum(b > a for a, b in pairs), sum(b < a for a, b in pairs)
        p = ttest_rel(*zip(*pairs, strict=True)).pvalue if won + lost and len(pairs) > 1 else 1.0
        lines.append(
            f"{name:10}{old:12.4f}{new:10.4f}{new - old:+9.4f}{p:8.4f}{won:6}{len(pairs) - won - lost:6}{lost:6}"
        )
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    topics = read_topics(args.queries)
    qrels = [qrel for qrel in read_qrels(args.qrels) if qrel.query_id in topics] if args.qrels else []
    if args.qrels and not qrels:
        raise InputError(f"{args.qrels} judges no query of {args.queries}; are they of another collection?")
    run = first_stage(args, topics)

    wanted = {hit.doc_id for hits in run.values() for hit in hits[: args.top_k]}
    texts = read_texts(args.corpus, wanted, desc="Reading texts")
    if absent := wanted - texts.keys():
        raise InputError(
            f"{len(absent):,} of the {len(wanted):,} documents of {args.run or args.index} are not in "
            f"{args.corpus} (one is {min(absent)}); the two must be of one collection"
        )

    from tqdm import tqdm

    import models
    from ranking import rank

    answers = (args.token_true, args.token_false) if args.token_true else None
    model = models.load_model(
        args.model, max_length=args.max_length, device=args.device, dtype=args.dtype, answers=answers
    )
    scores: dict[str, dict[str, float]] = {}
    pairs = sum(min(len(hits), args.top_k) for hits in run.values())
    with tqdm(desc="Reranking", total=pairs, unit=" pairs") as bar:
        for block in blocks(run, args.top_k):
            scored = model.score([(topics[hit.query_id], texts[hit.doc_id]) for hit in block])
            for hit, score in zip(block, scored.tolist(), strict=True):
                scores.setdefault(hit.query_id, {})[hit.doc_id] = score
            bar.update(len(block))
    reranked = [hit for query_id, hits in run.items() for hit in rank(hits, scores[query_id])]
    write_run(args.output, reranked, tag="inpars")
    print(f"{args.output}: {len(run):,} queries, {pairs:,} documents reranked", file=sys.stderr)

    if args.qrels:
        before = [hit for hits in run.values() for hit in hits]
        judged = len({qrel.query_id for qrel in qrels})
        print(f"{judged:,} judged queries, first {args.top_k} documents reranked by {args.model}\n")
        print(compare(qrels, before, reranked, args.relevance_threshold))


if __name__ == "__main__":
    run_script(main)
