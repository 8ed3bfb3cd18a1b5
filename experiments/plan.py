"""What a pair of models needs on so many GPUs, from their configurations alone.

    python experiments/bench.py plan --base llama-2-70b --value tinyllama-1.1b --gpus 4 --gpu h100
    python experiments/bench.py plan --base llama-2-70b --value tinyllama-1.1b --base_dtype int8

Memory, in GiB per GPU, is what the arithmetic of this repository keeps at its peak. What the
driver and fragmentation take comes on top, so a tenth of a GPU is left free. The time is a bound:
for each token every weight and every cached key and value is read once, at full bandwidth. The
memory agrees with Table 3 of the paper within 5 %.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from extras.int8 import FEW, PIECE
from ivl import chunk_rows
from model import Config, Llama
from plumbing.files import InputError
from plumbing.weights import frozen_network, read_config

GIB = 2**30
FREE = 0.1  # of a GPU, for what is not counted here
LIBRARY = 40 * 2**20  # what cuBLAS keeps as workspace on an H100 or H800, in bytes

# each model's published config.json, in the order of Config's fields
SHAPES = {
    "tinyllama-1.1b": Config(32000, 2048, 5632, 22, 32, 4, 64, 2048),
    "llama-2-7b": Config(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "llama-2-13b": Config(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "llama-2-70b": Config(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "codellama-7b": Config(32016, 4096, 11008, 32, 32, 32, 128, 16384),
    "codellama-34b": Config(32000, 8192, 22016, 48, 64, 8, 128, 16384),
    "llama-3.2-1b": Config(128256, 2048, 8192, 16, 32, 8, 64, 131072, 1e-5, 5e5, None, True),
    "llama-3.2-3b": Config(128256, 3072, 8192, 28, 24, 8, 128, 131072, 1e-5, 5e5, None, True),
    "llama-3-8b": Config(128256, 4096, 14336, 32, 32, 8, 128, 8192),
    "llama-3.1-8b": Config(128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "llama-3.1-70b": Config(128256, 8192, 28672, 80, 64, 8, 128, 131072),
}

# memory in GiB, bandwidth in TB/s, as their makers state them
GPUS = {
    "rtx-3090": (24, 0.94),
    "rtx-4090": (24, 1.01),
    "l40s": (45, 0.86),
    "a100-40": (40, 1.56),
    "a100": (80, 2.04),
    "h800": (80, 3.35),
    "h100": (80, 3.35),
    "h200": (140, 4.8),
    "b200": (179, 8.0),
}


def weights(config: Config, network: type[Llama]) -> int:
    """The bytes of a frozen model's weights in bfloat16, or of int8 numbers and their scales."""

    def held(layers: int) -> int:
        with torch.device("meta"):
            model = network(replace(config, num_hidden_layers=layers)).to(torch.bfloat16)
        return sum(p.numel() * p.itemsize for p in model.parameters())

    ends, one = held(0), held(1)
    return ends + config.num_hidden_layers * (one - ends)


def size(config: Config) -> int:
    """The number of parameters."""
    return weights(config, Llama) // 2


def made_floats(config: Config, network: type[Llama], rows: int, matrix: str) -> int:
    """The bytes of what is made bfloat16 of an int8 matrix at a time, to multiply it by so many
    rows: of the largest "in a layer", or of the "unembedding"; see extras/int8.py.
    """
    if network is Llama or rows <= FEW["cuda"]:
        return 0
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    n = {"in a layer": max(2 * config.intermediate_size, heads), "unembedding": config.vocab_size}
    return 2 * min(PIECE["cuda"], n[matrix] * config.hidden_size)


def split(config: Config, gpus: int) -> int:
    """Into how many pieces decoding cuts a network: by key-value heads, or not at all."""
    if config.num_key_value_heads % gpus or config.intermediate_size % gpus:
        return 1
    return gpus


def decoding(
    base: Config,
    value: Config | None,
    gpus: int,
    tokens: int,
    batch: int,
    network: type[Llama] = Llama,
) -> dict[str, float]:
    """Bytes per GPU for `batch` texts of `tokens` tokens each, prompt and reply, in bfloat16;
    network: of the base, see `model.frozen_network`.
    """
    models = {"base": base}
    parts = {"weights of the base": weights(base, network) / split(base, gpus)}
    if value is not None:
        models["value model"] = value
        parts["weights of the value model"] = weights(value, Llama) / split(value, gpus)

    caches = widest = 0
    for config in models.values():
        pieces = split(config, gpus)
        heads = config.num_attention_heads
        keys = config.num_key_value_heads
        numbers = 2 * config.num_hidden_layers * keys * config.head_dim  # keys and values
        caches += 2 * numbers * tokens * batch / pieces

        # at worst all is prompt, read at once: the residual and what the wider of two products
        # reads and writes
        mlp = 3 * config.intermediate_size
        attention = config.head_dim * (3 * heads + 4 * keys)
        widest = max(widest, 3 * config.hidden_size + max(mlp, attention) / pieces)
    parts["key-value caches"] = caches

    # then z_base, z_Δ, z_post, probabilities; every GPU draws the whole noise
    V = max(config.vocab_size for config in models.values())
    z = 4 * batch * V
    in_a_layer = made_floats(base, network, tokens * batch, "in a layer") / split(base, gpus)
    unembedding = made_floats(base, network, batch, "unembedding") / split(base, gpus)
    reading = 2 * widest * tokens * batch + in_a_layer + z * (1 + 4 / gpus)
    parts["activations"] = max(reading, unembedding + 2 * z) + LIBRARY
    return parts


def saved(config: Config, checkpointing: bool) -> float:
    """Bytes that the backward pass needs of each token that is read, with bfloat16 autocast."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    residual = 4 * config.hidden_size  # float32, all else bfloat16
    norms = 2 * (residual + 2 * config.hidden_size)  # what each of the two read and gave
    # q, k, v together, of which v is a view; q and k turned; what the heads gave
    attention = 2 * config.head_dim * (3 * heads + 3 * keys)
    mlp = 2 * 4 * config.intermediate_size  # gate and up, silu(gate), its product with up
    block = norms + attention + mlp
    if checkpointing:
        return config.num_hidden_layers * residual + block
    return config.num_hidden_layers * block


def loss(base: Config | None, value: Config, tokens: int, device: str = "cuda") -> dict[str, int]:
    """Bytes of `ivl.two_headed_loss` at its peak, by tensor; each of `tokens` tokens has a target.

    On CUDA the products are in bfloat16, on a CPU in float32. dh and dW are what any method
    returns."""
    V, H = value.vocab_size, value.hidden_size
    number = 2 if device == "cuda" else 4  # bytes
    rows = min(tokens, chunk_rows(V, device))
    chunk = number * rows * V
    parts = {"dh": 4 * tokens * H, "dW": 4 * V * H}
    if number < 4:
        parts["W as the products read it"] = number * V * H
    parts["a chunk of z_Δ"] = chunk
    if base is not None:
        parts["a chunk of z_base"] = chunk
    if device == "cuda":
        parts["a chunk of h, and dz W in both types"] = rows * H * (number + number + 4)
    else:
        parts["a chunk of h"] = rows * H * number
        copies = 2 if base is not None else 1  # z_post; dz
        parts["float32 copies in combine_loss"] = copies * chunk
    return parts


def training(
    base: Config | None,
    value: Config,
    gpus: int,
    tokens: int,
    batch: int,
    checkpointing: bool,
    network: type[Llama] = Llama,
) -> dict[str, float]:
    """Bytes per GPU for a micro-batch of `batch` chats of `tokens` tokens; the base in bfloat16, or
    as `network` has it, AdamW in float32."""

    def layer(config: Config) -> int:
        return 3 * config.hidden_size * config.intermediate_size

    def ends(config: Config) -> int:
        """The embedding and the unembedding."""
        matrices = 1 if config.tie_word_embeddings else 2
        return config.vocab_size * config.hidden_size * matrices

    P = size(value)
    parts = {}
    if base is not None:
        parts["weights of the base"] = weights(base, network) / gpus
    parts["weights of the value model"] = 4 * P / gpus
    parts["gradients"] = 4 * P / gpus
    parts["optimizer"] = 8 * P / gpus

    if gpus > 1:
        # two layers of each at a time, and the ends; of the value model their gradients too
        gathered = (4 + 6) * layer(value) + 8 * ends(value)
        if base is not None:
            bytes_each = weights(base, network) / size(base)
            gathered += bytes_each * (2 * layer(base) + ends(base))
        parts["gathered from other GPUs"] = gathered
    elif checkpointing:
        parts["bfloat16 copies of the weights"] = 2 * layer(value)
    else:
        parts["bfloat16 copies of the weights"] = 2 * (P - ends(value))
    parts["activations"] = saved(value, checkpointing) * tokens * batch + LIBRARY
    parts["loss"] = sum(loss(base, value, tokens * batch).values())
    if network is not Llama:
        matrices = "in a layer", "unembedding"
        floats = max(made_floats(base, network, tokens * batch, each) for each in matrices)
        parts["a piece of the base in bfloat16"] = floats
    return parts


def bytes_per_token(
    base: Config,
    value: Config | None,
    gpus: int,
    tokens: int,
    batch: int,
    network: type[Llama] = Llama,
) -> float:
    """What each GPU reads for one step of decoding, at the end of the texts. The embedding's rows
    are too few to count."""
    parts = decoding(base, value, gpus, tokens, batch, network)
    read = sum(n for name, n in parts.items() if name != "activations")
    for config, kind in ((base, network), (value, Llama)):
        if config is not None and not config.tie_word_embeddings:
            bytes_each = weights(config, kind) / size(config)
            read -= bytes_each * config.vocab_size * config.hidden_size / gpus
    return read


# ---------------------------------------------------------------- command line


def shape(name: str) -> Config:
    if name in SHAPES:
        return SHAPES[name]
    if not (Path(name) / "config.json").exists():
        raise InputError(
            f"{name}: neither a directory with config.json nor one of {', '.join(SHAPES)}"
        )
    return read_config(name)


def table(
    title: str, parts: dict[str, float], memory: float, remedies: dict[str, dict[str, float]]
) -> None:
    """Prints the parts and their sum; where it does not fit, the first remedy that does."""

    def fits(parts: dict[str, float]) -> bool:
        return sum(parts.values()) <= (1 - FREE) * memory * GIB

    print(f"\n{title:<58}GiB per GPU")
    for name, n in parts.items():
        print(f"  {name:<58}{n / GIB:9.2f}")
    verdict = "fits"
    if not fits(parts):
        helpful = [flags for flags, changed in remedies.items() if fits(changed)]
        verdict = "does not fit; nor with any flag: take larger GPUs"
        if helpful:
            verdict = f"does not fit; with {helpful[0]} it would"
    print(f"  {'sum':<58}{sum(parts.values()) / GIB:9.2f}   {verdict}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(SHAPES)
    add = parser.add_argument
    add("--base", required=True, help=f"a directory with config.json, or one of {known}")
    add("--value", default="none", help="likewise, or none")
    add("--gpus", type=int, default=1, help="how many (1)")
    add("--gpu", choices=GPUS, default="h100", help="of which kind (h100)")
    add("--tokens", type=int, default=4096, help="of a text, prompt and reply, or a chat (4096)")
    add("--batch_size", type=int, default=1, help="texts that are decoded at a time (1)")
    add("--micro_batch_size", type=int, default=4, help="chats that are learnt from at a time (4)")
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--base_dtype", choices=["int8"], help="of the base, in place of bfloat16")


def plan(args: argparse.Namespace) -> None:
    """Prints memory and speed of decoding, and memory of training the value model beside the base,
    or the base itself."""
    for name in ("gpus", "tokens", "batch_size", "micro_batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} = {getattr(args, name)}; it must be at least 1")
    base, value = shape(args.base), None if args.value == "none" else shape(args.value)
    if split(base, args.gpus) != args.gpus:
        raise InputError(
            f"--gpus {args.gpus}: decoding splits {args.base} by its {base.num_key_value_heads} "
            "key-value heads; take a number that divides them"
        )
    memory, bandwidth = GPUS[args.gpu]
    more = [n for n in range(args.gpus + 1, base.num_key_value_heads + 1) if split(base, n) == n]
    pair = args.base if value is None else f"{args.base} + {args.value}"
    print(f"{pair} on {args.gpus} × {args.gpu} ({memory} GiB, {bandwidth} TB/s)")
    network, rounded = frozen_network(args.base_dtype), frozen_network("int8")

    # decoding: what it takes, and what would help
    models = base, value
    parts = decoding(*models, args.gpus, args.tokens, args.batch_size, network)
    remedies = {}
    if args.batch_size > 1:
        remedies["--batch_size 1"] = decoding(*models, args.gpus, args.tokens, 1, network)
    for n in more:
        remedies[f"--gpus {n}"] = decoding(*models, n, args.tokens, args.batch_size, network)
    for size in (args.batch_size, 1):
        flags = f"--base_dtype int8 --batch_size {size}"
        remedies[flags] = decoding(*models, args.gpus, args.tokens, size, rounded)
    table(f"decoding {args.batch_size} × {args.tokens} tokens", parts, memory, remedies)
    read = bytes_per_token(*models, args.gpus, args.tokens, args.batch_size, network)
    seconds = read / (bandwidth * 1e12)
    print(
        f"  a step reads {read / GIB:.2f} GiB per GPU: at least {1e3 * seconds:.1f} ms, "
        f"at most {args.batch_size / seconds:.0f} tokens/s"
    )

    # training likewise; a model that is trained itself is no frozen base
    trained = base, value
    if value is None:
        trained = None, base
        network = rounded = Llama
    how = args.micro_batch_size, args.checkpointing
    parts = training(*trained, args.gpus, args.tokens, *how, network)
    alternatives = [
        (args.gpus, args.micro_batch_size, True, network),
        (args.gpus, 1, args.checkpointing, network),
        (args.gpus, 1, True, network),
    ]
    for n in more:
        alternatives.append((n, 1, True, network))
    alternatives.append((args.gpus, 1, True, rounded))
    remedies = {}
    for n, size, checkpointing, kind in alternatives:
        flags = f"--gpus {n} --micro_batch_size {size}" + checkpointing * " --checkpointing"
        flags += (kind is not network) * " --base_dtype int8"
        remedies[flags] = training(*trained, n, args.tokens, size, checkpointing, kind)
    title = f"training on {args.micro_batch_size} × {args.tokens} tokens at a time"
    table(title + args.checkpointing * ", checkpointing", parts, memory, remedies)
