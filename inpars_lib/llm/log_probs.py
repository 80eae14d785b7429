"""Log-probabilities of the tokens of an answer, and their place in its text."""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import Any

from inpars_lib.llm.prompt import end_of_reasoning

BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's token for a byte
ESCAPED_BYTES = re.compile(r"bytes:(\\x[0-9a-f]{2})+")  # OpenAI's completions API sends pieces of characters so
BEYOND_ASCII = b"\x7f"
ROUNDING = 1e-3  # by which some servers exceed 0, the log-probability of a certain token
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
        return list(map(_chat_token, content)), _checked([entry["logprob"] for entry in content], len(content))
    if tokens := log_probs.get("tokens"):
        return list(map(_completion_token, tokens)), _checked(log_probs["token_logprobs"], len(tokens))
    return None


def _chat_token(entry: dict[str, Any]) -> bytes:
    """Return a token of the chat API's shape in UTF-8."""
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    return str.encode(entry["token"], errors="replace")


def _completion_token(token: str) -> bytes:
    """Return a token of the completions API's shape in UTF-8."""
    if ESCAPED_BYTES.fullmatch(token):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode(errors="replace")


def _checked(values: list[float | None], count: int) -> list[float | None]:
    """Return the log-probabilities if there is one or None for each token, else raise ValueError.

    Rounding makes some servers send a little more than 0 for a token that is certain.
    """
    if len(values) != count or not all(
        value is None or (type(value) in (int, float) and -math.inf < value < ROUNDING) for value in values
    ):
        raise ValueError("malformed log-probabilities")
    return [value if value is None else min(value, 0.0) for value in values]


def align(text: bytes, tokens: list[bytes]) -> list[tuple[int, int]]:
    """Return the span of each token in `text`, whose first characters are no whitespace.

    Every character of the text up to the last span is spelled by tokens, except that tokens may lack whitespace.
    Servers also send tokens as the vocabulary spells them, and tokens of reasoning that the text lacks. The latter get
    an empty span.

    Args:
        text: The answer in UTF-8.
        tokens: The tokens in UTF-8.

    Raises:
        ValueError: The tokens do not spell the text.
    """
    try:
        return _align(text, tokens)
    except ValueError as error:
        problem = error
    reasoning = end_of_reasoning(b"".join(tokens))
    starts = accumulate((len(token) for token in tokens), initial=0)
    skipped = sum(start < reasoning for start, _ in zip(starts, tokens, strict=False))
    for spell in SPELLINGS:
        for first in sorted({0, skipped}):
            with suppress(ValueError):
                return [(0, 0)] * first + _align(text, list(map(spell, tokens[first:])))
    raise problem


def _align(text: bytes, tokens: list[bytes]) -> list[tuple[int, int]]:
    """Return the span of each token in `text`. Leading whitespace of the first token is ignored.

    Tokens after the end of the text, special tokens or the stop sequence, get an empty span there. Tokens that are
    pieces of a character, U+FFFD or empty, share the span up to the next token that can be located.
    """
    spans: list[tuple[int, int]] = []
    end = 0  # where the last located token ended
    pieces: list[bytes] = []  # tokens since then that could not be located
    for token in tokens:
        left = text[end:]
        if not token and left and (end == 0 or left[:1] > BEYOND_ASCII):
            pieces.append(token)
            spans.append((end, len(text)))
            continue
        word, left_word = token.lstrip(), left.lstrip()
        if end == 0 and not pieces:
            token = word
        elif not pieces and not left.startswith(token) and left_word.startswith(word):
            token = word  # some servers drop whitespace at the start of a token
            end = len(text) - len(left_word) if word else end
        start = text.find(token, end) if pieces and token else end
        if start < 0 or not text.startswith(token, start):
            if end == len(text):
                token = b""
            elif token.startswith(left):  # the text was cut at the stop sequence
                token = left
            elif REPLACEMENT in token or left.startswith(REPLACEMENT):
                pieces.append(token)
                spans.append((end, len(text)))
                continue
            else:
                raise ValueError(f"its tokens do not spell its text: {token!r} where {left[:20]!r} begins")
            start = end
        _check_pieces(pieces, text[end:start])
        spans[len(spans) - len(pieces) :] = [(end, start)] * len(pieces)
        pieces.clear()
        end = start + len(token)
        spans.append((start, end))
    _check_pieces(pieces, text[end:] if pieces else b"")
    return spans


def _check_pieces(pieces: list[bytes], text: bytes) -> None:
    """Check that pieces of characters have the ASCII letters of the text that they share."""
    ours, theirs = (re.sub(rb"[\x80-\xff\s]", b"", part) for part in (b"".join(pieces), text))
    if ours != theirs:
        raise ValueError(f"its tokens do not spell its text: {b''.join(pieces)!r} where {text[:20]!r} stands")


def _as_sent(token: bytes) -> bytes:
    return token


def _sentencepiece(token: bytes) -> bytes:
    """Return the bytes of a token as SentencePiece's vocabularies spell it: `▁What`, `<0xE2>`."""
    word = token.decode(errors="replace").replace("\u2581", " ")
    byte = BYTE.fullmatch(word)
    return bytes([int(byte[1], 16)]) if byte else word.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable character for each byte (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: bytes) -> bytes:
    """Return the bytes of a token as byte-level vocabularies spell it: `ĠWhat`, `Ċ`."""
    alphabet = _byte_alphabet()
    characters = token.decode(errors="replace")
    return bytes(alphabet[c] for c in characters) if all(c in alphabet for c in characters) else token


SPELLINGS: tuple[Callable[[bytes], bytes], ...] = (_as_sent, _sentencepiece, _byte_level)


def log_probs_within(
    spans: list[tuple[int, int]], log_probs: list[float | None], start: int, length: int
) -> list[float | None]:
    """Return the log-probabilities of the tokens that overlap the `length` bytes from `start`.

    Raises:
        ValueError: The tokens end before these bytes do.
    """
    end = start + length
    if max(spans)[1] < end:
        raise ValueError("its tokens end before its text")
    return [p for (s, e), p in zip(spans, log_probs, strict=True) if s < end and e > start]
