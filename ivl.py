"""Inverse Value Learning: the paper in code (Lu et al., NAACL 2025).

A frozen base model knows things; a small value model, trained beside a small base on
demonstrations, knows how to behave. They meet in the logits, so the value model can be moved to
another base:

    z_base = π_base(x, y_<t; θ₁)                                                equation (1)
    z_Δ    = π_Δ(x, y_<t; θ₂)          or reads more: extras/connections.py     equation (2), §4.1
    z_post = stop_gradient(z_base) + z_Δ                                        equation (3)
    L      = CE(z_post, p_l) + λ ‖z_Δ‖₁    over the tokens of the replies       equation (4); §4.2.1

‖z_Δ‖₁ is taken as a mean over the vocabulary, as in the authors' code: λ = 1.0 (Table 5) belongs to
V = 32000. The term's pull on one logit is λ/V: for a smaller vocabulary choose λ smaller too.

Shapes: B batch, T time, V vocabulary, H hidden (H_b base, H_v value), n rows of logits.
θ₁ never receives a gradient: `combine` detaches z_base.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama

try:
    import triton
    import triton.language as tl
except ImportError:  # not on macOS and Windows: every kernel has a plain twin
    triton = None

# rows of logits that are made at a time in training: on a GPU so many that dW += dzᵀ h is worth
# reading and writing dW for it, whatever V is; on a CPU as many as have so many logits
CHUNK = 640
CPU_LOGITS = 2**21
ROWS = 128  # products are fastest with a multiple of so many rows
BLOCK = 4096  # logits of a row that the kernel holds at a time


# ---------------------------------------------------------------- the objective


def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """z_post = stop_gradient(z_base) + α z_Δ, equation (3).  (..., V)

    α = 1 is the paper; 0 gives the base alone, other values dose the value model's influence.
    Where one model's vocabulary has a padded tail, the shared front of both counts.

    Example: of three words the base prefers the first, the value model the second
    >>> combine(torch.tensor([3.0, 2.0, 0.0]), torch.tensor([-2.0, 1.0, 0.0]))
    tensor([1., 3., 0.])
    """
    V = min(z_base.shape[-1], z_delta.shape[-1])
    return torch.add(z_base[..., :V].detach(), z_delta[..., :V], alpha=alpha)


def combine_all(
    z_base: Tensor, z_deltas: Sequence[Tensor], alphas: Sequence[float] | None = None
) -> Tensor:
    """z_base + Σ αᵢ z_Δᵢ, of any number of value models; the α are 1 unless given.  (..., V)

    An expert at +1 and what it was before it was fine-tuned at −1 are proxy tuning (appendix D).
    """
    z_post = z_base
    for z_delta, alpha in zip(z_deltas, alphas or [1.0] * len(z_deltas), strict=True):
        z_post = combine(z_post, z_delta.to(z_post.device), alpha)
    return z_post


def norm_term(z_delta: Tensor, counted: Tensor) -> Tensor:
    """Σ over the counted positions of mean_V |z_Δ|, §4.2.1.  z_delta (B, T, V) → scalar

    counted: (B, T) bool, from `Chats.batch`: the targets, or with --norm_over all every position,
    padding too. Where padding is counted, the value model is rewarded for silence nobody reads.
    """
    return z_delta[counted].float().abs().mean(-1).sum()


def loss_sums(
    z_base: Tensor | None, z_delta: Tensor, targets: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """The two terms of the loss as sums in nats, (cross-entropy, norm term), in float32.

    z_base, z_delta: (B, T, V); z_base None stands for zeros: fine-tuning of the model itself.
    targets: (B, T), the token to predict at each position; negative: none (prompt, padding).
    counted: (B, T) bool, see `norm_term`.
    Sums, not means: parts of a batch, of unequal lengths, add up to the gradient of the whole.
    """
    z_post = z_delta if z_base is None else combine(z_base, z_delta)  # (B, T, V)
    z_delta = z_delta[..., : z_post.shape[-1]]

    # a prompt's tokens have no target, so nothing is computed for them
    has_target = targets >= 0  # (B, T)
    z_post = z_post[has_target].float()  # (n, V)
    cross_entropy = F.cross_entropy(z_post, targets[has_target], reduction="sum")
    return cross_entropy, norm_term(z_delta, counted)


# ---------------------------------------------------------------- the same loss, chunk by chunk


def two_headed_loss(
    h_base: Tensor | None,
    W_base: Tensor | None,
    h_value: Tensor,
    W_value: Tensor,
    targets: Tensor,
    counted: Tensor,
    w_ce: float,
    w_norm: float,
) -> tuple[Tensor, Tensor]:
    """w_ce · cross-entropy + w_norm · norm term, the same as `loss_sums`, from the hidden states.

    h_base (B, T, H_b), h_value (B, T, H_v): the last hidden states; None for z_base = 0.
    W_base (V_b, H_b), W_value (V_v, H_v): the two unembeddings; V = min(V_b, V_v) words count.
    w_ce, w_norm: 1 / number of targets and λ / number of counted positions give equation (4). They
    are needed now, since the gradient is computed along with the loss.
    Gives the loss and, without gradient, the two sums (2,). Gradients flow to h_value and W_value.
    """
    loss, sums = TwoHeadedLoss.apply(
        h_base, W_base, h_value, W_value, targets, counted, w_ce, w_norm
    )
    return loss, sums.detach()


class TwoHeadedLoss(torch.autograd.Function):
    """`two_headed_loss`: z_base and z_Δ never exist in full, only a chunk of their rows at a time.

    Positions with neither a target nor a norm term are passed over; the others go through both
    unembeddings in chunks. `combine_loss` turns a chunk's z_Δ into its gradient dz on the spot,
    from which follow at once dh = dz W and dW += dzᵀ h. The base gets no gradient at all, and
    backward has nothing left to do but to scale dh and dW by the gradient of the loss.
    """

    @staticmethod
    def forward(ctx, h_base, W_base, h_value, W_value, targets, counted, w_ce, w_norm):
        device = h_value.device.type
        dtype = h_value.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)

        # both unembeddings, in the precision of the products, over the words that both have
        V = len(W_value) if W_base is None else min(len(W_base), len(W_value))
        W_v = W_value.detach()[:V].to(dtype)  # (V, H_v)
        ctx.shape = h_value.shape
        h_value = h_value.detach().flatten(0, 1)  # (B·T, H_v)
        if h_base is not None:
            W_b = W_base.detach()[:V].to(dtype)  # (V, H_b)
            h_base = h_base.detach().flatten(0, 1)  # (B·T, H_b)

        # whoever asks for a gradient of h_value or W_value gets it made here, along with the loss
        trains = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        if trains:
            dh = torch.zeros_like(h_value)  # (B·T, H_v)
            dW = torch.zeros_like(W_value)  # (V_v, H_v)

        # the positions with a target or a norm term, a chunk at a time
        targets, counted = targets.flatten(), counted.flatten()  # (B·T,)
        rows = ((targets >= 0) | counted).nonzero()[:, 0]  # (n,)
        sums = torch.zeros(2, device=h_value.device)
        with torch.autocast(device, enabled=False):  # each type is set by hand
            for chunk in rows.split(chunk_rows(V, device)):
                h_v = h_value[chunk].to(dtype)  # (chunk, H_v)
                z_delta = F.linear(h_v, W_v)  # (chunk, V)
                z_base = None
                if h_base is not None:
                    z_base = F.linear(h_base[chunk].to(dtype), W_b)  # (chunk, V)
                sums += combine_loss(z_base, z_delta, targets[chunk], counted[chunk], w_ce, w_norm)
                if trains:
                    dz = z_delta  # `combine_loss` has written it there
                    dh[chunk] = (dz @ W_v).to(dh.dtype)  # (chunk, H_v)
                    add_product(dW[:V], dz.T, h_v)  # (V, H_v)
                z_base = z_delta = dz = None  # freed before the next chunk's are made

        if trains:
            ctx.save_for_backward(dh, dW)
        return w_ce * sums[0] + w_norm * sums[1], sums

    @staticmethod
    def backward(ctx, gradient, _):  # of the loss; the sums have none
        dh, dW = ctx.saved_tensors  # scaled in place, to save memory: backward runs once only
        dh = dh.mul_(gradient).view(ctx.shape)
        return None, None, dh, dW.mul_(gradient), None, None, None, None


def chunk_rows(V: int, device: str) -> int:
    """How many rows of V logits are made at a time on a kind of device."""
    if device != "cpu":
        return CHUNK
    rows = max(1, CPU_LOGITS // V)
    if rows > ROWS:
        rows -= rows % ROWS
    return rows


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where the total may be of higher precision than a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # the product is summed in the total's type, and never rounded to a's
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def combine_loss(
    z_base: Tensor | None,
    z_delta: Tensor,
    targets: Tensor,
    counted: Tensor,
    w_ce: float,
    w_norm: float,
) -> Tensor:
    """Sums of cross-entropy and norm term over n rows, (2,); the gradient is written over z_delta.

    z_base, z_delta: (n, V) in any float type (z_base None: zeros); targets (n,), below V, negative:
    none; counted (n,) bool. The arithmetic is in float32, only dz is rounded to z_delta's type.
    dz = w_ce (softmax(z_post) − onehot(target)) + w_norm sign(z_Δ) / V.
    On CUDA this is one kernel, see `combine_loss_fused`; elsewhere what follows.
    """
    if z_delta.is_cuda and kernels_compile():
        return combine_loss_fused(z_base, z_delta, targets, counted, w_ce, w_norm)
    # equation (3) again, in float32
    V = z_delta.shape[-1]
    delta = z_delta.float()
    z_post = delta if z_base is None else z_base.float() + delta  # (n, V)

    # where there is no target any token does: what comes of it is left out below
    has_target = targets >= 0  # (n,)
    token = targets.clamp(min=0)[:, None]  # (n, 1)

    # the two sums
    log_sum = z_post.logsumexp(-1, keepdim=True)  # (n, 1)
    cross_entropy = (log_sum - z_post.gather(-1, token))[has_target].sum()
    norm = delta.abs().mean(-1)[counted].sum()

    # the gradient: softmax − onehot where there is a target, the sign where z_Δ is counted
    dz = (z_post - log_sum).exp_()  # softmax, (n, V)
    dz.scatter_add_(-1, token, torch.full_like(log_sum, -1.0))  # − onehot
    dz.mul_(w_ce).masked_fill_(~has_target[:, None], 0.0)
    # (the signs are written over z_Δ, which is read no more)
    dz.addcmul_(delta.sign_(), counted[:, None].float(), value=w_norm / V)
    z_delta.copy_(dz)
    return torch.stack((cross_entropy, norm))


# ---------------------------------------------------------------- the kernel


@cache
def kernels_compile() -> bool:
    """Whether Triton can compile kernels here: to launch them it needs a C compiler and Python's
    headers. Says once on stderr what is missing; the plain twins do the work then.
    """
    if triton is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h")
    missing = [] if compiler else ["a C compiler (package gcc)"]
    missing += [] if headers.exists() else [f"Python.h (package python{sys.version_info[0]}-dev)"]
    if missing:
        print(
            f"Triton's kernels need {' and '.join(missing)}; without it plain PyTorch is used, "
            "which is slower and takes more memory",
            file=sys.stderr,
        )
    return not missing


if triton is not None:

    @triton.jit
    def _combine_loss(
        z_base,  # pointer, (n, V)
        z_delta,  # pointer, (n, V): read, then overwritten by the gradient
        targets,  # pointer, (n,)
        counted,  # pointer, (n,)
        cross_entropy,  # pointer, (n,): result
        norm,  # pointer, (n,): result
        w_ce,
        w_norm,
        base_stride,
        delta_stride,
        V: tl.constexpr,
        HAS_BASE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row: a pass over it for log Σ exp and Σ|z_Δ|, one for the gradient.

        Device memory is touched three times per entry: z_base and z_Δ are read, the gradient is
        written. The second pass reads what the first has just brought into the cache.
        """
        row = tl.program_id(0).to(tl.int64)
        z_base += row * base_stride
        z_delta += row * delta_stride

        # the target's logit is looked up first: later the gradient stands in its place
        target = tl.load(targets + row)
        count = tl.load(counted + row).to(tl.float32)
        has_target = target >= 0
        z_target = tl.load(z_delta + target, has_target, 0.0).to(tl.float32)
        if HAS_BASE:
            z_target += tl.load(z_base + target, has_target, 0.0).to(tl.float32)

        # first pass: Σ exp(z − largest so far), rescaled as the largest grows, and Σ|z_Δ|
        largest = -float("inf")
        total = 0.0
        abs_sum = 0.0
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            delta = tl.load(z_delta + i, i < V, 0.0).to(tl.float32)
            z = delta
            if HAS_BASE:
                z = z + tl.load(z_base + i, i < V, 0.0).to(tl.float32)
            z = tl.where(i < V, z, -float("inf"))
            new = tl.maximum(largest, tl.max(z, 0))
            safe = tl.where(new == -float("inf"), 0.0, new)  # only −inf so far: no inf − inf
            total = total * tl.exp(largest - safe) + tl.sum(tl.exp(z - safe), 0)
            abs_sum += tl.sum(tl.abs(delta), 0)
            largest = new
        log_sum = largest + tl.log(total)
        tl.store(cross_entropy + row, tl.where(has_target, log_sum - z_target, 0.0))
        tl.store(norm + row, abs_sum / V * count)

        # second pass: the gradient, over z_Δ
        w_row = tl.where(has_target, w_ce, 0.0)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            delta = tl.load(z_delta + i, i < V, 0.0).to(tl.float32)
            z = delta
            if HAS_BASE:
                z = z + tl.load(z_base + i, i < V, 0.0).to(tl.float32)
            onehot = (i == target).to(tl.float32)
            sign = (delta > 0).to(tl.float32) - (delta < 0).to(tl.float32)
            dz = w_row * (tl.exp(z - log_sum) - onehot) + w_norm / V * count * sign
            tl.store(z_delta + i, dz.to(z_delta.dtype.element_ty), i < V)


def combine_loss_fused(
    z_base: Tensor | None,
    z_delta: Tensor,
    targets: Tensor,
    counted: Tensor,
    w_ce: float,
    w_norm: float,
) -> Tensor:
    """`combine_loss` as one Triton kernel. Rows must be contiguous. Results are deterministic."""
    n, V = z_delta.shape
    sums = torch.empty(2, n, device=z_delta.device)
    has_base = z_base is not None
    if z_base is None:
        z_base = z_delta  # the kernel needs some pointer; it does not follow it
    block = min(triton.next_power_of_2(V), BLOCK)
    with torch.cuda.device_of(z_delta):  # or Triton would launch on the current device
        _combine_loss[(n,)](
            z_base,
            z_delta,
            targets,
            counted,
            sums[0],
            sums[1],
            w_ce,
            w_norm,
            z_base.stride(0),
            z_delta.stride(0),
            V,
            has_base,
            block,
            num_warps=8,  # with four, 16-bit rows need more registers than there are
        )
    return sums.sum(-1)


# ---------------------------------------------------------------- decoding


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """What the next token is drawn from, for a temperature above 0.  (..., V) → (..., V)

    top_k keeps the k likeliest tokens (0: all), and of them top_p the fewest that together have
    probability p (1: all), always at least one. The others get 0.

    Example: of four tokens with ½, ¼, ⅛ and ⅛ the likeliest two; then those that reach 0.7
    >>> p = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    >>> probabilities(p.log(), 1.0, 2, 1.0)
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    >>> probabilities(p.log(), 1.0, 0, 0.7)
    tensor([[0.6667, 0.3333, 0.0000, 0.0000]])
    """
    # (a temperature that float32 cannot divide by is as good as 0)
    logits = logits.float() / max(temperature, 1e-30)

    if top_k:
        k = min(top_k, logits.shape[-1])
        kth = logits.topk(k).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)

    if top_p < 1:
        ordered, order = logits.sort(descending=True)  # (..., V) each
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # all likelier tokens together have reached top_p already
        drop[..., 0] = False
        logits = logits.scatter(-1, order, ordered.masked_fill(drop, -torch.inf))

    return logits.softmax(-1)


def draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token of each row, with these probabilities or their multiples.  p (B, V) → (B,)"""
    # the argmax of p / e, with e ~ Exponential(1) for each token, is a draw from p; unlike
    # torch.multinomial it does not make the host wait for the device
    noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise).argmax(-1)


def choose(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """The next token of each row.  logits (B, V) → (B,)

    temperature 0 takes the likeliest token; else it is drawn, see `probabilities`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_k, top_p), generator)


def never(ids: Tensor, choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A `choose` that never takes one of these ids.  ids (n,)"""

    def choose_others(logits: Tensor, *how) -> Tensor:
        return choose(logits.index_fill(-1, ids.to(logits.device), -torch.inf), *how)

    return choose_others


def padded(texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Texts side by side, padded on the right: tokens (B, T), and how many are real (B,).

    Example:
    >>> padded([[5, 6, 7], [8]])
    (tensor([[5, 6, 7],
            [8, 0, 0]]), tensor([3, 1]))
    """
    lengths = [len(text) for text in texts]
    T = max(lengths)
    rows = [[*text, *[0] * (T - len(text))] for text in texts]
    return torch.tensor(rows), torch.tensor(lengths)


class Replies:
    """The replies to a batch of prompts while they grow. It alone decides where one ends: at a
    token of `stop`, after max_new_tokens, or where a model's context is full.

    Example: two prompts; the first row gets two tokens and then one, the second one and then two,
    of which the first stops it. A step is complete when all rows that go on have its token.
    >>> replies = Replies([[5], [6, 7]], max_new_tokens=9, stop=[2])
    >>> replies.grow([[1, 3], [4]])
    >>> list(replies.steps())
    [[1, 4]]
    >>> replies.grow([[8], [2, 9]])
    >>> list(replies.steps())
    [[3, 2], [8, None]]
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Collection[int] = ()
    ):
        self.texts = [list(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.ends = [start + max_new_tokens for start in self.starts]
        self.stop = stop
        self.running = [max_new_tokens > 0] * len(prompts)
        self.given = 0

    def limit(self, rooms: Sequence[int]) -> None:
        """No text may grow by more tokens than `rooms` has for its row."""
        for row, room in enumerate(rooms):
            self.ends[row] = min(self.ends[row], len(self.texts[row]) + max(1, room))

    def grow(self, new: Sequence[Sequence[int]]) -> None:
        """New tokens of each row; a row that has ended takes no more."""
        for row, text in enumerate(self.texts):
            for i in new[row]:
                if self.running[row]:
                    text.append(i)
                    self.running[row] = i not in self.stop and len(text) < self.ends[row]

    def steps(self) -> Iterator[list[int | None]]:
        """The steps that are complete and were not given yet: a token of each row, or None."""
        sizes = [len(text) - start for text, start in zip(self.texts, self.starts)]
        complete = min((n for n, on in zip(sizes, self.running) if on), default=max(sizes))
        for t in range(self.given, complete):
            rows = zip(self.texts, self.starts, sizes)
            yield [text[start + t] if t < n else None for text, start, n in rows]
        self.given = complete

    def room(self) -> int:
        """How many tokens all rows that go on have room for."""
        rows = zip(self.texts, self.ends, self.running)
        return min(end - len(text) for text, end, on in rows if on)


@torch.inference_mode()
def token_by_token(
    base: Llama,
    values: Sequence[Llama],
    replies: Replies,
    *,
    alphas: Sequence[float] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    vocabulary: int | None = None,
    choose: Callable[..., Tensor] = choose,
) -> Iterator[list[list[int]]]:
    """Rounds of plain decoding, with a key-value cache for each model: one new token of each row.

    base, values: Llamas, or whatever else has a `reader` and an `unembed`, see `model.Reader`.
    alphas: the strength of each value model (default: 1).
    temperature, top_k, top_p, seed: see `choose`.
    vocabulary: the first ids that may be chosen, see `shared_vocabulary` (default: all of them).
    choose: another way to choose, with the arguments of `choose`.
    """
    # a reader for each model, with a cache for the prompts and what will follow
    tokens, counts = padded(replies.texts)  # (B, T), (B,)
    B, T = tokens.shape
    slots = T + max(end - start for end, start in zip(replies.ends, replies.starts))
    readers = [model.reader(B, slots) for model in [base, *values]]
    generator = torch.Generator(base.unembed.device).manual_seed(seed)

    while True:
        # all models read on: the prompts at first, then the tokens that were chosen
        z_base, *z_deltas = [reader.read(tokens, counts) for reader in readers]  # (B, V) each
        z_post = combine_all(z_base, z_deltas, alphas)[:, :vocabulary]
        new = choose(z_post, temperature, top_k, top_p, generator)  # (B,)

        replies.limit([min(rooms) for rooms in zip(*(reader.room() for reader in readers))])
        yield [[i] for i in new.tolist()]
        tokens, counts = new[:, None], None


def generate(
    base: Llama,
    values: Sequence[Llama],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop: Collection[int] = (),
    rounds: Callable[..., Iterator[list[list[int]]]] = token_by_token,
    **how,
) -> Iterator[list[int | None]]:
    """Decodes z_post = z_base + Σ αᵢ z_Δᵢ; without value models the base alone.

    prompts: B lists of token ids, each of one or more. Each step yields B new ids; a reply's last
    one is a token of `stop`, or the one that fills a model's context, and after it the row yields
    None. Ends when every row has ended or after max_new_tokens.
    rounds: gives the new tokens of all rows, again and again: `token_by_token`, or a twin of it in
    extras/graphs.py or extras/speculative.py. how: its options.

    Example: two prompts, 2 is in `stop`, and the second reply stops at once. What is yielded:
        [7, 2], then [9, None], then [4, None], ...
    """
    replies = Replies(prompts, max_new_tokens, stop)
    if max_new_tokens == 0:
        return
    for new in rounds(base, values, replies, **how):
        replies.grow(new)
        yield from replies.steps()
        if not any(replies.running):
            return
