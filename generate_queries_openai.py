r"""Stage 1: a language model writes a query for each of many documents of a collection.

Reads   a collection (TSV or JSONL, also compressed) and a prompt with a few examples and the slot {document_text}
Writes  OUTPUT, synthetic queries as JSONL: doc_id, doc_text, question, log_probs (natural, one per query token)
        OUTPUT.errors.jsonl, documents without a query and the reason; OUTPUT.meta.json, settings and token counts

    export API_KEY=<YOUR_KEY>
    python generate_queries_openai.py --collection data/msmarco/collection.tsv \
        --output data/msmarco/synthetic_queries.jsonl --dry_run 20        # prints queries, projects tokens
    python generate_queries_openai.py --collection data/msmarco/collection.tsv \
        --output data/msmarco/synthetic_queries.jsonl                     # with --batch at half the price

Any server with OpenAI's API works: vLLM, llama.cpp, Azure (docs/servers.md). The demo's server needs no key and no GPU:

    python demo/serve_llm.py --port 8080 &
    python generate_queries_openai.py --collection collection.tsv --output queries.jsonl \
        --base_url http://127.0.0.1:8080/v1 --engine smollm2-135m-instruct

Several queries per document, as in Promptagator (arXiv 2209.11755), need sampling: --queries_per_doc 8 --temperature
0.7. Each is a request of its own, called `doc_id#1` to `doc_id#8`. Duplicates of one document are dropped and counted.
Answers are saved as they arrive. Run the same command again to resume.
"""

import argparse
import hashlib
import heapq
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, fields
from functools import partial
from typing import Any

from inpars_lib.cli import (
    InputError,
    at_least,
    between,
    counted,
    duration,
    hide_secrets,
    parse_header,
    report,
    run_script,
    script_parser,
    warn,
)
from inpars_lib.files import check_paths, resolve_output
from inpars_lib.formats.collection import collection_fingerprint, collection_paths, conflicting_texts, read_collection
from inpars_lib.formats.records import Doc
from inpars_lib.llm.access import Access, check_url, find_secrets, read_key
from inpars_lib.llm.batch import BatchRunner, BatchState
from inpars_lib.llm.client import GenerationClient
from inpars_lib.llm.errors import RESUME, retired_model_error
from inpars_lib.llm.prompt import PromptTemplate, read_prompt
from inpars_lib.llm.protocol import ModelApi, ModelConfig, parse_extra_body
from inpars_lib.llm.query_store import QueryStore, RequestKey, summarize_queries
from inpars_lib.llm.server import ClientConfig

# OpenAI's cheapest current model, which it names as the successor of GPT-4o and GPT-4.1. With reasoning effort `none`
# it takes `logprobs` and `temperature`: https://developers.openai.com/api/docs/guides/deployment-checklist (11/2026)
DEFAULT_ENGINE = "gpt-6-luna"
CUT_SHARE = 0.05  # a larger share of answers that end at --max_tokens is worth a warning
SIDECARS = (".errors.jsonl", ".meta.json", ".batches.json")
DEFAULT_PROMPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "vanilla_prompt.txt")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--collection", required=True, help="collection to sample documents from")
    add("--output", required=True, help="synthetic queries to write or to append to, JSONL")
    add("--engine", default=DEFAULT_ENGINE, help="name of the model on the server (default: %(default)s)")
    add("--base_url", nargs="+", metavar="URL", help="base URLs of servers, usually ending in /v1; several "
        "share the documents (default: $OPENAI_BASE_URL, or OpenAI)")  # fmt: skip
    add("--prompt_template", default=DEFAULT_PROMPT, help="prompt file (default: prompts/vanilla_prompt.txt)")
    add("--max_examples", type=at_least(1), default=100_000, help="documents to sample (default: %(default)s)")
    add("--max_tokens", type=at_least(1), default=64, help="tokens per answer (default: %(default)s)")
    add("--min_doc_chars", type=at_least(0), default=300, help="skip shorter documents (default: %(default)s)")
    add("--truncate_doc_chars", type=at_least(1), metavar="N", help="truncate longer documents to N characters in the "
        "prompt, at whitespace where possible; doc_text has the full text (default: no limit)")  # fmt: skip
    add("--dry_run", type=at_least(1), metavar="N", help="send N documents, print queries, project tokens and time")
    add_query_flags(parser.add_argument_group("documents and queries").add_argument)
    add_server_flags(parser.add_argument_group("server").add_argument)
    add_cost_flags(parser.add_argument_group("cost and resuming").add_argument)
    return parser


def add_query_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the sample, of decoding and of what an answer contains."""
    add("--max_doc_chars", type=at_least(1), help="skip longer documents (default: 100000, or no limit with "
        "--truncate_doc_chars)")  # fmt: skip
    add("--sampling", choices=("random", "first"), default="random", help="a random sample, or the first documents")
    add("--seed", type=int, default=1, help="seed of the document sample (default: %(default)s)")
    add("--queries_per_doc", type=at_least(1), default=1, metavar="N", help="queries to request per document "
        "(default: %(default)s)")  # fmt: skip
    add("--temperature", type=at_least(0, float), default=0.0, help="0, the default, is greedy decoding")
    add("--top_p", type=between(0, 1), default=1.0, help="probability mass of nucleus sampling (default: 1)")
    add("--sampling_seed", type=at_least(0), help="seed of decoding above temperature 0; request i of a document "
        "uses SAMPLING_SEED + i - 1 (default: --seed)")  # fmt: skip
    add("--reasoning_effort", help="reasoning effort of the model (default: `none` where log-probabilities need it)")
    add("--good_bad", action="store_true", help="the prompt asks for a good question and then for a bad one, as "
        "prompts/gbq_prompt.txt does; the contrast is to make the good one better, and no later stage uses "
        "bad_question")  # fmt: skip
    add("--include_doc_probs", action="store_true", help="also write the document's log-probabilities, doc_log_probs")
    add("--no_log_probs", action="store_true", help="request no log-probabilities, for models without them")


def add_server_flags(add: Callable[..., Any]) -> None:
    """Add the flags of the server."""
    add("--header", action="append", type=parse_header, default=[], metavar="NAME=VALUE", help="HTTP header of every "
        "request, repeatable; its value is never written or printed")  # fmt: skip
    add("--extra_body", type=parse_extra_body, default={}, metavar="JSON", help="JSON object with further "
        "fields of every request")  # fmt: skip
    add("--system_prompt", default="", metavar="TEXT", help="system message before the prompt; chat API only")
    add("--api", choices=("completions", "chat"), help="API of the model (default: found with the first document)")
    add("--concurrency", type=at_least(1), default=8, help="limit of requests in flight (default: %(default)s)")
    add("--timeout", type=at_least(0.001, float), default=120.0, help="seconds for one answer (default: %(default)s)")
    add("--patience", type=at_least(0, float), default=3600.0, help="seconds without an answer before the run stops "
        "(default: %(default)s)")  # fmt: skip
    add("--sleep_time", type=at_least(0, float), default=0.0, help="seconds to sleep after each answer (default: 0)")


def add_cost_flags(add: Callable[..., Any]) -> None:
    """Add the flags of cost and resuming."""
    add("--max_total_tokens", type=at_least(1), help="stop sending when prompt and completion tokens of all runs "
        "reach this; requests in flight then are still answered, up to --concurrency of them")  # fmt: skip
    add("--batch", action="store_true", help="use OpenAI's Batch API: half the price, within a day")
    add("--batch_size", type=at_least(1), default=50_000, help="limit of requests per batch (default: %(default)s)")
    add("--batch_poll", type=at_least(0, float), default=30.0, help="seconds between two status requests "
        "(default: %(default)s)")  # fmt: skip
    add("--batch_cancel", action="store_true", help="cancel the batches in progress and keep their answers")
    add("--retry_errors", action="store_true", help="try the documents of OUTPUT.errors.jsonl again")
    add("--force", action="store_true", help="append to an output that was made with other settings")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check how they combine."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse would print the end of a header that is not quoted
        flags = ", ".join(word.partition("=")[0] for word in unknown if word.startswith("-"))
        parser.error(f"unrecognized arguments: {flags or 'quote values that have spaces'}")
    if args.include_doc_probs and (args.api == "chat" or args.no_log_probs):
        parser.error("--include_doc_probs needs log-probabilities and --api completions: chat cannot echo its prompt")
    if args.system_prompt and (args.api == "completions" or args.include_doc_probs):
        parser.error("--system_prompt needs --api chat, which cannot give --include_doc_probs")
    if args.system_prompt:
        args.api = "chat"
    if args.include_doc_probs:
        args.api = "completions"
    if args.sampling_seed is None:
        args.sampling_seed = args.seed
    if not (args.max_doc_chars or args.truncate_doc_chars):
        args.max_doc_chars = 100_000
    if args.queries_per_doc > 1 and not args.temperature:
        parser.error("--queries_per_doc above 1 needs a --temperature above 0, such as 0.7: greedy decoding writes the "
                     "same query again")  # fmt: skip
    if (args.batch or args.batch_cancel) and args.max_total_tokens:
        parser.error("--max_total_tokens cannot stop a batch; omit it and lower --max_examples")
    if (args.batch or args.batch_cancel) and len(args.base_url or []) > 1:
        parser.error("--batch uses one server; name one --base_url")
    args.output = resolve_output(args.output)
    inputs = {"--collection": collection_paths(args.collection), "--prompt_template": args.prompt_template}
    outputs = {"--output": args.output}
    outputs |= {f"{args.output}{suffix}": f"{args.output}{suffix}" for suffix in SIDECARS}
    check_paths(inputs, outputs)
    return args


def server_urls(args: argparse.Namespace) -> list[str]:
    """Return the base URLs of --base_url or $OPENAI_BASE_URL, none for OpenAI."""
    if args.base_url:
        return args.base_url
    url = os.environ.get("OPENAI_BASE_URL")
    return [url] if url else []


def server_access(args: argparse.Namespace, urls: Sequence[str]) -> Access:
    """Check addresses, model and key. Return key and headers."""
    for url in urls:
        check_url(url)
    access = Access(read_key(os.environ, urls), tuple(args.header))
    hide_secrets(find_secrets(access, urls))
    if urls:
        return access
    retired = retired_model_error(args.engine)
    if retired:
        raise retired
    if not access.key:
        raise InputError("API_KEY: not set. Run export API_KEY=<YOUR_KEY>, or name another server with --base_url.")
    return access


def settings_of(args: argparse.Namespace, model: ModelConfig, template: PromptTemplate) -> dict[str, Any]:
    """Return everything that decides the queries, for OUTPUT.meta.json. Settings that are not set are absent."""
    settings = asdict(model) | {
        "api": args.api,
        "seed": args.seed,
        "sampling": args.sampling,
        "min_doc_chars": args.min_doc_chars,
        "max_doc_chars": args.max_doc_chars,
        "truncate_doc_chars": args.truncate_doc_chars,
        "prompt": hashlib.sha256(template.text.encode()).hexdigest(),
        "collection": collection_fingerprint(args.collection),
    }
    if model.sampling_seed == args.seed:
        del settings["sampling_seed"]  # earlier versions had one seed
    return {name: value for name, value in settings.items() if value not in (None, "", {})}


def sampling_key(seed: int, doc_id: str) -> bytes:
    """Return a hash of seed and id.

    The random sample is the ids with the smallest hashes. It does not depend on the order of the collection, and a
    larger sample contains a smaller one.
    """
    return hashlib.blake2b(f"{seed}\t{doc_id}".encode(), digest_size=16).digest()


def sample_documents(args: argparse.Namespace) -> set[str]:
    """Return the ids of the documents to write queries for. Memory grows with their number only."""
    longest = args.max_doc_chars or sys.maxsize
    chosen: list[tuple[bytes, str, int, int]] = []  # sort key, id, hash and length of the text
    too_short = too_long = 0
    for doc in read_collection(args.collection, desc="Sampling documents"):
        length = len(doc.text)
        if length < args.min_doc_chars:
            too_short += 1
        elif length > longest:
            too_long += 1
        elif args.sampling == "first":
            chosen.append((b"", doc.doc_id, hash(doc.text), length))
            if len(chosen) == args.max_examples:
                break
        else:
            chosen.append((sampling_key(args.seed, doc.doc_id), doc.doc_id, hash(doc.text), length))
            if len(chosen) == 2 * args.max_examples + 1000:
                chosen.sort()
                del chosen[args.max_examples :]
    if args.sampling == "random":
        chosen.sort()
        del chosen[args.max_examples :]
    sample: dict[str, int] = {}
    for _, doc_id, text_hash, _ in chosen:
        if sample.setdefault(doc_id, text_hash) != text_hash:
            raise conflicting_texts(args.collection, doc_id)
    if too_short:
        documents = counted(too_short, "document")
        report(f"skipped {documents} under {args.min_doc_chars} characters (--min_doc_chars)")
    if too_long:
        report(f"skipped {counted(too_long, 'document')} over {longest:,} characters (--max_doc_chars)")
    if not sample:
        raise InputError(
            f"{args.collection}: no document of {args.min_doc_chars} to {args.max_doc_chars or 'any number of'} "
            "characters. Lower --min_doc_chars or raise --max_doc_chars."
        )
    if args.truncate_doc_chars:
        truncated = sum(length > args.truncate_doc_chars for *_, length in chosen)
        report(f"{truncated:,} of {len(chosen):,} documents are truncated in the prompt")
    return set(sample)


def read_requests(collection: str, keys: Set[RequestKey]) -> Iterator[tuple[Doc, int]]:
    """Yield document and number of each request, those of a document together: they share a prompt."""
    if not keys:
        return
    numbers = defaultdict(list)
    for doc_id, number in keys:
        numbers[doc_id].append(number)
    for doc in read_collection(collection, numbers):
        for number in sorted(numbers[doc.doc_id]):
            yield doc, number


def print_projection(store: QueryStore, total: int, rate: float) -> None:
    """Print what `total` requests would cost, projected from a dry run with this many answers per second."""
    count = len(store.done) + len(store.failed)
    unit = store.unit.removesuffix("s")
    usage = store.usage
    means = [tokens / count for tokens in (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)]
    duplicates = f", {len(store.duplicates):,} with a duplicate" if unit == "request" else ""
    print(f"{counted(count, unit)} sent, {len(store.failed):,} without a query{duplicates}; nothing was written")
    print("per {}: {:,.0f} tokens in ({:,.0f} of them cached), {:,.1f} out".format(unit, *means))
    sums = [mean * total for mean in means]
    print("all {:,}: {:,.0f} tokens in ({:,.0f} of them cached), {:,.0f} out".format(total, *sums))
    print(f"about {duration(total / rate)} at {rate:,.2f} {unit}s per second")
    report_odd_answers(store)


def report_odd_answers(store: QueryStore) -> None:
    """Report how many answers --max_tokens has cut, with a warning if they are many, and repeated bad questions."""
    cut, total = store.usage.cut_answers, len(store.done) + len(store.failed)
    said = f"{cut:,} of {total:,} answers ended at the limit of tokens, --max_tokens"
    if cut > CUT_SHARE * total:
        warn(f"{said}. Raise --max_tokens, or shorten the answers by the prompt.")
    elif cut:
        report(said)
    if store.equal_pairs:
        report(f"bad questions that equal the good one: {store.equal_pairs:,}")


def print_summary(store: QueryStore, wanted: Set[RequestKey], output: str) -> None:
    """Print what this run and all runs on this output have written."""
    if store.answered:
        report(summarize_queries(output))
    before = "" if store.usage == store.usage_now else f"; all runs {store.usage}"
    report(f"tokens: {store.usage_now}{before}")
    report_odd_answers(store)
    done = wanted & store.done
    failed = len(wanted & store.failed)
    left = len(wanted) - len(done) - failed
    answered, documents = {key.doc_id for key in done}, {key.doc_id for key in wanted}
    summary = f"{counted(store.written, 'query')} written; {len(answered):,} of {len(documents):,} documents have one"
    if store.queries_per_doc > 1:
        dropped = counted(len(wanted & store.duplicates), "duplicate")
        summary += f"; of {len(wanted):,} requests, {len(done):,} are answered ({dropped} dropped)"
    report(f"{output}: {summary}, {failed:,} failed, {left:,} are left")
    if failed:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in store.failure_reasons().most_common(3))
        report(f"most common failures: {reasons}; --retry_errors tries them again")


def select_requests(args: argparse.Namespace, store: QueryStore) -> tuple[set[RequestKey], int]:
    """Return the requests of this run, finished ones included, and the number without a dry run's limit."""
    sample = sample_documents(args)
    total = len(sample) * args.queries_per_doc
    if args.dry_run:
        sample = set(heapq.nsmallest(args.dry_run, sample, key=lambda doc_id: sampling_key(args.seed, doc_id)))
    wanted = {RequestKey(doc_id, i + 1) for doc_id in sample for i in range(args.queries_per_doc)}
    finished = wanted & (store.done | store.failed)
    if finished:
        report(f"{len(finished):,} of {total:,} {store.unit} were finished by earlier runs")
    return wanted, total


def client_config(args: argparse.Namespace, urls: Sequence[str], access: Access, api_settled: bool) -> ClientConfig:
    """Return what the flags say about the server."""
    return ClientConfig(
        urls=tuple(urls),
        access=access,
        concurrency=args.concurrency,
        timeout=args.timeout,
        patience=args.patience,
        sleep_time=args.sleep_time,
        max_total_tokens=args.max_total_tokens,
        api_settled=api_settled,
        batch_size=args.batch_size,
        batch_poll=args.batch_poll,
    )


def open_batches(args: argparse.Namespace) -> BatchState:
    """Return the batches in progress, which this run must wait for or cancel."""
    batches = BatchState(args.output)
    if batches.open and not (args.batch or args.batch_cancel or args.dry_run):
        raise InputError(
            f"{args.output}: batches in progress: {len(batches.open)}. Add --batch to wait for them or "
            "--batch_cancel to cancel them."
        )
    return batches


def main(argv: Sequence[str] | None = None) -> None:
    """Sample documents, request a query for each, save the answers."""
    # 1. The prompt, the model and its server
    args = parse_args(argv)
    urls = server_urls(args)
    access = server_access(args, urls)
    template = PromptTemplate(read_prompt(args.prompt_template, args.good_bad), args.truncate_doc_chars)
    model = ModelConfig(**{field.name: getattr(args, field.name) for field in fields(ModelConfig)})

    # 2. The output of earlier runs with the same settings
    settings = settings_of(args, model, template)
    store = QueryStore(None if args.dry_run else args.output, settings, args.force, args.queries_per_doc)
    if args.retry_errors:
        store.failed.clear()
    batches = open_batches(args)
    api = ModelApi(model, store.settings.get("api") or ("completions" if urls else "chat"))
    if store.request:
        api.restore(store.request)

    # 3. The documents, and the requests that have no query yet
    wanted, total = select_requests(args, store)
    left = wanted - store.done - store.failed
    store.save_meta()

    # 4. The queries
    config = client_config(args, urls, access, api_settled=bool(args.api or store.request))
    read_docs = partial(read_requests, args.collection)
    client = GenerationClient(config, api, template, store)
    runner = BatchRunner(config, api, template, batches, store, wanted, read_docs)
    send = partial(client.run, read_docs(left), read_docs(wanted & store.done), len(wanted), len(left))
    started = time.monotonic()
    stopped = None
    try:
        if args.batch_cancel:
            runner.cancel()
        elif args.batch and not args.dry_run:
            if left and not store.request:  # one answer shows the API and the parameters that the model takes
                send(only_first=True)
            runner.run()
        elif left:
            send()
    except (InputError, KeyboardInterrupt) as error:
        stopped = error

    # 5. Say what was written, and why the run stopped
    if stopped and client.trouble:
        report(f"last failure: {client.trouble}")
    if not args.dry_run:
        print_summary(store, wanted, args.output)
    elif not stopped:
        print_projection(store, total, client.rate(time.monotonic() - started))
    store.close()
    if stopped:
        raise stopped
    if not store.done and not args.dry_run:
        raise InputError(f"{args.output}: no query was written. {args.output}.errors.jsonl has the reasons.")


if __name__ == "__main__":
    run_script(main, interrupted=RESUME)
