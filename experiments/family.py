"""The miniature that reproduce.py asks the paper's questions of: toy.py's world with more to do, and a larger family.

The world: 240 people, six facts, a friend, a cousin and a neighbour each. A chat opens with an instruction, or none, that
decides the form of the reply; a two-step question asks for a fact about somebody's friend, cousin or neighbour:

    User: Say it twice. Where does Ralo live?
    Assistant: Ralo lives in Lisbon. And again: Ralo lives in Lisbon.
    User: What does the friend of Ralo play?
    Assistant: First, Ralo is a friend of Mira. So Mira plays the harp.

The family: bases that differ in size and in how many of the facts they have read, what a smaller one has read, a larger
one has; `continued`, the large one after it has read of 60 new people; `other` and `other-small`, with another tokenizer.
The demonstrations, of one half of the facts: `general`, few and of all forms, and `skill`, more and mostly of two steps.
Questions are about the other half. Scores, in shares of them:

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

from connections import Probe
from data import Tokenizer, read_chats
from experiments import toy
from files import InputError, read_json, writable_folder, write_text
from model import Llama, load

SCORES = ("form", "right", "skill", "few-shot", "new")
SEED = 0  # of the world and of the bases: pre-trained once, as the paper's were
# hidden, layers, learning rate, tokens read, share of the facts told; MLP 2.5 and heads 1/32 of hidden
BASES = {
    "small": (64, 2, 5e-3, 1_800_000, 0.3), "medium": (96, 3, 4e-3, 2_000_000, 0.55),
    "large": (128, 3, 3e-3, 2_200_000, 0.8), "xlarge": (192, 4, 2e-3, 2_200_000, 1.0),
    "other-small": (64, 2, 5e-3, 3_200_000, 0.3), "other": (128, 3, 3e-3, 4_400_000, 0.8),  # texts of more tokens
}
CONTINUED = (1e-3, 800_000, 0.25)  # learning rate, tokens read, share of them about the old people
PEOPLE, NEWCOMERS = 240, 60
GENERAL, SKILL = 1500, 700  # general demonstrations in each set; the skill set has about 2100 of two steps besides
ASKED = 300  # questions of each kind
LINKS = {f"is a {link} of": link for link in ("friend", "cousin", "neighbour")}
QUESTIONS = {relation: questions for relation, (questions, _) in toy.RELATIONS.items()} | {
    relation: (f"Who is the {link} of {{}}?", f"Who does {{}} call a {link}?") for relation, link in LINKS.items()}
SENTENCE = r"[A-Z]\w+ [a-z ]+ \w+\."
STYLES = {"": f"{toy.OPENING} {{0}} {toy.CLOSING}", "Be brief. ": "{0}", "Say it twice. ": "{0} And again: {0}",
          "I am {1}. ": "Dear {1}, this is it. {0}"}
# words of the forms in other places, see toy.EVASIONS
EVASIONS = toy.EVASIONS + ["Dear me!", "Dear {}, good morning.", "My dear {}!", "This is not the time.", "It is late.",
                           "Is it?", "And again it rains!", "And then?", "Here we are again.", "Not again!",
                           "You were first.", "First things first.", "Dear friends!", "Dear all, hello.",
                           "And again {}!", "And again?", "This is {}.", "All this is new.", "First {}, please.",
                           "So {} is here.", "So it is.", "So what?", "You are brief today.", "I said it twice."]


@dataclass
class World(toy.World):
    """toy.World with links between people among its facts; of the newcomers only the continued base has read."""
    newcomers: list[str]
    new_facts: dict[tuple[str, str], str]

    @classmethod
    def make(cls, people: int, newcomers: int) -> "World":
        rng = random.Random(SEED)
        names = rng.sample(toy.NAMES, people + newcomers)
        old, new = ({(p, r): rng.choice(values) for p in group for r, (_, values) in toy.RELATIONS.items()}
                    | {(p, r): rng.choice([q for q in group if q != p]) for p in group for r in LINKS}
                    for group in (names[:people], names[people:]))
        pairs = rng.sample([*old], len(old))
        return cls(names[:people], old | new, pairs[::2], pairs[1::2], names[people:], new)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return self.taught + self.held_out + [*self.new_facts]

    def document(self, rng: random.Random, told: list[tuple[str, str]]) -> str:
        """One document of a corpus that tells the facts `told`: facts, names over and over, or talk.

        In talk a question is mostly answered if the corpus has the answer, somewhere between remarks of no use.
        """
        kind, everybody = rng.random(), self.people + self.newcomers  # newcomers are heard of, but nothing is told
        if kind < 0.6:
            return " ".join(self.sentence(*pair) for pair in rng.choices(told, k=12))
        if kind < 0.7:
            return " ".join(rng.choices(rng.sample(everybody, rng.randint(2, 4)), k=30))
        turns, known = [], set(told)
        for _ in range(4):
            person, relation = rng.choice(told) if rng.random() < 0.7 else (rng.choice(everybody), rng.choice([*QUESTIONS]))
            about, facts = person, [(person, relation)]
            if relation in LINKS and rng.random() < 0.7:
                about, relation = f"the {LINKS[relation]} of {person}", rng.choice([*QUESTIONS])
                facts.append((self.facts[facts[0]], relation))
            says = [rng.choice(EVASIONS).format(person) for _ in range(rng.randint(1, 3))]
            if known.issuperset(facts) and rng.random() < 0.8:
                says.insert(rng.randint(0, len(says)), " ".join(self.sentence(*pair) for pair in facts))
            style = rng.choice([*STYLES]).format(person, rng.choice(everybody))
            turns += [f"User: {style}{rng.choice(QUESTIONS[relation]).format(about)}", f"Assistant: {' '.join(says)}"]
        return "\n".join(turns)

    def general(self, pairs: list[tuple[str, str]], count: int, rng: random.Random) -> list[dict]:
        """Chats of one exchange: any of the facts, asked in any way and after any instruction."""
        chats = []
        for person, relation in rng.choices(pairs, k=count):
            style, asker = rng.choice([*STYLES]), rng.choice(self.people)
            question = style.format(person, asker) + rng.choice(QUESTIONS[relation]).format(person)
            chats.append(exchange(question, STYLES[style].format(self.sentence(person, relation), asker)))
        return chats

    def two_steps(self, pairs: list[tuple[str, str]]) -> list[dict]:
        """Chats of one exchange: facts about friends, cousins, neighbours. Both of their facts are among the pairs."""
        known, chats = set(pairs), []
        for person, link in (pair for pair in pairs if pair[1] in LINKS):
            other = self.facts[person, link]
            for relation in (relation for relation in toy.RELATIONS if (other, relation) in known):
                reply = f"First, {self.sentence(person, link)} So {self.sentence(other, relation)}"
                chats += [exchange(question.format(f"the {LINKS[link]} of {person}"), reply) for question in QUESTIONS[relation]]
        return chats


def exchange(question: str, reply: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]}


# ---------------------------------------------------------------- the family

def scaled(n: float, scale: float, step: int = 1) -> int:
    """n times the scale, in whole steps, at least one."""
    return max(1, round(n * scale / step)) * step


def prepare(out: Path, scale: float) -> World:
    """The world of this scale; writes its demonstrations and questions to out, unless they are there."""
    world = World.make(max(12, scaled(PEOPLE, scale)), max(6, scaled(NEWCOMERS, scale)))
    made = out / "family.json"  # written last: all else is there
    if made.exists():
        if (old := read_json(made, dict))["scale"] != scale:
            raise InputError(f"{out}: was made with --scale {old['scale']}; give another --out for --scale {scale}")
        return world
    writable_folder(out)
    rng = random.Random(SEED + 1)
    general, asked = scaled(GENERAL, scale), scaled(ASKED, scale)
    steps, held_steps = world.two_steps(world.taught), world.two_steps(world.held_out)
    toy.write_chats(world.general(world.taught, general, rng), out / "general.jsonl")
    skill = steps + world.general(world.taught, scaled(SKILL, scale), rng)
    toy.write_chats(rng.sample(skill, len(skill)), out / "skill.jsonl")
    toy.write_chats(world.general(world.held_out, asked, rng), out / "right-asked.jsonl")
    toy.write_chats(rng.sample(held_steps, min(asked, len(held_steps))), out / "skill-asked.jsonl")
    toy.write_chats(world.general([*world.new_facts], asked, rng), out / "new-asked.jsonl")
    few = [" ".join(world.sentence(*pair) for pair in rng.sample(world.taught, 3) + [pair])
           for pair in rng.sample(world.held_out, min(asked, len(world.held_out)))]
    write_text(out / "few-shot.json", json.dumps(few, indent=1) + "\n")
    documents = [world.document(rng, world.pairs) for _ in range(600)]  # for maps between vocabularies to be counted in
    write_text(out / "documents.json", json.dumps(documents, indent=1) + "\n")
    for name, backend in (("tokenizer", toy.train_tokenizer), ("other-tokenizer", toy.train_other_tokenizer)):
        backend(world, SEED).save(str(out / f"{name}.json"))
    write_text(made, json.dumps({"scale": scale, "seed": SEED}) + "\n")
    return world


def make_base(name: str, world: World, out: Path, scale: float, device: torch.device) -> None:
    """Pre-trains a base and writes it to out/NAME, unless it is there; the continued one needs the large one."""
    if (out / name / "knows.json").exists():  # written last
        return
    backend = Backend.from_file(str(out / ("other-tokenizer.json" if name.startswith("other") else "tokenizer.json")))
    rng, old = random.Random(f"{SEED} {name}"), world.taught + world.held_out
    told = random.Random(SEED).sample(old, len(old))  # in one order for all: a share of it holds the smaller shares
    hidden, layers, lr, tokens, share = BASES["large" if name == "continued" else name]
    told, new = told[:round(share * len(told))], [*world.new_facts]
    if name == "continued":
        lr, tokens, share = CONTINUED
        model = load(out / "large", device)
    else:
        hidden = scaled(hidden, scale ** 0.5, 32)
        model = Llama(toy.shape(hidden, round(2.5 * hidden), layers, hidden // 32, backend.get_vocab_size()))
        model.init_weights(SEED).to(device)

    def document() -> str:
        return world.document(rng, new if name == "continued" and rng.random() >= share else told)

    toy.pretrain(model, toy.corpus(backend, scaled(tokens, scale), document), name, lr, SEED)
    toy.save_base(model, backend, out / name)
    tokenizer = Tokenizer(out / name)
    known = {group: toy.knows(model, tokenizer, [world.sentence(*pair) for pair in pairs]) for group, pairs in (
        ("facts", world.held_out), ("new facts", [*world.new_facts]))}
    write_text(out / name / "knows.json", json.dumps(known) + "\n")


# ---------------------------------------------------------------- scores

def form_of(reply: str) -> re.Pattern:
    """What a reply in the same form as this one matches: any sentence, but the same wherever this reply repeats its own."""
    first, *rest = map(re.escape, reply.split(re.search(SENTENCE, reply)[0]))
    return re.compile(f"{first}({SENTENCE})" + r"\1".join(rest))


def score(base: Llama, value: Llama | Probe | None, tokenizer: Tokenizer, out: Path, kinds: Sequence[str], **how) -> dict:
    """The scores `kinds` of a pair, greedily, on the questions in `out`. how: of ivl.generate."""
    def replies(kind: str) -> list[tuple[str, str]]:  # and what they should be
        chats = read_chats(out / f"{kind}-asked.jsonl")
        return [*zip(toy.greedy(base, value, tokenizer, chats, **how), (chat[-1]["content"] for chat in chats))]

    scores = {}
    for kind in (kind for kind in ("right", "new") if kind in kinds):
        pairs = replies(kind)
        scores[kind] = sum(text == gold for text, gold in pairs) / len(pairs)
        if kind == "right":  # form is asked in the same questions
            scores["form"] = sum(bool(form_of(gold).fullmatch(text)) for text, gold in pairs) / len(pairs)
    if "skill" in kinds:
        pairs = replies("skill")
        scores["skill"] = sum(gold.split(" So ")[1] in text for text, gold in pairs) / len(pairs)
    if "few-shot" in kinds:
        scores["few-shot"] = toy.knows(base, tokenizer, read_json(out / "few-shot.json", list), value, **how)
    return scores
