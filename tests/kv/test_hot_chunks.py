"""When this fails, the GPU attends other chunks than were planned, or copies far more than it has to."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

KIB = 1024


@pytest.fixture(scope="module")
def program(compiled: Callable[..., Path]) -> Path:
    return compiled("hot_chunks_driver.cpp", "kv/hot_chunks.cpp")


@dataclass
class Step:
    """What one command did."""

    started: list[tuple[int, int, int]] = field(default_factory=list)  # layer, chunk, slot
    slots: list[int] = field(default_factory=list)
    hits: int = 0
    misses: int = 0
    prefetched: int = 0
    wasted: int = 0
    n_bytes: int = 0
    error: str = ""


Run = Callable[..., list[Step]]


@pytest.fixture
def run(program: Path) -> Run:
    """Commands to a new hot_chunks of these sizes: a step for each of them."""

    def started(*commands: str, layers: int = 1, slots: int = 4, most: int = 2, limit: int | None = None) -> list[Step]:
        room = layers * slots * KIB if limit is None else limit
        lines = [f"new {layers} {KIB} {room} {most}", *commands]
        done = subprocess.run([program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
        return list(_steps(done.stdout))

    return started


def _steps(out: str) -> Iterator[Step]:
    step = Step()
    for line in out.splitlines():
        word, _, rest = line.partition(" ")
        if word == "start":
            layer, chunk, slot = map(int, rest.split())
            step.started.append((layer, chunk, slot))
        elif word == "at":
            step.slots.append(int(rest))
        elif word == "error":
            yield Step(error=rest)
        elif word == "stats":
            step.hits, step.misses, step.prefetched, step.wasted, step.n_bytes = map(int, rest.split())
            yield step
            step = Step()


def brought(step: Step) -> list[int]:
    return [chunk for _, chunk, _ in step.started]


def test_a_plan_is_brought_in_once(run: Run) -> None:
    first, again, other = run("plan 0 7 3", "plan 0 3 7", "plan 0 3 9")
    assert brought(first) == [7, 3]
    assert again.started == []
    assert again.slots == first.slots[::-1]
    assert brought(other) == [9]
    assert (other.hits, other.misses, other.n_bytes) == (3, 3, 3 * KIB)


def test_layers_do_not_share(run: Run) -> None:
    one, two = run("plan 0 5", "plan 1 5", layers=2)
    assert [layer for layer, _, _ in one.started + two.started] == [0, 1]


def test_what_was_planned_longest_ago_leaves(run: Run) -> None:
    *_, last = run("plan 0 1", "plan 0 2", "plan 0 3", "plan 0 4", "plan 0 1", "plan 0 5", "plan 0 1 2")
    assert brought(last) == [2], "chunk 1 was planned again, chunk 2 was the oldest"


def test_what_is_planned_often_stays(run: Run) -> None:
    """A chunk that many plans had leaves for one that only the last had; or it never leaves."""
    *_, stays, left = run("plan 0 1 2", "plan 0 2", "plan 0 2", "plan 0 3 4", "plan 0 5", "plan 0 2", "plan 0 1")
    assert brought(stays) == []
    assert brought(left) == [1]
    after = [f"plan 0 {chunk}" for chunk in range(10, 60)]
    *_, faded = run(*["plan 0 2"] * 9, *after, "plan 0 2")
    assert brought(faded) == [2]


def test_a_right_guess_is_a_hit(run: Run) -> None:
    _, guess, plan = run("plan 0 1 2", "prefetch 0 2 3", "plan 0 2 3")
    assert brought(guess) == [3]
    assert plan.started == []
    assert (plan.hits, plan.misses, plan.prefetched, plan.wasted) == (2, 2, 1, 0)


def test_a_guess_leaves_the_current_plan_alone(run: Run) -> None:
    plan, guess, again = run("plan 0 1 2", "prefetch 0 3 4 5 6", "plan 0 1 2")
    assert brought(guess) == [3, 4], "two slots are free of the plan"
    assert {slot for _, _, slot in guess.started}.isdisjoint(plan.slots)
    assert again.started == []


def test_a_wrong_guess_leaves_first_and_is_counted(run: Run) -> None:
    *_, last = run("plan 0 1 2", "prefetch 0 3 4", "plan 0 1 2", "plan 0 5 6", "plan 0 1 2")
    assert last.started == []
    assert last.wasted == 2


def test_a_rewind_forgets(run: Run) -> None:
    *_, kept, lost = run("plan 0 3 8", "forget 8", "plan 0 3", "plan 0 8")
    assert brought(kept) == []
    assert brought(lost) == [8]


def test_a_limit_below_one_plan_is_refused(run: Run) -> None:
    """The message names what was given, what is needed, and for how many chunks."""
    (refused,) = run(layers=8, most=2048, limit=9 * 1024 * KIB)
    assert refused.error == (
        "9 MiB of GPU memory hold 1152 chunks in each of 8 layers, a step attends up to 2048: "
        "at least 16 MiB are needed"
    )
    assert run("plan 0 1", layers=8, most=2048, limit=16 * 1024 * KIB)[0].error == ""


def test_a_plan_above_the_most_is_refused(run: Run) -> None:
    assert "the most are 2" in run("plan 0 1 2 3")[0].error


def test_free_slots_are_filled(run: Run) -> None:
    """What closes is brought in while there is room, in nobody's place, and is not copied when it is planned."""
    planned, filled, again, other = run("plan 0 7", "fill 0 5 9", "fill 0 8 20", "plan 0 5 8")
    assert planned.started == [(0, 7, 0)]
    assert filled.started == [(0, 5, 1), (0, 6, 2), (0, 8, 3)]
    assert again.started == []
    assert (other.started, other.slots) == ([], [1, 3])
    assert (other.hits, other.misses) == (2, 1)


@pytest.mark.parametrize("seed", range(8))
def test_every_planned_chunk_is_where_it_is_said_to_be(run: Run, seed: int) -> None:
    """Random plans, guesses and rewinds, against a recount of what lies in every slot."""
    rng = random.Random(seed)
    layers, slots, most = rng.randint(1, 3), rng.randint(6, 20), 6
    commands = []
    for _ in range(300):
        layer, kind = rng.randrange(layers), rng.random()
        chunks = rng.sample(range(rng.choice([8, 40, 200])), rng.randint(0, most))
        if kind < 0.1:
            commands.append(f"forget {rng.randint(0, 40)}")
        elif kind < 0.15:
            commands.append(f"fill {layer} {(n := rng.randint(0, 40))} {n + rng.randint(0, 9)}")
        else:
            commands.append(f"{'plan' if kind < 0.6 else 'prefetch'} {layer} " + " ".join(map(str, chunks)))
    lies: dict[tuple[int, int], int] = {}  # (layer, slot) -> chunk
    current: dict[int, set[int]] = {layer: set() for layer in range(layers)}  # slots of a layer's plan
    hits = copied = 0
    for command, step in zip(commands, run(*commands, layers=layers, slots=slots, most=most), strict=True):
        kind, first, *numbers = command.split()
        before = dict(lies)
        for layer, chunk, slot in step.started:
            assert kind != "prefetch" or slot not in current[layer], "a guess overwrote the current plan"
            assert kind != "fill" or (layer, slot) not in lies, "a chunk lost its slot to one that nobody asked for"
            assert chunk not in {c for (il, _), c in lies.items() if il == layer}, "copied though it was there"
            lies[layer, slot] = chunk
            copied += 1
        if kind == "forget":
            lies = {at: chunk for at, chunk in lies.items() if chunk < int(first)}
            current = {layer: {slot for slot in used if (layer, slot) in lies} for layer, used in current.items()}
        if kind == "plan":
            chunks = [int(number) for number in numbers]
            assert [lies[int(first), slot] for slot in step.slots] == chunks
            current[int(first)] = set(step.slots)
            hits += sum(c in {d for (il, _), d in before.items() if il == int(first)} for c in chunks)
        assert all(slot < slots for _, slot in lies)
        assert (step.hits, step.n_bytes) == (hits, copied * KIB)
