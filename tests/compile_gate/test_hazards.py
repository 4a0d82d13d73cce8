"""Short binaries, each with one way to touch too early what a wgmma uses, or none."""

from __future__ import annotations

import pytest

from .hazards import hazards
from .sass import instructions_of, main_loop

WGMMA = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0"
FIRST_OF_TWO = "HGMMA.64x16x16.F32.BF16 R24, R36, gdesc[UR4], R24"
OTHER = "HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR4], R24, gsb0"
FROM_MEMORY = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def binary(*texts: str):
    """Instructions 16 bytes apart; `<2>` stands for the address of the third one."""
    lines = []
    for index, text in enumerate((*texts, "EXIT")):
        for other in range(len(texts) + 1):
            text = text.replace(f"<{other}>", hex(16 * other))
        lines.append(f"        /*{16 * index:04x}*/    {text} ;    /* 0x0020001838207df0 */\n")
        lines.append("                                            /* 0x000fe20000000000 */\n")
    return instructions_of("\tFunction : product_kernel\n" + "".join(lines))


@pytest.mark.parametrize(
    "texts",
    [
        (WGMMA, WAIT, "FADD R40, R24, R25"),
        (WGMMA, "FADD R50, R40, R41", WAIT),  # operand A may be read
        (WGMMA, OTHER, WAIT_BUT_ONE, "MOV R40, RZ"),  # the first of two groups is over
        (FROM_MEMORY, "MOV R40, RZ", WAIT),
        (FIRST_OF_TWO, WGMMA, WAIT),  # both add to the same accumulators
        ("MOV R40, RZ", WGMMA, WAIT, "@!P5 BRA <0>"),
        # The same registers, in two loops that wait at the end of each iteration.
        (WGMMA, WAIT, "@P0 BRA <0>", "MOV R40, RZ", OTHER, WAIT, "@P0 BRA <3>"),
        # A way around the wgmma, and a function that returns to where it was called.
        ("@P1 BRA <3>", WGMMA, WAIT, "MOV R40, RZ"),
        ("MOV R2, <2>", "CALL.REL.NOINC <6>", WGMMA, WAIT, "BRA <8>", "NOP", "MOV R40, RZ",
         "RET.REL.NODEC R2 0x0"),
        # A barrier that is used twice goes on where it was set last.
        ("BSSY B0, <3>", "MOV R40, RZ", "BSYNC B0", "BSSY B0, <6>", WGMMA, "BSYNC B0", WAIT),
        ("MOV R40, RZ", "LEA.HI.X R44, R2, R40, R3, 0x1, P5"),  # no wgmma, nothing to wait for
    ],
)  # fmt: skip
def test_no_hazard(texts):
    assert hazards(binary(*texts)) == []


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ((WGMMA, "MOV R43, RZ", WAIT), "MOV R43, RZ at 0x0010 writes operand A of HGMMA"),
        ((WGMMA, "LDS.128 R40, [R2]", WAIT), "LDS.128 R40, [R2] at 0x0010 writes operand A of"),
        ((WGMMA, "LOP3.LUT P0, R41, R2, R3, RZ, 0xc0, !PT", WAIT), "writes operand A of"),
        ((WGMMA, "@P0 SHFL.BFLY PT, R42, R2, 0x1, 0x1f", WAIT), "writes operand A of"),
        ((WGMMA, "FADD R31, R2, R3", WAIT), "writes accumulators of"),
        ((WGMMA, "FADD R2, R3, -R31", WAIT), "reads accumulators of"),
        ((WGMMA, "STG.E.128 desc[UR4][R2.64], R24", WAIT), "reads accumulators of"),
        ((WGMMA, "HGMMA.64x8x16.F32.BF16 R48, R24, gdesc[UR4], R48, gsb0", WAIT),
         "reads accumulators of"),
        ((WGMMA, "HGMMA.64x32x16.F32.BF16 R40, R48, gdesc[UR4], R40, gsb0", WAIT),
         "writes operand A of"),
        ((WGMMA, "HGMMA.64x8x16.F32.BF16 R24, R48, gdesc[UR4], R24, gsb0", WAIT),
         "shares some accumulators with"),
        # The group before the last is waited for, this one not; nor where the wait is conditional.
        ((WGMMA, WAIT_BUT_ONE, "MOV R40, RZ"), "writes operand A of"),
        ((WGMMA, "@P0 " + WAIT, "MOV R40, RZ"), "writes operand A of"),
        ((FIRST_OF_TWO, WAIT, "MOV R36, RZ"), "writes operand A of"),  # no group ended before
        # Only in the next iteration; the straight line is fine.
        (("MOV R40, RZ", WGMMA, WAIT_BUT_ONE, "@!P5 BRA <0>", WAIT), "MOV R40, RZ at 0x0000"),
        (("MOV R40, RZ", WGMMA, WAIT_BUT_ONE, "BRA.U UP0, <0>", WAIT), "MOV R40, RZ at 0x0000"),
        ((WGMMA, "@P0 BRA <3>", WAIT, "MOV R40, RZ"), "MOV R40, RZ at 0x0030"),
        ((WGMMA, "MOV R2, <3>", "CALL.REL.NOINC <5>", WAIT, "EXIT", "MOV R40, RZ",
          "RET.REL.NODEC R2 0x0"), "MOV R40, RZ at 0x0050"),
        (("BSSY B0, <3>", WGMMA, "BSYNC B0", "MOV R40, RZ"), "MOV R40, RZ at 0x0030"),
        ((WGMMA, "@P0 BRA <0>"), "nothing waits for HGMMA"),
    ],
)  # fmt: skip
def test_hazard(texts, problem):
    found = hazards(binary(*texts))
    assert len(found) == 1 and problem in found[0]
    assert ", which may still run" in found[0] or found[0].startswith("nothing")


@pytest.mark.parametrize(
    "unknown",
    [
        "UNHEARD.OF R2, R3",
        "QGMMA.64x16x32.F32.E4M3.E4M3 R24, R40, gdesc[UR4], R24, gsb0",
        "HGMMA.64x16x16.F32.BF16 R25, R40, gdesc[UR4], R25, gsb0",
        "HGMMA.SP.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0",
        "WARPGROUP.DEPBAR.LE gsb1, 0x0",
        "FADD [R2], R3",
        "BRA 0x7770",
        "BRX R2",
        "BSYNC B1",
        "CALL.REL.NOINC <0>",
        "RET.REL.NODEC R2 0x0",
    ],
)
def test_what_is_not_known_is_an_error_that_names_it(unknown):
    with pytest.raises(ValueError, match=f"^it is not known.*{unknown.split()[0]}|does not return"):
        hazards(binary(unknown, WGMMA, WAIT))
    if "GMMA" not in unknown:
        assert hazards(binary(unknown)) == []


def test_several_functions_and_none_are_refused():
    text = "/*0000*/ NOP ; /*0010*/ EXIT ; "
    with pytest.raises(ValueError, match="several functions in one binary"):
        instructions_of(text + text)
    with pytest.raises(ValueError, match="no instruction in what cuobjdump printed"):
        instructions_of("cuobjdump fatal: no such file")


@pytest.mark.parametrize(
    ("texts", "loop"),
    [
        ((WGMMA, WAIT), (0, 0)),
        (("NOP", "MOV R2, R3", "@P0 BRA <1>"), (0, 0)),  # nothing on tensor cores
        (("NOP", FIRST_OF_TWO, WGMMA, WAIT, "@P0 BRA <1>", WGMMA, WAIT, "@P0 BRA <5>"), (4, 2)),
        # The loop around the main loop has more, and is not an iteration of it.
        (("NOP", WGMMA, WAIT, "@P0 BRA <1>", WGMMA, WAIT, "@P1 BRA <0>"), (3, 1)),
        (("HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 BRA <0>"), (2, 1)),
    ],
)
def test_the_main_loop(texts, loop):
    assert main_loop(binary(*texts)) == loop
