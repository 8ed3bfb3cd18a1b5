"""Several devices: what changes when torchrun starts a script in N processes, the ranks, one for each GPU.

    torchrun --nproc_per_node 4 train.py --base DIR --data chats.json --out DIR
    torchrun --nproc_per_node 4 sample.py --base DIR --value DIR "question"

Nothing in the network knows of it. Training is FSDP2: each rank keeps one N-th of every parameter (of its gradient
and optimizer state too), gathers a layer when the layer's turn comes, and reads its share of every batch's chats.
The loss is a sum weighted by the tokens of all ranks, so N changes nothing but the order of additions.

Decoding is tensor-parallel: every rank reads the whole text with one N-th of the heads, of the MLPs and of the
vocabulary, and the ranks add what their parts of a layer give. The logits are never brought together: each rank
combines its slice of both models', and the ranks agree on a token.

Without torchrun there is one rank, no process group, and every function here is what it wraps.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import files
import model as whole
from decode import choose
from files import InputError
from model import Config, Llama, hf_views, inverse_frequencies, stored_tensors


# ---------------------------------------------------------------- ranks

@contextmanager
def ranks() -> Iterator[None]:
    """Joins the processes that torchrun started; alone it does nothing. `@ranks()` above a script's `main`.

    Rank 0 speaks. An error that all ranks meet is told once, by the first, and so is the death of a rank, which the
    others notice when they wait for it: torchrun then ends them all and names the one that died.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    # before there is a group: a default argument in it would keep the group, and a thread of gloo's, past the end
    import torch.distributed.nn  # noqa: F401
    store, rank, size = next(dist.rendezvous("env://"))  # torchrun's own, so it outlives any rank
    if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(hours=2))  # rank 0 may tokenize long
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (InputError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost and not isinstance(error, InputError):
            raise
        if store.add("errors", 1) > 1:
            sys.exit(2)
        if lost:
            raise InputError("a rank has died, and the job with it; train.py goes on from its last complete checkpoint "
                             "with the same command and --resume") from None
        raise
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 does the block before the others do: what it leaves in a file is there for them."""
    if rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def ask(prompt: str) -> str:
    """`input`, asked once for all ranks. Raises EOFError."""
    if world() == 1:
        return input(prompt)
    line = [None]
    if rank() == 0:
        with suppress(EOFError):
            line = [input(prompt)]
    dist.broadcast_object_list(line)
    if line[0] is None:
        raise EOFError
    return line[0]


def total(*numbers: float) -> list[float]:
    """The sum of each number over the ranks."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def shares(rows: list[int], size: int) -> list[list[int]]:
    """This rank's part of `rows`, `size` at a time. Every rank gets as many lists, the last ones perhaps empty: a
    rank that left a step out would let the others wait for ever."""
    mine = rows[rank()::world()]
    return [mine[size * i:size * (i + 1)] for i in range(-(-len(rows) // (size * world())))]


# ---------------------------------------------------------------- weights in and out

def hub_rows(config: Config) -> dict[str, tuple[str, Tensor]]:
    """The Hub's name of each tensor → our parameter's name and, of each row of the tensor, the row of the parameter.

    `hf_views` says it, asked about a Llama whose weights are the numbers of their rows. The numbers ascend, so the
    rows of one of the Hub's tensors that lie in a contiguous piece of ours are contiguous too.
    """
    with torch.device("meta"):
        model = Llama(config).requires_grad_(False)
    numbers = {name: torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1)).expand(p.shape)
               for name, p in model.named_parameters()}
    model.load_state_dict(numbers, assign=True)
    owner = {p.data_ptr(): name for name, p in model.named_parameters()}
    views = {name: view if view.dim() == 1 else view[..., 0] for name, view in hf_views(model).items()}
    return {name: (owner[view.untyped_storage().data_ptr()], view.flatten().contiguous()) for name, view in views.items()}


def read(directory: str | Path, config: Config, pieces: dict[str, tuple[Tensor, int, int]]) -> None:
    """Reads from the Hub's files no more than this rank keeps; raises InputError.

    pieces: of each of our parameters (n, m) or (n,) the piece that is to be filled, its first row, its first column.
    """
    with torch.device("meta"):
        views = hf_views(Llama(config))
    places = hub_rows(config)
    for name, tensor in stored_tensors(Path(directory), views):
        parameter, rows = places[name]
        piece, row, column = pieces[parameter]
        begin, end = torch.searchsorted(rows, torch.tensor([row, row + len(piece)])).tolist()
        columns = () if piece.dim() == 1 else (slice(column, column + piece.shape[1]),)
        piece[rows[begin:end] - row] = tensor[begin:end, *columns].to(piece)


# ---------------------------------------------------------------- training

def first_row(p: Tensor) -> int:
    """The row of the whole parameter with which this rank's piece begins: `fully_shard` cuts like `Tensor.chunk`."""
    return min(len(p), -(-len(p) // world()) * rank())


@torch.no_grad()
def load(directory: str | Path, device: torch.device, dtype: torch.dtype = torch.float32,
         arithmetic: torch.dtype | None = None) -> Llama:
    """`model.load` for training, each rank with its share. Raises InputError.

    arithmetic: the dtype in which matrices are gathered, which should be that of autocast. It would cast just these,
    so the numbers are those of one device; norms, embedding and head keep their dtype, in one group with the root.
    """
    if not dist.is_initialized():
        return whole.load(directory, device, dtype)
    # here, since it takes a second, for which one process need not wait
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    with torch.device("meta"):
        model = Llama(Config.load(directory)).to(dtype)
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(param_dtype=arithmetic, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [layer for block in model.blocks for layer in (block.attention, block.mlp)]
    for part in [*layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy() if part is model else policy)
        part.set_gradient_divide_factor(1.0)  # the sum over the ranks, not the mean
        part.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend has
    register_fsdp_forward_method(model, "hidden")  # gathers the root, and keeps it for the head until the backward pass
    model.to_empty(device=device)
    model.inv_freq = inverse_frequencies(model.config).to(device)
    read(directory, model.config, {name: (p.to_local(), first_row(p), 0) for name, p in model.named_parameters()})
    return model


def reshard(model: Llama) -> None:
    """Lets go of what `hidden` has gathered; a backward pass does so too. Then the parameters are shares again."""
    if dist.is_initialized():
        model.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank has a share. All ranks must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def save(model: Llama, directory: str | Path) -> None:
    """`model.save`, gathered tensor by tensor and written by rank 0."""
    if not dist.is_initialized():
        return whole.save(model, directory)
    parameters, places = dict(model.named_parameters()), hub_rows(model.config)

    def fetch(name: str) -> Tensor:
        parameter, rows = places[name]
        return gathered(parameters[parameter])[rows]

    if rank() > 0:
        for name in places:
            fetch(name)
        return
    with torch.device("meta"):
        whole.save(Llama(model.config), directory, fetch=fetch)


def save_tensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """`files.save_tensors`, gathered tensor by tensor and written by rank 0; all tensors are of one dtype."""
    if rank() > 0:
        for tensor in tensors.values():
            gathered(tensor)
    else:
        files.save_tensors(tensors, path, metadata, lambda name: gathered(tensors[name]))


def stored(tensors, name: str, like: Tensor) -> Tensor:
    """A tensor of an open file; of one that is like a share, each rank reads its share."""
    if not dist.is_initialized():
        return tensors.get_tensor(name)
    start, local = first_row(like), like.to_local()
    local = tensors.get_slice(name)[start:start + len(local)].to(local)
    return like.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


# ---------------------------------------------------------------- decoding

def cut(n: int, rank: int) -> int:
    """Where the slice of `rank` begins if n tokens are cut into a slice for each rank, of as good as equal sizes."""
    return n * rank // world()


class SlicedEmbedding(nn.Embedding):
    """The embedding, of which each rank has the rows from `start` on: a token is looked up where it is."""
    start = 0

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids - self.start
        here = (ids >= 0) & (ids < self.num_embeddings)
        return reduced(super().forward(ids * here) * here[..., None])


@torch.no_grad()
def load_slice(directory: str | Path, device: torch.device, dtype: torch.dtype, vocabulary: int | None) -> Llama:
    """`model.load` for decoding, each rank with its slice. Raises InputError.

    A slice of a Llama is a narrower Llama, so its cache is narrower too, and no product knows of the others: a hook
    adds up after the two that give to the residual. (`parallelize_module` says the same with tensors that decide
    before each product how to communicate: of one token, the host needs four times as long for a pair of products.)
    A network of which the ranks cannot have equal numbers of key-value heads stays whole on each.
    vocabulary: the tokens that count; of their embeddings and logits each rank has a slice. None: all, on every rank.
    """
    if world() == 1:
        return whole.load(directory, device, dtype)
    config, n = Config.load(directory), world()
    narrow = config
    if config.num_key_value_heads % n == 0 and config.intermediate_size % n == 0:
        narrow = replace(config, **{field: getattr(config, field) // n for field in (
            "num_attention_heads", "num_key_value_heads", "intermediate_size")})
    elif rank() == 0:
        print(f"{directory}: stays whole on every rank; {n} ranks cannot share its {config.num_key_value_heads} key-value "
              "heads equally", file=sys.stderr)
    start = 0
    if vocabulary is not None:
        start = cut(vocabulary, rank())
        narrow = replace(narrow, vocab_size=cut(vocabulary, rank() + 1) - start)
    with torch.device("meta"):
        model, plain = Llama(narrow), Llama(config)
        if vocabulary is not None:
            model.embed = SlicedEmbedding(narrow.vocab_size, narrow.hidden_size)
            model.embed.start = start
    if narrow.num_key_value_heads < config.num_key_value_heads:
        for block in model.blocks:
            for product in (block.attention.out, block.mlp.down):
                product.register_forward_hook(lambda module, inputs, output: reduced(output))
    model.to(dtype).to_empty(device=device)
    model.inv_freq = inverse_frequencies(config).to(device)


    pieces = {}
    for (name, p), of in zip(model.named_parameters(), plain.parameters()):
        row, column = (rank() * a if a < b else 0 for a, b in zip((*p.shape, 1), (*of.shape, 1)[:2]))
        pieces[name] = p, start if name in ("embed.weight", "lm_head.weight") else row, column
    read(directory, config, pieces)
    return model


def chooser(vocabulary: int | None) -> Callable[..., Tensor]:
    """`decode.choose` for the logits of models from `load_slice` with that `vocabulary`; all ranks get the same tokens."""
    if world() == 1:
        return choose
    return choose_as_rank_0 if vocabulary is None else partial(choose_from_slices, vocabulary)


def choose_as_rank_0(*args) -> Tensor:
    """For a mapped base: its distribution over next bytes needs all of its logits, so every rank computes them all."""
    tokens = choose(*args)
    dist.broadcast(tokens, 0)
    return tokens


def choose_from_slices(vocabulary: int, logits: Tensor, temperature: float, top_k: int, top_p: float,
                       generator: torch.Generator | None) -> Tensor:
    """The next token of each row, as `decode.choose` has it.  logits: this rank's slice, (B, n) → (B,)"""
    start, n = cut(vocabulary, rank()), logits.shape[-1]
    score = logits.float()
    if temperature > 0:
        z = score / temperature
        z = z - reduced(z.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        p = z.exp()
        if top_k:
            p = p * (z > threshold(z, torch.ones_like(z), top_k))
        if top_p < 1:
            p = p * (z > threshold(z, p, top_p * reduced(p.sum(-1, keepdim=True))))
        # every rank draws the noise of all tokens: the same seed gives the same tokens to any number of ranks
        noise = torch.empty(len(p), vocabulary, device=p.device).exponential_(generator=generator)
        score = p / noise[:, start:start + n]
    best, token = score.max(-1)
    token = torch.where(best == reduced(best.clone(), dist.ReduceOp.MAX), token + start, vocabulary)
    return reduced(token, dist.ReduceOp.MIN)


def threshold(z: Tensor, weight: Tensor, enough: float | Tensor) -> Tensor:
    """The logit (B, 1) above which lie the fewest likeliest tokens that together weigh `enough`.  z ≤ 0, weight: (B, n)

    Eight times the interval is cut into 16 and the one kept where the weight above falls below `enough`. It begins
    with 128, under which exp(z) is 0, so at the end logits count as equal that differ by less than 3e-8.
    """
    low, step = torch.full_like(z[:, :1], -128.0), 8.0
    for _ in range(8):
        edges = low + step * torch.arange(1, 16, device=z.device)
        above = reduced((weight[..., None] * (z[..., None] > edges[:, None])).sum(1))
        low, step = low + step * (above >= enough).sum(-1, keepdim=True), step / 16
    return low


def reduced(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(x, op)
    return x
