"""Train a value model beside a frozen base.

    python train.py                                                  # the toy family, end to end, on any laptop
    python train.py --base DIR --data chats.json --out DIR           # your base, your chats; --value DIR to start from
    python train.py --base DIR --full --data chats.json --out DIR    # fine-tune the model itself: the upper line
    python train.py --base SMALL MEDIUM LARGE --data ... --out DIR   # a curriculum: the steps are divided among the bases
    python train.py --base DIR --value DIR --data chats.json --evaluate   # held-out loss only, for any pair
    torchrun --nproc_per_node 4 train.py --base DIR ...              # the same run on four GPUs, see sharding.py

DIRs are Hugging Face directories. A run that was stopped goes on, step for step, with the same command
and --resume. The losses of all steps are in OUT/log.jsonl.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from connections import CONNECTIONS, Probe, record_connection, recorded_connection, value_input
from data import TEMPLATES, Chats, Tokenizer, epoch_batches, tokenize
from files import InputError, command, open_tensors, pick_device, pick_dtype, writable_folder, write_text
from ivl import shared_vocabulary, two_headed_loss
from losses import BETA, distillation_loss, paired, pairwise_loss
from model import Config, Llama
from sharding import first, gathered, load, rank, ranks, reshard, save, save_tensors, shares, stored, total, world

BILLION = 10**9


@dataclass
class Settings:
    """What decides the numbers of a run. A checkpoint can be resumed only with the settings it was made with."""
    lr: float  # of AdamW; cosine to zero
    batch_size: int  # chats per step
    micro_batch_size: int  # chats at a time: the gradient is the same for any, only memory differs
    epochs: int
    max_length: int  # tokens; longer chats are cut at a turn
    lam: float  # λ, weight of the norm term; its pull on one logit is λ / vocabulary
    norm_over: str  # "response": the reply's tokens; "all": every position, prompt and padding too (the released code)
    connection: str = "residual"  # what the value model reads, see connections.py
    beta: float = 0.0  # of the pairwise loss; 0: the chats are no pairs
    warmup: float = 0.04  # share of the steps, Table 5
    weight_decay: float = 0.01  # on matrices; the released scripts' value
    clip: float = 1.0  # largest norm of the gradient
    held_out: float = 0.02  # share of the chats that is never trained on; the released scripts' value
    seed: int = 0


def paper_settings(model: Llama | Probe, configs: Sequence[Config]) -> dict:
    """Table 5: by the size of the model that is trained, beside the bases that `configs` describe."""
    big = model.size() > 3 * BILLION
    return dict(lr=1e-5 if big else 1e-4, batch_size=16 if big else 32, micro_batch_size=4, epochs=3,
                max_length=min(4096, *(config.max_position_embeddings for config in (model.config, *configs))),
                lam=1.0 if configs else 0.0, norm_over="response")


# ---------------------------------------------------------------- one run

def forward(base: Llama | None, value: Llama | Probe, batch: tuple[Tensor, Tensor, Tensor], norm_over: str, autocast,
            w_ce: float = 1.0, w_norm: float = 0.0, connection: str = "residual", teacher: Llama | None = None,
            beta: float = 0.0) -> tuple[Tensor, Tensor]:
    """The weighted loss of one batch, and the sums of its two terms; base None fine-tunes `value` itself.

    In cross-entropy's place stands distillation if there is a teacher, or the pairwise loss if there is a β.
    """
    inputs, targets, real = batch
    counted = targets >= 0 if norm_over == "response" else torch.ones_like(real)
    with autocast:
        with torch.no_grad():
            h_base, head_base = (None, None) if base is None else (base.hidden(inputs), base.head)
        h = value.hidden(value_input(connection, value, inputs, h_base, head_base))
        given = h_base, head_base, h, value.head, targets, counted, w_ce, w_norm
        if teacher is not None:
            return distillation_loss(*given, teacher, inputs)
        return pairwise_loss(*given, beta) if beta else two_headed_loss(*given)


@torch.no_grad()
def held_out_loss(base: Llama | None, value: Llama | Probe | None, chats: Chats, rows: list[int], size: int, device,
                  autocast, connection: str = "residual") -> float:
    """Cross-entropy of z_post in nats per target token over the chats `rows`; value None measures the base alone."""
    loss, n = 0.0, 0
    pair = (base, value) if value is not None else (None, base)
    for part in shares(rows, size):
        batch = chats.batch(part, device)
        loss += forward(*pair, batch, "response", autocast, connection=connection)[1][0].item()
        n += int((batch[1] >= 0).sum())
    reshard(pair[1])
    loss, n = total(loss, n)
    return loss / n


def rate(step: int, steps: int, settings: Settings) -> float:
    """The share of the learning rate at a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(settings.warmup * steps))
    return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(base: Llama | None, value: Llama | Probe, chats: Chats, settings: Settings, out: Path, *,
          later: Sequence[Callable[[], Llama]] = (), teacher: Llama | None = None, resume: bool = False,
          save_every: int = 500, autocast=nullcontext(), name: str = "value") -> None:
    """Trains `value` in place so that CE(z_post) + λ norm term falls (base None: CE of `value` alone).

    later: loads the bases that follow `base` in a curriculum; each has as many of the steps (§6).
    teacher: of the distillation; with settings.beta, chats are pairs, see `paired`.
    Each step's losses go to out/log.jsonl; every `save_every` steps all that the rest of the run depends on goes to
    out/checkpoint.safetensors, which is removed when the run is complete.
    """
    device = value.head.device
    count = len(chats) // 2 if settings.beta else len(chats)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    cut = max(1, round(settings.held_out * count))
    held, kept = order[:cut].tolist(), order[cut:]
    if not len(kept):
        raise InputError(f"only {len(chats)} chat is left; training and held-out loss need one each")
    batches = [[kept[i].item() for i in batch] for epoch in range(settings.epochs) for batch in epoch_batches(
        chats.lengths()[kept], settings.batch_size, settings.seed * 1_000_003 + epoch)]
    steps = len(batches)
    groups = [[p for p in value.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": settings.weight_decay},
                                   {"params": groups[1], "weight_decay": 0.0}], lr=settings.lr, fused=True)
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    start = load_checkpoint(checkpoint, value, optimizer, settings, chats) if resume else 0
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # a crash may have left half a line: not that one
    entries = [json.loads(line) for line in lines]
    keep = [entry for entry in entries if entry["run"] != name or entry["step"] < start]  # the rest is done again
    if rank() == 0:
        write_text(log, "".join(json.dumps(entry) + "\n" for entry in keep))

    def held_out() -> float:
        return held_out_loss(base, value, chats, held, settings.micro_batch_size, device, autocast, settings.connection)

    def batch(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        return chats.batch(rows + [i + count for i in rows] if settings.beta else rows, device)

    with (open(os.devnull if rank() else log, "a") as lines,
          tqdm(total=steps, initial=start, desc=name, unit=" steps", disable=None) as bar):
        def note(**entry):
            lines.write(json.dumps({"run": name, **entry}) + "\n")
            lines.flush()

        if start == 0:
            note(step=0, held_out_loss=held_out())
        stage = 0
        for step in range(start, steps):
            if (now := step * (1 + len(later)) // steps) > stage:
                stage, base = now, None  # the last base is given up before the next one is loaded
                base = later[stage - 1]()
            parts = [batch(part) for part in shares(batches[step], settings.micro_batch_size)]
            # every part is weighted by its tokens: the gradient is that of the whole batch at once
            tokens, places = map(int, total(sum(int((targets >= 0).sum()) for _, targets, _ in parts),
                                            sum(targets.numel() for _, targets, _ in parts)))
            counted = tokens if settings.norm_over == "response" else places
            n = len(batches[step]) if settings.beta else tokens
            sums = torch.zeros(2, device=device)
            for part in parts:
                loss, part_sums = forward(base, value, part, settings.norm_over, autocast, 1 / n, settings.lam / counted,
                                          settings.connection, teacher, settings.beta)
                loss.backward()
                sums += part_sums
            loss, norm = (x / y for x, y in zip(total(*sums.tolist()), (n, counted)))
            size = gathered(torch.nn.utils.clip_grad_norm_(value.parameters(), settings.clip))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate(step, steps, settings)
            optimizer.step()
            optimizer.zero_grad()
            note(step=step, loss=loss, norm=norm, gradient=size.item(), lr=group["lr"], targets=tokens)
            bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.3f}")
            bar.update()
            if (step + 1) % (steps // settings.epochs) == 0:
                note(step=step, held_out_loss=held_out())
            if (step + 1) % save_every == 0 and step + 1 < steps:
                save_checkpoint(checkpoint, value, optimizer, settings, step + 1, chats)
    checkpoint.unlink(missing_ok=True)


def save_checkpoint(path: Path, value: Llama, optimizer, settings: Settings, step: int, chats: Chats) -> None:
    tensors = {}
    for name, p in value.named_parameters():
        tensors[f"value.{name}"] = p.data
        tensors |= {f"{key}.{name}": state for key, state in optimizer.state[p].items()}
    save_tensors(tensors, path, {"step": str(step), "chats": chats.report, "settings": json.dumps(asdict(settings))})


@torch.no_grad()
def load_checkpoint(path: Path, value: Llama, optimizer, settings: Settings, chats: Chats) -> int:
    """Restores weights and optimizer; gives the next step. Raises InputError if the run was another one."""
    if not path.exists():
        raise InputError(f"{path}: no checkpoint to resume; leave out --resume")
    tensors = open_tensors(path)
    made_with = tensors.metadata() or {}
    if not {"step", "chats", "settings"} <= set(made_with):
        raise InputError(f"{path}: is no checkpoint of train.py; leave out --resume")
    for field, old in json.loads(made_with["settings"]).items():
        if old != getattr(settings, field):
            raise InputError(f"{path}: was made with {field} = {old}, not {getattr(settings, field)}; resume with the same")
    if made_with["chats"] != chats.report:
        raise InputError(f"{path}: was made with {made_with['chats']}, not {chats.report}; resume with the same --data")
    for name, p in value.named_parameters():
        p.copy_(stored(tensors, f"value.{name}", p))
        optimizer.state[p] = {"step": tensors.get_tensor(f"step.{name}").to(p.device), **{
            key: stored(tensors, f"{key}.{name}", p).to(p.device) for key in ("exp_avg", "exp_avg_sq")}}
    return int(made_with["step"])


def save_model(value: Llama | Probe, tokenizer: Tokenizer, out: Path, base: str | None, settings: Settings) -> None:
    """The trained model as a Hugging Face directory, with a note on what it is."""
    if isinstance(value, Probe):
        value.save(out)
    else:
        save(value, out)
    if rank() > 0:
        return
    if base:
        record_connection(out, settings.connection)
    tokenizer.save(out)
    kind = (f"A value model: it was trained to be added, logit by logit, to the frozen base `{base}`.\nAlone it is a "
            "difference between two models, not a chat model." if base else "A fine-tuned model.")
    write_text(out / "README.md", f"{kind}\n\n```json\n{json.dumps(asdict(settings), indent=2)}\n```\n")


# ---------------------------------------------------------------- command line

def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to train (nothing: the toy family)")
    group.add_argument("--base", nargs="+", help="frozen base: a Hugging Face directory; several are a curriculum")
    group.add_argument("--value", help="weights that the value model starts from (default: the base's)")
    group.add_argument("--random", action="store_true", help="start from random weights; --value gives the shape")
    group.add_argument("--connection", choices=CONNECTIONS, help="what the value model reads: the text (residual), the "
                       "base's probabilities (cascade), both (cascade+), the base's hidden state (probe); default: as "
                       "--value was trained, else residual")
    group.add_argument("--data", help="chats: ShareGPT, messages or Alpaca, .json or .jsonl")
    group.add_argument("--teacher", help="distil this model: its probabilities instead of the chats' own tokens")
    group.add_argument("--rejected", help="the chats of --data with worse replies: learn to prefer those of --data")
    group.add_argument("--out", help="directory of the trained model (default for the toy: out/toy)")
    group.add_argument("--full", action="store_true", help="fine-tune the base itself, without a value model")
    group.add_argument("--evaluate", action="store_true", help="print the held-out loss of the pair and train nothing")
    group.add_argument("--template", choices=TEMPLATES, help="chat template (default: the directory's own, else llama-2)")
    group = parser.add_argument_group("how (defaults for real models: the paper's Table 5)")
    group.add_argument("--lr", type=float, help="learning rate (1e-4; 1e-5 above 3B parameters)")
    group.add_argument("--batch_size", type=int, help="chats per step (32; 16 above 3B)")
    group.add_argument("--micro_batch_size", type=int, help="chats at a time, for less memory (4)")
    group.add_argument("--epochs", type=int, help="passes over the chats (3)")
    group.add_argument("--max_length", type=int, help="tokens per chat (4096, or the models' context)")
    group.add_argument("--lam", type=float, help="λ, weight of the norm term (1.0)")
    group.add_argument("--norm_over", choices=["response", "all"], help="norm term over the replies, or over every "
                       "position, prompt and padding too, as the released code has it (response)")
    group.add_argument("--seed", type=int, default=0, help="order of the chats, held-out split (0)")
    group = parser.add_argument_group("with what")
    group.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.safetensors")
    group.add_argument("--save_every", type=int, default=500, help="steps between checkpoints (500)")
    group.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                       help="of the arithmetic; the trained weights stay float32 (auto: bfloat16 on CUDA)")
    args = parser.parse_args()
    for name in ("batch_size", "micro_batch_size", "epochs", "max_length", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} = {getattr(args, name)}; it must be at least 1")
    return args


@ranks()
def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    if args.base is None:
        if set(k for k, x in vars(args).items() if x not in (None, False)) - {"out", "seed", "device", "dtype", "save_every"}:
            raise InputError("--base is missing: give the directory of the base model (the toy takes only --out, --seed "
                             "and --device)")
        if world() > 1:
            raise InputError("the toy family is made by one process: leave out torchrun, or give --base")
        from experiments import toy

        return toy.story(Path(args.out or toy.OUT), args.seed, device)
    if args.data is None or (args.out is None and not args.evaluate):
        raise InputError(f"{'--data' if args.data is None else '--out'} is missing")
    apart = [("full", x) for x in ("value", "random", "connection", "teacher", "rejected")]
    for a, b in apart + [("rejected", "teacher"), ("rejected", "evaluate")]:
        if getattr(args, a) and getattr(args, b):
            raise InputError(f"--{a} and --{b} do not go together; leave one out")
    if args.full and len(args.base) > 1:
        raise InputError("--full trains the base itself; give one")

    dtype = pick_dtype(args.dtype, device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    if args.out:
        writable_folder(args.out)
    start, frozen = args.value or args.base[0], args.base + ([args.teacher] if args.teacher else [])
    connection = args.connection or (recorded_connection(args.value) if args.value else "residual")
    if world() > 1 and (connection != "residual" or args.random or args.teacher or args.rejected):
        raise InputError("under torchrun there is only --connection residual, without --random, --teacher and --rejected")
    tokenizer, tokenizers = Tokenizer(start, args.template), list(map(Tokenizer, frozen))
    shared = min(shared_vocabulary(other.tokens, tokenizer.tokens) for other in tokenizers)
    configs = list(map(Config.load, frozen))
    for other, config in zip(tokenizers, configs):
        other.check(config.vocab_size)

    def load_frozen(directory: str) -> Llama:
        return load(directory, device, dtype, dtype).requires_grad_(False)

    base = None if args.full else load_frozen(args.base[0])
    if connection == "probe":
        value = Probe.load(args.value, device) if args.value else Probe(configs[0]).init_weights(args.seed).to(device)
        value.check(args.base)
    else:
        value = load(start, device, torch.float32, dtype)
    if args.random:
        value.init_weights(args.seed)
    value.checkpointing = args.checkpointing
    tokenizer.check(value.config.vocab_size)
    settings = Settings(**{**paper_settings(value, [] if args.full else configs), "connection": connection, **{
        f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}})
    with first():
        chats = tokenize(args.data, tokenizer, settings.max_length)
    if args.rejected:
        chats, settings.beta = paired(chats, tokenize(args.rejected, tokenizer, settings.max_length)), BETA
    print(f"{args.data}: {chats.report}")
    if int(chats.ids.max()) >= shared:
        raise InputError(f"{args.data}: uses token {int(chats.ids.max())}, which only one of the two vocabularies has")
    if args.evaluate:
        for name, pair in (("base alone", (base, None)), ("base + value", (base, value)))[:2 if args.value else 1]:
            loss = held_out_loss(*pair, chats, list(range(len(chats))), settings.micro_batch_size, device, autocast,
                                 connection if pair[1] else "residual")
            print(f"{name}: {loss:.4f} nats per token")
        return
    out = Path(args.out)
    train(base, value, chats, settings, out, later=[partial(load_frozen, directory) for directory in args.base[1:]],
          teacher=load_frozen(args.teacher) if args.teacher else None, resume=args.resume, save_every=args.save_every,
          autocast=autocast, name="full" if args.full else "value")
    save_model(value, tokenizer, out, None if args.full else "`, `".join(args.base), settings)
    pair = f"--base {out} --value none" if args.full else f"--base {args.base[-1]} --value {out}"
    print(f"\nsaved {out}; try\n  python sample.py {pair} \"Who are you?\"")


if __name__ == "__main__":
    command(main)
