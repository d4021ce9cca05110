"""Breaks when the bundled model cannot be made again: other documents, or the recipe does not run, resume or export."""

from __future__ import annotations

import json
import random
import re
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))  # models/ belongs to the repository, not to the installed package

from models import lexicon, templates
from models.facts import TASKS
from models.generate import Document, make_document, parse_size
from models.generate import main as generate_main
from models.source import VALUE_KINDS, Source

ROOT = Path(__file__).parents[1]
NEEDS_LLAMA_CPP = "lengths are fitted with the tokenizer in the GGUF, through llama-cpp-python"
EXAMPLE = ["--tasks", "passkey,fact,multi,twohop,absent", "--styles", "prose,people", "--heldout"]
EXAMPLE += ["--tokens", "32k", "--count", "4", "--seed", "harbour-master"]
HELDOUT_SETS = {"eval_2k": 20, "eval_8k": 10, "eval_32k": 6, "eval_128k": 3}  # documents in each

# against float32, measured on the smoke model: 1.6e-5 (a third of it from rounding the weights) and 6e-4; q and k
# with their rows in the wrong order give 0.8
MAX_NMSE = {"f16": 1e-4, "q8_0": 3e-3}


def generate(*options: str) -> str:
    """What `python -m models.generate` prints."""
    command = [sys.executable, "-m", "models.generate", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def heldout_set(name: str) -> list[dict[str, Any]]:
    with (ROOT / "models" / "heldout" / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def documents(*, heldout: bool = False) -> list[Document]:
    """Sparse and dense documents, with every task."""
    densities = (0.1, 0.4, 0.8)
    return [
        make_document(1500, seed=f"test-{index}", heldout=heldout, density=densities[index % 3]) for index in range(24)
    ]


# the generator


def test_same_seed_gives_the_same_document() -> None:
    assert make_document(800, seed=5) == make_document(800, seed=5)
    assert make_document(800, seed=5) != make_document(800, seed=6)


def test_heldout_set_is_reproduced() -> None:
    pytest.importorskip("llama_cpp", reason=NEEDS_LLAMA_CPP)
    rows = heldout_set("eval_2k")
    options = ["--tokens", "2k", "--count", "2", "--seed", "held-2048", "--documents", str(len(rows)), "--heldout"]
    again = [json.loads(line) for line in generate(*options, "--jsonl").splitlines()]
    same_library = sys.version_info[:2] == (3, 11)  # docstring sentences come from the standard library
    for row, made in zip(rows, again, strict=True):
        styles = make_document(2048, seed=row["id"], heldout=True, count=2).styles
        if same_library or "docstring" not in styles:
            assert made == row


def test_example_is_reproduced() -> None:
    pytest.importorskip("llama_cpp", reason=NEEDS_LLAMA_CPP)
    assert generate(*EXAMPLE, "--text") == (ROOT / "examples" / "harbour.txt").read_text(encoding="utf-8")
    assert generate(*EXAMPLE, "--questions") == (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HELDOUT_SETS)
def test_shipped_sets_hold_their_answers(name: str) -> None:
    rows = heldout_set(name)
    assert len(rows) == HELDOUT_SETS[name]
    for row in rows:
        for question in row["questions"]:
            assert_answer_follows(row["document"], question)


def test_answers_are_in_the_document_where_depth_says() -> None:
    for document in documents():
        for question in document.questions:
            assert_answer_follows(document.text, vars(question))


def assert_answer_follows(text: str, question: Mapping[str, Any]) -> None:
    """The answer stands in the document, and at the depth for the tasks whose last fact states it."""
    if question["task"] == "absent":
        assert (question["answer"], question["depth"]) == (templates.NOT_STATED, -1.0)
        return
    assert question["answer"] in text, question
    if question["task"] in ("passkey", "multi", "json", "quote"):
        near = int(question["depth"] * len(text) - 0.0001 * len(text)) - 1  # depth is rounded to four places
        assert question["answer"] in text[max(0, near) : near + 400 + len(text) // 5000], question


def test_every_task_is_asked_as_often_as_wanted() -> None:
    document = make_document(4000, seed=1, count=3)
    for task in TASKS:
        assert sum(question.task == task for question in document.questions) >= 3


def test_not_stated_is_not_stated() -> None:
    n_absent = n_stated = 0
    for document in [*documents(), *documents(heldout=True)]:
        for question in document.questions:
            patterns = list(statements_that_answer(question.question))
            stated = any(pattern.search(document.text) for pattern in patterns)
            if question.task == "absent":
                assert patterns, f"no template asks {question.question!r}"
                assert not stated, question
                n_absent += 1
            elif question.task in ("passkey", "multi", "json"):
                assert stated, question  # so that the search above would find an answer
                n_stated += 1
    assert n_absent > 100
    assert n_stated > 100


def statements_that_answer(question: str) -> Iterator[re.Pattern[str]]:
    """Patterns of all sentences that would answer the question, found by inverting the templates."""
    pairs: list[tuple[Sequence[str], Sequence[str]]] = [
        (templates.ATTRIBUTE_QUESTIONS, templates.ATTRIBUTE_STATEMENTS),
        (templates.JSON_QUESTIONS, templates.JSON_LINES),
        *((relation.questions, relation.statements) for relation in templates.RELATIONS),
        *(([phrase.question], [phrase.statement]) for phrase in (*templates.PLAIN_KEYS, *templates.KEYED_KEYS)),
    ]
    for asked, stated in pairs:
        for template in asked:
            slots = pattern_of(template, {}).fullmatch(question)
            if slots is None:
                continue
            values = {name.lower(): value for name, value in slots.groupdict().items()}
            yield from (pattern_of(statement, values, start=r"(?:\A|(?<=\n)|(?<=[.;\w] ))") for statement in stated)


def pattern_of(template: str, slots: Mapping[str, str], *, start: str = "") -> re.Pattern[str]:
    """A template with the given slots filled, and the others open; {Subject} and {subject} are one slot."""
    parts = []
    seen: set[str] = set()
    for text, slot, _, _ in string.Formatter().parse(template):
        parts.append(re.escape(text))
        if slot is None:
            continue
        if slot.lower() in slots:
            parts.append(re.escape(slots[slot.lower()]))
        else:
            words = "|".join(lexicon.ATTRIBUTES) if slot == "attribute" else r"[^.\n]+"
            parts.append(rf"(?P={slot})" if slot in seen else rf"(?P<{slot}>{words})")
            seen.add(slot)
    return re.compile(start + "".join(parts), re.IGNORECASE)


@pytest.mark.parametrize("names", [lexicon.first_names(), lexicon.surnames(), lexicon.places()])
def test_heldout_names_are_disjoint_from_training_names(names: tuple[str, ...]) -> None:
    n_training = lexicon.n_training(names)
    assert len(set(names)) == len(names)
    assert not set(names[:n_training]) & set(names[n_training:])
    assert n_training / len(names) == pytest.approx(10 / 11, abs=1e-3)


@pytest.mark.parametrize("draw", [Source.first_name, Source.surname, Source.place])
def test_sources_keep_to_their_part_of_the_names(draw: Any) -> None:
    training, heldout = (
        {draw(source) for _ in range(3000)}
        for source in (Source(random.Random(1)), Source(random.Random(1), heldout=True))
    )
    assert not training & heldout
    assert len(training) > len(heldout) > 300


def test_every_value_kind_is_known() -> None:
    kinds = {*lexicon.ATTRIBUTES.values(), *(relation.value for relation in templates.RELATIONS)}
    assert kinds == set(VALUE_KINDS)


def test_filler_says_nothing_about_what_is_asked() -> None:
    document = make_document(3000, tasks=["quote"], seed=3, count=5, styles=["people"])
    for question in document.questions:
        assert document.text.count(question.answer) == 1


@pytest.mark.parametrize(("text", "n"), [("2k", 2048), ("1m", 1 << 20), ("128K", 131072), ("700", 700), ("0.5k", 512)])
def test_sizes(text: str, n: int) -> None:
    assert parse_size(text) == n


@pytest.mark.parametrize("options", [{"tasks": ["riddle"]}, {"tasks": []}, {"styles": ["verse"]}])
def test_unknown_tasks_and_styles_are_refused(options: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="expected some of"):
        make_document(100, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required"),
        (["--text", "--jsonl"], "not allowed with"),
        (["--text", "--tasks", "riddle"], "expected some of passkey"),
        (["--text", "--tokenizer", "missing.gguf"], "no such file"),
        (["--text", "--tokens", "many"], "invalid parse_size value"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate_main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# the recipe


@pytest.fixture(scope="module")
def training_installed() -> None:
    for module in ("torch", "sentencepiece", "gguf", "llama_cpp"):
        pytest.importorskip(module, reason=f"{module} is missing: install the extra actqkv[train]")


def make_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "models.make", "--smoke", "--out", str(folder)]


@pytest.fixture(scope="module")
def smoke_run(training_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the recipe on its toy scale."""
    folder = tmp_path_factory.mktemp("smoke")
    subprocess.run(make_command(folder), cwd=ROOT, check=True, timeout=300)
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log, without the clock."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_smoke_run_learns(smoke_run: Path) -> None:
    from models.make import SMOKE

    records = log_of(smoke_run)
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, SMOKE.training.n_steps + 1))
    assert steps[-1]["text_loss"] < steps[0]["text_loss"]
    assert records[-1]["event"] == "eval"
    assert not list(smoke_run.glob("*.tmp"))


def test_killed_run_resumes_to_the_same_end(smoke_run: Path, tmp_path: Path) -> None:
    import torch

    with subprocess.Popen(make_command(tmp_path), cwd=ROOT) as process:
        deadline = time.monotonic() + 120
        while len(log_of(tmp_path)) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    cut_off = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < cut_off < max(record["step"] for record in log_of(smoke_run)), "the run was over before the kill"
    subprocess.run(make_command(tmp_path), cwd=ROOT, check=True, timeout=300)

    assert log_of(tmp_path) == log_of(smoke_run)
    for name in ("needle-f16.gguf", "needle-q8_0.gguf", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (smoke_run / name).read_bytes()


def test_folder_of_another_recipe_is_refused(smoke_run: Path) -> None:
    from dataclasses import replace

    from models.make import SMOKE, make

    other = replace(SMOKE, training=replace(SMOKE.training, seed=99))
    with pytest.raises(ValueError, match="another recipe"):
        make(smoke_run, other)


def load_llama(path: Path, **options: Any) -> Any:
    from llama_cpp import Llama

    class SafeLlama(Llama):
        """Without the repacked buffers, which crash with quantised weights in some builds on CPUs with AMX."""

        @property
        def model_params(self) -> Any:
            return self._model_params

        @model_params.setter
        def model_params(self, params: Any) -> None:
            params.use_extra_bufts = False
            self._model_params = params

    return SafeLlama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **options)


@pytest.mark.parametrize("file_type", MAX_NMSE)
def test_exported_logits_equal_the_network(smoke_run: Path, file_type: str) -> None:
    import torch

    from models.make import SMOKE
    from models.network import Llama

    network = Llama(SMOKE.network)
    network.load_state_dict(torch.load(smoke_run / "checkpoint.pt", weights_only=True)["network"])
    tokens = np.random.default_rng(1).integers(7, SMOKE.network.n_vocab, size=200).tolist()
    with torch.no_grad():
        expected = network(torch.tensor([tokens]))[0].numpy()
    llama = load_llama(smoke_run / f"needle-{file_type}.gguf", logits_all=True)
    llama.eval(tokens)
    assert nmse(np.array(llama.scores[: len(tokens)]), expected) < MAX_NMSE[file_type]


def nmse(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.square(actual - expected).sum() / np.square(expected).sum())


def test_exported_tokenizer_equals_sentencepiece(smoke_run: Path) -> None:
    from models import tokenizer as tokenizers

    sentencepiece = tokenizers.load(smoke_run / "tokenizer.model")
    gguf = tokenizers.GgufTokenizer(smoke_run / "needle-q8_0.gguf")
    odd = ["  two  spaces\n\n\ttab", "caf\u00e9 \u4f60\u597d \U0001f600", "A", " ", "x=1;y=2\r\n", "<b>&amp;</b>"]
    for text in [*odd, *(document.text for document in documents()[:10])]:
        assert gguf.encode(text) == sentencepiece.encode(text)
        assert sentencepiece.decode(gguf.encode(text)) == text


def test_chat_template_writes_the_trained_form(smoke_run: Path) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llama = load_llama(smoke_run / "needle-q8_0.gguf", vocab_only=True)
    formatter = Jinja2ChatFormatter(
        template=llama.metadata["tokenizer.chat_template"], eos_token="</s>", bos_token="<s>"
    )
    messages: Any = [{"role": "document", "content": "Text."}, {"role": "user", "content": "Why?"}]
    prompt = formatter(messages=messages).prompt
    assert prompt == "<s><|document|> Text.<|end|><|user|> Why?<|end|><|assistant|>"
    ids = llama.tokenize(prompt.encode(), add_bos=False, special=True)
    assert [token for token in ids if token < 7] == [1, 6, 5, 3, 5, 4]


def test_samples_weigh_the_answers(smoke_run: Path) -> None:
    from models import tokenizer as tokenizers
    from models.samples import Role, SampleConfig, Sampler

    tokenizer = tokenizers.load(smoke_run / "tokenizer.model")
    batch = Sampler(tokenizer, config=SampleConfig(), seed="test").batch(512, 8, repeat_share=0.2)
    assert batch.tokens.shape == batch.roles.shape == batch.positions.shape == (8, 513)
    assert (batch.positions.diff(dim=1) >= 1).all()
    spans = [(index, span) for index, spans in enumerate(batch.spans) for span in spans]
    assert len(spans) > 8
    for index, span in spans:
        end = span.start + span.length
        assert batch.tokens[index, end - 1] == tokenizers.END
        assert batch.tokens[index, span.start - 1] == tokenizers.ASSISTANT
        assert (batch.roles[index, span.start : end] > Role.TEXT).all()
