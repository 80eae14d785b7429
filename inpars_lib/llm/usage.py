"""Numbers of tokens as the server counts them, and of answers that the token limit cut."""

from contextlib import suppress
from typing import Any

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """Numbers of tokens as the server counts them, and of answers that the token limit cut.

    Attributes:
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Those of them that came from the server's prefix cache.
        completion_tokens: Tokens of the answers.
        cut_answers: Answers that ended at --max_tokens.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cut_answers: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cut_answers + other.cut_answers,
        )

    @property
    def total(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        return f"{self.prompt_tokens:,} in ({self.cached_tokens:,} cached), {self.completion_tokens:,} out"


NO_TOKENS = Usage()


def read_usage(answer: Any) -> Usage:
    """Return the counts of an answer, zeros for tokens where the server does not count them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    counts = [usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens")]
    is_cut = False
    with suppress(KeyError, IndexError, TypeError, AttributeError):
        is_cut = answer["choices"][0].get("finish_reason") == "length"
    prompt, cached, completion = [count if isinstance(count, int) else 0 for count in counts]
    return Usage(prompt, cached, completion, int(is_cut))


BYTES_PER_TOKEN = 3  # of a prompt whose tokens the server does not count: fewer than in most languages


def estimate_usage(prompt: str, max_tokens: int, cut_answers: int) -> Usage:
    """Return an upper bound of the tokens of a request, for servers that do not count them."""
    return Usage(len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN + 1, 0, max_tokens, cut_answers)
