"""Merges the base of the A40 profiles anew from its constituents: base-merge.yaml -> models/rebuilt-base. Run by `make base`; no stage.

    python -m tools.merge_base
    python -m tools.merge_base --resolve      first ask the Hub for the commits that base-merge.yaml lacks, and write them into it

The recipe is mergekit's own format, and mergekit merges. What this adds is that the same recipe gives the same bits: a seed for what DARE
drops, a number of threads, and constituents at full commits, downloaded as fetch_model downloads and checked against the Hub's hashes. A
constituent may also be a folder here. The result is a model for `model.source: ./models/rebuilt-base`; docs/base.md says what it is not.
Its manifest holds the recipe and the versions of what made it, which fetch_model carries along, so that report and card can name both.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from pydantic import PositiveInt, ValidationError
from ruamel.yaml import YAML

from hermes import hub, params
from hermes.artifacts import complete_file, complete_folder, scratch_folder, sha256_file, write_json
from hermes.console import UserError
from hermes.hub import is_folder
from hermes.run import run_stage
from stages import fetch_model

RECIPE, OUTPUT = Path("base-merge.yaml"), Path("models/rebuilt-base")
SCRATCH = "base-merge"


class Place(params.Settings):
    """A Hub repository at a commit, or a folder here, which has none."""

    path: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether it will be the same model tomorrow, as far as that can be told."""
        return is_folder(self.path) or bool(re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))


class Model(params.Settings):
    """What mergekit calls a model reference."""

    model: Place


class Weighting(params.Settings):
    """The share of a model's changes that is kept, and their factor."""

    density: float
    weight: float


class Ingredient(params.Settings):
    """A model whose differences from the base are merged."""

    model: Model
    parameters: Weighting


class Recipe(params.Settings):
    """All of base-merge.yaml."""

    seed: int
    threads: PositiveInt
    merge_method: str
    dtype: str
    chat_template: str
    base_model: Model
    models: list[Ingredient]

    @property
    def places(self) -> list[Place]:
        """Where the models come from, the base first."""
        return [self.base_model.model, *(entry.model.model for entry in self.models)]


def read_recipe(path: Path = RECIPE) -> Recipe:
    """Reads and validates a recipe.

    Raises:
        UserError: it is not one; names the key.
    """
    try:
        return Recipe.model_validate(params.read_yaml(path))
    except ValidationError as error:
        detail = max(
            error.errors(), key=lambda found: found["type"] == "extra_forbidden"
        )  # rather the key that is misspelt
        raise UserError(f"{path}: `{'.'.join(map(str, detail['loc']))}`: {detail['msg']}") from None


def check_pinned(recipe: Recipe, path: Path = RECIPE) -> None:
    """Refuses a recipe that may mean other weights tomorrow, before anything is downloaded.

    Raises:
        UserError: names the first model without a full commit.
    """
    for place in recipe.places:
        if not place.is_pinned:
            raise UserError(
                f"{path}: the revision of {place.path} is {place.revision!r}; write its full 40-digit commit there, or let "
                "`make base RESOLVE=1` write the newest one of each that is null"
            )


def newest_commit(source: str) -> str:
    """The commit that a repository's main branch is at now.

    Raises:
        UserError: the Hub cannot tell.
    """
    try:
        return str(HfApi().model_info(source).sha)
    except hub.ERRORS as error:
        raise hub.failure(error, source, "main") from None


def resolve(path: Path = RECIPE) -> list[str]:
    """Writes the newest commit of every model whose revision is null into a recipe, all else as it was; returns lines that say which.

    Raises:
        UserError: the Hub cannot tell one; then the file stays.
    """
    read_recipe(path)
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 10_000, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    tree = yaml.load(path)
    found = []
    for place in (tree["base_model"]["model"], *(entry["model"]["model"] for entry in tree["models"])):
        if place["revision"] is None and not is_folder(place["path"]):
            place["revision"] = newest_commit(place["path"])
            found.append(f"{place['path']}@{place['revision']}")
    with complete_file(path) as temporary:
        yaml.dump(tree, temporary)
    return found


def fetch(place: Place) -> Path:
    """The folder of a constituent; one from the Hub is downloaded where an earlier run has not done so.

    Raises:
        UserError: the Hub cannot give it.
    """
    if is_folder(place.path):
        return Path(place.path)
    folder = scratch_folder(SCRATCH) / place.path.replace("/", "--") / str(place.revision)
    if not folder.is_dir():
        with complete_folder(folder) as target:
            fetch_model.fetch_hub(place.path, place.revision, target)
    return folder


def merge(recipe: Recipe, folders: Sequence[Path], target: Path) -> None:
    """Lets mergekit merge the models in `folders`, which are the recipe's in its order, into the folder `target`."""
    config: dict[str, Any] = recipe.model_dump(exclude={"seed", "threads"})
    for entry, folder in zip([config["base_model"], *(e["model"] for e in config["models"])], folders, strict=True):
        entry["model"] = {"path": str(folder)}
    torch.set_num_threads(recipe.threads)
    options = MergeOptions(random_seed=recipe.seed, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(target), options)
    generation = folders[0] / "generation_config.json"
    if generation.is_file():  # mergekit leaves it out where it writes the tokenizer anew
        shutil.copyfile(generation, target / generation.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_base", description="Merge the A40 profiles' base anew."
    )
    parser.add_argument("--resolve", action="store_true", help=f"write commits that {RECIPE} lacks into it first")
    if parser.parse_args().resolve:
        for line in resolve():
            print(f"{RECIPE}: {line}")
    recipe = read_recipe()
    check_pinned(recipe)
    folders = [fetch(place) for place in recipe.places]
    with complete_folder(OUTPUT) as target:
        merge(recipe, folders, target)
        manifest = {
            "recipe": recipe.model_dump(),
            "versions": {name: version(name) for name in ("mergekit", "safetensors", "torch", "transformers")},
            "files": {path.name: sha256_file(path) for path in sorted(target.iterdir())},
        }
        write_json(target / "manifest.json", manifest)
    shutil.rmtree(scratch_folder(SCRATCH), ignore_errors=True)
    print(
        f"{OUTPUT}: merged; `source: ./{OUTPUT}` and `revision: null` in the `model` section of a profile take it as its base. "
        "Where they do already: `.venv/bin/dvc repro --force fetch_model`, since DVC does not watch that folder"
    )


if __name__ == "__main__":
    run_stage("base_merge", main)
