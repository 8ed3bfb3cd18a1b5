"""The paper's experiments in miniature, on the family of toy.py.

    python experiments/reproduce.py figure2      # a linear probe and random weights against full fine-tuning
    python experiments/reproduce.py figure3      # cascade, cascade+ and residual, at home and transferred
    python experiments/reproduce.py table1       # value models with and without norm term, transferred, larger
    python experiments/reproduce.py table4       # one value model against proxy tuning's two
    python experiments/reproduce.py findings     # what the tables say of the paper's claims

The family is pre-trained once (seed 0), as the paper's bases were; --seeds vary what is trained on it. Each trained
model and each score is kept in --out, so that a run that was stopped continues, and NAME.json holds mean and spread
(smallest and largest) over the seeds. form and right are toy.py's, over the questions about held-out facts.

A claim compares rows seed by seed: it *agrees* if every comparison holds in every seed, *disagrees* if one of them
fails in every seed, and is *undecided* otherwise. "far" is a difference of more than 0.2, "level" one of at most 0.05.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from connections import Probe, recorded_connection
from data import Tokenizer, read_chats, tokenize
from experiments import toy
from files import InputError, command, pick_device, read_json, write_text
from model import load
from train import Settings, save_model, train

OUT = Path("out/reproduce")
# a row's system: beside which base it is trained, and from whose weights; how its settings differ from toy.VALUE_SETTINGS
SYSTEMS = {
    "small": ("small", dict(lam=0.0)), "small norm": ("small", {}),
    "large": ("large", dict(lam=0.0)), "large norm": ("large", {}), "random": ("small", dict(lam=0.0)),
    "cascade": ("small", dict(lam=0.0, connection="cascade")), "cascade+": ("small", dict(lam=0.0, connection="cascade+")),
    "small probe": ("small", dict(lam=0.0, connection="probe")), "large probe": ("large", dict(lam=0.0, connection="probe")),
    "small full": ("small", toy.FULL_SETTINGS["small"]), "large full": ("large", toy.FULL_SETTINGS["large"]),
}
TABLES = {  # rows: base, system; proxy tuning has the small model fully fine-tuned for its expert
    "table1": [(base, system) for base, systems in (
        ("small", ("small full", "small", "small norm")),
        ("large", ("large full", "small", "small norm", "large", "large norm"))) for system in systems],
    "table4": [("large", "small"), ("large", "small norm"), ("large", "proxy")],
    "figure2": [(base, system) for base in ("small", "large") for system in (f"{base} probe", "random", f"{base} full")],
    "figure3": [(base, system) for base in ("small", "large") for system in ("cascade", "cascade+", "small")],
}
CLAIMS = [  # number, text, the paper's numbers, table, [(row, score, sign, row, margin)]: sign (first − second) > margin
    (1, "A linear probe, and a value model from random weights, fall far short of full fine-tuning.",
     "Figure 2: more than 3 points of MT-Bench", "figure2",
     [((base, f"{base} full"), "right", 1, (base, system), 0.2)
      for base in ("small", "large") for system in (f"{base} probe", "random")]),
    (2, "Cascade without text is much worse than cascade+; cascade+ is no better than residual after transfer.",
     "Figure 3: bars of MT-Bench", "figure3",
     [(("large", "cascade+"), "right", 1, ("large", "cascade"), 0.2),
      (("large", "small"), "right", 1, ("large", "cascade+"), -0.05)]),
    (3, "A value model carries over to a larger base, and a larger value model carries more.",
     "MT-Bench on 7B: 4.62 from 1.1B, 5.96 from 7B, 5.93 full", "table1",
     [(("large", "small"), "right", 1, ("small", "small"), 0.0), (("large", "large"), "right", 1, ("large", "small"), 0.0)]),
    (4, "The norm term keeps more of the large base's knowledge, at a small cost in form.",
     "ARC on 7B 42.7 → 48.5, MT-Bench 4.62 → 4.55", "table1",
     [(("large", "small norm"), key, 1, ("large", "small"), margin) for key, margin in (("right", 0.0), ("form", -0.05))]),
    (9, "Level with proxy tuning, at two models instead of three.", "Table 4: comparable on 7B", "table4",
     [(("large", "small"), "right", sign, ("large", "proxy"), -0.05) for sign in (1, -1)]),
]


def trained(system: str, seed: int, out: Path, device: torch.device) -> Path:
    """The directory of a trained system, trained first if it is not there."""
    directory, (base, changes) = out / f"seed{seed}" / system.replace(" ", "-"), SYSTEMS[system]
    if not (directory / "README.md").exists():  # written last
        home, full = out / "family" / base, system.endswith("full")
        settings = Settings(**{**toy.VALUE_SETTINGS, **changes, "seed": seed})
        tokenizer, frozen, value = Tokenizer(home), load(home, device).requires_grad_(False), load(home, device)
        if settings.connection == "probe":
            value = Probe(frozen.config).init_weights(seed).to(device)
        if system == "random":
            value.init_weights(1000 + seed)  # not those that the base began with
        chats = tokenize(out / "family" / "chats.jsonl", tokenizer, toy.CONTEXT)
        train(None if full else frozen, value, chats, settings, directory, name=f"{system}, seed {seed}")
        save_model(value, tokenizer, directory, None if full else str(home), settings)
    return directory


def score(base: str, system: str, seed: int, out: Path, device: torch.device) -> dict[str, float]:
    """Scores of one row for one seed, from OUT/seedN/scores.json if they are there."""
    kept = out / f"seed{seed}" / "scores.json"
    scores = read_json(kept, dict) if kept.exists() else {}
    key = f"{base} + {system}"
    if key not in scores:
        directory = trained("small full" if system == "proxy" else system, seed, out, device)
        family, connection, how = out / "family", recorded_connection(directory), {}
        value = (Probe.load if connection == "probe" else load)(directory, device)
        if system == "proxy":
            how["antiexpert"] = load(family / "small", device)
        pair = (value, None) if system.endswith("full") else (load(family / base, device), value)
        scores[key] = toy.score(*pair, Tokenizer(family / base), read_chats(family / "heldout.jsonl"),
                                connection=connection, **how)
        write_text(kept, json.dumps(scores, indent=2) + "\n")
    return scores[key]


def table(name: str, seeds: int, out: Path, device: torch.device) -> None:
    """Prints a table and writes OUT/NAME.json: for each row the scores of all seeds, their mean, smallest and largest."""
    toy.make_family(out / "family", 0, device)
    rows = []
    print(f"\n{name}, {seeds} seeds: mean (smallest to largest)\n{'base':<8}{'system':<14}{'form':<26}right")
    for base, system in TABLES[name]:
        each = [score(base, system, seed, out, device) for seed in range(seeds)]
        row = {"base": base, "system": system}
        for key in ("form", "right"):
            values = [scores[key] for scores in each]
            row[key] = {"mean": sum(values) / seeds, "least": min(values), "most": max(values), "seeds": values}
        rows.append(row)
        print(f"{base:<8}{system:<14}" + "".join("{mean:.2f} ({least:.2f} to {most:.2f})".format(**row[key]).ljust(26)
                                                  for key in ("form", "right")).rstrip(), flush=True)
    write_text(out / f"{name}.json", json.dumps(rows, indent=2) + "\n")


def verdict(rows: dict[tuple[str, str], dict], comparisons: list[tuple]) -> str:
    """Of a claim, by the rule above. rows: (base, system) → its row of a table."""
    held = [[sign * (x - y) > margin for x, y in zip(rows[first][key]["seeds"], rows[second][key]["seeds"])]
            for first, key, sign, second, margin in comparisons]
    return "agrees" if all(map(all, held)) else "undecided" if all(map(any, held)) else "disagrees"


def findings(out: Path) -> None:
    """Prints the claims and writes OUT/findings.json, from the tables that are there."""
    results = []
    for number, text, paper, name, comparisons in CLAIMS:
        rows = {(row["base"], row["system"]): row for row in read_json(out / f"{name}.json", list)}
        named = dict.fromkeys((row, key) for first, key, _, second, _ in comparisons for row in (first, second))
        ours = "; ".join("{} on {}: {} {:.2f}".format(row[1], row[0], key, rows[row][key]["mean"]) for row, key in named)
        results.append({"claim": number, "text": text, "paper": paper, "ours": ours, "verdict": verdict(rows, comparisons)})
        print(f"{number}. {text}\n   paper: {paper}\n   ours:  {ours}\n   {results[-1]['verdict']}\n")
    write_text(out / "findings.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*TABLES, "findings", "all"])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.seeds < 1:
        raise InputError(f"--seeds = {args.seeds}; it must be at least 1")
    for name in TABLES if args.name == "all" else [args.name]:
        if name != "findings":
            table(name, args.seeds, args.out, pick_device(args.device))
    if args.name in ("findings", "all"):
        findings(args.out)


if __name__ == "__main__":
    command(main)
