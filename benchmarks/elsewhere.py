"""Compare the scores of a trained model with those of other packages that load it.

    pip install ...                                      # the packages listed in benchmarks/rerank.py
    D=demo/work; python benchmarks/elsewhere.py --model $D/model --topics $D/topics.tsv --corpus $D/collection.tsv

A monoT5 is loaded by rerankers and PyTerrier-T5, a cross-encoder by rerankers and sentence-transformers. The exit code
is 1 if a package ranks the documents differently.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.formats.collection import read_collection
from inpars_lib.formats.topics import read_topics
from inpars_lib.rerankers.load import load_reranker
from inpars_lib.rerankers.mono_t5 import MonoT5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model")
    parser.add_argument("--topics", required=True, help="topics; the first is used")
    parser.add_argument("--corpus", required=True, help="collection; the first eight documents are scored")
    args = parser.parse_args()
    query = next(iter(read_topics(args.topics).values()))
    texts = [doc.text[:400] for doc in islice(read_collection(args.corpus), 8)]
    ours = load_reranker(args.model, dtype="float32")
    scores = {"ours": ours.score([(query, text) for text in texts]).tolist()}

    try:
        from rerankers import Reranker
    except ImportError:
        sys.exit("error: the packages to compare with are not installed. See benchmarks/rerank.py for the command.")
    kind = "t5" if isinstance(ours, MonoT5) else "cross-encoder"
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
        sys.exit("the packages rank the documents differently")


if __name__ == "__main__":
    main()
