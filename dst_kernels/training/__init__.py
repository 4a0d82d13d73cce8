"""Train classifiers from the command line (`dst-kernels train`).

This folder needs the `train` extra: pip install 'dst_kernels[train]'.
"""
