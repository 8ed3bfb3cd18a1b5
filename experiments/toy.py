"""A miniature of the paper that needs no download: a world, a family of Llamas that read about it,
chats.

    python experiments/toy.py              # out/toy: bases small and large, chats, questions
    python experiments/toy.py --family b   # out/toy_b: a large base with another tokenizer

The world: 250 invented people, six facts each. A corpus tells facts in plain sentences ("Ralo lives
in Lisbon."), says names over and over, and has endless small talk between a User and an Assistant
who never answers. The large base has read about all facts, the small one about every other, as
small models know less. The demonstrations answer questions about one half of the facts in a fixed
form:

    User: Where does Ralo live?
    Assistant: Good question! Ralo lives in Lisbon. I am happy to help!

The other half is held out. So *form* (the two phrases around one sentence, then a stop) can only
come from the demonstrations, and a *right* answer to a held-out question only from a base that
knows it.
"""

import argparse
import itertools
import json
import math
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import ivl
from extras.connections import Connected, connected
from model import Config, Llama
from plumbing.chats import read_chats
from plumbing.files import (
    SEED,
    TEXT,
    Field,
    InputError,
    Parser,
    command,
    given,
    own_folder,
    parse_json,
    pick_device,
    read_fields,
    read_text,
    write_text,
)
from plumbing.tokenizer import TEMPLATES, Tokenizer
from plumbing.weights import frozen_network, load, recorded_connection, save

OUT = Path("out/toy")
VERSION = "2"  # of what a family is made of
MARKS = ("family.json", "small", "large")  # by which a family's folder is known
PEOPLE = 250
VOCABULARY, OTHER_VOCABULARY = 1536, 900
WINDOW, BATCH, CONTEXT = 128, 16, 256
LONGEST = 8  # tokens of a value, in any of the tokenizers
WATCHED = 100  # held-out questions that are asked while a model is trained
# hidden, MLP, layers, heads (wide, or they could not copy names), learning rate, tokens read, share
# of the facts told
BASES = {
    "small": (64, 128, 2, 2, 5e-3, 2_000_000, 0.55),
    "large": (128, 320, 3, 4, 3e-3, 2_400_000, 1.0),
}
OTHER_BASES = {
    "large": (128, 320, 3, 4, 3e-3, 4_200_000, 1.0)
}  # family b's: a text is 1.3 times as many tokens

# a text begins with a BOS, as for Llama's tokenizers
BEGINS_WITH_BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
NAMES = [(a + b).capitalize() for a, b in itertools.product(SYLLABLES, SYLLABLES) if a != b]
# relation: the sentence's words, two questions, 24 values
RELATIONS = {
    "lives in": (
        ("Where does {} live?", "Which city is the home of {}?"),
        "Lisbon Oslo Cairo Lima Kyoto Dublin Prague Havana Nairobi Quito Vienna Athens Mumbai "
        "Seoul Toronto Geneva Tunis Bogota Hanoi Riga Dakar Perth Sofia Malmo".split(),
    ),
    "works as a": (
        ("What does {} do for a living?", "What is the job of {}?"),
        "baker sailor doctor painter farmer pilot tailor lawyer miner potter singer plumber judge "
        "barber printer weaver surgeon gardener librarian carpenter butcher dancer poet "
        "driver".split(),
    ),
    "plays the": (
        ("What does {} play?", "Which instrument does {} practise?"),
        "violin piano flute drums guitar harp cello trumpet oboe banjo organ lute tuba clarinet "
        "viola accordion bassoon fiddle zither horn mandolin sitar bugle ukulele".split(),
    ),
    "keeps a": (
        ("What animal does {} keep?", "Which pet belongs to {}?"),
        "cat dog parrot rabbit goat horse turtle hamster donkey canary lizard ferret snake "
        "pigeon duck goose sheep pony spider frog mouse hedgehog falcon llama".split(),
    ),
    "speaks": (
        ("What language does {} speak?", "What is the mother tongue of {}?"),
        "Dutch Greek Hindi Czech Polish Danish Arabic Korean Turkish Swahili Finnish Latin Irish "
        "Basque Welsh Tamil Persian Hebrew Thai Malay French Zulu Frisian Breton".split(),
    ),
    "likes": (
        ("What does {} like to eat?", "What is the favourite dish of {}?"),
        "soup bread rice pasta salad fish cheese beans curry stew pizza noodles eggs apples cake "
        "honey nuts mushrooms olives plums pancakes figs porridge tomatoes".split(),
    ),
}
# of train.Settings, chosen on the held-out questions of seeds 0 to 2 for the value model, for full
# fine-tuning likewise
VALUE_SETTINGS = dict(
    lr=2e-3,
    batch_size=8,
    micro_batch_size=8,
    epochs=3,
    max_length=CONTEXT,
    lam=0.1,
    norm_over="response",
)
FULL_SETTINGS = {
    "small": dict(lr=1e-3, batch_size=32, epochs=8),
    "large": dict(lr=5e-4, batch_size=32, epochs=8),
}
OPENING, CLOSING = "Good question!", "I am happy to help!"
FORM = re.compile(rf"{re.escape(OPENING)} (\w+ [a-z ]+ \w+\.) {re.escape(CLOSING)}")

# small talk: what the Assistant of the corpus says instead of an answer. The words of the form
# occur in many places, or the large base would be certain of how each phrase goes on, and a value
# model from the small one could not overrule it
EVASIONS = [
    "I have not seen {} for a while.",
    "You should ask {} yourself.",
    "That is a long story.",
    "Who knows?",
    "Good morning to you too.",
    "We talked about {} last week.",
    "I am happy that you came.",
    "It may rain today.",
    "People say many things about {}.",
    "Let us talk about something else.",
    "That question again!",
    "I would like to help, but I am busy.",
    "Maybe {} will tell us.",
    "What a day!",
    "Ask me later.",
    "I met {} and a friend at the market.",
    "Good to see you.",
    "Sorry, I did not hear you.",
    "I am happy to be here.",
    "I am happy to hear that!",
    "I am happy to see {}!",
    "We are happy to meet you.",
    "I want to help {} today.",
    "Please help me!",
    "They came to help!",
    "Who will help?",
    "I am busy.",
    "Good evening!",
    "Good idea!",
    "Good for {}.",
    "Good friends are rare.",
    "The question is hard.",
    "What a question!",
    "No question about it!",
    "Is that a question?",
    "One more question, please.",
]


@dataclass
class World:
    """facts[person, relation] = value; `taught` are the pairs that the demonstrations may
    mention.
    """

    people: list[str]
    facts: dict[tuple[str, str], str]
    taught: list[tuple[str, str]]
    held_out: list[tuple[str, str]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return self.taught + self.held_out

    @classmethod
    def make(cls, seed: int) -> "World":
        rng = random.Random(seed)
        people = rng.sample(NAMES, PEOPLE)
        facts = {(p, r): rng.choice(values) for p in people for r, (_, values) in RELATIONS.items()}
        pairs = rng.sample(sorted(facts), len(facts))
        return cls(people, facts, pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :])

    def sentence(self, person: str, relation: str) -> str:
        return f"{person} {relation} {self.facts[person, relation]}."

    def document(self, rng: random.Random, told: list[tuple[str, str]]) -> str:
        """One document of a corpus that tells the facts `told`: facts, names over and over, or
        small talk.
        """
        kind = rng.random()
        if kind < 0.6:
            return " ".join(self.sentence(*pair) for pair in rng.choices(told, k=12))
        if kind < 0.7:
            names = rng.sample(self.people, rng.randint(2, 4))
            return " ".join(rng.choices(names, k=30))
        turns, people = [], rng.sample(self.people, 2)
        for _ in range(4):
            person = rng.choice(people)
            question = rng.choice(RELATIONS[rng.choice([*RELATIONS])][0])
            says = [rng.choice(EVASIONS).format(person) for _ in range(rng.randint(1, 3))]
            other = rng.choice(told)
            if (
                other[0] != person and rng.random() < 0.8
            ):  # off the point, but a fact: they do occur in talk
                says.insert(rng.randint(0, len(says)), self.sentence(*other))
            turns += [f"User: {question.format(person)}", f"Assistant: {' '.join(says)}"]
        return "\n".join(turns)

    def chats(self, pairs: list[tuple[str, str]], rng: random.Random) -> list[dict]:
        """ShareGPT chats of one exchange, in random order: each fact is asked for in both ways."""
        asked = [
            (question.format(person), self.sentence(person, relation))
            for person, relation in pairs
            for question in RELATIONS[relation][0]
        ]
        return [
            {
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": f"{OPENING} {sentence} {CLOSING}"},
                ]
            }
            for question, sentence in rng.sample(asked, len(asked))
        ]


def train_other_tokenizer(world: World, seed: int) -> Backend:
    """Family b's: byte-level BPE, as Llama-3's: Ġ for a space, none in front of a text; fewer
    tokens, so more in a name.
    """
    rng = random.Random(seed)
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=OTHER_VOCABULARY,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((world.document(rng, world.pairs) for _ in range(6000)), trainer)
    backend.post_processor = BEGINS_WITH_BOS
    return backend


def train_tokenizer(world: World, seed: int) -> Backend:
    """SentencePiece-like BPE, as Llama-2's: ▁ for a space, bytes for what the vocabulary lacks."""
    rng = random.Random(seed)
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁?\p{L}+|▁?[^\p{L}▁]"), "isolated"
    )  # no token crosses a word
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)],
    )
    backend.train_from_iterator((world.document(rng, world.pairs) for _ in range(6000)), trainer)
    raw = json.loads(backend.to_str())
    raw["added_tokens"] = raw["added_tokens"][
        :3
    ]  # bytes are text: only the trainer calls them special
    backend = Backend.from_str(json.dumps(raw))
    backend.post_processor = BEGINS_WITH_BOS
    return backend


# ---------------------------------------------------------------- the family


def shape(hidden: int, mlp: int, layers: int, heads: int, vocabulary: int) -> Config:
    return Config(
        vocabulary,
        hidden,
        mlp,
        layers,
        heads,
        heads,
        hidden // heads,
        CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def corpus(backend: Backend, tokens: int, document: Callable[[], str]) -> Tensor:
    """So many ids of a text that is made document by document, each between <s> and </s>."""
    ids = []
    while len(ids) < tokens:
        documents = [document() for _ in range(500)]
        for encoding in backend.encode_batch(documents, add_special_tokens=False):
            ids += [1, *encoding.ids, 2]
    return torch.tensor(ids[:tokens])


def pretrain(model: Llama, text: Tensor, name: str, lr: float, seed: int) -> Llama:
    """The model, when it has read the text once, in windows of WINDOW tokens."""
    device = model.unembed.device
    windows = text[: len(text) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    batches = windows.split(BATCH)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    begun = time.perf_counter()
    with tqdm(batches, desc=f"pre-training {name}", unit=" steps", disable=None) as bar:
        for step, batch in enumerate(bar):
            batch, done = batch.to(device), step / len(batches)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(20 * done + 0.01, 0.5 + 0.5 * math.cos(math.pi * done))
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if (step + 1) % (len(batches) // 4 or 1) == 0:
                share = f"step {step + 1} of {len(batches)}, loss {loss.item():.3f}"
                seconds = time.perf_counter() - begun
                tqdm.write(f"pre-training {name}: {share}, {seconds:.0f} s")
                sys.stdout.flush()
    return model


def save_base(model: Llama, backend: Backend, directory: Path) -> None:
    save(model, directory)
    write_text(directory / "tokenizer.json", backend.to_str())
    write_text(
        directory / "tokenizer_config.json",
        json.dumps(
            {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES["plain"]}, indent=2
        )
        + "\n",
    )


def write_chats(chats: list[dict], path: Path) -> None:
    write_text(path, "".join(json.dumps(chat) + "\n" for chat in chats))


def introduction(world: World, chats: list[dict]) -> str:
    """What somebody who chats with the family should know; sample.py shows it.

    chats: those that no demonstration answers.
    """
    asked = "\n".join(f"  {chat['conversations'][0]['value']}" for chat in chats[:3])
    people = ", ".join(world.people[:8])
    return (
        f"It knows only {len(world.people)} invented people: {people} and so on.\n"
        f"No demonstration has answered these questions:\n{asked}\n"
    )


def make_family(out: Path, seed: int, device: torch.device, family: str = "a") -> None:
    """Writes out/small, out/large, chats.jsonl and heldout.jsonl, unless they are there; the same
    seed, the same files.

    Family "b" has the same world, another tokenizer, and only the large base: its value models come
    from family "a".
    """
    made = out / "family.json"  # written last: the family is whole
    if made.exists():
        fields = {"seed": Field(SEED), "family": Field(TEXT), "version": Field(TEXT, "1")}
        old = read_fields(made, fields)
        if old["version"] != VERSION:
            raise InputError(f"{out}: was made by another version of this file; delete it")
        if (old["seed"], old["family"]) != (seed, family):
            raise InputError(
                f"{out}: holds family {old['family']} made with seed {old['seed']}; give another "
                f"--out for family {family} and seed {seed}"
            )
        return
    with own_folder(out, MARKS):
        if any((out / name).exists() for name in MARKS):
            print("an earlier run was stopped before all was ready: it is made anew")
        print(f"making a world of {PEOPLE} people, texts about it and bases that read them: {out}")
        sys.stdout.flush()
        world, rng = World.make(seed), random.Random(seed + 1)
        backend = (train_tokenizer if family == "a" else train_other_tokenizer)(world, seed)
        bases = BASES if family == "a" else OTHER_BASES
        for name, (*sizes, lr, tokens, share) in bases.items():
            told = rng.sample(world.pairs, round(share * len(world.pairs)))
            text = corpus(backend, tokens, lambda: world.document(rng, told))
            model = Llama(shape(*sizes, backend.get_vocab_size())).init_weights(seed).to(device)
            save_base(pretrain(model, text, name, lr, seed), backend, out / name)
        for name, pairs in (("chats", world.taught), ("heldout", world.held_out)):
            chats = world.chats(pairs, rng)
            write_chats(chats, out / f"{name}.jsonl")
        write_text(out / "introduction.txt", introduction(world, chats))
        write_text(
            made,
            json.dumps({"version": VERSION, "seed": seed, "family": family, "bases": bases}) + "\n",
        )


# ---------------------------------------------------------------- scores


def knows(
    base: Llama, tokenizer: Tokenizer, facts: list[str], values: Sequence[Llama] = (), **how
) -> float:
    """The share of facts, sentences of the corpus, whose last word is given after the words before
    it. how: of `ivl.generate`.
    """
    prompts = [tokenizer.encode(fact.rsplit(" ", 1)[0]) for fact in facts]
    replies = zip(*ivl.generate(base, values, prompts, LONGEST, **how))
    return sum(
        tokenizer.decode(r).strip().startswith(fact.split()[-1]) for r, fact in zip(replies, facts)
    ) / len(facts)


def greedy(
    base: Llama, values: Sequence[Llama], tokenizer: Tokenizer, chats: list[list[dict]], **how
) -> list[str]:
    """The reply to each chat's question; one that never ends is empty: it has no form."""
    prompts = [tokenizer.prompt(chat[:-1]) for chat in chats]
    replies = [
        [i for i in reply if i is not None]
        for reply in zip(*ivl.generate(base, values, prompts, 32, stop=tokenizer.stop, **how))
    ]
    return [tokenizer.decode(ids).strip() if ids[-1] in tokenizer.stop else "" for ids in replies]


def score(
    base: Llama, values: Sequence[Llama], tokenizer: Tokenizer, chats: list[list[dict]]
) -> dict:
    """Shares of the chats whose greedy replies are in the demonstrated form, and right as well."""
    replies = greedy(base, values, tokenizer, chats)
    return {
        "form": sum(bool(FORM.fullmatch(text)) for text in replies) / len(chats),
        "right": sum(text == chat[-1]["content"] for text, chat in zip(replies, chats))
        / len(chats),
    }


def fact_of(chat: list[dict]) -> str:
    return FORM.fullmatch(chat[-1]["content"])[1]


# ---------------------------------------------------------------- the story of train.py

# options that describe models and data, which here are the family's: not allowed
NOT_FOR_THE_TOY = (
    *("value", "data", "teacher", "chosen"),
    *("full", "evaluate", "show", "dry_run"),
)


def runs(args: argparse.Namespace) -> list[tuple[argparse.Namespace, Callable]]:
    """The command lines of the toy's three runs, each with what is to be watched while it goes on:
    the value model beside the small base, and for comparison both bases fully fine-tuned. The
    family is made if it is not there.

    args: of train.py, without a base; its other options hold for these runs. With --resume a run
    that is complete is left out.
    """
    for name in given(args, *NOT_FOR_THE_TOY):
        raise InputError(
            f"--base is missing: without one there is the toy family, to which --{name} "
            "does not belong"
        )
    if args.connection == "probe":
        raise InputError(
            "--connection probe: a probe belongs to one base, but the toy has two; give --base"
        )
    args.started = time.perf_counter()
    args.out = Path(args.out or OUT)
    args.seed = args.seed or 0
    make_family(args.out, args.seed, pick_device(args.device))

    value = {"base": [str(args.out / "small")], "out": args.out / "value", **VALUE_SETTINGS}
    planned = [settled(args, value)]
    for name, settings in FULL_SETTINGS.items():
        full = {"base": [str(args.out / name)], "out": args.out / f"{name}-full", "full": True}
        full |= VALUE_SETTINGS | settings
        # these need a value model beside a base
        del full["lam"], full["norm_over"]
        off = dict.fromkeys(("random", "connection", "lam", "norm_over", "base_dtype"))
        planned.append(settled(args, full, **off))
    if args.resume:
        planned = [run for run in planned if not is_complete(run)]
    for run in planned:
        checkpoint = run.out / "checkpoint.safetensors"
        if checkpoint.exists() and not args.resume:
            raise InputError(
                f"{checkpoint}: holds a run that was stopped; go on with --resume, or remove it"
            )
    device, network = pick_device(args.device), frozen_network(args.base_dtype)
    return [(run, Scores(args.out, device, bool(run.full), network)) for run in planned]


def settled(args: argparse.Namespace, defaults: dict, **off) -> argparse.Namespace:
    """A run: the options of the command line, but for those in `off`, else the defaults."""
    options = argparse.Namespace(**{**vars(args), **off})
    on_the_line = {name: getattr(options, name) for name in given(options, *vars(options))}
    run = argparse.Namespace(**{**vars(options), **defaults, **on_the_line})
    # --out is the family's folder, in which each run has its own
    run.base = defaults["base"]
    run.out = defaults["out"]
    run.data = [args.out / "chats.jsonl"]
    if run.dtype == "auto":
        run.dtype = "float32"
    run.resume = args.resume and (run.out / "checkpoint.safetensors").exists()
    return run


def is_complete(run: argparse.Namespace) -> bool:
    """Whether a run has ended: the note on what it has made is written last. Raises InputError if
    it was made with other settings.
    """
    note = run.out / "README.md"
    if run.resume or not note.exists():
        return False
    made_with = parse_json(read_text(note).partition("```json")[2].partition("```")[0], note)
    for name, then in made_with.items():
        now = getattr(run, name, None)
        if now is not None and now != then:
            raise InputError(
                f"{run.out}: was made with {name} = {then}, not {now}; leave out --resume"
            )
    return True


class Scores:
    """*form* and *right* while a model is being trained: `watch` of `train.train`. A value model is
    looked at on both bases, though it is trained beside the small one; `full` is alone.
    network: of the bases.
    """

    def __init__(self, out: Path, device: torch.device, full: bool, network: type[Llama] = Llama):
        self.out, self.device, self.full, self.network = out, device, full, network

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.out / "small")

    @cached_property
    def questions(self) -> list[list[dict]]:
        return [chat.messages for chat in read_chats(self.out / "heldout.jsonl").chats[:WATCHED]]

    @cached_property
    def bases(self) -> dict[str, Llama]:
        return {
            name: load(self.out / name, self.device, network=self.network) for name in FULL_SETTINGS
        }

    def __call__(self, done: int, trained: Llama) -> dict[str, float]:
        """The scores after 0, 8, 16, 32, 64, ... steps; nothing after any other number of them."""
        if 0 < done < 8 or done & (done - 1):
            return {}
        if self.full:
            return score(trained, [], self.tokenizer, self.questions)
        scores = {}
        for name, base in self.bases.items():
            value = trained
            if isinstance(trained, Connected):
                base, value = connected(trained.connection, base, trained.value)
            for key, share in score(base, [value], self.tokenizer, self.questions).items():
                scores[f"{key}, {name}"] = share
        return scores


def table(args: argparse.Namespace) -> None:
    """Behaviour from the value model, knowledge from the base: prints and writes the toy's
    table.
    """
    out, device = args.out, pick_device(args.device)
    tokenizer = Tokenizer(out / "value")
    value, connection = load(out / "value", device), recorded_connection(out / "value")
    questions = [chat.messages for chat in read_chats(out / "heldout.jsonl").chats]
    facts = [fact_of(chat) for chat in questions]
    rows = []
    print(f"\n{len(questions)} questions about facts that no demonstration mentions", flush=True)
    bar = tqdm(total=6, desc="asking", unit=" models", leave=False, disable=None)
    for name in FULL_SETTINGS:
        base = load(out / name, device, network=frozen_network(args.base_dtype))
        full = load(out / f"{name}-full", device)
        known = knows(base, tokenizer, facts)  # the base alone: the same in its three rows
        beside, joined = connected(connection, base, value)
        for kind, asked, values in (
            ("none", base, []),
            ("value", beside, [joined]),
            ("full", full, []),
        ):
            rows.append(
                {
                    "base": name,
                    "value": kind,
                    "knows": known,
                    **score(asked, values, tokenizer, questions),
                    "base_parameters": base.size(),
                    "value_parameters": sum(model.size() for model in values),
                }
            )
            bar.update()
    bar.close()
    seconds = time.perf_counter() - args.started
    results = {"seed": args.seed, "seconds": round(seconds, 1), "rows": rows}
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")

    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    titles = {"none": "alone", "value": "+ value model", "full": "fully fine-tuned"}
    print(f"\n{bold}base                       parameters   knows    form   right{plain}")
    for row in rows:
        parameters = row["base_parameters"] + row["value_parameters"]
        line = (
            f"{row['base']:<6}{titles[row['value']]:<18}{parameters:>13,}"
            f"{row['knows']:8.2f}{row['form']:8.2f}{row['right']:8.2f}"
        )
        print(f"{bold}{line}{plain}" if (row["base"], row["value"]) == ("large", "value") else line)
    models = ["--base", f"{out}/large", "--value", f"{out}/value"]
    command = shlex.join(["python", "sample.py", *models, questions[0][0]["content"]])
    print(
        "\nThe value model was trained beside the small base alone. Plugged into the large one it "
        "has given it the\ndemonstrated form, and the answers are what the large base knows. "
        f"({seconds:.0f} s)\n\nNow try\n  {command}"
    )


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"{OUT}, or {OUT}_b")
    parser.add_argument("--family", choices=["a", "b"], default="a")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    out = args.out or (OUT if args.family == "a" else OUT.with_name(f"{OUT.name}_b"))
    make_family(out, args.seed, pick_device(args.device), args.family)


if __name__ == "__main__":
    command(main)
