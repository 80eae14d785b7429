"""Build the demo's collection: docstrings of installed Python packages as passages, without any download.

    python demo/build_collection.py --output_dir demo/work

Reads   the sources of numpy, pandas, scipy, sklearn and matplotlib, without importing them. requirements-dev.txt pins
        their versions, so every machine and every Python has the same collection.
Writes  collection.tsv  passages: a docstring without its first sentence; the id is the dotted name
        topics.tsv      queries: first sentences of 1,000 docstrings
        qrels.txt       relevance judgements: the passage that each sentence was taken from
"""

import ast
import hashlib
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from inpars_lib.cli import run_script, script_parser
from inpars_lib.files import atomic_write
from inpars_lib.formats.collection import write_texts
from inpars_lib.formats.records import Doc, Topic

PACKAGES = ["numpy", "pandas", "scipy", "sklearn", "matplotlib"]
PASSAGE_CHARS = 600  # longer passages are truncated at a space
MIN_CHARS = 100
TOPICS = slice(0, 1000)  # in the order of their hashes
DEVELOPMENT_TOPICS = slice(1000, 1300)
MIN_TOPIC_WORDS = 5
# Tests, modules that the build of a wheel writes, and numpy.distutils, which only the wheel for Python 3.11 has
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|distutils|__pycache__)(/|$)|(^|/)(test|conftest|__config__|_?version)[^/]*$"
)


def sources() -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, file) of PACKAGES, in a fixed order."""
    for package in PACKAGES:
        folder = Path(sysconfig.get_paths()["purelib"], package)
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder).with_suffix("").as_posix()
            if not SKIPPED.search(relative):
                yield f"{package}.{relative.replace('/', '.')}".removesuffix(".__init__"), path


def docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module and of its public classes and functions."""
    if text := ast.get_docstring(node):
        yield name, text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from docstrings(f"{name}.{child.name}", child)


def passages() -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, first sentence, the rest) of each long docstring. Duplicates of the rest are skipped."""
    seen = set()
    for module, path in sources():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for name, text in docstrings(module, tree):
            sentence, _, rest = re.sub(r"\s+", " ", text).partition(". ")
            rest = rest.strip()
            if len(rest) > PASSAGE_CHARS:
                rest = rest[:PASSAGE_CHARS].rpartition(" ")[0]
            if len(rest) >= MIN_CHARS and rest not in seen:
                seen.add(rest)
                yield name, sentence.strip(), rest


def main(argv: Sequence[str] | None = None) -> None:
    """Write the collection, the topics and the judgements."""
    parser = script_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="folder to write to")
    parser.add_argument("--development", action="store_true", help="write 300 other topics, to choose settings on")
    args = parser.parse_args(argv)

    found: dict[str, tuple[str, str]] = {}
    for name, sentence, rest in passages():
        found.setdefault(name, (sentence, rest))  # the first definition of a name counts
    sentences = Counter(sentence for sentence, _ in found.values())
    eligible = [
        name
        for name, (sentence, _) in found.items()
        if sentences[sentence] == 1 and len(sentence.split()) >= MIN_TOPIC_WORDS and len(sentence) < 200
    ]
    topics = sorted(eligible, key=lambda name: hashlib.sha256(name.encode()).digest())
    topics = topics[DEVELOPMENT_TOPICS if args.development else TOPICS]
    numbered = [(f"q{i}", name) for i, name in enumerate(topics, 1)]
    folder = Path(args.output_dir)
    write_texts(str(folder / "topics.tsv"), (Topic(query_id, found[name][0]) for query_id, name in numbered))
    with atomic_write(str(folder / "qrels.txt")) as file:
        file.writelines(f"{query_id} 0 {name} 1\n" for query_id, name in numbered)
    write_texts(str(folder / "collection.tsv"), (Doc(name, rest) for name, (_, rest) in found.items()))
    print(f"{args.output_dir}: {len(found):,} passages, {len(topics):,} topics", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
