"""Measuring quality on long documents, offline: retrieval methods side by side. `actqkv eval` and `actqkv report`.

samples.py   what a suite is made of: samples, questions, the room they must fit
suites/      the suites, one module each
metrics.py   scores of answers
engines.py   a model under one method after another
runner.py    the one loop: read, ask, keep a record; readings shared
journal.py   records on disk, so that a killed run goes on
results.py   rows with intervals, and the result file
summary.py   a result as tables
views.py     what is drawn of results; charts.py and page.py draw HTML, figure.py pictures
generator/   documents with planted facts
"""
