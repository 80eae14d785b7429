#!/usr/bin/env bash
# The tests: bash run_tests.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "$0")"
. demo/setup.sh
exec "$PYTHON" -m pytest "$@"
