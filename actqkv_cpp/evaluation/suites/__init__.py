"""The suites, by name. Each module yields samples and a scorer; the runner does the rest.

retrieve.py       passkey, number, kv
needle.py         needle, for heat maps
ruler.py          ruler: eight tasks
facts.py          facts, read-once
long_answer.py    long-answer
perplexity.py     perplexity, divergence from dense attention
longbench.py      LongBench v1, from a file
infinitebench.py  InfiniteBench, from a file
files.py          what the last two share
"""

from __future__ import annotations

from actqkv_cpp.evaluation.samples import Suite
from actqkv_cpp.evaluation.suites import facts, long_answer, needle, perplexity, retrieve, ruler

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        *retrieve.SUITES,
        needle.SUITE,
        ruler.SUITE,
        *facts.SUITES,
        long_answer.SUITE,
        perplexity.SUITE,
    )
}
