"""A model that train_t5.py wrote, loaded by other packages: their scores beside ours for a few pairs.

    pip install ...                                      # the packages that benchmarks/rerank.py names
    D=demo/work; python benchmarks/elsewhere.py --model $D/model --topics $D/topics.tsv --corpus $D/collection.tsv

A monoT5 goes to rerankers and PyTerrier-T5, a cross-encoder to rerankers and sentence-transformers. Exit code 1 where
the packages order the pairs otherwise than we do.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import models
from formats import read_collection, read_topics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--topics", required=True, help="topics, of which the first is asked")
    parser.add_argument("--corpus", required=True, help="collection, of which the first eight documents are scored")
    args = parser.parse_args()
    query = next(iter(read_topics(args.topics).values()))
    texts = [doc.text[:400] for doc in islice(read_collection(args.corpus), 8)]
    ours = models.load_model(args.model, dtype="float32")
    scores = {"ours": ours.score([(query, text) for text in texts]).tolist()}

    from rerankers import Reranker

    kind = "t5" if isinstance(ours, models.MonoT5) else "cross-encoder"
    ranked = Reranker(args.model, model_type=kind, device="cpu", dtype="float32", verbose=0)
    results = ranked.rank(query=query, docs=texts, doc_ids=list(range(len(texts)))).results
    scores["rerankers"] = [r.score for r in sorted(results, key=lambda r: r.doc_id)]
    if kind == "t5":
        import pandas
        from pyterrier_t5 import MonoT5ReRanker

        ids = [str(i) for i in range(len(texts))]
        frame = pandas.DataFrame({"qid": "1", "query": query, "docno": ids, "text": texts})
        ranked = MonoT5ReRanker(args.model, args.model, device="cpu", verbose=False).transform(frame)
        scores["PyTerrier-T5"] = [dict(zip(ranked.docno, ranked.score, strict=True))[i] for i in ids]
    else:
        from sentence_transformers import CrossEncoder

        scores["sentence-transformers"] = CrossEncoder(args.model).predict([(query, text) for text in texts]).tolist()
    orders = {}
    for name, values in scores.items():
        orders[name] = sorted(range(len(values)), key=lambda i: -values[i])
        print(f"{name:22}" + " ".join(f"{value:9.4f}" for value in values))
    if any(order != orders["ours"] for order in orders.values()):
        sys.exit("the packages disagree about the order")


if __name__ == "__main__":
    main()
