"""Speculative decoding gives what plain decoding gives: its tokens, or its distribution."""

import itertools
import json

import pytest
import torch
from conftest import assert_refused, make_directory

import ivl
import sample
from extras import speculative
from extras.int8 import Int8Llama
from extras.speculative import Drafts
from model import Config, Llama, Reader, column_major
from plumbing.pair import Speaker
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2]]


def tiny(seed: int, words: int = 12, lively: float = 0.5, context: int = 64, **shape) -> Llama:
    """A random Llama; the livelier, the surer of its next token."""
    shape = dict(hidden=8, layers=1) | shape
    config = Config(words, shape["hidden"], 16, shape["layers"], 2, 1, 4, context)
    model = Llama(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, lively, generator=generator)
    return model


def near(model: Llama, seed: int, by: float = 0.1) -> Llama:
    """A draft that often says what `model` says."""
    other = Llama(model.config).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight, its in zip(other.parameters(), model.parameters()):
        weight.copy_(its + by * torch.randn(its.shape, generator=generator))
    return other


class Noted(Drafts):
    """Notes of each round how many tokens each row gained: those that stood and one more."""

    def __init__(self, *how, **options):
        super().__init__(*how, **options)
        self.gained = []

    def rounds(self, *how, **options):
        for new in super().rounds(*how, **options):
            self.gained.append([len(row) for row in new])
            yield new


def drafted(base, draft, value, prompts, n, k, never=(), **how) -> tuple[list, Noted]:
    """The steps of a decoding in rounds of k drafted tokens, and what was noted of them."""
    drafts = Noted(draft, k, never)
    return list(ivl.generate(base, [value], prompts, n, rounds=drafts.rounds, **how)), drafts


@pytest.fixture(scope="module")
def base() -> Llama:
    return tiny(1, hidden=16, layers=2)


@pytest.fixture(scope="module")
def value() -> Llama:
    return tiny(2)


# ---------------------------------------------------------------- greedy: the same tokens


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("by", [0.0, 0.1, 3.0])
def test_greedy_tokens_are_the_target_s_own(base, value, k, by):
    """For prompts of several lengths, however good the draft."""
    plain = list(ivl.generate(base, [value], PROMPTS, 25))
    steps, drafts = drafted(base, near(base, 3, by), value, PROMPTS, 25, k)
    assert steps == plain
    if by == 0:  # the base is its own draft
        assert drafts.stood == drafts.tried > 0
        assert drafts.summary() == f"{drafts.tried} of {drafts.tried} drafted tokens stood"
    elif k > 1:  # rows take different numbers
        assert len({n for row in drafts.gained[1:] for n in row}) > 1


@pytest.mark.parametrize("alpha", [0.0, 0.5, -2.0])
def test_alpha_counts_in_draft_and_target(base, value, alpha):
    plain = list(ivl.generate(base, [value], PROMPTS, 20, alphas=[alpha]))
    steps, drafts = drafted(base, base, value, PROMPTS, 20, 3, alphas=[alpha])
    assert steps == plain and drafts.stood == drafts.tried


def test_each_token_is_read_once_by_the_value_model(base, value, monkeypatch):
    """And the base reads all of a round's at once."""
    reads = []
    hidden = Reader.hidden

    def noted(reader, tokens, counts=None):
        reads.append((reader.model, tokens.shape[1]))
        return hidden(reader, tokens, counts)

    monkeypatch.setattr(Reader, "hidden", noted)
    draft = near(base, 3, 0.0)
    _, drafts = drafted(base, draft, value, [[1, 2]], 13, 3)
    assert drafts.gained == [[1], [4], [4], [4]]
    assert [n for model, n in reads if model is base] == [2, 4, 4, 4]
    assert [n for model, n in reads if model is value] == [2] + [1] * 12
    # the prompt and the first token; later the one that it had not needed to read, and the next
    assert [n for model, n in reads if model is draft] == [3, 1, 1, 2, 1, 1, 2, 1, 1]


def test_a_stop_inside_a_draft_ends_the_row(base, value):
    whole = list(ivl.generate(base, [value], PROMPTS, 13))
    told = [[ids[row] for ids in whole] for row in range(len(PROMPTS))]
    ended = set()
    for stop in sorted({i for row in told for i in row}):
        plain = list(ivl.generate(base, [value], PROMPTS, 13, stop=[stop]))
        steps, _ = drafted(base, base, value, PROMPTS, 13, 5, stop=[stop])
        assert steps == plain
        # where in a round of six tokens it came; the first token of all is of no round
        ended |= {(row.index(stop) - 1) % 6 for row in told if stop in row[1:]}
    assert len(ended) > 3


def test_no_more_is_drafted_than_fits_with_the_target_s_own_token(base, value):
    """Twelve tokens: the prompt's one, 3 + 1, 3 + 1, and 2 + 1."""
    _, drafts = drafted(base, near(base, 3, 0.0), value, [[1, 2]], 12, 3)
    assert drafts.gained == [[1], [4], [4], [3]]


@pytest.mark.parametrize("of", ["base", "value"])
@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_a_context_that_becomes_full_ends_the_row(base, value, of, room):
    models = {"base": base, "value": value}
    short = near(models[of], 0, 0.0)
    short.config = Config(**vars(short.config) | {"max_position_embeddings": 6 + room})
    models[of] = short
    plain = list(ivl.generate(models["base"], [models["value"]], PROMPTS, 40))
    assert len(plain) == 5 + room  # of the shortest prompt
    steps, _ = drafted(models["base"], base, models["value"], PROMPTS, 40, 4)
    assert steps == plain


@pytest.mark.parametrize("context, reads", [(3, 0), (8, 7), (10, 10), (12, 12)])
def test_a_draft_whose_context_is_shorter_drafts_as_far_as_it_reaches(base, value, context, reads):
    """With 3 + 1 tokens four more are drafted, of which it reads three; with 9 what then fits."""
    draft = near(base, 0, 0.0)
    draft.config = Config(**vars(base.config) | {"max_position_embeddings": context})
    plain = list(ivl.generate(base, [value], [[1, 2, 3]], 20))
    reader = Reader(draft, 1, 64)
    longest = []
    hidden = reader.hidden

    def noted(tokens, counts=None):
        h = hidden(tokens, counts)
        longest.append(reader.lengths[0])
        return h

    reader.hidden = noted
    draft.reader = lambda rows, slots: reader
    steps, drafts = drafted(base, draft, value, [[1, 2, 3]], 20, 4)
    assert steps == plain
    assert max(longest, default=0) == reads
    assert drafts.gained[-1] == [1]


def test_words_that_are_not_said(base, value):
    """The vocabulary's end, and ids that mean different things."""
    draft = near(base, 3)
    for never, vocabulary in (([], 9), ([0, 3, 8], 12), ([2], 7)):
        choose = ivl.never(torch.tensor(never, dtype=torch.long), ivl.choose)
        plain = ivl.generate(base, [value], PROMPTS, 30, vocabulary=vocabulary, choose=choose)
        options = {"vocabulary": vocabulary, "never": never}
        steps, _ = drafted(base, draft, value, PROMPTS, 30, 3, **options)
        assert steps == list(plain)
        warm, _ = drafted(base, draft, value, PROMPTS, 30, 3, temperature=2.0, **options)
        said = {i for ids in warm for i in ids}
        assert max(said) < vocabulary and not said & set(never) and len(said) > 4


def test_padded_vocabularies(value):
    """Where one model has more rows than another, the front counts."""
    base, draft = tiny(1, words=16), tiny(3, words=14)
    plain = list(ivl.generate(base, [value], PROMPTS, 30))
    assert drafted(base, draft, value, PROMPTS, 30, 2)[0] == plain


def test_several_value_models_and_none(base, value):
    draft, other = near(base, 3), tiny(4)
    for values, alphas in (([value, other], [1.0, -1.0]), ([], [])):
        plain = list(ivl.generate(base, values, PROMPTS, 30, alphas=alphas))
        rounds = Drafts(draft, 3).rounds
        steps = ivl.generate(base, values, PROMPTS, 30, alphas=alphas, rounds=rounds)
        assert list(steps) == plain


@pytest.mark.parametrize(
    "target, draft", [("stories260K", "llama2xs"), ("llama2xs", "stories260K")]
)
def test_greedy_tokens_of_real_checkpoints(realdata, target, draft):
    models = [load(realdata / "models" / name) for name in (target, draft, "llama2xs")]
    base, draft, value = map(column_major, models)
    tokenizer = Tokenizer(realdata / "models" / target)
    texts = ["Once upon a time", "Lily and Tim went to the park. They saw", "The", "A big red ball"]
    prompts = [tokenizer.encode(text) for text in texts]
    options = {"stop": tokenizer.stop, "alphas": [0.5]}
    plain = list(ivl.generate(base, [value], prompts, 120, **options))
    assert drafted(base, draft, value, prompts, 120, 3, **options)[0] == plain


# ---------------------------------------------------------------- drawn: the same distribution

WORDS, DRAWN, ROWS = 5, 4, 50_000
HOW = [
    {"temperature": 1.0},
    {"temperature": 1.2, "top_k": 4, "top_p": 0.9, "alpha": 0.5},
    pytest.param({"temperature": 0.7, "top_k": 3}, marks=pytest.mark.slow),
    pytest.param({"temperature": 1.5, "top_p": 0.8}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def trio() -> tuple[Llama, Llama, Llama]:
    """Base, draft and value model with five words; draft and target agree on about two thirds."""
    return tiny(1, WORDS, 0.6), tiny(8, WORDS, 0.6), tiny(2, WORDS, 0.6)


def exactly(base: Llama, value: Llama, prompt: list[int], how: dict) -> torch.Tensor:
    """The probability of each continuation of four words.  (5⁴,)"""
    how = dict(how)
    alpha = how.pop("alpha", 1.0)
    choice = {"top_k": 0, "top_p": 1.0} | how
    words = itertools.product(range(WORDS), repeat=DRAWN)
    texts = torch.tensor([[*prompt, *four] for four in words])
    z_post = ivl.combine(base(texts), value(texts), alpha)  # (5⁴, T, V)
    p = ivl.probabilities(z_post.double(), **choice)[:, len(prompt) - 1 : -1]  # (5⁴, 4, V)
    new = texts[:, len(prompt) :, None]  # (5⁴, 4, 1)
    return p.gather(-1, new).double().prod(1)[:, 0]


def drawn(base: Llama, draft: Llama, value: Llama, prompt: list[int], how: dict) -> torch.Tensor:
    """How often each continuation of four words came.  (5⁴,)

    Rounds of three drafted tokens; nine are asked for, or the rounds would become shorter before.
    """
    how = dict(how)
    rounds = Drafts(draft, 3).rounds
    alphas = [how.pop("alpha", 1.0)]
    steps = ivl.generate(
        base, [value], [prompt] * ROWS, 9, seed=7, alphas=alphas, rounds=rounds, **how
    )
    index = torch.zeros(ROWS, dtype=torch.long)
    for ids in itertools.islice(steps, DRAWN):
        index = WORDS * index + torch.tensor(ids)
    return index.bincount(minlength=WORDS**DRAWN).double()


def improbable(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Chi-squared, in standard deviations from what it is if `counts` are draws from p.

    Cells that expect less than five are one cell. With m degrees of freedom its mean is m and its
    variance 2 m.
    """
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    few = expected < 5
    expected = torch.cat((expected[~few], expected[few].sum()[None]))
    counts = torch.cat((counts[~few], counts[few].sum()[None]))
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = len(expected) - 1
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    return (chi_squared - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("how", HOW)
def test_drawn_tokens_have_the_target_s_distribution(trio, how):
    base, draft, value = trio
    p = exactly(base, value, [1, 2], how)
    assert p.sum() == pytest.approx(1, abs=1e-6)
    counts = drawn(base, draft, value, [1, 2], how)
    assert improbable(counts, p) < 4


def never_rejected(drafted, q, p, generator):
    return torch.ones_like(drafted, dtype=torch.bool)


def too_strict(drafted, q, p, generator):
    """As if a draft's own probability did not count."""
    p = p.gather(-1, drafted[..., None])[..., 0]
    return torch.rand(p.shape, generator=generator) < p


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("stands", never_rejected),
        ("stands", too_strict),
        ("lacking", lambda q, p: p),  # the whole distribution, and not what is lacking
    ],
)
def test_wrong_rules_are_told_from_the_right_one(trio, monkeypatch, name, wrong):
    base, draft, value = trio
    monkeypatch.setattr(speculative, name, wrong)
    p = exactly(base, value, [1, 2], HOW[0])
    assert improbable(drawn(base, draft, value, [1, 2], HOW[0]), p) > 20


def test_a_rejection_by_rounding_does_not_take_an_impossible_word():
    """Where nothing is lacking anywhere, the target's own distribution counts."""
    p = torch.tensor([[0.0, 1.0]])
    assert speculative.lacking(p, p).tolist() == [[0.0, 1.0]]


def test_a_seed_repeats_its_reply(base, value):
    def reply(seed: int) -> list:
        how = {"temperature": 1.0, "seed": seed}
        return drafted(base, near(base, 3), value, PROMPTS, 20, 3, **how)[0]

    assert reply(1) == reply(1) != reply(2)


# ---------------------------------------------------------------- in batches and in sample.py


def test_steps_come_as_soon_as_all_rows_have_them(base, value):
    """A reply streams: the first token is given before anything is drafted."""
    drafts = Noted(near(base, 3), 4)
    steps = ivl.generate(base, [value], PROMPTS, 30, rounds=drafts.rounds)
    next(steps)
    assert drafts.gained == [[1, 1, 1, 1]]
    next(steps)
    assert len(drafts.gained) == 2


@pytest.fixture
def ask(run, tmp_path):
    """sample.py with a target and a draft that sometimes agree."""
    directories = [make_directory(tmp_path / name, seed) for name, seed in (("b", 1), ("d", 5))]
    value = make_directory(tmp_path / "v", seed=2)

    def runner(*args, draft=directories[1], base=directories[0], value=value, stdin=""):
        drafts = [] if draft is None else ["--draft", draft]
        models = ["--base", base, "--value", value, *drafts]
        return run("sample.py", *models, "--max_new_tokens", 12, *args, stdin=stdin)

    runner.base = directories[0]
    return runner


def test_a_question_a_chat_and_a_file(ask, tmp_path):
    for draft_is in (ask.base, None):
        said = ask("hello you", draft=draft_is)
        assert said.returncode == 0 and "12 tokens" in said.stderr
    drafted, plain = ask("hello you"), ask("hello you", draft=None)
    assert drafted.stdout == plain.stdout
    lines = "hello you\n/base\n/value\n/alpha 0.5\nWho?\n"
    assert ask(stdin=lines).stdout == ask(stdin=lines, draft=None).stdout
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello you\nWhere is the dog?\nThe cat\n")
    many = ["--prompts", prompts, "--batch_size", 2]
    assert ask(*many).stdout == ask(*many, draft=None).stdout
    warm = ["--temperature", 0.7, "hello you"]
    assert ask(*warm).stdout == ask(*warm).stdout != ask("--seed", 1, *warm).stdout


def test_the_draft_does_draft_and_says_so(ask):
    """After the prompt's token eleven of twelve are left: 3 + 1, 3 + 1 and 2 + 1."""
    said = ask("--drafted", 3, "hello you", draft=ask.base)
    assert "8 of 8 drafted tokens stood" in said.stderr
    assert_refused(ask("--drafted", 3, "hello you", draft=None), "--drafted", "without --draft")


def test_eight_bits_are_of_base_and_draft(ask):
    words = ["--base", ask.base, "--value", ask.base, "--draft", ask.base, "--base_dtype", "int8"]
    speaker = Speaker(sample.arguments(list(map(str, words))))
    assert isinstance(speaker.base, Int8Llama) and isinstance(speaker.drafts.draft, Int8Llama)
    assert not isinstance(speaker.values[0], Int8Llama)
    eight = ["--base_dtype", "int8", "hello you"]
    assert ask(*eight).stdout == ask(*eight, draft=None).stdout


def test_what_a_draft_cannot_do_is_refused(ask, run, monkeypatch, tmp_path):
    other = make_directory(tmp_path / "other", 3, bytelevel=True)
    assert_refused(ask("hello", draft=other), "--draft", "another vocabulary")
    assert_refused(ask("hello", draft=tmp_path / "absent"), "--draft", "absent")
    assert_refused(ask("hello", value="none"), "--draft", "base alone")
    assert_refused(ask("--map", tmp_path / "m", "hello"), "--draft", "--map", "token by token")
    monkeypatch.setattr(sample, "torchrun", lambda: True)
    assert_refused(ask("hello"), "--draft", "torchrun")


def test_a_draft_that_lacks_a_word_is_refused(ask, tmp_path):
    """Of one that differs otherwise nothing is lost, if the pair never says it."""
    fewer = make_directory(tmp_path / "fewer", 3)
    raw = json.loads((fewer / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["another"] = vocabulary.pop(last)
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) != last]
    (fewer / "tokenizer.json").write_text(json.dumps(raw))
    assert_refused(ask("hello", draft=fewer), "--draft", "another vocabulary")
