"""Decoding on CUDA with reads that are recorded: one call launches all kernels of a step.

A step of decoding reads every weight once; beside that, launching some thousand kernels one by one
takes longer than running them. So a step is recorded once as a CUDA graph, with the buffers it
reads and moves on, and then replayed.

`Graphs` records the whole step of a pair, all models, the sum of their logits and the choice of a
token, and launches the next step before the last one's tokens are looked at: the device never waits
for the host. It stands in the place of `ivl.token_by_token`:

    graphs = Kept()
    for ids in ivl.generate(base, values, prompts, max_new_tokens, rounds=graphs.rounds): ...

`Recorded` is a model whose reader records its reads one by one: for a round of drafted tokens, and
for a base that is mapped from another vocabulary.

Caches, buffers, streams and graphs are kept from text to text, and go when their owner goes: there
are no cycles of references here, since NCCL waits at its end until all graphs are gone.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, cuda

import ivl
from extras.connections import Connected
from ivl import Replies
from model import Config, Llama, Reader

SHORTEST = 512  # slots that a recorded step looks at, at least; then twice as many, and so on
FEW = 32  # tokens: reads of so many are recorded; longer ones, prompts say, come in any length


def window(end: int) -> int:
    """How many slots a graph looks at that serves texts of `end` tokens.

    Example: a graph for 512 slots serves until the text has 512 tokens, the next one until 1024.
    >>> window(1), window(512), window(513)
    (512, 512, 1024)
    """
    return max(SHORTEST, 1 << (end - 1).bit_length())


# ---------------------------------------------------------------- recording


class Recorder:
    """Calls that are recorded at first and replayed from then on. Those of one recorder never run
    at the same time, so they share their memory.
    """

    def __init__(self, device: torch.device):
        self.device = device
        # a stream to record on; libraries keep memory for every stream they have met
        with cuda.device(device):
            self.stream = cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Gives up what was recorded: graphs know the addresses of caches that are to go."""
        self.graphs = {}  # what was asked for → a graph, and where it leaves its result
        self.pool = None

    def replay(
        self,
        key: tuple,
        run: Callable[[], Tensor],
        readers: Sequence[Reader],
        moved: Sequence[Tensor] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What `run()` gives; the next replay overwrites it.

        key: (tokens that are read, slots that are looked at). readers: those that read in `run`.
        moved, generator: what else it changes.
        """
        with cuda.device(self.device):
            if key not in self.graphs:
                self.graphs[key] = self.record(key, run, readers, moved, generator)
            graph, result = self.graphs[key]
            graph.replay()
        return result

    def record(self, key, run, readers, moved, generator) -> tuple[cuda.CUDAGraph, Tensor]:
        # the warm-up call below is a real one: what it changes is saved here and put back after it
        T, slots = key
        moved = [*moved, *(reader.positions for reader in readers)]
        before = [buffer.clone() for buffer in moved]
        drawn = generator.get_state() if generator else None
        lengths = [reader.lengths for reader in readers]

        def look() -> Tensor:
            # a reader looks at its longest `lengths` + T slots, which only the host counts: so
            # many. The device's own places are `positions`
            for reader in readers:
                reader.lengths = [slots - T] * len(reader.lengths)
            return run()

        # libraries set themselves up at a first call, which a recording must not see
        main = cuda.current_stream()
        self.stream.wait_stream(main)
        with cuda.stream(self.stream):
            look()
        main.wait_stream(self.stream)

        # that call is undone; what it wrote into the caches, the next one writes again
        for buffer, old in zip(moved, before):
            buffer.copy_(old)
        if generator:
            generator.set_state(drawn)

        if self.pool is None:
            self.pool = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        if generator:
            graph.register_generator_state(generator)
        with cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = look()
        for reader, old in zip(readers, lengths):
            reader.lengths = old
        return graph, result


# ---------------------------------------------------------------- a step of all models


class Graphs:
    """Decoding with one choice of models and one way of choosing, see `ivl.token_by_token`."""

    def __init__(
        self,
        base: Llama,
        values: Sequence[Llama],
        *,
        alphas: Sequence[float] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        vocabulary: int | None = None,
        choose: Callable[..., Tensor] = ivl.choose,
    ):
        self.models = [base, *values]
        self.device = base.unembed.device
        self.alphas = alphas
        self.vocabulary = vocabulary
        self.choose = choose
        self.how = temperature, top_k, top_p
        self.generator = torch.Generator(self.device)
        self.recorder = Recorder(self.device)

        # the value models' kernels run in the gaps that the base's leave, and before them where
        # both are ready; unless they wait for the base, or for other ranks, whose sums must come in
        # one order
        self.beside = None
        waits = torch.distributed.is_initialized()
        waits |= any(isinstance(value, Connected) for value in values)
        if values and not waits:
            with cuda.device(self.device):
                self.beside = cuda.Stream(priority=-1)

        self.rows = 0
        self.slots = 0
        self.readers: list[Reader] = []

    @torch.inference_mode()
    def rounds(self, replies: Replies, seed: int = 0) -> Iterator[list[list[int]]]:
        """The same tokens as `ivl.token_by_token`. One text at a time: all share the caches."""
        tokens, counts = ivl.padded(replies.texts)  # (B, T), (B,)
        B, T = tokens.shape
        # tokens of a text that are read: all but the last one
        most = max(end - start for end, start in zip(replies.ends, replies.starts))
        longest = T + most - 1
        self.make_ready(B, max(T, longest))
        self.generator.manual_seed(seed)
        context = min(model.config.max_position_embeddings for model in self.models)
        replies.limit([context - start for start in replies.starts])

        # the prompts are of any length, so reading them is not recorded
        for reader in self.readers:
            reader.back_to([0] * B)
        self.decide([reader.read(tokens, counts) for reader in self.readers])

        # end: how many tokens the longest text has once these new ones are read
        for end in range(T + 1, longest + 2):
            # these tokens are copied (`to` with non_blocking takes pinned memory), the next step is
            # launched behind the copy, and only then the host waits for the copy
            ids = self.new.to("cpu", non_blocking=True)
            copied = cuda.current_stream(self.device).record_event()
            if end <= longest:
                self.recorder.replay(
                    (1, window(end)), self.step, self.readers, [self.new], self.generator
                )
            copied.synchronize()
            yield [[i] for i in ids.tolist()]

    def make_ready(self, rows: int, slots: int) -> None:
        """Makes caches and buffers for so many texts of so many tokens, unless they are there."""
        if rows == self.rows and slots <= self.slots:
            return
        # the old ones are given up first
        self.recorder.forget()
        self.readers = []
        self.rows, self.slots = rows, window(slots)
        self.readers = [model.reader(rows, self.slots) for model in self.models]
        self.new = torch.zeros(rows, dtype=torch.long, device=self.device)  # (B,)

    def decide(self, z: list[Tensor]) -> Tensor:
        """Leaves the next tokens (B,) in `new`, from the models' logits, (B, V) each."""
        z_post = ivl.combine_all(z[0], z[1:], self.alphas)[:, : self.vocabulary]
        return self.new.copy_(self.choose(z_post, *self.how, self.generator))

    def step(self) -> Tensor:
        """All models read the last tokens, and the next ones are chosen."""
        of_base, *of_values = self.readers
        tokens = self.new[:, None]  # (B, 1)
        if self.beside is None:
            return self.decide([reader.read(tokens) for reader in self.readers])
        main = cuda.current_stream()
        self.beside.wait_stream(main)
        with cuda.stream(self.beside):
            z_deltas = [reader.read(tokens) for reader in of_values]
        z_base = of_base.read(tokens)
        main.wait_stream(self.beside)
        return self.decide([z_base, *z_deltas])


class Kept:
    """`Graphs` for each choice of models, kept as long as the way of choosing stays the same:
    recording takes time, and a cache memory.
    """

    def __init__(self):
        self.graphs: dict[tuple, tuple[dict, Graphs]] = {}

    def rounds(
        self, base: Llama, values: Sequence[Llama], replies: Replies, *, seed: int = 0, **how
    ) -> Iterator[list[list[int]]]:
        """With the arguments of `ivl.token_by_token`."""
        models = base, *values
        if models not in self.graphs or self.graphs[models][0] != how:
            self.graphs.pop(models, None)  # its caches go before there are new ones
            self.graphs[models] = how, Graphs(base, values, **how)
        return self.graphs[models][1].rounds(replies, seed)


# ---------------------------------------------------------------- the reads of one model


class Recorded:
    """A model whose short reads are recorded, and else the model itself."""

    def __init__(self, model: Llama):
        self.model = model
        self.kept: RecordedReader | None = None

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def unembed(self) -> Tensor:
        return self.model.unembed

    def reader(self, rows: int, slots: int) -> "RecordedReader":
        """The last one, if it serves: one text at a time."""
        kept = self.kept
        if kept is None or len(kept.lengths) != rows or kept.cache.slots < window(slots):
            self.kept = None  # freed before there is another
            self.kept = RecordedReader(self.model, rows, window(slots))
        self.kept.back_to([0] * rows)
        return self.kept


class RecordedReader(Reader):
    """A `model.Reader` of which reads of a few tokens are CUDA graphs.

    What `hidden` gives is overwritten by the next read of as many tokens; logits are not.
    """

    def __init__(self, model: Llama, rows: int, slots: int):
        super().__init__(model, rows, slots)
        self.recorder = Recorder(self.device)
        self.tokens: dict[int, Tensor] = {}  # T → (B, T), what a recorded read of T tokens reads

    def hidden(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        T = tokens.shape[1]
        begun = max(self.lengths)
        if begun + T > self.cache.slots:
            self.recorder.forget()  # the cache goes to other memory
            self.cache.grow(window(begun + T))
        # the first tokens need no mask, so they are read in another way; many come in any number
        if begun == 0 or T > FEW:
            return super().hidden(tokens, counts)

        if T not in self.tokens:
            self.tokens[T] = torch.empty_like(tokens, device=self.device)
        inputs = self.tokens[T].copy_(tokens)
        read = super().hidden
        h = self.recorder.replay((T, window(begun + T)), lambda: read(inputs), [self])

        # the recorded read takes all tokens for real ones
        self.lengths = [length + T for length in self.lengths]
        if counts is not None:
            self.back_to([n - T + count for n, count in zip(self.lengths, counts.tolist())])
        return h
