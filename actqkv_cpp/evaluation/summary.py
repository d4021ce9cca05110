"""A result as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rich.console import RenderableType
from rich.table import Table

from actqkv_cpp import tables
from actqkv_cpp.evaluation.results import Result, Row, Score
from actqkv_cpp.tables import size

_T = TypeVar("_T")
_Columns = dict[str, Callable[[Row], str]]
_Method = tuple[str, int | None]  # and its budget
_PADDING = 3  # of a column, with its share of the margins
_N_TASK_COLUMNS = 2  # task and length


def render(result: Result, *, width: int) -> str:
    """A table per suite: methods, lengths, scores with their intervals, tokens attended, speeds."""
    return tables.to_text(_parts(result, width), width=width)


def percent(score: float | None) -> str:
    return "n/a" if score is None else f"{100 * score:.1f}"


def _parts(result: Result, width: int) -> Iterator[RenderableType]:
    model, machine = result.model, result.machine
    yield (
        f"{model['name']}: {model['description']}, trained on {size(model['trained_length'])} tokens; seed "
        f"{result.parameters['seed']}\n{machine['cpu']}, {machine['threads']} threads; actqkv {result.version}"
        + (f" at {result.commit[:10]}" if result.commit else "")
        + "\n"
    )
    for suite in dict.fromkeys(row.cell.suite for row in result.rows):
        rows = [row for row in result.rows if row.cell.suite == suite]
        yield from _suite(suite, rows, width)
        if any(len(row.tasks) > 1 for row in rows):
            yield from _tasks(suite, rows, width)
    yield (
        "Scores are percentages with Wilson's interval of 95 %; questions about one document are counted as if they "
        "were independent. A length is that of the whole session: template, document, question and answer."
    )
    yield from _reasons(result.rows)


def _suite(suite: str, rows: Sequence[Row], width: int) -> Iterator[Table]:
    """A row per method and length: scores, and what they cost; as many tables as it takes for figures to be whole."""
    measures = dict.fromkeys(name for row in rows for name in row.total.measures if name != "nll")
    recalls = dict.fromkeys(name for row in rows for name in row.total.recalls)
    cells: _Columns = {
        "method": lambda row: row.cell.method,
        "budget": lambda row: size(row.cell.budget),
        "length": lambda row: size(row.cell.length),
    }
    figures: _Columns = {
        "score": lambda row: percent(row.total.score),
        "95 %": lambda row: _interval(row.total),
        "n": lambda row: f"{row.total.n:,}",
        **{name: partial(_measure, name) for name in measures},
        **{name: partial(_recall, name) for name in recalls},
        "attended": lambda row: _figure(row.attended_mean, 0),
        "dense layers": lambda row: _figure(row.dense_max, 0),
        "read tok/s": lambda row: _figure(row.prefill_tokens_per_s, 0),
        "answer tok/s": lambda row: _figure(row.decode_tokens_per_s, 0),
    }
    widths = {name: max(len(name), *(len(cell(row)) for row in rows)) for name, cell in (cells | figures).items()}
    filled = {name: widths[name] for name, cell in figures.items() if any(cell(row) for row in rows)}
    room = width - sum(widths[name] + _PADDING for name in cells)
    title = suite
    for names in _side_by_side(filled, room):
        table = tables.table(title, (name.replace("_", " ") for name in (*cells, *names)))
        for row in rows:
            table.add_row(*(cell(row) for cell in cells.values()), *(figures[name](row) for name in names))
        yield table
        title = f"{suite}, continued"


def _tasks(suite: str, rows: Sequence[Row], width: int) -> Iterator[Table]:
    """A row per task and length, a column per method; as many tables as it takes for names to be whole."""
    tasks = dict.fromkeys(task for row in rows for task in row.tasks)
    lengths = dict.fromkeys(row.cell.length for row in rows)
    room = width - max(map(len, tasks)) - _N_TASK_COLUMNS * _PADDING - len("length")
    columns = {_method(row): len(_column(_method(row))) for row in rows}
    for methods in _side_by_side(columns, room):
        names = map(_column, methods)
        table = tables.table(f"{suite}, by task (samples)", ("task", "length", *names))
        for task in tasks:
            for length in lengths:
                found = {
                    _method(row): row.tasks[task] for row in rows if row.cell.length == length and task in row.tasks
                }
                cells = (f"{percent(found[m].score)} ({found[m].n})" if m in found else "n/a" for m in methods)
                table.add_row(task, size(length), *cells)
        yield table


def _side_by_side(widths: Mapping[_T, int], room: int) -> Iterator[list[_T]]:
    """Columns of these widths in groups that take at most `room` characters, or of one."""
    group: list[_T] = []
    for column in widths:
        if group and sum(widths[one] + _PADDING for one in (*group, column)) > room:
            yield group
            group = []
        group.append(column)
    yield group


def _method(row: Row) -> _Method:
    return row.cell.method, row.cell.budget


def _column(method: _Method) -> str:
    name, budget = method
    return name if budget is None else f"{name} {size(budget)}"


def _measure(name: str, row: Row) -> str:
    return _figure(row.total.measures.get(name))


def _recall(name: str, row: Row) -> str:
    return percent(row.total.recalls[name]) if name in row.total.recalls else ""


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why figures are missing, and what was cut."""
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        names = dict.fromkeys(
            f"{row.cell.method} at {size(row.cell.length)}"
            if row.cell.length
            else f"{row.cell.suite} {row.cell.method}"
            for row in rows
            if row.reason == reason
        )
        yield f"n/a: {', '.join(names)}: {reason}."
    for row in rows:
        if row.n_cut:
            documents = f"{row.n_cut} of {row.n_documents} documents"
            yield f"{row.cell.suite}, {row.cell.method}: the middle was cut out of {documents}."


def _interval(score: Score) -> str:
    return (
        "" if score.ci_low is None or score.ci_high is None else f"{100 * score.ci_low:.1f}-{100 * score.ci_high:.1f}"
    )


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
