"""Requests to a language model, its answers in every shape, and what its errors mean."""

import base64

import pytest
from stand_in import chat, completion

from inpars_lib.cli import InputError
from inpars_lib.formats.records import Doc
from inpars_lib.llm.access import Access, check_url, find_secrets, public_url, read_key
from inpars_lib.llm.errors import (
    Action,
    classify_error,
    error_within,
    refused_parameter,
    retired_model_error,
    status_within,
)
from inpars_lib.llm.log_probs import align
from inpars_lib.llm.protocol import AnswerError, ModelApi, ModelConfig, NoLogProbs, read_json
from inpars_lib.llm.server import FIRST_GAP, Server
from inpars_lib.llm.usage import Usage, read_usage

DOC = Doc("d", "doc")


def model(api: str, **config: object) -> ModelApi:
    return ModelApi(ModelConfig("m", **config), api)


# ------------------------------------------------------------------------------------------ answers of every shape


def answer_of(text: str, tokens: list[str], log_probs: list[float]) -> dict:
    return {"choices": [{"text": text, "logprobs": {"tokens": tokens, "token_logprobs": log_probs}}]}


@pytest.mark.parametrize(
    ("text", "tokens", "question", "kept"),
    [
        (" What is X?", [" What", " is", " X", "?"], "What is X?", [0, 1, 2, 3]),
        ("\n\n What?\n\nExample 5:", ["\n\n", " What", "?", "\n\n", "Example", " 5", ":"], "What?", [1, 2]),
        ("What?", ["What", "?", "\n"], "What?", [0, 1]),  # the stop sequence comes among the tokens only
        ("What?", ["What", "?\n\n"], "What?", [0, 1]),  # one token holds the end and the stop sequence
        ("What?\nmore", ["What", "?\nm", "ore"], "What?", [0, 1]),
        ("What?", ["What", "?", "</s>"], "What?", [0, 1]),
        ("What?", ["What", "?", ""], "What?", [0, 1]),  # llama.cpp's last token
        (" What?", ["What", "?"], "What?", [0, 1]),  # sentencepiece tokens lose their leading space
        ("What ", ["What", " "], "What", [0]),
        ("是什么\n", ["是", "什\ufffd", "\ufffd", "\n"], "是什么", [0, 1, 2]),  # vLLM's pieces of a character
        ("a\ufffd", ["a", "bytes:\\xe6\\x98"], "a", [0]),  # the token limit cut a character in two
        ("\u3000是什么?", ["\u3000", "是什么", "?"], "是什么?", [1, 2]),  # whitespace beyond ASCII
        ("🙂?", ["bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "?"], "🙂?", [0, 1, 2]),  # OpenAI's pieces of a character
    ],
)
def test_log_probs_are_those_of_the_question(text: str, tokens: list[str], question: str, kept: list[int]) -> None:
    log_probs = [-(2.0**i) for i in range(len(tokens))]  # every subset has a sum of its own
    row = model("completions").read_answer(answer_of(text, tokens, log_probs), "prompt", Doc("d", "doc"))
    assert row["question"] == question
    assert row["log_probs"] == [log_probs[i] for i in kept]


def test_chat_tokens_come_as_bytes() -> None:
    content = [
        {"token": "\\xe6", "bytes": [230, 152], "logprob": -1.0},
        {"token": "?", "bytes": [175], "logprob": -2.0},
    ]
    answer = {"choices": [{"message": {"content": "是"}, "logprobs": {"content": content}}]}
    assert model("chat").read_answer(answer, "p", DOC)["log_probs"] == [-1.0, -2.0]


def test_tokens_that_do_not_spell_the_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="do not spell"):
        align(b"What is X?", [b"Who", b" is", b" X?"])


@pytest.mark.parametrize(
    ("text", "good", "bad", "kept"),
    [
        (" How far?\nBad Question: Is it far?", "How far?", "Is it far?", 2),
        (" How far? bad question: Is it far?", "How far?", "Is it far?", 2),
        (" How far?", None, None, 0),
        (" How far?\nBad Question:", None, None, 0),
    ],
)
def test_good_and_bad_questions(text: str, good: str | None, bad: str, kept: int) -> None:
    api_model = model("completions", good_bad=True)
    if good is None:
        with pytest.raises(AnswerError, match="no bad question"):
            api_model.read_answer(completion(text), "p", DOC)
        return
    row = api_model.read_answer(completion(text, log_prob=-1.0), "p", DOC)
    assert (row["question"], row["bad_question"]) == (good, bad)
    assert row["log_probs"] == [-1.0 * (i + 1) for i in range(kept)]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_answers_without_a_question(api: str) -> None:
    make, api_model = (chat if api == "chat" else completion), model(api)
    with pytest.raises(AnswerError, match="the answer is empty"):
        api_model.read_answer(make(" \n"), "p", DOC)
    long = make("\n")
    long["choices"][0]["finish_reason"] = "length"
    with pytest.raises(AnswerError, match="raise --max_tokens"):
        api_model.read_answer(long, "p", DOC)
    filtered = make(" something")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    with pytest.raises(AnswerError, match="refused by the model: content filter") as caught:
        api_model.read_answer(filtered, "p", DOC)
    assert caught.value.answer == " something"  # it was paid for
    bare = make(" a question")
    bare["choices"][0]["logprobs"] = None
    with pytest.raises(NoLogProbs):
        api_model.read_answer(bare, "p", DOC)
    without = model(api, no_log_probs=True)
    assert without.read_answer(bare, "p", DOC) == {"doc_id": "d", "doc_text": "doc", "question": "a question"}
    assert "logprobs" not in without.request("p")
    for broken in (None, "text", [], {}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": None}]}):
        with pytest.raises(ValueError, match="no choice in the server"):
            model("chat").read_answer(broken, "p", DOC)


def test_a_refusal_of_the_chat_api() -> None:
    answer = chat("")
    answer["choices"][0]["message"] = {"content": None, "refusal": "I cannot help with that."}
    with pytest.raises(AnswerError, match="refused by the model: I cannot help with that"):
        model("chat").read_answer(answer, "p", DOC)


def test_tokens_are_counted_as_the_server_does() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read_usage({"usage": usage}) == Usage(7, 4, 3)
    for nothing in (None, {}, {"usage": None}, {"usage": {"prompt_tokens_details": None}}, "text"):
        assert read_usage(nothing) == Usage(0, 0, 0)


# ----------------------------------------------------------------------------------------------- refused parameters

RENAME = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def refuse(api_model: ModelApi, message: str, param: str | None = None) -> None:
    """Adapt the parameters to an error 400 with this message."""
    request = api_model.request("p")
    verdict = classify_error(400, {"message": message, "param": param}, {}, request=request, server="s")
    assert verdict.action is Action.ADAPT
    api_model.adapt(verdict.parameter, request, verdict.message)


def test_a_parameter_that_has_another_name_is_renamed(capsys: pytest.CaptureFixture) -> None:
    api_model = model("completions", max_tokens=9)
    refuse(api_model, RENAME)
    assert api_model.parameters["max_completion_tokens"] == 9
    assert "max_tokens" not in api_model.parameters
    assert capsys.readouterr().err.count("max_completion_tokens") == 1
    refuse(api_model, "unknown field max_completion_tokens")  # neither name is taken
    assert not {"max_tokens", "max_completion_tokens"} & set(api_model.parameters)


def test_a_reasoning_model_gets_effort_none() -> None:
    api_model = model("chat")
    refuse(api_model, "Unsupported value: 'temperature' does not support 0 with this model.", "temperature")
    assert api_model.parameters["reasoning_effort"] == "none"
    assert api_model.parameters["temperature"] == 0  # with that, it may be taken
    refuse(api_model, "Unsupported value: 'temperature'", "temperature")
    assert "temperature" not in api_model.parameters
    refuse(api_model, "Unsupported value: 'reasoning_effort' does not support 'none'", "reasoning_effort")
    assert "reasoning_effort" not in api_model.parameters
    with pytest.raises(InputError, match="m: no log-probabilities"):
        refuse(api_model, "You are not allowed to request logprobs from this model")


def test_an_explicit_parameter_is_never_dropped() -> None:
    api_model = model("chat", reasoning_effort="low")
    with pytest.raises(InputError, match="m: no log-probabilities with --reasoning_effort low"):
        refuse(api_model, "logprobs are not supported with reasoning models")
    with pytest.raises(InputError, match="m: --reasoning_effort low was refused"):
        refuse(api_model, "Unrecognized request argument supplied: reasoning_effort")
    with pytest.raises(InputError, match="m: the server cannot repeat the prompt"):
        refuse(model("completions", include_doc_probs=True), "echo is not supported", "echo")


def test_a_parameter_is_adapted_once_for_concurrent_requests() -> None:
    api_model = model("completions", max_tokens=9)
    sent = api_model.request("p")
    api_model.adapt("max_tokens", sent, RENAME)
    api_model.adapt("max_tokens", sent, RENAME)
    assert api_model.parameters["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 64 output tokens (max_tokens)",
        "'max_tokens' or 'max_completion_tokens' is too large: 64.",
        "request (6001 tokens) exceeds the available context size (4096 tokens), try increasing it",
        "your prompt may not stop here",
        "",
    ],
)
def test_errors_about_the_document_change_no_parameter(message: str) -> None:
    for api in ("completions", "chat"):
        verdict = classify_error(400, {"message": message}, {}, request=model(api).request("p"), server="s")
        assert verdict.action is Action.GIVE_UP
        assert verdict.document_only == (message != "" and "stop" not in message)
    assert refused_parameter(model("chat").request("p"), {"message": "no good", "param": "messages"}) is None


def test_the_state_of_an_api_is_restored() -> None:
    api_model, again = model("chat"), model("completions")
    refuse(api_model, "no", "temperature")
    again.restore(api_model.state())
    assert again.request("p") == api_model.request("p")
    assert (again.path, again.refused) == ("/chat/completions", api_model.refused)


def test_names_of_retired_models() -> None:
    for name in ("curie", "davinci", "text-davinci-003", "code-davinci-002", "davinci-002"):
        assert "shut down its GPT-3 models in January 2024" in str(retired_model_error(name)), name
    for name in ("gpt-6-luna", "gpt-5.1", "Qwen/Qwen3-8B", "curiel", "smollm2-135m-instruct"):
        assert retired_model_error(name) is None, name


@pytest.mark.parametrize(
    ("text", "tokens", "spans"),
    [
        ("What is X?", ["What", "is", "X", "?"], [(0, 4), (5, 7), (8, 9), (9, 10)]),  # vLLM before July 2026
        ("What is X?", ["\u2581What", "\u2581is", "\u2581X", "?"], [(0, 4), (4, 7), (7, 9), (9, 10)]),  # SentencePiece
        ("What is X?", ["What", "\u0120is", "\u0120X", "?"], [(0, 4), (4, 7), (7, 9), (9, 10)]),  # byte-level BPE
        ("\u00e9t\u00e9?", ["<0xC3>", "<0xA9>", "t", "\u00e9", "?"], [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]),
        ("\u00e9t\u00e9?", ["", "\u00e9", "t", "", "\u00e9", "?"], [(0, 0), (0, 2), (2, 3), (3, 3), (3, 5), (5, 6)]),
        ("What?", ["", "What", "?"], [(0, 0), (0, 4), (4, 5)]),
        ("What?", ["I", " think", "</think>", "\n\n", "What", "?"], [(0, 0)] * 3 + [(0, 0), (0, 4), (4, 5)]),
        ("What?", ["<|channel|>", "final", "<|message|>", "What", "?"], [(0, 0)] * 3 + [(0, 4), (4, 5)]),
        ("What?", ["analysis", "Hm", "assistant", "final", "What", "?"], [(0, 0)] * 4 + [(0, 4), (4, 5)]),
        ("a\n\nb", ["a", "\n", "b"], [(0, 1), (1, 2), (3, 4)]),
    ],
)
def test_tokens_of_many_spellings_are_located(text: str, tokens: list[str], spans: list[tuple[int, int]]) -> None:
    assert align(text.encode(), [token.encode() for token in tokens]) == spans


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("What is X?", ["What", " was", " X", "?"]),
        ("What is X?", ["token_id:3", "token_id:4"]),
        ("a longer word?", ["\ufffd", "word", "?"]),  # a piece of a character does not spell words
        ("What is X?", ["What", "\ufffd"]),
        ("What?", ["I", " think", "What", "?"]),
        ("What?", ["</think>", "Where", "?"]),
    ],
)
def test_tokens_that_spell_something_else_are_refused(text: str, tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="do not spell its text"):
        align(text.encode(), [token.encode() for token in tokens])


@pytest.mark.parametrize(
    ("text", "tokens", "log_probs", "error"),
    [
        ("What is X?", ["What", " is"], [-1, -1], "its tokens end before its text"),
        ("What?", ["What", "?"], [-1, None], "a token of the answer has no log-probability"),
        ("What?", ["What", "?"], [None, None], "a token of the answer has no log-probability"),
        ("What?", ["What", "?"], [-1, 0.7], "malformed"),
        ("What?", ["What", "?"], [-1, True], "malformed"),
    ],
)
def test_log_probs_that_are_incomplete_or_none_are_refused(
    text: str, tokens: list[str], log_probs: list, error: str
) -> None:
    with pytest.raises(AnswerError, match=error):
        model("completions").read_answer(answer_of(text, tokens, log_probs), "p", DOC)


def test_log_probs_are_those_of_the_line_and_not_of_an_introduction_that_quotes_it() -> None:
    tokens = ["Here is the query", " what is X?", ":", "\n", "what is X?"]
    row = model("completions").read_answer(answer_of("".join(tokens), tokens, [-1, -2, -3, -4, -5]), "p", DOC)
    assert (row["question"], row["log_probs"]) == ("what is X?", [-5])


def test_an_answer_that_does_not_repeat_the_prompt_has_no_document() -> None:
    echo = model("completions", include_doc_probs=True)
    answer = answer_of("What?", ["What", "?"], [-1, -2])
    with pytest.raises(NoLogProbs, match="does not repeat the prompt"):
        echo.read_answer(answer, "Document: doc Query:", DOC)


def test_parts_and_thoughts_of_an_answer() -> None:
    answer = chat("What?")
    message = answer["choices"][0]["message"]
    message["content"] = [{"type": "thinking", "thinking": "hm", "text": "hm"}, {"type": "text", "text": "What?"}]
    assert model("chat").read_answer(answer, "p", DOC)["question"] == "What?"
    message |= {"content": None, "reasoning_content": "hm"}
    with pytest.raises(AnswerError, match=r"only reasoning\. Turn it off"):
        model("chat").read_answer(answer, "p", DOC)
    cut = chat("Okay, the user wants a query about")
    cut["choices"][0]["finish_reason"] = "length"
    with pytest.raises(AnswerError, match="only reasoning"):
        model("chat").read_answer(cut, "p", DOC)


def test_json_of_another_content_type_is_read() -> None:
    assert read_json('{"choices": []}') == {"choices": []}
    assert read_json({"choices": []}) == {"choices": []}
    with pytest.raises(ValueError, match="not JSON: Login of the university"):
        read_json("<html><head><title>Login of the university</title>" + "x" * 1000)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"error": {"code": 429, "message": "slow"}}, 429),
        ({"error": {"code": "rate_limit_exceeded"}, "choices": []}, 429),
        ({"error": {"type": "invalid_api_key"}}, 401),
        ({"error": {"type": "overloaded_error"}}, 503),
        ({"object": "error", "message": "too long", "code": 400}, 400),
        ({"choices": [{"error": {"code": 502}, "finish_reason": "error"}]}, 502),
        ({"error": "Rate limit reached"}, 429),
        ({"status": "ok"}, None),
        ({"choices": [{"text": "What?"}]}, None),
        ("What?", None),
    ],
)
def test_errors_within_answers(answer: object, status: int | None) -> None:
    assert status_within(error_within(answer)) == status


@pytest.mark.parametrize(
    ("status", "said", "advice"),
    [
        (403, "You are not allowed to request logprobs", "Add --no_log_probs"),
        (403, "Country, region, or territory not supported", "Use a key that may do this, or another server"),
        (403, "Project has no access to model gpt-6", "Check --engine"),
        (401, "Incorrect API key provided", "Set API_KEY"),
        (401, "Invalid model name. See /v1/models for the models of your key", "Check --engine"),  # LiteLLM
        (403, "The model m does not give logprobs", "Add --no_log_probs"),
        (401, "", "Set API_KEY"),
    ],
)
def test_advice_fits_the_words_of_the_server(status: int, said: str, advice: str) -> None:
    verdict = classify_error(status, {"message": said}, {}, request={"model": "m"}, server="s")
    assert said in verdict.message
    assert advice in verdict.message


def test_replacements_are_named_where_openai_answers() -> None:
    for server, named in (("OpenAI", True), ("http://localhost:8000/v1", False)):
        verdict = classify_error(404, {"message": "no such model"}, {}, request={"model": "m"}, server=server)
        assert ("Use a current OpenAI model" in verdict.message) == named


@pytest.mark.parametrize(
    ("status", "body", "headers", "action", "words"),
    [
        (401, {"message": "bad key"}, {}, Action.STOP, "s: refused (401 bad key). Set API_KEY to a key that"),
        (403, {"message": "no"}, {}, Action.STOP, "s: refused (403 no). Use a key that may do this"),
        (402, {"message": "pay"}, {}, Action.STOP, "no credit left (pay)"),
        (429, {"message": "quota", "code": "insufficient_quota"}, {}, Action.STOP, "no credit left (quota)"),
        (429, {"message": "slow"}, {"retry-after": "7"}, Action.BACK_OFF, "too many requests (429 slow)"),
        (500, {"message": "oops"}, {}, Action.RETRY, "the server failed (500 oops)"),
        (503, "<html>", {"retry-after-ms": "250"}, Action.RETRY, "the server failed (503 <html>)"),
        (502, "<head><title>502 Bad Gateway</title>", {}, Action.RETRY, "the server failed (502 Bad Gateway)"),
        (408, None, {}, Action.RETRY, "the server failed (408"),
        (400, {"message": "Unknown parameter: 'seed'"}, {}, Action.ADAPT, "Unknown parameter: 'seed'"),
        (422, {"message": "no", "param": "top_p"}, {}, Action.ADAPT, "no"),
        (400, {"message": "maximum context length is 10 tokens"}, {}, Action.GIVE_UP, "context length"),
        (400, {"message": "cannot"}, {}, Action.GIVE_UP, "cannot"),
        (413, None, {}, Action.GIVE_UP, "status 413"),
        (404, {"message": "gone"}, {}, Action.STOP, "status 404 for engine m (gone). Check --engine"),
        (405, {"message": "no"}, {}, Action.STOP, "status 405"),
        (501, {"message": "no"}, {}, Action.STOP, "status 501"),
    ],
)
def test_each_http_error_has_one_verdict(
    status: int, body: object, headers: dict[str, str], action: Action, words: str
) -> None:
    request = model("completions", temperature=0.5).request("p")
    verdict = classify_error(status, body, headers, request=request, server="s")
    assert (verdict.action, verdict.parameter) == (action, {422: "top_p"}.get(status) or verdict.parameter)
    assert words in verdict.message
    assert verdict.wait == {"7": 7.0, "250": 0.25}.get(next(iter(headers.values()), ""))
    switchable = status in (404, 405, 501)
    verdict = classify_error(status, body, headers, request=request, server="s", can_switch_api=True)
    assert verdict.action is (Action.SWITCH_API if switchable else action)


def test_a_message_about_chat_switches_the_api_once() -> None:
    request, body = model("chat").request("p"), {"message": "m has no chat template"}
    for can_switch, action in ((True, Action.SWITCH_API), (False, Action.GIVE_UP)):
        verdict = classify_error(400, body, {}, request=request, server="s", can_switch_api=can_switch)
        assert verdict.action is action


# ---------------------------------------------------------------------------------------------- concurrency of a server


def test_the_limit_falls_after_failures_and_rises_with_answers() -> None:
    server = Server("http://127.0.0.1:9/v1", Access(), 10, 1.0)
    server.on_failure(now=5.0, sent_at=1.0)
    server.on_failure(now=5.1, sent_at=2.0)  # in flight together with the first: counts once
    assert (server.limit, server.failures) == (pytest.approx(7), 1)
    server.on_failure(now=6.0, sent_at=5.5)
    assert (server.limit, server.failures) == (pytest.approx(4.9), 2)
    for _ in range(20):
        server.on_answer()
    assert (server.limit, server.failures) == (pytest.approx(6.9), 0)
    for _ in range(100):
        server.on_answer()
    assert server.limit == 10
    for _ in range(20):
        server.on_failure(now=server.lowered_at + 1, sent_at=server.lowered_at)
    assert server.limit == 1


def test_pauses_grow_without_a_retry_after() -> None:
    server = Server("http://127.0.0.1:9/v1", Access(), 2, 1.0)
    server.on_rate_limit(100.0, 99.0, wait=3.0)
    assert (server.free_capacity(102.9), server.free_capacity(103.0)) == (0.0, 1.0)
    server.on_answer()
    waits = []
    for _ in range(16):
        now = server.resume_at
        server.on_rate_limit(now, now, wait=None)
        server.on_rate_limit(now, now - 1, wait=None)  # a burst counts once
        waits.append(server.resume_at - now)
    assert waits[:3] == [pytest.approx(FIRST_GAP * 2**i) for i in range(3)]
    assert waits[-1] == 60.0


def test_the_gap_between_requests_follows_a_rate_limiter() -> None:
    """Each answer shortens the gap, each refusal for too many requests lengthens it."""
    server = Server("http://127.0.0.1:9/v1", Access(), 8, 1.0)
    now, last, accepted, refused = 0.0, -1.0, 0, 0
    while now < 100:  # at most one request in 0.25 s
        server.on_send(now)
        server.in_flight = 0
        if now - last < 0.25:
            refused += 1
            server.on_rate_limit(now, now, None)
        else:
            accepted, last = accepted + 1, now
            server.on_answer()
        now = max(now + 0.001, server.resume_at)
    assert accepted > 400 / 1.5
    assert refused < accepted / 4
    for _ in range(500):
        server.on_answer()
    assert server.gap == 0


def test_a_server_that_is_down_gets_one_request_at_a_time() -> None:
    server = Server("http://127.0.0.1:9/v1", Access(), 8, 1.0)
    for now in (10.0, 11.0, 12.0):
        assert server.free_capacity(now) == 1.0
        server.on_failure(now, sent_at=now)
    assert server.free_capacity(12.4) == 0.0
    assert server.free_capacity(12.5) == 1.0
    server.in_flight = 1
    assert server.free_capacity(12.5) == 0.0
    server.on_answer()
    assert server.free_capacity(12.5) > 0.0


def test_addresses_are_shown_without_secrets() -> None:
    assert public_url("https://user:sk-1@host:8000/v1?key=sk-2") == "https://host:8000/v1"
    assert public_url(None) == "OpenAI"


@pytest.mark.parametrize(
    "url", ["http://h:abc/v1", "http://::1:80/v1", "127.0.0.1:8000/v1", "ftp://h/v1", "http:///v1"]
)
def test_unusable_addresses(url: str) -> None:
    with pytest.raises(InputError, match="not a server URL"):
        check_url(url)
    for secret in ("https://user:SECRET@host:99999/v1", "user:SECRET@h/v1", "https://h:99999/v1?api-key=SECRET"):
        with pytest.raises(InputError, match="not a server URL") as refused:
            check_url(secret)
        assert "SECRET" not in str(refused.value)
    for good in ("http://[::1]:80/v1", "https://host/v1", "http://user:pw@host:8000/v1"):
        check_url(good)


def test_keys() -> None:
    both = {"API_KEY": " sk-a\n", "OPENAI_API_KEY": "sk-o"}
    assert read_key(both, []) == read_key(both, ["http://h/v1"]) == "sk-a"
    assert read_key({"OPENAI_API_KEY": "sk-o"}, []) == "sk-o"
    assert read_key({"OPENAI_API_KEY": "sk-o"}, ["https://api.openai.com/v1"]) == "sk-o"
    for url in ("https://api.openai.com.evil.net/v1", "https://notopenai.com/v1"):
        assert read_key({"OPENAI_API_KEY": "sk-o"}, [url]) is None


def test_what_is_secret() -> None:
    """Local servers take any key, and a word of a parameter's name must stay readable."""
    assert find_secrets(Access("token"), []) == set()
    address = "https://someone:p%40ssword@host/v1?code=abc%2Fdef&api-version=2024-10-21"
    found = find_secrets(Access("sk-abc", (("X-Key", "Bearer header"),)), [address])
    assert found >= {"sk-abc", "Bearer header", "Bearer", "header", "someone", "p@ssword", "p%40ssword", "abc/def"}
    assert base64.b64encode(b"someone:p@ssword").decode() in found
    assert "2024-10-21" not in found


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("<think>The user wants\na query.</think>\n\nWhat is X?", "What is X?"),
        ("[THINK]The user wants\na query.[/THINK]What is X?", "What is X?"),  # Mistral
        ("<|channel|>analysis<|message|>A query.<|end|><|channel|>final<|message|>What is X?", "What is X?"),
        ("<|start|>assistant<|channel|>final<|message|>What is X?<|return|>", "What is X?"),
        ("analysisThe user wants a query.assistantfinalWhat is X?", "What is X?"),  # without its special tokens
        ("What does <|message|> mean in Harmony?", "What does <|message|> mean in Harmony?"),
        ('Here is a relevant query:\n"What is X?"', "What is X?"),
        ("Sure! Here's a question:\n\nWhat is X?", "What is X?"),
        ("Relevant Query: What is X?", "What is X?"),
        ("What does the error say: 404?", "What does the error say: 404?"),
    ],
)
def test_reasoning_and_introductions_are_no_questions(text: str, question: str) -> None:
    row = model("chat").read_answer(chat(text), "", DOC)
    assert row["question"] == question
    assert 0 < len(row["log_probs"]) <= len(question.split())


@pytest.mark.parametrize(
    "text",
    [
        "The answer to your question is:",
        "<think>I should",
        "[THINK]I should",
        "<|channel|>analysis<|message|>We need a query",
        "<|start|>assistant<|channel|>analysis<|message|>We need a query.<|end|><|start|>assistant<|channel|>final",
        "analysisThe user wants a query",
        "Example 5:",
        "Here is a relevant query:\n",
        "The relevant query is:",  # SmolLM2
    ],
)
def test_answers_that_only_introduce_are_errors(text: str) -> None:
    with pytest.raises(AnswerError, match="only"):
        model("chat").read_answer(chat(text), "", DOC)


@pytest.mark.parametrize(
    "log_probs",
    [
        {"content": [{"token": "What", "logprob": float("-inf")}]},
        {"content": [{"token": "What", "logprob": "-0.5"}]},
        {"content": [{"token": None, "logprob": -0.5}]},
        {"content": [{"token": "What"}]},
        {"tokens": ["What"], "token_logprobs": None},
        {"tokens": ["What"], "token_logprobs": [-0.5, -0.5]},
        [1, 2],
    ],
)
def test_malformed_log_probs_are_one_error(log_probs: object) -> None:
    answer = {"choices": [{"message": {"content": "What"}, "logprobs": log_probs}]}
    with pytest.raises(AnswerError, match="malformed"):
        model("chat").read_answer(answer, "", DOC)


def test_odd_answers() -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is X?"}]
    answer = {"choices": [{"message": {"content": parts}, "logprobs": None}]}
    assert model("chat", no_log_probs=True).read_answer(answer, "", DOC)["question"] == "What is X?"
    failed = {"choices": [{"message": {"content": "What"}, "finish_reason": "error"}]}
    with pytest.raises(ValueError, match="stopped with an error"):
        model("chat").read_answer(failed, "", DOC)
    assert read_usage({"usage": {"prompt_tokens": 3, "prompt_tokens_details": [1]}}) == Usage(3, 0, 0)
