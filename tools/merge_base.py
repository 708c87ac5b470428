"""Merges the base of the A40 profiles anew from its constituents: base-merge.yaml -> models/rebuilt-base. Run by `make base`; no stage.

    python -m tools.merge_base
    python -m tools.merge_base --resolve      first ask the Hub for the commits that base-merge.yaml lacks, and write them into it

The recipe is mergekit's own format, and mergekit merges. What this adds is that the same recipe gives the same bits: a seed for what DARE
drops, a number of threads, and constituents at full commits. Those are downloaded as fetch_model downloads: mergekit's own download takes a
damaged file or a pickle as it comes, and a misspelt `density` as 1. A constituent may also be a folder here. The result is a model for
`model.source: ./models/rebuilt-base`; docs/base.md says what it is not. Its manifest holds the recipe and the versions of what made it,
which fetch_model carries along, so that report and card can name both.
"""

import argparse
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from pydantic import PositiveInt, ValidationError, model_validator

from hermes import hub, params
from hermes.artifacts import complete_file, complete_folder, scratch_folder, write_manifest
from hermes.console import UserError, say
from hermes.run import run_tool
from hermes.settings.sources import is_folder
from stages import fetch_model

RECIPE, OUTPUT = Path("base-merge.yaml"), Path("models/rebuilt-base")
UNKNOWN = re.compile(r"(path: *([^\s,}]+),?\s+revision: *)(?:null|~)")  # a model and its commit, which is not known yet


class Place(params.Settings):
    """A Hub repository at a full commit, so that it is the same model tomorrow; or a folder here, which has none."""

    path: str
    revision: str | None

    @model_validator(mode="after")
    def _is_pinned(self) -> "Place":
        if not is_folder(self.path) and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"the revision of {self.path} is {self.revision!r}; write its full 40-digit commit there, or let "
                "`make base RESOLVE=1` write the newest one of each that is null"
            )
        return self


class Weighting(params.Settings):
    """The share of a model's changes that is kept, and their factor."""

    density: float
    weight: float


class Ingredient(params.Settings):
    """A model whose differences from the base are merged."""

    model: dict[Literal["model"], Place]
    parameters: Weighting


class Recipe(params.Settings):
    """All of base-merge.yaml."""

    seed: int
    threads: PositiveInt
    merge_method: str
    dtype: str
    chat_template: str
    base_model: dict[Literal["model"], Place]
    models: list[Ingredient]


def read_recipe(path: Path = RECIPE) -> Recipe:
    """Reads a recipe; a UserError that names the key where it is none, or may mean other weights tomorrow."""
    try:
        return Recipe.model_validate(params.read_yaml(path))
    except ValidationError as error:
        # Rather the key that is misspelt than the one that is missing for it.
        detail = max(error.errors(), key=lambda found: found["type"] == "extra_forbidden")
        raise UserError(f"{path}: `{'.'.join(map(str, detail['loc']))}`: {detail['msg']}") from None


def resolve(path: Path = RECIPE) -> None:
    """Writes the newest commit of every model whose revision is null into a recipe, which stays as it is where the Hub cannot tell one."""

    def pinned(found: re.Match[str]) -> str:
        if is_folder(found[2]):
            return found[0]
        try:
            commit = HfApi().model_info(found[2]).sha
        except hub.ERRORS as error:
            raise hub.failure(error, found[2], "main") from None
        say(f"{path}: {found[2]}@{commit}")
        return f"{found[1]}{commit}"

    with complete_file(path) as temporary:
        temporary.write_text(UNKNOWN.sub(pinned, path.read_text()))


def fetch(place: Place) -> Path:
    """The folder of a constituent; one from the Hub is downloaded where an earlier run has not done so."""
    if is_folder(place.path):
        fetch_model.refuse_other_files(Path(place.path))
        return Path(place.path)
    folder = scratch_folder("base-merge") / place.path.replace("/", "--") / str(place.revision)
    if not folder.is_dir():
        with complete_folder(folder) as target:
            fetch_model.fetch_hub(place.path, str(place.revision), target)
    fetch_model.refuse_other_files(folder)
    return folder


def merge(recipe: Recipe, target: Path) -> None:
    """Lets mergekit merge a recipe's models into the folder `target`."""
    config = recipe.model_dump(exclude={"seed", "threads"})
    for entry in (config["base_model"], *(ingredient["model"] for ingredient in config["models"])):
        entry["model"] = {"path": str(fetch(Place(**entry["model"])))}
    torch.set_num_threads(recipe.threads)
    options = MergeOptions(random_seed=recipe.seed, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(target), options)
    generation = Path(config["base_model"]["model"]["path"]) / "generation_config.json"
    if generation.is_file():  # mergekit leaves it out where it writes the tokenizer anew
        shutil.copyfile(generation, target / generation.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.merge_base", description="Merge the A40 profiles' base anew."
    )
    parser.add_argument("--resolve", action="store_true", help=f"write commits that {RECIPE} lacks into it first")
    if parser.parse_args().resolve:
        resolve()
    recipe = read_recipe()
    with complete_folder(OUTPUT) as target:
        merge(recipe, target)
        versions = {name: version(name) for name in ("mergekit", "safetensors", "torch", "transformers")}
        write_manifest(target, recipe=recipe.model_dump(), versions=versions)
    shutil.rmtree(scratch_folder("base-merge"), ignore_errors=True)
    say(
        f"{OUTPUT}: merged; `source: ./{OUTPUT}` and `revision: null` in the `model` section of a profile take it as its base. "
        "Where they do already, `make repro` sees that it is another one"
    )


if __name__ == "__main__":
    run_tool("merge-base", main)
