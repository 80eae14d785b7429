"""Training triples on disk (TSV `query<TAB>positive<TAB>negative`), their groups, and the examples of batches."""

import array
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import IO, Any

from inpars_lib.cli import InputError
from inpars_lib.formats.fields import TRIPLE, has_quoted_column, is_header, unquote
from inpars_lib.formats.lines import Block, Form, open_text, read_blocks, read_records, require_file
from inpars_lib.formats.records import Triple
from inpars_lib.formats.roles import check_role
from inpars_lib.training.losses import LOSSES_OF_TRIPLES


class TripleFile(Sequence[Triple]):
    """Training triples that stay on disk. Takes 16 bytes of memory a triple, whatever its length.

    Compressed triples are decompressed into a temporary file, because they cannot be read at random.

    Raises:
        InputError: No line is usable.
    """

    def __init__(self, path: str) -> None:
        require_file(path, "triples are read more than once")
        form = "`query<TAB>positive<TAB>negative`"
        numbers = [number for number, _ in read_records(read_blocks([path]), self._judge, form, path)]
        self._file: IO[bytes] = open(path, "rb")
        with open_text(path) as (raw, file):
            if file is not raw:
                self._file = tempfile.TemporaryFile()
                shutil.copyfileobj(file, self._file)
                self._file.seek(0)
        ends = array.array("q", [0])
        for line in self._file:
            ends.append(ends[-1] + len(line))
        self._spans = array.array("q", (ends[i] for number in numbers for i in (number - 1, number)))

    def _judge(self, block: Block) -> Form[Triple]:
        """Return how to read the file: with a header or without, with cells quoted as in CSV or not."""
        lines = block.head()
        check_role(block.path, lines, ("qrels", "run", "ranks", "ids", "texts", "queries", "pairs"))
        rows = [line.split("\t") for line in lines]
        header = bool(rows) and is_header(rows[0], TRIPLE)
        self._quoted = has_quoted_column(rows[header:])
        return Form(self._parse, int(header))

    def _parse(self, line: str) -> Triple:
        columns = [column.strip() for column in unquote(line, self._quoted).split("\t")]
        if len(columns) != 3 or not all(columns):
            raise ValueError("expected three texts separated by tabs")
        return Triple(*columns)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self._spans[2 * i : 2 * i + 2]
        line = os.pread(self._file.fileno(), end - start, start).decode()
        return self._parse(line.removeprefix("\ufeff").rstrip("\r\n"))


def group_starts(triples: Sequence[Triple]) -> Sequence[int]:
    """Return the first triple of each group, and the number of triples at the end.

    Let n be the most common number of adjacent triples of one query and positive. Each such sequence of triples is
    split into groups of at most n: two equal queries for copies of a document, for example, are two groups.
    """
    sizes = array.array("q", (sum(1 for _ in row) for _, row in groupby(triples, key=lambda triple: triple[:2])))
    counts = Counter(sizes)
    n = max(counts, key=lambda size: (counts[size], size))
    ends = array.array("q", accumulate(sizes, initial=0))
    return array.array("q", [i for start, end in pairwise(ends) for i in range(start, end, n)] + [len(triples)])


class TrainingExamples:
    """Items of training batches: single examples for the pointwise loss, groups of a positive and negatives for others.

    An example is (query, document, relevant or not). A triple has two. `loss` is a name in `LOSSES`.

    Attributes:
        group_size: Examples of a full group, 1 + n.
        item_size: Examples per item: 1 for the pointwise loss, else `group_size`.
    """

    def __init__(self, triples: Sequence[Triple], loss: str = "pointwise") -> None:
        self.triples = triples
        self.starts = range(len(triples) + 1) if loss in LOSSES_OF_TRIPLES else group_starts(triples)
        self.group_size = 1 + max(end - start for start, end in pairwise(self.starts))
        self.item_size = 1 if loss == "pointwise" else self.group_size

    def __len__(self) -> int:
        return (len(self.starts) - 1) * self.group_size // self.item_size

    def items_per_batch(self, examples: int) -> int:
        """Return the items of a batch of `examples` examples.

        Raises:
            InputError: A batch does not consist of whole groups.
        """
        size = self.group_size
        if examples % size:
            raise InputError(
                f"--per_device_train_batch_size {examples}: not a multiple of {size}, the examples of a group (a "
                f"positive and {size - 1} negatives). Use {max(examples // size, 1) * size}."
            )
        return examples // self.item_size

    def group(self, i: int) -> list[tuple[str, str, bool]]:
        """Return the examples of a group, the positive first."""
        triples = [self.triples[j] for j in range(self.starts[i], self.starts[i + 1])]
        return [(*triples[0][:2], True), *((triple.query, triple.negative, False) for triple in triples)]

    def __getitem__(self, i: int) -> list[tuple[str, str, bool]]:
        return self.group(i) if self.item_size > 1 else [self.group(i // 2)[i % 2]]

    def item_lengths(self, i: int) -> dict[int, int]:
        """Return the items of a group with the characters of their longest examples."""
        lengths = [len(query + text) for query, text, _ in self.group(i)]
        return {i: max(lengths)} if self.item_size > 1 else {2 * i: lengths[0], 2 * i + 1: lengths[1]}


class LengthSortedSampler:
    """Groups in random order, the items of each optimizer step sorted by length, longest first.

    Each step has the same examples as without sorting, all examples of its groups, and so the same mean gradient. Its
    batches hold items of similar length, so little is padding.

    Args:
        examples: The examples.
        examples_per_step: Examples of an optimizer step, a multiple of `group_size`.
        seed: Seed of the order.
    """

    def __init__(self, examples: TrainingExamples, examples_per_step: int, seed: int) -> None:
        self.examples, self.groups_per_step = examples, examples_per_step // examples.group_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the order. The Trainer calls this method."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self.examples.starts) - 1))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for start in range(0, len(order), self.groups_per_step):
            lengths: dict[int, int] = {}
            for i in order[start : start + self.groups_per_step]:
                lengths |= self.examples.item_lengths(i)
            yield from sorted(lengths, key=lambda i: -lengths[i])
