"""Base and value models that answer: assembled from a command line, and asked."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ivl import choose, generate, never, token_by_token
from model import Llama, column_major
from plumbing.files import (
    InputError,
    aside,
    given,
    number,
    pick_device,
    pick_dtype,
    read_text,
    torchrun,
    visible,
)
from plumbing.streaming import GrowingReply
from plumbing.tokenizer import Tokenizer, shared_vocabulary
from plumbing.weights import frozen_network, load, plain, read_config, recorded_connection
from vocab_map import VocabMap

ALPHA = number(-1e6, 1e6)


class Speaker:
    """A base, its value models, and the tokenizer and settings that make them answer.

    Below, step by step: do the vocabularies fit, which models are there, how do they decode.

    all_logits: under torchrun each process has the logits of all tokens, not of a slice of them.
    """

    def __init__(self, args: argparse.Namespace, all_logits: bool = False):
        self.args = args
        self.all_logits = all_logits
        self.device = pick_device(args.device)
        self.mapping = None
        self.match_vocabularies()  # tokenizer, mapping, vocabulary
        self.load_models()  # connection, base, values, drafts, context, choose
        self.join_models()  # base and values as one reads with them, measures
        self.rounds = self.pick_rounds()
        self.generate = self.decoder(self.base, self.values)

    # ------------------------------------------------------------ the steps

    def match_vocabularies(self) -> None:
        """The tokenizer of the replies, and how many of its ids all models share."""
        args = self.args

        # replies are in the value model's tokens, if there is one
        base_tokenizer = Tokenizer(plain(args.base), args.template)
        base_tokenizer.check(read_config(args.base).vocab_size)
        self.tokenizer = base_tokenizer
        if args.value:
            self.tokenizer = Tokenizer(args.value[0], args.template)
        if not self.tokenizer.stop:
            aside("(no token of this vocabulary ends a reply; --stop TEXT does)")

        # a map, unless the two tokenizers are the same
        if args.map:
            mapping = VocabMap.load(args.map, base_tokenizer, self.tokenizer)
            self.mapping = None if mapping.identity else mapping

        # the leading ids that all models share
        self.vocabulary = len(self.tokenizer.tokens)
        self.differing: set[int] = set()  # of these ids, those that do not mean the same
        others = [] if self.mapping else [base_tokenizer]
        others += [Tokenizer(directory, args.template) for directory in args.value[1:]]
        for other in others:
            shared, differing = shared_vocabulary(other.tokens, self.tokenizer.tokens)
            self.vocabulary = min(self.vocabulary, shared)
            self.differing |= set(differing)
        if self.differing:
            named = ", ".join(map(repr, sorted(self.differing)[:5]))
            print(f"({len(self.differing)} tokens differ, never said: {named})", file=sys.stderr)

        # a draft has to know all that can be said: what it lacked would no longer be said
        if args.draft:
            of_draft = Tokenizer(plain(args.draft), args.template)
            of_draft.check(read_config(args.draft).vocab_size)
            said = set(range(self.vocabulary)) - self.differing
            tokens = dict(enumerate(of_draft.tokens))
            if any(tokens.get(i) != self.tokenizer.tokens[i] for i in said):
                raise InputError(
                    f"--draft {args.draft}: has another vocabulary than the pair; choose a small "
                    "base with the pair's own"
                )

    def load_models(self) -> None:
        """Base, value models and draft, each a Llama by itself."""
        args = self.args
        dtype = pick_dtype(args.dtype, self.device)
        self.connection = "residual"
        connections = {recorded_connection(directory) for directory in args.value}
        if len(args.value) > 1 and connections != {"residual"}:
            raise InputError(
                "of several value models none may read what the base says; leave out those of the "
                f"connection {max(connections - {'residual'})}"
            )
        if connections:
            self.connection = connections.pop()
        if self.connection != "residual":
            self.refuse_beside_connection()

        # under torchrun, each process has a slice of each model; a mapped base needs all of its
        # logits, and so does whoever asks for `all_logits`
        load_model = load
        self.choose = choose
        if torchrun():
            from extras.sharding import chooser, load_slice

            split = None if self.mapping or self.all_logits else self.vocabulary
            load_model = partial(load_slice, vocabulary=split)
            self.choose = chooser(split)
            if self.differing:
                raise InputError(
                    "torchrun needs models of one vocabulary; here a few tokens differ"
                )
        elif self.differing:
            ids = torch.tensor(sorted(self.differing), device=self.device)
            self.choose = never(ids, choose)

        network = frozen_network(args.base_dtype)
        self.base = load_model(args.base, self.device, dtype, network=network)
        self.values = []
        self.drafts = None
        if self.connection == "probe":
            from extras.connections import Probe

            probe = Probe.load(args.value[0], self.device, dtype)
            probe.check([args.base])
            self.values = [probe]
        else:
            for directory in args.value:
                Tokenizer(directory, args.template).check(read_config(directory).vocab_size)
                self.values.append(load_model(directory, self.device, dtype))
        if args.draft:
            from extras.speculative import Drafts

            draft = load_model(args.draft, self.device, dtype, network=network)
            self.drafts = Drafts(draft, args.drafted, sorted(self.differing))

        models = [self.base, *self.values]
        self.context = min(model.config.max_position_embeddings for model in models)
        self.sizes = [model.size() for model in models]
        models += [self.drafts.draft] if self.drafts else []
        self.make_fast([model for model in models if isinstance(model, Llama)])

    def refuse_beside_connection(self) -> None:
        """Raises InputError for options that such a value model cannot have."""
        names = given(self.args, "map", "draft")
        options = [f"--{name}" for name in names]
        if torchrun():
            options = ["torchrun"]
        for option in options:
            raise InputError(
                f"{self.args.value[0]}: its connection is {self.connection}, it reads what "
                f"the base says; leave out {option}"
            )

    def make_fast(self, models: list[Llama]) -> None:
        """Lays the models out for this machine."""
        # cuDNN makes a plan for each shape of attention, and decoding brings a new one with nearly
        # every token
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.device.type == "cpu":
            for model in models:
                column_major(model)

    def join_models(self) -> None:
        """Wraps what is no plain pair of Llamas, so that it reads like one."""
        # ways to count a text's tokens: in the value model's ids, with a map in the base's too
        self.measures: list[Callable] = [len]
        if self.connection != "residual":
            from extras.connections import Connected

            # the base keeps what it says where the value model reads it, so it must read first
            self.values = [Connected(self.connection, *self.values)]
            self.base = self.values[0].watched(self.base)
        if self.mapping is not None:
            from extras.mapped import Mapped

            if self.device.type == "cuda":
                from extras.graphs import Recorded

                self.base = Recorded(self.base)
            self.base = Mapped(self.base, self.mapping)
            # the same text in the base's ids, which `respell` gives first
            bridge = self.base.bridge
            self.measures.append(lambda ids: len(bridge.respell(ids)[0]))

    def pick_rounds(self) -> Callable:
        """What gives the new tokens of each round, see `ivl.generate`."""
        if self.device.type != "cuda" or self.mapping is not None:
            return token_by_token
        from extras.graphs import Kept

        return Kept().rounds

    def decoder(self, base: Llama, values: list[Llama], **changes: float) -> Callable:
        """`ivl.generate` for some of these models; with --draft a small base drafts for the pair.

        changes: what is to be other than on the command line, temperature=0.7, say.
        """
        names = ("temperature", "top_k", "top_p")
        how = {name: getattr(self.args, name) for name in names} | changes
        how |= {"alphas": self.alphas[: len(values)], "vocabulary": self.vocabulary}
        if self.drafts is not None and values:
            return partial(generate, base, values, rounds=self.drafts.rounds, **how)
        return partial(generate, base, values, rounds=self.rounds, choose=self.choose, **how)

    @property
    def alphas(self) -> list[float]:
        """The strength of each value model."""
        return self.args.alpha[: len(self.values)]

    # ------------------------------------------------------------ what a chat changes and asks

    def value_alone(self) -> Callable:
        """A decoder of the value model by itself. Raises InputError if it cannot be alone."""
        if not self.values:
            raise InputError("there is no value model here")
        if self.connection != "residual" or len(self.values) > 1:
            raise InputError("this value model cannot speak alone")
        return self.decoder(self.values[0], [])

    def set_alpha(self, text: str) -> None:
        """Changes the strength of the value model. Raises InputError."""
        if not self.values:
            raise InputError("there is no value model here")
        try:
            alphas = [ALPHA(word) for word in text.split()]
        except argparse.ArgumentTypeError as error:
            raise InputError(f"/alpha {text}: {error}") from None
        if len(alphas) != len(self.values):
            raise InputError(f"/alpha {text}: needs a number for each of {len(self.values)} models")
        self.args.alpha = alphas
        self.generate = self.decoder(self.base, self.values)

    def set_system(self, text: str) -> None:
        """Changes the system prompt; "": none. Raises InputError if the template has no place for
        it.
        """
        if text:
            question = {"role": "user", "content": "?"}
            self.prompt([{"role": "system", "content": text}, question])
        self.args.system = text or None

    def introduction(self) -> str:
        """What there is to know before the first question: of the toy, whom it knows."""
        path = Path(self.args.base).parent / "introduction.txt"
        return visible(read_text(path)) if path.exists() else ""

    # ------------------------------------------------------------ prompts

    def opening(self) -> list[dict]:
        """What a chat begins with: the system prompt, if there is one."""
        if self.args.system is None:
            return []
        return [{"role": "system", "content": self.args.system}]

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids to answer. A chat that has outgrown the context loses its oldest exchanges, and a
        notice says so; a quarter of the context is kept free for the reply.
        """
        ids = self.tokenizer.prompt(messages)
        room = min(self.args.max_new_tokens, self.context // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        while self.length(ids) + room > self.context:
            # what is left begins with a question again
            questions = [i for i, turn in enumerate(turns) if i and turn["role"] == "user"]
            if not questions:
                break
            turns = turns[questions[0] :]
            ids = self.tokenizer.prompt(system + turns)
        ids = self.fitting(ids)
        forgotten = len(messages) - len(system) - len(turns)
        if forgotten:
            print(f"(too long: the first {forgotten} messages are not read)", file=sys.stderr)
        return ids

    def length(self, ids: list[int]) -> int:
        """The tokens of a text, in the vocabulary that needs more."""
        return max(measure(ids) for measure in self.measures)

    def fitting(self, ids: list[int]) -> list[int]:
        """Gives `ids` back. Raises InputError if no reply fits, or if a model lacks a token."""
        if not ids:
            raise InputError("the prompt is empty, and this tokenizer puts nothing in front of it")
        length = self.length(ids)
        if length >= self.context:
            raise InputError(
                f"the prompt has {length} tokens, but the context is {self.context}; "
                "shorten the prompt"
            )
        self.check_tokens(ids)
        return ids

    def check_tokens(self, ids: Sequence[int], text: str = "the prompt") -> None:
        """Raises InputError for a token that not all of the models have. text: what has the ids."""
        for i in ids:
            if i >= self.vocabulary or i in self.differing:
                raise InputError(
                    f"{text} has the token {self.tokenizer.tokens[i]!r}, which only one of the "
                    "two vocabularies has; leave it out"
                )

    # ------------------------------------------------------------ replies

    def replies(
        self,
        prompts: list[list[int]],
        generate: Callable | None = None,
        most: int | None = None,
        seed: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Steps of ids, as `ivl.generate` gives them.

        generate: a decoder of other models or settings, see `decoder`. most: new tokens
        (default: --max_new_tokens). seed: of what is drawn (default: --seed).
        """
        # an upper bound, the shortest prompt's; `generate` ends each row at its own context
        room = self.context - min(map(len, prompts))
        return (generate or self.generate)(
            prompts,
            min(most or self.args.max_new_tokens, room),
            seed=self.args.seed if seed is None else seed,
            stop=self.tokenizer.stop,
        )

    def whole_reply(self, prompt: list[int]) -> list[int]:
        """The ids of one reply, when it is whole."""
        reply = GrowingReply(self.tokenizer, self.args.stop)
        with suppress(KeyboardInterrupt):
            for ids in self.replies([prompt]):
                reply.step(ids[0])
                if reply.ended:
                    break
        return reply.ids

    def whole_replies(
        self,
        prompts: list[list[int]],
        stops: Sequence[str],
        most: int | None = None,
        seed: int | None = None,
        **changes: float,
    ) -> list[GrowingReply]:
        """A batch of replies, when all are whole.

        stops: texts that end a reply. most, seed: of `replies`. changes: of `decoder`.
        """
        generate = self.decoder(self.base, self.values, **changes)
        replies = [GrowingReply(self.tokenizer, stops) for _ in prompts]
        for ids in self.replies(prompts, generate, most, seed):
            for reply, token in zip(replies, ids):
                if token is not None and not reply.ended:  # None: a token has ended it
                    reply.step(token)
            if all(reply.ended for reply in replies):
                break
        for reply in replies:
            reply.rest()
        return replies
