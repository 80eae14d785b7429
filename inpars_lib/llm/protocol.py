"""The OpenAI-compatible protocol: requests for a query, what answers contain, what errors mean.

    api = ModelApi(ModelConfig("gpt-6-luna"), "chat")
    body = api.request("Document: ... Relevant Query:")      # POST it to api.path
    row = api.read_answer(answer, prompt, doc)               # doc_id, doc_text, question, log_probs
    verdict = classify_error(429, error_object, headers, request=body, server="OpenAI")

This module sends nothing and reads no files. `client.py` and `batch.py` both use it.
"""

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from inpars_lib.cli import InputError, shorten, warn
from inpars_lib.llm.tokens import align, log_probs_within, read_tokens
from inpars_lib.records import Doc

SLOT = "{document_text}"  # where a prompt takes the document
STOP = "\n\n"  # a prompt separates its examples by an empty line, so the model writes one after its query
OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
NEEDS_NO_REASONING = ("logprobs", "top_logprobs", "temperature", "top_p")  # reasoning models take them with effort none
NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")  # OpenAI's error codes

# https://developers.openai.com/api/docs/deprecations, read in November 2026
GPT3 = re.compile(r"(text|code)-(ada|babbage|curie|davinci)(-.*)?|(ada|babbage|curie|davinci)(-.*)?")
REPLACEMENTS = (
    "Use a current OpenAI model (--engine gpt-6-luna), an open model behind vLLM (--base_url http://HOST:8000/v1 "
    "--engine NAME), or the demo's local server (python demo/serve_llm.py --port 8080, then --base_url "
    "http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct)."
)
RESUME = "Answers so far are saved. Run the same command again to resume."


class AnswerError(Exception):
    """An answer without a query. `answer` keeps its text, which was paid for."""

    def __init__(self, reason: str, answer: str = "") -> None:
        super().__init__(reason)
        self.answer = answer


class NoLogProbs(AnswerError):
    """An answer without the requested log-probabilities."""


def public_url(url: str | None) -> str:
    """Return a server's address without user, password and query string, which may hold keys."""
    if not url:
        return "OpenAI"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def redact(text: str, key: str | None) -> str:
    """Return a server's message without the key, which the server may quote."""
    return text.replace(key, "<key>") if key else text


def retired_model_error(name: str) -> InputError | None:
    """Return the error for one of OpenAI's GPT-3 models, such as the paper's `curie`, or None for any other name."""
    if not GPT3.fullmatch(name):
        return None
    return InputError(f"--engine {name}: OpenAI shut down its GPT-3 models in January 2024. {REPLACEMENTS}")


# ----------------------------------------------------------------------------------------------------------- errors


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
        too_long: The document exceeds the model's context, so other documents are not affected.
    """

    action: Action
    message: str
    wait: float | None = None
    parameter: str | None = None
    too_long: bool = False


def classify_error(
    status: int,
    body: Any,
    headers: Mapping[str, str],
    *,
    request: Mapping[str, Any],
    server: str,
    can_switch_api: bool = False,
) -> Verdict:
    """Return what an HTTP error means for the document, the server and the run.

    Args:
        status: HTTP status.
        body: The `error` object of the answer, or whatever the server sent instead.
        headers: The answer's headers.
        request: The JSON body that was sent.
        server: Name of the server for messages.
        can_switch_api: Neither the user nor an earlier answer has settled which API the model speaks.
    """
    model, said = request.get("model", ""), error_message(body)
    code = body.get("code") if isinstance(body, dict) else None
    if code in NO_CREDIT or status == 402:
        return Verdict(Action.STOP, f"{server}: the account has no credit left ({said}). {RESUME}")
    if status in (401, 403):
        problem = f"{server}: the key was not accepted ({status})"
        return Verdict(Action.STOP, f"{problem}. Set API_KEY to a key that is valid there.")
    if can_switch_api and (status in (404, 405, 501) or "chat model" in said or "chat template" in said):
        return Verdict(Action.SWITCH_API, said)
    if status == 404 and (retired := retired_model_error(model)):
        return Verdict(Action.STOP, str(retired))
    if status == 429:
        return Verdict(Action.BACK_OFF, f"too many requests (429 {said})", requested_wait(headers))
    if status in (408, 409) or (status >= 500 and status != 501):
        return Verdict(Action.RETRY, f"the server failed ({status} {said})", requested_wait(headers))
    if status in (400, 413, 422):
        too_long = bool(re.search(r"(?i)context|too (long|large|many)|max\w* .*length|exceed", said))
        parameter = None if too_long else refused_parameter(request, body)
        action = Action.ADAPT if parameter else Action.GIVE_UP
        return Verdict(action, said or f"status {status}", parameter=parameter, too_long=too_long)
    advice = "Check --engine, and that --base_url ends as the server expects, usually in /v1."
    if status == 404:
        advice += f" {REPLACEMENTS}"
    return Verdict(Action.STOP, f"{server}: status {status} for engine {model} ({said}). {advice}")


def error_message(body: Any) -> str:
    """Return the message of an `error` object on one line."""
    message = body.get("message") if isinstance(body, dict) else body
    return shorten(message or "")


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
        if match := re.search(pattern, error_message(body)):
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


# --------------------------------------------------------------------------------------------- requests and answers


@dataclass(frozen=True)
class ModelConfig:
    """A language model and how to sample from it.

    Attributes:
        name: Name that the server knows.
        max_tokens: Tokens per answer.
        temperature: 0 for greedy decoding.
        top_p: Nucleus sampling.
        seed: Seed of the sampling above temperature 0.
        log_probs: Request log-probabilities. Without them rows have none.
        good_bad: The prompt asks for a good question and a bad question.
        echo: Request the document's log-probabilities too; completions API only.
        reasoning_effort: Passed on as it is. None sends nothing, or `none` to a model that needs it.
    """

    name: str
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1
    log_probs: bool = True
    good_bad: bool = False
    echo: bool = False
    reasoning_effort: str | None = None


class ModelApi:
    """Requests to a language model and its answers, with the API and the parameters that its server accepts.

    Args:
        config: The model.
        api: `completions` or `chat`.
    """

    def __init__(self, config: ModelConfig, api: str) -> None:
        self.config = config
        self.use_api(api)

    def use_api(self, api: str) -> None:
        """Build requests for this API, with all parameters."""
        config = self.config
        self.api = api
        self.refused: set[str] = set()  # parameters that the server does not take
        self.parameters: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        if config.temperature > 0:
            self.parameters["seed"] = config.seed
        if api == "chat":
            self.parameters["max_completion_tokens"] = config.max_tokens
            if config.log_probs:  # llama.cpp omits a token's own log-probability unless one alternative is requested
                self.parameters |= {"logprobs": True, "top_logprobs": 1}
        else:
            self.parameters |= {"max_tokens": config.max_tokens, "stop": STOP}
            if config.log_probs:
                self.parameters["logprobs"] = 1
            if config.echo:
                self.parameters["echo"] = True
        if config.reasoning_effort:
            self.parameters["reasoning_effort"] = config.reasoning_effort

    def as_dict(self) -> dict[str, Any]:
        """Return the state that `restore` takes."""
        return {"api": self.api, "parameters": self.parameters, "refused": sorted(self.refused)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of an earlier run."""
        self.api, self.parameters, self.refused = state["api"], dict(state["parameters"]), set(state["refused"])

    @property
    def path(self) -> str:
        """The endpoint below the server's base URL."""
        return "/chat/completions" if self.api == "chat" else "/completions"

    def request(self, prompt: str) -> dict[str, Any]:
        """Return the JSON body of a request."""
        content = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        return {"model": self.config.name, **content, **self.parameters}

    def adapt(self, parameter: str, request: Mapping[str, Any], reason: str) -> None:
        """Rename or drop a parameter that the server refused, for all further requests.

        Args:
            parameter: The refused parameter.
            request: The request that was refused.
            reason: The server's message.

        Raises:
            InputError: Answers without this parameter would be useless.
        """
        if request[parameter] != self.parameters.get(parameter):  # an earlier refusal has changed it already
            return
        name, value = self.config.name, self.parameters[parameter]
        reasoning_settled = "reasoning_effort" in self.parameters or "reasoning_effort" in self.refused
        if parameter in NEEDS_NO_REASONING and self.api == "chat" and not reasoning_settled:
            self.parameters["reasoning_effort"] = "none"
            warn(f"{name} refuses {parameter}. Trying again with reasoning_effort none.")
            return
        if parameter == "reasoning_effort" and self.config.reasoning_effort:
            raise InputError(f"{name}: --reasoning_effort {value} was refused ({reason}). Omit it.")
        if parameter == "echo":
            raise InputError(f"{name}: the server cannot repeat the prompt. Omit --include_doc_probs.")
        if parameter == "logprobs":
            raise self.no_log_probs_error(reason)
        del self.parameters[parameter]
        self.refused.add(parameter)
        other = OTHER_NAME.get(parameter)
        if other and other not in self.refused:
            self.parameters[other] = value
            warn(f"{name} refuses {parameter}. Using {other} instead.")
        else:
            warn(f"{name} refuses {parameter}. It is omitted, and the model's default applies.")

    def no_log_probs_error(self, reason: str = "") -> InputError:
        """Return the error for a model that gives no log-probabilities."""
        effort = self.config.reasoning_effort
        reasoning = f" with --reasoning_effort {effort}" if effort not in (None, "none") else ""
        return InputError(
            f"{self.config.name}: no log-probabilities{reasoning}{f' ({reason})' if reason else ''}. "
            f"{'Omit --reasoning_effort, use' if reasoning else 'Use'} a model that gives them, or add --no_log_probs "
            "and filter with --scoring_function monot5."
        )

    def read_answer(self, answer: Any, prompt: str, doc: Doc) -> dict[str, Any]:
        """Return the row of a document. The question is the answer's first line; `log_probs` are its tokens' only.

        Raises:
            ValueError: The JSON is not an answer of this API.
            AnswerError: The answer contains no question, or its tokens do not spell its text.
            NoLogProbs: The requested log-probabilities are missing.
        """
        config = self.config
        try:
            choice = answer["choices"][0]
            message = choice if self.api == "completions" else choice["message"]
            text = message.get("text" if self.api == "completions" else "content") or ""
            refusal = message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("no choice in the server's answer") from None
        text = text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot
        if refusal or choice.get("finish_reason") == "content_filter":
            raise AnswerError(f"refused by the model: {refusal or 'content filter'}", text)
        full, prompt_bytes, doc_bytes = (part.encode().lstrip() for part in (text, prompt, doc.text))
        offset = len(prompt_bytes) if config.echo else 0
        generated = full[offset:].decode(errors="replace")
        bad_question = ""
        if config.good_bad:  # without the bad question the answer did not follow the prompt, so neither is trusted
            generated, _, bad_part = re.sub(r"(?i)bad question:", "\0", generated, count=1).partition("\0")
            bad_question = _first_line(bad_part)
            if not bad_question:
                raise AnswerError("the answer has no bad question", text)
        question = _first_line(generated)
        if not question:
            cut = " (the token limit was reached: raise --max_tokens)"
            raise AnswerError(f"the answer is empty{cut if choice.get('finish_reason') == 'length' else ''}", text)
        row: dict[str, Any] = {"doc_id": doc.doc_id, "doc_text": doc.text, "question": question}
        if config.log_probs:
            found = read_tokens(choice)
            if found is None:
                raise NoLogProbs("the answer has no log-probabilities", text)
            tokens, log_probs = found
            try:
                spans = align(full, tokens)
            except ValueError as error:
                raise AnswerError(str(error), text) from None
            start = full.index(question.encode(), offset)
            row["log_probs"] = log_probs_within(spans, log_probs, start, len(question.encode()))
            if config.echo:
                start = prompt_bytes.rindex(doc_bytes)
                row["doc_log_probs"] = log_probs_within(spans, log_probs, start, len(doc_bytes))
        if config.good_bad:
            row["bad_question"] = bad_question
        return row


def _first_line(text: str) -> str:
    # A token limit may have cut a character in two.
    return text.strip().partition("\n")[0].rstrip("\ufffd \t\r")
