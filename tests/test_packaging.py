"""CMake alone, sdist, wheel, plain and editable install, each used from an environment of its own.

Everything is built from the unpacked sdist, so a file that it lacks fails here, and in one build folder, so
that the core is compiled once; for the plainest processor only, since `make test` itself runs on the full
build. The environments see the packages of the running one (scripts/overlay_env.py): nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from interfuse import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

DEFINES = ("INTERFUSE_X86_ISAS=OFF", "INTERFUSE_CUDA=OFF")

# One op, and where the package, the core and the Triton kernels came from.
USE = """
import importlib.util
import torch, interfuse
from interfuse import _native
x, w, b = torch.randn(2, 3, 12, 12), torch.randn(8, 3, 3, 3), torch.randn(8)
y = interfuse.ops.conv_pool(x, w, b, activation="relu", pool="max", backend="native")
expected = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w, b).relu(), 2)
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
print(interfuse.__file__)
print(_native.__file__)
print(importlib.util.find_spec("interfuse.kernels.conv_pool").origin)
"""


def run(*command: str | Path, cwd: Path) -> str:
    private = ("PYTHON", "INTERFUSE_", "PIP_", "CMAKE_", "SKBUILD_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    # CMake and Ninja as installed beside this Python; one generator for all builds, for they share objects.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["CMAKE_GENERATOR"] = "Ninja"
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("packaging")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def sdist(workshop: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", workshop, ROOT, cwd=workshop)
    return workshop / f"interfuse-{__version__}.tar.gz"


@pytest.fixture(scope="module")
def source(workshop: Path, sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(workshop, filter="data")
    return workshop / f"interfuse-{__version__}"


@pytest.fixture(scope="module")
def prefix(workshop: Path, source: Path) -> Path:
    """Where CMake alone installed the core."""
    run(
        "cmake", "-S", source, "-B", workshop / "native", *(f"-D{define}" for define in DEFINES), cwd=workshop
    )
    run("cmake", "--build", workshop / "native", "--parallel", "2", cwd=workshop)
    run("cmake", "--install", workshop / "native", "--prefix", workshop / "prefix", cwd=workshop)
    return workshop / "prefix"


@pytest.fixture(scope="module")
def build_options(workshop: Path, prefix: Path) -> tuple[str, ...]:
    """pip's options for a build from the sources, over the objects that are in `workshop` by then."""
    assert prefix.exists()
    defines = (f"-Ccmake.define.{define}" for define in DEFINES)
    return ("--no-build-isolation", f"-Cbuild-dir={workshop / 'native'}", *defines)


@pytest.fixture(scope="module")
def wheel(workshop: Path, source: Path, build_options: tuple[str, ...]) -> Path:
    pip(
        Path(sys.executable), "wheel", *build_options, "--wheel-dir", workshop / "wheel", source, cwd=workshop
    )
    (built,) = (workshop / "wheel").glob("interfuse-*.whl")
    return built


def pip(python: Path, command: str, *arguments: str | Path, cwd: Path) -> None:
    offline = ("--disable-pip-version-check", "--no-index", "--no-deps")
    run(python, "-m", "pip", command, *offline, *arguments, cwd=cwd)


def install(folder: Path, *arguments: str | Path) -> Path:
    """The interpreter of a fresh environment in `folder` into which pip installed `arguments`."""
    python = Path(run(sys.executable, ROOT / "scripts/overlay_env.py", folder, cwd=ROOT).strip())
    # By force, because pip sees the interfuse of the running environment, which stays as it is.
    pip(python, "install", "--force-reinstall", *arguments, cwd=folder)
    return python


def use(python: Path, cwd: Path) -> tuple[Path, Path, Path]:
    package, core, kernels = run(python, "-c", USE, cwd=cwd).split()
    return Path(package).parent, Path(core), Path(kernels)


def test_sdist_holds_all_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/interfuse.h", "csrc/bind.cpp", "kernels/conv_pool.py", "CMakeLists.txt", "LICENSE"} <= names
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "csrc/tests/main.cpp"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in names if name.startswith(("build/", ".venv/", ".ci/", "out/"))]


def test_wheel_holds_what_is_imported_and_no_sources(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert any(re.fullmatch(r"interfuse/_native\.[\w-]+\.so", name) for name in names)
    for wanted in ("py.typed", "_native.pyi", "kernels/conv_pool.py", "ops/conv_pool.py", "cli.py"):
        assert f"interfuse/{wanted}" in names
    kinds = {Path(name).suffix for name in names if "dist-info" not in name}
    assert kinds == {".py", ".pyi", ".so", ".typed"}, f"a wheel should not hold {kinds}"
    assert {name.split("/")[0] for name in names} == {"interfuse", f"interfuse-{__version__}.dist-info"}
    assert not [name for name in names if "gomp" in name or "/test_" in name or "conftest" in name]


def test_wheel_holds_every_module_of_the_package(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    folders = {"": "python/interfuse", "kernels/": "kernels", "bench/": "bench", "cases/": "tests/cases"}
    for place, folder in folders.items():
        modules = {path.relative_to(source / folder).as_posix() for path in (source / folder).rglob("*.py")}
        assert {f"interfuse/{place}{module}" for module in modules} <= packed


def test_wheel_carries_its_licence_and_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
        text = archive.read(metadata).decode()
        assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "Requires-Python: >=3.10" in text
    assert re.search(r"^Requires-Dist: torch>=[\d.]+$", text, re.MULTILINE)
    assert re.search(r"^Requires-Dist: numpy>=[\d.]+$", text, re.MULTILINE)


def test_wheel_installs_and_runs(wheel: Path, tmp_path: Path) -> None:
    python = install(tmp_path / "env", wheel)
    for origin in use(python, tmp_path):
        assert origin.is_relative_to(tmp_path / "env")
    assert "interfuse" in run(tmp_path / "env/bin/interfuse", "doctor", cwd=tmp_path)


def test_plain_install_runs(source: Path, build_options: tuple[str, ...], tmp_path: Path) -> None:
    python = install(tmp_path / "env", *build_options, source)
    for origin in use(python, tmp_path):
        assert origin.is_relative_to(tmp_path / "env")


def test_editable_install_runs_from_the_sources(
    source: Path, build_options: tuple[str, ...], tmp_path: Path
) -> None:
    python = install(tmp_path / "env", *build_options, "--editable", source)
    package, core, kernels = use(python, tmp_path)
    assert package == source / "python/interfuse"
    assert kernels == source / "kernels/conv_pool.py"
    assert core.is_relative_to(tmp_path / "env")


def test_cmake_alone_serves_an_embedder_in_c(source: Path, prefix: Path, tmp_path: Path) -> None:
    installed = {path.name for path in prefix.rglob("*")}
    assert {"interfuse.h", "libinterfuse.so"} <= installed
    assert {"interfuse-config.cmake", "interfuse-config-version.cmake"} <= installed
    example = source / "examples/embed"
    run("cmake", "-S", example, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}", cwd=tmp_path)
    run("cmake", "--build", tmp_path, cwd=tmp_path)
    printed = run(tmp_path / "embed", cwd=tmp_path)
    assert printed.split(":")[1].split() == ["5", "7", "13", "15", "100", "96", "84", "80"]


def test_cmake_alone_serves_numpy_without_torch(source: Path, prefix: Path, tmp_path: Path) -> None:
    (library,) = [path for path in prefix.rglob("libinterfuse.so") if path.exists()]
    program = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__'); "
    program += "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    script = source / "examples/embed/numpy_fusion.py"
    printed = run(sys.executable, "-c", program, script, library, cwd=tmp_path)
    assert float(printed.rsplit(maxsplit=1)[1]) < 1e-6


@pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd is not installed")
def test_the_installed_core_knows_neither_python_nor_torch(prefix: Path) -> None:
    (library,) = [path for path in prefix.rglob("libinterfuse.so") if path.exists()]
    linked = run("ldd", library, cwd=prefix)
    assert "libgomp" in linked
    assert not re.search(r"torch|python|c10", linked)
