"""The ranks of this folder's tests.

The functions that spawned processes run are elsewhere: a process that is spawned finds a function
by its module's name, and there are several modules named conftest.
"""

from distributed_ranks import ranks

__all__ = ["ranks"]
