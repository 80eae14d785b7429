"""The OpenAI-compatible protocol: requests for a query and what answers contain.

    api = ModelApi(ModelConfig("gpt-6-luna"), "chat")
    body = api.request("Document: ... Relevant Query:")      # POST it to api.path
    row = api.read_answer(answer, prompt, doc)               # doc_id, doc_text, question, log_probs

This module sends nothing and reads no files. `client.py` and `batch.py` both use it.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from inpars_lib.cli import InputError, warn
from inpars_lib.formats.fields import json_object
from inpars_lib.formats.records import Doc
from inpars_lib.llm.errors import error_message, error_within
from inpars_lib.llm.log_probs import align, log_probs_within, read_tokens
from inpars_lib.llm.prompt import Question, end_of_reasoning, find_question, find_questions, is_only_reasoning

STOP = "\n\n"  # a prompt separates its examples by an empty line, so the model writes one after its query
OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
# What --extra_body may not hold: flags decide the first line, and reading answers depends on the others.
OWN_PARAMETERS = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "reasoning_effort"}
OWN_PARAMETERS |= {"messages", "prompt", "n", "best_of", "stream", "stream_options", "logprobs", "top_logprobs", "echo"}
TEXT_PARTS = (None, "text", "output_text")  # types of the parts of a message that are no reasoning
NO_REASONING = "--reasoning_effort none, or the server's own switch in --extra_body"
REQUEST_NONE = "Add --no_log_probs to request none"
NEEDS_NO_REASONING = ("logprobs", "top_logprobs", "temperature", "top_p")  # reasoning models take them with effort none


class AnswerError(Exception):
    """An answer without a query. `answer` keeps its text, which was paid for."""

    def __init__(self, reason: str, answer: str = "") -> None:
        super().__init__(reason)
        self.answer = answer


class NoLogProbs(AnswerError):
    """An answer without the requested log-probabilities."""


def read_json(answer: Any) -> Any:
    """Return the JSON of an answer that the client left as text, because its content type is another.

    Raises:
        ValueError: It is not JSON.
    """
    if not isinstance(answer, str):
        return answer
    try:
        return msgspec.json.decode(answer)
    except msgspec.DecodeError:
        raise ValueError(f"not JSON: {error_message(answer) or 'nothing'}") from None


class ApiState(msgspec.Struct):
    """What a run has found out about a server, for later runs.

    Attributes:
        api: `completions` or `chat`.
        parameters: Parameters of a request that are the same for every document.
        refused: Parameters that the server does not take.
    """

    api: Literal["completions", "chat"]
    parameters: dict[str, Any]
    refused: list[str]


@dataclass(frozen=True)
class ModelConfig:
    """A language model and how to sample from it. The fields have the names of the flags.

    Attributes:
        engine: Name that the server knows.
        max_tokens: Tokens per answer.
        temperature: 0 for greedy decoding.
        top_p: Nucleus sampling.
        sampling_seed: Seed of the sampling above temperature 0.
        good_bad: The prompt asks for a good question and a bad question.
        include_doc_probs: Request the document's log-probabilities too; completions API only.
        no_log_probs: Request no log-probabilities. Rows have none then.
        reasoning_effort: Passed on as it is. None sends nothing, or `none` to a model that needs it.
        system_prompt: System message before the prompt, chat API only; none if empty.
        extra_body: Further fields of every request.
    """

    engine: str
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    sampling_seed: int = 1
    good_bad: bool = False
    include_doc_probs: bool = False
    no_log_probs: bool = False
    reasoning_effort: str | None = None
    system_prompt: str = ""
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def parse_extra_body(word: str) -> dict[str, Any]:
    """Return the fields of --extra_body, or raise an argparse error."""
    try:
        body = json_object(word)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if own := sorted(OWN_PARAMETERS & body.keys()):
        raise argparse.ArgumentTypeError(f"{', '.join(own)}: set by this script. Use its flags")
    return body


class ModelApi:
    """Requests to a language model and its answers, with the API and the parameters that its server accepts.

    Args:
        config: The model.
        api: `completions` or `chat`.
    """

    def __init__(self, config: ModelConfig, api: Literal["completions", "chat"]) -> None:
        self.config = config
        self.use_api(api)

    def use_api(self, api: Literal["completions", "chat"]) -> None:
        """Build requests for this API, with all parameters."""
        config = self.config
        self.api = api
        self.refused: set[str] = set()  # parameters that the server does not take
        self.parameters: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        if config.temperature > 0:
            self.parameters["seed"] = config.sampling_seed
        if api == "chat":
            self.parameters["max_completion_tokens"] = config.max_tokens
            if not config.no_log_probs:  # llama.cpp omits a token's own unless one alternative is requested
                self.parameters |= {"logprobs": True, "top_logprobs": 1}
        else:
            self.parameters |= {"max_tokens": config.max_tokens, "stop": STOP}
            if not config.no_log_probs:
                self.parameters["logprobs"] = 1
            if config.include_doc_probs:
                self.parameters["echo"] = True
        if config.reasoning_effort:
            self.parameters["reasoning_effort"] = config.reasoning_effort

    def state(self) -> ApiState:
        """Return the state that `restore` takes."""
        return ApiState(self.api, dict(self.parameters), sorted(self.refused))

    def restore(self, state: ApiState) -> None:
        """Restore the state of an earlier run."""
        self.api, self.parameters, self.refused = state.api, dict(state.parameters), set(state.refused)

    @property
    def path(self) -> str:
        """Return the endpoint below the server's base URL."""
        return "/chat/completions" if self.api == "chat" else "/completions"

    def request(self, prompt: str, number: int = 1) -> dict[str, Any]:
        """Return the JSON body of a request. Each of several requests with the same prompt has a seed of its own."""
        messages = [{"role": "system", "content": self.config.system_prompt}] if self.config.system_prompt else []
        messages.append({"role": "user", "content": prompt})
        content = {"messages": messages} if self.api == "chat" else {"prompt": prompt}
        body = {"model": self.config.engine, **content, **self.parameters, **self.config.extra_body}
        if "seed" in body:
            body["seed"] += number - 1
        return body

    def adapt(self, parameter: str, request: Mapping[str, Any], reason: str) -> None:
        """Rename or drop a parameter that the server refused, for all further requests.

        Args:
            parameter: The refused parameter.
            request: The request that was refused.
            reason: The server's message.

        Raises:
            InputError: Answers without this parameter would be useless.
        """
        if parameter in self.config.extra_body:
            raise InputError(f"{self.config.engine}: --extra_body {parameter} was refused ({reason}). Omit it.")
        current = self.parameters.get(parameter)
        if current is None or (request[parameter] != current and parameter != "seed"):
            return  # an earlier refusal has changed it already
        name, value = self.config.engine, self.parameters[parameter]
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
        problem, action = "no log-probabilities", "Use"
        if effort not in (None, "none"):
            problem, action = f"{problem} with --reasoning_effort {effort}", "Omit --reasoning_effort, use"
        if reason:
            problem = f"{problem} ({reason})"
        return InputError(
            f"{self.config.engine}: {problem}. {action} a model that gives them, or add --no_log_probs and filter with "
            "--scoring_function monot5."
        )

    def read_answer(self, answer: Any, prompt: str, doc: Doc) -> dict[str, Any]:
        """Return the row of a document. The question is the answer's first line; `log_probs` are its tokens' only.

        Args:
            answer: JSON of the answer.
            prompt: What was sent.
            doc: The document, as the prompt has it.

        Raises:
            ValueError: The JSON is not an answer of this API.
            AnswerError: The answer contains no question, or its tokens do not spell its text.
            NoLogProbs: The requested log-probabilities are missing.
        """
        config = self.config
        choice, text = self._read_choice(answer)
        full, prompt_bytes = text.encode().lstrip(), prompt.encode().lstrip()
        offset = 0  # where the generated text begins
        if config.include_doc_probs:
            if not full.startswith(prompt_bytes):
                raise NoLogProbs("the answer does not repeat the prompt (`echo`), as --include_doc_probs needs", text)
            offset = len(prompt_bytes)
        offset = end_of_reasoning(full, offset)
        generated = full[offset:].decode(errors="replace")
        question, bad_question = find_question(generated), Question("")
        if config.good_bad:
            question, bad_question = find_questions(generated)
        if problem := self._problem(choice, generated, question, bad_question):
            raise AnswerError(problem, text)
        row: dict[str, Any] = {"doc_id": doc.doc_id, "doc_text": doc.text, "question": question.text}
        if not config.no_log_probs:
            parts = {"log_probs": (offset + len(generated[: question.start].encode()), question.text)}
            if config.include_doc_probs:
                document = doc.text.lstrip()
                parts["doc_log_probs"] = (prompt_bytes.rindex(document.encode()), document)
            row |= zip(parts, self._read_log_probs(choice, text, list(parts.values())), strict=True)
        if config.good_bad:
            row["bad_question"] = bad_question.text
        return row

    def _read_choice(self, answer: Any) -> tuple[dict[str, Any], str]:
        """Return the choice of an answer and its text. Of a message in parts, only the parts with text are read."""
        try:
            choice = answer["choices"][0]
            message = choice if self.api == "completions" else choice["message"]
            text = message.get("text" if self.api == "completions" else "content") or ""
            if isinstance(text, list):  # the parts of a message
                text = "".join(part.get("text") or "" for part in text if part.get("type") in TEXT_PARTS)
            refusal, finish_reason = message.get("refusal"), choice.get("finish_reason")
            text = text.encode(errors="replace").decode()  # JSON can hold half a surrogate pair, UTF-8 cannot
        except (KeyError, IndexError, TypeError, AttributeError):
            said = error_message(error_within(answer)) if error_within(answer) else ""
            raise ValueError(said or "no choice in the server's answer") from None
        if finish_reason == "error":
            raise ValueError(error_message(error_within(answer)) or "the server stopped with an error")
        if refusal or finish_reason == "content_filter":
            raise AnswerError(f"refused by the model: {refusal or 'content filter'}", text)
        return choice, text

    def _problem(self, choice: dict[str, Any], generated: str, question: Question, bad_question: Question) -> str:
        """Return why the generated text holds no query, or an empty string."""
        is_cut = choice.get("finish_reason") == "length"
        if is_only_reasoning(generated, is_cut):
            return "the answer is only reasoning. Raise --max_tokens, or turn reasoning off"
        if question.text and self.config.good_bad and not bad_question.text:  # the prompt was not followed
            return "the answer has no bad question"
        if question.text:
            return ""
        cut = " (the token limit was reached: raise --max_tokens)" if is_cut else ""
        message = choice.get("message")
        if isinstance(message, dict) and (message.get("reasoning_content") or message.get("reasoning")):
            return f"the answer is only reasoning{cut}. Turn it off with {NO_REASONING}"
        return f"the answer is {'only an introduction' if generated.strip() else 'empty'}{cut}"

    def _read_log_probs(self, choice: dict[str, Any], text: str, parts: Sequence[tuple[int, str]]) -> list[list[float]]:
        """Return the log-probabilities of parts of the text, each given by its first byte and its characters."""
        try:
            found = read_tokens(choice)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise AnswerError(f"its log-probabilities are malformed. {REQUEST_NONE}", text) from None
        if found is None:
            raise NoLogProbs("the answer has no log-probabilities", text)
        tokens, log_probs = found
        try:
            spans = align(text.encode().lstrip(), tokens)
            read = [log_probs_within(spans, log_probs, start, len(part.encode())) for start, part in parts]
        except ValueError as error:
            raise AnswerError(f"{error}. {REQUEST_NONE}", text) from None
        known = []
        for (start, _), values in zip(parts, read, strict=True):
            is_echo_start = start == 0 and self.config.include_doc_probs  # the first token of a prompt has none
            known.append([value for value in values[is_echo_start:] if value is not None])
            if not known[-1] or len(known[-1]) < len(values) - is_echo_start:
                raise NoLogProbs("a token of the answer has no log-probability", text)
        return known
