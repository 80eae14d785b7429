"""What the figures say, read from the figure that is about to be saved."""

import io
from collections import Counter
from typing import Any

import pytest

from inpars_lib import plots


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of the figures that were saved."""
    saved: list[Any] = []
    save = plots._save

    def keep(figure: Any, file: Any) -> None:
        save(figure, file)
        saved.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return saved


def whole(ticks: Any) -> bool:
    return all(float(tick).is_integer() for tick in ticks)


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_gains_name_the_best_and_the_worst_queries(figures: list[Any]) -> None:
    before = {f"q{i}": 0.5 for i in range(9)} | {"$tied_": 0.5}
    after = {f"q{i}": 0.5 + (4 - i) / 10 for i in range(9)} | {"$tied_": 0.5}
    plots.plot_gains(io.BytesIO(), before, after, "nDCG@10")
    [axes] = figures[0].axes
    assert texts(axes) == [
        "best\nq0 +0.400\nq1 +0.300\nq2 +0.200\nq3 +0.100\n$tied_ +0.000",
        "worst\nq4 +0.000\nq5 -0.100\nq6 -0.200\nq7 -0.300\nq8 -0.400",
    ]
    assert axes.get_xlabel() == "queries: 4 won, 2 tied, 4 lost"
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0, 0, -0.1, -0.2, -0.3, -0.4]
    )
    assert whole(axes.get_xticks())


def test_odd_ids_are_text(figures: list[Any]) -> None:
    ids = ["$x^{", "q" * 100, "\u00e9"]
    plots.plot_gains(io.BytesIO(), dict.fromkeys(ids, 0.0), dict.fromkeys(ids, 0.5), "RR")
    assert f"{'q' * plots.ID_CHARS} +0.500" in texts(figures[0].axes[0])[0]


@pytest.mark.parametrize(("kept", "cut"), [({0: 2}, True), ({0: 2, 1: 1}, False)])
def test_a_cutoff_where_something_was_cut(figures: list[Any], kept: dict[int, int], cut: bool) -> None:
    plots.plot_histogram(io.BytesIO(), Counter({0: 2, 1: 1}), Counter(kept), 0.5, -0.25, "score")
    [axes] = figures[0].axes
    labels = axes.get_legend_handles_labels()[1]
    assert ("cutoff at -0.250" in labels) == cut == ("dropped" in labels)
    assert bool(axes.lines) == cut
    assert whole(axes.get_yticks())


def test_a_short_last_window_is_not_drawn(figures: list[Any]) -> None:
    losses = [(10, 0.9), (20, 0.7), (30, 0.6)]
    for last, drawn in (((33, 0.1), losses), ((40, 0.5), [*losses, (40, 0.5)])):
        plots.plot_learning_curve(io.BytesIO(), [*losses, last], [], {})
        line = figures[-1].axes[0].lines[0]
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == drawn
    plots.plot_learning_curve(io.BytesIO(), [(10, 0.9), (12, 0.1)], [], {})
    assert list(figures[-1].axes[0].lines[0].get_xdata()) == [10, 12]
    assert whole(figures[-1].axes[0].get_xticks())


def test_evaluations_stand_beside_the_loss(figures: list[Any]) -> None:
    rows = [{"step": 10, "nDCG@10": 0.4, "MRR@10": None}, {"step": 20, "nDCG@10": 0.5, "MRR@10": None}]
    plots.plot_learning_curve(io.BytesIO(), [(10, 0.9), (20, 0.7)], rows, {"nDCG@10": 0.3, "MRR@10": 0.2})
    panel = figures[0].axes[1]
    assert panel.get_legend_handles_labels()[1] == ["nDCG@10", "nDCG@10, first stage"]
    assert list(panel.lines[0].get_ydata()) == [0.4, 0.5]
