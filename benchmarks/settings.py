"""What is the same for every system of a run: device, threads, allocator."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Args:
    device: where systems run.
    threads: of torch, in this process and in workers.
    mallopt: glibc keeps freed memory, for all systems alike.
    against: another checkout whose demo step is timed too, or None.
    quick: small sizes, to see that everything runs.
    """

    device: torch.device
    threads: int
    mallopt: bool = False
    against: str | None = None
    quick: bool = False

    def apply(self) -> None:
        """Set threads and allocator of this process."""
        torch.set_num_threads(self.threads)
        if self.mallopt:
            keep_freed_memory()

    def describe(self) -> dict[str, Any]:
        """What the figures were measured on."""
        from etr.train.compare import environment

        return {
            **environment(),
            "processor": processor(),
            "cores": os.cpu_count() or 0,
            "device": self.device_name(),
            "threads": self.threads,
            "allocator": "glibc, mallopt(M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1)"
            if self.mallopt
            else "default",
            "sizes": "quick" if self.quick else "full",
        }

    def device_name(self) -> str:
        """The device, with the name of the card where it has one."""
        if self.device.type == "cpu":
            return str(self.device)
        named = getattr(torch.get_device_module(self.device), "get_device_name", None)
        return f"{self.device}, {named(self.device)}" if named else str(self.device)

    def fingerprint(self) -> dict[str, Any]:
        """What a stored case must agree with to be used again."""
        known = ("torch", "python", "processor", "cores", "device", "threads", "allocator", "sizes")
        facts = self.describe()
        return {**{name: facts[name] for name in known}, "sources": sources_hash()}


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it: page faults dominate small steps.

    Raises:
        ValueError: the C library has no mallopt.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise ValueError(
            "mallopt=True needs glibc, and this C library has no mallopt; leave it off"
        )
    library.mallopt(M_MMAP_MAX, 0)
    library.mallopt(M_TRIM_THRESHOLD, -1)


def processor() -> str:
    """Model of the processor in the words of the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def load_average() -> float | None:
    """Processes that wanted to run in the last minute, or None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def sources_hash() -> str:
    """Digest of what is timed and how; pages and targets are read off later."""
    free = {"page.py", "targets.py", "screen.py", "__main__.py"}
    digest = hashlib.sha256()
    for folder in (ROOT / "src" / "etr", ROOT / "benchmarks"):
        for path in sorted(folder.rglob("*.py")):
            if path.name not in free:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
