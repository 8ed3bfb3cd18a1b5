"""Speed against peers, measured side by side on this machine.

    python experiments/bench.py decode                        # on a CPU: toys, then 58M + 24M; on a GPU: 7B + 1.1B
    python experiments/bench.py decode --shape llama-2-13b tinyllama-1.1b --tokens 128 512 1024
    python experiments/bench.py loss --shape llama-3-8b llama-3.2-1b --tokens 16384
    python experiments/bench.py train-step --shape tinyllama-1.1b tinyllama-1.1b --tokens 4096
    python experiments/bench.py vocab-map --base DIR --value DIR --text FILE
    python experiments/bench.py plan --base llama-2-70b --value tinyllama-1.1b --gpus 4 --gpu h100   # measures nothing

A line is one comparison: ours, the peer, and the ratio, which is above 1 where ours is better. Models have a published
shape and random weights, the same on both sides. After a warm-up the two sides take turns, and the medians are compared.
--json FILE writes the same. On a CPU the number of threads is that of OMP_NUM_THREADS.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts and stops
sys.path.insert(0, str(Path(__file__).parent.parent))
import train
import vocab_map
from data import Tokenizer
from decode import column_major
from experiments import plan
from files import InputError, command, pick_device, pick_dtype, read_texts, write_text
from ivl import combine, generate, loss_sums, two_headed_loss
from model import Config, Llama, hf_shape, hf_views, inverse_frequencies
from spelling import Spelling

SHAPES = {  # with room for 8192 positions
    "toy-small": Config(1536, 64, 128, 2, 2, 2, 32, 8192, tie_word_embeddings=True),
    "toy-large": Config(1536, 128, 320, 3, 4, 4, 32, 8192, tie_word_embeddings=True),
    "24m": Config(32000, 256, 1280, 6, 4, 4, 64, 8192),
    "58m": Config(32000, 512, 2048, 6, 8, 8, 64, 8192),
} | {name: replace(config, max_position_embeddings=8192) for name, config in plan.SHAPES.items()}
DEFAULTS = {  # what each bench takes where the command line says nothing: pairs of base and value, tokens
    "decode": {"cpu": ([("toy-large", "toy-small"), ("58m", "24m")], [256]),
               "cuda": ([("llama-2-7b", "tinyllama-1.1b")], [128, 512, 1024])},
    "loss": {"cpu": ([("58m", "24m")], [1024]),
             "cuda": ([("tinyllama-1.1b", "tinyllama-1.1b"), ("llama-3-8b", "llama-3.2-1b")], [16384])},
    "train-step": {"cpu": ([("toy-large", "toy-small"), ("58m", "24m")], [512]),
                   "cuda": ([("tinyllama-1.1b", "tinyllama-1.1b")], [4096])},
}
DENSE = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}  # published bf16 FLOP/s, without sparsity
PROMPT = 8  # tokens
LONG = 10  # seconds, see `measure`


# ---------------------------------------------------------------- measuring

@dataclass
class Measured:
    seconds: float  # median
    bytes: int  # of tensors at the peak, on top of those that were there before
    result: object  # what the run gave


def seconds(run: Callable[[], object], device: torch.device = torch.device("cpu")) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def watched(run: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """The bytes of tensors at the peak of a run, on top of those that were there before, and what the run gave.

    On a CPU the sum over all that torch's allocator hands out and takes back: exact, where the program's resident
    memory would also count what malloc keeps for later.
    """
    if device.type == "cuda":
        run()  # compiles and captures, which takes memory of its own
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, result


def measure(variants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Each variant once for its memory, which also warms it up; then `repeats` rounds in which they take turns on the clock.

    A variant that takes longer than LONG runs in the first round only: its ratio is far from 1.
    """
    peaks, times = {}, {name: [] for name in variants}
    with tqdm(total=len(variants) * (repeats + 1), unit=" runs", leave=False, disable=None) as bar:
        for name, run in variants.items():
            peaks[name] = watched(run, device)
            bar.update()
        for _ in range(repeats):
            for name, run in variants.items():
                if not times[name] or times[name][0] < LONG:
                    times[name].append(seconds(run, device))
                bar.update()
    return {name: Measured(statistics.median(times[name]), *peaks[name]) for name in variants}


def compare(name: str, shape: str, tokens: int, ours: Measured, peer: Measured, **more) -> list[dict]:
    """Two lines: tokens per second, peak memory in MB (10^6 bytes)."""
    return [{"name": name, "shape": shape, "tokens": tokens, "unit": "tokens/s", "ours": tokens / ours.seconds,
             "peer": tokens / peer.seconds, "ratio": peer.seconds / ours.seconds, **more},
            {"name": name, "shape": shape, "tokens": tokens, "unit": "MB", "ours": ours.bytes / 1e6,
             "peer": peer.bytes / 1e6, "ratio": peer.bytes / ours.bytes}]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor that is larger than any cache."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * len(source) / statistics.median(seconds(lambda: target.copy_(source), device) for _ in range(9))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(9))


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---------------------------------------------------------------- models

def config_of(name: str) -> Config:
    if name not in SHAPES:
        raise InputError(f"--shape {name}: is none of the shapes {', '.join(SHAPES)}")
    return SHAPES[name]


@torch.no_grad()
def random_llama(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> Llama:
    """Random weights, made where they stay; so large that the tokens they decode hardly ever repeat."""
    config = config_of(name)
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    model.inv_freq = inverse_frequencies(config).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    for weight in model.parameters():
        weight.normal_(0, 2 * weight.shape[1] ** -0.5, generator=generator) if weight.dim() == 2 else weight.fill_(1)
    return model


@torch.no_grad()
def transformers_twin(model: Llama):
    """The same weights in a transformers.LlamaForCausalLM."""
    import transformers

    weight = model.embed.weight
    with tempfile.TemporaryDirectory() as directory:
        model.config.save(directory, weight.dtype)
        config = transformers.LlamaConfig.from_pretrained(directory)
    with torch.device(weight.device):
        twin = transformers.AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
    state = twin.state_dict()
    for name, view in hf_views(model).items():
        state[name].copy_(view.reshape(hf_shape(view)))
    return twin


def weight_bytes(model: Llama) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bytes_per_token(model: Llama) -> int:
    """Bytes of weights that decoding one token reads: all but the embedding, unless that is also the unembedding."""
    embedding = 0 if model.lm_head is None else model.embed.weight.numel() * model.embed.weight.element_size()
    return weight_bytes(model) - embedding


# ---------------------------------------------------------------- decoding

def ours(base: Llama, value: Llama | None, prompt: list[int], tokens: int) -> list[int]:
    return [ids[0] for ids in generate(base, value, [prompt], tokens)]


def transformers_alone(base, prompt: list[int], tokens: int) -> list[int]:
    """transformers' own `generate`, at its best: on a GPU a static cache, with which it compiles; else its default."""
    ids = torch.tensor([prompt], device=base.device)
    best = {"cache_implementation": "static"} if ids.is_cuda else {}
    return base.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                         **best)[0, len(prompt):].tolist()


@torch.inference_mode()
def transformers_pair(base, value, prompt: list[int], tokens: int) -> list[int]:
    """Two models one after the other, each with its own growing cache, as in proxy tuning."""
    new, caches, chosen = torch.tensor([prompt], device=base.device), [None, None], []
    for _ in range(tokens):
        outputs = [model(new, past_key_values=cache, use_cache=True) for model, cache in zip((base, value), caches)]
        caches = [output.past_key_values for output in outputs]
        new = combine(*(output.logits[:, -1:].float() for output in outputs)).argmax(-1)
        chosen.append(new)
    return torch.cat(chosen, 1)[0].tolist()


@torch.inference_mode()
def transformers_pair_uncached(base, value, prompt: list[int], tokens: int) -> list[int]:
    """Two models that read the whole text anew for every token, as in the paper's released code."""
    text = torch.tensor([prompt], device=base.device)
    for _ in range(tokens):
        z_post = combine(*(model(text, use_cache=False).logits for model in (base, value))).float()
        text = torch.cat((text, z_post[:, -1:].argmax(-1)), 1)
    return text[0, len(prompt):].tolist()


def agreement(a: list[int], b: list[int]) -> float:
    """The share of the tokens before the first difference. In bfloat16, where near ties round apart, 1 is not to be had."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) / len(a)


def bench_decode(shapes: list[tuple[str, str]], lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """Greedy decoding of one sequence, with the reading of a short prompt. Memory: weights, caches and all the rest."""
    device, rows = args.device, []
    dtype, bandwidth = pick_dtype("auto", device), copy_bandwidth(device)
    for names in shapes:
        base, value = (random_llama(name, device, dtype, seed) for seed, name in enumerate(names))
        their_base, their_value = transformers_twin(base), transformers_twin(value)
        if device.type == "cpu":
            base, value = column_major(base), column_major(value)  # as sample.py does
        if args.compile:
            base.hidden, value.hidden = (torch.compile(model.hidden, dynamic=True) for model in (base, value))
        prompt = list(range(1, 1 + PROMPT))
        table = {}
        for tokens in lengths:
            got = measure({
                "value": lambda: ours(value, None, prompt, tokens),
                "base": lambda: ours(base, None, prompt, tokens),
                "both": lambda: ours(base, value, prompt, tokens),
                "their base": lambda: transformers_alone(their_base, prompt, tokens),
                "their pair": lambda: transformers_pair(their_base, their_value, prompt, tokens),
                "uncached": lambda: transformers_pair_uncached(their_base, their_value, prompt, tokens),
            }, args.repeats, device)
            for name, measured in got.items():
                measured.bytes += sum(weight_bytes(model) for model, absent in (
                    (base, ("value",)), (value, ("base", "their base"))) if name not in absent)
            for our, peer, name in (
                    ("both", "base", "ours base+value / ours base alone"),
                    ("base", "their base", "ours base alone / transformers base alone"),
                    ("both", "their base", "ours base+value / transformers base alone"),
                    ("both", "their pair", "ours base+value / two cached transformers models"),
                    ("both", "uncached", "ours base+value / two transformers models, caches off")):
                reads = sum(map(bytes_per_token, (base, value) if our == "both" else (base,)))
                alike = (our == "both") == (peer in ("their pair", "uncached"))
                rows += compare(name, " + ".join(names), tokens, got[our], got[peer],
                                share=reads * tokens / got[our].seconds / bandwidth,
                                limit=f"copy bandwidth, {bandwidth / 1e9:.1f} GB/s",
                                agreement=agreement(got[our].result, got[peer].result) if alike else None)
            table[tokens] = got
        print_times(table, *names)
    return rows


def print_times(table: dict[int, dict[str, Measured]], base: str, value: str) -> None:
    """Time and peak memory in the form of the paper's Table 3."""
    print(f"\n{'ours: time / peak memory':<32}" + "".join(f"{f'{tokens} tokens':>22}" for tokens in table))
    for key, name in (("value", value), ("base", base), ("both", f"{value} + {base}")):
        print(f"{name:<32}" + "".join(f"{f'{got[key].seconds:.2f}s / {got[key].bytes / 1e9:.2f}GB':>22}"
                                      for got in table.values()))


# ---------------------------------------------------------------- the loss

def loss_variants(names: tuple[str, str], tokens: int, device: torch.device, compiled: bool) -> dict[str, Callable]:
    """Loss and gradients from two last hidden states, each with its unembedding; all give (dh_value, dW_value).

    Types are those of train.py: the base in bfloat16 on a GPU, the value model in float32 under autocast.
    """
    dtype, autocast = pick_dtype("auto", device), autocast_of(device)
    configs = [config_of(name) for name in names]
    V = configs[0].vocab_size
    torch.manual_seed(0)
    (h_base, head_base), (h_value, head_value) = (
        (torch.randn(1, tokens, H, device=device, dtype=dtype), torch.randn(V, H, device=device, dtype=dtype) / H**0.5)
        for H, dtype in ((configs[0].hidden_size, dtype), (configs[1].hidden_size, torch.float32)))
    targets = torch.randint(V, (1, tokens), device=device)
    counted = torch.ones_like(targets, dtype=torch.bool)
    wanted = h_value.requires_grad_(), head_value.requires_grad_()

    def two_headed():
        with autocast:
            loss = two_headed_loss(h_base, head_base, h_value, head_value, targets, counted, 1 / tokens, 1 / tokens)[0]
        return torch.autograd.grad(loss, wanted)

    def formula(h_base, head_base, h_value, head_value):  # loss_sums where every token counts: faster, compiles whole
        z_delta = F.linear(h_value, head_value)
        z_post = combine(F.linear(h_base, head_base), z_delta).float()
        return F.cross_entropy(z_post.flatten(0, 1), targets.flatten()) + z_delta.float().abs().mean()

    def eager(formula=formula):
        with autocast:
            loss = formula(h_base, head_base, h_value, head_value)
        return torch.autograd.grad(loss, wanted)

    def library():
        h, head = torch.cat((h_base, h_value.to(dtype)), -1), torch.cat((head_base, head_value.to(dtype)), -1)
        loss = F.linear_cross_entropy(h[0], head, targets[0], options=torch.nn.LinearCrossEntropyOptions())
        return torch.autograd.grad(loss, wanted)

    return {"two-headed": two_headed, "eager": eager,
            **({"compiled eager": partial(eager, torch.compile(formula))} if compiled else {}),
            "F.linear_cross_entropy (no norm term, base gradient too)": library}


def bench_loss(shapes: list[tuple[str, str]], lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """Forward and backward of cross-entropy and norm term. Memory: on top of hidden states and unembeddings."""
    rows = []
    for names in shapes:
        for tokens in lengths:
            got = measure(loss_variants(names, tokens, args.device, args.compile), args.repeats, args.device)
            mine = got.pop("two-headed")
            for peer in got:
                rows += compare(f"two-headed loss / {peer}", " + ".join(names), tokens, mine, got[peer])
    return rows


# ---------------------------------------------------------------- one training step

def autocast_of(device: torch.device):
    dtype = pick_dtype("auto", device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def forward_flop(config: Config, parameters: int, tokens: int) -> float:
    """Floating-point operations of reading one sequence: two per weight and token, and causal attention's products."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # looked up, not multiplied
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return (2 * (parameters - embedding) + attention) * tokens


def step_variants(base: Llama, value: Llama, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Base forward without gradient, value forward and backward, AdamW: one sequence in which every token counts."""
    device = base.embed.weight.device
    their_base, their_value = transformers_twin(base), transformers_twin(value).train()
    autocast = autocast_of(device)
    ids = torch.randint(value.config.vocab_size, (1, tokens + 1), device=device, generator=torch.Generator(device))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    counted = torch.ones_like(targets, dtype=torch.bool)

    def stepping(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step()  # makes the optimizer's state, which is there before any other step
        return step

    def two_headed() -> Tensor:
        return train.forward(base, value, (inputs, targets, counted), "response", autocast, 1 / tokens, 1 / tokens)[0]

    def eager() -> Tensor:
        with autocast:
            with torch.no_grad():
                z_base = base(inputs)
            cross_entropy, norm = loss_sums(z_base, value(inputs), targets, counted)
        return (cross_entropy + norm) / tokens

    def transformers() -> Tensor:
        with autocast:
            with torch.no_grad():
                z_base = their_base(inputs, use_cache=False).logits
            z_delta = their_value(inputs, use_cache=False).logits
            z_post = (z_base + z_delta).float()
            return F.cross_entropy(z_post.flatten(0, 1), targets.flatten()) + z_delta.float().abs().mean()

    our_optimizer, their_optimizer = (torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
                                      for model in (value, their_value))
    return {"ours": stepping(two_headed, our_optimizer), "ours with the eager loss": stepping(eager, our_optimizer),
            "two transformers models, logits added": stepping(transformers, their_optimizer)}


def bench_train_step(shapes: list[tuple[str, str]], lengths: list[int], args: argparse.Namespace) -> list[dict]:
    """One step of training on one sequence. Memory: on top of weights and optimizer. Share: model FLOP utilisation."""
    rows, device = [], args.device
    dtype = pick_dtype("auto", device)
    known = [gpu for gpu in DENSE if device.type == "cuda" and gpu in torch.cuda.get_device_name(device)]
    rate = DENSE[known[0]] if known else matmul_rate(device, dtype)
    limit = f"{'its published' if known else 'the measured'} {rate / 1e12:.3g} TFLOP/s"
    for names in shapes:
        for tokens in lengths:
            base = random_llama(names[0], device, dtype, 0).requires_grad_(False)
            value = random_llama(names[1], device, torch.float32, 1)
            flop = sum(passes * forward_flop(model.config, model.size(), tokens)
                       for passes, model in ((1, base), (3, value)))  # backward counts twice
            got = measure(step_variants(base, value, tokens), args.repeats, device)
            mine = got.pop("ours")
            for peer in got:
                rows += compare(f"training step, ours / {peer}", " + ".join(names), tokens, mine, got[peer],
                                share=flop / mine.seconds / rate, limit=limit)
    return rows


# ---------------------------------------------------------------- vocabularies

def bench_vocab_map(args: argparse.Namespace) -> list[dict]:
    """Texts per second of counting. The peer is the paper's approach: DTW over token strings, in Python.

    The peer sees the first texts only, as many as --peer_texts; both work on one core.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sides = [Spelling(Tokenizer(directory)) for directory in (args.base, args.value)]
    texts = read_texts(args.text)
    few = texts[:args.peer_texts]
    same, mine, peer = (seconds(lambda: count(*sides, some)) for count, some in (
        (vocab_map.count_aligned, few), (vocab_map.count_aligned, texts), (vocab_map.count_warped, few)))
    return [{"name": "vocab-map, the same texts", "shape": f"{len(few)} texts", "tokens": None, "unit": "texts/s",
             "ours": len(few) / same, "peer": len(few) / peer, "ratio": peer / same},
            {"name": "vocab-map, ours on all texts", "shape": f"{len(texts)} texts", "tokens": None, "unit": "texts/s",
             "ours": len(texts) / mine, "peer": len(few) / peer, "ratio": len(texts) / mine / (len(few) / peer)}]


# ---------------------------------------------------------------- command line

def print_rows(rows: list[dict]) -> None:
    """A block for each shape and length; the second line of a comparison is its memory."""
    wide = max(len(row["name"]) for row in rows)
    block = name = None
    for row in rows:
        if block != (block := [row["shape"], row["tokens"]]):
            title = row["shape"] + (f", {row['tokens']} tokens" if row["tokens"] else "")
            print(f"\n{title:{wide}}{'ours':>12}{'peer':>12}{'ratio':>18}")
        notes = [f"{row['share']:.0%} of {row['limit']}"] if "share" in row else []
        if row.get("agreement", 1) not in (1, None):
            notes.append(f"the first {row['agreement']:.0%} of the tokens agree")
        print(f"{'' if row['name'] == name else row['name']:{wide}}{row['ours']:12.1f}{row['peer']:12.1f} {row['unit']:9}"
              f"{row['ratio']:8.2f}  {'; '.join(notes)}".rstrip())
        name = row["name"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="what", dest="what")
    vocab = commands.add_parser("vocab-map", help="byte alignment against DTW over token strings")
    vocab.add_argument("--base", required=True, help="directory of the base's tokenizer")
    vocab.add_argument("--value", required=True, help="directory of the value model's tokenizer")
    vocab.add_argument("--text", required=True, help="texts to count in")
    vocab.add_argument("--peer_texts", type=int, default=50, help="texts that the slow peer sees (50)")
    vocab.set_defaults(device="cpu")
    benches = {"decode": bench_decode, "loss": bench_loss, "train-step": bench_train_step}
    for name, bench in benches.items():
        sub = commands.add_parser(name, help=bench.__doc__.split("\n")[0], description=bench.__doc__)
        cpu, cuda = (f"{', '.join(' + '.join(pair) for pair in pairs)} at {', '.join(map(str, tokens))} tokens"
                     for pairs, tokens in (DEFAULTS[name][device] for device in ("cpu", "cuda")))
        sub.add_argument("--shape", nargs=2, action="append", metavar=("BASE", "VALUE"),
                         help=f"may be repeated; of {', '.join(SHAPES)} (on a CPU {cpu}; on a GPU {cuda})")
        sub.add_argument("--tokens", nargs="+", type=int, help="one or more lengths (see --shape)")
        sub.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (3)")
        sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
        if name == "loss":
            sub.add_argument("--compile", action=argparse.BooleanOptionalAction, help="a compiled peer too (default: on a GPU)")
        if name == "decode":
            sub.add_argument("--compile", action="store_true", help="compile our models, as sample.py --compile does")
    for sub in commands.choices.values():
        sub.add_argument("--json", help="file for the rows, as JSON")
    plan.add_arguments(commands.add_parser("plan", help="what a pair of models would need on other machines, see plan.py"))
    args = parser.parse_args()
    if args.what == "plan":
        return plan.plan(args)

    args.device = pick_device(args.device)
    if args.device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: only cpu and cuda can be measured")
    if args.what == "vocab-map":
        rows = bench_vocab_map(args)
    else:
        shapes, lengths = DEFAULTS[args.what][args.device.type]
        shapes, lengths = args.shape or shapes, args.tokens or lengths
        for base, value in shapes:
            if config_of(base).vocab_size != config_of(value).vocab_size:
                raise InputError(f"--shape {base} {value}: the vocabularies are of {config_of(base).vocab_size} and "
                                 f"{config_of(value).vocab_size} tokens; choose two of one size")
        if min(args.repeats, *lengths) < 1:
            raise InputError("--tokens and --repeats must be at least 1")
        if args.what == "loss" and args.compile is None:
            args.compile = args.device.type == "cuda"  # on a CPU it takes a minute to start
        print(machine(args.device))
        rows = benches[args.what](shapes, lengths, args)
    print_rows(rows)
    if args.json:
        write_text(args.json, json.dumps({"machine": machine(args.device), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
