"""Benchmarks; `pytest bench` runs them under pytest-benchmark."""
