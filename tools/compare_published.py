"""data/subset beside the 2,000 rows that the published run was trained on, row by row: `make compare-published`, and after `make repro`.

Only a subset that was made as the published one is compared: the top 2,000 of the Hermes pairs as they stand, which is what the profile
a40_published makes. What was found is printed and kept in reports/compare-published.json, with the hash of the rows that it is about.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hermes import hub
from hermes.artifacts import open_parquet, read_object, sha256_file, write_json
from hermes.console import UserError, say
from hermes.pages import published_run
from hermes.run import run_tool

SUBSET, COMMIT = "yuvraj17/chatml-OpenHermes2.5-dpo-binarized-alpha-2k", "60bac7f"
MANIFEST, ROWS = Path("data/raw/manifest.json"), Path("data/subset/train.parquet")
REPORT, COMPARISON = Path("reports/subset.json"), Path("reports/compare-published.json")
KEPT = 2000
COLUMNS = ["question", "chosen", "rejected"]
Row = tuple[str, ...]


def difference_in_making() -> str | None:
    """What was done otherwise to make data/subset than to make the published one; None where nothing was."""
    source, train = read_object(MANIFEST).get("source"), read_object(REPORT).get("train")
    if not isinstance(train, dict) or not {"kept", "removed"} <= train.keys():
        raise UserError(f"{REPORT}: says nothing of the training pairs; run `dvc repro --force subset`")
    if source != published_run.DATA:
        return f"{MANIFEST}: the last run's data are {source}, not {published_run.DATA}"
    if train["kept"] != KEPT:
        return f"{REPORT}: the last run kept {train['kept']:,} pairs; the published subset has {KEPT:,}"
    if rules := ", ".join(sorted(set(train["removed"]) - {"below_top_k"})):
        return f"{REPORT}: the last run also removed pairs by {rules}; the published subset is the top {KEPT:,} as they stood"
    return None


def compare_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """What two tables have in common, row by row and as bags of rows; `first_difference` is the place of the first row that differs."""
    here, published = Counter(ours), Counter(theirs)
    return {
        "rows": len(ours),
        "published_rows": len(theirs),
        "common": (here & published).total(),
        "first_difference": next((i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b), None),
        "only_here": [row[0][:100] for row in (here - published).elements()],
        "only_published": [row[0][:100] for row in (published - here).elements()],
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """A comparison in words."""
    apart = found["first_difference"]
    first = "no row differs in its place" if apart is None else f"the first row that differs is {apart}"
    return [
        f"{found['rows']} rows here, {found['published_rows']} published, {found['common']} the same; {first}",
        *(f"only here: {question!r}" for question in found["only_here"]),
        *(f"only published: {question!r}" for question in found["only_published"]),
    ]


def published_rows() -> tuple[str, list[Row]]:
    """The full commit of the published subset, and its rows; a UserError where the Hub cannot give them."""
    try:
        commits = [commit.commit_id for commit in HfApi().list_repo_commits(SUBSET, repo_type="dataset")]
    except hub.ERRORS as error:
        raise hub.failure(error, SUBSET, COMMIT) from None
    revision = next((commit for commit in commits if commit.startswith(COMMIT)), None)
    if revision is None:
        raise UserError(f"{SUBSET}: its history has no commit {COMMIT} any more")
    files = [file for file in hub.list_files(SUBSET, revision, "dataset") if file.path.endswith(".parquet")]
    folder = hub.download(SUBSET, revision, "dataset", files)
    rows = [row for file in files for row in read_rows(folder / file.path)]
    hub.forget(folder)
    return revision, rows


def read_rows(path: Path) -> list[Row]:
    """Question, chosen and rejected of every row of a Parquet file."""
    with open_parquet(path) as file:
        return [tuple(row[name] for name in COLUMNS) for row in file.read(COLUMNS).to_pylist()]


def is_due() -> bool:
    """Whether the last run's subset was made as the published one, and has not been compared yet."""
    known = read_object(COMPARISON).get("subset_sha256") if COMPARISON.is_file() else None
    return difference_in_making() is None and known != sha256_file(ROWS)


def compare() -> list[str]:
    """Compares, keeps what was found, and says it; a UserError where the rows were made otherwise, and would say nothing."""
    why = difference_in_making()
    ours = [] if why else read_rows(ROWS)
    if not why and len(ours) != KEPT:
        why = f"{ROWS}: has {len(ours):,} rows, and {REPORT} speaks of {KEPT:,}"
    if why:
        raise UserError(f"{why}; run `make repro PROFILE=a40_published` first")
    revision, theirs = published_rows()
    found = compare_rows(ours, theirs)
    write_json(COMPARISON, {"source": SUBSET, "revision": revision, "subset_sha256": sha256_file(ROWS), **found})
    return [*sentences(found), f"kept in {COMPARISON}"]


def main() -> None:
    say(*compare())


if __name__ == "__main__":
    run_tool("compare-published", main)
