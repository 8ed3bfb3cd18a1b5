"""Chats as tokens: which are targets, what is read, what is refused."""

import json
import shutil

import pytest
import torch
from conftest import make_directory

from plumbing import dataset
from plumbing.chats import Chat, read_chats
from plumbing.dataset import Chats, epoch_batches, tokenize, tokenize_chat
from plumbing.files import InputError
from plumbing.streaming import TextStream
from plumbing.tokenizer import TEMPLATES, Refused, Tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is the cat?"},
    {"role": "assistant", "content": "On the mat."},
    {"role": "user", "content": "On the mat."},
    {"role": "assistant", "content": "Yes 😀!"},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain(base_dir):
    return Tokenizer(base_dir)


def targets_of(tokenizer, chat):
    """The text of each run of targets."""
    ids, target, _ = tokenize_chat(tokenizer, Chat(chat))
    runs, before = [], False
    for i, t in zip(ids, target):
        if t:
            runs = runs if before else [*runs, []]
            runs[-1].append(i)
        before = t
    return [tokenizer.backend.decode(run, skip_special_tokens=False) for run in runs]


# ---------------------------------------------------------------- the loss mask


@pytest.mark.parametrize("template, bytelevel", [(t, b) for t in TEMPLATES for b in (False, True)])
def test_only_replies_are_targets(tmp_path, template, bytelevel):
    tokenizer = Tokenizer(make_directory(tmp_path, 0, template, bytelevel))
    first, second = targets_of(tokenizer, CHAT)
    assert [run.replace(" ", "") for run in (first, second)] == ["Onthemat.</s>", "Yes😀!</s>"]
    ids, target, ends = tokenize_chat(tokenizer, Chat(CHAT))
    stops = [i for i, token in enumerate(ids) if token == tokenizer.eos]
    assert stops == [end - 1 for end in ends] and all(
        target[i] for i in stops
    )  # one EOS a reply, and it is learnt
    assert ids[0] == tokenizer.bos and ids[:2].count(tokenizer.bos) == 1
    assert ids.count(tokenizer.bos) == (
        2 if template == "llama-2" else 1
    )  # Llama-2 opens every exchange with one


def test_mask_worked_by_hand(tmp_path):
    # "<s>User: a\nAssistant: b</s>\nUser: c\nAssistant: d</s>" as bytes and specials only: targets
    # are " b</s>", " d</s>"
    directory = make_directory(tmp_path, 0)
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["merges"] = []
    raw["model"]["vocab"] = {
        k: v for k, v in raw["model"]["vocab"].items() if v < 259 or len(k) == 1
    }
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer(directory)
    chat = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd")]
    ids, target, ends = tokenize_chat(tokenizer, Chat(chat))
    text = "".join(("1" if t else "0") for t in target)
    # <s> ▁User:▁a\n = 9 ids; Assistant: = 10; ▁b = 2; </s>; then ▁ (the tokenizer's) \nUser:▁c\n =
    # 10; and again
    assert text == "0" + "0" * 9 + "0" * 10 + "111" + "0" * 10 + "0" * 10 + "111"
    assert ends == [23, 46]


def test_end_of_turn_is_learnt_and_stops_but_not_what_follows(tmp_path):
    directory = make_directory(tmp_path, 0, template=None)
    raw = json.loads((directory / "tokenizer.json").read_text())
    n = len(raw["model"]["vocab"])
    for i, token in enumerate(("<|im_start|>", "<|im_end|>")):
        raw["added_tokens"].append({**raw["added_tokens"][0], "id": n + i, "content": token})
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    (directory / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer(directory)
    assert targets_of(tokenizer, CHAT[1:]) == ["On the mat.<|im_end|>", "Yes 😀!<|im_end|>"]
    assert {tokenizer.tokens[i] for i in tokenizer.stop} == {"</s>", "<|im_end|>"}
    assert tokenizer.bos not in tokenizer.prompt(CHAT[1:2])  # this template writes none


def test_prompt_is_the_beginning_of_what_was_trained_on(plain):
    ids, _, ends = tokenize_chat(plain, Chat(CHAT))
    prompt = plain.prompt(CHAT[:2])
    assert ids[: len(prompt)] == prompt and len(prompt) < ends[0]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    directory = make_directory(tmp_path, 0, template=None)
    (directory / "chat_template.jinja").write_text(
        "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(Refused, match="not how its replies begin"):
        tokenize_chat(Tokenizer(directory), Chat(CHAT))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "record, expected",
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "user:a assistant:b",
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ]
            },
            "system:s user:a assistant:b",
        ),
        ({"instruction": "a", "input": "", "output": "b"}, "user:a assistant:b"),
        ({"instruction": "a", "input": "i", "output": "b"}, "user:a\n\ni assistant:b"),
        (
            {"instruction": "c", "output": "d", "history": [["a", "b"]]},
            "user:a assistant:b user:c assistant:d",
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_forms_are_told_by_content(tmp_path, record, expected, suffix):
    path = tmp_path / f"chats{suffix}"
    text = (
        json.dumps([record, record])
        if suffix == ".json"
        else json.dumps(record) + "\n\n" + json.dumps(record) + "\n"
    )
    path.write_text("\ufeff" + text, encoding="utf-8")
    chats = read_chats(path).chats
    assert [" ".join(f"{m['role']}:{m['content']}" for m in chat.messages) for chat in chats] == [
        expected
    ] * 2


GOOD = json.dumps({"instruction": "a", "output": "b"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no chats"),
        ("[]", "holds no chats"),
        (f"{GOOD}\n{{", "line 2: not valid JSON"),
        (f"[{GOOD},\n{GOOD}", "line 2: not valid JSON"),
        (f'{GOOD}\n{GOOD}\n{{"text": "a"}}', "line 3: not a chat"),
        (
            f'[{GOOD}, {{"conversations": [{{"from": "martian", "value": "a"}}]}}]',
            "entry 2: not a chat",
        ),
        ('{"messages": [{"role": "user", "content": 3}]}', "entry 1: not a chat"),
        ("[3]", "entry 1: not a chat"),
        ('{"messages": null}', "entry 1: not a chat"),
    ],
)
def test_malformed_chats_are_named(tmp_path, text, message):
    path = tmp_path / "chats.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"chats.json.*{message}"):
        read_chats(path)


def rows_of(chats: Chats) -> dict[str, str]:
    """The table that a training begins with."""
    rows: dict[str, str] = {}
    for line in chats.report.splitlines():
        if "warning" not in line:
            name, note = line[:20].strip(), " ".join(line[20:].split())
            rows[name] = f"{rows[name]}; {note}" if name in rows else note
    return rows


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.dataset.CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_long_chats_are_cut_at_a_turn_and_empty_ones_counted(tmp_path, cache, plain):
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 200}]
    chats = [turn, turn + long, long, turn[:1], turn[1:] + turn, [turn[1]]]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tokenized = tokenize(read_chats(path), plain, 60)
    assert (
        len(tokenized) == 3 and len(set(tokenized.lengths().tolist())) == 1
    )  # the second is cut after its first turn
    assert rows_of(tokenized) == {
        "chats read": "6",
        "left out": "2 no reply in them; 1 no reply fits into --max_length 60",
        "chats used": "3",
        "cut": "1 to 60 tokens",
        "replies in them": "5",
        "not learnt": "1 before the first question; 1 past the cut",
        "tokens": str(len(tokenized.ids)),
        "targets": f"{sum(tokenized.target)} {tokenized.target.float().mean():.1%}",
    }
    assert "warning: 50% of the chats are left out" in tokenized.report
    with pytest.raises(InputError, match="no chat has .*fits into --max_length 5: 4"):
        tokenize(read_chats(path), plain, 5)


def test_tokens_are_cached_until_something_changes(tmp_path, cache, plain, chats_file, monkeypatch):
    first = tokenize(read_chats(chats_file), plain, 100)
    with monkeypatch.context() as patch:
        patch.setattr("plumbing.dataset.tokenize_chat", lambda *_: pytest.fail("tokenized again"))
        again = tokenize(read_chats(chats_file), plain, 100)
    assert (
        torch.equal(first.ids, again.ids)
        and torch.equal(first.target, again.target)
        and first.report == again.report
    )
    tokenize(read_chats(chats_file), plain, 90)
    chats_file.write_text(chats_file.read_text().replace("cat", "dog"))
    assert not torch.equal(tokenize(read_chats(chats_file), plain, 100).ids, first.ids)
    assert len(list(cache.iterdir())) == 3


def test_batches_are_shifted_and_padded(tmp_path, cache, plain, chats_file, monkeypatch):
    chats = tokenize(read_chats(chats_file), plain, 200)
    inputs, targets, counted = chats.batch([0, 2])
    assert torch.equal(counted, targets >= 0)
    for row, i in enumerate([0, 2]):
        piece = slice(int(chats.offsets[i]), int(chats.offsets[i + 1]))
        ids, target = chats.ids[piece].long(), chats.target[piece]
        n = len(ids) - 1
        assert torch.equal(inputs[row, :n], ids[:-1]) and (inputs[row, n:] == 0).all()
        assert torch.equal(targets[row, :n], torch.where(target[1:], ids[1:], -100))
        assert (targets[row, n:] == -100).all()
    monkeypatch.setattr(dataset, "ALIGNED", {"cpu": 128})
    wide = chats.batch([0, 2], norm_width=240)
    assert wide[0].shape == (2, 256) and torch.equal(wide[0][:, : inputs.shape[1]], inputs)
    assert wide[2][:, :240].all() and not wide[2][:, 240:].any()
    assert chats.count_targets([0, 2]) == int((targets >= 0).sum()) == chats.loss_count([0, 2])


def test_an_epoch_has_every_chat_once_in_batches_of_similar_length():
    lengths = torch.randint(1, 1000, (333,), generator=torch.Generator().manual_seed(0))
    batches = epoch_batches(lengths, 8, seed=1)
    assert sorted(i for batch in batches for i in batch) == list(range(333))
    spread = [int(lengths[batch].max() - lengths[batch].min()) for batch in batches]
    assert sum(spread) / len(spread) < 100
    assert batches == epoch_batches(lengths, 8, seed=1) != epoch_batches(lengths, 8, seed=2)


# ---------------------------------------------------------------- tokenizer


@pytest.mark.parametrize("bytelevel", [False, True])
def test_streaming_gives_the_text_and_never_half_a_character(tmp_path, bytelevel):
    tokenizer = Tokenizer(make_directory(tmp_path, 0, bytelevel=bytelevel))
    text = "The cat says 你好 😀 and   é!\nYes"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.step(i) for i in ids]
    assert (
        "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and "" in pieces
    )
    assert stream.rest() == ""
    smile = tokenizer.encode("a😀")[:-2]  # the character is cut off, then a word follows or nothing
    stream = TextStream(tokenizer, tokenizer.encode("The cat"))
    assert "".join(map(stream.step, smile[1:])).strip() == "a" and set(stream.rest()) == {"\ufffd"}
    assert stream.step(tokenizer.encode("b cat")[-1]).strip("\ufffd") == " cat"


def test_a_stream_decodes_few_ids_however_long_the_text(plain):
    ids = plain.encode("The cat says 你好 and é!") * 11
    stream, decoded = TextStream(plain), []

    def decode(some):
        decoded.append(len(some))
        return plain.decode(some)

    stream.decode = decode
    for i in ids:
        stream.step(i)
    assert max(decoded) < 11 < len(ids) / 9  # the longest: bytes of two characters, and a BOS


def test_saved_tokenizer_works_in_transformers(plain, tmp_path):
    import transformers

    plain.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(CHAT, tokenize=False) == plain.render(CHAT)
    again = Tokenizer(tmp_path)
    assert (again.bos, again.eos, again.stop, again.tokens) == (
        plain.bos,
        plain.eos,
        plain.stop,
        plain.tokens,
    )


def test_damaged_tokenizers_are_named(base_dir, tmp_path, realdata):
    with pytest.raises(
        InputError, match="tokenizer.json: not a tokenizer .*Merges text file invalid"
    ):
        Tokenizer(realdata / "tokenizers" / "corrupt")
    with pytest.raises(InputError, match="tokenizer.json: cannot be read"):
        Tokenizer(tmp_path)
    directory = shutil.copytree(base_dir, tmp_path / "copy")
    (directory / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InputError, match="chat template does not work"):
        Tokenizer(directory)


@pytest.mark.parametrize("name", ["llama-2", "llama-3"])
def test_real_tokenizers_on_real_chats(realdata, name):
    tokenizer = Tokenizer(realdata / "tokenizers" / name)
    for record in read_chats(realdata / "chats" / "sharegpt-500.json").chats[:60]:
        chat = record.messages
        ids, target, ends = tokenize_chat(tokenizer, record)
        replies = [m["content"].strip() for m in chat if m["role"] == "assistant"]
        eos = tokenizer.tokens[tokenizer.eos]
        assert [
            run.strip() for run in "".join(targets_of(tokenizer, chat)).split(eos)[:-1]
        ] == replies
        assert len(ends) == len(replies)


def test_a_stream_that_passes_a_special_token_keeps_the_space_behind_it(plain):
    ids = [*plain.encoding("the").ids, plain.unk, *plain.encoding("cat").ids]
    stream = TextStream(plain)
    assert "".join(map(stream.step, ids)) + stream.rest() == plain.decode(ids) == "the cat"


def test_dropout_is_switched_off_and_told_once(tmp_path, capsys):
    directory = make_directory(tmp_path, 0)
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.5
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    tokenizers = [Tokenizer(directory) for _ in range(2)]
    ids = [each.encode("The cat sat on the mat and the dog") for each in tokenizers * 10]
    assert all(each == ids[0] for each in ids)
    assert capsys.readouterr().err.count("its dropout is off") == 1


def test_a_panic_of_the_library_is_one_line(tmp_path):
    """Rust's panics are no Exceptions."""
    directory = make_directory(tmp_path, 0)
    raw = json.loads((directory / "tokenizer.json").read_text())
    raw["model"]["continuing_subword_prefix"] = "\N{SNOWMAN}\N{SNOWMAN}"
    raw["model"]["vocab"] = {"a": 0, "b": 1, "\N{SNOWMAN}\N{SNOWMAN}b": 2, "ab": 3}
    raw["model"]["merges"] = [["a", "b"]]
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="tokenizer.json"):
        Tokenizer(directory).encode("ab")
