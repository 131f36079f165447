"""Lays the package out in a folder as a wheel would: links to the sources and to what CMake built.

usage: lay_out.py FOLDER CMAKE_BUILD_FOLDER
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def lay_out(folder: Path, libraries: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = settings["tool"]["scikit-build"]["wheel"]["packages"]
    shutil.rmtree(folder, ignore_errors=True)
    for package, source in packages.items():
        target = folder / package
        target.mkdir(parents=True, exist_ok=True)
        for item in (ROOT / source).iterdir():
            if item.name != "__pycache__":
                (target / item.name).symlink_to(item)
    for library in [*libraries.glob("_native*.so"), *libraries.glob("libinterfuse_cuda.so")]:
        (folder / "interfuse" / library.name).symlink_to(library.resolve())


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), Path(sys.argv[2]))
