"""The NEON kernels on a machine without an ARM processor: cross-compiled, run by qemu, checked by the op tests.

    dpkg --add-architecture arm64 && apt-get update && apt-get install g++-aarch64-linux-gnu qemu-user
    python tests/neon.py FOLDER [FILE ...]      # op tests, all by default: test_attend.py takes over ten minutes

FOLDER receives the library and an ARM Python of Debian 12 with NumPy, unpacked and not installed. On a machine with an
ARM processor `pytest` runs these kernels like all others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "tests" / "ops"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC")
WITH_A_CHILD = "tests/ops/test_search.py::test_fewer_threads_than_asked_for"  # an interpreter that qemu does not run
OPS_FLAG, OTHERS_FLAG = "-ffp-contract=fast", "-ffp-contract=off"  # as CMakeLists.txt has them

# Debian's packages, with what they need; and Python's, that are Python alone, with what gguf imports
ARM_PACKAGES = """
    python3.11-minimal libpython3.11-minimal libpython3.11-stdlib python3-numpy python3-cffi-backend libc6 libgcc-s1
    libstdc++6 libgomp1 libblas3 liblapack3 libgfortran5 libffi8 zlib1g libexpat1 libssl3 libcrypt1 libbz2-1.0
    liblzma5 libuuid1
"""
ANY_PACKAGE = "python3-cffi"
PURE_PACKAGES = """
    pytest pluggy iniconfig packaging pygments pycparser gguf pyyaml tqdm requests urllib3 idna certifi
    charset_normalizer
"""
LIBRARIES = "/usr/lib/aarch64-linux-gnu"


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> int:
    return subprocess.run([str(part) for part in command], cwd=cwd, env=os.environ | env, check=False).returncode


def must(*command: str | Path, cwd: Path | None = None) -> None:
    if run(*command, cwd=cwd) != 0:
        sys.exit(f"failed: {' '.join(str(part) for part in command)}")


def unpack_python(folder: Path) -> None:
    """An ARM Python in `root`, what is no machine's in `pure`."""
    with tempfile.TemporaryDirectory() as downloads:
        packages = [*(f"{name}:arm64" for name in ARM_PACKAGES.split()), ANY_PACKAGE]
        must("apt-get", "download", "-qq", *packages, cwd=Path(downloads))
        for package in Path(downloads).glob("*.deb"):
            must("dpkg", "-x", package, folder / "root.part")
    must(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "pure", *PURE_PACKAGES.split())
    (folder / "root.part").rename(folder / "root")


def build(folder: Path) -> Path:
    """The library of the kernels."""
    objects = []
    for source in sorted((ROOT / "native/kernels/cpu").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        contract = OPS_FLAG if source.stem.startswith("ops_") else OTHERS_FLAG
        include = (f"-I{ROOT}/native/include", f"-I{ROOT}/native/kernels")
        must(COMPILER, *FLAGS, contract, *include, "-c", source, "-o", objects[-1])
    must(COMPILER, *FLAGS, "-shared", *objects, "-o", folder / "libkernels.so")
    return folder / "libkernels.so"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    missing = [tool for tool in (COMPILER, QEMU, "apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        parser.error(f"{', '.join(missing)}: not found; the first lines of --help say how to install them")
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "root").exists():
        unpack_python(folder)
    library = build(folder)
    python = [QEMU, "-L", folder / "root", "-E", f"LD_LIBRARY_PATH={LIBRARIES}/blas:{LIBRARIES}/lapack"]
    python += [folder / "root/usr/bin/python3.11", "-m", "pytest", "-c", ROOT / "pyproject.toml", "-m", "not cuda"]
    python += ["--deselect", WITH_A_CHILD]
    packages = f"{folder}/root/usr/lib/python3/dist-packages:{folder}/pure"
    files = [file.absolute() for file in options.files] or sorted(OPS.glob("test_*.py"))
    failed = [
        file.name
        for file in files
        if run(*python, f"--confcutdir={OPS}", file, PYTHONPATH=packages, ACTQKV_TEST_KERNELS=str(library))
    ]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
