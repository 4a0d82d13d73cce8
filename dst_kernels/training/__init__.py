"""Training from the command line (`dst-kernels train`) and what it is made of.

Needs the `train` extra: pip install 'dst_kernels[train]'.
"""
