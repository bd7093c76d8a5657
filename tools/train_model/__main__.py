"""Trains the shipped model and writes it in the Hugging Face format."""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .samples import SampleSource
from .text import corpus
from .tokenizer import train_tokenizer
from .training import Recipe, build_model, mark_all, train

REQUIRED_SHARES = {"glossary": 0.95, "held-out sums": 0.90}


def main() -> int:
    """Exit code 0 if the trained model, as written, reaches the required shares of exact answers."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(n_steps=arguments.steps, seed=arguments.seed)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(corpus())
    source = SampleSource(tokenizer, random.Random(recipe.seed))
    model = build_model(tokenizer)
    train(model, source, recipe, report)
    save(model, tokenizer, arguments.out)
    written = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    marks = mark_all(written, source)
    for subject, mark in marks.items():
        report(f"{subject}: exact={mark.exact_share:.2%} least_margin={mark.least_margin:.2f}")
    return int(any(marks[subject].exact_share < share for subject, share in REQUIRED_SHARES.items()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.train_model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. hexmesh/assets/model")
    parser.add_argument("--steps", type=int, default=Recipe().n_steps)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in bfloat16, config and tokenizer; casts `model` in place."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # transformers 5 writes the name of its own backend class; the older name is understood by all versions.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    # safetensors writes for the owner alone; a package's data must be readable by whoever installs it.
    (folder / "model.safetensors").chmod(0o644)


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
