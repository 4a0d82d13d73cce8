"""What dst_kernels costs, against dense layers and against compiled and eager DST.

`python -m bench --help` measures, reports, and holds the figures against the goals; `pytest bench`
runs small cases under pytest-benchmark. A suite is data in `cases.py`, a contender a function in
`providers.py`, a goal an entry in `goals.py`.
"""
