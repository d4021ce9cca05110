"""How often a planned chunk has its copy on a GPU already, by how many chunks have room there; needs no GPU.

    python tests/kv/hit_rates.py                    # about 128K tokens, some minutes

The plans of reading, of short answers and of a long one are recorded: the bundled model, a generated document with its
questions. They are replayed through hot_chunks with fewer and fewer slots, as a session whose plans are made on the GPU
calls it; hits of answering steps count. Beside them what no choice of what leaves can surpass: with all plans known
beforehand, what is planned again last leaves first (Belady 1966).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from programs import compile_program

from actqkv_cpp import Llama
from actqkv_cpp.evaluation.generator import make_document
from actqkv_cpp.evaluation.generator.facts import TASKS
from actqkv_cpp.recording import Record, Recording

SHARES = (0.5, 0.2, 0.1, 0.06, 0.04)  # of all chunks, that have slots
PER_TOKEN = 1.28  # tokens of the generator per token of the bundled model
LONG_TOKENS = 192
WRITE = "Tell everything that you can about this, at length and in your own words."

Rates = dict[str, float]
Plans = list[
    tuple[str, Recording]
]  # in their order, with what they are of; after the first all start behind the reading


def recorded(n_tokens: int) -> Plans:
    made = make_document(int(n_tokens * PER_TOKEN), tasks=TASKS, seed="hit rates", heldout=True, count=2)
    plans: Plans = []
    with Llama(n_ctx=n_tokens + n_tokens // 4 + 2048, verbose=False) as llm:
        with llm.record() as trace:
            document = llm.read(text=made.text)
        plans.append(("reading", trace))
        print(f"{document.tokens_read:,} tokens read, {len(made.questions)} questions", flush=True)
        for question in made.questions:
            with llm.record() as trace:
                document.ask(question.question, max_tokens=64)
            plans.append(("short answers", trace))
        with llm.record() as trace:
            said = {"min_tokens": LONG_TOKENS, "max_tokens": LONG_TOKENS, "temperature": 0.8, "seed": 1}
            llm.chat(document).say(WRITE, **said)
        plans.append(("a long answer", trace))
    return plans


def chunks_of(record: Record) -> list[int]:
    return list(range(record.n_chunks)) if record.chosen is None else record.chosen[0].tolist()


def kind_of(of: str, record: Record) -> str | None:
    """What its hits count for; None: a window that is read."""
    return of if record.phase == "decode" else None


def widest(plans: Plans) -> int:
    return max(len(chunks_of(record)) for _, trace in plans for record in trace)


def commands(plans: Plans) -> Iterator[tuple[str, str | None]]:
    """What a session asks of hot_chunks, and what hits of it count for."""
    n_closed = n_read = 0
    for number, (of, trace) in enumerate(plans):
        if number == 1:
            n_read = n_closed
        if number > 0:
            yield f"forget {n_read}", None
            n_closed = n_read
        last: dict[int, list[int]] = {}
        for record in trace:
            if record.layer == 0 and record.n_chunks > n_closed:
                yield from ((f"fill {layer} {n_closed} {record.n_chunks}", None) for layer in range(trace.n_layer))
                n_closed = record.n_chunks
            last[record.layer] = chunks_of(record)
            yield f"plan {record.layer} {' '.join(map(str, last[record.layer]))}", kind_of(of, record)
            follows = (record.layer + 1) % trace.n_layer
            if record.phase != "decode" and follows in last:
                yield f"prefetch {follows} {' '.join(map(str, last[follows]))}", None


def hit_rates(program: Path, plans: Plans, n_slots: int) -> Rates:
    """Of hot_chunks, by what the plans are of."""
    n_layer = plans[0][1].n_layer
    asked = list(commands(plans))
    lines = [f"new {n_layer} 1024 {n_layer * n_slots * 1024} {widest(plans)}", *(command for command, _ in asked)]
    done = subprocess.run([program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("stats")]
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    before = (0, 0)
    for (_, of), words in zip(asked, told, strict=True):
        hits, misses = int(words[1]), int(words[2])
        if of is not None:
            found[of][0] += hits - before[0]
            found[of][1] += hits + misses - sum(before)
        before = (hits, misses)
    return {of: hits / n for of, (hits, n) in found.items()}


def best_rates(plans: Plans, n_slots: int) -> Rates:
    """With all plans known beforehand, and slots filled for them while the document was read."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for layer in range(plans[0][1].n_layer):
        planned = [
            (kind_of(of, record), chunks_of(record))
            for of, trace in plans[1:]
            for record in trace
            if record.layer == layer
        ]
        uses: dict[int, list[int]] = defaultdict(list)  # of a chunk, the last first
        for at in reversed(range(len(planned))):
            for chunk in planned[at][1]:
                uses[chunk].append(at)
        hot = set(sorted(uses, key=lambda chunk: uses[chunk][-1])[:n_slots])
        for of, chunks in planned:
            if of is not None:
                found[of][0] += len(hot.intersection(chunks))
                found[of][1] += len(chunks)
            for chunk in chunks:
                uses[chunk].pop()
            others = sorted(hot.difference(chunks), key=lambda chunk: -uses[chunk][-1] if uses[chunk] else -np.inf)
            hot = {*chunks, *others[::-1][: n_slots - len(chunks)]}
    return {of: hits / n for of, (hits, n) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128 * 1024, help="of the document, about")
    options = parser.parse_args()
    plans = recorded(options.tokens)
    n_chunks = max(record.n_chunks for record in plans[0][1])
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(folder), "hot_chunks_driver.cpp", "kv/hot_chunks.cpp")
        for share in SHARES:
            n_slots = max(int(share * n_chunks), widest(plans))
            ours, best = hit_rates(program, plans, n_slots), best_rates(plans, n_slots)
            told = ", ".join(f"{of} {rate:.3f} (at best {best[of]:.3f})" for of, rate in ours.items())
            print(f"{n_slots} slots, {share:.0%} of {n_chunks:,} chunks: {told}", flush=True)


if __name__ == "__main__":
    main()
