"""A folder with what `tests/gpu.py --pack` installs on a GPU machine without network; run it where there is one.

    python tests/gpu_pack.py FOLDER --python 3.12      # the Python of that machine, an x86-64 Linux

Wheels of what a machine set up for machine learning tends to lack, and the source of llama-cpp-python, which is
compiled there, without its history, documentation, tests and vocabularies. Such a machine has NumPy, pytest, typer,
rich, jinja2, scikit-build-core, CMake and ninja.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("cffi", "pycparser", "diskcache", "gguf", "pyyaml", "prompt_toolkit", "wcwidth")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
LEFT_OUT = re.compile(
    r"[^/]+/(\.git/|docs/|examples/|tests/|vendor/llama\.cpp/"
    r"(\.git|\.devops/|docs/|models/|tests/|benches/|examples/|media/|gguf-py/|ci/|tools/ui/|tools/server/))"
)


def pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip("--only-binary=:all:", "--python-version", options.python, *platforms, "-d", options.folder, *WHEELS)
    pin = re.search(r'"(llama-cpp-python==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert pin is not None, "pyproject.toml has no dependency on llama-cpp-python"
    with tempfile.TemporaryDirectory() as whole:
        pip("--no-binary=llama-cpp-python", "-d", whole, pin[1])
        [source] = Path(whole).glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(source) as found, tarfile.open(options.folder / source.name, "w:gz") as kept:
            for member in found:
                if not LEFT_OUT.match(member.name):
                    kept.addfile(member, found.extractfile(member) if member.isreg() else None)
    for file in sorted(options.folder.iterdir()):
        print(f"{file.stat().st_size:12,}  {file.name}")


if __name__ == "__main__":
    main()
