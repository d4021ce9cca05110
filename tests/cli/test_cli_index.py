"""Breaks when a document read by `actqkv index` is not the document that chat and ask then answer from."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Actqkv, Terminal, assert_failed, command, environment

from actqkv_cpp import kvfile

SMALL = ["--threads", "1", "--local", "64", "--sink", "4", "--budget", "256", "--max-tokens", "8"]
READ = SMALL[:-2]  # what a reading takes of them


@pytest.fixture(scope="module")
def indexed(babbler: Path, book: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The KV file of `book`, read by the babbler."""
    out = tmp_path_factory.mktemp("indexed") / "book.akv"
    done = subprocess.run(
        command("index", babbler, book, "-o", out, *READ),
        env=environment(),
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "in " in done.stderr
    assert f"{out} written" in done.stderr
    return out


def answers(found: str) -> tuple[object, ...]:
    """What does not depend on the clock."""
    result = json.loads(found)
    return result["answers"], result["usage"], result["memory"]


def test_ask(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path) -> None:
    """A file answers otherwise than its document, or has to be read."""
    fresh = actqkv("ask", babbler, "-d", book, "Who?", "Where?", "--json", *SMALL)
    opened = actqkv("ask", babbler, "-d", indexed, "Who?", "Where?", "--json", "--threads", 1, "--max-tokens", 8)
    assert fresh.status == opened.status == 0, opened.err
    assert json.loads(fresh.out)["answers"] == json.loads(opened.out)["answers"]
    assert f"opened {indexed}" in opened.err
    assert "read " not in opened.err


def test_options_that_were_given(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path) -> None:
    """An option beside a KV file is ignored, or one that was not given is not that of the file."""
    ask = ("ask", babbler, "-d", indexed, "Who?", "--json", "--threads", 1, "--max-tokens", 8)
    found = actqkv(*ask, "--budget", 512)
    assert (found.status, "attends 512 tokens" in found.err) == (0, True), found.err
    for option, words in (
        (["--local", 96], ["--local is 96", "reading's 64"]),
        (["--chunk", 16], ["--chunk is 16", "reading's 32"]),
        (["--method", "infllm"], ["'infllm' cannot answer from what 'actqkv' read"]),
        (["--method", "actqk"], ["did you mean 'actqkv'?"]),
        (["--kv-type", "q8_0"], ["--kv-type is q8_0", "has f16"]),
        (["--system", "Be brief."], ["--system to actqkv index"]),
        (["--kv-file", "x.akv"], ["on disk already"]),
        (["--ctx", "1k"], ["--ctx is 1024"]),
    ):
        assert_failed(actqkv(*ask, *option), *words)


def test_more_documents(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path, tmp_path: Path) -> None:
    """A second document beside a KV file is not read, or a KV file that cannot be opened there is another text."""
    more = ("Who?", "--threads", 1, "--max-tokens", 8, "--json")
    texts, opened = [], ("-d", indexed)
    for second in (book, indexed):
        found = actqkv("ask", babbler, *opened, "-d", second, *more)
        assert found.status == 0, found.err
        assert ("tokens are read again" in found.err) == (second == indexed)
        texts.append(json.loads(found.out)["answers"])
        assert json.loads(found.out)["usage"]["document_tokens"] > 1.9 * kvfile.info(indexed).n_tokens
    assert texts[0] == texts[1]
    other = tmp_path / "other.txt"
    other.write_text("Another document.")
    behind, plain = (actqkv("ask", babbler, "-d", other, "-d", name, *more, *READ[2:]) for name in (indexed, book))
    assert (behind.status, "opened" in behind.err) == (0, False), behind.err
    assert json.loads(behind.out)["answers"] == json.loads(plain.out)["answers"]


def test_inspect(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path) -> None:
    """What is chosen for a question differs between a document and its KV file."""
    inspect = ("--json", "--threads", 1, "--max-tokens", 4)
    opened = actqkv("inspect", babbler, "-d", indexed, "Who?", *inspect)
    fresh = actqkv("inspect", babbler, "-d", book, "Who?", *inspect, *READ[2:])
    assert (opened.status, fresh.status) == (0, 0), opened.err
    one, two = json.loads(opened.out), json.loads(fresh.out)
    assert one["steps"] == two["steps"]
    assert one["layers"] == two["layers"]
    assert two["anchors"]
    assert one["anchors"] == []
    assert "does not say which of its tokens were anchors" in opened.err
    both = actqkv("inspect", babbler, "-d", indexed, "-d", book, "Who?", *inspect)
    assert (both.status, len(json.loads(both.out)["documents"])) == (0, 2), both.err


def test_chat(terminal: Callable[..., Terminal], babbler: Path, indexed: Path) -> None:
    """A conversation over a KV file does not begin at once."""
    with_file = terminal("chat", babbler, "-d", indexed, "--threads", 1, "--max-tokens", 4)
    assert "opened" in with_file.prompt()
    with_file.type("Who?")
    with_file.prompt()
    with_file.type("/quit")
    assert with_file.end() == 0


def test_added_to_a_chat(actqkv: Actqkv, babbler: Path, indexed: Path, tmp_path: Path) -> None:
    """A KV file that is read in a chat is not what the chat has when it goes on another day."""
    (tmp_path / "other.txt").write_text("Another document.")
    home = {"ACTQKV_DATA_DIR": str(tmp_path / "data")}
    chat, small = ("chat", babbler), ("--ctx", "8k", "--threads", 1, "--max-tokens", 8)
    lines = f"Who?\n/read {indexed}\nWhere?\n/save talk\nWhen?\n"
    said = actqkv(*chat, "-d", "other.txt", *small, stdin=lines, **home)
    assert (said.status, "tokens are read again" in said.err) == (0, True), said.err
    assert "saved; actqkv chat --resume talk goes on" in said.err
    again = actqkv(*chat, "--resume", "talk", *small, stdin="When?\n", **home)
    assert again.status == 0, again.err
    assert again.out.splitlines()[-1] == said.out.splitlines()[-1]


def test_killed_and_gone_on(babbler: Path, book: Path, indexed: Path, actqkv: Actqkv, tmp_path: Path) -> None:
    """A reading that was killed, or interrupted, begins again, or becomes another."""
    text = tmp_path / "long.txt"
    text.write_text(book.read_text(encoding="utf-8") * 20, encoding="utf-8")
    index = ("index", babbler, text, "-o", tmp_path / "long.akv", *READ)
    for kind in (signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(command(*index), env=environment(), stderr=subprocess.DEVNULL, cwd=tmp_path) as child:
            before = kvfile.info(tmp_path / "long.akv").n_done if (tmp_path / "long.akv").exists() else 0
            while child.poll() is None:
                time.sleep(0.05)
                if (tmp_path / "long.akv").exists() and kvfile.info(tmp_path / "long.akv").n_done > before:
                    child.send_signal(kind)
                    break
            status = child.wait()
        assert status == (-signal.SIGKILL if kind == signal.SIGKILL else 130)
    stopped = kvfile.info(tmp_path / "long.akv")
    assert 0 < stopped.n_done < stopped.n_tokens
    found = actqkv(*index)
    assert (found.status, f"holds {stopped.n_done:,} of" in found.err) == (0, True), found.err
    assert "complete already" in actqkv(*index).err
    fresh = actqkv("ask", babbler, "-d", text, "Who?", "--json", *SMALL)
    opened = actqkv("ask", babbler, "-d", tmp_path / "long.akv", "Who?", "--json", "--threads", 1, "--max-tokens", 8)
    assert json.loads(fresh.out)["answers"] == json.loads(opened.out)["answers"]
    kvfile.verify(tmp_path / "long.akv")


def test_kv_file(actqkv: Actqkv, babbler: Path, book: Path, tmp_path: Path) -> None:
    """Keys and values on disk give another answer, or the second run reads again."""
    ask = ("ask", babbler, "-d", book, "Who?", "--json", *SMALL)
    memory = actqkv(*ask)
    disk = [actqkv(*ask, "--kv-file", "a.akv") for _ in range(2)]
    assert [found.status for found in disk] == [0, 0], disk[1].err
    assert "of RAM" in disk[0].err
    assert f"nothing is left to read of {book}" in disk[1].err
    roomy = actqkv(*ask, "--kv-file", "b.akv", "--ctx", "64k")
    on_disk = [re.findall(r"of RAM, ([\d.]+ \w+) in \w.akv", found.err) for found in (*disk, roomy)]
    assert len(on_disk[0]) == 1
    assert on_disk[0] == on_disk[1] == on_disk[2]  # what the document takes, not what --ctx would
    for found in disk:
        assert json.loads(found.out)["answers"] == json.loads(memory.out)["answers"]
    assert json.loads(disk[1].out)["timing"]["prefill_s"] < json.loads(disk[0].out)["timing"]["prefill_s"]


def test_looking_at_files(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path, tmp_path: Path) -> None:
    """--list, --info and --verify say something else than what is there."""
    info = kvfile.info(indexed)
    for found in (actqkv("index", "--list", indexed.parent), actqkv("index", "--list", indexed)):
        assert (found.status, found.out.count("\n")) == (0, 1)
        assert f"{info.n_tokens:,} tokens of {book}" in found.out
    row = json.loads(actqkv("index", "--info", "--json", indexed).out)["files"][0]
    assert (row["tokens"], row["complete"], row["reading"]["n_local"]) == (info.n_tokens, True, 64)
    assert "chunks of 32 tokens" in actqkv("index", "--info", indexed).out
    assert actqkv("index", "--verify", indexed).status == 0
    damaged = tmp_path / "damaged.akv"
    data = bytearray(indexed.read_bytes())
    data[-5 * 65536 : -4 * 65536] = bytes(65536)
    damaged.write_bytes(data)
    assert_failed(actqkv("index", "--verify", damaged), "is damaged", "damaged.akv")
    both = actqkv("index", "--list", indexed, "none.akv")
    assert (both.status, both.out.count("\n")) == (1, 1)
    assert "none.akv: No such file" in both.err
    (tmp_path / "empty").mkdir()
    assert_failed(actqkv("index", "--list", "empty"), "no KV files in empty")


@pytest.mark.parametrize(
    "arguments",
    [
        ["index"],
        ["index", "a.txt"],
        ["index", "-o", "a.akv"],
        ["index", "--list", "--info"],
        ["index", "--info", "-o", "a"],
        ["index", "--verify", "--json", "a.akv"],
        ["index", "a.txt", "-o", "a.akv", "--json"],
    ],
    ids=" ".join,
)
def test_usage(actqkv: Actqkv, arguments: list[str]) -> None:
    """Wrong usage is no failure of the work."""
    found = actqkv(*arguments)
    assert (found.status, found.out) == (2, "")
    assert "--help" in found.err


def test_files_that_cannot_be(actqkv: Actqkv, babbler: Path, book: Path, indexed: Path, tmp_path: Path) -> None:
    """A file that cannot be written, or is something else, is found out after the document was read."""
    (tmp_path / "text.akv").write_text("text")
    os.mkdir(tmp_path / "folder")
    for out, words in (
        ("none/a.akv", ["none/a.akv", "No such file"]),
        ("folder", ["is a folder"]),
        ("text.akv", ["text.akv is not a KV file"]),
    ):
        found = actqkv("index", babbler, book, "-o", out, *READ)
        assert_failed(found, *words)
        assert "tokens of" not in found.err
    assert (tmp_path / "text.akv").read_text() == "text"
    other = tmp_path / "other.txt"
    other.write_text("Another document.")
    assert_failed(actqkv("index", babbler, other, "-o", indexed, *READ), "is of another text")
    assert_failed(actqkv("index", babbler, book, "-o", indexed, *READ[:-1], 300), "--budget is 300, in the file 256")
    assert_failed(actqkv("ask", "-d", "none.akv", "Who?"), "none.akv", "No such file")
    assert_failed(actqkv("ask", "-d", "text.akv", "Who?"), "text.akv is not a KV file", "index the document again")
