"""Speculative decoding against plain decoding of the same pair.

    python experiments/bench.py speculative --base DIR --draft SMALL --value DIR --prompts FILE
    python experiments/bench.py speculative --shape 58m 24m 24m --share 0.8     # random weights
    python experiments/bench.py speculative --base_dtype int8                   # base and draft

All ways to decode take turns, greedily, over the same prompts: plain, and with some numbers of
drafted tokens. Models with random weights agree about nothing, so there a coin decides which
drafted tokens stand: --share is the probability that one does. Beside the measured speed-up stands
the predicted one. It takes from the run how many tokens a round gave, and what a round costs from
the time that each model takes to read.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import sample
from experiments.bench_measure import seconds
from experiments.bench_sides import PROMPT, check_pair, decoder, random_llama
from extras import speculative
from extras.int8 import rounded
from extras.speculative import Drafts, leading
from model import Llama, column_major
from plumbing.chats import read_prompts
from plumbing.files import InputError, given, number, pick_dtype, whole
from plumbing.pair import Speaker

SHAPES = {
    "cpu": ("58m", "24m", "24m"),
    "cuda": ("llama-2-7b", "tinyllama-1.1b", "tinyllama-1.1b"),
}
LENGTHS = [1, 2, 4, 8]  # of drafts
DIRECTORIES = ("base", "draft", "value", "prompts")
READS = 9  # of which the median is the time of a read


@contextmanager
def coin(share: float) -> Iterator[None]:
    """In the block each drafted token stands with this probability, whatever the models say."""
    verify = speculative.verify_likeliest
    generator = torch.Generator().manual_seed(0)

    def by_coin(drafted: Tensor, z_post: Tensor) -> tuple[Tensor, Tensor]:
        _, new = verify(drafted, z_post)  # for the time it takes
        return leading(torch.rand(drafted.shape, generator=generator) < share), new

    speculative.verify_likeliest = by_coin
    try:
        yield
    finally:
        speculative.verify_likeliest = verify


# ---------------------------------------------------------------- what a round should cost


def reading_time(model: Llama, rows: int, tokens: int) -> float:
    """Seconds in which `model` reads so many tokens of each row at once, after a short prompt."""
    device = model.unembed.device
    reader = model.reader(rows, len(PROMPT) + tokens)
    prompts = torch.tensor([PROMPT] * rows)
    times = []
    with torch.inference_mode():
        reader.read(prompts)
        for _ in range(READS):
            times.append(
                seconds(lambda: reader.read_each(prompts[:, :1].repeat(1, tokens)), device)
            )
            reader.back_to([len(PROMPT)] * rows)
    return statistics.median(times)


def predicted(k: int, stood: float, times: dict[tuple[str, int], float]) -> float:
    """How many times faster than plain decoding rounds of k drafted tokens should be.

    stood: how many of them stand, on average. times: in which base, draft and value read so many
    tokens at once.

    Example: of two drafted tokens one stands: two tokens a round. The base takes 8 for a token and
    9 for three, the others 1 each: 2 · (8 + 1) against 9 + 2 · 1 + 3 · 1
    >>> times = {("base", 1): 8, ("base", 3): 9, ("draft", 1): 1, ("value", 1): 1}
    >>> round(predicted(2, 1.0, times), 3)
    1.286
    """
    plain = (stood + 1) * (times["base", 1] + times["value", 1])
    return plain / (times["base", k + 1] + k * times["draft", 1] + (k + 1) * times["value", 1])


# ---------------------------------------------------------------- the bench


@dataclass
class Trio:
    """What is decoded with, and what is asked."""

    base: Llama
    draft: Llama
    value: Llama
    names: str
    batches: list[list[list[int]]]
    how: dict  # options of both
    never: list[int]  # ids that are not chosen
    chance: AbstractContextManager  # in which they run


def from_directories(args: argparse.Namespace) -> Trio:
    """As sample.py has them. Raises InputError."""
    for name in DIRECTORIES:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing: --{', --'.join(DIRECTORIES)} go together")
    for name in given(args, "shape", "share"):
        raise InputError(f"--{name} is for random weights; leave it out")
    models = {name: getattr(args, name) for name in ("base", "draft", "value")}
    words = [word for name, model in models.items() for word in (f"--{name}", str(model))]
    words += ["--device", str(args.device)]
    if args.base_dtype:
        words += ["--base_dtype", args.base_dtype]
    speaker = Speaker(sample.arguments(words))
    chats = read_prompts(args.prompts)[: args.limit]
    prompts = [speaker.prompt(messages) for messages in chats]
    size = args.batch_size
    (value,) = speaker.values
    common = {"tokens": args.tokens, "stop": speaker.tokenizer.stop}
    return Trio(
        speaker.base,
        speaker.drafts.draft,
        value,
        " + ".join(f"{model.parent.name}/{model.name}" for model in models.values()),
        [prompts[i : i + size] for i in range(0, len(prompts), size)],
        {**common, "vocabulary": speaker.vocabulary},
        sorted(speaker.differing),
        nullcontext(),
    )


def from_shapes(args: argparse.Namespace) -> Trio:
    """With random weights. Raises InputError."""
    names = args.shape or SHAPES[args.device.type]
    for name in names[1:]:
        check_pair(names[0], name)
    dtype = pick_dtype("auto", args.device)
    models = [random_llama(name, args.device, dtype, seed) for seed, name in enumerate(names)]
    if args.base_dtype:
        models[:2] = map(rounded, models[:2])
    if args.device.type == "cpu":
        for model in models:
            column_major(model)
    base, draft, value = models
    return Trio(
        *models,
        " + ".join(names),
        [[PROMPT] * args.batch_size],
        {"tokens": args.tokens},
        [],
        coin(0.8 if args.share is None else args.share),
    )


def bench(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Speculative decoding against plain decoding of the same pair, in tokens per second."""
    directories = given(args, *DIRECTORIES)
    trio = from_directories(args) if directories else from_shapes(args)
    ways = {"plain": decoder(trio.base, trio.value)}
    drafts = {}
    for k in args.drafted:
        name = f"{k} drafted"
        drafts[name] = Drafts(trio.draft, k, trio.never)
        ways[name] = decoder(trio.base, trio.value, rounds=drafts[name].rounds)

    def run(decode: Callable) -> list[list[int]]:
        """All replies."""
        replies = []
        for prompts in trio.batches:
            for row in zip(*decode(prompts, **trio.how)):
                replies.append([i for i in row if i is not None])
        return replies

    # once to warm up, for the replies and the rounds; then all ways take turns on the clock
    with trio.chance:
        replies = {name: run(way) for name, way in ways.items()}
        stood = {name: each.drafted * each.stood / each.tried for name, each in drafts.items()}
        clock = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                clock[name].append(seconds(partial(run, way), args.device))

    times = reading_times(trio, len(trio.batches[0]), args.drafted)
    speed = {}
    for name in ways:
        tokens = sum(map(len, replies[name]))
        speed[name] = tokens / statistics.median(clock[name])
    for name, each in drafts.items():
        same = sum(map(list.__eq__, replies[name], replies["plain"]))
        note = f"{stood[name]:.2f} of {each.drafted} drafted tokens stand a round"
        note += f"; predicted {predicted(each.drafted, stood[name], times):.2f}"
        if directories:
            note += f"; {same} of {len(replies[name])} replies are the same"
        row = {
            "name": f"speculative, {name} / plain",
            "shape": trio.names + (" int8" if args.base_dtype else ""),
            "tokens": args.tokens,
            "unit": "tokens/s",
            "ours": speed[name],
            "peer": speed["plain"],
            "ratio": speed[name] / speed["plain"],
            "note": note,
        }
        yield [row]


def reading_times(trio: Trio, rows: int, drafts: list[int]) -> dict[tuple[str, int], float]:
    """For `predicted`: what a step of each model takes, and what verifying takes."""
    times = {}
    for name, model in [("draft", trio.draft), ("value", trio.value)]:
        times[name, 1] = reading_time(model, rows, 1)
    for k in {0, *drafts}:
        times["base", k + 1] = reading_time(trio.base, rows, k + 1)
    return times


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", type=Path, help="directory of the large base")
    add("--draft", type=Path, help="directory of the small base")
    add("--value", type=Path, help="directory of the value model")
    add("--prompts", help="what is asked, as in sample.py; with the three directories")
    add("--limit", type=whole(1, 10**6), default=500, help="only the first so many of them (500)")
    add(
        "--shape",
        nargs=3,
        metavar=("BASE", "DRAFT", "VALUE"),
        help=f"random weights instead (on a CPU {' '.join(SHAPES['cpu'])}; on a GPU "
        f"{' '.join(SHAPES['cuda'])})",
    )
    add("--share", type=number(0, 1), help="... of drafted tokens that stand (0.8)")
    add("--base_dtype", choices=["int8"], help="of base and draft, as in sample.py")
    add("--drafted", nargs="+", type=whole(1, 64), default=LENGTHS, help="tokens a round (1 2 4 8)")
    add("--tokens", type=whole(2, 10**6), default=128, help="new tokens at most (128)")
    add("--batch_size", type=whole(1, 10**4), default=1, help="prompts at a time (1)")
    add("--repeats", type=whole(1, 1000), default=3, help="runs of which the median counts (3)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda, cuda:1")
