"""What is timed, against whom: ``python -m benchmarks``."""
