"""A trained model for others: its card (README.md), which says what it was made of, how good it is and how to use it;
and its way to the Hugging Face hub.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from formats import InputError, in_short

LOADING = {
    "MonoT5": """rerankers.Reranker("MODEL", model_type="t5")
pyterrier_t5.MonoT5ReRanker(model="MODEL", tok_model="MODEL")""",
    "CrossEncoder": """sentence_transformers.CrossEncoder("MODEL")
rerankers.Reranker("MODEL", model_type="cross-encoder")""",
}
CARD = """---
{metadata}
---

# {title}

A reranker trained without labelled queries, by InPars ([Bonifacio et al., 2022](https://arxiv.org/abs/2202.05144)): a
language model wrote a query for each of many documents, BM25 found the negatives, and a model learned to tell them
from the documents.

## Use

    python rerank.py --model MODEL --max_length {max_length} --queries TOPICS --corpus COLLECTION --index INDEX \\
        --output RUN

or, from Python:

```python
{loading}
```

## Settings

| | |
|---|---|
{settings}

## Data

| | file | SHA-256 |
|---|---|---|
{data}

## Figures

{figures}
"""


def figures_of(args: argparse.Namespace, history: list[dict], first_stage: dict[str, float], kept: int) -> str:
    chosen = f"the best by {args.select_by}" if args.select_by else "the last"
    text = f"The weights are those of step {kept:,}, {chosen}."
    evaluation = next((entry for entry in history if entry["step"] == kept and "eval_nDCG@10" in entry), None)
    if evaluation is None:
        return f"{text} No evaluation was asked for."
    source = Path(args.holdout or args.queries).name
    if args.holdout:
        source += ", synthetic queries kept from training, the document of each being its relevant one"
    lines = [
        f"{text} Evaluated on {source}; of each query the first {args.max_eval_docs_per_query:,} hits were reranked.",
        "",
        "| | first stage | reranked |",
        "|---|---:|---:|",
        *(f"| {name} | {old:.4f} | {evaluation[f'eval_{name}']:.4f} |" for name, old in first_stage.items()),
    ]
    return "\n".join(lines)


def model_card(
    args: argparse.Namespace,
    family: str,
    settings: dict[str, Any],
    history: list[dict],
    first_stage: dict[str, float],
    kept: int,
) -> str:
    """The text of the card, with the metadata that the Hugging Face hub reads at its head.

    Args:
        args: of train_t5.py.
        family: `MonoT5` or `CrossEncoder`.
        settings: the Trainer's that are worth showing.
        history: the Trainer's log.
        first_stage: the measures of the run that evaluations rerank; empty without one.
        kept: the step whose weights the model has.
    """
    from huggingface_hub import ModelCardData

    from models import checkpoint_name

    local = os.path.isdir(args.base_model)
    base = Path(args.base_model).name if local else checkpoint_name(args.base_model)
    metadata = ModelCardData(
        base_model=None if local else base,
        library_name="sentence-transformers" if family == "CrossEncoder" else "transformers",
        pipeline_tag="text-ranking",
        tags=["inpars", "reranker", family.lower()],
    )
    shown = {"base model": base, "family": family, "loss": args.loss, "max_length": args.max_length, **settings}
    data = []
    for name in ("triples_train", "holdout", "queries", "qrels", "run"):
        path = getattr(args, name)
        if path and os.path.isfile(path):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            data.append(f"| {name} | {Path(path).name} | `{digest}` |")
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=Path(args.output_dir).resolve().name,
        max_length=args.max_length,
        loading=LOADING[family],
        settings="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
        data="\n".join(data),
        figures=figures_of(args, history, first_stage, kept),
    )


class Repository:
    """A model's repository on the hub, made before training begins: what is wrong with a key shows then.

    It gets the files that it is told of, as `output_dir` may hold collections and triples too. (The Trainer would push
    the whole folder, with a card of its own.)
    """

    def __init__(self, output_dir: str, hub: dict[str, Any]) -> None:
        """
        Args:
            hub: the flags of transformers.TrainingArguments that begin so: hub_model_id, hub_token, ...

        Raises:
            InputError: the hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        self.folder, self.revision = Path(output_dir).resolve(), hub.get("hub_revision")
        # Without the line end that a pasted token brings along, and that an error would quote together with it.
        self.api = HfApi(token="".join((hub.get("hub_token") or "").split()) or None)
        name = hub.get("hub_model_id") or self.folder.name
        with self._one_sentence(f"--push_to_hub: {name} cannot be made or found on the Hugging Face hub"):
            made = self.api.create_repo(name, private=hub.get("hub_private_repo"), exist_ok=True)
            self.name = made.repo_id

    def push(self, files: Sequence[str], message: str) -> str:
        """Upload these files of the folder; the address of the commit.

        Raises:
            InputError: as above; the files stay where they are.
        """
        with self._one_sentence(
            f"the model is in {self.folder}, but could not be pushed to {self.name}; the same command with "
            "--resume_from_checkpoint tries again. The hub said"
        ):
            commit = self.api.upload_folder(
                repo_id=self.name,
                folder_path=self.folder,
                allow_patterns=list(files),
                commit_message=message,
                revision=self.revision,
            )
        return commit.commit_url

    @staticmethod
    @contextmanager
    def _one_sentence(what: str) -> Iterator[None]:
        from huggingface_hub.errors import HTTPError  # its HTTP library's, so that a hub out of reach is one too

        try:
            yield
        except (OSError, ValueError, HTTPError) as error:
            raise InputError(f"{what}: {in_short(error)}") from None
