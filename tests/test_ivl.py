"""The objective against its formula, and decoding against doing it the slow way."""

import pytest
import torch

import ivl
from model import KVCache
from plumbing.files import InputError
from plumbing.tokenizer import shared_vocabulary
from plumbing.weights import load


@pytest.fixture(scope="module")
def models(base_dir, value_dir):
    return load(base_dir), load(value_dir)


def batch(seed=0, B=3, T=7, V=11):
    g = torch.Generator().manual_seed(seed)
    z_base, z_delta = (
        torch.randn(B, T, V, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[:, :3] = -100  # a prompt
    targets[0, 5:] = -100  # padding
    return z_base, z_delta, targets


# ---------------------------------------------------------------- the objective


def test_gradient_is_softmax_minus_onehot_plus_the_sign():
    z_base, z_delta, targets = batch()
    counted, n, lam, V = targets >= 0, int((targets >= 0).sum()), 0.3, z_base.shape[-1]
    cross_entropy, norm = ivl.loss_sums(z_base, z_delta, targets, counted)
    ((cross_entropy + lam * norm) / n).backward()
    z_post = (z_base + z_delta).detach()
    onehot = torch.nn.functional.one_hot(targets.clamp(min=0), V)
    expected = (
        (z_post.softmax(-1) - onehot + lam * z_delta.detach().sign() / V) / n * counted[..., None]
    )
    torch.testing.assert_close(
        z_delta.grad, expected, atol=1e-6, rtol=0
    )  # the sums are taken in float32
    assert z_base.grad is None


def test_loss_worked_by_hand():
    # one position, V = 2: z_post = (1 + 1, 0 − 1) = (2, −1), target 0: CE = log(1 + e^−3);
    # mean|z_Δ| = 1
    cross_entropy, norm = ivl.loss_sums(
        torch.tensor([[[1.0, 0.0]]]),
        torch.tensor([[[1.0, -1.0]]]),
        torch.tensor([[0]]),
        torch.tensor([[True]]),
    )
    assert cross_entropy.item() == pytest.approx(0.0485874, abs=1e-6) and norm.item() == 1.0


def test_norm_term_ignores_what_is_not_counted():
    _, z_delta, targets = batch()
    disturbed = torch.where((targets >= 0)[..., None], z_delta, z_delta + 100)
    for term in (
        lambda z: ivl.norm_term(z, targets >= 0),
        lambda z: ivl.loss_sums(None, z, targets, targets >= 0)[0],
    ):
        assert term(z_delta).item() == term(disturbed).item()
    everywhere = torch.ones_like(targets, dtype=torch.bool)
    assert ivl.norm_term(disturbed, everywhere) > ivl.norm_term(z_delta, everywhere) + 100


def test_sums_of_parts_are_the_sum_of_the_whole():
    z_base, z_delta, targets = batch()
    whole = torch.stack(ivl.loss_sums(z_base, z_delta, targets, targets >= 0))
    parts = sum(
        torch.stack(
            ivl.loss_sums(
                z_base[i : i + 1], z_delta[i : i + 1], targets[i : i + 1], targets[i : i + 1] >= 0
            )
        )
        for i in range(3)
    )
    torch.testing.assert_close(parts, whole)


def test_the_words_that_only_one_model_has_count_for_nothing():
    z_base, z_delta, targets = batch()
    h, W_base, W_value = torch.randn(3, 7, 4), torch.randn(9, 4), torch.randn(11, 4)
    targets = targets.clamp(max=8)
    shared = ivl.loss_sums(h @ W_base.T, h @ W_value[:9].T, targets, targets >= 0)
    for W_b, W_v in ((W_base, W_value), (torch.cat((W_base, W_base)), W_value[:9])):
        plain = ivl.loss_sums(h @ W_b.T, h @ W_v.T, targets, targets >= 0)
        chunked = ivl.two_headed_loss(h, W_b, h, W_v, targets, targets >= 0, 1.0, 1.0)[1]
        torch.testing.assert_close(torch.stack(plain), torch.stack(shared))
        torch.testing.assert_close(chunked, torch.stack(shared))


def test_training_changes_the_value_model_and_not_the_base(models):
    base, value = models
    ids = torch.randint(3, 200, (2, 9))
    loss, _ = ivl.loss_sums(base(ids[:, :-1]), value(ids[:, :-1]), ids[:, 1:], ids[:, 1:] >= 0)
    loss.backward()
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in value.parameters())
    value.zero_grad()


def test_combine_shares_the_front_of_padded_vocabularies():
    z_base, z_delta = torch.randn(2, 10), torch.randn(2, 8)
    torch.testing.assert_close(ivl.combine(z_base, z_delta, 0.5), z_base[:, :8] + 0.5 * z_delta)


# ---------------------------------------------------------------- the same loss, chunked and fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = [ivl.combine_loss] + ([ivl.combine_loss_fused] if ivl.triton is not None else [])


def rows(V, n=5, seed=0, dtype=torch.float32):
    """n rows of logits with every kind of row: counted or not, with a target or without."""
    g = torch.Generator().manual_seed(seed)
    z_base, z_delta = (torch.randn(n, V, generator=g).to(dtype) for _ in range(2))
    targets = torch.randint(0, V, (n,), generator=g)
    counted = torch.arange(n) % 2 == 0
    targets[n - 2 :] = -100
    return z_base, z_delta, targets, counted


def reference(z_base, z_delta, targets, counted, w_ce, w_norm):
    """Sums and gradient by autograd in float64."""
    z_delta = z_delta.double().requires_grad_()
    z_post = z_delta if z_base is None else z_base.double() + z_delta
    chosen = targets >= 0
    cross_entropy = torch.nn.functional.cross_entropy(
        z_post[chosen], targets[chosen], reduction="sum"
    )
    norm = z_delta[counted].abs().mean(-1).sum()
    (w_ce * cross_entropy + w_norm * norm).backward()
    return torch.stack((cross_entropy, norm)).detach(), z_delta.grad


def check(kernel, z_base, z_delta, targets, counted, tolerance=1e-5):
    expected, gradient = reference(z_base, z_delta, targets, counted, 0.7, 0.3)
    given = [
        None if x is None else x.to(DEVICE) for x in (z_base, z_delta.clone(), targets, counted)
    ]
    sums = kernel(*given, 0.7, 0.3)
    torch.testing.assert_close(sums.cpu().double(), expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(given[1].cpu().double(), gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("V", [1, 7, 100, 1000, 4097, 32000])
def test_kernel_equals_autograd(kernel, V):
    check(kernel, *rows(V))
    check(kernel, None, *rows(V)[1:])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_in_half_precision(kernel, dtype):
    # sums and gradient are taken in float32; only the stored gradient is rounded (the interpreter
    # truncates: 2^-7)
    check(kernel, *rows(1000, dtype=dtype), tolerance=2**-7 if dtype == torch.bfloat16 else 2**-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_on_extreme_logits(kernel):
    z_base, z_delta, targets, counted = rows(5000)
    z_base[0, 7], z_base[1] = 1e4, -1e4
    z_base[2, :4999] = -torch.inf  # the first block holds nothing but −inf
    targets[2] = 4999
    z_delta[0], z_delta[1, :] = 0.0, 3.0  # ties, and zeros whose sign is 0
    check(kernel, z_base, z_delta, targets, counted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_leaves_ignored_rows_without_gradient_and_repeats_exactly(kernel):
    results = []
    for _ in range(2):
        z_base, z_delta, targets, counted = (x.to(DEVICE) for x in rows(1000))
        sums = kernel(z_base, z_delta, targets, counted, 0.7, 0.3)
        assert (z_delta[(targets < 0) & ~counted] == 0).all() and (z_delta[targets >= 0] != 0).all()
        results.append((sums, z_delta))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("chunk", [1, 3 * 330, 7 * 330, 10**9])
@pytest.mark.parametrize("norm_over", ["response", "all"])
@pytest.mark.parametrize("with_base", [True, False])
def test_chunked_loss_equals_the_plain_formula(models, monkeypatch, chunk, norm_over, with_base):
    monkeypatch.setattr(ivl, "CPU_LOGITS", chunk)
    base, value = models  # with tied embeddings: the value head's gradient joins the embedding's
    ids = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[:, :4], targets[0, 8:] = -100, -100
    counted = (
        targets >= 0 if norm_over == "response" else torch.ones_like(targets, dtype=torch.bool)
    )
    z_base = base(ids[:, :-1]) if with_base else None
    cross_entropy, norm = ivl.loss_sums(z_base, value(ids[:, :-1]), targets, counted)
    (0.7 * cross_entropy + 0.3 * norm).backward()
    expected = [p.grad.clone() for p in value.parameters()]
    value.zero_grad()
    h_base = base.hidden(ids[:, :-1]) if with_base else None
    loss, sums = ivl.two_headed_loss(
        h_base,
        base.unembed if with_base else None,
        value.hidden(ids[:, :-1]),
        value.unembed,
        targets,
        counted,
        0.7,
        0.3,
    )
    (2 * loss).backward()
    torch.testing.assert_close(
        sums, torch.stack((cross_entropy, norm)).detach(), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        [p.grad / 2 for p in value.parameters()], expected, atol=1e-4, rtol=1e-4
    )
    assert all(p.grad is None for p in base.parameters())
    value.zero_grad()


def test_chunked_loss_under_autocast_is_the_plain_formula_under_autocast(models):
    base, value = models
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    targets, gradients = ids[:, 1:], []
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = ivl.loss_sums(base(ids[:, :-1]), value(ids[:, :-1]), targets, targets >= 0)
        plain.backward()
        gradients.append(value.unembed.grad.clone())
        value.zero_grad()
        chunked, _ = ivl.two_headed_loss(
            base.hidden(ids[:, :-1]),
            base.unembed,
            value.hidden(ids[:, :-1]),
            value.unembed,
            targets,
            targets >= 0,
            1.0,
            0.0,
        )
    chunked.backward()
    gradients.append(value.unembed.grad.clone())
    value.zero_grad()
    assert gradients[1].dtype == torch.float32
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-2)
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_token_0_is_a_target_like_any_other():
    """Also where the norm term does not count its position."""
    z_base, z_delta, targets, _ = rows(7)
    targets[:3] = 0
    expected, _ = reference(z_base, z_delta, targets, torch.zeros(5, dtype=torch.bool), 1.0, 0.0)
    h_base, h_value = z_base[None], z_delta[None]  # with identities as unembeddings: the logits
    counted = torch.zeros(1, 5, dtype=torch.bool)
    W = torch.eye(7)
    _, sums = ivl.two_headed_loss(h_base, W, h_value, W, targets[None], counted, 1.0, 0.0)
    torch.testing.assert_close(sums.double(), expected, atol=1e-4, rtol=1e-5)


def test_chunks_have_rows_enough_on_a_gpu_and_fit_the_cache_on_a_cpu():
    for V in (32000, 128256):
        assert ivl.chunk_rows(V, "mps") == ivl.chunk_rows(V, "cuda") == 640
    assert ivl.chunk_rows(32000, "cpu") == 65
    assert ivl.chunk_rows(10**9, "cpu") == 1


@pytest.mark.parametrize("missing", ["nothing", "compiler", "headers", "both"])
def test_without_a_compiler_the_plain_twin_does_the_work(monkeypatch, capsys, tmp_path, missing):
    """Triton compiles the launcher of its kernels, with the C compiler and the headers that it
    finds: it would end in a traceback of its own.
    """
    monkeypatch.setattr(ivl, "triton", ivl.triton or object())
    monkeypatch.setattr(ivl, "combine_loss_fused", lambda *_: "the kernel")
    monkeypatch.delenv("CC", raising=False)
    found = None if missing in ("compiler", "both") else "/usr/bin/cc"
    monkeypatch.setattr(ivl.shutil, "which", lambda name: found)
    monkeypatch.setattr(ivl.sysconfig, "get_config_var", lambda name: str(tmp_path))
    if missing in ("nothing", "compiler"):
        (tmp_path / "Python.h").touch()

    class OnCuda(torch.Tensor):
        is_cuda = True

    ivl.kernels_compile.cache_clear()
    z_base, z_delta = torch.randn(2, 3, 50)
    targets, counted = torch.tensor([4, -100, 7]), torch.tensor([True, False, True])
    expected = ivl.combine_loss(z_base, z_delta.clone(), targets, counted, 1.0, 0.5)
    for _ in range(2):
        z = z_delta.clone().as_subclass(OnCuda)
        got = ivl.combine_loss(z_base, z, targets, counted, 1.0, 0.5)
        if missing == "nothing":
            assert got == "the kernel"
        else:
            assert torch.equal(got.as_subclass(torch.Tensor), expected)
    told = capsys.readouterr().err
    assert told.count("Triton") == (missing != "nothing")  # once
    assert ("gcc" in told) == (missing in ("compiler", "both"))
    assert ("Python.h" in told) == (missing in ("headers", "both"))
    ivl.kernels_compile.cache_clear()


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-10])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[1e4, 9.9e3, -50.0], [-3.0, 0.0, 0.5]])
    p = ivl.probabilities(logits, temperature, 0, 1.0)
    assert p.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_products_are_added_in_the_precision_of_the_total():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(16, 64, generator=g).bfloat16(), torch.rand(64, 32, generator=g).bfloat16()
    total = torch.ones(16, 32, device=DEVICE)
    ivl.add_product(total, a.to(DEVICE), b.to(DEVICE))
    # on CUDA the product itself is never rounded to 16 bits
    tolerance = 1e-5 if DEVICE == "cuda" else 2**-7
    expected = 1 + a.double() @ b.double()
    torch.testing.assert_close(total.cpu().double(), expected, atol=0, rtol=tolerance)


# ---------------------------------------------------------------- vocabularies


def test_vocabularies_are_compared_by_content():
    tokens = [f"t{i}" for i in range(32)]
    assert shared_vocabulary(tokens, tokens) == (32, [])
    assert shared_vocabulary(tokens + [None, None], tokens) == (32, [])  # padding
    assert shared_vocabulary(tokens, tokens + ["<extra>"])[0] == 32  # as CodeLlama's
    holes = tokens[:5] + [None] + tokens[6:]
    assert shared_vocabulary(holes, holes) == (32, [])
    with pytest.raises(InputError, match="token 3, 't3'.*'other'.*vocab_map.py"):
        shared_vocabulary(tokens, tokens[:3] + ["other"] + tokens[4:])  # of equal size
    with pytest.raises(InputError, match="vocab_map.py"):
        shared_vocabulary(tokens[:5] + [None] + tokens[6:], tokens)
    many = [f"t{i}" for i in range(2000)]
    other = [*many[:7], "", *many[8:]]
    assert shared_vocabulary(many, other) == (2000, [7])
    with pytest.raises(InputError, match="3 of 2000 tokens differ"):
        shared_vocabulary(many, ["", "", "", *many[3:]])


def test_some_ids_are_never_chosen():
    logits = torch.tensor([[1.0, 9.0, 3.0], [4.0, 9.0, 3.0]])
    choose = ivl.never(torch.tensor([1]), ivl.choose)
    assert choose(logits, 0, 0, 1.0, None).tolist() == [2, 0]
    assert logits[0, 1] == 9


# ---------------------------------------------------------------- decoding

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]


def columns(steps):
    return [list(column) for column in zip(*steps)]


@torch.no_grad()
def slow(base, value, prompt, n, alpha=1.0):
    """Greedy decoding that computes everything anew for each token."""
    ids = list(prompt)
    for _ in range(n):
        x = torch.tensor([ids])
        ids.append(int((base(x) + alpha * value(x))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_equals_uncached_and_batched_equals_single(models):
    together = columns(ivl.generate(models[0], models[1:], PROMPTS, 30, alphas=[0.7]))
    for prompt, reply in zip(PROMPTS, together):
        assert reply == slow(*models, prompt, 30, alpha=0.7)
        assert [reply] == columns(ivl.generate(models[0], models[1:], [prompt], 30, alphas=[0.7]))
    assert len({tuple(reply) for reply in together}) == 3


def test_alpha_zero_is_the_base_alone(models):
    base, value = models
    alone = columns(ivl.generate(base, [], PROMPTS, 20))
    assert columns(ivl.generate(base, [value], PROMPTS, 20, alphas=[0.0])) == alone
    assert columns(ivl.generate(base, [value], PROMPTS, 20)) != alone


def test_a_base_of_zeros_leaves_the_value_model(models, base_dir):
    zero = load(base_dir)
    torch.nn.init.zeros_(zero.norm.weight)
    assert columns(ivl.generate(zero, [models[1]], PROMPTS, 20)) == columns(
        ivl.generate(models[1], [], PROMPTS, 20)
    )


def test_sampling_is_a_draw_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(temperature=1.0, top_k=0, top_p=1.0):
        drawn = ivl.choose(logits, temperature, top_k, top_p, generator)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    p = logits[0].softmax(-1)  # 0.644 0.237 0.087 0.032
    torch.testing.assert_close(shares(), p, atol=0.01, rtol=0)
    torch.testing.assert_close(
        shares(temperature=0.5), (2 * logits[0]).softmax(-1), atol=0.01, rtol=0
    )
    two = torch.tensor([*p[:2] / p[:2].sum(), 0.0, 0.0])
    torch.testing.assert_close(shares(top_k=2), two, atol=0.01, rtol=0)
    torch.testing.assert_close(
        shares(top_p=0.8), two, atol=0.01, rtol=0
    )  # 0.644 is not enough, 0.881 is
    assert shares(top_p=0.6)[0] == shares(top_k=1)[0] == shares(temperature=0)[0] == 1
    assert ivl.choose(logits.flip(1), 1.0, 0, 0.0, generator).unique().tolist() == [
        3
    ]  # one is always kept
    assert shares(top_k=100).min() > 0


def test_the_seed_decides_the_sample(models):
    def sample(seed):
        return columns(
            ivl.generate(
                models[0], models[1:], PROMPTS, 20, temperature=1.5, top_k=50, top_p=0.95, seed=seed
            )
        )

    assert sample(3) == sample(3) != sample(4)


def test_rows_stop_on_their_own(models):
    free = columns(ivl.generate(models[0], models[1:], PROMPTS, 20))
    stop = {free[0][4], free[1][2]}
    expected = []
    for reply in free:
        end = next((i + 1 for i, token in enumerate(reply) if token in stop), 20)
        expected.append(reply[:end])
    got = columns(ivl.generate(models[0], models[1:], PROMPTS, 20, stop=stop))
    assert [[i for i in reply if i is not None] for reply in got] == expected
    assert len(got[0]) == max(map(len, expected))


def test_ids_past_the_shared_vocabulary_are_never_chosen(models):
    assert (
        max(
            max(reply)
            for reply in columns(ivl.generate(models[0], models[1:], PROMPTS, 40, vocabulary=50))
        )
        < 50
    )


def test_the_cache_is_made_once_for_the_prompts_and_all_that_follows(models, monkeypatch):
    monkeypatch.setattr(KVCache, "grow", lambda *_: pytest.fail("the cache was too short"))
    assert len(list(ivl.generate(models[0], models[1:], PROMPTS, 30))) == 30
