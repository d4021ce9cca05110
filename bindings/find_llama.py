"""Prints version;include directory;library directory of the installed llama-cpp-python, for CMakeLists.txt."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path


def main() -> None:
    spec = importlib.util.find_spec("llama_cpp")  # not imported: that would load its libraries
    if spec is None or spec.origin is None:
        sys.exit("no module named llama_cpp")
    package = Path(spec.origin).parent
    version = importlib.metadata.version("llama-cpp-python")
    print(version, package.parent / "include", package / "lib", sep=";")


if __name__ == "__main__":
    main()
