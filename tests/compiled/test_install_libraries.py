"""What a build compiles again after a change."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

from dst_build import environment, libraries
from dst_build.libraries import Library

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture
def compiled(tmp_path, monkeypatch, capfd):
    """Builds a library of two sources; returns the names of those that were compiled."""
    sources = tmp_path / "with spaces"
    (sources / "small").mkdir(parents=True)
    (sources / "shared.h").write_text("inline int one() { return 1; }\n")
    (sources / "small/a.cpp").write_text('#include "../shared.h"\nint a() { return one(); }\n')
    (sources / "small/b.cpp").write_text("int b() { return 2; }\n")
    monkeypatch.setattr(libraries, "SOURCES", sources)
    monkeypatch.setattr(environment, "torch_headers", lambda: tmp_path / "headers")

    def build() -> list[str]:
        capfd.readouterr()
        made = libraries.build(Library("small", ("torch_cpu",)), tmp_path / "made here")
        assert made.exists()
        commands = capfd.readouterr().out.splitlines()
        return sorted(name for name in ("a.cpp", "b.cpp") for line in commands if name in line)

    build.sources = sources
    return build


def later(path: Path, text: str) -> None:
    """Writes a file as if some seconds later."""
    path.write_text(text)
    now = path.stat().st_mtime + 5
    os.utime(path, (now, now))


def test_only_what_has_changed_is_compiled_again(compiled, monkeypatch):
    assert compiled() == ["a.cpp", "b.cpp"]
    assert compiled() == []
    later(compiled.sources / "small/b.cpp", "int b() { return 3; }\n")
    assert compiled() == ["b.cpp"]
    monkeypatch.setenv("CXXFLAGS", "-DANOTHER=1")
    assert compiled() == ["a.cpp", "b.cpp"]


def test_a_header_is_compiled_with_all_that_include_it(compiled):
    compiled()
    later(compiled.sources / "shared.h", "inline int one() { return 1 + 0; }\n")
    assert compiled() == ["a.cpp"]
    (compiled.sources / "shared.h").unlink()
    with pytest.raises(environment.BuildError, match=r"small.* could not be built"):
        compiled()


def test_what_failed_is_compiled_again_and_its_object_is_not_taken(compiled):
    compiled()
    later(compiled.sources / "small/a.cpp", "this is not C++\n")
    for _ in range(2):
        with pytest.raises(environment.BuildError, match="see the messages above"):
            compiled()
    (compiled.sources / "small/a.cpp").write_text("int a() { return 1; }\n")
    assert compiled() == ["a.cpp"]


def test_every_source_is_compiled_once(tmp_path):
    for library in libraries.LIBRARIES.values():
        (tmp_path / library.name).mkdir()
        units = libraries._units(library, tmp_path / library.name)
        written = [path.read_text() for path in units if path.suffix == ".cu"]
        included = re.findall(r'#include "(.+)"', "".join(written))
        compiled = [str(path) for path in units if path.suffix != ".cu"] + included
        assert sorted(compiled) == list(map(str, library.sources))
