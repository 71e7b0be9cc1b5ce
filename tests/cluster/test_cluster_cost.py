"""The cost model on networks whose times are known."""

from __future__ import annotations

import dataclasses

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


APART = torch.tensor([[0, 400, 0, 0], [0, 0, 0, 0], [0, 0, 0, 300], [0, 0, 400, 0]])
TO_ALL = torch.tensor([[9, 20, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("traffic", "links", "options", "seconds"),
    [
        (APART, {}, {}, 0.5 + 7.0),  # the second node's ranks share their link
        (APART, {"within_is_shared": False}, {}, 0.5 + 4.0),
        (APART, {}, {"groups_per_node": 2}, 0.5 + 14.0),
        (APART, {"within_is_shared": False}, {"groups_per_node": 2}, 0.5 + 4.0),
        (TO_ALL, {}, {"groups_per_node": 2}, 0.5 + 4.0),  # the uplink is shared in any case
        (TO_ALL, {"message_seconds": 0.1}, {}, 0.5 + 3 * 0.1 + 2.0),
        (TO_ALL, {"message_seconds": 0.1}, {"chunks": 4}, 4 * (0.5 + 3 * 0.1) + 2.0),
    ],
)
def test_what_shares_a_link_and_what_each_message_takes(traffic, links, options, seconds):
    found = dataclasses.replace(LINKS, **links).exchange_seconds(traffic, (0, 0, 1, 1), **options)
    assert found == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("shared", "size", "per_node", "groups", "seconds"),
    [
        (True, 1, 1, 4, 0.0),
        (False, 4, 4, 2, 3 * (0.5 + 0.1 + 1.0)),  # 400 bytes in four parts, each link its own
        (True, 4, 4, 2, 3 * (0.5 + 0.1 + 8.0)),  # four ranks of two rings on one link
        (False, 4, 2, 3, 3 * (0.5 + 0.1 + 30.0)),  # three rings on one uplink
        (True, 4, 2, 1, 3 * (0.5 + 0.1 + 10.0)),
    ],
)
def test_rings_pass_parts_on_over_the_links_that_they_share(
    shared, size, per_node, groups, seconds
):
    links = dataclasses.replace(LINKS, within_is_shared=shared, message_seconds=0.1)
    assert links.ring_seconds(400.0, size, per_node, groups) == pytest.approx(seconds)


def test_chunks_overlap_all_but_the_ends():
    assert layer_seconds(2.0, 6.0, 2.0) == 10.0
    assert layer_seconds(2.0, 6.0, 2.0, num_chunks=4) == 7.0  # 1/4 of the network's time is bare
    assert layer_seconds(4.0, 2.0, 4.0, num_chunks=4) == 8.5
    # Many chunks: the longer of the two.
    assert layer_seconds(2.0, 6.0, 2.0, num_chunks=1000) == pytest.approx(6.0, abs=0.01)
