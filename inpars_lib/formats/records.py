"""The records that pass between stages: documents, topics, judgements, hits, synthetic queries, triples."""

from typing import NamedTuple


class Doc(NamedTuple):
    """A document. `text` is one line: tabs and newlines were replaced by spaces."""

    doc_id: str
    text: str


class Topic(NamedTuple):
    """A query of a test collection."""

    query_id: str
    text: str


class Qrel(NamedTuple):
    """A relevance judgement."""

    query_id: str
    doc_id: str
    relevance: int


class ScoredDoc(NamedTuple):
    """One hit of a run."""

    query_id: str
    doc_id: str
    score: float


class SyntheticQuery(NamedTuple):
    """A row of synthetic queries.

    Attributes:
        line: Line of the input file, counted from 0 as in the paper's files of ids.
        doc_id: Id of the source document.
        doc_text: Text of the source document.
        question: The query on one line, empty if the language model gave none.
        log_probs: Natural logarithm of each query token's probability, None if the row has none.
        line_text: The line as it is in the file, a JSON object.
        request: Name of the request, of several for a document; None without one.
    """

    line: int
    doc_id: str
    doc_text: str
    question: str
    log_probs: list[float] | None
    line_text: str
    request: str | None = None


class Triple(NamedTuple):
    """A training triple of texts."""

    query: str
    positive: str
    negative: str
