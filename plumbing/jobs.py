"""What a training needs, assembled from its command line: tokenizer, settings, chats, models."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from model import Llama
from plumbing.chats import Reading, read_chats
from plumbing.dataset import Chats, tokenize
from plumbing.files import InputError, given, pick_device, pick_dtype
from plumbing.ranks import ONE_DEVICE, OneDevice
from plumbing.runs import CHECKPOINT, date_of, tell
from plumbing.tokenizer import Tokenizer, shared_vocabulary
from plumbing.weights import fingerprint, frozen_network, plain, read_config, recorded_connection


class Job:
    """What a command line asks for: tokenizer, settings, chats and models, step by step.

    settings: gives the settings for a model and the configs of those beside it, where nothing else
    is asked for.
    """

    def __init__(self, args: argparse.Namespace, settings: Callable, machine: OneDevice):
        self.args = args
        self.machine = machine
        self.device = pick_device(args.device)
        self.dtype = pick_dtype(args.dtype, self.device)
        self.autocast = nullcontext()
        if self.dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, self.dtype)
        tell(f"reading {' '.join(map(str, args.data))}")
        self.match_vocabularies()  # tokenizer, configs, shared, differing
        self.settle(settings)  # connection, settings
        self.read_chats()  # chats
        if not args.show:
            self.load_models()  # value, trained, loads, teacher

    # ------------------------------------------------------------ the steps

    def match_vocabularies(self) -> None:
        """The tokenizer, and the shapes of the frozen models; all must agree on what an id means.
        Raises InputError.
        """
        args = self.args
        self.tokenizer = Tokenizer(args.value or args.base[0], args.template)
        self.dated = "strftime_now" in self.tokenizer.template
        if self.dated and args.resume:
            self.tokenizer.now = date_of(Path(args.out) / CHECKPOINT) or self.tokenizer.now
        self.shared = len(self.tokenizer.tokens)  # so many leading ids are everywhere,
        self.differing: set[int] = set()  # of which these do not mean the same
        self.configs = []
        for directory in map(plain, args.base + ([args.teacher] if args.teacher else [])):
            other = Tokenizer(directory, args.template)
            shared, differing = shared_vocabulary(other.tokens, self.tokenizer.tokens)
            self.shared = min(self.shared, shared)
            self.differing |= set(differing)
            self.configs.append(read_config(directory))
            other.check(self.configs[-1].vocab_size)

    def settle(self, settings: Callable) -> None:
        """The settings: the paper's, but for what was given. Raises InputError."""
        args = self.args
        self.connection = args.connection
        if self.connection is None:
            self.connection = recorded_connection(args.value) if args.value else "residual"
        if self.connection != "residual" or given(args, "random", "teacher", "compile"):
            self.refuse_ranks()

        # the shape of what is trained; a probe has its base's
        config = self.configs[0]
        if args.value and self.connection != "probe":
            config = read_config(args.value)
            self.tokenizer.check(config.vocab_size)
        with torch.device("meta"):
            model = Llama(config)
        beside = [] if args.full else self.configs
        self.settings = settings(model, beside)
        for field in fields(self.settings):
            if getattr(args, field.name, None) is not None:
                setattr(self.settings, field.name, getattr(args, field.name))
        self.settings.connection = self.connection

        context = min(config.max_position_embeddings for config in (config, *self.configs))
        if self.settings.max_length > context:
            raise InputError(
                f"--max_length = {self.settings.max_length}; the models' context is {context} "
                "tokens"
            )

    def read_chats(self) -> None:
        """The chats as tokens, or pairs of them; says what became of them."""
        args = self.args
        reading = read_chats(*args.data)
        rivals = rejected_replies(args, reading)
        with self.machine.in_turn():
            self.chats = tokenize(reading, self.tokenizer, self.settings.max_length)
        if rivals:
            from extras.losses import BETA, paired

            self.refuse_ranks()
            worse = tokenize(rivals, self.tokenizer, self.settings.max_length)
            self.chats = paired(self.chats, worse)
            self.settings.beta = BETA
        tell(self.chats.report)
        check_tokens(self.chats, self.tokenizer, self.shared, self.differing)

    def load_models(self) -> None:
        """The value model as it begins, and the bases, each of which is loaded when its turn comes.
        An evaluation of the base alone has no value model.
        """
        args = self.args
        self.value = None
        if args.value or not args.evaluate:
            self.value = self.start_value()
        self.teacher = self.load_frozen(args.teacher) if args.teacher else None

        # what `train` is given: the value model, or the Connected that wraps it
        self.trained = self.value
        self.loads = [partial(self.load_base, directory) for directory in args.base]
        if args.full:
            self.loads = [lambda: None]
        if self.connection != "residual":
            from extras.connections import Connected

            self.trained = Connected(self.connection, self.value)
            self.loads = [partial(self.load_watched, directory) for directory in args.base]

    def refuse_ranks(self) -> None:
        if self.machine is not ONE_DEVICE:
            raise InputError(
                "under torchrun there is only --connection residual, without --random, --teacher, "
                "--compile and preferences"
            )

    def load_frozen(self, directory: str, network: type[Llama] = Llama) -> Llama:
        tell(f"loading {directory}")
        model = self.machine.load(directory, self.device, self.dtype, self.dtype, network)
        model.requires_grad_(False)
        return compiled(model) if self.args.compile else model

    def load_base(self, directory: str) -> Llama:
        return self.load_frozen(directory, frozen_network(self.args.base_dtype))

    def load_watched(self, directory: str) -> Llama:
        """A base that shows the value model what it says."""
        return self.trained.watched(self.load_base(directory))

    def start_value(self) -> Llama:
        """The model that is trained, as it begins: in float32, whatever the arithmetic."""
        args = self.args
        seed = args.seed or 0
        if self.connection == "probe":
            from extras.connections import Probe

            # a new one has random weights as it is, and there are no blocks in it
            without = ["checkpointing", "compile"] + ([] if args.value else ["random"])
            for option in given(args, *without):
                raise InputError(f"--{option} has no effect on a probe; leave it out")
            if args.value:
                value = Probe.load(args.value, self.device)
            else:
                value = Probe(self.configs[0]).init_weights(seed).to(self.device)
            value.check(args.base)
        else:
            start = args.value or args.base[0]
            tell(f"loading {start}")
            value = self.machine.load(start, self.device, torch.float32, self.dtype)
            value.checkpointing = args.checkpointing
        if args.random:
            value.init_weights(seed)
        return compiled(value) if args.compile else value

    def origin(self) -> dict:
        """What the numbers of a run come from, besides its settings and chats."""
        args = self.args
        return {
            "base": [fingerprint(directory) for directory in args.base],
            "value": fingerprint(args.value) if args.value else None,
            "teacher": fingerprint(args.teacher) if args.teacher else None,
            "random": args.random,
            "date": self.tokenizer.now.isoformat() if self.dated else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "base_dtype": args.base_dtype,
        }


def check_tokens(chats: Chats, tokenizer: Tokenizer, shared: int, differing: set[int]) -> None:
    """Raises InputError for chats with tokens that do not mean the same to all models."""
    used = set(chats.ids.unique().tolist())
    alien = used & differing | {i for i in used if i >= shared}
    if alien:
        raise InputError(
            f"the chats use the token {tokenizer.tokens[min(alien)]!r}, id {min(alien)}, which not "
            "all of the models' vocabularies have; leave out what it stands for"
        )
    if differing:
        named = ", ".join(f"{i} ({tokenizer.tokens[i]!r})" for i in sorted(differing)[:5])
        print(
            f"the vocabularies differ in {len(differing)} of {shared} tokens, which the chats do "
            f"not use: {named}"
        )


def rejected_replies(args: argparse.Namespace, reading: Reading) -> Reading | None:
    """The worse replies to the same questions, if preferences are to be learnt. Raises
    InputError.
    """
    preferences = reading.preferences()
    if args.chosen and not preferences:
        raise InputError("--chosen has no effect: no chat of --data has a rejected reply")
    if args.evaluate and preferences:
        print(f"{preferences} chats are preferences; their chosen replies are measured")
    if args.chosen or args.evaluate or not preferences:
        return None
    if preferences < len(reading.chats):
        raise InputError(
            f"only {preferences} of the {len(reading.chats)} chats have a rejected reply; with "
            "--chosen the chosen ones are learnt like all others"
        )
    for option in given(args, "full", "teacher"):
        raise InputError(
            f"the chats of --data are preferences, with which --{option} does not go; --chosen "
            "learns the chosen replies"
        )
    return reading.worse()


def compiled(model: Llama) -> Llama:
    """The model with each of its blocks compiled, in place: one compilation serves them all."""
    # the code of a block is compiled anew for each shape of model and way of reading; past the
    # limit, 8, PyTorch would quietly run it as it is
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.compile()
    return model
