"""Run a call by Triton kernels, by the compiled libraries for CPU and GPU, or by the reference.

`choice` decides; `triton` and `compiled` have the same functions under the same names as the
reference. Importing this package imports neither Triton nor a library.
"""

from .choice import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    check_backend,
    direct,
    implementation,
    resolve,
    serving,
    unavailable,
)

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "check_backend",
    "direct",
    "implementation",
    "resolve",
    "serving",
    "unavailable",
]
