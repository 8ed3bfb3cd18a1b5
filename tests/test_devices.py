"""Models on two GPUs that are not there: no computation mixes tensors of different devices.

Fake tensors know shapes and devices, and refuse to mix devices as a GPU does.
"""

import functools

import pytest
import torch
from conftest import TEXT
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import ivl
from extras import explain, mapped
from extras.connections import Connected, Probe
from extras.mapped import Bridge, Mapped
from model import Config, Llama
from plumbing.tokenizer import Tokenizer
from vocab_map import VocabMap

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]
WAYS = [dict(), dict(temperature=1.0, top_k=20, top_p=0.9, seed=3)]
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
PAIRS = [
    "one device",
    "two devices",
    "base alone",
    "cascade",
    "cascade+",
    "probe",
]


# ---------------------------------------------------------------- GPUs that are not there


class Indexing(TorchFunctionMode):
    """x[...] and copies in single operations: torch without CUDA would ask for its driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            x, chosen = narrowed(*args)
            return x if chosen is None else torch.ops.aten.index(x, chosen)
        if func is torch.Tensor.__setitem__:
            x, chosen = narrowed(*args[:2])
            if chosen is not None:
                torch.ops.aten.index_put_(x, chosen, args[2])
            elif isinstance(args[2], torch.Tensor):
                torch.ops.aten.copy_(x, args[2])
            else:
                x.fill_(args[2])
            return None
        if func is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is torch.Tensor.to and not isinstance(args[0], FakeTensor):
            args = torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:]
        if func is torch.Tensor.exponential_:
            generator = kwargs.pop("generator")
            assert generator.pretended == args[0].device
        return func(*args, **(kwargs or {}))


def narrowed(x, index):
    """A view of x by the numbers and slices of an index, and its tensors (None: it has none).

    Example: x[:, 0, rows] → x.select(1, 0), [None, rows]
    """
    index = index if isinstance(index, tuple) else (index,)
    plain = [i is Ellipsis for i in index]
    if any(plain):
        at = plain.index(True)
        left_out = x.dim() - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * left_out, *index[at + 1 :])
    chosen = []
    for i in index:
        if isinstance(i, int):
            x = x.select(len(chosen), i)
        elif i is None:
            x = x.unsqueeze(len(chosen))
            chosen.append(None)
        elif isinstance(i, slice):
            x = torch.ops.aten.slice(x, len(chosen), i.start, i.stop, i.step or 1)
            chosen.append(None)
        else:
            assert i.device == x.device, f"indices on {i.device} of a tensor on {x.device}"
            chosen.append(i)
    return x, None if all(i is None for i in chosen) else chosen


@pytest.fixture
def gpus(monkeypatch):
    """Tensors may say that they are on a GPU; what the host asks of them is made up."""
    padded = ivl.padded

    class Generator(torch.Generator):
        def __new__(cls, device):
            made = super().__new__(cls)
            made.pretended = device
            return made

    def known(texts):
        tokens, counts = padded(texts)
        tokens.numbers = [[*text, *[0] * (tokens.shape[1] - len(text))] for text in texts]
        counts.numbers = [len(text) for text in texts]
        return tokens, counts

    def numbers(tensor):
        if hasattr(tensor, "numbers"):
            return tensor.numbers
        made_up = 5
        for n in reversed(tensor.shape):
            made_up = [made_up] * n
        return made_up

    monkeypatch.setattr(ivl, "padded", known)
    monkeypatch.setattr(mapped, "padded", known)
    monkeypatch.setattr(FakeTensor, "tolist", numbers)
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: 0.5, raising=False)
    monkeypatch.setattr(torch, "Generator", Generator)
    with FakeTensorMode(), Indexing():
        yield


def placed(model, device):
    """A model on a device, with weights of which only the shapes are known."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, device=device)
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
    if isinstance(model, Llama):
        model.inv_freq = torch.empty(model.inv_freq.shape, device=device)
    return model


def llama(device, **changes):
    shape = dict(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = Llama(Config(**shape | changes))
    return placed(model, device)


def pair(name):
    """A base on the first GPU, and its value models."""
    base, small = llama(FIRST), functools.partial(llama, hidden_size=16)
    match name:
        case "one device":
            return base, [small(FIRST)]
        case "two devices":
            return base, [small(SECOND)]
        case "base alone":
            return base, []
        case "probe":
            with torch.device("meta"):
                probe = Probe(base.config)
            value = Connected("probe", placed(probe, FIRST))
        case connection:
            value = Connected(connection, small(FIRST))
    return value.watched(base), [value]


# ---------------------------------------------------------------- what they notice


def test_gpus_that_are_not_there_refuse_to_meet(gpus):
    base, (value,) = pair("two devices")
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(Exception, match="cuda:0.*cpu|cpu.*cuda:0"):
        base(tokens)
    with pytest.raises(Exception, match="cuda:0.*cuda:1|cuda:1.*cuda:0"):
        base.unembed @ value.unembed.T.new_zeros(32, 4)
    with pytest.raises(Exception, match="cuda"):
        base.unembed[torch.zeros(2, dtype=torch.long, device=SECOND)]


def test_indexing_in_single_operations_is_indexing():
    x = torch.arange(60.0).view(3, 4, 5)
    rows = torch.tensor([2, 0])
    indices = [
        0,
        -1,
        slice(1, None),
        None,
        (slice(None), None),
        (..., -1),
        (..., slice(None, -1), slice(2)),
        rows,
        (rows, rows - 1),
        (rows[:, None], slice(None), rows[None]),
        (0, ..., None),
    ]
    for index in indices:
        old = x.clone()
        old[index] = -1.0
        with Indexing():
            there, new = x[index], x.clone()
            new[index] = torch.tensor(-1.0)
        assert torch.equal(there, x[index])
        assert torch.equal(new, old)


# ---------------------------------------------------------------- reading and decoding


@pytest.mark.parametrize("name", PAIRS)
def test_a_model_reads_wherever_it_is(gpus, name):
    """Tokens may come from another device, as those that the base has chosen do."""
    tokens, counts = ivl.padded(PROMPTS)
    base, values = pair(name)
    models = [base, *values]
    readers = [model.reader(3, 12) for model in models]
    for device in (torch.device("cpu"), FIRST, SECOND):
        next_tokens = torch.zeros(3, 1, dtype=torch.long, device=device)
        for model, reader in zip(models, readers):
            assert reader.read(tokens, counts).device == model.unembed.device
        for model, reader in zip(models, readers):
            assert reader.read(next_tokens).device == model.unembed.device
        for model, reader in zip(models, readers):
            assert reader.read_each(next_tokens.expand(3, 4)).device == model.unembed.device
        for reader in readers:
            reader.back_to([2, 0, 5])
            assert len(reader.room()) == 3
        for model, reader in zip(models, readers):
            assert reader.read(next_tokens).device == model.unembed.device
        for reader in readers:
            reader.back_to([0, 0, 0])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_decodes_wherever_its_models_are(gpus, name, way):
    base, values = pair(name)
    how = {"alphas": [0.7] * len(values), "vocabulary": 110, **way}
    steps = list(ivl.generate(base, values, PROMPTS, 4, **how))
    assert steps == [[5, 5, 5]] * 4


class OnDevice(TorchFunctionMode):
    """Whatever is made is on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor):
                assert made.device.type == "cuda", f"{func} makes a tensor on the host"
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["one device", "base alone", "cascade", "cascade+", "probe"])
def test_a_step_makes_nothing_on_the_host(gpus, name, way):
    """What a graph is recorded of: a tensor from the host would be the same in each replay, and
    each copy from there holds the device up.
    """
    base, values = pair(name)
    readers = [model.reader(3, 12) for model in [base, *values]]
    for reader in readers:
        reader.read(*ivl.padded(PROMPTS))
    generator = torch.Generator(FIRST)
    new = torch.zeros(3, 1, dtype=torch.long, device=FIRST)
    how = way.get("temperature", 0.0), way.get("top_k", 0), way.get("top_p", 1.0)
    with OnDevice():
        z_base, *z_deltas = [reader.read(new) for reader in readers]
        z_post = ivl.combine_all(z_base, z_deltas, None)[:, :110]
        assert ivl.choose(z_post, *how, generator).shape == (3,)


@pytest.fixture
def tokenizers(base_dir, other_dir):
    return Tokenizer(base_dir), Tokenizer(other_dir)


def really(method):
    """A method that works with real numbers, whatever the tensors around it pretend."""

    @functools.wraps(method)
    def real(*args):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return method(*args)

    return real


@pytest.mark.parametrize("device", [FIRST, SECOND])
@pytest.mark.parametrize("method", ["bytes", "paper"])
def test_a_mapped_base_and_its_value_model(monkeypatch, gpus, tokenizers, device, method):
    for name in ("__init__", "_row_of"):
        monkeypatch.setattr(Bridge, name, really(getattr(Bridge, name)))
    mapping = really(VocabMap.make)(*tokenizers, TEXT.split(". "), method)
    sizes = [len(side.bytes) for side in (mapping.base, mapping.value)]
    base = Mapped(llama(FIRST, vocab_size=sizes[0]), mapping)
    value = llama(device, vocab_size=sizes[1])
    steps = list(ivl.generate(base, [value], PROMPTS, 3))
    assert steps == [[5, 5, 5]] * 3
    reader = base.reader(3, 12)
    for _ in range(2):
        assert reader.read(*ivl.padded(PROMPTS)).device == FIRST
        assert reader.read_each(torch.zeros(3, 2, dtype=torch.long, device=SECOND)).device == FIRST
        reader.back_to([0, 0, 0])


def test_who_said_it_of_models_on_two_devices(gpus, tokenizers):
    V = len(tokenizers[0].tokens)
    base, value = llama(FIRST, vocab_size=V), llama(SECOND, vocab_size=V)
    reply = [5, 6, 7]
    z = explain.read_again(base, [value], PROMPTS[0], reply)
    assert len(explain.who_said(*z, tokenizers[0], reply)) == 3
