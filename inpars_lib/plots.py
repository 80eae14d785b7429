"""Every figure of the pipeline, as PNG."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED_QUERIES = 5  # best and worst queries whose ids are printed
ID_CHARS = 24  # of a printed id
CURVES = ("nDCG@10", "MRR@10")  # of a learning curve, or the first two measures if one of these is missing


def _new_figure(width: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4), layout="constrained")


def _whole_numbers(axis: Any) -> None:
    """Label an axis of counts with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _save(figure: "Figure", file: IO[bytes]) -> None:
    figure.savefig(file, format="png", dpi=150)


def plot_gains(file: IO[bytes], before: Mapping[str, float], after: Mapping[str, float], measure: str) -> None:
    """Plot each query's gain over the first stage, in descending order, with the ids of the best and the worst.

    Args:
        file: Where to write.
        before: First-stage value by query id.
        after: Reranked value by query id.
        measure: Name of the measure.
    """
    gain = {query_id: after[query_id] - value for query_id, value in before.items()}
    ids = sorted(gain, key=lambda query_id: (-gain[query_id], query_id))
    gains = [gain[query_id] for query_id in ids]
    won, lost = sum(value > 0 for value in gains), sum(value < 0 for value in gains)
    mean = sum(gains) / len(gains)
    figure = _new_figure(width=7)
    axes = figure.add_subplot()
    colors = ["tab:green" if value > 0 else "tab:red" for value in gains]
    axes.bar(range(1, len(gains) + 1), gains, width=1.0, color=colors)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.axhline(mean, color="tab:blue", linestyle=":", label=f"mean {mean:+.4f}")
    axes.set(xlabel=f"queries: {won:,} won, {len(gains) - won - lost:,} tied, {lost:,} lost")
    axes.set(ylabel=f"gain in {measure} over the first stage", ylim=(-1.05, 1.05))
    _whole_numbers(axes.xaxis)
    # The bars fall from the upper left to the lower right, so the other two corners are free.
    named = [f"{query_id[:ID_CHARS]} {gain[query_id]:+.3f}" for query_id in ids]
    best, worst = "\n".join(["best", *named[:NAMED_QUERIES]]), "\n".join(["worst", *named[-NAMED_QUERIES:]])
    style: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 8, "parse_math": False}
    axes.text(0.99, 0.98, best, ha="right", va="top", **style)
    axes.text(0.01, 0.02, worst, ha="left", va="bottom", **style)
    axes.legend(loc="upper center")
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
    layers = [(kept, "tab:blue", "kept")]
    if kept.total() < scored.total():
        layers.insert(0, (scored, "0.75", "dropped"))
        axes.axvline(cutoff, color="tab:red", label=f"cutoff at {cutoff:.3f}")
    for bins, color, label in layers:
        axes.bar([i * width for i in bins], list(bins.values()), width, align="edge", color=color, label=label)
    axes.set(xlabel=name, ylabel="synthetic queries")
    _whole_numbers(axes.yaxis)
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
        losses: Step and mean training loss since the step before. A shorter last window is not drawn.
        evaluations: `step` and measures of each evaluation, None for a measure that is not available.
        first_stage: Measures of the first stage, drawn as lines.
    """
    if len(losses) > 2 and losses[-1][0] - losses[-2][0] < losses[1][0] - losses[0][0]:
        losses = losses[:-1]  # the mean of a shorter window, which falls or rises for no reason
    figure = _new_figure(width=10 if evaluations else 5)
    panels = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    panels[0].plot(*zip(*losses, strict=True))
    panels[0].set(xlabel="step", ylabel="training loss")
    for panel in panels:
        _whole_numbers(panel.xaxis)
    names = CURVES if first_stage.keys() >= set(CURVES) else list(first_stage)[:2]
    for name, color in zip(names, ("tab:blue", "tab:orange"), strict=False):
        points = [(row["step"], row[name]) for row in evaluations if row[name] is not None]
        if points:
            panels[1].plot(*zip(*points, strict=True), "o-", color=color, label=name)
            panels[1].axhline(first_stage[name], linestyle=":", color=color, label=f"{name}, first stage")
            panels[1].set(xlabel="step")
            panels[1].legend()
    _save(figure, file)
