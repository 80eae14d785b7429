"""Print docs/flags.md, the flags of every script, from the parsers.

python docs/make_flags.py > docs/flags.md
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

SCRIPTS = ("generate_queries_openai", "filter_queries_by_score", "generate_triples_train", "train_t5", "rerank")
HEAD = """# Flags of the scripts

Printed by `python docs/make_flags.py` from the scripts themselves; `python SCRIPT --help` says the same.
`train_t5.py` passes every other flag to
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer).
`python -m inpars_lib.bm25 index --help`, `search --help` and `python -m inpars_lib.evaluation --help` list the flags of
the two other commands.

The original scripts chose most names, so some mean different things in different stages:

| name | meaning |
|---|---|
| `--collection`, `--corpus` | the collection, in stage 1 and in the other stages |
| `--queries`, `--topics` | topics, in the stages and in `inpars_lib.bm25 search` |
| `--seed` | stage 1: documents (decoding: `--sampling_seed`); 3: negatives, held-out queries; 4: training |
| `--max_tokens` | stage 1: limit of an answer; stage 2: drop longer queries |
| `--top_k` | stage 2: queries to keep; stage 5: hits to rerank |
| `--max_hits`, `--max_eval_docs_per_query`, `--hits` | hits per query, in stages 3 and 4 and in `bm25 search` |
| `--holdout` | stage 3: a number of queries; stages 4 and 5: the file of these queries |
| `--dry_run` | stage 1: sends N requests, which are billed; stage 5: sends nothing |
"""


def table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the rows of a parser's table."""
    formatter = argparse.HelpFormatter("")
    for action in parser._actions:
        if action.dest == "help":
            continue
        value = "" if action.nargs == 0 else f" {formatter._format_args(action, action.dest.upper())}"
        if action.choices:
            value = f" {{{','.join(map(str, action.choices))}}}"
        meaning = formatter._expand_help(action)
        yield f"| `{', '.join(action.option_strings)}{value}` | {meaning}{'; required' if action.required else ''} |"


def reference() -> str:
    """Return the text of docs/flags.md."""
    lines = [HEAD]
    for script in SCRIPTS:
        lines += [f"## {script}.py\n", "| flag | meaning |", "|---|---|"]
        lines += [*table(importlib.import_module(script).build_parser()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
