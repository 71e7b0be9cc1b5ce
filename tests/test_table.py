"""Tables of configs: rows that come later are there whenever somebody looks for them."""

from __future__ import annotations

import subprocess
import sys

FIRST_LOOKS = {
    "name": "etr.ROUTERS['remoe']",
    "get": "assert etr.ROUTERS.get('remoe') is not None",
    "in": "assert 'remoe' in etr.ROUTERS",
    "names": "assert [*etr.ROUTERS][0] == 'etr' and 'remoe' in {**etr.ROUTERS}",
    "length": "assert len(etr.ROUTERS) == len(list(etr.ROUTERS))",
    "error": "assert 'remoe' in str(error(lambda: etr.ROUTERS.parse('no_such')))",
    "taken": "assert 'is taken' in str(error(lambda: etr.ROUTERS.add(Thief)))",
    "wing": "from etr.systems import PLANNERS; assert 'consecutive' in list(PLANNERS)",
    "shelf": "from etr.methods import METHODS; assert METHODS['remoe'].traits is not None",
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as Pool; "
        "wanted = lambda _: 'remoe' in list(etr.ROUTERS); "
        "assert all(Pool(4).map(wanted, range(8)))"
    ),
}
"""Ways to look into a table first of all, each in a process of its own (forked, torch loaded)."""

SCRIPT = """
import os, sys, torch

def error(call):
    try:
        call()
    except ValueError as found:
        return found

for name, code in {looks!r}.items():
    if os.fork() == 0:
        import etr
        class Thief:
            name = "remoe"
        try:
            exec(code)
            assert "remoe" in etr.ROUTERS
        except BaseException as fault:
            print(name, repr(fault), flush=True)
            os._exit(1)
        os._exit(0)
    os.wait()
print("looked", "etr" in sys.modules)
"""


def test_rows_of_the_shelf_are_found_however_one_looks_first() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{looks!r}", repr(FIRST_LOOKS))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "looked False\n", done.stdout + done.stderr
