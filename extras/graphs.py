"""`ivl.generate` on CUDA with each step a graph: one call launches all kernels of both models.

A step of decoding reads every weight once; beside that, launching some thousand kernels one by one
takes longer than running them. So a step is recorded once, with the buffers it reads and moves on,
and then replayed: both models, the sum of their logits and the choice of a token. The next step is
launched before the last one's tokens are looked at: the device never waits for the host.

Caches, buffers, streams and graphs belong to a pair of models and are kept from text to text:

    graphs = Graphs(base, value, alpha=1.0)
    for ids in graphs.generate(prompts, max_new_tokens): ...     # as ivl.generate
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, cuda

import ivl
from extras.connections import Connected
from model import Llama, Reader

SHORTEST = 512  # slots that a recorded step looks at, at least; then twice as many, and so on


def window(end: int) -> int:
    """How many slots a graph looks at that serves texts of `end` tokens.

    Example: a graph for 512 slots serves until the text has 512 tokens, the next one until 1024.
    >>> window(1), window(512), window(513)
    (512, 512, 1024)
    """
    return max(SHORTEST, 1 << (end - 1).bit_length())


class Graphs:
    """Decoding with one pair of models and one way of choosing, as `ivl.generate` has them."""

    def __init__(
        self,
        base: Llama,
        value: Llama | None,
        *,
        alpha: float = 1.0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        vocabulary: int | None = None,
        choose: Callable[..., Tensor] = ivl.choose,
    ):
        self.models = [base] if value is None else [base, value]
        self.devices = [model.unembed.device for model in self.models]
        self.device = self.devices[0]
        self.apart = len(set(self.devices)) > 1
        self.alpha = alpha
        self.vocabulary = vocabulary
        self.generator = torch.Generator(self.device)
        self.choose = lambda z: choose(z, temperature, top_k, top_p, self.generator)

        # a stream of each device to record on; libraries keep memory for every stream they have met
        self.streams = {}
        for device in dict.fromkeys(self.devices):
            with cuda.device(device):
                self.streams[device] = cuda.Stream()

        # the value model's kernels run in the gaps that the base's leave, unless it has to wait for
        # the base, or for other ranks: their sums must come in one order
        self.value_stream = None
        waits = isinstance(value, Connected) or torch.distributed.is_initialized()
        if value is not None and not waits and not self.apart:
            with cuda.device(self.device):
                self.value_stream = cuda.Stream()

        self.rows = 0
        self.slots = 0
        self.readers = []
        self.graphs = {}  # (slots looked at, device) → a graph, and where it leaves its result
        self.pools = {}  # device → the memory that its graphs share

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[list[int | None]]:
        """As `ivl.generate`, with the same tokens. One at a time: all share the caches."""
        context = min(model.config.max_position_embeddings for model in self.models)
        lengths = [len(prompt) for prompt in prompts]
        running = [True] * len(prompts)
        for ids in self.steps(prompts, max_new_tokens, seed):
            yield [i if on else None for i, on in zip(ids, running)]

            # a row ends at a stop token, or where its new token fills a model's context
            lengths = [n + 1 for n in lengths]
            running = [
                on and i not in stop and n < context for i, on, n in zip(ids, running, lengths)
            ]
            if not any(running):
                return

    def steps(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int
    ) -> Iterator[list[int]]:
        """The new tokens of each step, which the host sees while the device does the next one."""
        tokens, counts = ivl.padded(prompts)  # (B, T), (B,)
        B, T = tokens.shape
        longest = T + max_new_tokens - 1  # tokens of a text that are read: all but the last one
        self.make_ready(B, max(T, longest))
        self.generator.manual_seed(seed)

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
                self.step(window(end))
            copied.synchronize()
            yield ids.tolist()

    def make_ready(self, rows: int, slots: int) -> None:
        """Makes caches and buffers for so many texts of so many tokens, unless they are there."""
        if rows == self.rows and slots <= self.slots:
            return
        # the old ones are given up first; graphs know the addresses of their caches, so they go too
        self.readers, self.graphs, self.pools = [], {}, {}
        self.rows, self.slots = rows, window(slots)
        self.readers = [model.reader(rows, self.slots) for model in self.models]
        self.new = torch.zeros(rows, dtype=torch.long, device=self.device)  # (B,)
        # what each model reads next: on the base's device a view of `new`, elsewhere a copy of it
        self.tokens = [self.new[:, None].to(device) for device in self.devices]  # (B, 1) each

    def decide(self, z: list[Tensor]) -> Tensor:
        """Leaves the next tokens (B,) in `new`, from the models' logits, (B, V) each."""
        z_post = z[0]
        if len(z) > 1:
            z_post = ivl.combine(z[0], z[1].to(self.device), self.alpha)
        return self.new.copy_(self.choose(z_post[:, : self.vocabulary]))

    # ------------------------------------------------------------ one step, and its recording

    def step(self, slots: int) -> None:
        """Moves all texts on by one token; looks at so many slots of the caches."""
        if not self.apart:
            self.replay(slots, self.step_of_both, self.readers, self.device)
            return

        # on devices of their own, the models are a graph each, and meet in the choice (the base's
        # tokens are `new` itself: that copy changes nothing)
        for tokens in self.tokens:
            tokens.copy_(self.new[:, None])
        self.decide(
            [
                self.replay(slots, partial(reader.read, tokens), [reader], device)
                for reader, tokens, device in zip(self.readers, self.tokens, self.devices)
            ]
        )

    def step_of_both(self) -> Tensor:
        """Both models read the last tokens, and the next ones are chosen."""
        if self.value_stream is None:
            return self.decide(
                [reader.read(tokens) for reader, tokens in zip(self.readers, self.tokens)]
            )
        main = cuda.current_stream()
        self.value_stream.wait_stream(main)
        with cuda.stream(self.value_stream):
            z_delta = self.readers[1].read(self.tokens[1])
        z_base = self.readers[0].read(self.tokens[0])
        main.wait_stream(self.value_stream)
        return self.decide([z_base, z_delta])

    def replay(
        self, slots: int, run: Callable[[], Tensor], readers: list, device: torch.device
    ) -> Tensor:
        """Replays `run()`, recorded at first; the next replay overwrites what this one gives."""
        key = slots, device
        with cuda.device(device):
            if key not in self.graphs:
                self.graphs[key] = self.record(slots, run, readers, device)
            graph, result = self.graphs[key]
            graph.replay()
        return result

    def record(
        self, slots: int, run: Callable[[], Tensor], readers: list, device: torch.device
    ) -> tuple[cuda.CUDAGraph, Tensor]:
        """`run()` as a graph that looks at `slots` slots of each cache, and where its result is."""
        # the warm-up call below is a real step: what it changes is saved here and put back after it
        inner = [part for reader in readers for part in parts(reader)]
        moved = [part.positions for part in inner] + [self.new]
        before = [buffer.clone() for buffer in moved]
        generator_state = self.generator.get_state()

        def look() -> Tensor:
            # a reader looks at its longest `lengths` + 1 slots, which only the host counts: so
            # many. The true places are `positions`; `lengths` is wrong until `back_to`
            for part in inner:
                part.lengths = [slots - 1] * self.rows
            return run()

        # libraries set themselves up at a first call, which a recording must not see
        stream, main = self.streams[device], cuda.current_stream()
        stream.wait_stream(main)
        with cuda.stream(stream):
            look()
        main.wait_stream(stream)

        # that call is undone; what it wrote into the caches, the next one writes again
        for buffer, old in zip(moved, before):
            buffer.copy_(old)
        self.generator.set_state(generator_state)

        # graphs of one device never run at the same time, so they share their memory
        if device not in self.pools:
            self.pools[device] = cuda.graph_pool_handle()
        graph = cuda.CUDAGraph()
        if device == self.device:
            graph.register_generator_state(self.generator)
        with cuda.graph(graph, pool=self.pools[device], stream=stream):
            result = look()
        return graph, result


def parts(reader) -> list[Reader]:
    """The `model.Reader`s inside: itself, or a `ProxyReader`'s; mapped bases have no graphs."""
    if isinstance(reader, Reader):
        return [reader]
    return [part for inner in reader.readers for part in parts(inner)]
