"""BM25 with Lucene: index a collection, retrieve the hits of queries."""

from inpars_lib.bm25.config import BM25Config, add_search_flags
from inpars_lib.bm25.index import build_index
from inpars_lib.bm25.search import BM25Searcher, open_index

__all__ = ["BM25Config", "BM25Searcher", "add_search_flags", "build_index", "open_index"]
