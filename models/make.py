"""Make a model: train the tokenizer, train the network, export GGUF files.

    python -m models.make --out DIR                 the whole recipe: hours on two CPU cores
    python -m models.make --out DIR --start FILE    the cycles of it that follow those that made a GGUF file
    python -m models.make --out DIR --smoke         the same steps on a toy scale: seconds

A run that was cut off goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from actqkv_cpp.files import written_atomically
from models import tokenizer as tokenizers
from models.export import FILE_TYPES, export
from models.recipe import FULL, SMOKE, Recipe
from models.train import train

TOKENIZER = "tokenizer.model"
RECIPE = "recipe.json"


def make(folder: Path, recipe: Recipe, *, start: Path | None = None) -> list[Path]:
    """Run `recipe` in `folder`, or finish what is there of it; from `start` on, a file that earlier cycles made.

    Returns:
        The GGUF files.

    Raises:
        ValueError: the folder holds a run of another recipe, or `start` does not fit.
        ImportError: sentencepiece is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, recipe)
    if not (folder / TOKENIZER).exists():
        tokenizers.train(folder / TOKENIZER, config=recipe.tokenizer)
    tokenizer = tokenizers.load(folder / TOKENIZER)
    config = recipe.training
    network = train(folder, tokenizer=tokenizer, network_config=recipe.network, config=config, start=start)
    paths = []
    for file_type in FILE_TYPES:
        paths.append(folder / f"needle-{file_type}.gguf")
        export(
            network,
            tokenizer=tokenizer,
            path=paths[-1],
            file_type=file_type,
            recipe=recipe.digest(),
            step=config.n_steps,
        )
    return paths


def _claim(folder: Path, recipe: Recipe) -> None:
    path = folder / RECIPE
    if not path.exists():
        with written_atomically(path) as temporary:
            temporary.write_text(recipe.to_json(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != recipe.to_json():
        raise ValueError(f"{path} is of another recipe: choose another folder, or remove this one")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m models.make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--start", type=Path, metavar="FILE", help="GGUF file that earlier cycles of the recipe made")
    parser.add_argument("--smoke", action="store_true", help="a toy scale, to see every step run")
    args = parser.parse_args(argv)
    recipe = SMOKE if args.smoke else FULL
    try:
        paths = make(args.out, recipe, start=args.start)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
