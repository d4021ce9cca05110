"""Breaks when the bundled model cannot be made again: the recipe does not run, resume or export, or is another."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from llama_oracle import PlainLlama
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parents[1]))  # models/ belongs to the repository, not to the installed package

from actqkv_cpp import default_model_path
from actqkv_cpp.evaluation.generator import make_document
from actqkv_cpp.evaluation.generator.vocabulary import Vocabulary
from models.recipe import FULL, RECIPE_KEY, SMOKE

ROOT = Path(__file__).parents[1]

# against float32, measured on smoke models: up to 1.2e-3 and 8.8e-3, large as their wired heads attend sharply, and
# other on a machine that rounds otherwise; q and k with their rows in the wrong order give 0.8
MAX_NMSE = {"f16": 1e-2, "q8_0": 4e-2}


def test_bundled_model_is_of_this_recipe() -> None:
    """The GGUF in the package was made with other settings, or by another generator, than those in the tree."""
    field = GGUFReader(default_model_path()).get_field(RECIPE_KEY)
    assert field is not None
    assert field.contents() == FULL.digest()


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


def test_training_goes_on_from_the_file_of_a_cycle(smoke_run: Path, tmp_path: Path) -> None:
    """More training of the shipped file would not end where the whole recipe does."""
    from models.make import make

    first = replace(SMOKE, training=replace(SMOKE.training, cycles=SMOKE.training.cycles[:1]))
    *_, start = make(tmp_path / "first", first)
    assert start.name == "needle-q8_0.gguf"
    for end in make(tmp_path / "rest", SMOKE, start=start):
        assert end.read_bytes() == (smoke_run / end.name).read_bytes()
    assert log_of(tmp_path / "rest") == log_of(smoke_run)[first.training.n_steps :]


def test_start_that_does_not_fit_is_refused(smoke_run: Path, tmp_path: Path) -> None:
    from models.make import make

    other = replace(SMOKE, network=replace(SMOKE.network, n_ff=64))
    first = replace(other, training=replace(other.training, cycles=other.training.cycles[:1]))
    *_, start = make(tmp_path / "first", first)
    with pytest.raises(ValueError, match="not of this recipe's shape"):
        make(tmp_path / "shape", SMOKE, start=start)
    with pytest.raises(ValueError, match=r"of step 15: expected the end of a cycle that others follow, \[5, 12\]"):
        make(tmp_path / "step", SMOKE, start=smoke_run / "needle-q8_0.gguf")


def test_folder_of_another_recipe_is_refused(smoke_run: Path) -> None:
    from models.make import make

    other = replace(SMOKE, training=replace(SMOKE.training, seed=99))
    with pytest.raises(ValueError, match="another recipe"):
        make(smoke_run, other)


def load_llama(path: Path, **options: Any) -> PlainLlama:
    return PlainLlama(str(path), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **options)


@pytest.mark.parametrize("file_type", MAX_NMSE)
def test_exported_logits_equal_the_network(smoke_run: Path, file_type: str) -> None:
    import torch

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
    gguf = Vocabulary(smoke_run / "needle-q8_0.gguf")
    odd = ["  two  spaces\n\n\ttab", "caf\u00e9 \u4f60\u597d \U0001f600", "A", " ", "x=1;y=2\r\n", "<b>&amp;</b>"]
    for text in [*odd, *(make_document(1500, seed=seed).text for seed in range(8))]:
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
    from models.recipe import SampleConfig, Stage
    from models.samples import Role, Sampler

    tokenizer = tokenizers.load(smoke_run / "tokenizer.model")
    stage = Stage(512, 8, 1, 1, document_share=(0.4, 0.75), fact_density=(0.15, 0.7))
    batch = Sampler(tokenizer, config=SampleConfig(), seed="test").batch(stage, repeat_share=0.2)
    assert batch.tokens.shape == batch.roles.shape == batch.positions.shape == (8, 513)
    assert (batch.positions.diff(dim=1) >= 1).all()
    spans = [(index, span) for index, spans in enumerate(batch.spans) for span in spans]
    assert len(spans) > 8
    for index, span in spans:
        end = span.start + span.length
        assert batch.tokens[index, end - 1] == tokenizers.END
        assert batch.tokens[index, span.start - 1] == tokenizers.ASSISTANT
        assert (batch.roles[index, span.start : end] > Role.TEXT).all()


@pytest.mark.parametrize("haystack_share", [0.0, 1.0])
def test_guided_attention_is_sent_to_the_token_that_follows(smoke_run: Path, haystack_share: float) -> None:
    """Training would teach heads to look at other places than those where the answer's next token stands."""
    from models import tokenizer as tokenizers
    from models.recipe import SampleConfig, Stage
    from models.samples import Sampler

    tokenizer = tokenizers.load(smoke_run / "tokenizer.model")
    stage = Stage(1024, 32, 1, 1, document_share=(0.6, 0.85), fact_density=(0.06, 0.5), haystack_share=haystack_share)
    batch = Sampler(tokenizer, config=SampleConfig(), seed="test").batch(stage)
    n_equal = n_all = n_bridged = 0
    for ids, lookups in zip(batch.tokens.tolist(), batch.lookups, strict=True):
        for lookup in lookups:
            *bridges, (place,) = lookup.stages
            assert place < lookup.query
            if place == 0:  # the start of the text stands for "not stated"
                continue
            n_all += 1
            n_equal += ids[place] == ids[lookup.query + 1]
            n_bridged += bridges[0] != (place,)
    assert n_all > 200
    assert n_equal > 0.9 * n_all  # a value in quotation marks, or at the start of a line, begins with another token
    assert n_bridged == 0 if haystack_share else n_bridged > 10


def test_wired_hop_asks_for_the_name_that_was_found(smoke_run: Path) -> None:
    """The second lookup would be for something else than what the first one found, or others would be disturbed."""
    import torch

    from models import tokenizer as tokenizers
    from models.hop import SHARPNESS, wire_hop
    from models.network import Llama, wire

    config, tokenizer = SMOKE.network, tokenizers.load(smoke_run / "tokenizer.model")
    torch.manual_seed(1)
    network = Llama(config)
    wire(network)
    wire_hop(network, tokenizer, SMOKE.training.samples, n_examples=16, seed="test")
    n, head = config.head_dim, config.heads_per_kv
    own = slice(head * n, (head + 1) * n)
    first, second = network.layers[1], network.layers[2]  # of four, of which the last three are guided
    document = tokenizer.encode(make_document(400, seed=2).text)
    tokens = torch.tensor([document[:400]])
    with torch.no_grad():
        x, rotate = network.embed(tokens, torch.arange(400)[None])
        x = network.layers[0](x, rotate)
        read = first.attn_norm(x)[0]
        heads = [linear(read).view(400, -1, n).transpose(0, 1) for linear in (first.q, first.k, first.v)]
        q, k = (rotate(one[None])[0] for one in heads[:2])
        logits = (q[0] @ k[0].T / n**0.5).masked_fill(torch.ones(400, 400).triu(1) > 0, -1e9)
        # the query that goes with the name, by the attention of the first head
        found = logits.softmax(-1) @ heads[2][1]

        def reads_of_second() -> tuple[torch.Tensor, torch.Tensor]:
            read = second.attn_norm(first(x, rotate))[0]
            return second.q(read)[:, own], torch.cat((second.q(read)[:, : 2 * n], second.k(read), second.v(read)), 1)

        with_hop, others_with_hop = reads_of_second()
        first.attn_out.weight[:, own] = 0.0
        without_hop, others_without_hop = reads_of_second()
    by_hop = (with_hop - without_hop).flatten()
    assert torch.corrcoef(torch.stack((by_hop, SHARPNESS * found.flatten())))[0, 1] > 0.9
    alike = torch.cosine_similarity(others_with_hop, others_without_hop)  # but for the norm, which divides by all
    assert alike.min() > 0.999


def test_learning_rates_rise_and_fall_in_every_cycle() -> None:
    config = FULL.training
    scales = [config.lr_scale(step) for step in range(config.n_steps)]
    first = 0
    for cycle in config.cycles:
        of_cycle = scales[first : first + cycle.n_steps]
        assert max(of_cycle) == cycle.peak
        assert of_cycle[0] < 0.1 * cycle.peak
        assert of_cycle[-1] == config.min_lr_scale
        first += cycle.n_steps
    with pytest.raises(ValueError, match=f"step {first}"):
        config.lr_scale(first)


def test_processes_draw_what_one_draws(smoke_run: Path) -> None:
    """A run on a GPU, where several processes draw ahead, would be trained on other samples."""
    from models import tokenizer as tokenizers
    from models.draw import drawn

    tokenizer = tokenizers.load(smoke_run / "tokenizer.model")
    alone, together = (
        [one.tokens.tolist() for step in drawn(tokenizer, SMOKE.training, 6, n_processes=n) for one in step]
        for n in (0, 2)
    )
    assert len(alone) == sum(stage.n_accumulated * stage.n_steps for stage in SMOKE.training.stages) - 2 * 6
    assert together == alone


def test_misplaced_attention_is_a_cross_entropy(training_installed: None) -> None:
    import torch

    from models.train import misplaced_attention

    logits = torch.zeros(1, 1, 1, 1, 5)
    logits[..., 1] = 1.0
    logits[..., 4] = 9.0  # comes after the row and must not count
    rows = torch.tensor([[3]])
    places = torch.tensor([1, 2]).reshape(1, 1, 1, 2)
    weights = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 2)
    expected = np.log(3 + np.e) - 0.5
    assert float(misplaced_attention(logits, rows, places, weights)) == pytest.approx(expected)
