#!/usr/bin/env bash
# Run the tests. Arguments are passed to pytest: bash run_tests.sh -k filter -x
set -euo pipefail
cd "$(dirname "$0")"
. demo/setup.sh
exec "$PYTHON" -m pytest "$@"
