"""Collections: TSV, JSON or a folder of such files, or `ir_datasets:NAME`."""

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import chain

from inpars_lib.cli import InputError
from inpars_lib.files import atomic_write
from inpars_lib.formats.fields import (
    DOC_ID,
    DOC_TEXT,
    judge_columns,
    parse_id,
    parse_text,
    single_line,
    tsv_line,
)
from inpars_lib.formats.folders import OTHER_FILES, collection_files
from inpars_lib.formats.ir_dataset import download_errors, ir_dataset
from inpars_lib.formats.lines import Block, Blocks, Form, read_blocks, read_records
from inpars_lib.formats.records import Doc, Topic
from inpars_lib.formats.roles import check_role

FORM = "`doc_id<TAB>text`, or a JSON object with an id (`id`, ...) and a text (`contents`, ...)"
REFUSED = ("qrels", "run", "topics", "queries")
TOPIC_WORDS = 12  # texts of topics are shorter, on average
UNDECIDED = (b"{", b'"', b"")  # beginnings of lines whose id is known only after parsing


def collection_paths(path: str | None) -> list[str]:
    """Return the files of a collection, none of `ir_datasets:NAME` or without a collection."""
    return [] if path is None or path.startswith("ir_datasets:") else collection_files(path)


def collection_fingerprint(path: str) -> str:
    """Return a hash of the sizes and of the first and last 64 KiB of a collection's files."""
    digest = hashlib.sha256()
    if path.startswith("ir_datasets:"):
        digest.update(path.encode())
        return digest.hexdigest()
    for name in collection_files(path):
        with open(name, "rb") as file:
            size = os.path.getsize(name)
            digest.update(f"{size}\n".encode() + file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()


def _judge(block: Block) -> Form[Doc]:
    """Return how to read a file of documents."""
    lines = block.head()
    check_role(block.path, lines, REFUSED)
    words = sum(len(line.split()) - 1 for line in lines)
    if OTHER_FILES.search(os.path.basename(block.path)) and words < TOPIC_WORDS * len(lines):
        action = "Name the collection with --corpus, or rename the file if this is one"
        raise InputError(f"{block.path}: by its name and its short texts, this file holds no documents. {action}.")
    columns, header = judge_columns(lines, DOC_ID, DOC_TEXT)
    return Form(partial(parse_text, ids=DOC_ID, texts=DOC_TEXT, columns=columns), header)


def _without_others(blocks: Blocks, wanted: Collection[str]) -> Blocks:
    """Yield the blocks without the lines of documents that are not wanted, which takes less time than to parse them."""
    for block in blocks:
        if block.is_first:  # tells how to read the file
            yield block
            continue
        lines = [
            (number, line)
            for number, line in block.lines
            if line.partition(b"\t")[0].decode(errors="replace") in wanted or line[:1] in UNDECIDED or b"\t" not in line
        ]
        yield block._replace(lines=lines, omitted=len(block.lines) - len(lines))


def _ir_documents(path: str, desc: str | None) -> Iterator[Doc]:
    """Yield the documents of `ir_datasets:NAME`."""
    from tqdm import tqdm

    dataset = ir_dataset(path, "docs")
    with download_errors(path):
        docs, total = iter(dataset.docs_iter()), dataset.docs_count()
        first = next(docs, None)  # downloads the data set
    for doc in tqdm(chain([first] if first else [], docs), desc=desc, total=total, unit=" docs", disable=desc is None):
        try:
            yield Doc(parse_id(doc.doc_id), single_line(doc.default_text()))
        except ValueError as error:
            raise InputError(f"{path}: {error}. Choose another data set.") from None


def _read_docs(path: str, wanted: Collection[str] | None, desc: str | None) -> Iterator[Doc]:
    """Yield the documents of a collection. Some that are not wanted are skipped early."""
    if path.startswith("ir_datasets:"):
        yield from _ir_documents(path, desc)
        return
    blocks = read_blocks(collection_files(path), desc)
    if wanted is not None:
        blocks = _without_others(blocks, wanted)
    for _, doc in read_records(blocks, _judge, FORM, path):
        yield doc


def conflicting_texts(path: str, doc_id: str) -> InputError:
    """Return the error for an id that two lines give different texts."""
    return InputError(f"{path}: the id {doc_id} is on two lines with different texts. Delete one of them.")


def missing_documents(corpus: str, absent: int, total: int, example: str) -> InputError:
    """Return the error for hits whose documents are not in the collection."""
    return InputError(
        f"{corpus}: {absent:,} of the {total:,} documents to score are not in this collection ({example} for example). "
        "Pass the collection of the run or of the index with --corpus."
    )


def read_collection(
    path: str, wanted: Collection[str] | None = None, desc: str | None = None, repeats: bool = False
) -> Iterator[Doc]:
    """Yield the documents of a collection in file order.

    Args:
        path: File, folder or `ir_datasets:NAME`.
        wanted: Ids of the documents to yield, each once; None for every line.
        desc: Label of a progress bar, or None for no bar.
        repeats: Yield every line of a wanted id, however often it is repeated.

    Raises:
        InputError: No line is usable, or a wanted id is on two lines with different texts.
    """
    seen: dict[str, int] = {}
    for doc in _read_docs(path, wanted, desc):
        if wanted is None or (repeats and doc.doc_id in wanted):
            yield doc
        elif doc.doc_id in wanted:
            if doc.doc_id not in seen:  # a repeated line is one document
                seen[doc.doc_id] = hash(doc.text)
                yield doc
            elif seen[doc.doc_id] != hash(doc.text):
                raise conflicting_texts(path, doc.doc_id)


def read_texts(path: str, wanted: Collection[str], desc: str | None = None) -> dict[str, str]:
    """Return the texts of the wanted documents by id, in one pass that keeps no other text in memory."""
    return {doc.doc_id: doc.text for doc in read_collection(path, wanted, desc)}


def write_texts(path: str, texts: Iterable[Doc | Topic]) -> None:
    """Write a collection or topics as TSV."""
    with atomic_write(path) as file:
        file.writelines(tsv_line(*text) for text in texts)
