"""`python -m actqkv_cpp` is `actqkv`."""

from __future__ import annotations

import sys

_INTERRUPTED = 130  # as cli/_errors.py has it, whose import this must not need


def main() -> None:
    """Entry point of the `actqkv` script. Exit status: 0, 1 failed, 2 usage, 130 interrupted.

    Ctrl-C while the commands' modules load, for half a second, ends as quietly as it does later.
    """
    try:
        from actqkv_cpp.cli import app  # noqa: PLC0415 (see above)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    app(prog_name="actqkv")


if __name__ == "__main__":
    main()
