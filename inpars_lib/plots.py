"""Every figure of the pipeline."""

from collections import Counter
from collections.abc import Mapping

from inpars_lib.files import atomic_write


def plot_gains(path: str, before: Mapping[str, float], after: Mapping[str, float], measure: str) -> None:
    """Plot each query's gain over the first stage, in descending order, as PNG.

    Args:
        path: File to write.
        before: First-stage value by query id.
        after: Reranked value by query id.
        measure: Name of the measure.
    """
    from matplotlib.figure import Figure

    gains = sorted((after[query_id] - value for query_id, value in before.items()), reverse=True)
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(gains)), gains, width=1.0, color=["tab:green" if gain > 0 else "tab:red" for gain in gains])
    axes.axhline(0, color="0.3", linewidth=0.8)
    mean = sum(gains) / len(gains)
    axes.axhline(mean, color="tab:blue", linestyle=":", label=f"mean {mean:+.4f}")
    axes.set(xlabel=f"queries: {won:,} won, {len(gains) - won - lost:,} tied, {lost:,} lost")
    axes.set(ylabel=f"gain in {measure} over the first stage", ylim=(-1.05, 1.05))
    axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def plot_histogram(
    path: str, all_bins: Counter[int], kept: Counter[int], width: float, cutoff: float, name: str
) -> None:
    """Plot the histogram of the scores, kept and dropped, with the cutoff, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for bins, color, label in ((all_bins, "0.75", "dropped"), (kept, "tab:blue", "kept")):
        axes.bar([i * width for i in bins], list(bins.values()), width, align="edge", color=color, label=label)
    axes.axvline(cutoff, color="tab:red", label=f"cutoff at {cutoff:.3f}")
    axes.set(xlabel=name, ylabel="synthetic queries")
    axes.legend()
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
