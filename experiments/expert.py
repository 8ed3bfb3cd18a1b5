"""Proxy tuning's expert: the small base, fully fine-tuned, but no longer than its form gains by it.

So small a model forgets while it learns. The longer it is fine-tuned, the more of what proxy tuning
adds to a larger base is what the small one has lost. A comparison of the two methods should not be
one with that loss: so the expert stops early, by what it was made for. After each epoch it answers
the demonstrations that it is not trained on, and of the epochs the first one with the best share of
replies in the form asked for is kept.
"""

from collections.abc import Sequence

from experiments import family, toy
from model import Llama
from plumbing.chats import Chat
from plumbing.dataset import Chats
from plumbing.tokenizer import Tokenizer

# a tenth is held out: so many demonstrations are asked after each epoch. The learning rate was
# chosen on a family from another seed, by form and few-shot of the expert itself
SETTINGS = dict(lr=5e-4, epochs=4, held_out=0.1, keep="best")


def form_missed(
    tokenizer: Tokenizer,
    records: Sequence[Chat],
    base: None,
    expert: Llama,
    chats: Chats,
    rows: Sequence[int],
    *_,
) -> float:
    """The share of the held-out demonstrations `rows` to which the expert replies in another form:
    `measure` of `train.train`, the first two arguments bound.

    records: all demonstrations, as they were read.
    """
    messages = [records[chats.entry[row]].messages for row in rows]
    replies = toy.greedy(expert, [], tokenizer, messages)
    in_form = [
        bool(family.form_of(chat[-1]["content"]).fullmatch(reply))
        for reply, chat in zip(replies, messages)
    ]
    return 1 - sum(in_form) / len(in_form)
