"""The cost model on networks whose times are known."""

from __future__ import annotations

import pytest
import torch

from etr.cluster.cost import Line, Links, fit_line, layer_seconds


def test_fit_finds_the_line_that_made_the_times():
    line = Line(latency_seconds=2e-3, bytes_per_second=25e6)
    sizes = [1e3, 1e5, 1e6, 4e6]
    found = fit_line(sizes, [line.seconds(size) for size in sizes])
    assert found.latency_seconds == pytest.approx(2e-3)
    assert found.bytes_per_second == pytest.approx(25e6)


def test_fit_has_no_negative_latency():
    found = fit_line([1e3, 1e6], [1e-6, 1e-2])  # faster than any line at first
    assert found.latency_seconds == 0
    assert found.bytes_per_second > 0


@pytest.mark.parametrize(
    ("sizes", "seconds", "text"),
    [
        ([1.0, 1.0], [1.0, 1.0], "two different sizes"),
        ([1.0], [1.0], "two different sizes"),
        ([1.0, 2.0], [1.0, 0.0], "must be positive"),
        ([1.0, 2.0], [1.0], "a time for each"),
    ],
)
def test_fit_refuses(sizes, seconds, text):
    with pytest.raises(ValueError, match=text):
        fit_line(sizes, seconds)


LINKS = Links(latency_seconds=0.5, within_bytes_per_second=100.0, between_bytes_per_second=10.0)


@pytest.mark.parametrize(
    ("traffic", "seconds"),
    [
        (torch.zeros(4, 4), 0.5),
        (torch.diag(torch.full((4,), 1e6)), 0.5),  # nothing leaves its rank
        (torch.tensor([[0, 0, 30, 0], [0, 0, 0, 20], [0] * 4, [0] * 4]), 0.5 + 5.0),
        (torch.tensor([[0, 0, 30, 0], [0] * 4, [20, 0, 0, 0], [0] * 4]), 0.5 + 3.0),  # duplex
        (torch.tensor([[0, 400, 10, 0], [0] * 4, [0] * 4, [0] * 4]), 0.5 + 4.0),
    ],
    ids=["nothing", "own", "shared uplink", "both ways", "inside"],
)
def test_the_busiest_link_decides(traffic, seconds):
    assert LINKS.exchange_seconds(traffic, (0, 0, 1, 1)) == pytest.approx(seconds)


def test_chunks_overlap_all_but_the_ends():
    assert layer_seconds(2.0, 6.0, 2.0) == 10.0
    assert layer_seconds(2.0, 6.0, 2.0, num_chunks=4) == 7.0  # 1/4 of the network's time is bare
    assert layer_seconds(4.0, 2.0, 4.0, num_chunks=4) == 8.5
    # Many chunks: the longer of the two.
    assert layer_seconds(2.0, 6.0, 2.0, num_chunks=1000) == pytest.approx(6.0, abs=0.01)
