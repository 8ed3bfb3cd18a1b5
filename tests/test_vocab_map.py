"""Vocabulary mapping: the two alignments, the map, its file, and a base that is asked in another
vocabulary."""

import json
import random
import shutil

import pytest
import torch
from conftest import TEXT, assert_refused, make_directory

import ivl
import sample
import vocab_map
from extras import mapped
from extras.mapped import FLOOR, Bridge, Mapped
from plumbing.files import InputError, open_tensors, read_texts, save_tensors
from plumbing.pair import Speaker
from plumbing.streaming import TextStream
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load
from vocab_map import Spelling, VocabMap

TEXTS = TEXT.split(". ")


@pytest.fixture(scope="module")
def tokenizers(base_dir, other_dir):
    return Tokenizer(base_dir), Tokenizer(other_dir)


@pytest.fixture(scope="module")
def mapping(tokenizers):
    return VocabMap.make(*tokenizers, TEXTS)


@pytest.fixture(scope="module")
def bridge(mapping):
    return Bridge(mapping)


def W(mapping: VocabMap) -> dict[tuple[int, int], float]:
    return dict(zip(zip(mapping.base_ids.tolist(), mapping.value_ids.tolist()), mapping.p.tolist()))


# ---------------------------------------------------------------- Algorithm 1


def test_edit_distance_by_hand():
    assert vocab_map.edit_distance(b"kitten", b"sitting") == 3  # k → s, e → i, + g
    assert vocab_map.edit_distance(b"", b"abc") == 3
    assert vocab_map.edit_distance("é".encode(), b"e") == 2  # bytes, not characters: C3 A9
    assert vocab_map.cost(b"cat", b"c") == pytest.approx(
        0.2
    )  # two letters less, but one holds the other


def test_warp_by_hand():
    # cost     un   happy            total    un    happy
    # un      0.0    5.0             un      0.0     5.0
    # hap     3.0    0.2    →        hap     3.0     0.2
    # py      2.0    0.3             py      5.0     0.5    so `happy` is paired with both of its
    # pieces
    assert vocab_map.warp([b"un", b"hap", b"py"], [b"un", b"happy"]) == [(0, 0), (1, 1), (2, 1)]
    assert vocab_map.warp([b"ab", b"c"], [b"a", b"b", b"c"]) == [
        (0, 0),
        (0, 1),
        (1, 2),
    ]  # 0.1 + 0.1 + 0


def test_the_released_normalisation_by_hand():
    # V = 4.  counts      minus the row's mean      over the column's largest     each row's largest
    #   b0: 6  2 0 0      4   0  (mean 2)             4/4    0                    v0: 1
    #   b1: 5  3 0 0      3   1  (mean 2)             3/4   1/3                   v0: 0.75
    #   b2: 0  4 0 0          3  (mean 1)                   3/3                   v1: 1
    counts = {(0, 0): 6, (0, 1): 2, (1, 0): 5, (1, 1): 3, (2, 1): 4}
    assert vocab_map.paper_rows(counts, 4) == {(0, 0): 1.0, (1, 0): 0.75, (2, 1): 1.0}


# ---------------------------------------------------------------- bytes


def test_alignment_by_hand(tokenizers):
    # base   ▁The|▁|r|ain       value   The|Ġ|rain      a base token is paired with the value token
    # that begins where it bytes  0   3 4 5   8              0   3 4   8     begins; `ain`, inside
    # of `rain`, with none. At the front of a text
    # only the base puts a space: its first token counts as `The`
    base, value = map(Spelling, tokenizers)
    counts = vocab_map.count_aligned(base, value, ["The rain"])
    assert {(base.bytes[b], value.bytes[v]): n for (b, v), n in counts.items()} == {
        (b"The", b"The"): 1,
        (b" ", b" "): 1,
        (b"r", b"rain"): 1,
    }


def test_a_text_without_tokens_counts_nothing(tokenizers):
    base, value = map(Spelling, tokenizers)
    assert vocab_map.count_aligned(base, value, ["", "The"]) == vocab_map.count_aligned(
        base, value, ["The"]
    )


def test_token_bytes(tokenizers):
    base, value = map(Spelling, tokenizers)
    ids = base.tokenizer.backend.get_vocab()
    assert [base.bytes[ids[token]] for token in ("<s>", "<0x0A>", "▁the")] == [None, b"\n", b" the"]
    ids = value.tokenizer.backend.get_vocab()
    assert [value.bytes[ids[token]] for token in ("</s>", "Ċ", "Ġthe")] == [None, b"\n", b" the"]
    assert sorted(
        len(data) == 1 and data[0] for data in value.bytes if data and len(data) == 1
    ) == list(range(256))


def any_text(rng: random.Random) -> bytes:
    """Letters, spaces, any Unicode, and bytes that are no text at all, such as half an emoji."""
    parts = [
        rng.choice(
            [
                "the cat",
                " ",
                "  ",
                "\n",
                "</s>",
                "é",
                "中文",
                "🙂",
                chr(rng.randrange(0x20, 0xD800)),
            ]
        ).encode()
        for _ in range(rng.randrange(8))
    ]
    if rng.random() < 0.5:
        parts.insert(
            rng.randint(0, len(parts)), rng.choice([b"\xf0\x9f", b"\x99", b"\xff", b"\xe4\xb8"])
        )
    return b"".join(parts)


def test_any_bytes_are_spelt(tokenizers):
    rng = random.Random(0)
    for side in map(Spelling, tokenizers):
        for _ in range(300):
            text = any_text(rng)
            ids, ends = side.spell(text)
            assert side.join(ids) == side.space + text
            assert ends == [len(side.join(ids[: i + 1])) for i in range(len(ids))]


def test_a_text_in_pieces_is_spelt_as_a_whole(tokenizers, monkeypatch):
    monkeypatch.setattr(vocab_map, "PIECE", 7)
    rng = random.Random(1)
    for side in map(Spelling, tokenizers):
        assert side.cuts
        for _ in range(200):
            text = " ".join(
                rng.choice(["The cat", " sat", "the\n", "\n mat", "中文 dog", "it rains. "])
                for _ in range(9)
            ).encode()
            assert side.spell(text) == side._spell_piece(text)
        assert (
            side.spell_piece.cache_info().hits > 100
        )  # pieces there were, and the same ones again


def test_a_text_is_not_cut_where_a_token_may_span_two_words(base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(vocab_map, "PIECE", 7)
    directory = shutil.copytree(base_dir, tmp_path / "spanning")
    raw = json.loads((directory / "tokenizer.json").read_text())
    n = len(raw["model"]["vocab"])
    both = {**raw["added_tokens"][0], "id": n, "content": " cat sat", "special": False}
    raw["added_tokens"].append(both)
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    side = Spelling(Tokenizer(directory))
    assert side.bytes[n] == b" cat sat" and not side.cuts
    text = b"cat sat on cat sat and cat sat"
    assert side.spell(text) == side._spell_piece(text)
    assert side.spell(text)[0].count(n) > 1


def test_only_the_byte_that_a_vocabulary_lacks_is_left_out(tokenizers):
    for side in map(Spelling, tokenizers):
        del side.index[b"\xff"]
        ids, ends = side.spell(b"The\xffcat")
        assert side.join(ids) == side.space + b"Thecat"
        assert ends[-1] == len(side.space + b"The\xffcat")
        assert side.join(side.split(b"The\xffcat")) == b"Thecat"


# ---------------------------------------------------------------- the map


def test_rows_are_distributions_and_no_token_is_left_out(mapping, tokenizers):
    base, value = tokenizers
    sums = torch.zeros(len(base.tokens)).index_add(0, mapping.base_ids, mapping.p)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert set(mapping.value_ids.tolist()) == set(range(len(value.tokens)))
    for name in ("bos", "eos"):
        assert W(mapping)[getattr(base, name), getattr(value, name)] > 0.9


def test_a_token_that_the_texts_lack_follows_its_bytes(tokenizers):
    base, value = tokenizers
    rows = W(VocabMap.make(base, value, ["The"]))
    assert {v for _, v in rows} == set(range(len(value.tokens)))
    b, v = base.backend.token_to_id("▁dog"), value.backend.token_to_id("Ġdog")
    assert rows[b, v] > 0.9


@pytest.mark.parametrize("missing", ["bos", "eos"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_tokenizer_without_bos_or_eos_is_mapped_too(base_dir, other_dir, side, missing):
    pair = Tokenizer(base_dir), Tokenizer(other_dir)
    setattr(pair[side], missing, None)
    made = VocabMap.make(*pair, TEXTS[:2])
    sums = torch.zeros(len(pair[0].tokens)).index_add(0, made.base_ids, made.p)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert set(made.value_ids.tolist()) == set(range(len(pair[1].tokens)))


def test_overlap_by_hand(tokenizers):
    # base  ▁The|▁|r|ain    value  The|Ġ|rain: each is found but `ain`, which stands for no token
    base, value = tokenizers
    made = VocabMap.make(base, value, ["The rain"] * 9)
    ratio, limit, worst = vocab_map.overlap(made, ["The rain", ""])
    assert (ratio, limit) == (1.0, 1.0)
    assert [(made.base.bytes[b], n) for b, n in worst] == [(b"ain", 1)]
    # the other way round three tokens cannot become four
    made = VocabMap.make(value, base, ["The rain"] * 9)
    assert vocab_map.overlap(made, ["The rain"]) == (0.75, 0.75, [])


def test_minED_stands_in_where_no_token_fits(tokenizers):
    side = Spelling(tokenizers[1])
    side.index = {data: i for data, i in side.index.items() if data in (b"on", b"rain")}
    assert (
        side.bytes[vocab_map.nearest(b"brain", side)] == b"rain"
    )  # nothing begins it: one letter too many


def test_same_tokenizer_gives_the_identity(base_dir, value_dir, tmp_path):
    same = VocabMap.make(Tokenizer(base_dir), Tokenizer(value_dir), TEXTS)
    assert W(same) == {(i, i): 1.0 for i in range(len(same.base.bytes))}
    same.save(tmp_path / "map.safetensors")
    models = ["--base", str(base_dir), "--value", str(value_dir)]
    prompts = [same.value.tokenizer.encode(text) for text in TEXTS[:2]]
    for options in ([], ["--temperature", "0.7"]):
        plain, through = (
            Speaker(sample.arguments([*models, *options, *given]))
            for given in ([], ["--map", str(tmp_path / "map.safetensors")])
        )
        assert list(through.replies(prompts)) == list(plain.replies(prompts))


def test_pending_bytes_leave_the_remainder(mapping, bridge):
    # behind ' ca' the base can still say ' cat', whose remainder is 't'
    b, v, p = bridge.rows(b" ca", torch.device("cpu"))
    assert len(b) and {mapping.base.bytes[i][:3] for i in b.tolist()} == {b" ca"}
    cat, t = mapping.base.index[b" cat"], mapping.base.index[b"t"]
    row = {
        j: x for (i, j), x in W(mapping).items() if i == t
    }  # the base knows 't': its row says what 't' begins
    assert {j: x for i, j, x in zip(b.tolist(), v.tolist(), p.tolist()) if i == cat} == row
    assert not len(bridge.rows(b" cat sat", torch.device("cpu"))[0])


def test_the_base_reads_the_canonical_text(mapping, bridge):
    base, value = mapping.base, mapping.value
    for text in ("The cat sat", "The 🙂"):
        letters = [
            value.index[bytes([byte])] for byte in text.encode()
        ]  # value tokens as they should not be
        ids, ends, data = bridge.respell([value.tokenizer.bos, *letters])
        assert (
            ids == base.tokenizer.encode(text)
            and data == b" " + text.encode()
            and ends[-1] == len(data)
        )
    assert bridge.respell(letters, canonical=False)[0] != ids


@pytest.mark.parametrize("turned", [False, True])
def test_places_are_those_of_the_text_however_it_is_read(tokenizers, turned):
    """Of the two tokenizers one puts a space in front of a text, the other does not."""
    base, value = tokenizers[::-1] if turned else tokenizers
    bridge = Bridge(VocabMap.make(base, value, TEXTS))
    for canonical in (True, False):
        _, ends, text = bridge.respell(value.encode("The cat"), canonical)
        assert text == bridge.base.space + b"The cat" and ends[-1] == len(text)


def test_special_tokens_are_read_as_special(mapping, bridge):
    base, value = mapping.base.tokenizer, mapping.value.tokenizer
    ids = value.encode("The cat") + [value.eos] + value.encode("A dog")
    read, ends, data = bridge.respell(ids)
    assert read == [
        base.bos,
        *base.encode("The cat")[1:],
        base.eos,
        base.bos,
        *base.encode("A dog")[1:],
    ]
    assert data == b" A dog"
    segment = read.index(base.bos, 1)
    assert ends[:segment] == [-1] * segment and ends[segment] == 0


# ---------------------------------------------------------------- the mapped base


def test_cached_equals_uncached_after_every_step(mapping, base_dir):
    """Value tokens are bytes here, so the base's last tokens merge and split again at almost every
    step."""
    base, byte = load(base_dir), mapping.value.index
    texts = [
        b"The cat says good morning!",
        "中 🙂 the dog".encode(),
        b"it rains \xf0\x9f in the garden",
    ]
    rows = [[byte[bytes([x])] for x in text] for text in texts]
    rows[1].insert(5, mapping.value.tokenizer.eos)
    model, rolled_back = Mapped(base, mapping), 0
    grown = model.reader(len(rows), 0)

    def anew(text):
        return model.reader(1, 0).read(*ivl.padded([text]))

    with torch.inference_mode():
        for t in range(max(map(len, rows)) + 1):
            now, before = [row[:t] for row in rows], [text.base_ids for text in grown.states]
            cached = grown.read(*ivl.padded([row[t - 1 : t] if t else [] for row in rows]))
            after = [text.base_ids for text in grown.states]
            rolled_back += any(old != new[: len(old)] for old, new in zip(before, after))
            fresh = torch.cat([anew(text) for text in now])
            torch.testing.assert_close(cached, fresh, atol=1e-3, rtol=1e-4)
        # taken back, and several at once, it is where it was
        lengths = [len(row) - 4 for row in rows]
        grown.back_to(lengths)
        each = grown.read_each(torch.tensor([row[-4:] for row in rows]))
        torch.testing.assert_close(each[:, -1], cached, atol=1e-3, rtol=1e-4)
        for b, row in enumerate(rows):
            for k in range(4):
                fresh = anew(row[: len(row) - 3 + k])[0]
                torch.testing.assert_close(each[b, k], fresh, atol=1e-3, rtol=1e-4)
    assert rolled_back > 5


@torch.inference_mode()
def test_boundaries_are_known_again_after_a_text_was_taken_back(mapping, base_dir):
    """Of `The ca` the last `a` is read twice; `·cat`, begun before it, may still come."""
    model, byte = Mapped(load(base_dir), mapping), mapping.value.index
    text = torch.tensor([[byte[bytes([x])] for x in b"The ca"]])
    reader = model.reader(1, 0)
    expected = reader.read(text)
    reader.back_to([5])
    torch.testing.assert_close(reader.read(text[:, 5:]), expected, atol=1e-3, rtol=1e-4)


def test_mapped_probabilities_by_hand(mapping, bridge, base_dir):
    """After ' ca' come the first bytes that follow the base's ' ', 'c', 'a', and what is left of
    its ' cat' and 'cat'."""
    base, byte = load(base_dir), mapping.value.index
    reader = Mapped(base, mapping).reader(1, 0)
    text = [mapping.value.tokenizer.bos, *(byte[bytes([x])] for x in b"The ca")]
    ids, ends, data = bridge.respell(text)
    assert [mapping.base.bytes[i] for i in ids] == [None, b" The", b" ", b"c", b"a"]
    with torch.inference_mode():
        z = reader.read(torch.tensor([text]))[0]
        logp = base(torch.tensor([ids]))[0].log_softmax(-1)
        expected = torch.zeros(len(z))
        for k, pending in ((1, b" ca"), (2, b"ca"), (3, b"a"), (4, b"")):
            before = sum(logp[i - 1, ids[i]] for i in range(1, k + 1))
            for b, v, w in zip(*(x.tolist() for x in bridge.rows(pending, z.device))):
                expected[v] += w * torch.exp(before + logp[k, b])
        expected = (1 - FLOOR) * expected / expected.sum() + FLOOR / len(z)
    torch.testing.assert_close(z, expected.log(), atol=1e-3, rtol=1e-4)
    assert z.exp().sum().item() == pytest.approx(1)


def test_a_batch_decodes_as_its_rows_do(mapping, base_dir, other_dir):
    base, value = load(base_dir), load(other_dir)
    prompts = [
        mapping.value.tokenizer.encode(text)
        for text in ("The cat sat", "Where is the dog? The dog is in the")
    ]
    both = list(zip(*ivl.generate(Mapped(base, mapping), [value], prompts, 20)))
    alone = [
        next(zip(*ivl.generate(Mapped(base, mapping), [value], [prompt], 20))) for prompt in prompts
    ]
    assert both == alone


def test_a_batch_decodes_as_its_rows_do_in_the_papers_way_too(mapping, base_dir, other_dir):
    base, value = Mapped(load(base_dir), mapping, **mapped.PAPERS_WAY), load(other_dir)
    texts = "The cat sat", "Where is the dog? The dog is in the"
    prompts = [mapping.value.tokenizer.encode(text) for text in texts]
    both = list(zip(*ivl.generate(base, [value], prompts, 8)))
    assert both == [next(zip(*ivl.generate(base, [value], [prompt], 8))) for prompt in prompts]


@torch.inference_mode()
def test_a_special_token_ends_all_that_was_pending(mapping, bridge, base_dir):
    """After `The ca</s>` no `t` is due: the base begins a text."""
    base, byte = load(base_dir), mapping.value.index
    tokenizer = mapping.value.tokenizer
    text = [tokenizer.bos, *(byte[bytes([x])] for x in b"The ca"), tokenizer.eos]
    reader = Mapped(base, mapping).reader(1, 0)
    reader.read(torch.tensor([text[:-1]]))
    z = reader.read(torch.tensor([text[-1:]]))[0]
    ids, _, data = bridge.respell(text)
    assert ids[-1] == mapping.base.tokenizer.eos and data == b" "
    p = base(torch.tensor([ids]))[0, -1].softmax(-1)
    expected = torch.zeros(len(z))
    for b, v, w in zip(*(x.tolist() for x in bridge.rows(data, z.device))):
        expected[v] += w * p[b]
    expected = (1 - FLOOR) * expected / expected.sum() + FLOOR / len(z)
    torch.testing.assert_close(z, expected.log(), atol=1e-3, rtol=1e-4)


def test_streamed_text_is_the_reply(mapping, base_dir, other_dir):
    """Tokens of a byte-level vocabulary are often half a character; the stream holds them back."""
    tokenizer = mapping.value.tokenizer
    prompt = tokenizer.encode("中文 🙂 中文 🙂")
    ids = [
        step[0]
        for step in ivl.generate(
            Mapped(load(base_dir), mapping),
            [load(other_dir)],
            [prompt],
            60,
            temperature=1.5,
            seed=3,
        )
    ]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.step, ids)) + stream.rest() == tokenizer.decode(ids)


def test_decoding_ends_where_the_base_is_full(mapping, bridge, base_dir, other_dir):
    base = load(base_dir)
    base.config.max_position_embeddings = 24
    reply = list(
        ivl.generate(
            Mapped(base, mapping),
            [load(other_dir)],
            [mapping.value.tokenizer.encode("The cat")],
            200,
        )
    )
    assert (
        0 < len(reply) <= 200 and len(bridge.respell([i for step in reply for i in step])[0]) < 60
    )


# ---------------------------------------------------------------- files and commands


def test_save_and_load(mapping, tokenizers, tmp_path):
    mapping.save(tmp_path / "map.safetensors")
    again = VocabMap.load(tmp_path / "map.safetensors", *tokenizers)
    assert W(again) == W(mapping) and again.method == "bytes"


def test_a_map_for_other_tokenizers_is_refused(mapping, tokenizers, tmp_path):
    mapping.save(tmp_path / "map.safetensors")
    with pytest.raises(InputError, match="another base tokenizer"):
        VocabMap.load(tmp_path / "map.safetensors", *tokenizers[::-1])
    with pytest.raises(InputError, match="another value tokenizer"):
        VocabMap.load(tmp_path / "map.safetensors", tokenizers[0], tokenizers[0])


@pytest.mark.parametrize(
    "damage",
    [
        dict(base_ids=torch.tensor([10**6])),
        dict(value_ids=torch.tensor([-1])),
        dict(value_ids=torch.tensor([10**6])),
        dict(p=torch.tensor([float("nan")])),
        dict(p=torch.ones(2)),
        dict(p=None),
    ],
)
def test_a_corrupt_map_is_refused(mapping, tokenizers, tmp_path, damage):
    path = tmp_path / "map.safetensors"
    mapping.save(path)
    metadata = open_tensors(path).metadata()
    tensors = (
        dict(base_ids=torch.tensor([5]), value_ids=torch.tensor([5]), p=torch.tensor([1.0]))
        | damage
    )
    save_tensors({name: x for name, x in tensors.items() if x is not None}, path, metadata)
    with pytest.raises(InputError, match="no sparse matrix"):
        VocabMap.load(path, *tokenizers)


def test_files_that_are_no_map_are_refused(tokenizers, tmp_path):
    path = tmp_path / "map.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        VocabMap.load(path, *tokenizers)
    save_tensors({"p": torch.ones(1)}, path, {})
    with pytest.raises(InputError, match="is no vocabulary map"):
        VocabMap.load(path, *tokenizers)


def test_command_then_sample(run, base_dir, other_dir, tmp_path):
    text, out, report = (
        tmp_path / "text.txt",
        tmp_path / "map.safetensors",
        tmp_path / "report.json",
    )
    text.write_text("\n\n".join(TEXTS))
    made = run(
        "vocab_map.py",
        "--base",
        base_dir,
        "--value",
        other_dir,
        "--text",
        text,
        "--out",
        out,
        "--json",
        report,
        "--retention",
    )
    assert made.returncode == 0, made.stderr
    numbers = json.loads(report.read_text())
    assert numbers.keys() == {
        "method",
        "coverage_base",
        "coverage_value",
        "overlap",
        "overlap_limit",
        "nonzeros",
        "texts_per_second",
        "seconds",
        "peak_mb",
        "retention",
    }
    assert (
        numbers["method"] == "bytes" and numbers["coverage_base"] == numbers["coverage_value"] == 1
    )
    assert 0 < numbers["overlap"] <= numbers["overlap_limit"] <= 1
    said = run(
        "sample.py",
        "--base",
        base_dir,
        "--value",
        other_dir,
        "--map",
        out,
        "--max_new_tokens",
        8,
        "cat?",
    )
    assert said.returncode == 0 and "tokens" in said.stderr, said.stderr
    assert_refused(
        run("sample.py", "--base", other_dir, "--value", base_dir, "--map", out, "cat?"),
        "map.safetensors",
        "base",
    )
    assert_refused(
        run("sample.py", "--base", base_dir, "--value", other_dir, "cat?"), "vocab_map.py"
    )


def test_a_map_needs_the_tokenizers_alone(run, base_dir, other_dir, tmp_path):
    for directory in (base_dir, other_dir):
        (tmp_path / directory.name).mkdir()
        shutil.copy(directory / "tokenizer.json", tmp_path / directory.name)
    text, report = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("\n\n".join(TEXTS))
    sides = ["--base", tmp_path / base_dir.name, "--value", tmp_path / other_dir.name]
    made = run("vocab_map.py", *sides, "--text", text, "--json", report)
    assert made.returncode == 0, made.stderr
    assert "retention" not in json.loads(report.read_text())


def test_the_papers_method_decodes_too(tokenizers, base_dir, other_dir, tmp_path):
    made = VocabMap.make(*tokenizers, TEXTS[:4], "paper")
    assert len(set(made.base_ids.tolist())) == len(made.base_ids)  # one value token per base token
    prompt = made.value.tokenizer.encode("The cat")
    assert (
        len(list(ivl.generate(Mapped(load(base_dir), made), [load(other_dir)], [prompt], 5))) == 5
    )


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.json", "{}", "holds no text"),
        ("a.jsonl", "{\n", "not valid JSON"),
        ("a.txt", " \n\n", "holds no text"),
    ],
)
def test_files_without_text_are_refused(tmp_path, name, content, word):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=word):
        read_texts(tmp_path / name)


# ---------------------------------------------------------------- real data


def test_overlap_of_llama_2_and_llama_3(realdata):
    llamas = [Tokenizer(realdata / "tokenizers" / name) for name in ("llama-2", "llama-3")]
    texts = [
        text
        for path in ("chats/lima.json", "text/tinystories.txt")
        for text in read_texts(realdata / path)[::3]
    ]
    for pair in (llamas, llamas[::-1]):
        made = VocabMap.make(*pair, [text for i, text in enumerate(texts) if i % 10])
        ratio, limit, _ = vocab_map.overlap(made, texts[::10])
        assert 0.85 < ratio < limit
        assert set(made.base_ids.tolist()) == set(range(len(pair[0].tokens)))
        assert set(made.value_ids.tolist()) == set(range(len(pair[1].tokens)))
        assert len(made.p) < 0.01 * len(pair[0].tokens) * len(pair[1].tokens)


def test_knowledge_survives_the_map(realdata):
    words, letters = (realdata / "models" / name for name in ("stories260K", "babyllama-tok105"))
    texts = [text for text in read_texts(realdata / "text" / "tinystories.txt") if "\n" not in text]
    made = VocabMap.make(
        Tokenizer(words), Tokenizer(letters), [text for i, text in enumerate(texts) if i % 10]
    )
    base, few = load(words), [text[:200] for text in texts[::300]]
    kept = mapped.retention(base, made, few)
    assert 0.9 < kept < 1.10
    for worse in (dict(step_back=False), dict(canonical=False), dict(linear=True)):
        assert mapped.retention(base, made, few, **worse) > 1.5


@torch.inference_mode()
@pytest.mark.parametrize("canonical", [True, False])
def test_a_mapped_base_that_is_taken_back_answers_as_if_it_had_read_no_further(
    mapping, base_dir, canonical
):
    """In the middle of a text too, where a base token that ended earlier still counts."""
    mapped = Mapped(load(base_dir), mapping, canonical=canonical)
    ids = mapping.value.tokenizer.encode("The cat says 中文 and é! Where is the garden?")
    for cut in range(1, len(ids)):
        reader, fresh = mapped.reader(1, 0), mapped.reader(1, 0)
        reader.read(torch.tensor([ids]))
        reader.back_to([cut])
        again = reader.read(torch.tensor([ids[cut : cut + 1]]))
        expected = fresh.read(torch.tensor([ids[: cut + 1]]))
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


def test_a_map_of_another_dimension_is_one_line(mapping, tmp_path):
    path = tmp_path / "map.safetensors"
    mapping.save(path)
    file = open_tensors(path)
    tensors = {name: file.get_tensor(name)[:, None] for name in ("base_ids", "value_ids", "p")}
    save_tensors(tensors, path, file.metadata())
    with pytest.raises(InputError, match="no sparse matrix"):
        VocabMap.load(path, mapping.base.tokenizer, mapping.value.tokenizer)


def test_retention_of_a_base_with_too_few_rows_is_one_line(run, base_dir, other_dir, tmp_path):
    few = make_directory(tmp_path / "few", 0, vocab_size=100)
    text = tmp_path / "text.txt"
    text.write_text("The cat.\n\nA dog.\n\nThe garden.\n\nIt rains.\n")
    models = ["--base", few, "--value", other_dir, "--text", text, "--retention"]
    assert_refused(run("vocab_map.py", *models), "tokenizer.json", "vocab_size is 100")


def test_a_count_below_its_row_s_mean_stretches_its_column():
    """Row means 2.75, 0.75 and 0.5; column 1 goes from -1.75 to 2.25, so 1.5 there is 3.25 / 4."""
    counts = {(0, 0): 10, (0, 1): 1, (1, 1): 3, (2, 1): 2}
    assert vocab_map.paper_rows(counts, columns=4) == {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.8125}
