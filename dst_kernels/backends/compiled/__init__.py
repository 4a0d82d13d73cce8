"""The C++ and CUDA backends: shared libraries built from csrc, and the functions over their ops.

`library` loads them at first use. `ops` has the backends' functions, one set for both: which
library runs is decided by the tensors' device. It can be imported once the CPU library is loaded.
"""
