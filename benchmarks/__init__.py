"""What is timed, against whom: ``python -m benchmarks``.

A case says on which sizes, a system says who, a measure says what; targets are read off the rows.
"""
