"""Every file format of the pipeline, one module each.

    collection         TSV `doc_id<TAB>text`; JSONL `id`/`contents` (Anserini), `_id`/`title`/`text` (BEIR) or
                       `doc_id`/`text`; a folder of such files, or of a BEIR data set
    topics             TSV `query_id<TAB>text`; JSONL `_id`/`text` (BEIR); TREC
    qrels              TREC, four columns; BEIR, three columns below a header line
    run                TREC, six columns; MS MARCO, `query_id<TAB>doc_id<TAB>rank`; ColBERT, the same and the score
    synthetic queries  JSONL `doc_id`, `doc_text`, `question`, `log_probs`, as in the published InPars sets
    triples            TSV `query<TAB>positive<TAB>negative` (read by `training/examples.py`)

Every file may be compressed, see `files.py`. `-` is standard input, except for collection and triples. Collection,
topics and qrels may also be `ir_datasets:NAME`, if that package is installed. Ids are strings and stay as written:
"007" is not "7". Readers yield the named tuples of `records.py`. A malformed line is reported with its number and
skipped. A file without a usable line raises `InputError`.
"""

from inpars_lib.formats.collection import (
    collection_fingerprint,
    conflicting_texts,
    missing_documents,
    read_collection,
    read_texts,
    write_texts,
)
from inpars_lib.formats.fields import tsv_line
from inpars_lib.formats.folders import collection_files
from inpars_lib.formats.qrels import read_qrels
from inpars_lib.formats.queries import read_synthetic_queries
from inpars_lib.formats.records import Doc, Qrel, ScoredDoc, SyntheticQuery, Topic
from inpars_lib.formats.runs import read_run, write_run
from inpars_lib.formats.topics import read_topics

__all__ = [
    "Doc",
    "Qrel",
    "ScoredDoc",
    "SyntheticQuery",
    "Topic",
    "collection_files",
    "collection_fingerprint",
    "conflicting_texts",
    "missing_documents",
    "read_collection",
    "read_qrels",
    "read_run",
    "read_synthetic_queries",
    "read_texts",
    "read_topics",
    "tsv_line",
    "write_run",
    "write_texts",
]
