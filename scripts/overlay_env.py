"""Makes a throw-away virtual environment that sees the running one's packages; prints its python.

Packages of the running environment come last on the path and their .pth files are not processed: an editable
install of interfuse there stays out of sight, whatever is installed into the new environment is what gets
imported, and torch is not downloaded again.
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path


def make(folder: Path) -> Path:
    python = folder / "bin" / "python"
    venv.EnvBuilder(with_pip=False, symlinks=True, clear=True).create(folder)
    inner = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    seen = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    shared = [path for path in dict.fromkeys(seen) if path.endswith(("site-packages", "dist-packages"))]
    (inner / "zz_shared.pth").write_text("".join(f"{path}\n" for path in shared), encoding="utf-8")
    return python


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
