"""What bench.py compares: models of published shapes with random weights, and the ways to decode
with them, to take their loss, and to train them by one step; ours and others'."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from experiments import plan
from experiments.bench_measure import Kernel, kernels, matmul_rate
from extras.int8 import rounded
from ivl import combine, generate, loss_sums, token_by_token, two_headed_loss
from model import Config, Llama, column_major, hf_shape, hf_views, inverse_frequencies
from plumbing.files import InputError, pick_dtype
from plumbing.jobs import compiled
from plumbing.weights import write_config

SHAPES = {  # with room for 8192 positions
    "toy-small": Config(1536, 64, 128, 2, 2, 2, 32, 8192, tie_word_embeddings=True),
    "toy-large": Config(1536, 128, 320, 3, 4, 4, 32, 8192, tie_word_embeddings=True),
    "24m": Config(32000, 256, 1280, 6, 4, 4, 64, 8192),
    "58m": Config(32000, 512, 2048, 6, 8, 8, 64, 8192),
}
for name, config in plan.SHAPES.items():
    SHAPES[name] = replace(config, max_position_embeddings=8192)
DENSE = {  # published bf16 FLOP/s, without sparsity
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
THEIRS = ("their base", "their pair", "uncached")  # the variants of decoding in transformers
PROMPT = list(range(1, 9))


# ---------------------------------------------------------------- models


def config_of(name: str) -> Config:
    if name not in SHAPES:
        raise InputError(f"--shape {name}: is none of the shapes {', '.join(SHAPES)}")
    return SHAPES[name]


def check_pair(base: str, value: str) -> None:
    """Raises InputError for two shapes that cannot be added."""
    sizes = [config_of(name).vocab_size for name in (base, value)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--shape {base} {value}: the vocabularies are of {sizes[0]} and {sizes[1]} tokens; "
            "choose two of one size"
        )


@torch.no_grad()
def random_llama(
    config: Config | str, device: torch.device, dtype: torch.dtype, seed: int
) -> Llama:
    """Random weights, made where they stay; so large that the tokens they decode hardly ever
    repeat."""
    if isinstance(config, str):
        config = config_of(config)
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    model.inv_freq = inverse_frequencies(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.fill_(1)
    return model


@torch.no_grad()
def transformers_twin(model: Llama):
    """The same weights in a transformers.LlamaForCausalLM."""
    import transformers

    weight = model.embed.weight
    with tempfile.TemporaryDirectory() as directory:
        write_config(model.config, directory, weight.dtype)
        config = transformers.LlamaConfig.from_pretrained(directory)
    with torch.device(weight.device):
        twin = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
    state = twin.state_dict()
    for name, view in hf_views(model).items():
        state[name].copy_(view.reshape(hf_shape(view)))
    return twin


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bytes_per_token(*models: Llama) -> int:
    """Bytes of weights that decoding one token reads: all but the embedding, unless that is also
    the unembedding."""
    read = 0
    for model in models:
        read += weight_bytes(model)
        if model.lm_head is not None:
            read -= weight_bytes(model.embed)
    return read


# ---------------------------------------------------------------- decoding


def decoder(
    base: Llama, *values: Llama, rounds: Callable = token_by_token
) -> Callable[..., Iterator[list[int | None]]]:
    """Our greedy decoding with some models: decoder(base, value)(prompts, tokens) gives steps.

    As sample.py has it: on CUDA caches and graphs are made once and then serve text after text."""
    if base.unembed.device.type == "cuda" and rounds is token_by_token:
        from extras.graphs import Kept

        rounds = Kept().rounds

    def decode(prompts, tokens: int, **how) -> Iterator[list[int | None]]:
        torch.backends.cuda.enable_cudnn_sdp(False)
        return generate(base, values, prompts, tokens, rounds=rounds, **how)

    return decode


def ours(decode: Callable, prompt: list[int], tokens: int) -> list[int]:
    return [ids[0] for ids in decode([prompt], tokens)]


def profiled(decode: Callable, steps: int, device: torch.device) -> list[Kernel]:
    """The kernels of some steps of decoding, each of which reads the last token and chooses one."""
    text = decode([PROMPT], steps + 4)  # on CUDA with the last token no step begins
    for _ in range(3):
        next(text)  # the prompt is read; on CUDA a step is recorded, and replayed

    def run() -> None:
        for _ in range(steps):
            next(text)

    found = kernels(run, device)
    if not found:
        raise RuntimeError("the profiler has seen no kernels")
    return found


def transformers_alone(base, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own `generate`, at its best: on a GPU a static cache, with which it compiles;
    else its default."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default
    ids = torch.tensor([prompt], device=base.device)
    best = {"cache_implementation": "static"} if ids.is_cuda else {}
    text = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        **best,
    )
    return text[0, len(prompt) :].tolist()


@torch.inference_mode()
def transformers_pair(base, value, prompt: list[int], tokens: int) -> list[int]:
    """Two models one after the other, each with its own growing cache, as in proxy tuning."""
    new = torch.tensor([prompt], device=base.device)
    base_cache = value_cache = None
    chosen = []
    for _ in range(tokens):
        of_base = base(new, past_key_values=base_cache, use_cache=True)
        of_value = value(new, past_key_values=value_cache, use_cache=True)
        base_cache, value_cache = of_base.past_key_values, of_value.past_key_values
        z_base, z_delta = of_base.logits[:, -1:].float(), of_value.logits[:, -1:].float()
        new = combine(z_base, z_delta).argmax(-1)
        chosen.append(new)
    return torch.cat(chosen, 1)[0].tolist()


@torch.inference_mode()
def transformers_pair_uncached(base, value, prompt: list[int], tokens: int) -> list[int]:
    """Two models that read the whole text anew for every token, as in the paper's released code."""
    text = torch.tensor([prompt], device=base.device)
    for _ in range(tokens):
        z_base = base(text, use_cache=False).logits
        z_delta = value(text, use_cache=False).logits
        z_post = combine(z_base, z_delta).float()
        text = torch.cat((text, z_post[:, -1:].argmax(-1)), 1)
    return text[0, len(prompt) :].tolist()


@dataclass
class Pair:
    """Two models, and the same two in transformers, and the base in eight bits, where they are
    wanted.
    """

    base: Llama
    value: Llama
    int8_base: Llama | None = None
    their_base: object = None
    their_value: object = None

    def members(self, side: str) -> list[Llama]:
        """The models that a variant of `decode_variants` reads, as we have them."""
        if side in ("base", "their base"):
            return [self.base]
        if side == "int8":
            return [self.int8_base, self.value]
        return [self.value] if side == "value" else [self.base, self.value]

    def weights(self, side: str) -> int:
        """The bytes of weights that a variant keeps."""
        models = self.members(side)
        if side in THEIRS:
            models = [self.their_base, self.their_value][: len(models)]
        return sum(map(weight_bytes, models))


def random_pair(names: tuple[str, str], device: torch.device, wanted: set[str]) -> Pair:
    """A pair of models for the variants that are wanted; ours are laid out as sample.py does it."""
    dtype = pick_dtype("auto", device)
    base, value = (random_llama(name, device, dtype, seed) for seed, name in enumerate(names))
    pair = Pair(base, value)
    if wanted & set(THEIRS):
        pair.their_base = transformers_twin(base)
    if wanted & {"their pair", "uncached"}:
        pair.their_value = transformers_twin(value)
    if "int8" in wanted:
        pair.int8_base = rounded(base)
    if device.type == "cpu":
        column_major(base)
        column_major(value)
    return pair


def decode_variants(
    pair: Pair, tokens: int, wanted: set[str]
) -> dict[str, Callable[[], list[int]]]:
    """Greedy decoding of so many tokens after a short prompt; all give the tokens."""
    theirs = pair.their_base, pair.their_value
    of_value, of_base = decoder(pair.value), decoder(pair.base)
    of_both = decoder(pair.base, pair.value)
    of_int8 = of_both if pair.int8_base is None else decoder(pair.int8_base, pair.value)
    variants = {
        "value": lambda: ours(of_value, PROMPT, tokens),
        "base": lambda: ours(of_base, PROMPT, tokens),
        "both": lambda: ours(of_both, PROMPT, tokens),
        "their base": lambda: transformers_alone(theirs[0], PROMPT, tokens),
        "their pair": lambda: transformers_pair(*theirs, PROMPT, tokens),
        "uncached": lambda: transformers_pair_uncached(*theirs, PROMPT, tokens),
        "int8": lambda: ours(of_int8, PROMPT, tokens),
    }
    return {name: run for name, run in variants.items() if name in wanted}


def agreement(a: list[int], b: list[int]) -> float:
    """The share of the tokens before the first difference. In bfloat16, where near ties round
    apart, 1 is not to be had."""
    alike = 0
    while alike < min(len(a), len(b)) and a[alike] == b[alike]:
        alike += 1
    return alike / len(a)


# ---------------------------------------------------------------- the loss


def autocast_of(device: torch.device):
    """As train.py has it: bfloat16 on CUDA."""
    dtype = pick_dtype("auto", device)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def loss_variants(
    base: Config, value: Config, tokens: int, device: torch.device, wanted: set[str]
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Loss and gradients from two last hidden states, each with its unembedding; all give
    (dh_value, dW_value). Those of `wanted`: two-headed, eager, compiled, library.

    Types are those of train.py: the base in bfloat16 on a GPU, the value model in float32 under
    autocast."""
    dtype, autocast = pick_dtype("auto", device), autocast_of(device)
    V = base.vocab_size
    torch.manual_seed(0)
    h_base = torch.randn(1, tokens, base.hidden_size, device=device, dtype=dtype)
    W_base = torch.randn(V, base.hidden_size, device=device, dtype=dtype)
    W_base /= base.hidden_size**0.5
    h_value = torch.randn(1, tokens, value.hidden_size, device=device)
    W_value = torch.randn(V, value.hidden_size, device=device)
    W_value /= value.hidden_size**0.5
    targets = torch.randint(V, (1, tokens), device=device)
    counted = torch.ones_like(targets, dtype=torch.bool)
    leaves = h_value.requires_grad_(), W_value.requires_grad_()

    def two_headed() -> tuple[Tensor, ...]:
        with autocast:
            loss, _ = two_headed_loss(
                h_base, W_base, h_value, W_value, targets, counted, 1 / tokens, 1 / tokens
            )
        return torch.autograd.grad(loss, leaves)

    def formula(h_base, W_base, h_value, W_value) -> Tensor:
        """`loss_sums` where every token counts: faster, and compiles as a whole."""
        z_delta = F.linear(h_value, W_value)
        z_post = combine(F.linear(h_base, W_base), z_delta).float()
        cross_entropy = F.cross_entropy(z_post.flatten(0, 1), targets.flatten())
        return cross_entropy + z_delta.float().abs().mean()

    def eager(formula=formula) -> tuple[Tensor, ...]:
        with autocast:
            loss = formula(h_base, W_base, h_value, W_value)
        return torch.autograd.grad(loss, leaves)

    def library() -> tuple[Tensor, ...]:
        h = torch.cat((h_base, h_value.to(dtype)), -1)
        W = torch.cat((W_base, W_value.to(dtype)), -1)
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(h[0], W, targets[0], options=options)
        return torch.autograd.grad(loss, leaves)

    variants = {"two-headed": two_headed, "eager": eager, "library": library}
    if "compiled" in wanted:
        variants["compiled"] = partial(eager, torch.compile(formula))
    return {name: run for name, run in variants.items() if name in wanted}


# ---------------------------------------------------------------- one training step


def forward_flop(config: Config, parameters: int, tokens: int) -> float:
    """Floating-point operations of reading one sequence: two per weight and token, and causal
    attention's products."""
    embedding = 0
    if not config.tie_word_embeddings:  # looked up, not multiplied
        embedding = config.vocab_size * config.hidden_size
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return (2 * (parameters - embedding) + 2 * heads * tokens) * tokens


def step_flop(base: Llama, value: Llama, tokens: int) -> float:
    """Of one training step: the base reads, the value model reads and learns (twice as much)."""
    return forward_flop(base.config, base.size(), tokens) + 3 * forward_flop(
        value.config, value.size(), tokens
    )


def peak_rate(device: torch.device) -> tuple[float, str]:
    """FLOP per second of matrix products at best, and what that figure is."""
    if device.type == "cuda":
        for gpu, rate in DENSE.items():
            if gpu in torch.cuda.get_device_name(device):
                return rate, f"its published {rate / 1e12:.3g} TFLOP/s"
    rate = matmul_rate(device, pick_dtype("auto", device))
    return rate, f"the measured {rate / 1e12:.3g} TFLOP/s"


def step_variants(
    base: Llama, value: Llama, tokens: int, wanted: set[str]
) -> dict[str, Callable[[], Tensor]]:
    """Base forward without gradient, value forward and backward, AdamW: one sequence in which every
    token counts. Those of `wanted`: ours, int8, compiled, eager, transformers.

    `compiled` has the blocks compiled one by one, in models of its own."""
    device = base.embed.weight.device
    autocast = autocast_of(device)
    generator = torch.Generator(device)
    V = value.config.vocab_size
    ids = torch.randint(V, (1, tokens + 1), device=device, generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    counted = torch.ones_like(targets, dtype=torch.bool)
    batch = inputs, targets, counted

    def two_headed(base: Llama, value: Llama) -> Tensor:
        return train.forward(base, value, batch, autocast, 1 / tokens, 1 / tokens)[0]

    def eager(base: Llama, value: Llama) -> Tensor:
        with torch.no_grad():
            z_base = base(inputs)
        with autocast:
            cross_entropy, norm = loss_sums(z_base, value(inputs), targets, counted)
        return (cross_entropy + norm) / tokens

    def transformers(base, value) -> Tensor:
        with torch.no_grad():
            z_base = base(inputs, use_cache=False).logits
        with autocast:
            z_delta = value(inputs, use_cache=False).logits
            z_post = (z_base + z_delta).float()
            cross_entropy = F.cross_entropy(z_post.flatten(0, 1), targets.flatten())
            return cross_entropy + z_delta.float().abs().mean()

    def stepping(loss_of: Callable, base, value, optimizer) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = loss_of(base, value)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step()  # makes the optimizer's state, which is there before any other step
        return step

    # ours, with either base, and the eager loss train one model, the others have their own
    mine = base, value, adamw(value)
    steps = {}
    if "ours" in wanted:
        steps["ours"] = stepping(two_headed, *mine)
    if "compiled" in wanted:
        again = compiled(copy(value))
        steps["compiled"] = stepping(two_headed, compiled(copy(base)), again, adamw(again))
    if "eager" in wanted:
        steps["eager"] = stepping(eager, *mine)
    if "transformers" in wanted:
        theirs = transformers_twin(value).train()
        steps["transformers"] = stepping(
            transformers, transformers_twin(base), theirs, adamw(theirs)
        )
    if "int8" in wanted:
        steps["int8"] = stepping(two_headed, rounded(base), *mine[1:])
    return steps


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)


@torch.no_grad()
def copy(model: Llama) -> Llama:
    """Another model with the same weights."""
    weight = model.embed.weight
    twin = random_llama(model.config, weight.device, weight.dtype, 0)
    for new, old in zip(twin.parameters(), model.parameters()):
        new.copy_(old)
        new.requires_grad_(old.requires_grad)
    return twin
