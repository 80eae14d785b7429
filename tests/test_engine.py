"""What an engine is asked, and what its answers hold, whatever their shape."""

import pytest
from stand_in import chat, completion

from engine import AnswerError, Engine, NoLogProbs, Usage, align, public_url, read_usage, refused_parameter, retired
from formats import Doc, InputError

DOC = Doc("d", "doc")

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
        (" What?", ["What", "?"], "What?", [0, 1]),  # sentencepiece tokens lose their first blank
        ("What ", ["What", " "], "What", [0]),
        ("是什么\n", ["是", "什\ufffd", "\ufffd", "\n"], "是什么", [0, 1, 2]),  # vLLM's pieces of a character
        ("a\ufffd", ["a", "bytes:\\xe6\\x98"], "a", [0]),  # the token limit cut a character in two
        ("\u3000是什么?", ["\u3000", "是什么", "?"], "是什么?", [1, 2]),  # a blank that is not ASCII's
        ("🙂?", ["bytes:\\xf0\\x9f", "bytes:\\x99\\x82", "?"], "🙂?", [0, 1, 2]),  # OpenAI's pieces of a character
    ],
)
def test_log_probs_are_those_of_the_question(text: str, tokens: list[str], question: str, kept: list[int]) -> None:
    log_probs = [-(2.0**i) for i in range(len(tokens))]  # every subset has a sum of its own
    row = Engine("m", "completions").read(answer_of(text, tokens, log_probs), "prompt", Doc("d", "doc"))
    assert row["question"] == question
    assert row["log_probs"] == [log_probs[i] for i in kept]


def test_chat_tokens_come_as_bytes() -> None:
    content = [
        {"token": "\\xe6", "bytes": [230, 152], "logprob": -1.0},
        {"token": "?", "bytes": [175], "logprob": -2.0},
    ]
    answer = {"choices": [{"message": {"content": "是"}, "logprobs": {"content": content}}]}
    assert Engine("m", "chat").read(answer, "p", DOC)["log_probs"] == [-1.0, -2.0]


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
    engine = Engine("m", "completions", good_bad=True)
    if good is None:
        with pytest.raises(AnswerError, match="no bad question"):
            engine.read(completion(text), "p", DOC)
        return
    row = engine.read(completion(text, log_prob=-1.0), "p", DOC)
    assert (row["question"], row["bad_question"]) == (good, bad)
    assert row["log_probs"] == [-1.0 * (i + 1) for i in range(kept)]


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_answers_without_a_question(api: str) -> None:
    make, engine = (chat if api == "chat" else completion), Engine("m", api)
    with pytest.raises(AnswerError, match="the answer is empty"):
        engine.read(make(" \n"), "p", DOC)
    long = make("\n")
    long["choices"][0]["finish_reason"] = "length"
    with pytest.raises(AnswerError, match="raise --max_tokens"):
        engine.read(long, "p", DOC)
    filtered = make(" something")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    with pytest.raises(AnswerError, match="refused by the model: content filter") as caught:
        engine.read(filtered, "p", DOC)
    assert caught.value.answer == " something"  # it was paid for
    bare = make(" a question")
    bare["choices"][0]["logprobs"] = None
    with pytest.raises(NoLogProbs):
        engine.read(bare, "p", DOC)
    without = Engine("m", api, log_probs=False)
    assert without.read(bare, "p", DOC) == {"doc_id": "d", "doc_text": "doc", "question": "a question"}
    assert "logprobs" not in without.request("p")
    for broken in (None, "text", [], {}, {"choices": []}, {"choices": [None]}, {"choices": [{"message": None}]}):
        with pytest.raises(ValueError, match="holds no choice"):
            Engine("m", "chat").read(broken, "p", DOC)


def test_a_refusal_of_the_chat_api() -> None:
    answer = chat("")
    answer["choices"][0]["message"] = {"content": None, "refusal": "I cannot help with that."}
    with pytest.raises(AnswerError, match="refused by the model: I cannot help with that"):
        Engine("m", "chat").read(answer, "p", DOC)


def test_tokens_are_counted_as_the_server_does() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read_usage({"usage": usage}) == Usage(7, 4, 3)
    for nothing in (None, {}, {"usage": None}, {"usage": {"prompt_tokens_details": None}}, "text"):
        assert read_usage(nothing) == Usage(0, 0, 0)


# ----------------------------------------------------------------------------------------------- refused parameters

RENAME = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


def refuse(engine: Engine, message: str, param: str | None = None) -> bool:
    return engine.adapt(engine.request("p"), {"message": message, "param": param})


def test_a_parameter_that_has_another_name_is_renamed(capsys: pytest.CaptureFixture) -> None:
    engine = Engine("m", "completions", max_tokens=9)
    assert refuse(engine, RENAME)
    assert engine.parameters["max_completion_tokens"] == 9
    assert "max_tokens" not in engine.parameters
    assert capsys.readouterr().err.count("max_completion_tokens") == 1
    assert refuse(engine, "unknown field max_completion_tokens")  # neither name is taken
    assert not {"max_tokens", "max_completion_tokens"} & set(engine.parameters)


def test_an_engine_that_reasons_is_asked_not_to() -> None:
    engine = Engine("m", "chat")
    assert refuse(engine, "Unsupported value: 'temperature' does not support 0 with this model.", "temperature")
    assert engine.parameters["reasoning_effort"] == "none"
    assert engine.parameters["temperature"] == 0  # with that, it may be taken
    assert refuse(engine, "Unsupported value: 'temperature'", "temperature")
    assert "temperature" not in engine.parameters
    assert refuse(engine, "Unsupported value: 'reasoning_effort' does not support 'none'", "reasoning_effort")
    assert "reasoning_effort" not in engine.parameters
    with pytest.raises(InputError, match="gives no log-probabilities"):
        refuse(engine, "You are not allowed to request logprobs from this model")


def test_what_the_user_asked_for_is_not_dropped_in_silence() -> None:
    engine = Engine("m", "chat", reasoning_effort="low")
    with pytest.raises(InputError, match="with --reasoning_effort low gives no log-probabilities"):
        refuse(engine, "logprobs are not supported with reasoning models")
    with pytest.raises(InputError, match="refuses --reasoning_effort low"):
        refuse(engine, "Unrecognized request argument supplied: reasoning_effort")
    with pytest.raises(InputError, match="does not repeat its prompt"):
        refuse(Engine("m", "completions", echo=True), "echo is not supported", "echo")


def test_two_requests_that_were_refused_for_the_same_parameter_change_it_once() -> None:
    engine = Engine("m", "completions", max_tokens=9)
    sent = engine.request("p")
    assert engine.adapt(sent, {"message": RENAME})
    assert engine.adapt(sent, {"message": RENAME})
    assert engine.parameters["max_completion_tokens"] == 9


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
def test_what_is_about_the_document_is_about_no_parameter(message: str) -> None:
    for api in ("completions", "chat"):
        assert refused_parameter(Engine("m", api).request("p"), {"message": message}) is None
    assert refused_parameter(Engine("m", "chat").request("p"), {"message": "no good", "param": "messages"}) is None


def test_how_an_engine_is_asked_is_kept() -> None:
    engine, again = Engine("m", "chat"), Engine("m", "completions")
    refuse(engine, "no", "temperature")
    again.restore(engine.as_dict())
    assert again.request("p") == engine.request("p")
    assert (again.path, again.refused) == ("/chat/completions", engine.refused)


def test_names_of_retired_engines() -> None:
    for name in ("curie", "davinci", "text-davinci-003", "code-davinci-002", "gpt-3.5-turbo", "gpt-4", "davinci-002"):
        assert "shut" in retired(name), name
    for name in ("gpt-6-luna", "gpt-5.1", "Qwen/Qwen3-8B", "curiel", "smollm2-135m-instruct"):
        assert retired(name) is None, name


def test_an_address_is_shown_without_what_is_secret() -> None:
    assert public_url("https://user:sk-1@host:8000/v1?key=sk-2") == "https://host:8000/v1"
    assert public_url(None) == "OpenAI"
