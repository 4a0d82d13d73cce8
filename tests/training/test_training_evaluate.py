"""`dst-kernels evaluate`: the figures that were recorded, measured again."""

from __future__ import annotations

import json
import re

import pytest

SHORT = ("--epochs", 2)


@pytest.mark.parametrize("kind", ["sparse", "dense", "both", "unfinished"])
def test_what_was_recorded_is_found_again(cli, run_of, tmp_path, kind):
    options = {"dense": ("--dense",), "both": ("--compare",)}.get(kind, ())
    run = run_of(*SHORT, *options, to=tmp_path / "run")
    if kind == "unfinished":
        config = json.loads((run / "config.json").read_text())
        for name in ("SHA256SUMS", "summary.json", "model.safetensors"):
            (run / name).unlink()
        assert config["epochs"] == 2
    result = cli("evaluate", "run")
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    rows = re.findall(
        r"test (accuracy|loss) +([\d.]+)(?: %)? +of epoch 2 of 2, when it was ([\d.]+)",
        result.output,
    )
    assert len(rows) == (4 if kind == "both" else 2)
    assert all(now == then for _, now, then in rows)
    assert ("fc1" in result.output) == (kind != "dense")


def test_changed_results_are_pointed_out(cli, run_of, tmp_path):
    run = run_of(*SHORT, to=tmp_path / "run")
    (run / "metrics.csv").write_text("")
    result = cli("evaluate", "run")
    assert result.exit_code == 0
    assert "the results are not those that the run wrote" in result.stderr


def test_bad_input(cli, run_of, tmp_path):
    run = run_of(*SHORT, to=tmp_path / "run")

    def error_of(*arguments):
        result = cli("evaluate", *arguments)
        assert result.exit_code == 2
        return result.stderr

    (tmp_path / "empty").mkdir()
    assert "empty has no checkpoint.pt. Accepted: a folder in which" in error_of("empty")
    assert "DIR is ''" in error_of("")
    assert "--device 'tpu'" in error_of("run", "--device", "tpu")
    data = bytearray((run / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "checkpoint.pt").write_bytes(data)
    assert "DIR: run/checkpoint.pt is damaged" in error_of("run")
