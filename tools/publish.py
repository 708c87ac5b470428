"""Assembles a release of the current results, shows it, and pushes it to the Hub where it is told to. Run by `make publish`; no stage.

    python -m tools.publish --repo owner/name [--profile a40] [--licence apache-2.0] [--data] [--push]

A release is what the commit says: with a change in the working tree, or a stage that is not up to date, there is none. It is several
repositories: owner/name has the merged model and the adapter, owner/name-GGUF the files for llama.cpp, and one for each method of
models/compressed has its folder. With --data the data set owner/name-Preferences has the pairs that were trained and evaluated on, and all
answers and scores. Each lies in a folder of `.scratch/release`, made of links to the artifacts and of a few files more: the
card, the licence, the notice that the licence asks for, and Ollama's Modelfile. Each becomes one commit on the Hub, which also removes
there what is not in it, so that nobody sees half of it. The one that the others name as their base comes last.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetCardData,
    EvalResult,
    HfApi,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hermes import hub
from hermes.artifacts import MANIFEST, complete_folder, read_json, scratch_folder, sha256_file, write_json
from hermes.console import UserError, say, warn
from hermes.pages.render import render
from hermes.pages.results import Inputs, Row, read_inputs
from hermes.params import read_yaml
from hermes.run import run_tool
from hermes.settings.compress import Method
from stages.report import page
from tools.doctor import git
from tools.dvc_runs import dvc, only_one
from tools.profiles import selected

BASE, DATA = Path("models/base/manifest.json"), Path("data/raw/manifest.json")
MERGED, GGUF, COMPRESSED = Path("models/merged"), Path("models/gguf"), Path("models/compressed")
SUBSET, EVALUATION = Path("data/subset"), Path("data/evaluation")
SPLITS = ("train", "validation", "test")
# The repositories in the order of their pushes: what their names end in, and the folders of each by their place in it.
SUFFIXES = {"data": "-Preferences", "gguf": "-GGUF", "gptq": "-GPTQ-Int4", "awq": "-AWQ", "merged": ""}
FOLDERS = {
    "data": {"": SUBSET, "evaluation": EVALUATION},
    "gguf": {"": GGUF},
    "gptq": {"": COMPRESSED / "gptq"},
    "awq": {"": COMPRESSED / "awq"},
    "merged": {"": MERGED, "adapter": Path("models/adapter")},
}
METHODS = get_args(Method)
CARDS = {"data": "card_data.md.j2", "merged": "card.md.j2"}  # the others have card_quantized.md.j2
IMPORTANCE = "imatrix.gguf"  # what the rounding went by; no model
CARD = "README.md"
KEPT = ".gitattributes"  # the Hub's own file in a repository


@dataclass(frozen=True)
class Terms:
    """What a licence asks of those who pass a model on (licences/terms.yaml)."""

    id: str  # as the Hub calls it
    text: str  # the file
    name_begins: str = ""
    display: str = ""
    notice: str = ""
    policy: str = ""


# The licences, and which of them the bases and data that the profiles name have.
KNOWN = read_yaml(Path(__file__).parent.parent / "licences/terms.yaml")
LICENCES = {id: Terms(id, **terms) for id, terms in KNOWN["licences"].items()}


def check_commit() -> str:
    """The commit that the working tree is; a UserError where it is none, or has changes."""
    commit, changed = git(Path(), "rev-parse", "HEAD"), git(Path(), "status", "--porcelain")
    if commit is None or changed is None:
        raise UserError(
            "this folder has no commit, or git is not installed; a release has to say from which one it was made"
        )
    if changed:
        names = ", ".join(line[3:] for line in changed.splitlines()[:3])
        raise UserError(f"the working tree has changes ({names}); commit them, so that a commit says what is published")
    return commit.strip()


def check_results() -> None:
    """Refuses, by a UserError, results that the parameters, code and data of this commit did not make."""
    if status := json.loads(dvc("status", "--json")):
        raise UserError(
            f"not up to date: {', '.join(sorted(status)[:4])}; run `make repro` under this profile and commit what it "
            "changes (`.venv/bin/dvc status` says more)"
        )


def terms_of(source: str, stated: Sequence[str]) -> tuple[Terms, ...]:
    """The licences of a base, known or stated; a UserError where they are neither."""
    ids = KNOWN["bases"].get(source, stated)
    if not ids:
        raise UserError(
            f"the licence of {source} is not known here; state it, for example LICENCE=apache-2.0 ({', '.join(LICENCES)})"
        )
    return tuple(LICENCES[id] for id in ids)


def check_name(repo: str, terms: Sequence[Terms] = ()) -> None:
    """Refuses, by a UserError, a name that the Hub or a licence does not allow, with all that it may end in."""
    try:
        for suffix in SUFFIXES.values():
            validate_repo_id(f"{repo}{suffix}")
        owner, name = repo.split("/")
    except (HFValidationError, ValueError):
        raise UserError(f"REPO={repo}: not a repository of the Hub; expected owner/name") from None
    for licence in terms:
        begins = licence.name_begins
        if not re.sub(r"[-_.]", "", name).startswith(begins.replace(" ", "")):
            raise UserError(
                f"REPO={repo}: the {licence.id} licence asks for a name that begins with {begins}; "
                f"for example {owner}/{begins.replace(' ', '-')}-{name}"
            )


def kinds(with_data: bool = False) -> list[str]:
    """The repositories of a release in the order of their pushes: of data where wanted, one for each method in use, and two always."""
    made = {"data": with_data, "gguf": True, "merged": True} | {name: (COMPRESSED / name).is_dir() for name in METHODS}
    return [kind for kind in SUFFIXES if made[kind]]


def data_licence(data: Row) -> str:
    """What the Hub calls the licence of the data; a UserError where a card states none, or one without a name, or two different ones."""
    stated = {}
    for source in (data, *data.get("mixed_with", ())):
        licence: str | None = KNOWN["data"].get(source["source"]) or source.get("card", {}).get("license")
        if not isinstance(licence, str) or licence.lower() in ("unknown", "other"):
            raise UserError(
                f"the card of {source['source']} states no licence that is known, so its pairs are not published; leave DATA=1 out"
            )
        stated[source["source"]] = licence.lower()
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{source} under {licence}" for source, licence in stated.items())
        raise UserError(f"the pairs are mixed of {said}, and one licence is not known for both; leave DATA=1 out")
    return next(iter(stated.values()))


def artifacts(kind: str) -> Iterator[tuple[str, Path]]:
    """The place in a repository and here of every artifact in it; a UserError where a folder has none."""
    for place, folder in FOLDERS[kind].items():
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        # A manifest names folders that a release has not; the logs of suites hold the questions of others.
        found = [path for path in found if path.name != MANIFEST and folder / "suites" not in path.parents]
        wanted, what = ((".parquet", ".jsonl"), "rows") if kind == "data" else ((".safetensors", ".gguf"), "weights")
        if not any(path.suffix in wanted and path.name != IMPORTANCE for path in found):
            raise UserError(f"{folder}: holds no {what}; run `make repro`, or `.venv/bin/dvc checkout`")
        for path in found:
            yield f"{place}/{path.relative_to(folder).as_posix()}".lstrip("/"), path


def hub_name(source: str) -> str | None:
    """The name on the Hub of a model or data set, where it has one."""
    name = KNOWN["hub_names"].get(source, source)
    return name if "/" in name and not name.startswith((".", "/")) else None


def constituents(base: Row) -> list[Row]:
    """The models that a base was merged of, the merge's own base first; none where it was not merged here (tools/merge_base.py)."""
    if "recipe" not in base:
        return []
    recipe = base["recipe"]
    models = [(recipe["base_model"], {}), *((entry["model"], entry["parameters"]) for entry in recipe["models"])]
    return [{**model["model"], **shares, "hub": hub_name(model["model"]["path"])} for model, shares in models]


def stated(data: Row) -> dict[str, str]:
    """What the card of the data says of their name, authors and licence; empty where it says nothing."""
    card = {key: value if isinstance(value, str) else ", ".join(value) for key, value in data.get("card", {}).items()}
    licence, called = card.get("license", ""), card.get("license_name", "")
    return {
        "name": card.get("pretty_name", "") or data["source"],
        "authors": card.get("authors", ""),
        "licence": f"{licence} ({called})" if licence and called else licence,
    }


def measured(model: str, inputs: Inputs, data: Row) -> list[EvalResult]:
    """The scores of a model as the Hub's metadata has them: on held-out rows, then those of every benchmark of the suites.

    None where it was not evaluated.
    """

    def result(kind: str, name: str, score: Row, **dataset: Any) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            metric_type=kind,
            metric_name=f"{name} (n = {score['n']})",
            metric_value=round(score[kind], 4),
            **dataset,
        )

    results, found = inputs.results.get(model), []
    if results is None:
        return []
    source, revision = data["source"], data["revision"]
    rows = {"dataset_type": source, "dataset_name": f"held-out rows of {source}", "dataset_revision": revision}
    if results["strict"]:
        found.append(result("accuracy", "strict instruction accuracy", results["strict"]["seen"], **rows))
    if results["preference"]:
        found.append(result("accuracy", "preference accuracy by likelihood", results["preference"], **rows))
    for suite, row in inputs.suites.items():
        scores = row["models"].get(model)  # not every file is asked them
        for part, score in {"average": scores["average"], **scores["benchmarks"]}.items() if scores else ():
            # Results that differ in their name alone would become one, hence the config.
            place = {"dataset_type": suite, "dataset_name": f"{row['title']}: {part}", "dataset_config": part}
            found.append(result("score", "score as this card defines it", score, **place))
    return found


def metadata(repo: str, kind: str, inputs: Inputs, terms: Sequence[Terms], base: Row, data: Row) -> str:
    """The YAML that the Hub reads at the top of the card of a repository; the smaller ones are made from owner/name, `repo`."""
    several = len(terms) > 1
    merged_of = [model["hub"] for model in constituents(base) if model["hub"]]
    origin: Row = {"base_model": repo, "base_model_relation": "quantized"}
    if kind == "merged":
        origin = {"base_model": hub_name(base["source"]) or merged_of or None}
    return ModelCardData(
        model_name=f"{repo}{SUFFIXES[kind]}".split("/")[1],
        **origin,
        datasets=[found] if (found := hub_name(data["source"])) else None,
        library_name="gguf" if kind == "gguf" else "transformers",
        pipeline_tag="text-generation",
        license="other" if several else terms[0].id,
        license_name="-and-".join(licence.id for licence in terms) if several else None,
        license_link="LICENSE" if several else None,
        tags=["dpo", "preference", "qlora", "hermes-dpo", *([] if kind == "merged" else [kind])],
        eval_results=measured(kind, inputs, data) or None,
    ).to_yaml()


def data_metadata(name: str, inputs: Inputs, data: Row) -> str:
    """The YAML at the top of the card of the data: the pairs by split, and as `answers` what each model wrote."""
    pairs = [
        {"split": split, "path": f"{split}.parquet"} for split in SPLITS if (SUBSET / f"{split}.parquet").is_file()
    ]
    written = [model for model, result in inputs.results.items() if result["strict"]]
    configs = [{"config_name": "pairs", "default": True, "data_files": pairs}]
    if written:
        answers = [{"split": model, "path": f"evaluation/{model}.jsonl"} for model in written]
        configs.append({"config_name": "answers", "data_files": answers})
    return DatasetCardData(
        pretty_name=name,
        license=data_licence(data),
        language="en",
        configs=configs,
        tags=["dpo", "preference", "hermes-dpo"],
    ).to_yaml()


def name_base(config: Path, base: Row) -> None:
    """Has the configuration of an adapter name its base as the Hub does; one that the Hub has not keeps its hash."""
    if found := hub_name(base["source"]):
        content = read_json(config) | {
            "base_model_name_or_path": found,
            "revision": base["revision"] if found == base["source"] else None,
        }
        config.unlink()  # a link to the artifact
        write_json(config, content)


def folder_of(repo: str) -> Path:
    """Where a repository of a release is assembled."""
    return scratch_folder("release") / repo.replace("/", "--")


def write_modelfile(target: Path) -> None:
    """Writes Ollama's Modelfile into a folder of the GGUF files, or says why there is none."""
    from tools.chat import default_gguf  # which takes seconds to import
    from tools.modelfile import Unwritable, modelfile

    gguf = default_gguf()
    try:
        (target / "Modelfile").write_text(modelfile(gguf, MERGED, gguf.name))
    except Unwritable as error:
        warn(f"no Modelfile for Ollama: {error}")


def fill(target: Path, kind: str, terms: Sequence[Terms], base: Row) -> list[Row]:
    """Puts the files of a repository into its folder, but for the card; returns path, size in bytes and sha256 of each."""
    for place, source in artifacts(kind):
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).symlink_to(source.resolve())
    if kind == "gguf":
        write_modelfile(target)
    if kind == "merged":
        name_base(target / "adapter/adapter_config.json", base)
    if kind != "data":  # the terms are those of the weights
        (target / "LICENSE").write_text("\n\n".join(Path(licence.text).read_text() for licence in terms))
        if notices := [licence.notice for licence in terms if licence.notice]:
            (target / "NOTICE").write_text("\n".join(notices) + "\n")
    return [
        {"path": path.relative_to(target).as_posix(), "size": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(target.rglob("*"))
        if path.is_file()
    ]


def assemble(repo: str, commit: str, terms: Sequence[Terms], with_data: bool = False) -> dict[str, list[Row]]:
    """Makes the folders of a release anew; returns the files of each repository but for its card, which lists them."""
    from tools.chat import default_gguf  # which takes seconds to import

    inputs, base, data = read_inputs(), read_json(BASE), read_json(DATA)
    if with_data:
        data_licence(data)
    shown = page(inputs) | {
        "repo": repo,
        "repositories": {kind: f"{repo}{SUFFIXES[kind]}" for kind in kinds(with_data)},
        "commit": commit,
        "terms": terms,
        "base": base | {"hub": hub_name(base["source"])},
        "constituents": constituents(base),
        "data": data | {"hub": hub_name(data["source"]), "terms": KNOWN["data"].get(data["source"])},
        "stated": stated(data),
    }
    made: dict[str, list[Row]] = {}
    for kind, name in shown["repositories"].items():
        with complete_folder(folder_of(name)) as target:
            made[name] = fill(target, kind, terms, base)
            content = shown | {
                "metadata": data_metadata(name.split("/")[1], inputs, data)
                if kind == "data"
                else metadata(repo, kind, inputs, terms, base, data),
                "kind": kind,
                "name": name.split("/")[1],
                "release": made[name],
                "example": default_gguf().stem,
            }
            render(CARDS.get(kind, "card_quantized.md.j2"), target / CARD, content)
    return made


def refusal(error: Exception, repo: str) -> UserError:
    """Why the Hub did not take a release, in one line, and what to do."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__ or cause.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    mends = {
        401: "the Hub does not know the token; set HF_TOKEN to a valid one that may write",
        403: "the token may not write there; use one that may, or another owner",
    }
    other = f"not pushed ({lines[0]}); run this again, files that have arrived are not sent twice"
    return UserError(f"{repo}: {mends.get(cause.response.status_code, other) if cause else other}")


def push(folder: Path, repo: str, commit: str, kind: str) -> str:
    """Makes a release the content of a Hub repository in one commit; returns its address. A UserError says why the Hub does not take it."""
    api, names = HfApi(), sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    hub_type = "dataset" if kind == "data" else "model"
    try:
        api.create_repo(repo, repo_type=hub_type, exist_ok=True)
        gone = sorted(set(api.list_repo_files(repo, repo_type=hub_type)) - {*names, KEPT})
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationDelete(name) for name in gone),
            *(CommitOperationAdd(name, str(folder / name)) for name in names),
        ]
        message = f"hermes-dpo at commit {commit}"
        return api.create_commit(repo, operations, repo_type=hub_type, commit_message=message).commit_url
    except (*hub.ERRORS, RuntimeError) as error:
        raise refusal(error, repo) from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.publish", description="Publish the current results.")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the repository on the Hub")
    parser.add_argument(
        "--profile", metavar="NAME", help="the profile whose results they are; params.yaml's unless given"
    )
    parser.add_argument("--licence", action="append", default=[], choices=LICENCES, help="of a base that is not known")
    parser.add_argument("--data", action="store_true", help="the pairs and all answers too, as a data set")
    parser.add_argument("--push", action="store_true", help="push; without it the release is only shown")
    options = parser.parse_args()
    check_name(options.repo)
    if options.push and not get_token():
        raise UserError(
            "no token to push with; set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)"
        )
    commit = check_commit()
    with only_one("repro"), selected(options.profile):
        check_results()
        terms = terms_of(read_json(BASE)["source"], options.licence)
        check_name(options.repo, terms)
        release = assemble(options.repo, commit, terms, options.data)
    for repo, files in release.items():
        say(f"{repo}:", *(f"{file['size']:>14,}  {file['sha256']}  {file['path']}" for file in files))
        say(f"card: {folder_of(repo) / CARD}")
    if options.push:
        for kind, repo in zip(kinds(options.data), release, strict=True):
            say(f"pushed: {push(folder_of(repo), repo, commit, kind)}")
    else:
        sizes = [file["size"] for files in release.values() for file in files]
        say(
            f"{len(sizes) + len(release)} files, {sum(sizes) / 1e9:.2f} GB, would become {', '.join(release)}; "
            "nothing is pushed without PUSH=1"
        )


if __name__ == "__main__":
    run_tool("publish", main)
