"""First-stage runs of synthetic queries, whose query ids are the lines of the input counted from 0."""

import re
from collections.abc import Sequence

from inpars_lib.cli import InputError, warn
from inpars_lib.formats import read_run
from inpars_lib.records import ScoredDoc
from inpars_lib.text_lines import count_lines


def read_run_of_lines(path: str, source: str, k: int) -> dict[int, Sequence[ScoredDoc]]:
    """Return the first `k` hits of a run by line of the synthetic queries.

    Args:
        path: The run.
        source: The synthetic queries.
        k: Hits per query.

    Raises:
        InputError: A query id of the run is no line of `source`.
    """
    run, lines = read_run(path, desc="Reading the run"), count_lines(source)
    for query_id in run:
        if not re.fullmatch("0|[1-9][0-9]{,17}", query_id) or int(query_id) >= lines:
            raise InputError(
                f"{path}: the query id {query_id} is no line of {source}, which has the lines 0 to {lines - 1}. Pass a "
                "run of these queries, with the line, counted from 0, as the query id."
            )
    if (longest := max(map(len, run.values()))) < k:
        warn(f"{path}: has at most {longest} hits per query. Ranks {longest + 1} to {k} are not searched.")
    return {int(query_id): run.pop(query_id)[:k] for query_id in list(run)}
