"""One token at a time, at the pace at which memory delivers the weights.

A step of decoding reads every weight of both models once; all else has to vanish beside that. So caches and buffers are
allocated once, a step moves them on in place, and nothing in it waits for the host. On CUDA the same step is recorded as
a graph, and then a single call launches all of its kernels.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, Llama

SHORTEST = 512  # slots of its caches that a recorded step looks at, at least; then twice as many, and so on


class Lane:
    """A model's way through a batch of texts: its cache, and the buffers that its steps read and move on.

    tokens, positions: (B, 1), what the next step reads, and where. h: (B, T, H), the hidden states of what it has just
    read. reads: what the model is given for tokens (B, T), if not they themselves; it may depend on the lanes before.
    """

    def __init__(self, model: Llama, rows: int, slots: int, reads: Callable[[Tensor], Tensor] | None = None):
        self.model, self.device, self.reads = model, model.head.device, reads
        self.cache = KVCache(model.config, rows, slots, self.device, model.head.dtype)
        self.tokens, self.positions = torch.zeros(2, rows, 1, dtype=torch.long, device=self.device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads the prompts at once; the logits after each, (B, V)."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        self.positions[:, 0] = torch.tensor([len(prompt) for prompt in prompts])
        self.h = self.model.hidden(self.reads(tokens) if self.reads else tokens, cache=self.cache)
        # the unembedding is needed at a row's last token only
        return self.logits(self.h[torch.arange(len(prompts), device=self.device), self.positions[:, 0] - 1])

    def step(self, end: int) -> Tensor:
        """Reads one token a row; the logits after it, (B, V). No position has reached `end`."""
        x = self.reads(self.tokens) if self.reads else self.tokens
        self.h = self.model.hidden(x, self.positions, self.cache, end)
        self.positions += 1
        return self.logits(self.h[:, 0])

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.model.head).float()


@torch.no_grad()
def column_major(model: Llama) -> Llama:
    """Lays the model's matrices out by columns, in place: on a CPU, products with one vector are then up to twice as fast.

    The embedding stays as it is, a token is one of its rows; so a tied unembedding becomes a matrix of its own. The
    network is the same, but `model.save` wants rows.
    """
    if model.lm_head is None:
        model.lm_head = nn.Linear(*reversed(model.embed.weight.shape), bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(model.embed.weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row.  logits (B, V) → (B,)

    temperature 0 takes the likeliest token. top_k keeps the k likeliest (0: all); top_p keeps the fewest
    tokens that together have probability p (1: all), always at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # all likelier tokens together have reached top_p already
        drop[:, 0] = False
        logits = logits.scatter(-1, order, ordered.masked_fill(drop, -torch.inf))
    # argmax of p / Exponential(1) is a draw from p, without waiting for the device as multinomial does
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


def recorded(step: Callable[[int], Tensor], slots: int, state: Sequence[Tensor],
             generator: torch.Generator | None = None) -> Callable[[int], Tensor]:
    """`step` as CUDA graphs: the same function of `end`, launched by one call.

    step: reads and writes the same buffers at every call, and gives the same result if it looks at more slots than
    `end`. So one graph serves until the text has doubled. What it gives is overwritten by the next call.
    state: the buffers that a step moves on, all on one device. generator: where its random numbers come from.
    """
    device = state[0].device
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    @functools.cache
    def record(end: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        before = [buffer.clone() for buffer in state]
        drawn = generator and generator.get_state()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(end)  # libraries set themselves up at the first call, which a recording must not see
        torch.cuda.current_stream().wait_stream(stream)
        # that call was one step too many. What it wrote into the caches the next step writes again
        for buffer, old in zip(state, before):
            buffer.copy_(old)
        graph = torch.cuda.CUDAGraph()
        if generator:
            generator.set_state(drawn)
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = step(end)
        return graph, out

    def replay(end: int) -> Tensor:
        with torch.cuda.device(device):
            graph, out = record(min(slots, max(SHORTEST, 1 << (end - 1).bit_length())))
            graph.replay()
            return out
    return replay


def record_steps(lanes: Sequence[Lane], decide: Callable[[list[Tensor]], Tensor],
                 generator: torch.Generator) -> Callable[[int], Tensor]:
    """A step of all lanes and the choice after it, on CUDA: (end) → new tokens (B,).

    On one device the whole step is one graph, in which the second lane has a stream of its own: its kernels run in the
    gaps that the first one leaves, unless it has to wait for the first. On two devices each lane is a graph, and they
    meet in the choice.
    """
    first, *others = lanes
    slots = first.cache.slots
    if any(lane.device != first.device for lane in others):
        steps = [recorded(lane.step, slots, [lane.positions]) for lane in lanes]
        return lambda end: decide([step(end) for step in steps])
    state = [buffer for lane in lanes for buffer in (lane.tokens, lane.positions)]
    # what reads the first lane waits for it; sums over ranks from two streams could meet in another order on another rank
    if torch.distributed.is_initialized() or any(lane.reads for lane in others):
        return recorded(lambda end: decide([lane.step(end) for lane in lanes]), slots, state, generator)
    streams = [torch.cuda.Stream(first.device) for _ in others]

    def step(end: int) -> Tensor:
        main, z_others = torch.cuda.current_stream(), []
        for stream, lane in zip(streams, others):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                z_others.append(lane.step(end))
        z = [first.step(end), *z_others]
        for stream in streams:
            main.wait_stream(stream)
        return decide(z)
    return recorded(step, slots, state, generator)
