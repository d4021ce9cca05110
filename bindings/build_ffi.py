"""Writes the C source of the cffi module (API mode, out of line, limited API). Called by CMake.

The declarations come from the headers themselves, between their cdef marks, so that no signature stands twice;
callbacks.cdef adds the functions that Python implements.
"""

import re
import sys
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADERS = (
    ROOT / "native/include/actqkv.h",
    ROOT / "native/kernels/kernels.h",
    ROOT / "native/kernels/cuda/kernels_cuda.h",
)


def declarations(header: Path) -> str:
    """The text between the cdef marks, without the export macro (cffi knows no attributes)."""
    found = re.search(r"// \[cdef begin\][^\n]*\n(.*)// \[cdef end\]", header.read_text(), re.DOTALL)
    if found is None:
        sys.exit(f"{header}: no '// [cdef begin]' ... '// [cdef end]' section")
    return found.group(1).replace("ACTQKV_API ", "")


def main(target: str) -> None:
    ffi = FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header))
    ffi.cdef((ROOT / "bindings/callbacks.cdef").read_text())
    ffi.set_source(
        "actqkv_cpp._actqkv",
        "".join(f'#include "{header.name}"\n' for header in HEADERS),
        py_limited_api=True,
    )
    ffi.emit_c_code(target)


if __name__ == "__main__":
    main(sys.argv[1])
