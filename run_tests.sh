#!/usr/bin/env bash
# Run the tests. Arguments are passed to pytest: bash run_tests.sh -k filter -x
set -euo pipefail
cd "$(dirname "$0")"
. demo/setup.sh
# Two processes, one thread each. `-n 0` runs all tests in one process, as -s and --pdb need.
export OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -n 2 --dist loadfile "$@"
