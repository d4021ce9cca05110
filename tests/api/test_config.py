"""Breaks when Retrieval accepts nonsense, or when its names and defaults drift from the native library's."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from actqkv_cpp import ParameterError, Retrieval, config, methods, parse_size
from actqkv_cpp._native import _COLUMNS, _ENUMS, _SIZES, ffi, lib


@pytest.mark.parametrize(
    ("text", "n_tokens"),
    [("2k", 2048), ("128K", 131072), ("1m", 1 << 20), ("1.5k", 1536), (" 7 ", 7), (4096, 4096), (0, 0)],
)
def test_sizes(text: int | str, n_tokens: int) -> None:
    """Breaks when a size as people write it is misread."""
    assert parse_size(text) == n_tokens


@pytest.mark.parametrize("text", ["", "k", "1.3k", "-1", "1g", "1k2", "0x10", -1, None, True, 1.5])
def test_wrong_sizes(text: object) -> None:
    """Breaks when nonsense passes as a size."""
    with pytest.raises(ParameterError):
        parse_size(text)  # type: ignore[arg-type]


def test_default_sizes_are_the_librarys() -> None:
    """Breaks when a default of Retrieval and of actqkv_default_params differ."""
    params = lib.actqkv_default_params()
    assert {ours: getattr(Retrieval(), ours) for ours in _SIZES} == {o: getattr(params, t) for o, t in _SIZES.items()}


@pytest.mark.parametrize("column", _ENUMS)
def test_choices_are_the_librarys(column: str) -> None:
    """Breaks when a choice of a column and the library's enum differ."""
    prefix = _ENUMS[column]
    assert set(config._CHOICES[column]) == {n.removeprefix(prefix).lower() for n in dir(lib) if n.startswith(prefix)}


def test_every_column_can_be_overridden() -> None:
    """Breaks when a column of the table of methods has no parameter in Retrieval."""
    fields = {field.name for field in dataclasses.fields(Retrieval)}
    columns = {name for name, _ in ffi.typeof("struct actqkv_method").fields} - {"name"}
    for row in methods().values():
        assert set(row) == fields - {"method", *_SIZES}
        assert {_COLUMNS.get(name, name) for name in row} == columns


@pytest.mark.parametrize(
    "options",
    [{"score": "cosin"}, {"positions": 1}, {"budget": "lots"}, {"representatives": 1.5}, {"cutoff_temperature": "hot"}],
)
def test_wrong_values(options: dict[str, object]) -> None:
    """Breaks when a wrong value is taken."""
    with pytest.raises(ParameterError):
        Retrieval(**options)  # type: ignore[arg-type]


def test_unknown_option_names_the_near_one() -> None:
    """Breaks when a misspelt option is swallowed."""
    with pytest.raises(ParameterError, match="bugdet") as caught:
        Retrieval(bugdet=4096)  # type: ignore[call-arg]
    assert caught.value.hint == "did you mean 'budget'?"


def test_frozen_and_pickled() -> None:
    """Breaks when a Retrieval can change after it was checked, or cannot be sent to another process."""
    retrieval = Retrieval("dense", budget="4k")
    with pytest.raises(dataclasses.FrozenInstanceError):
        retrieval.budget = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(retrieval)) == retrieval
    assert retrieval.budget == 4096
    assert dataclasses.replace(retrieval, budget=2048) == copy.deepcopy(Retrieval("dense"))
