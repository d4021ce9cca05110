"""Results as one HTML page that needs nothing else: no network, no script; light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from actqkv_cpp.drawing import MARK
from actqkv_cpp.evaluation import charts
from actqkv_cpp.evaluation.results import Result, Row
from actqkv_cpp.evaluation.summary import percent
from actqkv_cpp.evaluation.views import Chart, HeatMap, Series, View
from actqkv_cpp.tables import size

_N_COLOURS = 8
_N_DASHES = 3
_ABOUT_SCORES = (
    "Percent, with Wilson's interval of 95 % below; questions about one document are counted as if they were "
    "independent. A length is that of the whole session: template, document, question and answer. Budgets are tokens "
    "attended at a time."
)
_ABOUT_MAPS = (
    "Depth of the fact in the document, from its beginning (0 %) to its end; each cell is the share of its samples."
)
_ABOUT_SELECTED = (
    " Beside it, the share in which the chunk that holds the fact was selected in at least one layer: where that is "
    "high and answers are wrong, the model failed, not the retrieval."
)


def render(results: Sequence[Result]) -> str:
    """The page.

    Raises:
        StateError: the results do not belong together (`View`).
    """
    view = View(tuple(results))
    style = _styles(view)
    sections = [
        _section("Scores", _ABOUT_SCORES, _matrix(view)),
        *_maps(view),
        *_charts(view, style),
        _section("All figures", "", _details(view)),
        _section("Where this comes from", "", _provenance(view)),
    ]
    title = f"Evaluation of {view.results[0].model['name']}"
    css = files("actqkv_cpp.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    return (
        f'<!-- {MARK} -->\n<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{_facts(view)}\n</header>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _styles(view: View) -> charts.StyleOf:
    """A colour for each method, and dashes for budgets; the line of the most used one is whole."""
    methods = list(dict.fromkeys(series.method for series in view.series))
    budgets = [
        budget for budget, _ in Counter(row.cell.budget for row in view.rows).most_common() if budget is not None
    ]

    def style(series: Series) -> tuple[int, int]:
        dash = budgets.index(series.budget) if series.budget is not None else 0
        return methods.index(series.method) % _N_COLOURS, dash % _N_DASHES

    return style


def _section(title: str, about: str, body: str) -> str:
    words = f'<p class="about">{escape(about)}</p>\n' if about else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{words}{body}\n</section>"


def _facts(view: View) -> str:
    model, machine = view.results[0].model, view.results[0].machine
    facts = {
        "model": f"{model['description']}, {model['parameters'] / 1e6:,.1f} M parameters",
        "trained on": f"{size(model['trained_length'])} tokens",
        "machine": f"{machine['cpu']}, {machine['threads']} threads",
        "run": " · ".join(dict.fromkeys(result.started[:10] for result in view.results)),
        "seed": ", ".join(dict.fromkeys(str(result.parameters["seed"]) for result in view.results)),
    }
    items = (f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in facts.items())
    return f"<dl>{''.join(items)}</dl>"


# -- scores


def _matrix(view: View) -> str:
    """A row per suite, length and budget, a column per method; the best of a row in bold."""
    methods = list(dict.fromkeys(series.method for series in view.series))
    head = '<th scope="col">length</th>' + ('<th scope="col">budget</th>' if view.with_budget else "")
    head += "".join(f'<th scope="col" class="method">{escape(method)}</th>' for method in methods)
    n_columns = 2 + view.with_budget + len(methods)
    body: list[str] = []
    for suite in view.suites:
        lines = list(_matrix_rows([row for row in view.rows if row.cell.suite == suite], methods, view))
        name = f'<th scope="rowgroup" rowspan="{len(lines)}">{escape(suite)}</th>'
        body += [f'<tr><td class="gap" colspan="{n_columns}"></td></tr>'] if body else []
        body += [f"<tr>{name if i == 0 else ''}{line}</tr>" for i, line in enumerate(lines)]
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _matrix_rows(rows: Sequence[Row], methods: Sequence[str], view: View) -> Iterator[str]:
    """The cells of one suite: a line for each length and budget; who attends everything stands in every budget's."""
    for length in dict.fromkeys(row.cell.length for row in rows):
        here = {(row.cell.method, row.cell.budget): row for row in rows if row.cell.length == length}
        budgets: list[int | None] = [*sorted({budget for _, budget in here if budget is not None})] or [None]
        for budget in budgets:
            found = {method: here.get((method, budget)) or here.get((method, None)) for method in methods}
            scores = [row.total.score for row in found.values() if row and row.total.score is not None]
            best = max(scores) if len(scores) > 1 else None
            line = f'<th scope="row">{size(length)}</th>' + (f"<th>{size(budget)}</th>" if view.with_budget else "")
            yield line + "".join(_score_cell(found[method], best) for method in methods)


def _score_cell(row: Row | None, best: float | None) -> str:
    if row is None:
        return "<td></td>"
    total = row.total
    if total.score is None:
        return f'<td class="none" title="{escape(row.reason or "")}">n/a</td>'
    bold = " best" if total.score == best else ""
    interval = f"{percent(total.ci_low)}-{percent(total.ci_high)}"
    note = escape(f"{row.reason or ''} n = {total.n}, {row.n_documents} documents".strip())
    return (
        f'<td class="score{bold}" style="--heat:{charts.warmth(total.score)}" title="{note}">'
        f"<b>{percent(total.score)}</b><small>{interval}</small></td>"
    )


def _label(series: Series, view: View) -> str:
    budget = f"<small>{size(series.budget)}</small>" if series.budget is not None and view.with_budget else ""
    return f"{escape(series.method)}{budget}"


# -- heat maps


def _maps(view: View) -> Iterator[str]:
    for suite, found in groupby(view.heat_maps(), key=lambda maps: maps[0].suite):
        maps = list(found)
        about = _ABOUT_MAPS + (_ABOUT_SELECTED if any(len(pair) > 1 for pair in maps) else "")
        body = "".join(_map_figure(pair, view) for pair in maps)
        yield _section(f"{suite}: where in the document", about, f'<div class="maps">{body}</div>{_SCALE}')


def _map_figure(pair: Sequence[HeatMap], view: View) -> str:
    drawn = "".join(f'<div class="map"><p>{escape(one.title)}</p>{charts.heat_map(one)}</div>' for one in pair)
    name = escape(view.label(pair[0].series))
    return f'<figure><figcaption>{name}</figcaption><div class="pair">{drawn}</div></figure>'


_SCALE = '<p class="scale"><span>0 %</span><i></i><span>100 %</span><i class="na"></i><span>no figure</span></p>'


# -- curves


def _charts(view: View, style: charts.StyleOf) -> Iterator[str]:
    for title, about, found in (
        ("Accuracy against length", "Bands are the intervals.", view.by_length()),
        (
            "Accuracy against budget",
            "Bands are the intervals; a line across is a method that attends everything.",
            view.by_budget(),
        ),
        (
            "Foretelling text, per position",
            "Over stretches of 32 tokens that end at tenths of the text; divergence is KL(dense || method).",
            view.by_position(),
        ),
    ):
        if found:
            drawn = "".join(_chart_figure(chart, style, view.label) for chart in found)
            legend = _legend(found, style, view)
            yield _section(title, about, f'{legend}<div class="charts">{drawn}</div>')


def _chart_figure(chart: Chart, style: charts.StyleOf, label: Callable[[Series], str]) -> str:
    caption = f"{escape(chart.title)} <small>{escape(chart.unit)}</small>"
    return f"<figure><figcaption>{caption}</figcaption>{charts.line_chart(chart, style, label)}</figure>"


def _legend(found: Iterable[Chart], style: charts.StyleOf, view: View) -> str:
    items = []
    for series in dict.fromkeys(curve.series for chart in found for curve in chart.curves):
        colour, dash = style(series)
        line = f'<line x1="1" x2="27" y1="8" y2="8" class="line d{dash}"/>{charts.marker(14, 8, colour)}'
        drawn = f'<svg viewBox="0 0 28 16" width="28" height="16" aria-hidden="true">{line}</svg>'
        items.append(f'<li class="c{colour}">{drawn}{escape(view.label(series))}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


# -- tables


def _details(view: View) -> str:
    recalls = list(dict.fromkeys(name for row in view.rows for name in row.total.recalls))
    measures = list(dict.fromkeys(name for row in view.rows for name in row.total.measures if name != "nll"))
    columns = [
        "suite", "method", "budget", "length", "score", "95 %", "n", "documents", *measures, *recalls,
        "attended", "at most", "dense layers", "read tok/s", "answer tok/s", "KV MB", "summaries MB", "resident MB",
    ]  # fmt: skip
    head = "".join(f'<th scope="col">{escape(name.replace("_", " "))}</th>' for name in columns)
    body = []
    for row in view.rows:
        total = row.total
        cells = [
            row.cell.suite, row.cell.method, size(row.cell.budget), size(row.cell.length), percent(total.score),
            "" if total.ci_low is None else f"{percent(total.ci_low)}-{percent(total.ci_high)}",
            f"{total.n:,}", f"{row.n_documents:,}",
            *(_figure(total.measures.get(name), 3) for name in measures),
            *(percent(total.recalls[name]) if name in total.recalls else "" for name in recalls),
            _figure(row.attended_mean), _figure(row.attended_max), _figure(row.dense_max),
            _figure(row.prefill_tokens_per_s), _figure(row.decode_tokens_per_s), _megabytes(row.kv_bytes),
            _megabytes(row.summary_bytes), _megabytes(row.resident_bytes),
        ]  # fmt: skip
        words = "".join(f"<td>{escape(cell)}</td>" for cell in cells[:2])
        figures = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells[2:])
        body.append(f"<tr>{words}{figures}</tr>")
        cut = f"The middle was cut out of {row.n_cut} documents." if row.n_cut else ""
        if note := f"{row.reason or ''} {cut}".strip():
            body.append(f'<tr class="reason"><td></td><td colspan="{len(columns) - 1}">{escape(note)}</td></tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    tasks = _tasks(view)
    return f'<details><summary>{len(view.rows)} rows</summary><div class="scroll">{table}</div></details>' + (
        f'<details><summary>by task</summary><div class="scroll">{tasks}</div></details>' if tasks else ""
    )


def _tasks(view: View) -> str:
    series = view.series
    body = []
    for suite, length in dict.fromkeys((row.cell.suite, row.cell.length) for row in view.rows):
        found = {
            Series(row.cell.method, row.cell.budget): row
            for row in view.rows
            if (row.cell.suite, row.cell.length) == (suite, length)
        }
        for task in dict.fromkeys(task for row in found.values() for task in row.tasks):
            scores = (found[one].tasks.get(task) if one in found else None for one in series)
            cells = "".join(
                f'<td class="n">{percent(score.score)} <small>({score.n})</small></td>' if score else "<td></td>"
                for score in scores
            )
            body.append(f"<tr><td>{escape(suite)}</td><td>{escape(task)}</td><td>{size(length)}</td>{cells}</tr>")
    if not body:
        return ""
    head = "".join(f'<th scope="col">{_label(one, view)}</th>' for one in series)
    return (
        f"<table><thead><tr><th>suite</th><th>task</th><th>length</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _provenance(view: View) -> str:
    parts = []
    for result in view.results:
        facts = {
            "actqkv": result.version + (f", commit {result.commit}" if result.commit else ""),
            "started": result.started,
            **{f"model {name}": value for name, value in result.model.items()},
            **{f"machine {name}": value for name, value in result.machine.items()},
            **result.parameters,
        }
        items = "".join(
            f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(_plain(value))}</td></tr>"
            for name, value in facts.items()
        )
        suites = ", ".join(dict.fromkeys(row.cell.suite for row in result.rows))
        parts.append(
            f"<details><summary>{escape(suites)}</summary>"
            f'<div class="scroll"><table class="facts">{items}</table></div></details>'
        )
    return "".join(parts)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "-"
    return "-" if value is None else str(value)


def _figure(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _megabytes(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.1f}"
