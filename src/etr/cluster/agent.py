"""One node's launcher: torchrun's agent, which leaves with its command's own exit code."""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments.

    Returns:
        0, or the exit code of the first rank that failed; 128 + N where signal N ended it.
    """
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
