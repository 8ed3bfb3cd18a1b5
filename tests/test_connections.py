"""Each connection against its equation in naive form, and decoding it with caches against doing
without.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused

import ivl
from extras import connections
from extras.connections import Probe, connected, value_input
from model import CONNECTIONS
from plumbing.files import InputError
from plumbing.streaming import TextStream
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load, recorded_connection
from vocab_map import VocabMap

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def models(base_dir, value_dir):
    base = load(base_dir)
    probe, generator = Probe(base.config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in probe.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return base, load(value_dir), probe


def naive(connection, base, value, ids):
    """z_Δ as §4.1 and A.1 have it, everything in full.  (B, T, V)"""
    if connection == "residual":
        return value(ids)
    if connection == "probe":
        h = base.hidden(ids)
        gate = h @ value.gate.weight.T + value.gate.bias
        up = h @ value.up.weight.T + value.up.bias
        return (F.silu(gate) * up) @ value.head[:, :-1].T + value.head[:, -1]
    h = base(ids).softmax(-1) @ value.embed.weight
    return value(h + value.embed.weight[ids] if connection == "cascade+" else h)


def z_delta(connection, base, value, ids):
    x = value_input(connection, value, ids, base.hidden(ids), base.unembed)
    return F.linear(value.hidden(x), value.unembed)


@pytest.mark.parametrize("chunk", [1, 3 * 330, 10**9])
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_forward_and_gradient_equal_the_equation(models, monkeypatch, connection, chunk):
    monkeypatch.setattr(ivl, "CPU_LOGITS", chunk)
    base, value = models[0], models[2 if connection == "probe" else 1]
    ids = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    gradients = []
    for compute in (naive, z_delta):
        z = compute(connection, base, value, ids)
        F.cross_entropy(z.flatten(0, 1), targets.flatten()).backward()
        gradients.append([p.grad for p in value.parameters()])
        value.zero_grad()
        base.zero_grad(set_to_none=True)
        if compute is naive:
            expected = z
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("connection", CONNECTIONS[1:])
def test_no_gradient_reaches_the_base(models, connection):
    base, value = models[0], models[2 if connection == "probe" else 1]
    ids = torch.tensor([[1, 20, 30, 40]])
    h_base = base.hidden(ids)
    h = value.hidden(value_input(connection, value, ids, h_base, base.unembed))
    ivl.two_headed_loss(h_base, base.unembed, h, value.unembed, ids, ids >= 0, 1.0, 0.1)[
        0
    ].backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in value.parameters())
    value.zero_grad()


def test_expected_embedding_worked_by_hand():
    # p_base = (1/2, 1/4, 1/4) over embeddings (4, 0), (0, 4), (4, 4): (2 + 1, 1 + 1)
    h, head = torch.ones(1, 1, 1), torch.tensor([[2.0], [1.0], [1.0]]).log()
    embed = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
    torch.testing.assert_close(
        connections.expected_embedding(h, head, embed), torch.tensor([[[3.0, 2.0]]])
    )
    torch.testing.assert_close(
        connections.expected_embedding(h, head, embed[:2]), torch.tensor([[[8 / 3, 4 / 3]]])
    )


# ---------------------------------------------------------------- decoding


@torch.no_grad()
def slow(connection, base, value, prompt, n, alpha):
    ids = list(prompt)
    for _ in range(n):
        x = torch.tensor([ids])
        ids.append(int((base(x) + alpha * naive(connection, base, value, x))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_cached_equals_uncached_and_batched_equals_single(models, connection):
    base, value = models[0], models[2 if connection == "probe" else 1]

    def reply(prompts):
        of_base, of_value = connected(connection, base, value)
        steps = ivl.generate(of_base, [of_value], prompts, 25, alphas=[0.7])
        return [list(column) for column in zip(*steps)]

    together = reply(PROMPTS)
    assert together == [slow(connection, base, value, prompt, 25, 0.7) for prompt in PROMPTS]
    assert [reply([prompt])[0] for prompt in PROMPTS] == together
    assert len({tuple(ids) for ids in together}) == 3


@torch.no_grad()
def test_proxy_tuning_is_expert_minus_antiexpert(models, value_dir):
    base, expert, anti = models[0], models[1], load(value_dir)
    anti.norm.weight.mul_(-0.5)
    prompt, expected = [1, 20, 30], [1, 20, 30]
    for _ in range(20):
        x = torch.tensor([expected])
        expected.append(int((base(x) + 0.7 * (expert(x) - anti(x)))[0, -1].argmax()))
    steps = ivl.generate(base, [expert, anti], [prompt], 20, alphas=[0.7, -0.7])
    assert [ids[0] for ids in steps] == expected[3:]
    alone = [ids[0] for ids in ivl.generate(base, [], [prompt], 20)]
    steps = ivl.generate(base, [expert, expert], [prompt], 20, alphas=[1, -1])
    assert [ids[0] for ids in steps] == alone


@torch.no_grad()
def test_two_value_models_add_up(models, value_dir):
    base, one, other = models[0], models[1], load(value_dir)
    other.norm.weight.mul_(-0.5)
    prompt, expected = [1, 20, 30], [1, 20, 30]
    for _ in range(20):
        x = torch.tensor([expected])
        expected.append(int((base(x) + one(x) + 0.5 * other(x))[0, -1].argmax()))
    steps = ivl.generate(base, [one, other], [prompt], 20, alphas=[1, 0.5])
    assert [ids[0] for ids in steps] == expected[3:]


@pytest.mark.parametrize("connection", ["residual", "cascade", "cascade+"])
def test_no_model_looks_at_more_of_its_cache_than_has_been_read(models, monkeypatch, connection):
    widths = []
    attention = F.scaled_dot_product_attention

    def watched(q, k, *others, **options):
        widths.append(k.shape[2])
        return attention(q, k, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    base, value = connected(connection, *models[:2])
    steps = ivl.generate(base, [value], [[1, 20, 30]], 200)
    for _ in range(3):
        next(steps)
    assert max(widths) <= 8


def test_a_batch_by_an_expert_and_its_antiexpert_is_each_of_its_texts_by_itself(models, value_dir):
    base, expert, anti = models[0], models[1], load(value_dir)
    torch.nn.init.ones_(anti.norm.weight)

    def replies(values, prompts):
        alphas = [1.0, -1.0][: len(values)]
        return list(zip(*ivl.generate(base, values, prompts, 20, alphas=alphas)))

    together = replies([expert, anti], PROMPTS)
    assert together == [replies([expert, anti], [row])[0] for row in PROMPTS]
    assert together != replies([], PROMPTS)


def test_the_shortest_context_ends_a_reply(models, value_dir):
    expert, anti = load(value_dir), load(value_dir)
    anti.config.max_position_embeddings = 40
    for values in ([expert, anti], [anti, expert]):
        assert len(list(ivl.generate(models[0], values, [[1, 20, 30]], 100))) == 40 - 3


# ---------------------------------------------------------------- the probe and the record


def test_a_new_probe_is_the_base_itself(models):
    ids = torch.tensor([[1, 20, 30]])
    assert (z_delta("probe", models[0], Probe(models[0].config).init_weights(0), ids) == 0).all()


def test_new_weights_of_a_probe_forget_the_old_ones(models):
    config = models[0].config
    new, used = Probe(config).init_weights(0), Probe(config)
    with torch.no_grad():
        for p in used.parameters():
            p.fill_(7)
    used.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), used.parameters()))
    for layer in (new.gate, new.up):
        assert (layer.bias == 0).all()
        assert layer.weight.mean().abs().item() < 0.02
        assert layer.weight.std().item() == pytest.approx(config.hidden_size**-0.5, rel=0.1)


def test_probe_survives_saving(models, tmp_path, base_dir, value_dir):
    models[2].save(tmp_path)
    again = Probe.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(models[2].parameters(), again.parameters()))
    again.check([base_dir])
    with pytest.raises(InputError, match="16 numbers.*32.*train another"):
        again.check([value_dir])
    with pytest.raises(InputError, match="'ivl-probe' is not supported"):
        load(tmp_path)
    with pytest.raises(InputError, match="is no probe's"):
        Probe.load(base_dir)


def test_connection_is_recorded(tmp_path, value_dir):
    directory = shutil.copytree(value_dir, tmp_path / "value")
    assert recorded_connection(directory) == "residual"
    connections.record_connection(directory, "cascade+")
    assert recorded_connection(directory) == "cascade+"
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(directory).parameters(), load(value_dir).parameters())
    )
    connections.record_connection(directory, "sideways")
    with pytest.raises(InputError, match="'sideways' is none of residual"):
        recorded_connection(directory)


# ---------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize("connection", ["cascade+", "probe"])
def test_train_then_evaluate_then_sample(
    run, base_dir, value_dir, chats_file, tmp_path, connection
):
    out = tmp_path / "out"
    start = () if connection == "probe" else ("--value", value_dir)
    result = run(
        "train.py",
        "--base",
        base_dir,
        *start,
        "--data",
        chats_file,
        "--out",
        out,
        "--epochs",
        2,
        "--lr",
        1e-2,
        "--lam",
        0.1,
        "--connection",
        connection,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "config.json").read_text())["ivl_connection"] == connection
    both = run("train.py", "--base", base_dir, "--value", out, "--data", chats_file, "--evaluate")
    alone, together = (float(line.split()[-4]) for line in both.stdout.splitlines()[-2:])
    assert together < alone
    reply = run(
        "sample.py",
        "--base",
        base_dir,
        "--value",
        out,
        "--max_new_tokens",
        8,
        "Where is the cat 3?",
    )
    assert reply.returncode == 0, reply.stderr
    tokenizer, value = Tokenizer(out), (Probe.load if connection == "probe" else load)(out)
    prompt = tokenizer.prompt([{"role": "user", "content": "Where is the cat 3?"}])
    expected = slow(connection, load(base_dir), value, prompt, 8, 1.0)
    stream = TextStream(tokenizer)
    text = "".join(map(stream.step, expected)) + stream.rest()
    assert reply.stdout.strip() == text.strip() != ""
    if connection == "probe":
        assert_refused(
            run("sample.py", "--base", value_dir, "--value", out, "hello"),
            "a probe belongs to its base",
        )
    else:
        assert_refused(
            run("sample.py", "--base", base_dir, "--value", out, value_dir, "hello"),
            "cascade+",
        )


@pytest.mark.parametrize("option", ["--map", "--draft"])
def test_what_waits_for_the_base_cannot_do_without_it(run, base_dir, value_dir, tmp_path, option):
    shutil.copytree(value_dir, tmp_path / "value")
    connections.record_connection(tmp_path / "value", "cascade")
    given = {
        "--map": tmp_path / "map.safetensors",
        "--draft": base_dir,
    }[option]
    if option == "--map":
        made = VocabMap.make(Tokenizer(base_dir), Tokenizer(value_dir), ["The cat"])
        made.save(given)
    assert_refused(
        run("sample.py", "--base", base_dir, "--value", tmp_path / "value", option, given, "cat?"),
        "cascade",
        f"leave out {option}",
    )
