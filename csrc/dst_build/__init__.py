"""Build the compiled libraries; used by setup.py and by nothing at run time.

`environment` finds out what can be built, `libraries` compiles and links it, `commands` makes
setuptools do so and `backend` tells installers what that needs.
"""
