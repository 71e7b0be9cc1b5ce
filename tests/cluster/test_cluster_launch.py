"""Commands on an emulated cluster: environment, exit codes, prefixes, clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from etr.cli import cluster as verb
from etr.cluster import EmulatedCluster, emulate, why_unavailable
from etr.cluster.network import PREFIX

pytestmark = pytest.mark.distributed
needs_network = pytest.mark.skipif(
    why_unavailable() is not None, reason=f"no cluster can be emulated: {why_unavailable()}"
)
CLUSTER = EmulatedCluster(nodes=2, ranks_per_node=2, grace_seconds=1.0)


@pytest.mark.slow
@needs_network
def test_every_rank_runs_the_command_and_its_lines_say_whose_they_are():
    lines: list[str] = []
    script = "echo $RANK of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE on $GROUP_RANK"
    assert emulate(CLUSTER, ["sh", "-c", script], lines.append) == 0
    expected = {
        f"[node {rank // 2} rank {rank}] {rank} of 4, local {rank % 2} of 2 on {rank // 2}"
        for rank in range(4)
    }
    assert expected <= set(lines)


@pytest.mark.slow
@needs_network
@pytest.mark.parametrize(
    ("script", "code"), [("exit $((RANK == 2 ? 7 : 0))", 7), ("[ $RANK != 1 ] || kill -9 $$", 137)]
)
def test_the_exit_code_is_that_of_the_rank_that_failed(script, code):
    # The others wait for longer than the time of grace.
    started = time.monotonic()
    assert emulate(CLUSTER, ["sh", "-c", f"{script}; sleep 300"], lambda line: None) == code
    assert time.monotonic() - started < 120


@pytest.mark.slow
@needs_network
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(number, code):
    command = (sys.executable, "-c", "import sys; from etr.cli import main; sys.exit(main())")
    options = ("cluster", "emulate", "--nodes", "1", "--ranks-per-node", "1")
    process = subprocess.Popen(
        [*command, *options, "--", "sh", "-c", "echo started; sleep 300"],
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    mine = [name for name in os.listdir("/run/netns") if f"{PREFIX}{process.pid}-" in name]
    assert len(mine) == 2
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(timeout=30) == code
    assert not set(mine) & set(os.listdir("/run/netns"))


def test_no_command_is_refused():
    with pytest.raises(ValueError, match="no command to run"):
        emulate(CLUSTER, [])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"ranks_per_node": 0}, "ranks_per_node=0"),
        ({"max_restarts": -1}, "max_restarts=-1"),
        ({"grace_seconds": -1.0}, "grace_seconds=-1.0"),
        ({"nodes": 0}, "nodes=0"),
    ],
)
def test_the_cluster_is_checked(values, text):
    with pytest.raises(ValueError, match=text):
        EmulatedCluster(**values)


def test_the_verb_names_its_parts(capsys):
    assert verb.run([]) == 0
    assert "emulate" in capsys.readouterr().out
    assert verb.run(["nonsense"]) == 2
    assert "no 'nonsense'" in capsys.readouterr().err
