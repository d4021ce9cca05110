"""Breaks when a rule of the house is broken: include rules, single importers, names, words, paths (CONTRIBUTING.md).

Rules are read from where people read them (native/README.md, pyproject.toml, README.md); exceptions stand here, each
with its reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import actqkv_cpp

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "native"
FOLDERS = ("actqkv_cpp", "bindings", "docs", "examples", "models", "native", "tests", ".ci")
OUR_NATIVE_INCLUDES = ("native", "native/include", "native/kernels")  # as CMakeLists.txt has them

OPEN_HEADERS = {"error.h", "include/actqkv.h", "kernels/parallel.h"}  # open to all but kernels, which stand alone
MAY_SEE_LLAMA_CPP = {"graph", "model", "retrieval/method.cpp", "session"}  # method.cpp: names of ggml types

LONG_FILES = {
    "actqkv_cpp/llama.py": "one class: the base's whole face, over a session",
}
NAMES_WITH_A_SUFFIX = {
    "actqkv_session_new": "makes one, as ggml's _new functions do",
    "ggml_gallocr_new": "ggml's",
    "create_chat_completion_openai_v1": "llama_cpp's",
    "beta_fast": "YaRN's",
    "yarn_beta_fast": "YaRN's, in llama_cpp",
    "n_ctx_orig": "YaRN's, in llama.cpp",
    "n_ctx_orig_yarn": "YaRN's, in llama.cpp",
}
WORDS_IN_ANOTHER_SENSE = {
    "graph/runner.cpp": {"cache", "cached"},  # of graphs by window size; it holds no keys
    "graph/runner.h": {"cache"},
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def files(*suffixes: str, under: str | None = None) -> Iterator[tuple[str, Path]]:
    """Files of the repository by suffix, with their names from its root; what builds and tools leave is not in it."""
    # A second worktree has a file named .git.
    tops = [ROOT / under] if under else [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    tops += [] if under else [ROOT / folder for folder in FOLDERS]
    for top in tops:
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            left = any(part.startswith((".", "__pycache__")) for part in path.relative_to(top).parts)
            if path.is_file() and path.suffix in suffixes and not left:
                yield path.relative_to(ROOT).as_posix(), path


def native_code() -> Iterator[tuple[str, str]]:
    """Name under native/ and text without comments and strings."""
    for _, path in files(".cpp", ".h", ".cu", ".cuh", under="native"):
        code = re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", " ", text_of(path), flags=re.DOTALL)
        yield path.relative_to(NATIVE).as_posix(), code


def may_include() -> dict[str, list[str]]:
    """Folder -> what its files may include, from the table of native/README.md."""
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\|([^|\n]*)\|$", text_of(NATIVE / "README.md"), re.MULTILINE)
    return {folder: " ".join(re.findall(r"`([^`]+)`", allowed)).split() for folder, allowed in rows}


def quoted_includes() -> Iterator[tuple[str, str]]:
    """File under native/, and what it includes: a file under native/ or the name of another library's header."""
    for _, path in files(".cpp", ".h", ".cu", ".cuh", under="native"):
        for header in re.findall(r'^\s*#\s*include "([^"]+)"', text_of(path), re.MULTILINE):
            places = [path.parent, *(ROOT / folder for folder in OUR_NATIVE_INCLUDES)]
            found = next((place / header for place in places if (place / header).is_file()), None)
            name = Path(os.path.normpath(found)).relative_to(NATIVE).as_posix() if found else header
            yield path.relative_to(NATIVE).as_posix(), name


# native


def test_native_readme_names_every_folder() -> None:
    """The map of native/ lacks a folder, or shows one that is gone."""
    assert set(may_include()) == {path.name for path in NATIVE.iterdir() if path.is_dir()}


def test_tests_readme_names_every_file() -> None:
    """The map of tests/ lacks a file or folder, or shows one that is gone."""
    tests = ROOT / "tests"
    named = set(re.findall(r"`(\w+/|\w+\.py)`", "".join(re.findall(r"^\|[^|]*\|", text_of(tests / "README.md"), re.M))))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in tests.iterdir() if path.name[0] not in "._"}
    assert named == there - {"README.md", "conftest.py"}


def test_include_rules() -> None:
    """A part of native/ reaches into another that its row in native/README.md does not list."""
    allowed = may_include()
    for name, included in quoted_includes():
        folder = name.split("/")[0]
        if not (NATIVE / included).exists() or folder == included.split("/")[0]:
            continue
        rules = {rule.replace("kernels.h", "kernels/kernels.h") for rule in allowed.get(folder, [])}
        rules |= set() if folder == "kernels" else OPEN_HEADERS
        assert any(included.startswith(rule) for rule in rules), f"native/{name} includes {included}"


def test_llama_cpp_stays_behind_its_doors() -> None:
    """Headers of llama.cpp are seen where only plain arrays should be, or its undeclared symbol in a second place."""
    for name, included in quoted_includes():
        if re.match(r"(ggml|gguf|llama)[\w-]*\.h$", included):
            assert {name, name.split("/")[0]} & MAY_SEE_LLAMA_CPP, f"native/{name} includes {included}"
        if included == "model/tensor_map.h":
            assert name == "model/weights.cpp"
    declared = [name for name, code in native_code() if re.search(r"> & llama_internal_get_tensor_map\(", code)]
    assert declared == ["model/tensor_map.h"]


def test_nothing_in_native_kills_python() -> None:
    """A call in native/ aborts the process, prints, or reads the environment."""
    calls = r"\b(GGML_ASSERT|GGML_ABORT|abort|assert|_?exit|terminate|getenv|f?printf|f?puts|putchar)\s*\("
    for name, code in native_code():
        found = re.search(calls + r"|\bstd::(cout|cerr|clog)\b", code)
        assert found is None, f"native/{name}: {found[0]}"


def test_one_word_per_idea() -> None:
    """A second word for chunk or store creeps into names (native/README.md, Words)."""
    for name, code in native_code():
        words = {word for identifier in re.findall(r"[a-z_0-9]+", code.lower()) for word in identifier.split("_")}
        second = words & {"page", "pages", "unit", "units", "cache", "caches", "cached", "token_block"}
        assert second <= WORDS_IN_ANOTHER_SENSE.get(name, set()), f"native/{name}: {second}"


# Python


@pytest.mark.parametrize(
    ("only", "pattern"),
    [
        ("_native.py", r"(?:import|from)\s+(?:actqkv_cpp\._actqkv|\._actqkv)\b|from\s+actqkv_cpp\s+import\s+_actqkv\b"),
        ("_env.py", r"os\.environ|\bgetenv\b|\bimport environ\b"),
    ],
)
def test_single_door(only: str, pattern: str) -> None:
    """A second module imports the cffi module, or reads the environment."""
    found = [name for name, path in files(".py", under="actqkv_cpp") if re.search(pattern, text_of(path))]
    assert found == [f"actqkv_cpp/{only}"]


def test_documented_names_are_public() -> None:
    """A page tells people to import what __all__ does not promise."""
    for page, path in files(".md"):
        for names in re.findall(r"^ *from actqkv_cpp import ([\w, ]+)", text_of(path), re.MULTILINE):
            unknown = set(re.split(r",\s*", names.strip())) - set(actqkv_cpp.__all__)
            assert not unknown, f"{page}: {unknown}"


# the whole tree


def test_pages_that_are_named_exist() -> None:
    """A comment or a page sends its reader to a page that is not in the repository."""
    there = {name.removeprefix(folder) for name, path in files(".md") for folder in ("", f"{path.parent.name}/")}
    for name, path in files(".py", ".cpp", ".h", ".c", ".cu", ".cuh", ".md", ".toml", ".txt"):
        named = set(re.findall(r"\b(?:docs/\w+|[A-Z]{5,})\.md\b", text_of(path)))
        assert named <= there, f"{name}: {named - there}"


def test_no_variants_in_names() -> None:
    """Two versions of one thing live side by side, told apart by a suffix."""
    suffix = r"(?:v\d+|fast|slow|new|old|orig|final|tmp|bak|dev\d*)"
    for name, path in files(".py", ".cpp", ".h", ".c", ".cu", ".cuh"):
        assert not re.search(rf"_{suffix}$", path.stem), name
        defined = re.findall(rf"\b(?:def|class|struct)\s+(\w+_{suffix})\b|\b(\w+_{suffix})\(", text_of(path))
        found = {one for pair in defined for one in pair if one} - set(NAMES_WITH_A_SUFFIX)
        assert not found, f"{name}: {found}"


def test_long_files_have_a_reason() -> None:
    """A file grew over 600 lines unnoticed; or a reason outlived its file's length."""
    lengths = {name: text_of(path).count("\n") for name, path in files(".py", ".cpp", ".h", ".c", ".cu", ".cuh")}
    assert {name for name, n_lines in lengths.items() if n_lines > 600} == set(LONG_FILES)


def test_nothing_left_to_do() -> None:
    """A note to oneself was committed; an issue is the place for it."""
    words = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"))
    for name, path in files(".py", ".cpp", ".h", ".c", ".cu", ".cuh", ".md", ".toml", ".txt"):
        found = None if name.startswith("examples/") else re.search(rf"\b({words})\b", text_of(path))
        assert found is None, f"{name}: {found[0]}"


def test_no_machine_in_the_tree() -> None:
    """A path of somebody's machine, or where packages come from, was committed."""
    machine = r"(?<![\w.~}-])/(?:root|home|Users|work|mnt|opt)/\w|--(?:extra-)?index-url|\bfile:///"
    for name, path in files(".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".txt", ".cdef", ".jsonl", ""):
        found = re.search(machine, text_of(path))
        assert found is None, f"{name}: {found[0]}"


def test_versions_agree() -> None:
    """The two pins of llama-cpp-python differ, or the changelog does not know this version."""
    assert len(set(re.findall(r'"llama-cpp-python==([^"]+)"', text_of(ROOT / "pyproject.toml")))) == 1
    assert f"## {actqkv_cpp.__version__}" in text_of(ROOT / "CHANGELOG.md")


def test_ci_runs_what_the_readme_says() -> None:
    """README promises another test command than the one that is run before a change lands."""
    install, test = 'pip install ".[test]"', "pytest"
    assert f"{install} && {test}\n" in text_of(ROOT / "README.md")
    script = text_of(ROOT / ".ci" / "run").splitlines()
    assert {install, test} <= {line.strip() for line in script}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
