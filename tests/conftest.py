"""Small models and chats, made here; real ones where the folder of real data is at hand."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# tests are many small products: one thread is seven times faster than two; subprocesses inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before ivl is imported: its kernel then runs on the CPU

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import Config, Llama
from plumbing import files
from plumbing.tokenizer import TEMPLATES
from plumbing.weights import save

REALDATA = os.environ.get("IVL_REALDATA", str(ROOT.parent / "shared" / "realdata"))  # "": none
TEXT = (
    "The cat sat on the mat. What does the cat say? The cat says good morning! User: Assistant: "
    "[INST] hello you Where is the dog? The dog is in the garden, and it rains.\n"
) * 3


@pytest.fixture(scope="session")
def realdata() -> Path:
    if not REALDATA or not Path(REALDATA).is_dir():
        pytest.skip(f"real data is not at {REALDATA!r}; set IVL_REALDATA to its folder")
    return Path(REALDATA)


def make_directory(
    path: Path, seed: int, template: str | None = "plain", bytelevel: bool = False, **changes
) -> Path:
    """A Hugging Face directory with a small random Llama and a tokenizer of about 300 tokens."""
    path.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>"]
    if bytelevel:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^\p{L}▁]"), "isolated")
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            show_progress=False,
            special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
        )
    backend.train_from_iterator([TEXT], trainer)
    raw = json.loads(backend.to_str())
    # bytes are text: only the trainer calls them special
    raw["added_tokens"] = raw["added_tokens"][: len(special)]
    raw["post_processor"] = begins_with_bos()
    (path / "tokenizer.json").write_text(json.dumps(raw))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    if template:
        settings["chat_template"] = TEMPLATES[template]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    shape = dict(
        vocab_size=backend.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Llama(Config(**shape | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # lively, so that no greedy choice hangs on rounding
            weight.normal_(0 if weight.dim() > 1 else 1, 0.3, generator=generator)
    save(model, path)
    return path


def preference(chat: dict, rejected: str = "The cat says good.") -> str:
    """A line of a file of preferences: a chat of the form of ShareGPT with a worse last reply."""
    *turns, chosen = chat["conversations"]
    worse = {**chosen, "value": rejected}
    return json.dumps({"conversations": turns, "chosen": chosen, "rejected": worse}) + "\n"


def begins_with_bos() -> dict:
    """A post-processor that puts `<s>` in front of a text, as Llama's tokenizers have it."""
    bos, text = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, bos, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    return make_directory(tmp_path_factory.mktemp("models") / "base", seed=1)


@pytest.fixture(scope="session")
def value_dir(tmp_path_factory) -> Path:
    return make_directory(
        tmp_path_factory.mktemp("models") / "value",
        seed=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="session")
def other_dir(tmp_path_factory) -> Path:
    """A value model whose tokenizer is byte-level."""
    return make_directory(tmp_path_factory.mktemp("models") / "other", seed=3, bytelevel=True)


@pytest.fixture
def chats_file(tmp_path) -> Path:
    """24 short chats of two exchanges."""
    chats = [
        {
            "conversations": [
                {"from": "human", "value": f"Where is the cat {i}?"},
                {"from": "gpt", "value": "On the mat." * (1 + i % 3)},
                {"from": "human", "value": "And the dog?"},
                {"from": "gpt", "value": f"In garden {i}."},
            ]
        }
        for i in range(24)
    ]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats))
    return path


class Result(NamedTuple):
    """What a script has left behind, as subprocess.CompletedProcess has it."""

    returncode: int
    stdout: str
    stderr: str


def in_a_process(script: str, *args, stdin: str = "") -> Result:
    """Runs a script of the repository as a user does."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1800,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a script of the repository in this process, which saves the seconds of starting another:
    run("train.py", "--epochs", 1, stdin="...") → Result. A traceback is an error of the test.
    """

    def runner(script: str, *args, stdin: str = "") -> Result:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        threads = torch.get_num_threads()
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, args)])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.chdir(ROOT)
            try:
                files.command(module.main)
                status = 0
            except SystemExit as end:
                status = end.code
        torch.set_num_threads(threads)
        return Result(status, *capfd.readouterr())

    return runner


@pytest.fixture(name="models")
def own_models(base_dir, value_dir, tmp_path, monkeypatch) -> dict:
    """Models of this test alone, to be damaged."""
    monkeypatch.setattr("plumbing.dataset.CACHE", tmp_path / "cache")
    shutil.copytree(base_dir, tmp_path / "base")
    shutil.copytree(value_dir, tmp_path / "value")
    return {"base": tmp_path / "base", "value": tmp_path / "value"}


@pytest.fixture
def train(run, models, chats_file, tmp_path):
    """train.py with small models: train(epochs=1, full=True)."""

    def runner(**changes):
        options = {**models, "data": chats_file, "out": tmp_path / "out", "epochs": 1, **changes}
        words = []
        for name, word in options.items():
            if word is True:
                words.append(f"--{name}")
            elif word is not None:
                words += [f"--{name}", word]
        return run("train.py", *words)

    return runner


def assert_refused(result: Result, *words: str) -> None:
    """Exit status 2 and one line on stderr that holds all of `words`."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"
