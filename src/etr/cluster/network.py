"""Network namespaces joined by a bridge, with limited rates: the nodes of an emulated cluster.

    switch (a namespace with a bridge)
      |  uplink of each node, `inter` in each direction
    node 0, node 1, ... (a namespace each)
      |  loopback of each node, `intra`, shared by its ranks in both directions
    ranks of the node

Nothing but the namespaces' names is visible outside of them, so removing them removes everything.
The kernel's token bucket limits rates; it adds no latency of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "eth0"
"""Interface of each node's uplink."""
PREFIX = "etr-emulated-"
"""Names of all namespaces start so; the number of the process that made them follows."""
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_BUFFER_BYTES = 64 << 20
_SYSCTLS = {
    # The kernel's default may pace by its own estimate of the rate, which a token bucket upsets.
    "net.ipv4.tcp_congestion_control": "reno",
    "net.ipv4.tcp_rmem": f"4096 {_BUFFER_BYTES} {_BUFFER_BYTES}",
    "net.ipv4.tcp_wmem": f"4096 {_BUFFER_BYTES} {_BUFFER_BYTES}",
}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Nodes of an emulated cluster and the rates between them."""

    nodes: int = 2
    """Nodes."""
    inter: str = "200mbit"
    """Rate of each node's uplink, in each direction: a number with kbit, mbit or gbit."""
    intra: str = "1600mbit"
    """Rate inside a node, shared by its ranks: a number with kbit, mbit or gbit."""

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 250:
            raise ValueError(f"nodes={self.nodes} must be between 1 and 250")
        for name in ("inter", "intra"):
            parse_rate(getattr(self, name), name)


def parse_rate(text: str, name: str = "rate") -> float:
    """Bits per second of a rate such as ``200mbit`` or ``1.6gbit``.

    Args:
        text: the rate.
        name: of the option, for the message.
    Raises:
        ValueError: no number with kbit, mbit or gbit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found is None or not float(found[1]):
        raise ValueError(
            f"{name}={text!r} must be a positive number with kbit, mbit or gbit, such as 200mbit"
        )
    return float(found[1]) * _UNITS[found[2]]


def why_unavailable() -> str | None:
    """Why no cluster can be emulated on this machine, or None."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    if shutil.which("unshare") is None:
        return "unshare not found: install util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = subprocess.run(
        ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", *_bucket("1mbit")],
        capture_output=True,
        text=True,
        check=False,
    )
    if probe.returncode:
        return f"the kernel limits no rates here: {probe.stderr.strip()}"
    return None


class Network:
    """The namespaces of one emulated cluster; see `network`.

    Args:
        config: nodes and rates.
    """

    def __init__(self, config: NetworkConfig) -> None:
        self.config = config
        self.name = f"{PREFIX}{os.getpid()}-{time.monotonic_ns() % 10**6}"
        self.switch = f"{self.name}-switch"
        self.nodes = [f"{self.name}-node{node}" for node in range(config.nodes)]

    def address(self, node: int) -> str:
        """IPv4 address of a node; sorted as text they are in the order of the nodes."""
        return f"10.77.{100 + node}.1"

    def create(self) -> None:
        """Make the namespaces, links and limits.

        Raises:
            ValueError: a command failed; the message holds what it said.
        """
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")
        for node, name in enumerate(self.nodes):
            port = f"node{node}"
            _ip("netns", "add", name)
            for setting, value in _SYSCTLS.items():
                _run("ip", "netns", "exec", name, "sysctl", "-qw", f"{setting}={value}")
            link = ("link", "add", INTERFACE, "netns", name, "type", "veth")
            _ip(*link, "peer", "name", port, "netns", self.switch)
            _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{self.address(node)}/16", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            # Out of the node at its own end, into it at the switch's.
            _limit(name, INTERFACE, self.config.inter)
            _limit(self.switch, port, self.config.inter)
            # Its packets must fit the burst.
            _ip("-n", name, "link", "set", "lo", "mtu", "9000")
            _limit(name, "lo", self.config.intra)

    def remove(self) -> None:
        """End every process inside and remove the namespaces; those already gone are skipped."""
        for name in (*self.nodes, self.switch):
            _remove(name)


@contextmanager
def network(config: NetworkConfig) -> Iterator[Network]:
    """An emulated network for the duration of a block.

    Raises:
        ValueError: this machine cannot; the message says why.
    """
    reason = why_unavailable()
    if reason is not None:
        raise ValueError(f"no cluster can be emulated here: {reason}")
    made = Network(config)
    try:
        made.create()
        yield made
    finally:
        made.remove()


def leftovers() -> list[str]:
    """Namespaces whose maker is gone without having removed them."""
    found = []
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        match = re.match(rf"{re.escape(PREFIX)}(\d+)-", name)
        if match is not None and not os.path.exists(f"/proc/{match[1]}"):
            found.append(name)
    return found


def remove_leftovers() -> list[str]:
    """Remove the namespaces of `leftovers` with what runs in them; returns their names."""
    found = leftovers()
    for name in found:
        _remove(name)
    return found


def _remove(name: str) -> None:
    """Processes first: a namespace lives on for as long as one is inside."""
    for _ in range(50):
        listed = subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        )
        pids = [int(pid) for pid in listed.stdout.split()]
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _bucket(rate: str) -> tuple[str, ...]:
    # A burst of a millisecond, at least a packet: what fits it travels free. The queue never drops:
    # a segment lost at the end of a message would wait for TCP's timer.
    burst = max(16 << 10, int(parse_rate(rate) / 8 * 1e-3))
    return ("tbf", "rate", rate, "burst", str(burst), "limit", str(4 * _BUFFER_BYTES))


def _limit(namespace: str, interface: str, rate: str) -> None:
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, "root", *_bucket(rate))


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
