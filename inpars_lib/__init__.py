"""What the five stage scripts share: file formats, BM25, rerankers, evaluation and language models."""
