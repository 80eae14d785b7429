"""Measure requests per second of generate_queries_openai.py and of the original script's loop.

    python benchmarks/generate.py

A stand-in for OpenAI answers each request after 300 ms, so concurrency / 0.3 s is the ideal rate. The start of the
process is included. Then the peak memory for two numbers of documents.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PER_CONNECTION = 30  # documents


def serve(latency: float) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, ROOT / "tests/stand_in.py", "--latency", str(latency)]
    server = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    return server, server.stdout.readline().strip()


def write_collection(folder: Path, documents: int) -> Path:
    path = folder / f"collection-{documents}.tsv"
    words = " ".join(f"word{i}" for i in range(55))  # about as long as a passage of MS MARCO
    with path.open("w") as file:
        file.writelines(f"{i}\tdocument{i} {words}\n" for i in range(documents))
    return path


def run(collection: Path, url: str, concurrency: int) -> tuple[float, int]:
    """Return the seconds and the peak memory in KiB of a run."""
    output = collection.parent / "queries.jsonl"
    for path in collection.parent.glob("queries.jsonl*"):
        path.unlink()
    command = [sys.executable, ROOT / "generate_queries_openai.py", "--collection", collection, "--output", output]
    command += ["--base_url", url, "--engine", "m", "--concurrency", concurrency]
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    documents = sum(1 for _ in collection.open())
    assert status == 0 and sum(1 for _ in output.open()) == documents
    return seconds, used.ru_maxrss


def original_loop(url: str, documents: int) -> float:
    """Return the seconds of the original loop: a request, 1.5 s of sleep, the next request."""
    import openai

    client = openai.OpenAI(api_key="none", base_url=url)
    started = time.perf_counter()
    for i in range(documents):
        answer = client.completions.create(
            model="m", prompt=f"Document: document{i} Query:", max_tokens=64, temperature=0, logprobs=1, stop="\n\n"
        )
        json.dumps(answer.choices[0].text)
        time.sleep(1.5)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--documents", type=int, default=5000, help="for the smaller memory measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=float, default=0.3, help="latency of the server in seconds (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server, url = serve(args.latency)
        print("| | documents | requests/s | ideal | share of the ideal |")
        print("|---|---:|---:|---:|---:|")
        few = 20
        rate, ideal = few / original_loop(url, few), 1 / args.latency
        print(f"| the original loop | {few} | {rate:.2f} | {ideal:.1f} | {rate / ideal:.0%} |", flush=True)
        for concurrency in (1, 8, 32, 128, 512):
            ideal = concurrency / args.latency
            documents = PER_CONNECTION * concurrency
            seconds, _ = run(write_collection(folder, documents), url, concurrency)
            rate = documents / seconds
            print(
                f"| concurrency {concurrency} | {documents:,} | {rate:.1f} | {ideal:.1f} | {rate / ideal:.0%} |",
                flush=True,
            )
        server.kill()
        server, url = serve(0.0)
        print("\n| documents | peak memory |\n|---:|---:|")
        for documents in (args.documents, 10 * args.documents):
            _, peak = run(write_collection(folder, documents), url, 32)
            print(f"| {documents:,} | {peak / 1024:.0f} MiB |", flush=True)
        server.kill()


if __name__ == "__main__":
    main()
