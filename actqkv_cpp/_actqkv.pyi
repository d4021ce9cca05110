"""The cffi module that bindings/build_ffi.py writes from actqkv.h and kernels.h."""

from typing import Any

ffi: Any
lib: Any
