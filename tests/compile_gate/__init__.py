"""The ahead-of-time gate: every shipped kernel compiled, inspected and judged without a GPU.

`python -m tests.compile_gate` is the way in. What a GPU would show only as slowness, or as a launch
that fails, is decided when a kernel is compiled: registers spilled, shared memory over the limit,
tensor cores left out, `wgmma` serialised, narrow memory accesses.

* `binary.py`: from a variant to its binary, and what the binary is made of
* `sass.py`, `hazards.py`: its instructions, and accesses to registers that a wgmma may still use
* `widths.py`: the width of the global accesses behind each load and store of a kernel
* `rules.py`: what a shipped variant must fulfil
* `baseline.py`: what it needed last time
"""
