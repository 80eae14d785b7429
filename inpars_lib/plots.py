"""Every figure of the pipeline, as PNG."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = ("nDCG@10", "MRR@10")  # of a learning curve, or the first two measures if one of these is missing


def _new_figure(width: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4), layout="constrained")


def _save(figure: "Figure", file: IO[bytes]) -> None:
    figure.savefig(file, format="png", dpi=150)


def plot_gains(file: IO[bytes], before: Mapping[str, float], after: Mapping[str, float], measure: str) -> None:
    """Plot each query's gain over the first stage, in descending order.

    Args:
        file: Where to write.
        before: First-stage value by query id.
        after: Reranked value by query id.
        measure: Name of the measure.
    """
    gains = sorted((after[query_id] - value for query_id, value in before.items()), reverse=True)
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    mean = sum(gains) / len(gains)
    figure = _new_figure(width=7)
    axes = figure.add_subplot()
    axes.bar(range(len(gains)), gains, width=1.0, color=["tab:green" if gain > 0 else "tab:red" for gain in gains])
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.axhline(mean, color="tab:blue", linestyle=":", label=f"mean {mean:+.4f}")
    axes.set(xlabel=f"queries: {won:,} won, {len(gains) - won - lost:,} tied, {lost:,} lost")
    axes.set(ylabel=f"gain in {measure} over the first stage", ylim=(-1.05, 1.05))
    axes.legend()
    _save(figure, file)


def plot_histogram(
    file: IO[bytes], scored: Counter[int], kept: Counter[int], width: float, cutoff: float, name: str
) -> None:
    """Plot the histogram of the scores of synthetic queries, with the cutoff.

    Args:
        file: Where to write.
        scored: Number of queries by bin.
        kept: Number of queries above the cutoff by bin.
        width: Width of a bin.
        cutoff: Lowest score that was kept.
        name: Name of the scoring function.
    """
    figure = _new_figure(width=7)
    axes = figure.add_subplot()
    for bins, color, label in ((scored, "0.75", "dropped"), (kept, "tab:blue", "kept")):
        axes.bar([i * width for i in bins], list(bins.values()), width, align="edge", color=color, label=label)
    axes.axvline(cutoff, color="tab:red", label=f"cutoff at {cutoff:.3f}")
    axes.set(xlabel=name, ylabel="synthetic queries")
    axes.legend()
    _save(figure, file)


def plot_learning_curve(
    file: IO[bytes],
    losses: Sequence[tuple[int, float]],
    evaluations: Sequence[Mapping[str, Any]],
    first_stage: Mapping[str, float],
) -> None:
    """Plot the training loss and, if there are any, the measures of the evaluations.

    Args:
        file: Where to write.
        losses: Step and training loss.
        evaluations: `step` and measures of each evaluation, None for a measure that is not available.
        first_stage: Measures of the first stage, drawn as lines.
    """
    figure = _new_figure(width=10 if evaluations else 5)
    panels = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    panels[0].plot(*zip(*losses, strict=True))
    panels[0].set(xlabel="step", ylabel="training loss")
    names = CURVES if first_stage.keys() >= set(CURVES) else list(first_stage)[:2]
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        points = [(row["step"], row[name]) for row in evaluations if row[name] is not None]
        if points:
            panels[1].plot(*zip(*points, strict=True), "o-", color=color, label=name)
            panels[1].axhline(first_stage[name], linestyle=":", color=color, label=f"{name}, first stage")
            panels[1].set(xlabel="step")
            panels[1].legend()
    _save(figure, file)
