"""Inverse Value Learning: the paper in code (Lu et al., NAACL 2025).

A frozen base model knows things; a small value model, trained beside a small base on demonstrations,
knows how to behave. They meet in the logits, so the value model can be moved to another base:

    z_base = π_base(x, y_<t; θ₁)                                                    equation (1)
    z_Δ    = π_Δ(x, y_<t; θ₂)             or reads more: see connections.py         equation (2), §4.1
    z_post = stop_gradient(z_base) + z_Δ                                            equation (3)
    L      = CE(z_post, p_l) + λ ‖z_Δ‖₁   over the tokens of the replies            equation (4), §4.2.1

‖z_Δ‖₁ is taken as a mean over the vocabulary, as in the authors' code: λ = 1.0 (Table 5) belongs to
V = 32000. The term's pull on one logit is λ/V, so for a small vocabulary λ shrinks in proportion.

Shapes: B batch, T time, V vocabulary. θ₁ never receives a gradient: `combine` detaches z_base.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from connections import CHUNK, Probe, value_input
from decode import Lane, choose, record_steps
from files import InputError
from mapped import MappedBase
from model import Llama
from vocab_map import VocabMap

try:
    import triton
    import triton.language as tl
except ImportError:  # not on macOS and Windows: every kernel has a plain twin
    triton = None

BLOCK = 4096  # logits of a row that the kernel holds at a time


# ---------------------------------------------------------------- the objective

def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """z_post = stop_gradient(z_base) + α z_Δ, equation (3).  (..., V)

    α = 1 is the paper; 0 gives the base alone, other values dose the value model's influence.
    Where one model's vocabulary has a padded tail, the shared front of both counts.
    """
    V = min(z_base.shape[-1], z_delta.shape[-1])
    return torch.add(z_base[..., :V].detach(), z_delta[..., :V], alpha=alpha)


def proxy(z_expert: Tensor, z_antiexpert: Tensor) -> Tensor:
    """z_Δ of proxy tuning (Liu et al., 2024; appendix D): what fine-tuning has changed in a small model.  (..., V)

    Nothing is trained beside the base, but a third model runs at inference: the small model as it was before.
    """
    V = min(z_expert.shape[-1], z_antiexpert.shape[-1])
    return z_expert[..., :V] - z_antiexpert[..., :V]


def norm_term(z_delta: Tensor, counted: Tensor) -> Tensor:
    """Σ over the counted positions of mean_V |z_Δ|, §4.2.1.  z_delta (B, T, V), counted (B, T) bool → scalar

    `counted` keeps padding out: without it the value model would be rewarded for silence where nobody reads.
    """
    return z_delta[counted].float().abs().mean(-1).sum()


def loss_sums(z_base: Tensor | None, z_delta: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss as sums in nats, (cross-entropy, norm term), in float32.

    z_base, z_delta: (B, T, V); z_base None stands for zeros: then z_Δ is a model of its own (full fine-tuning).
    targets: (B, T), the token that each position should predict, negative: none (prompt, padding). counted: (B, T), see `norm_term`.
    Sums, not means, so that a batch split into parts of unequal length still adds up to the same gradient.
    """
    z_post = z_delta if z_base is None else combine(z_base, z_delta)
    chosen = targets >= 0  # the loss of a prompt's tokens is not computed and thrown away
    cross_entropy = F.cross_entropy(z_post[chosen].float(), targets[chosen], reduction="sum")
    return cross_entropy, norm_term(z_delta, counted)


class TwoHeadedLoss(torch.autograd.Function):
    """The same loss from the hidden states, without ever holding z_base or z_Δ in full.

    Tokens that count for nothing are dropped before the unembeddings; the others go through both in chunks.
    `combine_loss` turns a chunk's z_Δ into its gradient on the spot, from which follow at once
    dh_v = dz W_v and dW_v += dzᵀ h_v. Nothing is computed for the base, and nothing again in backward.
    """

    @staticmethod
    def forward(ctx, h_base, head_base, h_value, head_value, targets, counted, w_ce, w_norm):
        device, V = h_value.device.type, min(len(head) for head in (head_base, head_value) if head is not None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_value.dtype
        keep = (targets >= 0) | counted
        h, W = h_value.detach()[keep].to(dtype), head_value.detach()[:V].to(dtype)  # (n, H_v), (V, H_v)
        if h_base is not None:
            h_base, W_base = h_base.detach()[keep].to(dtype), head_base.detach()[:V].to(dtype)
        targets, counted = targets[keep], counted[keep]
        sums = torch.zeros(2, device=h.device)
        backward = ctx.needs_input_grad[2]
        dh, dW = (torch.empty_like(h), torch.zeros_like(head_value)) if backward else (None, None)
        with torch.autocast(device, enabled=False):
            size = max(1, CHUNK.get(device, 2**24) // V)
            for part in (slice(first, first + size) for first in range(0, len(h), size)):
                z_base = None if h_base is None else h_base[part] @ W_base.T
                z_delta = h[part] @ W.T
                sums += combine_loss(z_base, z_delta, targets[part], counted[part], w_ce, w_norm)
                if backward:
                    dz = z_delta  # by now
                    torch.mm(dz, W, out=dh[part])
                    if dtype == dW.dtype:
                        dW[:V].addmm_(dz.T, h[part])
                    else:
                        dW[:V] += dz.T @ h[part]
        if backward:
            ctx.save_for_backward(dh, dW, keep)
        return w_ce * sums[0] + w_norm * sums[1], sums

    @staticmethod
    def backward(ctx, gradient, _):
        dh, dW, keep = ctx.saved_tensors
        full = torch.zeros(*keep.shape, dh.shape[-1], device=dh.device, dtype=dh.dtype)
        full[keep] = dh.mul_(gradient)
        return None, None, full, dW.mul_(gradient), None, None, None, None


def two_headed_loss(h_base: Tensor | None, head_base: Tensor | None, h_value: Tensor, head_value: Tensor, targets: Tensor,
                    counted: Tensor, w_ce: float, w_norm: float) -> tuple[Tensor, Tensor]:
    """w_ce · cross-entropy + w_norm · norm term, and the two sums (2,) without gradient: see `loss_sums`.

    h_base (B, T, H_b), h_value (B, T, H_v): last hidden states; head_base (V_b, H_b), head_value (V_v, H_v).
    Gradients flow to h_value and head_value only. The weights are given beforehand, since the gradient is
    computed along with the loss.
    """
    loss, sums = TwoHeadedLoss.apply(h_base, head_base, h_value, head_value, targets, counted, w_ce, w_norm)
    return loss, sums.detach()


def combine_loss(z_base: Tensor | None, z_delta: Tensor, targets: Tensor, counted: Tensor, w_ce: float,
                 w_norm: float) -> Tensor:
    """Sums of cross-entropy and norm term over n rows, in float32 (2,); the gradient is written over z_delta.

    z_base, z_delta: (n, V) in any float type (z_base None: zeros); targets (n,), negative: none; counted (n,) bool.
    dz = w_ce (softmax(z_post) − onehot(target)) + w_norm sign(z_Δ) / V. On CUDA one kernel, elsewhere this.
    """
    if z_delta.is_cuda and triton is not None:
        return combine_loss_fused(z_base, z_delta, targets, counted, w_ce, w_norm)
    delta = z_delta.float()
    z = delta if z_base is None else z_base.float() + delta
    chosen, picked = targets >= 0, targets.clamp(min=0)[:, None]
    log_sum = z.logsumexp(-1, keepdim=True)
    cross_entropy = (log_sum - z.gather(-1, picked))[chosen].sum()
    norm = delta.abs().mean(-1)[counted].sum()
    p = (z - log_sum).exp_().scatter_add_(-1, picked, torch.full_like(log_sum, -1.0))  # softmax − onehot
    p.mul_(w_ce).masked_fill_(~chosen[:, None], 0.0)
    z_delta.copy_(p.add_(delta.sign() * counted[:, None], alpha=w_norm / z_delta.shape[-1]))
    return torch.stack((cross_entropy, norm))


# ---------------------------------------------------------------- vocabularies

def shared_vocabulary(base_tokens: Sequence[str | None], value_tokens: Sequence[str | None]) -> int:
    """How many leading ids mean the same token in both vocabularies.

    base_tokens, value_tokens: the content of each id, None for a row of padding. What one side has past the
    other's end (padding, tokens added later: CodeLlama's 32016 against Llama-2's 32000) is left out of z_post.
    Raises InputError where the two differ in content: equal sizes prove nothing.
    """
    def trimmed(tokens: Sequence[str | None]) -> list[str | None]:
        used = [i for i, token in enumerate(tokens) if token is not None]
        return list(tokens[:used[-1] + 1]) if used else []

    base_tokens, value_tokens = trimmed(base_tokens), trimmed(value_tokens)
    shared = min(len(base_tokens), len(value_tokens))
    for i in range(shared):
        if base_tokens[i] != value_tokens[i]:
            raise InputError(
                f"the base and the value model have different vocabularies: token {i} is {base_tokens[i]!r} in the one "
                f"and {value_tokens[i]!r} in the other; make a map between them with vocab_map.py")
    return shared


# ---------------------------------------------------------------- decoding

@torch.inference_mode()
def generate(base: Llama, value: Llama | Probe | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
             connection: str = "residual", antiexpert: Llama | None = None,
             alpha: float = 1.0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop: Collection[int] = (), vocabulary: int | None = None,
             mapping: VocabMap | None = None, choose=choose) -> Iterator[list[int | None]]:
    """Decodes z_post over two key-value caches; value None decodes the base alone.

    prompts: B lists of token ids, of any lengths. Each step yields B new ids; a reply's last one is a token of
    `stop`, and after it the row yields None. Ends when every row has stopped or after max_new_tokens.
    vocabulary: the first ids that may be chosen, see `shared_vocabulary` (default: all that both models have).
    mapping: for a base with another tokenizer; prompts and replies are in the value model's ids, equation (5), and
    replies also end where a text fills the base's context.
    connection: one of connections.CONNECTIONS; all but residual need base and value on one device, and no mapping.
    antiexpert: makes `value` the expert of proxy tuning, see `proxy`; that is a third cache.
    choose: see `sharding.chooser`, for logits in slices.
    """
    reader = None
    if mapping is not None and not mapping.identity:
        reader, texts = MappedBase(base, mapping, len(prompts)), [list(prompt) for prompt in prompts]
    longest = max(map(len, prompts))
    size = len(prompts), longest + max_new_tokens

    def reads(tokens: Tensor) -> Tensor:
        return value_input(connection, value, tokens, lanes[0].h, base.head)

    lanes = [Lane(base, *size)] if reader is None else []
    if value is not None:
        lanes.append(Lane(value, *size, None if connection == "residual" else reads))
    if antiexpert is not None:
        lanes.append(Lane(antiexpert, *size))
    device = base.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def decide(z: list[Tensor]) -> Tensor:
        """The next token of each row, (B,), which the models are to read next."""
        z = [part.to(device) for part in z]
        if antiexpert is not None:
            z = [z[0], proxy(*z[1:])]
        z_post = z[0] if len(z) == 1 else combine(*z, alpha)
        new = choose(z_post[:, :vocabulary], temperature, top_k, top_p, generator)
        for lane in lanes:
            lane.tokens.copy_(new[:, None])
        return new

    def step(end: int) -> Tensor:
        z = [] if reader is None else [reader.next(texts)]
        return decide(z + [lane.step(end) for lane in lanes])

    # on CUDA a step is one graph, and launched before the last one's tokens are looked at: the device never waits
    ahead = device.type == "cuda" and reader is None
    if ahead:
        step = record_steps(lanes, decide, generator)
    new = decide(([] if reader is None else [reader.next(texts)]) + [lane.prefill(prompts) for lane in lanes])
    running = [True] * len(prompts)
    for end in range(longest + 1, longest + max_new_tokens + 1):
        last = end == longest + max_new_tokens
        ids = new.to("cpu", non_blocking=ahead)
        if ahead:
            copied = torch.cuda.current_stream(device).record_event()
            new = None if last else step(end)
            copied.synchronize()
        ids = ids.tolist()
        yield [i if on else None for i, on in zip(ids, running)]
        running = [on and i not in stop for i, on in zip(ids, running)]
        if last or not any(running):
            return
        if reader is not None:
            if reader.full():
                return
            texts = [[*text, i] if on else text for text, i, on in zip(texts, ids, running)]
        if not ahead:
            new = step(end)


# ---------------------------------------------------------------- the kernel

if triton is not None:
    @triton.jit
    def _combine_loss(z_base, z_delta, targets, counted, cross_entropy, norm, w_ce, w_norm, V, base_row, delta_row,
                      HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
        """One program a row: a first pass over it for log Σ exp and |z_Δ|, a second for the gradient.

        Device memory is touched three times per entry: z_base and z_Δ are read, the gradient is written. The
        second pass reads what the first has just brought into the cache.
        """
        row = tl.program_id(0).to(tl.int64)
        target, count = tl.load(targets + row), tl.load(counted + row).to(tl.float32)
        z_base, z_delta = z_base + row * base_row, z_delta + row * delta_row
        top, total, size = -float("inf"), 0.0, 0.0
        for first in range(0, V, BLOCK):
            i = first + tl.arange(0, BLOCK)
            delta = tl.load(z_delta + i, i < V, 0.0).to(tl.float32)
            z = delta + tl.load(z_base + i, i < V, 0.0).to(tl.float32) if HAS_BASE else delta
            z = tl.where(i < V, z, -float("inf"))
            new = tl.maximum(top, tl.max(z, 0))
            safe = tl.where(new == -float("inf"), 0.0, new)  # a block of −inf only must not give inf − inf
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe), 0)
            size += tl.sum(tl.abs(delta), 0)
            top = new
        log_sum = top + tl.log(total)
        chosen = target >= 0
        z = tl.load(z_delta + target, chosen, 0.0).to(tl.float32)
        if HAS_BASE:
            z += tl.load(z_base + target, chosen, 0.0).to(tl.float32)
        tl.store(cross_entropy + row, tl.where(chosen, log_sum - z, 0.0))
        tl.store(norm + row, size / V * count)
        w_ce = tl.where(chosen, w_ce, 0.0)
        for first in range(0, V, BLOCK):
            i = first + tl.arange(0, BLOCK)
            delta = tl.load(z_delta + i, i < V, 0.0).to(tl.float32)
            z = delta + tl.load(z_base + i, i < V, 0.0).to(tl.float32) if HAS_BASE else delta
            sign = (delta > 0).to(tl.float32) - (delta < 0).to(tl.float32)
            gradient = w_ce * (tl.exp(z - log_sum) - (i == target).to(tl.float32)) + w_norm / V * count * sign
            tl.store(z_delta + i, gradient.to(z_delta.dtype.element_ty), i < V)


def combine_loss_fused(z_base: Tensor | None, z_delta: Tensor, targets: Tensor, counted: Tensor, w_ce: float,
                       w_norm: float) -> Tensor:
    """`combine_loss` as one Triton kernel; the rows of both must be contiguous. Deterministic: no atomics."""
    n, V = z_delta.shape
    rows = torch.empty(2, n, device=z_delta.device)
    base = z_delta if z_base is None else z_base
    _combine_loss[(n,)](base, z_delta, targets, counted, rows[0], rows[1], w_ce, w_norm, V, base.stride(0),
                        z_delta.stride(0), z_base is not None, min(triton.next_power_of_2(V), BLOCK))
    return rows.sum(-1)
