"""The Llama against transformers', on every variant of configuration that is loaded."""

import json
import shutil
import weakref

import pytest
import torch
import transformers
from conftest import make_directory
from safetensors.torch import load_file, save_file

import ivl
import model as ours
from model import column_major
from plumbing import weights
from plumbing.files import InputError, open_tensors, save_tensors, verify
from plumbing.weights import load

SHAPE = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
VARIANTS = {
    "llama-2": {},
    "llama-3": dict(
        num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=500000.0)
    ),
    "llama-3.1": dict(num_key_value_heads=1, rope_parameters=LLAMA3),
    "llama-3.2": dict(
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3
    ),
    "tinyllama": dict(num_key_value_heads=1, num_attention_heads=8),
    "codellama": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), vocab_size=123),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
}


@pytest.fixture(params=VARIANTS)
def pair(request, tmp_path):
    """The same random model from transformers and from our loader, and its directory."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE | dict(initializer_range=0.3) | VARIANTS[request.param]
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, weights.load(tmp_path), tmp_path


@torch.no_grad()
def test_logits_equal_transformers_through_the_full_sequence(pair):
    theirs, mine, _ = pair
    ids = torch.randint(0, 120, (2, 60))
    expected = theirs(ids).logits
    torch.testing.assert_close(mine(ids), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine(mine.embed(ids)), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    torch.manual_seed(0)
    shape = SHAPE | dict(num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    config = transformers.MistralConfig(**shape, sliding_window=None)
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 120, (2, 60))
    torch.testing.assert_close(weights.load(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    # with one, it is another network; transformers takes one where the file is silent
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"sliding_window": 4}))
    with pytest.raises(InputError, match="sliding_window = 4 is not supported"):
        weights.load(tmp_path)
    del raw["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    window = transformers.MistralConfig.from_pretrained(tmp_path).sliding_window
    with pytest.raises(InputError, match=f"sliding_window = {window} is not supported"):
        weights.load(tmp_path)


@torch.no_grad()
def test_logits_with_cache_equal_transformers(pair):
    theirs, mine, _ = pair
    ids = torch.randint(0, 120, (2, 40))
    expected = theirs(ids).logits
    cache = ours.KVCache(mine.config, 2, 64, "cpu", torch.float32)
    pieces = [mine(ids[:, :17], cache=cache)]  # the prompt, three tokens at once, then one by one
    for first, after in [(17, 20), *((t, t + 1) for t in range(20, 40))]:
        positions = torch.arange(first, after).expand(2, -1)
        pieces.append(mine(ids[:, first:after], positions, cache, end=after if first % 2 else None))
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_saved_model_loads_in_transformers(pair, tmp_path):
    theirs, mine, _ = pair
    weights.save(mine, tmp_path / "saved")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(0, 120, (1, 30))
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-6, rtol=0)
    assert weights.read_config(tmp_path / "saved") == mine.config
    names = set(again.state_dict()) - {"lm_head.weight"}
    assert names <= set(weights.open_tensors(tmp_path / "saved" / "model.safetensors").keys())


def test_old_spelling_of_rope_and_dtype_is_read(pair):
    _, mine, directory = pair
    raw = json.loads((directory / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    raw["rope_scaling"] = None if rope["type"] == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    (directory / "config.json").write_text(json.dumps(raw))
    torch.testing.assert_close(weights.load(directory).inv_freq, mine.inv_freq)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path, dtype):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 120, (1, 20))
    expected = model.float()(ids).logits
    torch.testing.assert_close(weights.load(tmp_path)(ids), expected, atol=1e-4, rtol=0)
    loaded = weights.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.embed.weight.dtype == torch.bfloat16 and loaded.inv_freq.dtype == torch.float32


@torch.no_grad()
def test_sharded_files_in_and_out(tmp_path, monkeypatch):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    theirs.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    mine, ids = weights.load(tmp_path / "in"), torch.randint(0, 120, (1, 20))
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    weights.save(mine, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for model in (mine, again):
        logits = model(ids) if model is mine else model(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing():
    model = ours.Llama(ours.Config(50, 16, 24, 2, 2, 1, 8, 64)).init_weights(0)
    short, long = torch.randint(0, 50, (1, 5)), torch.randint(0, 50, (1, 9))
    padded = torch.cat([torch.cat([short, torch.full((1, 4), 7)], 1), long])
    torch.testing.assert_close(model(padded)[0, :5], model(short)[0])
    torch.testing.assert_close(model(padded)[1], model(long)[0])


def test_checkpointing_gives_the_same_gradients():
    model, ids = (
        ours.Llama(ours.Config(50, 16, 24, 2, 2, 1, 8, 64)).init_weights(0),
        torch.randint(0, 50, (2, 9)),
    )
    gradients = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        model(ids).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_checkpointing_computes_each_block_again(monkeypatch):
    model, computed = ours.Llama(ours.Config(50, 16, 24, 2, 2, 1, 8, 64)), []
    forward = ours.MLP.forward

    def watched(mlp, x):
        computed.append(mlp)
        return forward(mlp, x)

    monkeypatch.setattr(ours.MLP, "forward", watched)
    for model.checkpointing, times in ((False, 2), (True, 4)):
        computed.clear()
        model(torch.tensor([[1, 2, 3]])).sum().backward()
        assert len(computed) == times


def test_new_weights_are_of_the_spread_that_keeps_numbers_in_bounds():
    model = ours.Llama(ours.Config(400, 64, 96, 2, 4, 2, 16, 64)).init_weights(0)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            assert (p == 0).all(), name
        else:
            spread = 0.1 if name == "embed.weight" else 64**-0.5
            assert p.std().item() == pytest.approx(spread, rel=0.05), name


def test_no_two_tensors_of_the_files_are_held_at_once(base_dir, monkeypatch):
    read = []

    class Watched:
        def __init__(self, tensors):
            self.tensors, self.keys = tensors, tensors.keys

        def get_slice(self, name):
            return Slice(self.tensors.get_slice(name))

    class Slice:
        def __init__(self, tensor):
            self.tensor = tensor
            self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype

        def __getitem__(self, part):
            assert all(tensor() is None for tensor in read), "an earlier tensor is still held"
            tensor = self.tensor[part]
            read.append(weakref.ref(tensor))
            return tensor

    monkeypatch.setattr(
        weights, "open_tensors", lambda path, real=weights.open_tensors: Watched(real(path))
    )
    model = weights.load(base_dir)
    assert len(read) == len(ours.hf_views(model))


def test_tensors_of_all_kinds_are_written_as_safetensors_reads_them(tmp_path):
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "wide": torch.tensor([1, 2**40]),
        "turned": torch.randn(3, 5).T,
        "half": torch.randn(2, 3).bfloat16(),
    }
    save_tensors(tensors, tmp_path / "some.safetensors", {"a": "ä"})
    read = load_file(tmp_path / "some.safetensors")
    file = open_tensors(tmp_path / "some.safetensors")
    verify(file, tmp_path / "some.safetensors")
    metadata = file.metadata()
    del metadata["sha256"]
    assert set(read) == set(tensors) and metadata == {"a": "ä"}
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    header = (tmp_path / "some.safetensors").read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert all(
        header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in tensors.items()
    )


# ---------------------------------------------------------------- bad input


@pytest.fixture
def directory(base_dir, tmp_path):
    return shutil.copytree(base_dir, tmp_path / "model")


@pytest.mark.parametrize(
    "field, value",
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "linear"}),
        ("quantization_config", {"bits": 4}),
        ("num_hidden_layers", "two"),
        ("num_key_value_heads", 3),
        ("vocab_size", None),
    ],
)
def test_unsupported_configuration_is_named(directory, field, value):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {field: value}))
    with pytest.raises(
        InputError, match=f"config.json.*{'rope_type|RoPE' if 'rope' in field else field}"
    ):
        weights.load(directory)


def test_damaged_weights_are_named(directory):
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"PK\x03\x04" + whole):
        file.write_bytes(content)
        with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
            weights.load(directory)
    file.unlink()
    with pytest.raises(InputError, match="model.safetensors: cannot be read"):
        weights.load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="pickle"):
        weights.load(directory)


def test_weights_of_another_shape_are_named(directory):
    raw = json.loads((directory / "config.json").read_text())
    for change, words in (
        ({"intermediate_size": 64}, "has shape"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_hidden_layers": 1}, "no place"),
    ):
        (directory / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(InputError, match=words):
            weights.load(directory)


def test_a_configuration_that_is_no_object_is_named(directory):
    (directory / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: holds"):
        weights.load(directory)


def test_what_an_old_configuration_leaves_out_follows_from_the_rest(directory):
    raw = json.loads((directory / "config.json").read_text())
    for field in (
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("tie_word_embeddings", "rope_parameters", "rope_theta", "rope_scaling"),
    ):
        del raw[field]
    (directory / "config.json").write_text(json.dumps(raw))
    config = weights.read_config(directory)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (2048, 1e-6)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert config.tie_word_embeddings is False


def test_an_index_that_is_no_index_is_named(directory):
    (directory / "model.safetensors").unlink()
    for content, words in (("[]", "holds"), ("{}", ".*weight_map")):
        (directory / "model.safetensors.index.json").write_text(content)
        with pytest.raises(InputError, match=f"index.json: {words}"):
            weights.load(directory)


@pytest.mark.parametrize("shards", ["others", "gone"])
def test_beside_an_index_the_single_file_is_read_as_in_transformers(directory, capsys, shards):
    """`save_pretrained` twice into one folder leaves both."""
    state = load_file(directory / "model.safetensors")
    if shards == "others":
        other = {name: tensor + 1 for name, tensor in state.items()}
        save_file(other, directory / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    model = weights.load(directory)
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory).float()
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    weights.load(directory)
    told = capsys.readouterr().err
    assert told.count("model.safetensors is read, not what model.safetensors.index.json") == 1


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_unembedding_that_is_not_the_embedding_is_refused(directory, same):
    """transformers would use it, and warn; dropped without a word it is another model."""
    raw = json.loads((directory / "config.json").read_text())
    state = load_file(directory / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0 if same else 1
    save_file({**state, "lm_head.weight": head}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    if same:
        assert weights.load(directory).lm_head is None
        return
    with pytest.raises(InputError, match="lm_head.weight is not the embedding.*set that to false"):
        weights.load(directory)
    (directory / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))
    assert torch.equal(weights.load(directory).lm_head.weight, head.float())


CONTRADICTIONS = [
    {"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 2.0}},
    {"rope_parameters": LLAMA3, "rope_theta": 10000.0},
]


@pytest.mark.parametrize("fields", CONTRADICTIONS)
def test_rope_that_is_spelt_twice_and_not_alike_is_refused(directory, fields):
    raw = json.loads((directory / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        raw.pop(name, None)
    alike = {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3, "rope_theta": LLAMA3["rope_theta"]}
    (directory / "config.json").write_text(json.dumps(raw | alike))
    assert weights.read_config(directory).rope_scaling["rope_type"] == "llama3"
    (directory / "config.json").write_text(json.dumps(raw | fields))
    with pytest.raises(InputError, match="contradict each other"):
        weights.read_config(directory)


def test_of_type_and_rope_type_the_new_name_counts_as_in_transformers(directory):
    raw = json.loads((directory / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        raw.pop(name, None)
    for name in ("rope_parameters", "rope_scaling"):
        fields = {name: {**LLAMA3, "type": "linear"}}
        (directory / "config.json").write_text(json.dumps(raw | fields))
        theirs = transformers.AutoConfig.from_pretrained(directory).rope_parameters["rope_type"]
        assert weights.read_config(directory).rope_scaling["rope_type"] == theirs == "llama3"


def test_a_fingerprint_is_of_all_bytes(tmp_path):
    """However large the file: a norm is a millionth of it."""
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as opened:
        opened.truncate(100 * 2**20)
    prints = {weights.fingerprint(tmp_path)}
    for place in (0, 2**20, 2**24 - 1, 2**24, 100 * 2**20 - 1):
        with open(file, "r+b") as opened:
            opened.seek(place)
            opened.write(b"x")
        prints.add(weights.fingerprint(tmp_path))
    assert len(prints) == 6


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    from plumbing.tokenizer import Tokenizer

    directory = make_directory(tmp_path, 0, vocab_size=100)
    with pytest.raises(InputError, match="tokenizer.json.*vocab_size is 100"):
        Tokenizer(directory).check(weights.read_config(directory).vocab_size)


# ---------------------------------------------------------------- reading, token by token

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]


@torch.inference_mode()
def test_a_reader_gives_the_logits_of_the_whole_text(base_dir):
    """Prompts of unequal length, then token by token, past the slots that it was given."""
    model = load(base_dir)
    reader, texts = model.reader(len(PROMPTS), 10), [list(prompt) for prompt in PROMPTS]
    z = reader.read(*ivl.padded(PROMPTS))
    for _ in range(12):
        expected = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
        new = z.argmax(-1)
        texts = [text + [i] for text, i in zip(texts, new.tolist())]
        z = reader.read(new[:, None])
    assert reader.room() == [256 - len(text) for text in texts]


@torch.inference_mode()
def test_a_reader_begins_with_a_single_token_too(base_dir):
    model, text = load(base_dir), [1, 20, 30, 40]
    whole = model(torch.tensor([text]))[0]
    reader = model.reader(1, 8)
    for i, token in enumerate(text):
        z = reader.read(torch.tensor([[token]]))
        torch.testing.assert_close(z[0], whole[i], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_a_reader_taken_back_is_where_it_was(base_dir):
    model, generator = load(base_dir), torch.Generator().manual_seed(0)
    reader = model.reader(3, 30)
    reader.read(*ivl.padded(PROMPTS))
    tokens = torch.randint(3, 200, (3, 5), generator=generator)
    each = reader.read_each(tokens)
    for b, prompt in enumerate(PROMPTS):
        whole = model(torch.tensor([prompt + tokens[b].tolist()]))[0]
        torch.testing.assert_close(each[b], whole[len(prompt) - 1 :][1:], atol=1e-4, rtol=1e-4)

    # two, none and all of the five tokens are taken back, then the same ones are read again
    reader.back_to([len(prompt) + n for prompt, n in zip(PROMPTS, (3, 5, 0))])
    counts = torch.tensor([2, 1, 5])
    again = torch.tensor([[*tokens[0, 3:], 0, 0, 0], [7, 0, 0, 0, 0], tokens[2].tolist()])
    z = reader.read(again, counts)
    torch.testing.assert_close(z[[0, 2]], each[[0, 2], -1], atol=1e-4, rtol=1e-4)
    further = model(torch.tensor([[*PROMPTS[1], *tokens[1].tolist(), 7]]))[0, -1]
    torch.testing.assert_close(z[1], further, atol=1e-4, rtol=1e-4)


def test_masks_are_of_whole_tiles(base_dir, monkeypatch):
    model, widths = load(base_dir), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, mask=None, **options):
        if mask is not None:
            widths.append(mask.shape[-1])
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for _ in ivl.generate(model, [], [[1, 20, 30]], 30):
        pass
    assert set(widths) == {8, 16, 24, 32}


def test_the_cache_is_written_in_place(base_dir):
    model = load(base_dir)
    reader = model.reader(1, 16)
    kept = [tensor.data_ptr() for tensor in reader.cache.k + reader.cache.v]
    for _ in range(4):
        reader.read(torch.tensor([[5, 6]]))
    assert kept == [tensor.data_ptr() for tensor in reader.cache.k + reader.cache.v]
    assert len(kept) == 2 * model.config.num_hidden_layers == len(set(kept))


@pytest.mark.parametrize("tied", [True, False])
def test_column_major_is_the_same_network(tmp_path, tied):
    model = load(make_directory(tmp_path, seed=1, tie_word_embeddings=tied))
    x = torch.tensor(PROMPTS[2:])
    before, embedding = model(x), model.embed.weight.clone()
    assert column_major(model) is model
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.embed.weight, embedding) and model.embed.weight.is_contiguous()
    matrices = [
        p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"
    ]
    assert len(matrices) == 4 * len(model.blocks) + 1
    assert all(p.stride() == (1, len(p)) for p in matrices)  # neighbours in a column stay so


def test_queries_and_keys_keep_the_precision_of_the_products(base_dir, monkeypatch):
    """RoPE's cosines in float32 would make float32 of them, at twice the memory."""
    model, seen = load(base_dir), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, *others, **options):
        seen.append((q.dtype, k.dtype))
        return attention(q, k, v, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([[1, 20, 30]]))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
