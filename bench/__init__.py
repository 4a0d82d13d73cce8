"""What dst_kernels costs, against dense layers and models and against compiled and eager DST.

`python -m bench --help` measures, reports, and holds the figures against the goals; `pytest bench`
runs small cases under pytest-benchmark. A suite is data in `suites.py`; a kind of case (an op, a
model's training step, a list of weights) has its contenders in a file of providers and is joined to
the rest in `kinds.py`; a goal is an entry in a `goals_*.py`.
"""
