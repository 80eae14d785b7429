"""Rerankers, one module each: monoT5, cross-encoders, causal language models."""
