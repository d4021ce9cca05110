"""Breaks when a status code of the library has no exception of its own, or an exception loses message or hint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import actqkv_cpp
from actqkv_cpp import errors
from actqkv_cpp._native import check, ffi, lib

CODES = [name for name in dir(lib) if name.startswith("ACTQKV_ERR_")]


@pytest.mark.parametrize("name", CODES)
def test_every_code_is_one_exception(name: str) -> None:
    """Breaks when a code raises something generic, or drops the library's message."""
    error = ffi.new("struct actqkv_error *", {"message": b"expected 1, found 2"})
    kind, hint = errors.STATUS_ERRORS[name]
    with pytest.raises(kind, match="expected 1, found 2") as caught:
        check(getattr(lib, name), error)
    assert caught.value.hint == hint
    assert type(caught.value) is kind


def test_ok_raises_nothing() -> None:
    """Breaks when success is taken for a failure."""
    check(lib.ACTQKV_OK, ffi.new("struct actqkv_error *"))


def test_codes_do_not_share_an_exception() -> None:
    """Breaks when two codes cannot be told apart, or the table names a code that the library lacks."""
    assert set(errors.STATUS_ERRORS) == set(CODES)
    kinds = [kind for kind, _ in errors.STATUS_ERRORS.values()]
    assert len(set(kinds)) == len(kinds)


def test_unknown_code() -> None:
    """Breaks when a code newer than this file passes silently."""
    with pytest.raises(errors.InternalError, match="status 99"):
        check(99, ffi.new("struct actqkv_error *"))


def test_tree_in_the_docstring() -> None:
    """Breaks when the documented exception tree and the classes differ."""
    named = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.ActqkvError)}
    assert named | {"ActqkvError"} == classes
    assert classes <= set(actqkv_cpp.__all__)


def test_near_match() -> None:
    """Breaks when a misspelt name is refused without the name that was meant."""
    error = errors.unknown_name("option", "bugdet", ["budget", "window"])
    assert error.hint == "did you mean 'budget'?"
    assert isinstance(error, ValueError)


def test_no_other_module_defines_exceptions() -> None:
    """Breaks when an exception class appears outside errors.py."""
    folder = Path(actqkv_cpp.__file__).parent
    found = [f.name for f in folder.glob("*.py") if re.search(r"class \w+\(.*(Error|Exception)\)", f.read_text())]
    assert found == ["errors.py"]
