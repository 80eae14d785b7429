"""The language model behind a server with OpenAI's API: what is asked of it, and what its answers hold.

    engine = Engine("gpt-6-luna", "chat", max_tokens=64)
    body = engine.request("Document: ... Query:")            # POST it to engine.path
    row = engine.read(answer, prompt, doc)                   # doc_id, doc_text, question, log_probs

This file sends nothing and knows no files. Both ways of asking, one by one and by the batch, use it.
"""

import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from formats import Doc, InputError, in_short, warn

SLOT = "{document_text}"  # of a prompt
STOP = "\n\n"  # the examples of a prompt have an empty line between them, so the model writes one after its question
GARBLED = "\ufffd".encode()
SAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}  # old and new name
UNREASONED = ("logprobs", "top_logprobs", "temperature", "top_p")  # what models that reason give only without reasoning
NO_CREDIT = ("insufficient_quota", "billing_not_active", "billing_hard_limit_reached")  # codes of OpenAI

# https://developers.openai.com/api/docs/deprecations, read in November 2026
RETIRED = {
    r"(text|code)-(ada|babbage|curie|davinci)(-.*)?|(ada|babbage|curie|davinci)(-(?!002$).*)?": (
        "OpenAI shut down its GPT-3 models in January 2024"
    ),
    r"(babbage|davinci)-002|gpt-3\.5-.*|gpt-4|gpt-4-.*|gpt-4\.1-nano.*|o1|o1-.*|o[34]-mini.*": (
        "OpenAI shut it down in autumn 2026"
    ),
}
RETIRING = {r"gpt-4o.*|gpt-4\.1.*": "OpenAI shuts down GPT-4o and GPT-4.1 in January 2027"}
INSTEAD = (
    "use a current model of OpenAI (--engine gpt-6-luna), or an open one behind vLLM (--base_url http://HOST:8000/v1 "
    "--engine ITS_NAME), or the demo's local server (python demo/serve_llm.py --port 8080, then --base_url "
    "http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct)"
)
KEPT = "every answer so far is kept, and the same command goes on from here"


class AnswerError(Exception):
    """An answer that holds no question. `answer` is its text, as it was paid for."""

    def __init__(self, reason: str, answer: str = "") -> None:
        super().__init__(reason)
        self.answer = answer


class NoLogProbs(AnswerError):
    """An answer without the log-probabilities that were asked for."""


class Usage(NamedTuple):
    """Tokens, as the server counts them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, from the server's prefix cache
    completion_tokens: int = 0

    def plus(self, other: "Usage") -> "Usage":
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def total(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        return f"{self.prompt_tokens:,} in ({self.cached_tokens:,} cached), {self.completion_tokens:,} out"


NO_TOKENS = Usage()


def read_usage(answer: Any) -> Usage:
    """The tokens of an answer; zeros where the server says nothing of them."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details") or {}
    counts = usage.get("prompt_tokens"), details.get("cached_tokens"), usage.get("completion_tokens")
    return Usage(*(count if isinstance(count, int) else 0 for count in counts))


def public_url(url: str | None) -> str:
    """A server's address as it may be shown: without a user, a password or a query, where keys stand."""
    if not url:
        return "OpenAI"
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def retired(engine: str, names: dict[str, str] = RETIRED) -> str | None:
    """What became of a model that OpenAI has shut down; None for any other name."""
    return next((words for pattern, words in names.items() if re.fullmatch(pattern, engine)), None)


def without_key(text: str, key: str | None) -> str:
    """What a server said, without the key, should it quote that."""
    return text.replace(key, "<key>") if key else text


def hopeless(error: Any, engine: str, server: str, key: str | None) -> InputError | None:
    """The one sentence for an `openai.APIStatusError` that no other request will be spared; None for any other."""
    code = error.body.get("code") if isinstance(error.body, dict) else None
    said = without_key(message_of(error.body), key)
    if code in NO_CREDIT or error.status_code == 402:
        return InputError(f"{server} says that the account has no credit left ({said}); {KEPT}")
    if error.status_code in (401, 403):
        return InputError(
            f"{server} did not accept the key ({error.status_code}); set API_KEY to one that is valid there"
        )
    if error.status_code == 404 and (what := retired(engine, RETIRED | RETIRING)):
        return InputError(f"engine {engine} is retired: {what}, and {server} has none of that name; {INSTEAD}")
    if error.status_code < 500 and error.status_code not in (400, 408, 409, 413, 422, 429):
        return InputError(
            f"{server} answers {error.status_code} for engine {engine} ({said}); check --engine, and that --base_url "
            "ends as the server wants it, mostly in /v1"
        )
    return None


class Engine:
    """A model, the API it is asked through, and the parameters that it takes.

    Args:
        name: as the server knows it.
        api: `completions` or `chat`.
        max_tokens: of an answer.
        seed: for sampling above temperature 0.
        log_probs: whether they are asked for; without them rows carry none.
        good_bad: the prompt asks for a good and a bad question.
        echo: the document's log-probabilities too, which only the completions API gives.
        reasoning_effort: passed on as it is; by default nothing is said of it, or `none` where the engine needs that.
    """

    def __init__(
        self,
        name: str,
        api: str,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 1,
        log_probs: bool = True,
        good_bad: bool = False,
        echo: bool = False,
        reasoning_effort: str | None = None,
    ) -> None:
        self.name, self.max_tokens, self.temperature, self.top_p, self.seed = name, max_tokens, temperature, top_p, seed
        self.log_probs, self.good_bad, self.echo, self.reasoning_effort = log_probs, good_bad, echo, reasoning_effort
        self.ask_through(api)

    def ask_through(self, api: str) -> None:
        self.api = api
        self.refused: set[str] = set()
        self.parameters: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        if self.temperature > 0:
            self.parameters["seed"] = self.seed
        if api == "chat":
            self.parameters["max_completion_tokens"] = self.max_tokens
            if self.log_probs:  # llama.cpp gives none for the token itself unless one rival is asked for
                self.parameters |= {"logprobs": True, "top_logprobs": 1}
        else:
            self.parameters |= {"max_tokens": self.max_tokens, "stop": STOP}
            if self.log_probs:
                self.parameters["logprobs"] = 1
            if self.echo:
                self.parameters["echo"] = True
        if self.reasoning_effort:
            self.parameters["reasoning_effort"] = self.reasoning_effort

    def as_dict(self) -> dict[str, Any]:
        """How the engine is asked, as `restore` takes it."""
        return {"api": self.api, "parameters": self.parameters, "refused": sorted(self.refused)}

    def restore(self, how: dict[str, Any]) -> None:
        self.api, self.parameters, self.refused = how["api"], dict(how["parameters"]), set(how["refused"])

    @property
    def path(self) -> str:
        return "/chat/completions" if self.api == "chat" else "/completions"

    def request(self, prompt: str) -> dict[str, Any]:
        """The JSON body that asks for a question."""
        what = {"messages": [{"role": "user", "content": prompt}]} if self.api == "chat" else {"prompt": prompt}
        return {"model": self.name, **what, **self.parameters}

    # ------------------------------------------------------------------------------------------ refused parameters

    def adapt(self, sent: dict[str, Any], body: Any) -> bool:
        """Change the parameters after a 400, if it is about one of them.

        Args:
            sent: the request that was refused.
            body: the `error` object of the answer.

        Returns:
            whether the same document may be asked for again, as `request` now says it.

        Raises:
            InputError: without this parameter the answers are of no use.
        """
        name = refused_parameter(sent, body)
        if name is None:
            return False
        if sent[name] != self.parameters.get(name):  # an answer that came before this one said so already
            return True
        value = self.parameters[name]
        said = "reasoning_effort" in self.parameters or "reasoning_effort" in self.refused
        if name in UNREASONED and self.api == "chat" and not said:
            self.parameters["reasoning_effort"] = "none"
            warn(f"{self.name} refuses {name}; with reasoning_effort none it may give it")
            return True
        if name == "reasoning_effort" and self.reasoning_effort:
            raise InputError(f"{self.name} refuses --reasoning_effort {value} ({message_of(body)}); leave it out")
        if name == "echo":
            raise InputError(f"{self.name} does not repeat its prompt; leave out --include_doc_probs")
        if name == "logprobs":
            raise InputError(self.no_log_probs(message_of(body)))
        del self.parameters[name]
        self.refused.add(name)
        if name in SAME and SAME[name] not in self.refused:
            self.parameters[SAME[name]] = value
            warn(f"{self.name} wants {SAME[name]} in place of {name}")
        else:
            warn(f"{self.name} refuses {name}; it is left out, and the engine's own holds")
        return True

    def no_log_probs(self, reason: str = "") -> str:
        effort = (
            f"with --reasoning_effort {self.reasoning_effort} " if self.reasoning_effort not in (None, "none") else ""
        )
        return (
            f"{self.name} {effort}gives no log-probabilities{f' ({reason})' if reason else ''}, which the filter "
            f"scores with: {'leave that out, ' if effort else ''}use an engine that gives them, or add --no_log_probs "
            "and filter with --scoring_function monot5"
        )

    # ----------------------------------------------------------------------------------------------------- answers

    def read(self, answer: Any, prompt: str, doc: Doc) -> dict[str, Any]:
        """The row of a document: the question is the answer's first line, `log_probs` are those of its tokens alone.

        Raises:
            ValueError: it is not an answer of this API.
            AnswerError: it is one, but holds no question, or its tokens do not spell it.
            NoLogProbs: it has no log-probabilities, and they were asked for.
        """
        try:
            choice = answer["choices"][0]
            message = choice if self.api == "completions" else choice["message"]
            text = message.get("text" if self.api == "completions" else "content") or ""
            refusal = message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise ValueError("the server's answer holds no choice") from None
        text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can hold and UTF-8 cannot
        if refusal or choice.get("finish_reason") == "content_filter":
            raise AnswerError(f"refused by the model: {refusal or 'content filter'}", text)
        whole, prompt_bytes, doc_bytes = (part.encode().lstrip() for part in (text, prompt, doc.text))
        offset = len(prompt_bytes) if self.echo else 0
        said = whole[offset:].decode(errors="replace")
        bad_question = ""
        if self.good_bad:  # without its second half the answer did not follow the prompt, and neither half is trusted
            said, _, bad_question = re.sub(r"(?i)bad question:", "\0", said, count=1).partition("\0")
            bad_question = first_line(bad_question)
            if not bad_question:
                raise AnswerError("the answer has no bad question", text)
        question = first_line(said)
        if not question:
            cut = (
                " (the token limit was reached: raise --max_tokens)" if choice.get("finish_reason") == "length" else ""
            )
            raise AnswerError(f"the answer is empty{cut}", text)
        row: dict[str, Any] = {"doc_id": doc.doc_id, "doc_text": doc.text, "question": question}
        if self.log_probs:
            tokens, log_probs = read_tokens(choice, text)
            try:
                spans = align(whole, tokens)
            except ValueError as error:
                raise AnswerError(str(error), text) from None

            def within(start: int, part: bytes) -> list[float]:
                end = start + len(part)
                return [
                    p for (s, e), p in zip(spans, log_probs, strict=True) if s < end and e > start and p is not None
                ]

            row["log_probs"] = within(whole.index(question.encode(), offset), question.encode())
            if self.echo:
                row["doc_log_probs"] = within(prompt_bytes.rindex(doc_bytes), doc_bytes)
        if self.good_bad:
            row["bad_question"] = bad_question
        return row


def message_of(body: Any) -> str:
    """What an error says, in one line."""
    message = body.get("message") if isinstance(body, dict) else body
    return in_short(message or "")


def refused_parameter(sent: dict[str, Any], body: Any) -> str | None:
    """The parameter of a request that a 400 is about; None where it is about the document, its length mostly."""
    message = message_of(body)
    if re.search(r"(?i)context|too (long|large|many)|max\w* .*length|exceed", message):
        return None
    names = [name for name in sent if name not in ("model", "prompt", "messages")]
    param = body.get("param") if isinstance(body, dict) else None
    if isinstance(param, str):
        return param if param in names else None
    found = {}
    for name in names:
        # `stop`, `seed` and `echo` are words of everyday too: those count in quotes only.
        if match := re.search(rf"\b{name}\b" if len(name) > 4 else rf"['\"`]{name}['\"`]", message):
            found[match.start()] = name
    return found[min(found)] if found else None


def align(text: bytes, tokens: list[bytes]) -> list[tuple[int, int]]:
    """The span of each token in `text`, which starts with no blank; nor is the first token taken to.

    Tokens after the end of the text (special ones, or the stop sequence) have an empty span there. Some servers give
    U+FFFD for the pieces of a character: such tokens share the span up to the next one that is found.

    Raises:
        ValueError: the tokens do not spell the text.
    """
    spans: list[tuple[int, int]] = []
    end = garbled = 0  # where the last token ended; how many since then could not be found
    for token in tokens:
        if end == 0 and not garbled:
            token = token.lstrip()
        start = text.find(token, end) if garbled and token else end
        if start < 0 or not text.startswith(token, start):
            if end == len(text):
                token = b""
            elif token.startswith(text[end:]):  # cut at the stop sequence
                token = text[end:]
            elif GARBLED in token or text.startswith(GARBLED, end):
                garbled += 1
                spans.append((end, len(text)))
                continue
            else:
                raise ValueError(f"its tokens do not spell its text: {token!r} where {text[end:][:20]!r} begins")
            start = end
        for i in range(len(spans) - garbled, len(spans)):
            spans[i] = (end, start)
        garbled = 0
        end = start + len(token)
        spans.append((start, end))
    return spans


def read_tokens(choice: dict[str, Any], text: str) -> tuple[list[bytes], list[float | None]]:
    """Tokens and log-probabilities of a choice, from any of the three shapes that servers give.

    Raises:
        NoLogProbs: it has none.
    """
    log_probs = choice.get("logprobs") or {}
    if content := log_probs.get("content"):  # chat; llama.cpp's completions too
        tokens = [
            bytes(t["bytes"]) if t.get("bytes") is not None else t["token"].encode(errors="replace") for t in content
        ]
        return tokens, [t["logprob"] for t in content]
    if log_probs.get("tokens"):  # completions, OpenAI and vLLM
        tokens = [
            token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
            if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token)  # OpenAI's spelling of a piece of a character
            else token.encode(errors="replace")
            for token in log_probs["tokens"]
        ]
        return tokens, log_probs["token_logprobs"]
    raise NoLogProbs("the answer has no log-probabilities", text)


def first_line(text: str) -> str:
    # A token limit may have cut a character in two.
    return text.strip().partition("\n")[0].rstrip("\ufffd \t\r")
