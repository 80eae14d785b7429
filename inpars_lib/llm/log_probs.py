"""Log-probabilities of the tokens of an answer, and their place in its text."""

import math
import re
from typing import Any

REPLACEMENT = "\ufffd".encode()  # what some servers send for a piece of a character


def read_tokens(choice: dict[str, Any]) -> tuple[list[bytes], list[float | None]] | None:
    """Return the tokens of a choice and their log-probabilities, or None if the server sent none.

    Three shapes are known: the chat API's, which llama.cpp also uses for completions, and OpenAI's and vLLM's of the
    completions API.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: The log-probabilities are malformed.
    """
    log_probs = choice.get("logprobs") or {}
    if content := log_probs.get("content"):
        tokens = [
            bytes(t["bytes"]) if t.get("bytes") is not None else t["token"].encode(errors="replace") for t in content
        ]
        return tokens, _checked([t["logprob"] for t in content], len(tokens))
    if log_probs.get("tokens"):
        tokens = [
            token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
            if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token)  # OpenAI's spelling of a piece of a character
            else token.encode(errors="replace")
            for token in log_probs["tokens"]
        ]
        return tokens, _checked(log_probs["token_logprobs"], len(tokens))
    return None


def _checked(values: list[float | None], count: int) -> list[float | None]:
    """Return the log-probabilities if there is a finite number or None for each token, else raise ValueError."""
    if len(values) != count or not all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in values):
        raise ValueError("malformed log-probabilities")
    return values


def align(text: bytes, tokens: list[bytes]) -> list[tuple[int, int]]:
    """Return the span of each token in `text`. Leading whitespace of text and of the first token is ignored.

    Tokens after the end of the text, special tokens or the stop sequence, get an empty span there. Tokens that are
    pieces of a character, sent as U+FFFD, share the span up to the next token that can be located.

    Args:
        text: The answer in UTF-8, without leading whitespace.
        tokens: The tokens in UTF-8.

    Raises:
        ValueError: The tokens do not spell the text.
    """
    spans: list[tuple[int, int]] = []
    end = unlocated = 0  # where the last located token ended; tokens since then that could not be located
    for token in tokens:
        if end == 0 and not unlocated:
            token = token.lstrip()
        start = text.find(token, end) if unlocated and token else end
        if start < 0 or not text.startswith(token, start):
            if end == len(text):
                token = b""
            elif token.startswith(text[end:]):  # the text was cut at the stop sequence
                token = text[end:]
            elif REPLACEMENT in token or text.startswith(REPLACEMENT, end):
                unlocated += 1
                spans.append((end, len(text)))
                continue
            else:
                raise ValueError(f"its tokens do not spell its text: {token!r} where {text[end:][:20]!r} begins")
            start = end
        for i in range(len(spans) - unlocated, len(spans)):
            spans[i] = (end, start)
        unlocated = 0
        end = start + len(token)
        spans.append((start, end))
    return spans


def log_probs_within(
    spans: list[tuple[int, int]], log_probs: list[float | None], start: int, length: int
) -> list[float]:
    """Return the log-probabilities of the tokens that overlap the `length` bytes from `start`."""
    end = start + length
    return [p for (s, e), p in zip(spans, log_probs, strict=True) if s < end and e > start and p is not None]
