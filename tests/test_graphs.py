"""A step of decoding as a CUDA graph: on a GPU where there is one, and rehearsed on the CPU."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ivl
from extras import graphs
from extras.connections import Connected
from extras.graphs import Graphs, Kept, Recorded
from extras.speculative import Drafts
from model import Config, Llama, Reader
from plumbing.weights import load

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]
WAYS = [dict(), dict(temperature=1.0, top_k=20, top_p=0.9, seed=3)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def plain(base, values, prompts=PROMPTS, new=40, **options):
    return list(ivl.generate(base, values, prompts, new, **options))


def replies(pair, prompts=PROMPTS, new=40, seed=0, stop=()):
    """Of `Graphs`, which know their models."""

    def rounds(base, values, replies):
        return pair.rounds(replies, seed)

    return list(ivl.generate(None, [], prompts, new, stop=stop, rounds=rounds))


def split(way):
    """Options of the pair of models, and options of one text."""
    own = {name: way[name] for name in way if name == "seed"}
    return {name: way[name] for name in way if name not in own}, own


def stopping(free):
    """Two tokens, of which each ends a text of `free` early and not at once."""
    return {free[5][0], free[3][1]}


def cut(free, stop):
    """The replies of `free`, each up to its first token of `stop`."""
    rows = list(zip(*free))
    ends = [next((t for t, i in enumerate(row) if i in stop), len(row) - 1) for row in rows]
    return [
        [i if t <= end else None for i, end in zip(step, ends)]
        for t, step in enumerate(free[: max(ends) + 1])
    ]


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_cuda(base_dir, value_dir):
    return [load(directory, "cuda") for directory in (base_dir, value_dir)]


@needs_cuda
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alone", [False, True])
def test_the_graph_decodes_as_the_plain_step_does(on_cuda, monkeypatch, way, alone):
    monkeypatch.setattr(graphs, "SHORTEST", 16)  # so that three graphs are recorded on the way
    base, value = on_cuda
    values = [] if alone else [value]
    options, own = split(way)
    pair = Graphs(base, values, **options)
    expected = plain(base, values, **way)
    for _ in range(2):
        assert replies(pair, **own) == expected


@needs_cuda
def test_the_graph_stops_where_the_plain_step_stops(on_cuda):
    base, *values = on_cuda
    free = plain(base, values)
    stop = stopping(free)
    expected = cut(free, stop)
    assert replies(Graphs(base, values), stop=stop) == expected == plain(base, values, stop=stop)


# ---------------------------------------------------------------- a CUDA that is not there


class Recording(TorchDispatchMode):
    """Notes the calls that are made, and takes back at the end what they have changed: a real
    recording executes nothing."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")  # the host for the device

    def __init__(self, generators):
        super().__init__()
        self.generators = generators
        self.calls = []
        self.changed = []  # tensors and what they were before, in time's order
        self.drawn = [generator.get_state() for generator in generators]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.WAITS, f"{name} makes the host wait, which cannot be recorded"
        written = [
            arg
            for argument, arg in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.changed += [(tensor, tensor.clone()) for tensor in written]
        before = [generator.get_state() for generator in self.generators]
        out = func(*args, **kwargs)
        if any("Generator" in str(argument.type) for argument in func._schema.arguments):
            moved = [
                not torch.equal(generator.get_state(), state)
                for generator, state in zip(self.generators, before)
            ]
            assert any(moved), "draws from a generator that is not registered"

        # what a replay has to bring where the recording has put it; a view is there already
        there = {place(tensor) for tensor in tensors((args, kwargs))}
        fresh = [place(tensor) not in there for tensor in tensors(out)]
        self.calls.append((func, args, kwargs, out, fresh))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)
        for generator, drawn in zip(self.generators, self.drawn):
            generator.set_state(drawn)

    def replay(self):
        for func, args, kwargs, out, fresh in self.calls:
            again = func(*args, **kwargs)
            for old, new, copied in zip(tensors(out), tensors(again), fresh, strict=True):
                if copied:
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def place(tensor):
    return tensor.untyped_storage().data_ptr()


class FakeCuda:
    """What `extras.graphs` wants of `torch.cuda`, on the CPU; counts what is made.

    It insists on what the device would not forgive: a stream is used after it has waited for the
    one before, which in turn waits for it; a step is done once before it is recorded; what is
    copied to the host arrives when an event recorded after it is waited for.
    """

    def __init__(self):
        self.made = dict(streams=0, recordings=0, replays=0)
        self.recording = None
        self.arriving = []  # copies to the host under way
        self.behind = {}  # which stream each has waited for
        self.unjoined = set()  # streams that nobody has waited for since they were used
        self.warm = set()  # streams that were used since the last recording
        self.current = [Stream(self)]

    def Stream(self, priority=0):
        self.made["streams"] += 1
        return Stream(self)

    def CUDAGraph(self):
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert pool is not None and stream in self.warm
        assert self.recording is None and not self.unjoined
        self.made["recordings"] += 1
        self.recording = graph.recorded = Recording(graph.generators)
        self.current.append(stream)
        with graph.recorded:
            yield
        self.current.pop()
        assert not self.unjoined
        self.recording = None
        self.warm.clear()

    @contextlib.contextmanager
    def stream(self, stream):
        assert self.behind.pop(stream, None) is self.current[-1], "does not wait for its input"
        self.current.append(stream)
        yield
        self.current.pop()
        self.unjoined.add(stream)
        self.warm.add(stream)

    @contextlib.contextmanager
    def device(self, device):
        yield

    def current_stream(self, device=None):
        return self.current[-1]

    def graph_pool_handle(self):
        return object()


class Stream:
    def __init__(self, cuda):
        self.cuda = cuda

    def wait_stream(self, other):
        self.cuda.behind[self] = other
        self.cuda.unjoined.discard(other)

    def record_event(self):
        event = Event(self.cuda.arriving)
        self.cuda.arriving = []
        return event


class Graph:
    def __init__(self, cuda):
        self.cuda = cuda
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        assert self.cuda.recording is None and not self.cuda.unjoined
        assert not self.cuda.arriving, "the host would wait for this step to see the last one"
        self.cuda.made["replays"] += 1
        self.recorded.replay()


class Event:
    def __init__(self, arriving):
        self.arriving = arriving

    def synchronize(self):
        for host, data in self.arriving:
            host.copy_(data)


@pytest.fixture
def cuda(monkeypatch):
    """A fake CUDA, on which steps are recorded from 16 slots on."""
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    monkeypatch.setattr(graphs, "SHORTEST", 16)
    to, tolist = torch.Tensor.to, torch.Tensor.tolist

    def to_host(self, *args, **kwargs):
        if args[:1] != ("cpu",):
            return to(self, *args, **kwargs)
        assert fake.recording is None
        host = torch.full_like(self, -1)
        fake.arriving.append((host, self.clone()))
        return host

    def waiting(self):
        assert fake.recording is None, "the host cannot look at what is being recorded"
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "to", to_host)
    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    return fake


@pytest.fixture(scope="module")
def models():
    """Lively random weights, so that no greedy choice hangs on rounding."""

    def model(seed, **changes):
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
        generator = torch.Generator().manual_seed(seed)
        model = Llama(Config(**shape | changes)).requires_grad_(False)
        for weight in model.parameters():
            weight.normal_(0 if weight.dim() > 1 else 1, 0.3, generator=generator)
        return model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products so small are slower on several
    yield model(1), model(2, hidden_size=16), model(3, hidden_size=16, vocab_size=128)
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- the rehearsal


def warm(cuda):
    """A stream that has been used."""
    stream = cuda.Stream()
    stream.wait_stream(cuda.current_stream())
    with cuda.stream(stream):
        pass
    cuda.current_stream().wait_stream(stream)
    return stream


def test_a_recording_executes_nothing_and_a_replay_everything(cuda):
    """The fake itself: else the tests below would prove little."""
    x = torch.arange(3.0)
    generator = torch.Generator().manual_seed(0)
    graph = cuda.CUDAGraph()
    graph.register_generator_state(generator)
    drawn = generator.get_state()
    stream = warm(cuda)
    with cuda.graph(graph, pool=object(), stream=stream):
        view = x[1:]
        view += 1
        y = x * 2 + torch.empty(3).exponential_(generator=generator)
    assert torch.equal(x, torch.arange(3.0)) and torch.equal(drawn, generator.get_state())
    for n in (1, 2):
        graph.replay()
        now = torch.tensor([0.0, 1.0 + n, 2.0 + n])
        assert torch.equal(x, now) and (y > 2 * now).all()
    stream = warm(cuda)
    with (
        pytest.raises(AssertionError, match="not registered"),
        cuda.graph(cuda.CUDAGraph(), pool=object(), stream=stream),
    ):
        x.exponential_(generator=generator)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", ["residual", "two", "none", "cascade", "cascade+"])
def test_the_rehearsed_graph_decodes_as_the_plain_step_does(cuda, models, way, value):
    base, small, other = models
    streams = 2  # a stream to record on, and one beside
    alphas = [0.7]
    match value:
        case "residual":
            values = [small]
        case "two":
            values = [small, other]
            alphas = [0.7, -0.7]
        case "none":
            values, alphas = [], []
            streams = 1
        case connection:
            values = [Connected(connection, small)]
            base = values[0].watched(base)
            streams = 1
    options, own = split(way)
    expected = plain(base, values, alphas=alphas, vocabulary=110, **way)
    pair = Graphs(base, values, alphas=alphas, vocabulary=110, **options)
    for _ in range(2):
        assert replies(pair, **own) == expected
    assert cuda.made["recordings"] == 3  # of 16, 32, 64 slots
    assert cuda.made["replays"] == 2 * 39
    assert cuda.made["streams"] == streams


def test_graphs_are_kept_until_the_way_of_choosing_changes(cuda, models):
    base, small, other = models
    rounds = Kept().rounds
    for _ in range(2):
        for values in ([small], [other], []):
            steps = ivl.generate(base, values, PROMPTS, 40, rounds=rounds)
            assert list(steps) == plain(base, values)
    assert cuda.made["recordings"] == 3 * 3
    for alpha in (0.5, 0.5):
        steps = ivl.generate(base, [small], PROMPTS, 40, alphas=[alpha], rounds=rounds)
        assert list(steps) == plain(base, [small], alphas=[alpha])
    assert cuda.made["recordings"] == 4 * 3


def test_graphs_die_with_their_owner(cuda, models):
    """NCCL waits at its end until all graphs are gone, and each holds caches: they are not to wait
    for the garbage collector.
    """
    base, value, _ = models
    gc.disable()
    try:
        pair = Graphs(base, [value], temperature=1.0)
        replies(pair)
        recorded = Recorded(base)
        reader = recorded.reader(1, 64)
        reader.read(torch.tensor([[1, 2]]))
        reader.read(torch.tensor([[3]]))
        owners = [weakref.ref(pair), weakref.ref(pair.readers[0]), weakref.ref(reader)]
        del pair, recorded, reader
        assert [owner() for owner in owners] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("rows", [1, 3])
def test_recorded_reads_are_those_of_a_plain_reader(cuda, models, rows):
    """Reads of one token and of several, of rows with padding, after going back, and past the
    slots that there were.
    """
    base = models[0]
    recorded = Recorded(base)
    for _ in range(2):  # the second time with what the first has recorded
        reader, again = recorded.reader(rows, 16), base.reader(rows, 16)
        generator = torch.Generator().manual_seed(0)

        def both(T, counts=None):
            tokens = torch.randint(3, 110, (rows, T), generator=generator)
            counts = None if counts is None else torch.tensor(counts[:rows])
            z = [each.read(tokens, counts) for each in (reader, again)]
            torch.testing.assert_close(*z, atol=1e-4, rtol=1e-4)
            assert reader.lengths == again.lengths
            assert torch.equal(reader.positions, again.positions)

        both(5, [5, 2, 4])
        for T in (1, 1, 4, 1):
            both(T)
        both(3, [1, 3, 2])
        for each in (reader, again):
            each.back_to([4, 2, 3][:rows])
        both(1)
        for _ in range(20):
            both(1)
        tokens = torch.randint(3, 110, (rows, 3), generator=generator)
        z = [each.read_each(tokens) for each in (reader, again)]
        torch.testing.assert_close(*z, atol=1e-4, rtol=1e-4)
    assert cuda.made["replays"] > 50 and cuda.made["recordings"] < 16


def test_a_round_of_drafted_tokens_is_replayed(cuda, models, monkeypatch):
    base, value, _ = models
    expected = plain(base, [value])
    monkeypatch.setattr(Drafts, "fast", recording)
    drafts = Drafts(copy.deepcopy(base), 3)
    for _ in range(2):
        steps = ivl.generate(base, [value], PROMPTS, 40, rounds=drafts.rounds)
        assert list(steps) == expected
    # of each round the value model reads four times, the draft three times, the base once; but for
    # the draft's first read, which is of the prompt
    rounds = (40 - 1) // 4
    assert drafts.stood == drafts.tried and cuda.made["replays"] >= 2 * (8 * rounds - 1)


def recording(drafts, model):
    return drafts.recorded.setdefault(model, Recorded(model))


def test_the_rehearsed_graph_stops_where_the_plain_step_stops(cuda, models):
    base, *values, _ = models
    free = plain(base, values)
    stop = stopping(free)
    assert max(map(len, map(set, zip(*free)))) > 5  # no text that only repeats itself
    assert (
        replies(Graphs(base, values), stop=stop)
        == cut(free, stop)
        == plain(base, values, stop=stop)
    )


@pytest.mark.parametrize("new", [0, 1, 2, 9, 100])
def test_the_rehearsed_graph_ends_with_the_context_or_with_the_tokens_asked_for(cuda, models, new):
    base, *values, _ = models
    expected = plain(base, values, new=new)
    assert replies(Graphs(base, values), new=new) == expected
    assert len(expected) == min(new, 62)  # the shortest prompt, of 2 tokens, fills 64


def test_texts_of_another_number_and_seed_follow_each_other(cuda, models):
    """Each as if it were the first."""
    base, *values, _ = models
    pair = Graphs(base, values, temperature=1.0)
    for prompts, seed in ([PROMPTS, 3], [PROMPTS[:1], 4], [PROMPTS, 5], [PROMPTS[::-1], 3]):
        assert replies(pair, prompts, seed=seed) == plain(
            base, values, prompts, temperature=1.0, seed=seed
        )


def test_a_text_that_is_broken_off_leaves_no_trace(cuda, models):
    base, *values, _ = models
    pair = Graphs(base, values, temperature=1.0)
    broken = pair.rounds(ivl.Replies(PROMPTS, 40), seed=4)
    for _ in range(12):
        next(broken)
    broken.close()
    assert replies(pair, seed=3) == plain(base, values, temperature=1.0, seed=3)


@pytest.fixture
def caches(monkeypatch):
    """The slots of all the caches that are made, in time's order."""
    made = []
    init = Reader.__init__

    def counted(self, model, rows, slots):
        made.append(slots)
        init(self, model, rows, slots)

    monkeypatch.setattr(Reader, "__init__", counted)
    return made


def test_graphs_and_caches_and_streams_are_made_once(cuda, models, caches):
    base, *values, _ = models
    pair = Graphs(base, values)
    replies(pair)
    made = {**cuda.made, "replays": None}
    assert made["recordings"] == 3 and caches == [64, 64]  # graphs of 16, 32, 64 slots

    # texts as long, and shorter ones
    for prompts, new in ([PROMPTS, 40], [PROMPTS, 20], [[text[:2] for text in PROMPTS], 46]):
        replies(pair, prompts, new)
        assert {**cuda.made, "replays": None} == made and caches == [64, 64]


def test_texts_that_fill_the_caches_exactly_use_them_again(cuda, models, caches):
    base, *values, _ = models
    pair = Graphs(base, values)
    new = 64 - max(map(len, PROMPTS)) + 1  # the last token of all is not read
    for _ in range(2):
        replies(pair, new=new)
    assert cuda.made["recordings"] == 3 and caches == [64, 64]


def test_longer_texts_get_new_caches_once(cuda, models, caches):
    base, *values, _ = models
    pair = Graphs(base, values)
    replies(pair, new=8)
    streams = cuda.made["streams"]
    assert cuda.made["recordings"] == 1 and caches == [16, 16]
    for _ in range(2):
        assert replies(pair, new=30) == plain(base, values, new=30)
        assert cuda.made["recordings"] == 1 + 3 and caches[2:4] == [64, 64]
        del caches[4:]  # those of the plain step
    assert cuda.made["streams"] == streams


def test_prompts_never_outgrow_the_caches_that_graphs_know(cuda, models):
    """A cache that grows is another piece of memory than the one that was recorded."""
    base, *values, _ = models
    pair = Graphs(base, values)
    assert replies(pair, new=6) == plain(base, values, new=6)
    long = list(range(3, 20))  # 17 tokens, one more than the caches have slots
    assert replies(pair, [long, *PROMPTS[1:]], new=0) == []
    assert replies(pair, PROMPTS[::-1], new=6) == plain(base, values, PROMPTS[::-1], new=6)
