"""The compiled module as a file and in a process: its libraries, its OpenMP runtime, its manners."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch  # noqa: F401  (before the core: its OpenMP runtime is the one that both use)

from interfuse import _native

MODULE = Path(_native.__file__)
ROOT = Path(__file__).resolve().parent.parent

# Object files of the build that is installed: `make`'s own folder, or the one that plain pip uses.
OBJECTS = sorted(
    path
    for folder in ("native", "cp*")
    for path in (ROOT / "build").glob(f"{folder}/CMakeFiles/interfuse_cpu_*.dir/csrc/cpu/*.o")
    if (ROOT / "csrc/cpu" / path.stem).exists()
)

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def dynamic_section(library: Path) -> str:
    command = ["readelf", "--dynamic", "--wide", str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_python(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_readelf
def test_libgomp_is_linked_by_its_plain_name() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic_section(MODULE))
    assert [name for name in needed if "omp" in name] == ["libgomp.so.1"]


@needs_readelf
def test_no_library_is_looked_for_in_folders_of_the_build() -> None:
    for library in MODULE.parent.glob("*.so"):
        assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic_section(library)), library.name


def test_no_openmp_runtime_is_bundled() -> None:
    bundled = [path.name for path in MODULE.parent.rglob("*") if re.match(r"lib(g|i)?omp", path.name)]
    assert not bundled


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torch_and_the_core_share_one_openmp_runtime() -> None:
    loaded = run_python(
        """
        import torch, interfuse._native
        names = {line.split()[-1] for line in open("/proc/self/maps") if len(line.split()) > 5}
        print("\\n".join(sorted(name for name in names if "omp" in name.rsplit("/", 1)[-1])))
        """
    ).split()
    assert len(loaded) == 1, f"several OpenMP runtimes in one process: {loaded}"


def test_loading_leaves_denormal_numbers_alone() -> None:
    """A library linked with -ffast-math sets flush-to-zero for whoever loads it and for later threads."""
    printed = run_python(
        """
        import threading
        import numpy as np

        tiny = np.full(64, 1e-40, np.float32)
        def survive():
            found.append(bool(((tiny * np.float32(0.5)) > 0).all()))

        found = []
        survive()
        import interfuse._native
        survive()
        thread = threading.Thread(target=survive)
        thread.start()
        thread.join()
        print(found)
        """
    )
    assert printed.strip() == "[True, True, True]"


def test_the_core_tells_about_itself() -> None:
    info = _native.info()
    assert info["isa"] in info["isas"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])


@pytest.mark.parametrize("isa", _native.info()["isas"])
def test_an_environment_variable_forces_a_lower_instruction_set(isa: str) -> None:
    order = _native.info()["isas"]
    if order.index(isa) > order.index(_native.info()["isa"]):
        pytest.skip(f"this CPU does not run {isa}")
    printed = run_python(
        f"""
        import os
        os.environ["INTERFUSE_ISA"] = {isa!r}
        import interfuse._native
        print(interfuse._native.info()["isa"])
        """
    )
    assert printed.strip() == isa


@pytest.mark.skipif(not OBJECTS, reason="the core was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_code_leaves_its_instruction_set() -> None:
    """Everything weak or unique in a file that is compiled once per set carries that set's name.

    The linker keeps one of several weak copies, and the baseline must not get the one made of AVX-512.
    """
    leaks = []
    for path in OBJECTS:
        (isa,) = re.findall(r"interfuse_cpu_(\w+)\.dir", str(path))
        command = ["nm", "--defined-only", "--demangle", "--format=posix", str(path)]
        for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
            found = re.fullmatch(r"(.*) ([A-Za-z])(?: [0-9a-f]*)*", line)
            assert found, line
            symbol, kind = found.groups()
            if kind not in "VvWwu" or symbol == "DW.ref.__gxx_personality_v0":  # (data, the same in all)
                continue
            if f"interfuse::{isa}::" not in symbol:
                leaks.append(f"{path.name} for {isa} defines {symbol}")
    assert not leaks, "make these static, or move them into the set's namespace:\n" + "\n".join(leaks)
