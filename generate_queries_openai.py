"""Stage 1: a language model writes a query for each of many documents of a collection.

Reads   a collection (TSV or JSONL, .gz too) and a prompt with a few examples and the slot {document_text}
Writes  synthetic queries, JSONL: doc_id, doc_text, question, log_probs (natural, one a token of the question)
        beside them OUTPUT.errors.jsonl (documents without a query, and why), OUTPUT.meta.json (settings, tokens)

    export API_KEY=<YOUR_KEY>
    python generate_queries_openai.py --collection data/msmarco/collection.tsv \\
        --output data/msmarco/synthetic_queries.jsonl --dry_run 20        # what will it cost, and is it any good?
    python generate_queries_openai.py --collection data/msmarco/collection.tsv \\
        --output data/msmarco/synthetic_queries.jsonl                     # --batch: half the price, within a day

Any server that speaks OpenAI's API will do, and may need no key: vLLM, llama.cpp, or the one of the demo:

    python demo/serve_llm.py --port 8080 &
    python generate_queries_openai.py --collection collection.tsv --output queries.jsonl \\
        --base_url http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct

Each answer is on disk as soon as it is here. Stopped or killed, the same command goes on where it was.
"""

import argparse
import asyncio
import hashlib
import heapq
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from engine import INSTEAD, SLOT, Engine, retired
from formats import Doc, InputError, read_collection, read_synthetic_queries, run_script
from generation_output import Output
from openai_batch import Batches
from openai_concurrent import Generation

# OpenAI's cheapest current model, and the one it names in place of GPT-4o and GPT-4.1; with reasoning effort `none` it
# takes `logprobs` and `temperature`: https://developers.openai.com/api/docs/guides/deployment-checklist (November 2026)
ENGINE = "gpt-6-luna"
PROMPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "vanilla_prompt.txt")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--collection", required=True, help="documents to write queries for")
    add("--output", required=True, help="synthetic queries; appended to if it is there")
    add("--engine", default=ENGINE, help="model, by the name that the server knows (default: %(default)s)")
    add("--prompt_template", default=PROMPT, help="default: prompts/vanilla_prompt.txt, beside this script")
    add("--max_examples", type=int, default=100_000, help="documents in all (default: %(default)s)")
    add("--max_tokens", type=int, default=64, help="tokens of an answer at most (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy decoding")
    add("--top_p", type=float, default=1.0, help="default: %(default)s")
    add("--reasoning_effort", help="passed on; needed by none: engines that reason are asked not to")
    add("--min_doc_chars", type=int, default=300, help="shorter documents are left out (default: %(default)s)")
    add("--max_doc_chars", type=int, default=100_000, help="longer documents are left out (default: %(default)s)")
    add("--sampling", choices=("random", "first"), default="random", help="how documents are chosen (default: random)")
    add("--seed", type=int, default=1, help="which documents are drawn, and sampling above temperature 0")
    add("--good_bad", action="store_true", help="the prompt asks for a good question and then a bad one")
    add("--include_doc_probs", action="store_true", help="keep the document's log-probabilities too, as doc_log_probs")
    add("--no_log_probs", action="store_true", help="for engines that give none; rows then carry none")

    add = parser.add_argument_group("the server").add_argument
    add("--base_url", nargs="+", metavar="URL", help="server, with its /v1; several share the work (default: OpenAI's)")
    add("--api", choices=("completions", "chat"), help="default: the one that the engine speaks")
    add("--concurrency", type=int, default=8, help="requests under way at a time, at most (default: %(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds for one answer (default: %(default)s)")
    add("--patience", type=float, default=3600.0, help="seconds to wait for a server that went away (default: 3600)")
    add("--sleep_time", type=float, default=0.0, help="seconds of rest after each answer (default: %(default)s)")

    add = parser.add_argument_group("money, and going on").add_argument
    add("--dry_run", type=int, metavar="N", help="ask for N documents, write nothing, project tokens and hours")
    add("--max_total_tokens", type=int, help="stop before in and out together, of all runs on this output, exceed this")
    add("--batch", action="store_true", help="OpenAI's Batch API: half the price, within a day")
    add("--batch_size", type=int, default=50_000, help="requests in a batch at most (default: %(default)s)")
    add(
        "--batch_poll", type=float, default=30.0, help="seconds between two looks at the batches (default: %(default)s)"
    )
    add("--batch_cancel", action="store_true", help="cancel the batches under way and keep what they have answered")
    add("--retry_errors", action="store_true", help="try the documents of OUTPUT.errors.jsonl again")
    add("--force", action="store_true", help="go on although the output was made with other settings")
    args = parser.parse_args()
    if not args.base_url and os.environ.get("OPENAI_BASE_URL"):
        args.base_url = [os.environ["OPENAI_BASE_URL"]]
    for name in ("concurrency", "max_examples", "max_tokens", "dry_run", "max_total_tokens", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} is 1 or more")
    if args.include_doc_probs and (args.api == "chat" or args.no_log_probs):
        parser.error(
            "--include_doc_probs needs log-probabilities and --api completions: chat does not repeat its prompt"
        )
    args.batch = args.batch or args.batch_cancel
    if args.batch and args.max_total_tokens:
        parser.error("--max_total_tokens does not go with --batch, which is paid for as a whole; lower --max_examples")
    if not args.base_url and (what := retired(args.engine)):
        raise InputError(f"engine {args.engine} is retired: {what}; {INSTEAD}")
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


def settings_of(args: argparse.Namespace, template: str) -> dict[str, Any]:
    """What decides the queries. An output is made with one and the same of these, unless --force is given."""
    names = ("engine", "api", "max_tokens", "temperature", "top_p", "reasoning_effort", "seed", "sampling")
    names += ("min_doc_chars", "max_doc_chars", "good_bad", "include_doc_probs", "no_log_probs")
    prompt = {"prompt_sha256": hashlib.sha256(template.encode()).hexdigest()}
    return {name: getattr(args, name) for name in names} | prompt


def draw_of(seed: int) -> Callable[[str], bytes]:
    """The order of a random draw: the smallest hashes of seed and id come first.

    It does not depend on the order of the collection, and a greater draw begins with a smaller one.
    """
    return lambda doc_id: hashlib.blake2b(f"{seed}\t{doc_id}".encode(), digest_size=16).digest()


def choose_documents(args: argparse.Namespace) -> set[str]:
    """The ids of the documents to write queries for. Memory grows with their number, not with the collection."""
    docs = read_collection(args.collection, desc="Choosing documents")
    ids = (doc.doc_id for doc in docs if args.min_doc_chars <= len(doc.text) <= args.max_doc_chars)
    if args.sampling == "first":
        chosen = set(islice(ids, args.max_examples))
    else:
        chosen = set(heapq.nsmallest(args.max_examples, ids, key=draw_of(args.seed)))
    if not chosen:
        raise InputError(
            f"{args.collection}: no document of {args.min_doc_chars} to {args.max_doc_chars} characters; "
            "lower --min_doc_chars or raise --max_doc_chars"
        )
    return chosen


# --------------------------------------------------------------------------------------------------------- at the end


def say_how_good(path: str) -> None:
    """Lengths, log-probabilities, and questions that are worth little, over all rows of an output."""
    lengths: Counter[int] = Counter()
    seen: set[int] = set()
    copied = scored = 0
    log_probs = 0.0
    for row in read_synthetic_queries(path):
        lengths[len(row.question.split())] += 1
        seen.add(hash(row.question.lower()))
        copied += row.question.lower() in row.doc_text.lower()
        if row.log_probs:
            scored += 1
            log_probs += sum(row.log_probs) / len(row.log_probs)
    in_order = (length for length in sorted(lengths) for _ in range(lengths[length]))
    middle = next(islice(in_order, lengths.total() // 2, None))
    print(
        f"questions of {min(lengths)} to {max(lengths)} words, {middle} in the middle; "
        f"{lengths.total() - len(seen):,} asked before, {copied:,} copied from the document"
        + (f"; mean log-probability {log_probs / scored:.3f}" if scored else ""),
        file=sys.stderr,
    )


def project(output: Output, total: int, seconds: float) -> None:
    """What the whole would take, from what a dry run took."""
    asked = output.answers + output.failures
    each = [count / asked for count in output.usage]
    print(f"{asked:,} documents asked for, {output.failures:,} of them without a query; nothing was written")
    print("a document: {:,.0f} tokens in ({:,.0f} of them cached), {:,.1f} out".format(*each))
    print("all {:,}: {:,.0f} tokens in ({:,.0f} of them cached), {:,.0f} out".format(total, *(x * total for x in each)))
    hours = total * seconds / asked / 3600
    print(f"about {hours:,.1f} hours at {asked / seconds:,.2f} documents a second")


def main() -> None:
    args = parse_args()
    template = read_template(args.prompt_template)
    output = Output(None if args.dry_run else args.output, settings_of(args, template), args.force)
    batches = Batches(args.output)
    if batches.open and not args.batch and not args.dry_run:
        raise InputError(
            f"{len(batches.open)} batches of {args.output} are under way: --batch goes on with them, --batch_cancel "
            "cancels them"
        )
    engine = Engine(
        args.engine,
        output.settings["api"] or ("completions" if args.base_url or args.include_doc_probs else "chat"),
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=not args.no_log_probs,
        good_bad=args.good_bad,
        echo=args.include_doc_probs,
        reasoning_effort=args.reasoning_effort,
    )
    if output.request:
        engine.restore(output.request)
    chosen = choose_documents(args)
    total = len(chosen)
    if args.dry_run:
        chosen = set(heapq.nsmallest(args.dry_run, chosen, key=draw_of(args.seed)))
    if args.retry_errors:
        output.failed = set()
    have, failed, bar_total = len(chosen & output.done), len(chosen & output.failed), len(chosen)
    if have or failed:
        print(f"{have + failed:,} of {total:,} documents are done with already", file=sys.stderr)
    chosen -= output.done
    chosen -= output.failed
    output.left = chosen
    output.save()

    def documents(doc_ids: set[str]) -> Iterator[Doc]:
        return read_collection(args.collection, doc_ids)

    started = time.monotonic()
    stopped: BaseException | None = None
    try:
        if (output.left and not args.batch_cancel and not (args.batch and output.request)) or args.dry_run:
            generation = Generation(args, engine, template, documents(output.left), output, bar_total, have + failed)
            asyncio.run(generation.run(only_first=args.batch and not args.dry_run))
        if args.batch and not args.dry_run:
            batches.run(args, engine, output, documents, template)
    except (InputError, KeyboardInterrupt) as error:
        stopped = error
    if args.dry_run:
        if stopped:
            raise stopped
        return project(output, total, time.monotonic() - started)
    if output.done or output.answers:
        say_how_good(args.output)
    print(
        f"tokens: {output.usage_now}"
        + (f"; with the runs before {output.usage}" if output.usage != output.usage_now else ""),
        file=sys.stderr,
    )
    have, failed = have + output.answers, failed + output.failures
    print(
        f"{args.output}: {output.answers:,} queries written now; {have:,} of {total:,} documents have one, "
        f"{failed:,} failed, {total - have - failed:,} are left",
        file=sys.stderr,
    )
    if failed:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in output.reasons().most_common(3))
        print(f"most failed for: {reasons}; --retry_errors tries them again", file=sys.stderr)
    if stopped:
        raise stopped
    if not output.done and not output.answers:
        raise InputError(f"no query was written; {args.output}.errors.jsonl says why")


if __name__ == "__main__":
    run_script(main)
