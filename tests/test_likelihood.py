"""Log-likelihoods of answers against each text read by itself, whole."""

import pytest
import torch
from conftest import make_directory

from extras import likelihood
from extras.connections import Probe, connected
from extras.likelihood import Question, batches, log_likelihoods
from extras.mapped import Mapped
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load
from vocab_map import VocabMap


def draw(n: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(3, 200, (n,), generator=generator).tolist())


def questions_with_examples() -> list[Question]:
    """Forty contexts begin with the same examples, seven do not; each has one to five answers."""
    generator = torch.Generator().manual_seed(0)
    examples = draw(60, generator)
    questions = []
    for i in range(47):
        context = (examples if i < 40 else ()) + draw(1 + (5 * i) % 23, generator)
        for k in range(1 + i % 5):
            questions.append(Question(context, draw(1 + (i + k) % 6, generator)))
    return questions


@pytest.fixture(scope="module")
def models(base_dir, value_dir):
    return load(base_dir), load(value_dir)


def whole(base, value, question, alphas=(1.0,), vocabulary=None, differing=()):
    """One text, without cache: log p of the answer, and whether all of it is the likeliest."""
    text = torch.tensor([[*question.context, *question.answer]])
    z = base(text)[0]
    if value is not None:
        z = z + alphas[0] * value(text)[0]
    z[:, list(differing)] = -torch.inf
    log_p = z[:, :vocabulary].log_softmax(-1)[len(question.context) - 1 : -1]
    answer = torch.tensor(question.answer)
    said = log_p.gather(-1, answer[:, None]).sum().item()
    return said, bool((log_p.argmax(-1) == answer).all())


def all_of(found):
    merged = {}
    for some in found:
        assert not merged.keys() & some.keys()
        merged |= some
    return merged


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("logits", [1, 2**26])
def test_likelihoods_equal_those_of_each_text_by_itself(models, monkeypatch, batch_size, logits):
    monkeypatch.setattr(likelihood, "LOGITS", logits)
    questions = questions_with_examples()
    # an answer that is the likeliest, so that both cases occur
    text = [*questions[0].context]
    for _ in range(3):
        z = models[0](torch.tensor([text])) + 0.5 * models[1](torch.tensor([text]))
        z[..., [7, 9]] = -torch.inf
        text.append(z[0, -1, :300].argmax().item())
    questions.append(Question(questions[0].context, tuple(text[-3:])))
    options = dict(alphas=[0.5], vocabulary=300, differing=(7, 9))
    questions = [q for q in questions if not {7, 9} & {*q.answer}]
    found = all_of(log_likelihoods(models[0], models[1:], questions, batch_size, **options))
    assert found.keys() == {*range(len(questions))}
    for k, question in enumerate(questions):
        said, greedy = whole(*models, question, **options)
        assert found[k].log_p == pytest.approx(said, abs=1e-4) and found[k].greedy == greedy, k
    assert found[len(questions) - 1].greedy and not all(one.greedy for one in found.values())


@torch.no_grad()
def test_a_base_alone(models):
    questions = questions_with_examples()[:20]
    found = all_of(log_likelihoods(models[0], [], questions, 8))
    for k, question in enumerate(questions):
        assert found[k].log_p == pytest.approx(whole(models[0], None, question)[0], abs=1e-4)


@torch.no_grad()
def test_what_a_pair_never_says_has_no_likelihood(models):
    question = Question((1, 20), (30, 40, 50))
    for place in range(3):
        options = dict(differing=(question.answer[place],))
        (found,) = log_likelihoods(models[0], models[1:], [question], 1, **options)
        assert found[0].log_p == -torch.inf and not found[0].greedy


def test_what_texts_share_is_read_once(models, monkeypatch):
    """Forty contexts begin with 60 tokens of examples; a context is read once for all answers."""
    questions = questions_with_examples()
    read = []
    hidden = models[0].hidden

    def counted(tokens, *args):
        read.append(tokens.numel())
        return hidden(tokens, *args)

    monkeypatch.setattr(models[0], "hidden", counted)
    all_of(log_likelihoods(models[0], [], questions, 4))
    contexts = {question.context for question in questions}
    assert sum(map(len, contexts)) > 2800
    # the examples in the four rows of a batch, then what comes after them, and in twelve batches
    # up to five turns of answers, less their last tokens; padding with it
    assert sum(read) <= 4 * 60 + 47 * 23 + 12 * 5 * 4 * 5


def test_batches_keep_examples_together_and_lose_nothing():
    questions = questions_with_examples()
    contexts = list(dict.fromkeys(question.context for question in questions))
    made = list(batches(contexts, 4))
    assert sorted(sum(made, [])) == sorted(contexts)
    assert all(1 <= len(batch) <= 4 for batch in made)
    shared = [{context[:32] for context in batch if len(context) > 40} for batch in made]
    assert sum(map(bool, shared)) == 10  # forty contexts in ten batches, nobody else among them
    assert [len(batch[0]) for batch in made[:10]] == sorted(
        [len(batch[0]) for batch in made[:10]], reverse=True
    )
    assert list(batches([], 4)) == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["cascade", "cascade+", "probe"])
def test_connections(models, kind):
    base, value = models
    if kind == "probe":
        value, generator = Probe(base.config), torch.Generator().manual_seed(0)
        for weight in value.parameters():
            weight.normal_(0, 0.3, generator=generator)
    pair = connected(kind, base, value)
    questions = questions_with_examples()
    found = all_of(log_likelihoods(pair[0], pair[1:], questions, 4))
    for k in range(0, len(questions), 9):
        text = torch.tensor([[*questions[k].context, *questions[k].answer]])
        h_base = pair[0].hidden(text)
        z = h_base @ base.unembed.T + pair[1].hidden(text) @ pair[1].unembed.T
        log_p = z[0].log_softmax(-1)[len(questions[k].context) - 1 : -1]
        said = log_p.gather(-1, torch.tensor(questions[k].answer)[:, None]).sum().item()
        assert found[k].log_p == pytest.approx(said, abs=1e-4)


@torch.no_grad()
def test_proxy_tuning(models, tmp_path):
    base, expert = models
    anti = load(make_directory(tmp_path / "anti", seed=9))
    questions = questions_with_examples()[:30]
    found = all_of(log_likelihoods(base, [expert, anti], questions, 4, alphas=[1, -1]))
    for k, question in enumerate(questions):
        text = torch.tensor([[*question.context, *question.answer]])
        log_p = (base(text) + expert(text) - anti(text))[0].log_softmax(-1)
        log_p = log_p[len(question.context) - 1 : -1]
        said = log_p.gather(-1, torch.tensor(question.answer)[:, None]).sum().item()
        assert found[k].log_p == pytest.approx(said, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("way", [{}, dict(canonical=False, step_back=False, linear=True)])
def test_a_mapped_base_is_asked_in_the_value_models_tokens(base_dir, other_dir, way):
    """Against a reader that is new for each token of each text."""
    base, value = load(other_dir), load(base_dir)
    tokenizer = Tokenizer(base_dir)
    texts = ["The cat sat on the mat.", "What does the dog say?"]
    mapped = Mapped(base, VocabMap.make(Tokenizer(other_dir), tokenizer, texts), **way)
    answers = [" It rains.", " The", " in the garden, and"]
    questions = []
    for text in ["Where is the cat?", "Where is the dog? In the garden", "And the mat?"]:
        context = tuple(tokenizer.encode(text))
        ids = [tokenizer.encoding(answer).ids for answer in answers]
        questions += [Question(context, tuple(answer)) for answer in ids]
    found = all_of(log_likelihoods(mapped, [value], questions, 2))
    for k, (context, answer) in enumerate(questions):
        said = 0.0
        for n, i in enumerate(answer):
            text = torch.tensor([[*context, *answer[:n]]])
            z_base = mapped.reader(1, 64).read(text)
            z_delta = value.reader(1, 64).read(text)
            V = min(z_base.shape[-1], z_delta.shape[-1])
            said += (z_base[:, :V] + z_delta[:, :V]).log_softmax(-1)[0, i].item()
        assert found[k].log_p == pytest.approx(said, abs=1e-3)
