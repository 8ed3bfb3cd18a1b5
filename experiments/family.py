"""The miniature that reproduce.py asks the paper's questions of: toy.py's world with more to do,
and a larger family.

The world: 240 people, six facts, a friend, a cousin and a neighbour each. A chat opens with an
instruction, or none, that decides the form of the reply; a two-step question asks for a fact about
somebody's friend, cousin or neighbour:

    User: Say it twice. Where does Ralo live?
    Assistant: Ralo lives in Lisbon. And again: Ralo lives in Lisbon.
    User: What does the friend of Ralo play?
    Assistant: First, Ralo is a friend of Mira. So Mira plays the harp.

The family: bases that differ in size and in how many of the facts they have read, what a smaller
one has read, a larger one has; `continued`, the medium one after it has read of 60 new people;
`other` and `other-small`, with another tokenizer. The demonstrations, of one half of the facts:
`general`, few and of all forms, and `skill`, more and mostly of two steps. Questions are about the
other half. Scores, in shares of them:

    form      replies in the instructed form, whatever they say
    right     form and fact
    skill     two-step questions whose reply holds the second step's fact, in any form
    few-shot  facts completed after three others, as plain text without a chat
    new       right, about the new people
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer as Backend

from experiments import toy
from model import Llama
from plumbing.chats import read_chats
from plumbing.files import LIST, TABLE, InputError, read_json, writable_folder, write_text
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

SCORES = ("form", "right", "skill", "few-shot", "new")
# hidden, layers, learning rate, tokens read, share of the facts told;
# MLP 2.5 and heads 1/32 of hidden
BASES = {
    "small": (64, 2, 5e-3, 1_800_000, 0.3),
    "medium": (96, 3, 4e-3, 2_000_000, 0.55),
    "large": (128, 3, 3e-3, 2_200_000, 0.8),
    "xlarge": (192, 4, 2e-3, 2_200_000, 1.0),
    # texts of more tokens. It is told a little more than `small`, and then knows as much
    "other-small": (64, 3, 5e-3, 4_400_000, 0.36),
    "other": (128, 3, 3e-3, 4_400_000, 0.8),
}
CONTINUED_FROM = "medium"  # as CodeLlama-7B is a continued Llama-2-7B
CONTINUED = (1e-3, 800_000, 0.25)  # learning rate, tokens read, share of them about the old people
PEOPLE, NEWCOMERS = 240, 60
# general demonstrations in each set; the skill set has about 2100 of two steps besides
GENERAL, SKILL = 1500, 700
ASKED = 300  # questions of each kind
LINKS = {f"is a {link} of": link for link in ("friend", "cousin", "neighbour")}
QUESTIONS = {relation: questions for relation, (questions, _) in toy.RELATIONS.items()} | {
    relation: (f"Who is the {link} of {{}}?", f"Who does {{}} call a {link}?")
    for relation, link in LINKS.items()
}
SENTENCE = r"[A-Z]\w+ [a-z ]+ \w+\."
STYLES = {
    "": f"{toy.OPENING} {{0}} {toy.CLOSING}",
    "Be brief. ": "{0}",
    "Say it twice. ": "{0} And again: {0}",
    "I am {1}. ": "Dear {1}, this is it. {0}",
}
# words of the forms in other places, see toy.EVASIONS
EVASIONS = toy.EVASIONS + [
    "Dear me!",
    "Dear {}, good morning.",
    "My dear {}!",
    "This is not the time.",
    "It is late.",
    "Is it?",
    "And again it rains!",
    "And then?",
    "Here we are again.",
    "Not again!",
    "You were first.",
    "First things first.",
    "Dear friends!",
    "Dear all, hello.",
    "And again {}!",
    "And again?",
    "This is {}.",
    "All this is new.",
    "First {}, please.",
    "So {} is here.",
    "So it is.",
    "So what?",
    "You are brief today.",
    "I said it twice.",
]


@dataclass
class World(toy.World):
    """toy.World with links between people among its facts; of the newcomers only the continued base
    has read.
    """

    newcomers: list[str]
    new_facts: dict[tuple[str, str], str]

    @classmethod
    def make(cls, people: int, newcomers: int, seed: int = 0) -> "World":
        rng = random.Random(seed)
        names = rng.sample(toy.NAMES, people + newcomers)

        def facts_of(group: list[str]) -> dict[tuple[str, str], str]:
            """What is true of these people, whose friends are among them."""
            facts = {}
            for person in group:
                for relation, (_, values) in toy.RELATIONS.items():
                    facts[person, relation] = rng.choice(values)
            for person in group:
                for link in LINKS:
                    facts[person, link] = rng.choice([other for other in group if other != person])
            return facts

        old, new = facts_of(names[:people]), facts_of(names[people:])
        pairs = rng.sample([*old], len(old))
        taught, held_out = pairs[::2], pairs[1::2]
        return cls(names[:people], old | new, taught, held_out, names[people:], new)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return self.taught + self.held_out + [*self.new_facts]

    def document(self, rng: random.Random, told: list[tuple[str, str]]) -> str:
        """One document of a corpus that tells the facts `told`: facts, names over and over, or
        talk.

        In talk a question is mostly answered if the corpus has the answer, somewhere between
        remarks of no use.
        """
        kind = rng.random()
        everybody = self.people + self.newcomers  # the new are heard of, but nothing is told
        if kind < 0.6:
            return " ".join(self.sentence(*pair) for pair in rng.choices(told, k=12))
        if kind < 0.7:
            return " ".join(rng.choices(rng.sample(everybody, rng.randint(2, 4)), k=30))

        turns, known = [], set(told)
        for _ in range(4):
            # a question, mostly one that the corpus answers, perhaps of two steps
            if rng.random() < 0.7:
                person, relation = rng.choice(told)
            else:
                person, relation = rng.choice(everybody), rng.choice([*QUESTIONS])
            about, facts = person, [(person, relation)]
            if relation in LINKS and rng.random() < 0.7:
                about = f"the {LINKS[relation]} of {person}"
                relation = rng.choice([*QUESTIONS])
                facts.append((self.facts[facts[0]], relation))

            # remarks, and mostly the answer among them
            says = [rng.choice(EVASIONS).format(person) for _ in range(rng.randint(1, 3))]
            if known.issuperset(facts) and rng.random() < 0.8:
                place = rng.randint(0, len(says))
                says.insert(place, " ".join(self.sentence(*pair) for pair in facts))

            style = rng.choice([*STYLES]).format(person, rng.choice(everybody))
            question = rng.choice(QUESTIONS[relation]).format(about)
            turns += [f"User: {style}{question}", f"Assistant: {' '.join(says)}"]
        return "\n".join(turns)

    def general(self, pairs: list[tuple[str, str]], count: int, rng: random.Random) -> list[dict]:
        """Chats of one exchange: any of the facts, asked in any way and after any instruction."""
        chats = []
        for person, relation in rng.choices(pairs, k=count):
            style = rng.choice([*STYLES])
            asker = rng.choice(self.people)
            question = rng.choice(QUESTIONS[relation]).format(person)
            reply = STYLES[style].format(self.sentence(person, relation), asker)
            chats.append(exchange(style.format(person, asker) + question, reply))
        return chats

    def two_steps(self, pairs: list[tuple[str, str]]) -> list[dict]:
        """Chats of one exchange: facts about friends, cousins, neighbours. Both of their facts are
        among the pairs.
        """
        known = set(pairs)
        chats = []
        for person, link in pairs:
            if link not in LINKS:
                continue
            other = self.facts[person, link]
            for relation in toy.RELATIONS:
                if (other, relation) not in known:
                    continue
                reply = f"First, {self.sentence(person, link)} So {self.sentence(other, relation)}"
                for question in QUESTIONS[relation]:
                    asked = question.format(f"the {LINKS[link]} of {person}")
                    chats.append(exchange(asked, reply))
        return chats


def exchange(question: str, reply: str) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    }


# ---------------------------------------------------------------- the family


def scaled(n: float, scale: float, step: int = 1) -> int:
    """n times the scale, in whole steps, at least one."""
    return max(1, round(n * scale / step)) * step


def prepare(out: Path, scale: float, seed: int) -> World:
    """The world of this scale and seed; writes its demonstrations and questions to out, unless they
    are there.
    """
    world = World.make(max(12, scaled(PEOPLE, scale)), max(6, scaled(NEWCOMERS, scale)), seed)
    made = out / "family.json"  # written last: all else is there
    if made.exists():
        old = read_json(made, TABLE)
        for field, now in (("scale", scale), ("seed", seed)):
            if old[field] != now:
                raise InputError(
                    f"{out}: was made with {field} {old[field]}; give another --out for "
                    f"{field} {now}"
                )
        return world
    writable_folder(out)
    rng = random.Random(seed + 1)
    general, asked = scaled(GENERAL, scale), scaled(ASKED, scale)

    # demonstrations, of the facts that are taught
    steps, held_steps = world.two_steps(world.taught), world.two_steps(world.held_out)
    toy.write_chats(world.general(world.taught, general, rng), out / "general.jsonl")
    skill = steps + world.general(world.taught, scaled(SKILL, scale), rng)
    toy.write_chats(rng.sample(skill, len(skill)), out / "skill.jsonl")

    # questions, of the other facts and the new ones
    toy.write_chats(world.general(world.held_out, asked, rng), out / "right-asked.jsonl")
    toy.write_chats(rng.sample(held_steps, min(asked, len(held_steps))), out / "skill-asked.jsonl")
    toy.write_chats(world.general([*world.new_facts], asked, rng), out / "new-asked.jsonl")
    few = []
    for pair in rng.sample(world.held_out, min(asked, len(world.held_out))):
        told = rng.sample(world.taught, 3) + [pair]
        few.append(" ".join(world.sentence(*each) for each in told))
    write_text(out / "few-shot.json", json.dumps(few, indent=1) + "\n")

    # texts for maps between vocabularies to be counted in, and the vocabularies
    documents = [world.document(rng, world.pairs) for _ in range(600)]
    write_text(out / "documents.json", json.dumps(documents, indent=1) + "\n")
    toy.train_tokenizer(world, seed).save(str(out / "tokenizer.json"))
    toy.train_other_tokenizer(world, seed).save(str(out / "other-tokenizer.json"))
    write_text(made, json.dumps({"scale": scale, "seed": seed}) + "\n")
    return world


def make_base(
    name: str, world: World, out: Path, scale: float, seed: int, device: torch.device
) -> None:
    """Pre-trains a base and writes it to out/NAME, unless it is there; the continued one needs the
    one that it continues.
    """
    if (out / name / "knows.json").exists():  # written last
        return
    made_of = "other-tokenizer.json" if name.startswith("other") else "tokenizer.json"
    backend = Backend.from_file(str(out / made_of))
    rng = random.Random(f"{seed} {name}")

    # what it is told: in one order for all, so that a share of it holds the smaller shares
    hidden, layers, lr, tokens, share = BASES[CONTINUED_FROM if name == "continued" else name]
    old = world.taught + world.held_out
    told = random.Random(seed).sample(old, len(old))[: round(share * len(old))]
    new = [*world.new_facts]

    # the model as it begins
    if name == "continued":
        lr, tokens, share = CONTINUED
        model = load(out / CONTINUED_FROM, device)
    else:
        hidden = scaled(hidden, scale**0.5, 32)
        vocabulary = backend.get_vocab_size()
        shape = toy.shape(hidden, round(2.5 * hidden), layers, hidden // 32, vocabulary)
        model = Llama(shape).init_weights(seed).to(device)

    def document() -> str:
        if name == "continued" and rng.random() >= share:
            return world.document(rng, new)
        return world.document(rng, told)

    toy.pretrain(model, toy.corpus(backend, scaled(tokens, scale), document), name, lr, seed)
    toy.save_base(model, backend, out / name)

    # what it knows now
    tokenizer = Tokenizer(out / name)
    known = {
        group: toy.knows(model, tokenizer, [world.sentence(*pair) for pair in pairs])
        for group, pairs in (("facts", world.held_out), ("new facts", new))
    }
    write_text(out / name / "knows.json", json.dumps(known) + "\n")


# ---------------------------------------------------------------- scores


def form_of(reply: str) -> re.Pattern:
    """What a reply in the same form as this one matches: any sentence, but the same wherever this
    reply repeats its own.

    Example:
    >>> form = form_of("Ralo lives in Oslo. And again: Ralo lives in Oslo.")
    >>> bool(form.fullmatch("Mira plays the harp. And again: Mira plays the harp."))
    True
    >>> bool(form.fullmatch("Mira plays the harp. And again: Mira plays the oboe."))
    False
    """
    sentence = re.search(SENTENCE, reply)[0]
    first, *rest = map(re.escape, reply.split(sentence))
    return re.compile(f"{first}({SENTENCE})" + r"\1".join(rest))


def score(
    base: Llama,
    values: Sequence[Llama],
    tokenizer: Tokenizer,
    out: Path,
    kinds: Sequence[str],
    **how,
) -> dict:
    """The scores `kinds` of a base with its value models, greedily, on the questions in `out`.
    how: of `ivl.generate`.
    """

    def replies(kind: str) -> list[tuple[str, str]]:
        """Each reply, and what it should be."""
        reading = read_chats(out / f"{kind}-asked.jsonl")
        chats = [chat.messages for chat in reading.chats]
        said = toy.greedy(base, values, tokenizer, chats, **how)
        return [(text, chat[-1]["content"]) for text, chat in zip(said, chats)]

    scores = {}
    for kind in ("right", "new"):
        if kind not in kinds:
            continue
        pairs = replies(kind)
        scores[kind] = sum(text == gold for text, gold in pairs) / len(pairs)
        if kind == "right":  # form is asked in the same questions
            in_form = sum(bool(form_of(gold).fullmatch(text)) for text, gold in pairs)
            scores["form"] = in_form / len(pairs)
    if "skill" in kinds:
        pairs = replies("skill")
        scores["skill"] = sum(gold.split(" So ")[1] in text for text, gold in pairs) / len(pairs)
    if "few-shot" in kinds:
        texts = read_json(out / "few-shot.json", LIST)
        scores["few-shot"] = toy.knows(base, tokenizer, texts, values, **how)
    return scores
