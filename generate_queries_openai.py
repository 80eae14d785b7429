"""Stage 1: a language model writes a query for each of many documents of a collection.

Reads   a collection (TSV or JSONL, .gz too) and a prompt with a few examples and the slot {document_text}
Writes  synthetic queries, JSONL: doc_id, doc_text, question, log_probs (natural, one a token of the question)

    export API_KEY=<YOUR_KEY>
    python generate_queries_openai.py --collection data/msmarco/collection.tsv \\
        --output data/msmarco/synthetic_queries.jsonl --engine gpt-5.1

Any server that speaks OpenAI's API will do, and may need no key: vLLM, llama.cpp, or the one of the demo:

    python demo/serve_llm.py --port 8080 &
    python generate_queries_openai.py --collection collection.tsv --output queries.jsonl \\
        --base_url http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct

Each answer is on disk as soon as it is here. Stopped or killed, the same command goes on where it was.
"""

import argparse
import asyncio
import fcntl
import hashlib
import heapq
import os
import re
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from formats import (
    Doc,
    InputError,
    json_line,
    read_collection,
    read_synthetic_queries,
    repair_last_line,
    run_script,
    warn,
)

PROMPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "vanilla_prompt.txt")
SLOT = "{document_text}"
STOP = "\n\n"  # the examples of a prompt have an empty line between them, so the model writes one after its question
MAX_RETRIES = 6  # of a request, by the client: on no connection, 408, 409, 429, 5xx
TIMEOUT = 600.0  # seconds for one answer
RETIRED = re.compile(r"(text-|code-)?(ada|babbage|curie|davinci)(-.*)?|gpt-3\.5-.*|gpt-4(-.*)?")
GARBLED = "\ufffd".encode()
HOPELESS = 5  # documents refused one after the other, and none answered, before we take it that none will be


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--collection", required=True, help="documents to write queries for")
    add("--output", required=True, help="synthetic queries; appended to if it is there")
    add("--engine", required=True, help="model, by the name that the server knows")
    add("--prompt_template", default=PROMPT, help="default: prompts/vanilla_prompt.txt, beside this script")
    add("--max_examples", type=int, default=100_000, help="documents in all (default: %(default)s)")
    add("--max_tokens", type=int, default=64, help="tokens of an answer at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy decoding")
    add("--top_p", type=float, default=1.0, help="default: %(default)s")
    add("--min_doc_chars", type=int, default=300, help="shorter documents are left out (default: %(default)s)")
    add("--max_doc_chars", type=int, default=100_000, help="longer documents are left out (default: %(default)s)")
    add("--sleep_time", type=float, default=0.0, help="seconds a worker waits after an answer (default: %(default)s)")
    add("--good_bad", action="store_true", help="the prompt asks for a good question and then a bad one")
    add("--include_doc_probs", action="store_true", help="keep the document's log-probabilities too, as doc_log_probs")
    add("--base_url", default=os.environ.get("OPENAI_BASE_URL"), help="server, with its /v1 (default: OpenAI's)")
    add("--api", choices=("completions", "chat"), help="default: chat at OpenAI, completions at a --base_url")
    add("--concurrency", type=int, default=8, help="requests under way at a time (default: %(default)s)")
    add("--seed", type=int, default=1, help="which documents are drawn, and sampling above temperature 0")
    add("--sampling", choices=("random", "first"), default="random", help="how documents are chosen (default: random)")
    args = parser.parse_args()
    args.api = args.api or ("completions" if args.base_url else "chat")
    if args.concurrency < 1 or args.max_examples < 1 or args.max_tokens < 1:
        parser.error("--concurrency, --max_examples and --max_tokens are 1 or more")
    if args.include_doc_probs and args.api == "chat":
        parser.error("--include_doc_probs needs --api completions: a chat server does not repeat its prompt")
    args.key = os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")
    if not args.key and not args.base_url:
        parser.error("no key: export API_KEY=<YOUR_KEY> for OpenAI, or name a server that needs none with --base_url")
    return args


def read_template(path: str) -> str:
    with open(path, encoding="utf-8-sig") as file:
        try:
            template = file.read().rstrip()  # an editor's last line end would have the model start on a new line
        except UnicodeDecodeError:
            raise InputError(f"{path}: not valid UTF-8; save it as that") from None
    if SLOT not in template:
        raise InputError(f"{path}: no {SLOT} in it; write that where the document belongs")
    return template


def choose_documents(args: argparse.Namespace) -> set[str]:
    """The ids of the documents to write queries for. Memory grows with their number, not with the collection.

    A random draw takes the smallest hashes of seed and id: it does not depend on the order of the collection, and a
    greater --max_examples adds to it.
    """

    def draw(doc_id: str) -> bytes:
        return hashlib.blake2b(f"{args.seed}\t{doc_id}".encode(), digest_size=16).digest()

    docs = read_collection(args.collection, desc="Choosing documents")
    ids = (doc.doc_id for doc in docs if args.min_doc_chars <= len(doc.text) <= args.max_doc_chars)
    first = args.sampling == "first"
    chosen = set(islice(ids, args.max_examples) if first else heapq.nsmallest(args.max_examples, ids, key=draw))
    if not chosen:
        raise InputError(
            f"{args.collection}: no document of {args.min_doc_chars} to {args.max_doc_chars} characters; "
            "lower --min_doc_chars or raise --max_doc_chars"
        )
    return chosen


# ------------------------------------------------------------------------------------------- one answer of the model


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


def read_choice(choice: dict[str, Any]) -> tuple[str, list[bytes], list[float | None]]:
    """Text, tokens and log-probabilities of an answer, from any of the three shapes that servers give.

    Raises:
        InputError: the answer has no log-probabilities.
    """
    text = (choice["text"] if "text" in choice else choice["message"].get("content")) or ""
    text = text.encode(errors="replace").decode()  # half a surrogate pair, which JSON can hold and UTF-8 cannot
    log_probs = choice.get("logprobs") or {}
    if content := log_probs.get("content"):  # chat; llama.cpp's completions too
        tokens = [
            bytes(t["bytes"]) if t.get("bytes") is not None else t["token"].encode(errors="replace") for t in content
        ]
        return text, tokens, [t["logprob"] for t in content]
    if log_probs.get("tokens"):  # completions, OpenAI and vLLM
        tokens = [
            token.removeprefix("bytes:").encode("latin-1").decode("unicode_escape").encode("latin-1")
            if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token)  # OpenAI's spelling of a piece of a character
            else token.encode(errors="replace")
            for token in log_probs["tokens"]
        ]
        return text, tokens, log_probs["token_logprobs"]
    if text.strip():
        raise InputError(
            "the server's answer has no log-probabilities, which the filter needs; use an engine that gives them"
        )
    return text, [], []


def read_answer(choice: dict[str, Any], prompt: str, doc: Doc, good_bad: bool, echo: bool) -> dict[str, Any]:
    """The row of a document: the question is the answer's first line, `log_probs` are those of its tokens alone.

    Raises:
        ValueError: the tokens do not spell the answer.
    """
    text, tokens, log_probs = read_choice(choice)
    whole, prompt_bytes, doc_bytes = (part.encode().lstrip() for part in (text, prompt, doc.text))
    offset = len(prompt_bytes) if echo else 0
    answer = whole[offset:].decode(errors="replace")
    bad_question = ""
    if good_bad:  # without its second half the answer did not follow the prompt, and neither half is trusted
        answer, _, bad_question = re.sub(r"(?i)bad question:", "\0", answer, count=1).partition("\0")
        answer, bad_question = (answer, first_line(bad_question)) if bad_question.strip() else ("", "")
    question = first_line(answer)
    row = {"doc_id": doc.doc_id, "doc_text": doc.text, "question": question, "log_probs": []}
    if good_bad:
        row["bad_question"] = bad_question
    if not question:
        return row
    spans = align(whole, tokens)

    def within(start: int, part: bytes) -> list[float]:
        end = start + len(part)
        return [p for (s, e), p in zip(spans, log_probs, strict=True) if s < end and e > start and p is not None]

    row["log_probs"] = within(whole.index(question.encode(), offset), question.encode())
    if echo:
        row["doc_log_probs"] = within(prompt_bytes.rindex(doc_bytes), doc_bytes)
    return row


def first_line(text: str) -> str:
    # A token limit may have cut a character in two.
    return text.strip().partition("\n")[0].rstrip("\ufffd \t\r")


# -------------------------------------------------------------------------------------------------- many of them


class Generation:
    """The run over all documents: `--concurrency` workers take them one by one and append what comes back."""

    def __init__(self, args: argparse.Namespace, template: str, docs: Iterator[Doc], todo: int, done: int) -> None:
        import openai
        from tqdm import tqdm

        self.args, self.template, self.docs = args, template, docs
        # A local server wants no key, but the client does. Without ours it would look for one of its own.
        self.client = openai.AsyncOpenAI(
            api_key=args.key or "none", base_url=args.base_url, max_retries=MAX_RETRIES, timeout=TIMEOUT
        )
        self.bar = tqdm(desc="Generating", total=todo + done, initial=done, unit=" docs", smoothing=0.05)
        self.written = self.empty = self.refused = 0
        self.stopping: Exception | None = None  # no further document is sent; those under way are waited for

    async def run(self, output: Any) -> None:
        self.output = output
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt)
        await asyncio.gather(*(self.worker() for _ in range(self.args.concurrency)))
        self.bar.close()
        if self.stopping:
            raise self.stopping

    def interrupt(self) -> None:
        if isinstance(self.stopping, InputError):  # the second time
            os._exit(130)
        warn("Stopping: waiting for the answers under way. Ctrl-C again leaves at once and loses them.")
        self.stopping = InputError("stopped by Ctrl-C; every answer is kept, and the same command goes on from here")

    async def worker(self) -> None:
        import openai

        while not self.stopping:
            try:
                doc = next(self.docs, None)
                if doc is None:
                    return
                prompt = self.template.replace(SLOT, doc.text)
                choice = await self.ask(prompt)
                row = read_answer(choice, prompt, doc, self.args.good_bad, self.args.include_doc_probs)
            except (openai.BadRequestError, openai.UnprocessableEntityError, ValueError) as error:
                self.refuse(doc, error)
            except (openai.OpenAIError, InputError) as error:
                self.stopping = self.stopping or (error if isinstance(error, InputError) else self.explain(error))
            else:
                self.append(row)
                await asyncio.sleep(self.args.sleep_time)

    async def ask(self, prompt: str) -> dict[str, Any]:
        args = self.args
        request = {"model": args.engine, "temperature": args.temperature, "top_p": args.top_p}
        if args.temperature > 0:
            request["seed"] = args.seed
        if args.api == "chat":
            messages = [{"role": "user", "content": prompt}]
            response = await self.client.chat.completions.create(
                messages=messages, max_completion_tokens=args.max_tokens, logprobs=True, top_logprobs=1, **request
            )
        else:
            request |= {"prompt": prompt, "max_tokens": args.max_tokens, "stop": STOP, "logprobs": 1}
            response = await self.client.completions.create(echo=args.include_doc_probs, **request)
        if not getattr(response, "choices", None):
            raise ValueError("the server's answer holds no choice")
        return response.choices[0].model_dump()

    def append(self, row: dict[str, Any]) -> None:
        self.output.write(json_line(row))
        self.output.flush()
        self.written += 1
        self.empty += not row["question"]
        self.bar.update()
        if self.written & (self.written - 1) == 0:  # at powers of two, as upstream
            warn(f"\nDocument: {row['doc_text'][:500]}\nQuestion: {row['question']}\n")

    def refuse(self, doc: Doc, error: Exception) -> None:
        self.refused += 1
        reason = self.clean(error)
        if self.refused <= 3:
            warn(f"document {doc.doc_id}: {reason}")
        if self.refused >= HOPELESS and not self.written and not self.stopping:
            self.stopping = InputError(f"the first {self.refused} documents failed, so the others will too: {reason}")

    def clean(self, error: Exception) -> str:
        """What the server said, in one line and without the key, should it quote that."""
        body = getattr(error, "body", None)
        text = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(text or error).split())[:300]
        return text.replace(self.args.key, "<key>") if self.args.key else text

    def explain(self, error: Exception) -> InputError:
        """The one sentence for an error that no other document will be spared."""
        import openai

        engine, server = self.args.engine, self.args.base_url or "OpenAI"
        kept = "every answer so far is kept, and the same command goes on from here"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return InputError(
                f"{server} did not accept the key ({error.status_code}); set API_KEY to one that is valid there"
            )
        if isinstance(error, openai.NotFoundError) and RETIRED.fullmatch(engine):
            return InputError(
                f"engine {engine} is retired: OpenAI has shut down the GPT-3, GPT-3.5 and GPT-4 models, and {server} "
                "has none of that name; use --engine gpt-5.1 --api chat, or an open model behind vLLM (--base_url "
                "http://HOST:8000/v1 --engine ITS_NAME), or the demo's local server (python demo/serve_llm.py --port "
                "8080, then --base_url http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct)"
            )
        if isinstance(error, openai.NotFoundError):
            return InputError(
                f"{server} answers 404 for engine {engine} on its {self.args.api} API ({self.clean(error)}); check "
                "--engine, --api, and that --base_url ends as the server wants it, mostly in /v1"
            )
        if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
            return InputError(f"{server} says that the account has no credit left; {kept}")
        if isinstance(error, openai.APITimeoutError):
            return InputError(f"{server} gave no answer in {TIMEOUT:.0f} s, {MAX_RETRIES + 1} times in a row; {kept}")
        if isinstance(error, openai.APIConnectionError):
            return InputError(f"{server} cannot be reached; check --base_url and that it runs; {kept}")
        return InputError(f"{server} failed {MAX_RETRIES + 1} times in a row ({self.clean(error)}); {kept}")


def main() -> None:
    args = parse_args()
    template = read_template(args.prompt_template)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    with open(args.output, "a", encoding="utf-8", errors="replace") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{args.output}: another process is writing to it; wait for it, or stop it") from None
        repair_last_line(args.output)
        chosen = choose_documents(args)
        done = {row.doc_id for row in read_synthetic_queries(args.output)} if os.path.getsize(args.output) else set()
        todo = chosen - done
        if len(todo) < len(chosen):
            print(f"{len(chosen) - len(todo):,} of {len(chosen):,} documents have their query already", file=sys.stderr)

        def docs() -> Iterator[Doc]:
            for doc in read_collection(args.collection, frozenset(todo)):
                if doc.doc_id in todo:  # not a second time, should the collection repeat a line
                    todo.remove(doc.doc_id)
                    yield doc

        generation = Generation(args, template, docs(), len(todo), len(chosen) - len(todo))
        if todo:
            asyncio.run(generation.run(output))
    print(
        f"{args.output}: {generation.written:,} queries written now, {generation.empty:,} of them empty; "
        f"{len(chosen) - len(done & chosen) - generation.written:,} of {len(chosen):,} documents have none yet",
        file=sys.stderr,
    )
    if generation.refused:
        warn(f"{generation.refused:,} documents were refused or answered badly; the same command tries them again")
        if not generation.written:
            raise InputError("no query was written")


if __name__ == "__main__":
    run_script(main)
