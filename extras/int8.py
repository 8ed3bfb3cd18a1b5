"""A frozen base in eight bits: of each matrix int8 numbers, and a scale for each row.

    python train.py --base DIR --base_dtype int8 --data chats.json --out DIR
    python sample.py --base DIR --base_dtype int8 --value DIR "question"

Nobody trains through the base, and only its logits are read: so of all models here it is the one
that may be rounded. It takes half the memory of bfloat16, a quarter of float32. It is rounded while
it is read, tensor by tensor; embedding and unembedding too, the norms not.

Why it multiplies as it does: on a CPU PyTorch's own product of bfloat16 rows with int8 numbers,
`torch._weight_int8pack_mm`, beats float32 as long as reading the matrix is what takes the time, up
to some 20 rows: so decoding uses it. Its float32 form is several times slower than float32 itself,
and so is torchao 0.18, one call on `nn.Linear`, for one row, where nothing is compiled. For more
rows, and always in training, the matrix is made floats again, a piece of it at a time: on a CPU one
that stays in the cache is made sooner than floats are read from memory, and no whole matrix of
floats exists. On CUDA PyTorch's kernel takes float32 rows, and has a thread for each number of the
result that reads a row of the matrix alone: there a short kernel of our own takes its place.
PyTorch's compiler, in 2.13, fails at PyTorch's product: so --compile is refused beside
--base_dtype. What comes of it all:

    python experiments/bench.py decode --shape 58m 24m --peers int8
    python experiments/bench.py train-step --shape 58m 24m --peers int8
    python experiments/rounding.py family

Under torchrun each rank rounds what it reads. Where decoding cuts a matrix by columns, a piece of a
row has a scale of its own: that is rounded finer than by one process.

Shapes: n rows, m columns; a view of a matrix has rows in several dimensions, (..., m).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ivl import kernels_compile
from model import Config, Llama
from plumbing.weights import allocate

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

STEPS = 127  # a row's largest weight, up or down
SMALLEST = 1e-30  # scale, so that a row of zeros has one
# rows: up to so many are multiplied by the int8 numbers as they are. The kernel makes floats of the
# numbers for each of them anew
FEW = {"cpu": 16, "cuda": 4}
PIECE = {"cpu": 2**20, "cuda": 2**25}  # weights that are made floats at a time, for more rows
TAKEN = 16  # columns, which PyTorch's product on a CPU takes at a time, past the end of a row too
ROWS, COLUMNS = 4, 1024  # of a matrix, that a program of the kernel reads at a time


# ---------------------------------------------------------------- a matrix


class Matrix:
    """scale · rounded, in the place of a matrix W. A view of it shares its memory, as a tensor's
    does, and what is copied into it is rounded.

    rounded: (..., m) int8. scale: (...), in the type of the arithmetic around it.
    A scale has no more digits than bfloat16, so that in every arithmetic it is the same.

    Example: the largest weight of this row, 63.5, is 127 steps of 0.5; −20.2 is 40 of them
    >>> matrix = Matrix(torch.zeros(1, 3, dtype=torch.int8), torch.zeros(1))
    >>> matrix.copy_(torch.tensor([[63.5, -20.2, 0.1]]))
    >>> matrix.rounded, matrix.scale
    (tensor([[127, -40,   0]], dtype=torch.int8), tensor([0.5000]))
    >>> matrix.floats(torch.float32)
    tensor([[ 63.5000, -20.0000,   0.0000]])
    """

    def __init__(self, rounded: Tensor, scale: Tensor):
        self.rounded = rounded
        self.scale = scale

    # ------------------------------------------------------------ what is asked of a tensor

    @property
    def shape(self) -> torch.Size:
        return self.rounded.shape

    @property
    def device(self) -> torch.device:
        return self.rounded.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def __len__(self) -> int:
        return len(self.rounded)

    def dim(self) -> int:
        return self.rounded.dim()

    def numel(self) -> int:
        return self.rounded.numel()

    def view(self, *shape: int) -> "Matrix":
        """The rows in other dimensions; the last one, the columns, stays."""
        return Matrix(self.rounded.view(shape), self.scale.view(shape[:-1]))

    def __getitem__(self, rows) -> "Matrix":
        return Matrix(self.rounded[rows], self.scale[rows])

    def detach(self) -> "Matrix":
        return self  # it never has a gradient

    def to(self, dtype: torch.dtype) -> "Matrix":
        """The same for another arithmetic."""
        return Matrix(self.rounded, self.scale.to(dtype))

    def to_local(self) -> "Matrix":
        """This rank's rows."""
        return Matrix(self.rounded.to_local(), self.scale.to_local())

    def sum(self) -> Tensor:
        """Of the scales: it is finite if all weights were, and that is what `check_weight` asks."""
        return self.scale.sum()

    def isfinite(self) -> Tensor:
        """Of each row, (...), likewise."""
        return self.scale.isfinite()

    # ------------------------------------------------------------ in and out

    def copy_(self, W: Tensor) -> None:
        """W (..., m), rounded row by row: no weight moves by more than half a step."""
        self[...] = W

    def __setitem__(self, rows, W: Tensor) -> None:
        """Some rows, rounded likewise."""
        W = W.to(self.device)
        largest = torch.maximum(W.amax(-1), -W.amin(-1))  # (...)
        scale = (largest.float() / STEPS).clamp(min=SMALLEST).bfloat16()
        self.scale[rows] = scale.to(self.dtype)
        self.rounded[rows] = (W / scale.float()[..., None]).round_().to(torch.int8)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """W again, but for the rounding."""
        return self.rounded.to(dtype).mul_(self.scale.to(dtype)[..., None])

    @classmethod
    def __torch_function__(cls, function, types, args=(), options=None):
        """PyTorch's way to ask of something that is no tensor what a function shall do with it."""
        if function not in FUNCTIONS:
            return NotImplemented
        return FUNCTIONS[function](*args, **(options or {}))


def linear(x: Tensor, matrix: Matrix) -> Tensor:
    """x Wᵀ, as `F.linear`.  x (..., m) → (..., n)"""
    n, m = matrix.rounded.shape
    rows = x.reshape(-1, m)  # (r, m)
    # while training, where a batch is read in parts of any size, all are multiplied in one way
    few = len(rows) <= FEW.get(x.device.type, FEW["cuda"]) and torch.is_inference_mode_enabled()
    if few and x.is_cuda and kernels_compile():
        y = product(rows.contiguous(), matrix.rounded, matrix.scale)
    elif few and m % TAKEN == 0 and x.device.type == "cpu":
        rows, scale = rows.bfloat16().contiguous(), matrix.scale.bfloat16()
        y = torch._weight_int8pack_mm(rows, matrix.rounded, scale).to(x.dtype)
    else:
        y = rows.new_empty(len(rows), n)
        size = max(1, PIECE.get(x.device.type, PIECE["cuda"]) // m)  # in rows of the matrix
        for start in range(0, n, size):
            piece = matrix[start : start + size].floats(x.dtype)
            torch.mm(rows, piece.t(), out=y[:, start : start + size])
    return y.view(*x.shape[:-1], n)


FUNCTIONS = {
    F.linear: linear,
    # a tensor is made like a matrix in the same way as like a tensor; it is rounded on arrival
    Tensor.to: lambda W, matrix: W.to(matrix.device),
}


# ---------------------------------------------------------------- the kernel

if triton is not None:
    # bfloat16 holds each of the numbers exactly, and from H100 on there is a fast way to it;
    # straight to float32 is one slow instruction a weight
    VIA = tl.bfloat16

    @triton.jit
    def _product(
        x,  # pointer, (r, m)
        rounded,  # pointer, (n, m)
        scale,  # pointer, (n,)
        y,  # pointer, (r, n): result
        r,
        n,
        m,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        VIA: tl.constexpr,
    ):
        """One program for some rows of the matrix and one of x. Those that read the same rows of
        the matrix stand side by side, so that it comes from memory once.
        """
        row_of_x = (tl.program_id(0) % r).to(tl.int64)
        rows = (tl.program_id(0) // r).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, m, COLUMNS):
            i = start + tl.arange(0, COLUMNS)
            there = (rows < n)[:, None] & (i < m)[None, :]
            W = tl.load(rounded + rows[:, None] * m + i[None, :], there, 0)
            W = W.to(VIA).to(tl.float32)
            total += W * tl.load(x + row_of_x * m + i, i < m, 0.0).to(tl.float32)
        sums = tl.sum(total, 1) * tl.load(scale + rows, rows < n, 0.0).to(tl.float32)
        tl.store(y + row_of_x * n + rows, sums.to(y.dtype.element_ty), rows < n)


def product(x: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:
    """x (r, m), rounded (n, m), scale (n,), all contiguous → (r, n), as one kernel that reads int8
    and sums in float32.
    """
    r, n, m = len(x), *rounded.shape
    y = x.new_empty(r, n)
    with torch.cuda.device_of(x):  # or Triton would launch on the current device
        _product[(r * triton.cdiv(n, ROWS),)](x, rounded, scale, y, r, n, m, ROWS, COLUMNS, VIA)
    return y


# ---------------------------------------------------------------- a network of them


class Int8(nn.Module):
    """The matrix of a layer. To FSDP it is two parameters, each cut by rows."""

    def __init__(self, n: int, m: int):
        super().__init__()
        self.rounded = nn.Parameter(torch.zeros(n, m, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(n), requires_grad=False)

    @property
    def weight(self) -> Matrix:
        return Matrix(self.rounded, self.scale)


class Int8Linear(Int8):
    def forward(self, x: Tensor) -> Tensor:
        """x (..., m) → (..., n)."""
        return linear(x, self.weight)


class Int8Embedding(Int8):
    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) → (..., m)."""
        return self.weight[ids].floats(self.scale.dtype)


class Int8Llama(Llama):
    """A Llama whose matrices are rounded when weights are copied into them."""

    def __init__(self, config: Config):
        super().__init__(config)
        rounds = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}
        for module in list(self.modules()):
            for name, layer in list(module.named_children()):
                if type(layer) in rounds:
                    setattr(module, name, rounds[type(layer)](*layer.weight.shape))

    def size(self) -> int:
        """The number of parameters of the Llama that was rounded: the scales are not counted."""
        with torch.device("meta"):
            return Llama(self.config).size()


@torch.no_grad()
def rounded(model: Llama) -> Int8Llama:
    """A model that is in memory, once more in eight bits."""
    with torch.device("meta"):
        twin = Int8Llama(model.config)
    allocate(twin, model.embed.weight.device, model.embed.weight.dtype)
    weights = dict(model.named_modules())
    for name, module in twin.named_modules():
        if hasattr(module, "weight"):
            module.weight.copy_(weights[name].weight)
    return twin.requires_grad_(False)
