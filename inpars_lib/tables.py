"""Tables as text, Markdown, LaTeX or CSV, and a CSV file of each query's values."""

import argparse
import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import IO, Any

from inpars_lib.cli import printable
from inpars_lib.files import resolve_output

FORMATS = ("text", "markdown", "latex", "csv")
MARKDOWN = re.compile(r"[\\|*_`<]")
LATEX_ESCAPES = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {character: f"\\{character}" for character in "&%$#_{}"}
)


def file_name(word: str) -> str:
    """Return the name of a file that is not standard output, where the table is printed (an argparse type)."""
    if not word or resolve_output(word) == "-":
        raise argparse.ArgumentTypeError("expected a file, because the table is on standard output")
    return word


def add_table_flags(add: Callable[..., Any]) -> None:
    """Add --format and --per_query with the `add_argument` of a parser."""
    add("--format", choices=FORMATS, default="text", help="of the printed table (default: %(default)s)")
    add(
        "--per_query",
        type=file_name,
        metavar="CSV",
        help="file to write with the measures of each judged query and run",
    )


def _one_line(cell: str) -> str:
    """Return a cell without line breaks and control characters. The name of a run may have any."""
    return " ".join(printable(cell).split()).encode(errors="replace").decode()


def format_table(rows: Sequence[Sequence[str]], form: str, names: int = 1) -> str:
    """Return a table in one of `FORMATS`.

    Args:
        rows: Cells of each row, as many in each; the first row is the header.
        form: The format. LaTeX needs the package booktabs.
        names: How many columns, from the left, hold names. They are left-aligned, the others right-aligned.
    """
    rows = [[_one_line(cell) for cell in row] for row in rows]
    numbers = len(rows[0]) - names
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().rstrip("\n")
    if form == "markdown":
        lines = ["| " + " | ".join(MARKDOWN.sub(r"\\\g<0>", cell) for cell in row) + " |" for row in rows]
        return "\n".join([lines[0], "|" + "---|" * names + "---:|" * numbers, *lines[1:]])
    if form == "latex":
        lines = [" & ".join(cell.translate(LATEX_ESCAPES) for cell in row) + r" \\" for row in rows]
        begin = r"\begin{tabular}{" + "l" * names + "r" * numbers + "}"
        return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:names], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[names:], widths[names:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    return "\n".join(lines)


def write_per_query(file: IO[str], runs: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> None:
    """Write the values of named runs, {measure: {query id: value}}, as CSV: a row per run and query, NaN as empty."""
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["run", "query_id", *runs[0][1]])
    for name, values in runs:
        for query_id in next(iter(values.values())):
            found = [per_query[query_id] for per_query in values.values()]
            rows.writerow([_one_line(name), query_id, *("" if math.isnan(value) else value for value in found)])


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends of paths that tell different paths apart: their file names, if these differ."""
    parts = [PurePath(path).parts for path in paths]
    for kept in range(1, max(map(len, parts))):
        names = [str(PurePath(*part[-kept:])) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(PurePath(*part)) for part in parts]
