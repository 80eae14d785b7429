"""Errors of an OpenAI-compatible server: what each means for the document, the server and the run.

verdict = classify_error(429, error_object, headers, request=body, server="OpenAI")
"""

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple

from inpars_lib.cli import InputError, shorten

NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")  # OpenAI's error codes
# https://developers.openai.com/api/docs/deprecations, read in November 2026
GPT3 = re.compile(r"(text|code)-(ada|babbage|curie|davinci)(-.*)?|(ada|babbage|curie|davinci)(-.*)?")
REPLACEMENTS = (
    "Use a current OpenAI model (--engine gpt-6-luna), an open model behind vLLM (--base_url http://HOST:8000/v1 "
    "--engine NAME), or the demo's local server (python demo/serve_llm.py --port 8080, then --base_url "
    "http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct)."
)
OPENAI = ("OpenAI", "https://api.openai.com/v1")  # names of its server
LONGEST_PAGE = 10_000  # characters of a page in which its title is searched
CAUSES = {  # what a refusal is about, by the server's words
    "log_probs": re.compile(r"(?i)log_?prob"),
    "key": re.compile(r"(?i)(?<!<)\bkey\b|api_?key|\bauth|\bunauth|credential|access token|no connected db"),
    "model": re.compile(r"(?i)model|engine|deployment"),
}
ADVICE = {
    "log_probs": "Add --no_log_probs, and filter with --scoring_function monot5.",
    "key": "Set API_KEY to a key that the server accepts.",
    "permission": "Use a key that may do this, or another server with --base_url.",
    "model": "Check --engine.",
    "request": "Check --engine, --extra_body and the prompt.",
}
CODES = {  # HTTP status by the code of an `error` object that is not a number
    429: re.compile(r"(?i)rate.?limit|too.?many|quota|throttl"),
    401: re.compile(r"(?i)api.?key|auth"),
    403: re.compile(r"(?i)permission|forbidden"),
    404: re.compile(r"(?i)not.?found"),
    400: re.compile(r"(?i)invalid|bad.?request|context.?length|content.?filter"),
    503: re.compile(r"(?i)overload|unavailable|server.?error|internal"),
}
RESUME = "Answers so far are saved. Run the same command again to resume."


def retired_model_error(name: str) -> InputError | None:
    """Return the error for one of OpenAI's GPT-3 models, such as the paper's `curie`, or None for any other name."""
    if not GPT3.fullmatch(name):
        return None
    return InputError(f"--engine {name}: OpenAI shut down its GPT-3 models in January 2024. {REPLACEMENTS}")


class Action(Enum):
    """What to do after an HTTP error."""

    STOP = "every further request would fail the same way"
    SWITCH_API = "the model speaks the other API"
    ADAPT = "the server refuses a parameter of the request"
    BACK_OFF = "too many requests; nothing is wrong with the document"
    RETRY = "the server failed; perhaps because of the document"
    GIVE_UP = "the server cannot answer for this document"


class Verdict(NamedTuple):
    """The classification of an HTTP error.

    Attributes:
        action: What to do.
        message: The message for the user, or the reason why a document has no query.
        wait: Seconds that the server asks to wait.
        parameter: The refused parameter, if the action is ADAPT.
        document_only: The document is at fault, by its length or content, so others are not affected.
        too_fast: The failure may come from a rate limiter.
    """

    action: Action
    message: str
    wait: float | None = None
    parameter: str | None = None
    document_only: bool = False
    too_fast: bool = False


def classify_error(
    status: int,
    body: Any,
    headers: Mapping[str, str],
    *,
    request: Mapping[str, Any],
    server: str,
    can_switch_api: bool = False,
    answered: bool = False,
) -> Verdict:
    """Return what an HTTP error means for the document, the server and the run.

    Args:
        status: HTTP status.
        body: The `error` object of the answer, or whatever the server sent instead, without secrets.
        headers: The answer's headers.
        request: The JSON body that was sent.
        server: Name of the server for messages.
        can_switch_api: Neither the user nor an earlier answer has settled which API the model speaks.
        answered: The output has answers, so a refusal with status 403 may concern this document only.
    """
    model = request.get("model", "")
    said = shorten(error_message(body)).removeprefix(str(status)).lstrip(" :")  # as in nginx's `502 Bad Gateway`
    code = body.get("code") if isinstance(body, dict) else None
    if code in NO_CREDIT or status == 402:
        return Verdict(Action.STOP, f"{server}: the account has no credit left ({said}). {RESUME}")
    if status == 403 and answered:
        return Verdict(Action.GIVE_UP, f"the server refused this document (403 {said})")
    if status in (401, 403):
        reason = f"{status} {said}".strip()
        advice = find_advice(said, "key" if status == 401 else "permission")
        return Verdict(Action.STOP, f"{server}: refused ({reason}). {advice}")
    if can_switch_api and (status in (404, 405, 501) or "chat model" in said or "chat template" in said):
        return Verdict(Action.SWITCH_API, said)
    if status == 404 and (retired := retired_model_error(model)):
        return Verdict(Action.STOP, str(retired))
    if status == 429:
        return Verdict(Action.BACK_OFF, f"too many requests (429 {said})", requested_wait(headers))
    if status in (408, 409) or (status >= 500 and status != 501):
        reason = f"the server failed ({status} {said})"
        return Verdict(Action.RETRY, reason, requested_wait(headers), too_fast=status == 503)
    if status in (400, 413, 422):
        too_long = bool(re.search(r"(?i)context|too (long|large|many)|max\w* .*length|exceed", said))
        parameter = None if too_long else refused_parameter(request, body)
        action = Action.ADAPT if parameter else Action.GIVE_UP
        filtered = bool(re.search(r"(?i)content.?(filter|management|policy)", f"{code} {said}"))
        alone = too_long or filtered  # other documents are not affected
        return Verdict(action, said or f"status {status}", parameter=parameter, document_only=alone)
    advice = "Check --engine, and that --base_url ends as the server expects, usually in /v1."
    if status == 404 and server in OPENAI:
        advice += f" {REPLACEMENTS}"
    return Verdict(Action.STOP, f"{server}: status {status} for engine {model} ({said}). {advice}")


def find_advice(said: str, otherwise: str) -> str:
    """Return what the user can do about a refusal, by the server's words, or by the likely cause `otherwise`.

    Of several causes that the words name, the first is meant: "Invalid model name. Call /v1/models to view available
    models for your key". Log-probabilities come before the model that has none.
    """
    found = {cause: match.start() for cause, words in CAUSES.items() if (match := words.search(said))}
    if "log_probs" in found:
        return ADVICE["log_probs"]
    return ADVICE[min(found, key=lambda cause: found[cause], default=otherwise)]


def error_message(body: Any) -> str:
    """Return the message of an `error` object, or the title of a page in HTML."""
    if isinstance(body, dict):  # FastAPI sends `detail`
        body = next((body[name] for name in ("message", "detail", "error") if body.get(name)), "")
    title = re.search(r"(?is)<title[^>]*>(.*?)</title>", body[:LONGEST_PAGE]) if isinstance(body, str) else None
    return title[1] if title else str(body or "")


def error_within(answer: Any) -> Any:
    """Return the `error` object of an answer with status 200, or None: gateways pass the errors of others on like this.

    It stands at the top or in the choice, or is the whole answer.
    """
    if not isinstance(answer, dict):
        return None
    choices = answer.get("choices")
    if not choices:
        return answer.get("error") or answer
    is_choice = isinstance(choices, list) and isinstance(choices[0], dict)
    return choices[0].get("error") if is_choice else None


def status_within(body: Any) -> int | None:
    """Return the HTTP status that an `error` object inside an answer stands for, by its code or type, or None."""
    found = [body.get(name) for name in ("code", "status", "type")] if isinstance(body, dict) else [body]
    for code in map(str, found):
        if code.isdecimal() and 400 <= int(code) < 600:
            return int(code)
        for status, words in CODES.items():
            if words.search(code):
                return status
    return None


def refused_parameter(request: Mapping[str, Any], body: Any) -> str | None:
    """Return the request parameter that an `error` object names, or None."""
    names = [name for name in request if name not in ("model", "prompt", "messages")]
    named = body.get("param") if isinstance(body, dict) else None
    if isinstance(named, str):
        return named if named in names else None
    positions = {}
    for name in names:
        # `stop`, `seed` and `echo` are everyday words, so they count in quotes only.
        pattern = rf"\b{name}\b" if len(name) > 4 else rf"['\"`]{name}['\"`]"
        if match := re.search(pattern, shorten(error_message(body))):
            positions[match.start()] = name
    return positions[min(positions)] if positions else None


def requested_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait (RFC 9110, 10.2.3; `retry-after-ms` is OpenAI's)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            seconds = float(headers[name]) * unit
            return seconds if 0 <= seconds < math.inf else None
    with suppress(KeyError, ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return None
