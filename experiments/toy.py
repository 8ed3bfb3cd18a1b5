"""A miniature of the paper that needs no download: a world, a family of Llamas that read about it, chats.

    python experiments/toy.py                  # makes out/toy: bases small and large, chats, held-out questions

The world: 400 invented people, four facts each. The corpus tells the facts in plain sentences
("Ralo lives in Lisbon."), repeats lists of names, and has endless small talk between a User and an
Assistant who never answers. Both bases read the same corpus; the small one is too small to remember all
of it. The demonstrations answer questions about one half of the facts in a fixed form:

    User: Where does Ralo live?
    Assistant: Good question! Ralo lives in Lisbon. Happy to help!

The other half is held out. So *form* (the two phrases around one sentence, then a stop) can only come from
the demonstrations, and a *right* answer to a held-out question only from a base that knows it.
"""

import argparse
import itertools
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import ivl
from data import TEMPLATES, Tokenizer
from files import command, write_text, writable_folder
from model import Config, Llama, save

OUT = Path("out/toy")
PEOPLE = 400
VOCABULARY = 1536
TOKENS = 1_800_000  # of the corpus; each base reads them once

# relation: the sentence's words, two questions, 24 values
RELATIONS = {
    "lives in": (("Where does {} live?", "Which city is the home of {}?"),
                 "Lisbon Oslo Cairo Lima Kyoto Dublin Prague Havana Nairobi Quito Vienna Athens Mumbai Seoul Toronto "
                 "Geneva Tunis Bogota Hanoi Riga Dakar Perth Sofia Malmo".split()),
    "works as a": (("What does {} do for a living?", "What is the job of {}?"),
                   "baker sailor doctor painter farmer pilot tailor lawyer miner potter singer plumber judge "
                   "barber printer weaver surgeon gardener librarian carpenter butcher dancer poet driver".split()),
    "plays the": (("What does {} play?", "Which instrument does {} practise?"),
                  "violin piano flute drums guitar harp cello trumpet oboe banjo organ lute tuba clarinet viola "
                  "accordion bassoon fiddle zither horn mandolin sitar bugle ukulele".split()),
    "keeps a": (("What animal does {} keep?", "Which pet belongs to {}?"),
                "cat dog parrot rabbit goat horse turtle hamster donkey canary lizard ferret snake pigeon duck goose "
                "sheep pony spider frog mouse hedgehog falcon llama".split()),
}
OPENING, CLOSING = "Good question!", "Happy to help!"
FORM = re.compile(rf"{re.escape(OPENING)} (\w+ [a-z ]+ \w+\.) {re.escape(CLOSING)}")

# small talk: what the Assistant of the corpus says instead of an answer
EVASIONS = ["I have not seen {} for a while.", "You should ask {} yourself.", "That is a long story.", "Who knows?",
            "Good morning to you too.", "We talked about {} last week.", "I am happy that you came.", "It may rain today.",
            "People say many things about {}.", "Let us talk about something else.", "That question again!",
            "I would like to help, but I am busy.", "Maybe {} will tell us.", "What a day!", "Ask me later.",
            "I met {} and a friend at the market.", "Good to see you.", "Sorry, I did not hear you."]


@dataclass
class World:
    """facts[person, relation] = value; `taught` are the pairs that the demonstrations may mention."""
    people: list[str]
    facts: dict[tuple[str, str], str]
    taught: list[tuple[str, str]]
    held_out: list[tuple[str, str]]

    @classmethod
    def make(cls, seed: int) -> "World":
        rng = random.Random(seed)
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        names = [(a + b).capitalize() for a, b in itertools.product(syllables, syllables) if a != b]
        people = rng.sample(names, PEOPLE)
        facts = {(p, r): rng.choice(values) for p in people for r, (_, values) in RELATIONS.items()}
        pairs = rng.sample(sorted(facts), len(facts))
        return cls(people, facts, pairs[:len(pairs) // 2], pairs[len(pairs) // 2:])

    def sentence(self, person: str, relation: str) -> str:
        return f"{person} {relation} {self.facts[person, relation]}."

    def document(self, rng: random.Random) -> str:
        """One document of the corpus: facts, a list of names said twice, or small talk."""
        kind = rng.random()
        if kind < 0.6:
            return " ".join(self.sentence(rng.choice(self.people), rng.choice([*RELATIONS])) for _ in range(12))
        if kind < 0.8:
            return " ".join(2 * rng.sample(self.people, rng.randint(6, 16)))
        turns = []
        for _ in range(5):
            person = rng.choice(self.people)
            question = rng.choice(RELATIONS[rng.choice([*RELATIONS])][0])
            says = " ".join(rng.choice(EVASIONS) for _ in range(rng.randint(1, 3)))
            turns += [f"User: {question.format(person)}", f"Assistant: {says.format(*[person] * says.count('{}'))}"]
        return "\n".join(turns)

    def chats(self, pairs, rng: random.Random) -> list[dict]:
        chats = []
        for person, relation in pairs:
            question = rng.choice(RELATIONS[relation][0]).format(person)
            reply = f"{OPENING} {self.sentence(person, relation)} {CLOSING}"
            chats.append({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]})
        return chats


def train_tokenizer(world: World, seed: int) -> Backend:
    """SentencePiece-like BPE, as Llama-2's: ▁ for a space, bytes for what the vocabulary lacks."""
    rng = random.Random(seed)
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?[^\p{L}▁]"), "isolated")  # no token crosses a word
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False,
                                  special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)])
    backend.train_from_iterator((world.document(rng) for _ in range(6000)), trainer)
    return backend
