"""A model on disk: its configuration and its weights, read and written as the Hub has them.

The names and shapes of the tensors are `model.hf_views`'. Nothing is ever read from a pickle.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from model import CONNECTIONS, Config, Llama, hf_shape, hf_views, inverse_frequencies
from plumbing.files import (
    FLAG,
    TABLE,
    TEXT,
    Field,
    InputError,
    clear_temporaries,
    fields_of,
    list_of,
    number,
    open_tensors,
    read_fields,
    read_json,
    readable,
    refuse_non_file,
    remove,
    save_tensors,
    say_once,
    temporary_for,
    whole,
    write_text,
    writing,
)

SHARD_BYTES = 5 * 2**30  # a saved model is split into files of about this size, as on the Hub
# what is read of a saved model, here or by transformers: a new one leaves none of the old one's
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors"
    r"|model\.safetensors\.index\.json|tokenizer(_config)?\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|README\.md"
)


# what config.json must hold: the shape, within bounds that no Llama comes near
SIZE = whole(1, 2**24)
TOKEN = whole(0, 2**24)
TOKENS = TOKEN | list_of(TOKEN)
SHAPE = {
    "vocab_size": Field(SIZE),
    "hidden_size": Field(SIZE),
    "intermediate_size": Field(SIZE),
    "num_hidden_layers": Field(whole(1, 1024)),
    "num_attention_heads": Field(SIZE),
    "num_key_value_heads": Field(SIZE, None),
    "head_dim": Field(SIZE, None),
    "max_position_embeddings": Field(whole(1, 2**30), 2048),
    "rms_norm_eps": Field(number(0, 1), 1e-6),
    "rope_theta": Field(number(1, 1e12), None),
    "tie_word_embeddings": Field(FLAG, False),
    "bos_token_id": Field(TOKENS, None),
    "eos_token_id": Field(TOKENS, None),
}
ROPE = {"rope_parameters": Field(TABLE, None), "rope_scaling": Field(TABLE, None)}
FACTOR = Field(number(1e-3, 1e6))
ROPE_NUMBERS = {  # the kinds of RoPE, and the numbers that each needs
    "default": {},
    "linear": {"factor": FACTOR},
    "llama3": {
        "factor": FACTOR,
        "low_freq_factor": FACTOR,
        "high_freq_factor": FACTOR,
        "original_max_position_embeddings": Field(whole(1, 2**30)),
    },
}


# ---------------------------------------------------------------- configuration


def read_config(directory: str | Path) -> Config:
    """Reads `directory/config.json`. Raises InputError for what this network does not have."""
    path = Path(directory) / "config.json"
    raw = read_json(path, TABLE)

    # what another network would have is refused by its name
    supported = {
        "model_type": ["llama", "mistral"],
        "hidden_act": ["silu", None],
        "attention_bias": [False, None],
        "mlp_bias": [False, None],
        "quantization_config": [None],
        "partial_rotary_factor": [1.0, None],
    }
    if raw.get("model_type") == "mistral":
        # it is a Llama, unless its tokens see only a window of those before them; without a
        # word about it, Hugging Face takes a window of 4096
        raw.setdefault("sliding_window", 4096)
        supported["sliding_window"] = [None]
    for field, allowed in supported.items():
        if raw.get(field) not in allowed:
            raise InputError(
                f"{path}: {field} = {raw.get(field)!r} is not supported "
                f"(only {allowed[0]!r}); choose a plain Llama model"
            )

    # the shape; older files leave out what follows from the rest
    shape = fields_of(raw, SHAPE, path)
    heads = shape["num_attention_heads"]
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or heads
    shape["head_dim"] = shape["head_dim"] or shape["hidden_size"] // heads
    if isinstance(shape["bos_token_id"], list):
        shape["bos_token_id"] = shape["bos_token_id"][0] if shape["bos_token_id"] else None
    if heads % shape["num_key_value_heads"]:
        raise InputError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads")
    if shape["head_dim"] % 2 or not shape["head_dim"]:
        raise InputError(f"{path}: head_dim = {shape['head_dim']}; RoPE needs an even number")

    # RoPE: the new spelling, else the old one
    spelt = fields_of(raw, ROPE, path)
    spellings = [dict(spelt[name]) for name in ROPE if spelt[name] is not None]
    thetas = [shape["rope_theta"]]
    for rope in spellings:
        theta = {"rope_theta": SHAPE["rope_theta"]}
        thetas.append(fields_of(rope, theta, path)["rope_theta"])
        rope.pop("rope_theta", None)
        old = rope.pop("type", "default")
        rope.setdefault("rope_type", old)
    thetas = [float(theta) for theta in thetas if theta is not None]
    if len(set(thetas)) > 1 or (len(spellings) == 2 and spellings[0] != spellings[1]):
        raise InputError(
            f"{path}: rope_parameters, rope_scaling and rope_theta contradict each other; "
            "leave one of them"
        )
    shape["rope_theta"] = [*thetas, 10000.0][0]
    rope = [*spellings, {"rope_type": "default"}][0]
    kind = rope["rope_type"]
    if kind not in [*ROPE_NUMBERS]:
        raise InputError(
            f"{path}: rope_type = {kind!r} is not supported (only {', '.join(ROPE_NUMBERS)})"
        )
    numbers = fields_of(rope, ROPE_NUMBERS[kind], f"{path}: RoPE of type {kind!r}")
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise InputError(f"{path}: RoPE's low_freq_factor must be below its high_freq_factor")
    shape["rope_scaling"] = None if kind == "default" else rope
    return Config(**shape)


def write_config(config: Config, directory: str | Path, dtype: torch.dtype) -> None:
    """Writes `config.json` with both the old and the new spelling of RoPE and dtype."""
    name = str(dtype).removeprefix("torch.")
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(config),
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": name,
        "torch_dtype": name,
    }
    write_text(Path(directory) / "config.json", json.dumps(raw, indent=2) + "\n")


# ---------------------------------------------------------------- weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: the one that holds all, or those that the index lists.
    Raises InputError.
    """
    file = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if file.exists():  # as in transformers, whatever an index says
        if index.exists():
            say_once(f"({directory}: {file.name} is read, not what {index.name} lists)")
        return [file]
    if index.exists():
        names = set()
        for name in read_fields(index, {"weight_map": Field(TABLE)})["weight_map"].values():
            # a plain name: an index from a stranger is not to lead anywhere else
            if name not in TEXT or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(
                    f"{index}: weight_map leads to {name!r}, which is no .safetensors file beside "
                    "it; download the index again"
                )
            names.add(name)
        return [directory / name for name in sorted(names)]
    if list(directory.glob("*.bin")):
        raise InputError(
            f"{directory}: has weights in pickle files only (*.bin), which are never "
            "read; convert them to safetensors"
        )
    return [file]


def stored_tensors(directory: Path, views: dict[str, Tensor]) -> Iterator[tuple]:
    """The name of each tensor of `views`, and a lazy slice of its file: slice[:] reads it.

    Raises InputError, before anything is read, for a tensor too many, too few, or of another shape.
    """
    place: dict[str, Path] = {}
    tied = None  # the file of an lm_head that should be the embedding
    for file in weight_files(directory):
        tensors = open_tensors(file)
        for name in tensors.keys():
            # RoPE's angles are computed, and a tied lm_head is the embedding
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name == "lm_head.weight" and name not in views:
                tied = file
                continue
            if name not in views:
                raise InputError(
                    f"{file}: tensor {name} has no place in the model that config.json describes"
                )
            if name in place:
                raise InputError(f"{file}: tensor {name} is in {place[name].name} too")
            tensor = tensors.get_slice(name)
            shape = tuple(tensor.get_shape())
            if shape != hf_shape(views[name]):
                raise InputError(
                    f"{file}: tensor {name} has shape {shape}; config.json asks for "
                    f"{hf_shape(views[name])}"
                )
            if tensor.get_dtype() not in ("F64", "F32", "BF16", "F16"):
                raise InputError(
                    f"{file}: tensor {name} is of type {tensor.get_dtype()}; only plain floats are "
                    "read (F32, BF16, F16)"
                )
            place[name] = file
    missing = set(views) - set(place)
    if missing:
        raise InputError(
            f"{directory}: tensor {min(missing)} is in none of its safetensors files "
            f"({len(missing)} missing)"
        )
    if tied is not None:
        embedding = "model.embed_tokens.weight"
        check_tied(
            *(
                open_tensors(f).get_slice(n)
                for f, n in ((tied, "lm_head.weight"), (place[embedding], embedding))
            ),
            tied,
        )
    # opened anew for each tensor: what was read of the last one leaves the memory
    return ((name, open_tensors(file).get_slice(name)) for name, file in place.items())


def check_tied(lm_head, embedding, file: Path) -> None:
    """Raises InputError for an unembedding that is another matrix than the embedding, though
    config.json says that they are one. lm_head, embedding: slices of files.
    """
    rows = lm_head.get_shape()[0]
    for start in range(0, rows, 4096):
        part = slice(start, start + 4096)
        if lm_head.get_shape() != embedding.get_shape() or not torch.equal(
            lm_head[part].float(), embedding[part].float()
        ):
            raise InputError(
                f"{file}: lm_head.weight is not the embedding, though config.json has "
                "tie_word_embeddings = true; set that to false, and it is used"
            )


def check_weight(name: str, weight: Tensor, directory: str | Path) -> None:
    """Raises InputError for a weight that has NaN or infinity."""
    # a sum takes no memory, and is finite only if all is
    if not weight.sum().isfinite() and not weight.isfinite().all():
        raise InputError(
            f"{directory}: tensor {name} has numbers that are not finite (NaN or infinity); "
            "download or train the model again"
        )


@torch.no_grad()
def load(
    directory: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    network: type[Llama] = Llama,
) -> Llama:
    """A Llama from a Hugging Face directory; raises InputError.

    network: what the weights are copied into, see `frozen_network`.
    Peak memory: the model, plus one tensor of its files.
    """
    with torch.device("meta"):
        model = network(read_config(directory))
    tensors = stored_tensors(Path(directory), hf_views(model))  # checked before memory is taken
    allocate(model, device, dtype)
    views = hf_views(model)
    for name, tensor in tensors:
        views[name].copy_(tensor[:].view(views[name].shape))
        check_weight(name, views[name], directory)
    return model


def frozen_network(base_dtype: str | None) -> type[Llama]:
    """The network of a frozen base: with --base_dtype int8 its matrices are rounded to that."""
    if base_dtype is None:
        return Llama
    from extras.int8 import Int8Llama

    return Int8Llama


def allocate(model: Llama, device: str | torch.device, dtype: torch.dtype) -> None:
    """Gives a model that was made on the meta device memory, for all its weights to be read into.

    dtype: of the floats. (`Module.to_empty` does it too, and imports torch's compiler for it, which
    takes a second.)
    """
    model.to(dtype)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            memory = torch.empty_like(p, device=device)
            setattr(module, name, nn.Parameter(memory, requires_grad=p.requires_grad))
    model.inv_freq = inverse_frequencies(model.config).to(device)  # in float32 whatever the dtype


@torch.no_grad()
def save(
    model: Llama,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    fetch: Callable | None = None,
) -> None:
    """Writes `config.json` and safetensors as the Hub has them.

    fetch: Hub name → tensor, if not the model's own.
    """
    directory = Path(directory)
    views = hf_views(model)

    # which tensors go into which file
    shards: dict[int, dict[str, Tensor]] = {}
    offset = 0
    for name, view in views.items():
        shard = shards.setdefault(offset // SHARD_BYTES, {})
        shard[name] = torch.empty(hf_shape(view), dtype=dtype, device="meta")
        offset += view.numel() * dtype.itemsize

    weight_map = {}
    for i, shard in enumerate(shards.values(), 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_tensors(shard, directory / file, {"format": "pt"}, fetch or views.get)
        weight_map |= dict.fromkeys(shard, file)
    write_config(model.config, directory, dtype)

    # the index comes last, since by it a sharded model is found
    if len(shards) > 1:
        index = {"metadata": {"total_size": offset}, "weight_map": weight_map}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


@contextmanager
def replacing_model(directory: str | Path) -> Iterator[Path]:
    """Gives an empty folder; what it holds at the end of the block takes the place of the model in
    `directory`, tokenizer and all. After an error the old model stands. Raises InputError.
    """
    directory = Path(directory)
    new = temporary_for(directory / "model")
    try:
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            clear_temporaries(directory)
            remove(new)  # of an earlier process with our number
            new.mkdir()
            yield new
            old = [file for file in directory.iterdir() if MODEL_FILES.fullmatch(file.name)]
            for file in [*old, *(directory / file.name for file in new.iterdir())]:
                refuse_non_file(file)

            # without config.json nothing here is taken for a model: so none is ever half the old
            # one and half the new one
            (directory / "config.json").unlink(missing_ok=True)
            for file in old:
                if not (new / file.name).exists():
                    file.unlink(missing_ok=True)
            last = ["config.json", "README.md"]
            names = [file.name for file in new.iterdir() if file.name not in last]
            for name in names + last:
                os.replace(new / name, directory / name)
    finally:
        remove(new)


def fingerprint(directory: str | Path) -> str:
    """What tells a model from others: a hash of its `config.json` and its weights, of all bytes."""
    hashed = hashlib.sha256()
    for file in [Path(directory) / "config.json", *weight_files(Path(directory))]:
        with open(readable(file), "rb") as opened:
            hashed.update(f"{file.name} {os.fstat(opened.fileno()).st_size} ".encode())
            while piece := opened.read(2**24):
                hashed.update(piece)
    return hashed.hexdigest()


def plain(directory: str | Path) -> str | Path:
    """The directory of a base, a teacher or the like. Raises InputError for a value model that
    reads what a base says: by itself it says nothing.
    """
    connection = recorded_connection(directory)
    if connection != "residual":
        raise InputError(
            f"{directory}: is a value model of the connection {connection}, which can only stand "
            "beside a base, as --value"
        )
    return directory


def recorded_connection(directory: str | Path) -> str:
    """How a value model is joined to its base, by its `config.json`; any Llama can serve as a
    residual one. Raises InputError for an unknown connection.
    """
    path = Path(directory) / "config.json"
    field = Field(TEXT, "residual")
    connection = read_fields(path, {"ivl_connection": field})["ivl_connection"]
    if connection not in CONNECTIONS:
        raise InputError(
            f"{path}: ivl_connection = {connection!r} is none of {', '.join(CONNECTIONS)}"
        )
    return connection
