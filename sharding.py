"""Several devices: what changes when torchrun starts a script in N processes, the ranks, one for each GPU.

    torchrun --nproc_per_node 4 train.py --base DIR --data chats.json --out DIR

Nothing in the network knows of it. Training is FSDP2: each rank keeps one N-th of every parameter (of its gradient
and optimizer state too), gathers a layer when the layer's turn comes, and reads its share of every batch's chats.
The loss is a sum weighted by the tokens of all ranks, so N changes nothing but the order of additions.

Without torchrun there is one rank, no process group, and every function here is what it wraps.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import files
import model as whole
from files import InputError
from model import Config, Llama, hf_views, inverse_frequencies, stored_tensors


# ---------------------------------------------------------------- ranks

@contextmanager
def ranks() -> Iterator[None]:
    """Joins the processes that torchrun started; alone it does nothing. `@ranks()` above a script's `main`.

    stdout belongs to rank 0. An error that all ranks meet is told once, by the first, and so is the death of a rank,
    which the others notice when they wait for it: torchrun then ends them all and names the one that died.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    store, rank, size = next(dist.rendezvous("env://"))  # torchrun's own, so it outlives any rank
    if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=timedelta(hours=2))  # rank 0 may tokenize long
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
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


def first_row(p: Tensor) -> int:
    """The row of the whole parameter with which this rank's piece begins: `fully_shard` cuts like `Tensor.chunk`."""
    return min(len(p), -(-len(p) // world()) * rank())


@torch.no_grad()
def load(directory: str | Path, device: torch.device, dtype: torch.dtype = torch.float32,
         arithmetic: torch.dtype | None = None) -> Llama:
    """`model.load` for training, each rank with its share; it reads no more of the files. Raises InputError.

    arithmetic: the dtype in which matrices are gathered, which should be that of autocast. It would cast just these,
    so the numbers are those of one device; norms, embedding and head keep their dtype, in one group with the root.
    """
    if not dist.is_initialized():
        return whole.load(directory, device, dtype)
    with torch.device("meta"):
        model, plain = (Llama(Config.load(directory)).to(dtype) for _ in range(2))
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(param_dtype=arithmetic, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [layer for block in model.blocks for layer in (block.attention, block.mlp)]
    for part in [*layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy() if part is model else policy)
        part.set_gradient_divide_factor(1.0)  # the sum over the ranks, not the mean
        part.set_force_sum_reduction_for_comms(True)  # as gloo has it
    register_fsdp_forward_method(model, "hidden")  # gathers the root, and keeps it for the head until the backward pass
    model.to_empty(device=device)
    model.inv_freq = inverse_frequencies(model.config).to(device)
    parameters, places = dict(model.named_parameters()), hub_rows(model.config)
    for name, tensor in stored_tensors(Path(directory), hf_views(plain)):
        parameter, rows = places[name]
        start, local = first_row(parameters[parameter]), parameters[parameter].to_local()
        begin, end = torch.searchsorted(rows, torch.tensor([start, start + len(local)])).tolist()
        local[rows[begin:end] - start] = tensor[begin:end].to(local)
    return model


def reshard(model: Llama) -> None:
    """Lets go of what `hidden` has gathered; a backward pass does so too. Then the parameters are shares again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank has a share. All ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
    if not isinstance(like, DTensor):
        return tensors.get_tensor(name)
    start, local = first_row(like), like.to_local()
    local = tensors.get_slice(name)[start:start + len(local)].to(local)
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
