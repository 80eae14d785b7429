"""The card of a trained model (README.md): its settings, its data, its results and how to load it."""

import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from inpars_lib.evaluation import format_value
from inpars_lib.rerankers.checkpoint import checkpoint_name
from inpars_lib.training.checkpoints import TrainingRecord

if TYPE_CHECKING:
    from inpars_lib.rerankers.base import Reranker
    from inpars_lib.training.trainer import RerankerTrainer

# Other packages do not find the target words in a model. PyTerrier puts "Relevant:" behind the padding of a batch, so
# each document needs a batch of its own.
LOADING = {
    "MonoT5": """rerankers.Reranker("MODEL", model_type="t5", token_true="{true}", token_false="{false}")
ranker = pyterrier_t5.{ranker}(model="MODEL", tok_model="MODEL", batch_size=1)
ranker.REL, ranker.NREL = ranker.tokenizer.convert_tokens_to_ids(["{true}", "{false}"])""",
    "CrossEncoder": """sentence_transformers.CrossEncoder("MODEL")
rerankers.Reranker("MODEL", model_type="cross-encoder")""",
    "CausalReranker": """from inpars_lib.rerankers.load import load_reranker

load_reranker("MODEL").score([(query, document), ...])""",
}
HUB_CACHE = re.compile(r"/models--([^/]+)/snapshots/")
TITLE = re.compile(r"(?:---\n.*?\n---\n)?\s*# +(\S[^\n|]*?) *(\n|$)", re.DOTALL)  # after the metadata
CARD = """---
{metadata}
---

# {title}

A reranker trained without labelled queries, by InPars ([Bonifacio et al., 2022](https://arxiv.org/abs/2202.05144)).
{query_model} wrote a query for each of many documents. A first stage such as BM25 retrieved the negatives.

## Use

    python rerank.py --model MODEL --queries TOPICS --corpus COLLECTION --index INDEX --output RUN

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


def model_card(record: TrainingRecord, trainer: "RerankerTrainer", query_model: str | None = None) -> str:
    """Return the text of the card, with the metadata that the Hugging Face hub reads at its head.

    Args:
        record: Settings and data of the training.
        trainer: The Trainer after the training.
        query_model: Name of the language model that wrote the queries.
    """
    from huggingface_hub import ModelCardData

    base_model, on_hub = _base_model(record.settings["base_model"])
    family = type(trainer.reranker).__name__
    metadata = ModelCardData(
        base_model=base_model if on_hub else None,
        library_name="sentence-transformers" if family == "CrossEncoder" else "transformers",
        pipeline_tag="text-ranking",
        tags=["inpars", "reranker", family.lower()],
    )
    shown = {**record.settings, "base_model": base_model, "family": family, "steps": trainer.state.max_steps}
    rows = []
    for name, value in shown.items():
        if isinstance(value, str) and os.path.exists(value):
            rows.append(f"| {name} | {Path(value).name} |")  # no folder of this machine
        elif value is not None:
            rows.append(f"| {name} | {value} |")
    return CARD.format(
        metadata=metadata.to_yaml(),
        title=Path(str(trainer.args.output_dir)).resolve().name,
        query_model=query_model or "A language model",
        loading=_loading(trainer.reranker),
        settings="\n".join(rows),
        data="\n".join(f"| {flag} | {file.name} | `{file.sha256}` |" for flag, file in record.data.items()),
        results=_results(record, trainer),
    )


def _base_model(given: str) -> tuple[str, bool]:
    """Return the name of a base model and whether the hub knows it by this name.

    A folder in the hub's cache has the name in its path. Another folder may have it as the title of its README.md.
    """
    if not os.path.isdir(given):
        return checkpoint_name(given), True
    folder = Path(given).resolve()
    if cached := HUB_CACHE.search(str(folder)):
        return cached[1].replace("--", "/"), True
    with suppress(OSError, UnicodeDecodeError):
        if title := TITLE.match((folder / "README.md").read_text(encoding="utf-8")):
            return title[1], False
    return folder.name, False


def _loading(reranker: "Reranker") -> str:
    config = reranker.model.config
    true, false = getattr(config, "answers", None) or ("", "")
    ranker = "MonoT5ReRanker" if config.model_type == "t5" else "mT5ReRanker"
    code = LOADING[type(reranker).__name__]
    return code.format(true=true, false=false, ranker=ranker)


def _results(record: TrainingRecord, trainer: "RerankerTrainer") -> str:
    select_by = record.settings["select_by"]
    chosen = f"the best by {select_by}" if select_by else "the last"
    text = f"The weights are from step {trainer.chosen_step:,}, {chosen}."
    measured = {
        name: value
        for entry in trainer.state.log_history
        if entry["step"] == trainer.chosen_step
        for name, value in entry.items()
        if name.startswith("eval_")
    }
    if not measured:
        return f"{text} The model was not evaluated during training."
    if "holdout" in record.data:
        source = record.data["holdout"].name
        source += " (synthetic queries held out from training; the source document of each is the relevant one)"
    else:
        source = record.data["queries"].name
    rows = []
    for name, before in trainer.first_stage.items():
        after = measured.get(f"eval_{name}", math.nan)
        rows.append(f"| {name} | {format_value(before)} | {format_value(after)} |")
    hits = record.settings["max_eval_docs_per_query"]
    return "\n".join(
        [
            f"{text} Evaluated on {source}, reranking the first {hits:,} hits of each query.",
            "",
            "| | first stage | reranked |",
            "|---|---:|---:|",
            *rows,
        ]
    )
