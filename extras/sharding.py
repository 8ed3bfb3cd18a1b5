"""Several devices: what changes when torchrun starts a script in N processes, the ranks, one for
each GPU.

    torchrun --nproc_per_node 4 train.py --base DIR --data chats.json --out DIR
    torchrun --nproc_per_node 4 sample.py --base DIR --value DIR "question"

Nothing in the network knows of it. Training is FSDP2: each rank keeps one N-th of every parameter
(of its gradient and optimizer state too), gathers a layer when the layer's turn comes, and reads
its share of every batch's chats. The loss is a sum weighted by the tokens of all ranks, so N
changes nothing but the order of additions.

Decoding is tensor-parallel: every rank reads the whole text with one N-th of the attention heads,
of the MLPs and of the vocabulary, and the ranks add what their parts of a layer give. The logits
are never brought together: each rank combines its slice of both models', and the ranks agree on a
token.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
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

from ivl import choose
from model import Config, Llama, hf_views, inverse_frequencies
from plumbing import files
from plumbing.files import InputError
from plumbing.weights import allocate, check_weight, read_config, stored_tensors
from plumbing.weights import save as save_llama

# ---------------------------------------------------------------- ranks


def backend() -> str:
    """Numbers are summed in host memory, tensors where they are: each has its own library."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


@contextmanager
def ranks() -> Iterator[None]:
    """Joins the processes that torchrun started, and ends them: `@ranks()` above a script's `main`.

    Rank 0 speaks. An error that all ranks meet is told once, by the one that meets it first, and so
    is the death of a rank, which the others notice when they wait for it: torchrun then ends them
    all and names the one that died.
    """
    # imported before there is a group: a function in it has the current group as a default, which
    # would keep the group, and gloo's thread, alive past its end
    import torch.distributed.nn  # noqa: F401

    store, rank, size = next(dist.rendezvous("env://"))  # torchrun's own, so it outlives any rank
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # a long time: rank 0 may tokenize while the others wait
    patience = timedelta(hours=2)
    dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=patience)
    if rank > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        yield
    except (InputError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost and not isinstance(error, InputError):
            raise
        if store.add("errors", 1) > 1:  # another rank has told it
            sys.exit(2)
        if lost:
            raise InputError(
                "a rank has died, and the job with it; the same command goes on from what is "
                "saved (train.py with --resume)"
            ) from None
        raise
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    dist.destroy_process_group()
    sys.stdout.flush()
    # PyTorch's caches keep the group, and so gloo's threads: one that wakes while the interpreter
    # ends would abort it
    os._exit(0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_0(thing: object) -> object:
    """What rank 0 has, on all ranks."""
    box = [thing]
    dist.broadcast_object_list(box)
    return box[0]


def ask(prompt: str) -> str:
    """`input`, asked once for all ranks. Raises EOFError."""
    line = None
    if rank() == 0:
        with suppress(EOFError):
            line = input(prompt)
    line = from_rank_0(line)
    if line is None:
        raise EOFError
    return line


def lead(asked: object, names: Sequence[str]) -> None:
    """On rank 0, from now on: whoever calls one of these methods calls it on all ranks, of which
    the others wait in `follow`. What a method gives must be used to the end.
    """

    def on_all(name: str, method: Callable, *args, **options):
        from_rank_0((name, args, options))
        return method(*args, **options)

    for name in names:
        setattr(asked, name, partial(on_all, name, getattr(asked, name)))


def follow(asked: object) -> None:
    """On the other ranks: does what rank 0 does, until that sends None."""
    while call := from_rank_0(None):
        name, args, options = call
        for _ in getattr(asked, name)(*args, **options):
            pass


# ---------------------------------------------------------------- weights in and out


def hub_rows(config: Config) -> dict[str, tuple[str, Tensor]]:
    """The Hub's name of each tensor → our parameter's name, and the row of it that each row is.

    Example: an MLP of inner width 2. The rows of our gate_up are gate 0, up 0, gate 1, up 1, so
        mlp.gate_proj → mlp.gate_up, [0, 2]         mlp.up_proj → mlp.gate_up, [1, 3]
    A rank that keeps rows 1 and 2 of gate_up reads row 0 of up_proj and row 1 of gate_proj.

    `hf_views` says it, asked about a Llama whose weights are the numbers of their rows. The numbers
    ascend, so the rows of one of the Hub's tensors that lie in a contiguous piece of ours are
    contiguous too.
    """
    with torch.device("meta"):
        model = Llama(config).requires_grad_(False)
    numbers = {}
    for name, p in model.named_parameters():
        # each row holds its own number
        row = torch.arange(len(p)).view(-1, *[1] * (p.dim() - 1))  # (n,) or (n, 1)
        numbers[name] = row.expand(p.shape)
    model.load_state_dict(numbers, assign=True)

    # a view shares its parameter's storage: by that address its parameter is found
    owner = {p.data_ptr(): name for name, p in model.named_parameters()}
    places = {}
    for name, view in hf_views(model).items():
        if view.dim() > 1:
            view = view[..., 0]  # one number a row
        parameter = owner[view.untyped_storage().data_ptr()]
        places[name] = parameter, view.flatten().contiguous()
    return places


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Our name of each weight, the names that `hub_rows` gives; those of extras/int8.py are no
    parameters, but made of two.
    """
    modules = model.named_modules()
    return {
        f"{name}.weight": module.weight for name, module in modules if hasattr(module, "weight")
    }


def read_pieces(
    directory: str | Path, config: Config, pieces: dict[str, tuple[Tensor, int, int]]
) -> None:
    """Reads from the Hub's files no more than this rank keeps; raises InputError.

    pieces: of each of our parameters (n, m) or (n,) the piece that is to be filled, its first row,
    its first column.
    """
    with torch.device("meta"):
        views = hf_views(Llama(config))
    places = hub_rows(config)
    for name, tensor in stored_tensors(Path(directory), views):
        parameter, rows = places[name]
        piece, row, column = pieces[parameter]
        # `rows` ascends: begin to end are those of the Hub's rows that this rank's piece holds
        begin, end = torch.searchsorted(rows, torch.tensor([row, row + len(piece)])).tolist()
        columns = ()
        if piece.dim() > 1:
            columns = (slice(column, column + piece.shape[1]),)
        read = tensor[(slice(begin, end), *columns)].to(piece)
        check_weight(name, read, directory)
        piece[rows[begin:end] - row] = read


# ---------------------------------------------------------------- training


class Ranks:
    """What `train.train` asks of the machine, see `train.OneDevice`, answered by all ranks."""

    @property
    def writes(self) -> bool:
        return rank() == 0

    @torch.no_grad()
    def load(
        self,
        directory: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: torch.dtype,
        network: type[Llama] = Llama,
    ) -> Llama:
        """A Llama of which each rank has its share. Raises InputError.

        arithmetic: the dtype in which matrices are gathered, which should be that of autocast. It
        would cast just these, so the numbers are those of one device; norms, embedding and
        unembedding keep their dtype, in one group with the root.
        """
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        with torch.device("meta"):
            model = network(read_config(directory)).to(dtype)
        mesh = init_device_mesh(device.type, (rank_count(),))
        policy = MixedPrecisionPolicy(
            param_dtype=arithmetic, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        layers = [layer for block in model.blocks for layer in (block.attention, block.mlp)]
        for part in [*layers, model]:
            # the root holds embedding, unembedding and all norms, which keep their dtype
            part_policy = MixedPrecisionPolicy() if part is model else policy
            fully_shard(part, mesh=mesh, mp_policy=part_policy)
            part.set_gradient_divide_factor(1.0)  # the sum over the ranks, not the mean
            part.set_force_sum_reduction_for_comms(True)  # a plain sum, which every backend has
        # gathers the root, and keeps it for the unembedding until the backward pass
        register_fsdp_forward_method(model, "hidden")

        model.to_empty(device=device)
        model.inv_freq = inverse_frequencies(model.config).to(device)
        read_pieces(
            directory,
            model.config,
            {name: (W.to_local(), first_row(W), 0) for name, W in weights_of(model).items()},
        )
        return model

    @torch.no_grad()
    def save(self, model: Llama, directory: str | Path) -> None:
        """`model.save`, gathered tensor by tensor and written by rank 0."""
        parameters = dict(model.named_parameters())
        places = hub_rows(model.config)

        def fetch(name: str) -> Tensor:
            parameter, rows = places[name]
            return self.whole(parameters[parameter])[rows]

        if rank() > 0:
            for name in places:
                fetch(name)
            return
        with torch.device("meta"):
            shapes = Llama(model.config)
        save_llama(shapes, directory, fetch=fetch)

    def parts(self, rows: list[int], size: int) -> list[list[int]]:
        """This rank's part of `rows`, `size` at a time. Every rank gets as many lists, the last
        ones perhaps empty: a rank that left a step out would let the others wait for ever.
        """
        mine = rows[rank() :: rank_count()]
        # as many lists on every rank: rounded up
        count = -(-len(rows) // (size * rank_count()))
        return [mine[size * i : size * (i + 1)] for i in range(count)]

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the ranks."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which each rank has a share. All ranks must ask."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def rest(self, model: Llama) -> None:
        """Lets go of what `hidden` has gathered: the parameters are shares again."""
        model.reshard()

    def write_tensors(self, tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
        """`files.save_tensors`, gathered one by one and written by rank 0; all of one dtype."""
        if rank() > 0:
            for tensor in tensors.values():
                self.whole(tensor)
        else:
            files.save_tensors(tensors, path, metadata, lambda name: self.whole(tensors[name]))
        self.total(0)  # nobody goes on, or ends, before the file stands

    def read_tensor(self, file, name: str, like: Tensor) -> Tensor:
        """Of an open file's tensor, each rank reads the share that `like` is of its own."""
        start = first_row(like)
        local = like.to_local()
        local = file.get_slice(name)[start : start + len(local)].to(local)
        return like.from_local(
            local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 does the block before the others: what it leaves in a file is there for them."""
        if rank() > 0:
            self.total(0)  # a sum of numbers waits for all ranks
        yield
        if rank() == 0:
            self.total(0)


def first_row(W: Tensor) -> int:
    """The row with which this rank's share begins: `fully_shard` cuts like `Tensor.chunk`.

    Example: 10 rows on 4 ranks are 3, 3, 3, 1; rank 2 begins with row 6.
    """
    return min(len(W), -(-len(W) // rank_count()) * rank())


# ---------------------------------------------------------------- decoding


def cut(n: int, i: int) -> int:
    """Where slice i begins if n tokens are cut into as good as equal slices."""
    return n * i // rank_count()


def look_up_slice(embed: Callable[[Tensor], Tensor], start: int, n: int, ids: Tensor) -> Tensor:
    """An embedding of n rows, those from `start` on: a token is looked up on the rank that has
    it.
    """
    # 0 stands in for the tokens of other ranks; its row counts as zeros, and all are summed
    ids = ids - start
    here = (ids >= 0) & (ids < n)
    return summed(embed(ids * here) * here[..., None])


@torch.no_grad()
def load_slice(
    directory: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    vocabulary: int | None,
    network: type[Llama] = Llama,
) -> Llama:
    """`model.load` for decoding, each rank with its slice. Raises InputError.

    A slice of a Llama is a narrower Llama with a narrower cache, and its products know nothing of
    the other ranks: a hook on `attention.out` and `mlp.down`, whose outputs are added to the
    residual, sums these over the ranks. (`parallelize_module` does so with DTensors, but for one
    token the host then needs four times as long for a pair of products.) A network whose key-value
    heads or MLP the ranks cannot share equally stays whole on each.
    vocabulary: the tokens that count; of their embeddings and logits each rank has a slice. None:
    all, on every rank.
    """
    config = read_config(directory)
    n = rank_count()

    # the narrower shape
    narrow = config
    if config.num_key_value_heads % n == 0 and config.intermediate_size % n == 0:
        narrow = replace(
            config,
            num_attention_heads=config.num_attention_heads // n,
            num_key_value_heads=config.num_key_value_heads // n,
            intermediate_size=config.intermediate_size // n,
        )
    elif rank() == 0:
        print(
            f"{directory}: stays whole on every rank; {n} ranks cannot share its "
            f"{config.num_key_value_heads} key-value heads and its MLP of "
            f"{config.intermediate_size} equally",
            file=sys.stderr,
        )
    start = 0
    if vocabulary is not None:
        start = cut(vocabulary, rank())
        narrow = replace(narrow, vocab_size=cut(vocabulary, rank() + 1) - start)

    # the network
    with torch.device("meta"):
        model, plain = network(narrow), Llama(config)
    if vocabulary is not None:
        look_up = model.embed.forward
        model.embed.forward = partial(look_up_slice, look_up, start, narrow.vocab_size)
    if narrow.num_key_value_heads < config.num_key_value_heads:
        for block in model.blocks:
            for product in (block.attention.out, block.mlp.down):
                product.register_forward_hook(lambda module, inputs, output: summed(output))
    allocate(model, device, dtype)

    # its weights: along a dimension that is narrower, this rank's part of it
    pieces = {}
    for (name, W), full in zip(weights_of(model).items(), plain.parameters()):
        row = column = 0
        if len(W) < len(full):
            row = rank() * len(W)
        if W.dim() > 1 and W.shape[1] < full.shape[1]:
            column = rank() * W.shape[1]
        if name in ("embed.weight", "lm_head.weight"):
            row = start  # slices of the vocabulary are not all of one size
        pieces[name] = W, row, column
    read_pieces(directory, config, pieces)
    return model


def chooser(vocabulary: int | None) -> Callable[..., Tensor]:
    """`ivl.choose` for models from `load_slice`; all ranks get the same tokens."""
    return choose_as_rank_0 if vocabulary is None else partial(choose_from_slices, vocabulary)


def choose_as_rank_0(*args) -> Tensor:
    """For a mapped base, whose bytes need all of its logits: every rank has computed them."""
    tokens = choose(*args)
    dist.broadcast(tokens, 0)
    return tokens


def choose_from_slices(
    vocabulary: int,
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token of each row, as `ivl.choose` has it.  this rank's logits (B, n) → (B,)"""
    start = cut(vocabulary, rank())
    width = logits.shape[-1]
    score = logits.float()  # (B, n), whose largest is chosen
    if temperature > 0:
        # p is not normalised: the choice needs only ratios
        z = score / temperature
        z = z - summed(z.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        p = z.exp()
        if top_k:
            p = p * (z > threshold(z, torch.ones_like(z), top_k))
        if top_p < 1:
            p = p * (z > threshold(z, p, top_p * summed(p.sum(-1, keepdim=True))))
        # every rank draws the noise of all tokens: these do not depend on the number of ranks
        noise = torch.empty(len(p), vocabulary, device=p.device).exponential_(generator=generator)
        score = p / noise[:, start : start + width]

    # the best of this slice, the best of all, and of equally good ones the first
    best, token = score.max(-1)
    of_all = summed(best.clone(), dist.ReduceOp.MAX)
    token = torch.where(best == of_all, token + start, vocabulary)
    return summed(token, dist.ReduceOp.MIN)


def threshold(z: Tensor, weight: Tensor, enough: float | Tensor) -> Tensor:
    """For each row a logit (B, 1): the tokens above it are the fewest likeliest ones whose weights
    reach `enough` over all ranks.  z ≤ 0, weight: (B, n)

    In each of eight rounds the interval is cut into 16, and the piece is kept in which the weight
    above falls below `enough`. It begins with 128, under which exp(z) is 0, so at the end logits
    count as equal that differ by less than 3e-8.
    """
    # (−128, 0] in 16 pieces of 8, then the piece that is kept in 16 of 0.5, ...
    low = torch.full_like(z[:, :1], -128.0)  # (B, 1)
    step = 8.0
    for _ in range(8):
        edges = low + step * torch.arange(1, 16, device=z.device)  # (B, 15)
        is_above = z[..., None] > edges[:, None]  # (B, n, 15)
        above = summed((weight[..., None] * is_above).sum(1))  # (B, 15)
        low = low + step * (above >= enough).sum(-1, keepdim=True)
        step /= 16
    return low


def summed(x: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
    """x, summed over the ranks (or another `op`), in place."""
    dist.all_reduce(x, op)
    return x
