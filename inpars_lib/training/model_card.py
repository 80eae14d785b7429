"""The card of a trained model (README.md): its settings, its data, its results and how to load it."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inpars_lib.evaluation import format_value
from inpars_lib.files import file_sha256

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

A reranker trained without labelled queries, by InPars ([Bonifacio et al., 2022](https://arxiv.org/abs/2202.05144)). A
language model wrote a query for each of many documents. A first stage such as BM25 retrieved the negatives.

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

## Results

{results}
"""


@dataclass(frozen=True)
class CardInfo:
    """What a card says.

    Attributes:
        output_dir: The model's folder, whose name is the title.
        base_model: Folder or hub name of the base model.
        family: `MonoT5` or `CrossEncoder`.
        max_length: Tokens per pair.
        settings: Training settings by name.
        data: Files by flag. Missing files and None are skipped.
        step: The step of the weights.
        select_by: The measure that chose the step, or None if the step is the last.
        history: The Trainer's log.
        first_stage: Measures of the dev set's run; empty without an evaluation.
        dev_name: Name of the dev set's file.
        held_out: The dev set is synthetic queries.
        max_docs: Hits per query that were reranked.
    """

    output_dir: str
    base_model: str
    family: str
    max_length: int
    settings: Mapping[str, Any]
    data: Mapping[str, str | None]
    step: int
    select_by: str | None = None
    history: Sequence[Mapping[str, Any]] = ()
    first_stage: Mapping[str, float] = field(default_factory=dict)
    dev_name: str = ""
    held_out: bool = False
    max_docs: int = 0


def model_card(info: CardInfo) -> str:
    """Return the text of the card, with the metadata that the Hugging Face hub reads at its head."""
    from huggingface_hub import ModelCardData

    from inpars_lib.rerankers.load import checkpoint_name

    local = os.path.isdir(info.base_model)
    base = Path(info.base_model).name if local else checkpoint_name(info.base_model)
    metadata = ModelCardData(
        base_model=None if local else base,
        library_name="sentence-transformers" if info.family == "CrossEncoder" else "transformers",
        pipeline_tag="text-ranking",
        tags=["inpars", "reranker", info.family.lower()],
    )
    settings = {"base model": base, "family": info.family, "max_length": info.max_length, **info.settings}
    files = {flag: path for flag, path in info.data.items() if path and os.path.isfile(path)}
    data = [f"| {flag} | {Path(path).name} | `{file_sha256(path)}` |" for flag, path in files.items()]
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=Path(info.output_dir).resolve().name,
        max_length=info.max_length,
        loading=LOADING[info.family],
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        data="\n".join(data),
        results=_results(info),
    )


def _results(info: CardInfo) -> str:
    chosen = f"the best by {info.select_by}" if info.select_by else "the last"
    text = f"The weights are from step {info.step:,}, {chosen}."
    at_step = (entry for entry in info.history if entry["step"] == info.step)
    evaluation = next((entry for entry in at_step if any(f"eval_{name}" in entry for name in info.first_stage)), None)
    if evaluation is None:
        return f"{text} The model was not evaluated during training."
    source = info.dev_name
    if info.held_out:
        source += " (synthetic queries held out from training; the source document of each is the relevant one)"
    lines = [
        f"{text} Evaluated on {source}, reranking the first {info.max_docs:,} hits of each query.",
        "",
        "| | first stage | reranked |",
        "|---|---:|---:|",
        *(
            f"| {name} | {format_value(old)} | {format_value(evaluation.get(f'eval_{name}', math.nan))} |"
            for name, old in info.first_stage.items()
        ),
    ]
    return "\n".join(lines)
