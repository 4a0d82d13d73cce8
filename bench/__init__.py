"""What dst_kernels costs, against dense layers and models and against compiled and eager DST.

`python -m bench --help` lists the commands, and README.md beside this file shows each of them.
"""
