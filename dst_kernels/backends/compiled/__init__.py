"""Run the C++ and CUDA backends: shared libraries built from csrc, and functions over their ops.

`library` loads them at first use. `ops` has the functions of both backends: the device of the
tensors decides which library runs. It can be imported once the CPU library is loaded.
"""
