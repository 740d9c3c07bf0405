"""What the page of a probe shows of many classes."""

import numpy as np

from ssl_geo import figures
from ssl_geo.reporting import probing


def test_a_page_of_255_classes_charts_the_most_frequent_and_lists_all():
    """Its confusion matrix had 65,025 percentages and took minutes to draw; the probe seemed to hang."""
    names, rng = [f"class {k}" for k in range(255)], np.random.default_rng(0)
    counts = rng.integers(0, 3, (255, 255))
    frequent = np.sort(rng.permutation(255)[: probing.CHARTED])
    counts[frequent] += 5
    keys = ("iou", "iou_low", "iou_high", "f1", "precision", "recall", "boundary_iou")
    best = {"name": "linear", "per_class": [{"name": n, "support": 9, **dict.fromkeys(keys, 0.5)} for n in names]}
    report = {"results": [{"group": "linear", "confusion": counts.tolist()}]}
    section = probing._classes(report, best, names, [(0, 0, 0)] * 255)
    assert len(section.tables[0].rows) == 255
    bars, matrix = (picture.figure.axes[0] for picture in section.pictures)
    shown = [names[k] for k in frequent]
    assert [text.get_text() for text in bars.get_yticklabels()] == shown
    assert [text.get_text() for text in matrix.get_yticklabels()] == [*shown, "all others"]
    assert "32 most frequent of 255" in section.pictures[0].caption
    together = probing._together(counts, frequent)
    assert together.sum() == counts.sum()
    np.testing.assert_array_equal(together[:-1, :-1], counts[np.ix_(frequent, frequent)])
    np.testing.assert_array_equal(together[:-1].sum(axis=1), counts[frequent].sum(axis=1))
    np.testing.assert_array_equal(probing._together(counts, np.arange(255)), counts)
    labels = np.arange(256).repeat(2).reshape(16, 32).astype(np.uint8)
    image = np.zeros((16, 32, 3))
    sheet = figures.class_sheet([image], [labels], [labels], names, [(0, 0, 0)] * 255)
    legend = [text.get_text() for text in sheet.legends[0].get_texts()]
    assert "and 223 others" in legend
    assert len(legend) == 32 + 4
