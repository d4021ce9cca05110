"""`python -m actqkv_cpp` is `actqkv`."""

from actqkv_cpp.cli import main

if __name__ == "__main__":
    main()
