"""Emulated networks: rates that hold, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from etr.cluster import NetworkConfig, why_unavailable
from etr.cluster import network as network_module
from etr.cluster.network import PREFIX, leftovers, network, parse_rate, remove_leftovers

needs_network = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"no cluster can be emulated: {why_unavailable()}"
)

# Sends SIZE bytes from node to node (or within one) over plain TCP; the receiver prints Mbit/s.
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 5000))
print("ready", flush=True)
peer, _ = server.accept()
peer.recv(1)
left, began = int(sys.argv[2]), time.perf_counter()
while left:
    left -= len(peer.recv(min(left, 1 << 20)))
print(int(sys.argv[2]) * 8 / (time.perf_counter() - began) / 1e6)
"""
SEND = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 5000))
peer.sendall(bytes(1 + int(sys.argv[2])))
"""


def megabits(net, sender: int, receiver: int, size: int) -> float:
    """Rate of one stream between two nodes, Mbit/s."""
    arguments = (net.address(receiver), str(size))
    inside = ("ip", "netns", "exec", net.nodes[receiver], sys.executable, "-c", RECEIVE)
    process = subprocess.Popen((*inside, *arguments), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    inside = ("ip", "netns", "exec", net.nodes[sender], sys.executable, "-c", SEND)
    subprocess.run((*inside, *arguments), check=True, timeout=60)
    rate = float(process.stdout.readline())
    process.wait()
    return rate


@needs_network
def test_no_stream_is_faster_than_its_rate_allows():
    # Slower it may be: other work on the machine takes time too.
    with network(NetworkConfig(nodes=2, inter="40mbit", intra="160mbit")) as net:
        between = max(megabits(net, 0, 1, 2 << 20) for _ in range(3))
        within = max(megabits(net, 0, 0, 8 << 20) for _ in range(3))
    assert 0 < between < 44
    assert 0 < within < 176


@needs_network
def test_nothing_is_left_even_after_an_error():
    def fail():
        with network(NetworkConfig(nodes=2)) as net:
            names.extend([net.switch, *net.nodes])
            inside = ("ip", "netns", "exec", net.nodes[1], "sleep", "60")
            processes.append(subprocess.Popen(inside))
            assert set(names) <= set(os.listdir("/run/netns"))
            raise RuntimeError("on purpose")

    names: list[str] = []
    processes: list[subprocess.Popen[bytes]] = []
    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert not set(names) & set(os.listdir("/run/netns"))
    assert processes[0].wait(timeout=5) == -9


@needs_network
def test_leftovers_of_a_killed_process_are_found_and_removed():
    code = (
        "import os, signal\n"
        "from etr.cluster.network import Network, NetworkConfig\n"
        "made = Network(NetworkConfig(nodes=1)); made.create(); print(made.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    name = done.stdout.strip()
    assert name.startswith(PREFIX)
    assert {f"{name}-switch", f"{name}-node0"} <= set(leftovers())
    with network(NetworkConfig(nodes=1)) as alive:
        assert {f"{name}-switch", f"{name}-node0"} <= set(remove_leftovers())
        assert alive.switch in os.listdir("/run/netns")
    assert not [found for found in leftovers() if found.startswith(name)]


@pytest.mark.parametrize(
    ("text", "rate"), [("200mbit", 2e8), ("1.6gbit", 1.6e9), ("64kbit", 6.4e4)]
)
def test_parse_rate(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["200", "fast", "0mbit", "-1mbit", "200 mbit", "1tbit"])
def test_a_rate_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"inter={text!r}.*such as 200mbit"):
        NetworkConfig(inter=text)


@pytest.mark.parametrize("nodes", [0, 251])
def test_number_of_nodes_is_checked(nodes):
    with pytest.raises(ValueError, match=f"nodes={nodes}"):
        NetworkConfig(nodes=nodes)


def test_without_tools_or_rights_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(network_module.shutil, "which", lambda name: None)
    with (
        pytest.raises(ValueError, match="ip and tc not found: install iproute2"),
        network(NetworkConfig()),
    ):
        pass
    monkeypatch.setattr(network_module.shutil, "which", lambda name: name)
    monkeypatch.setattr(network_module.os, "geteuid", lambda: 1000)
    assert why_unavailable() == "network namespaces need root"
