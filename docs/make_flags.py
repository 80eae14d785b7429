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
