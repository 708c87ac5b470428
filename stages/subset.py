"""Stage subset: data/raw -> data/subset, the top k pairs by `delta_score`, and reports/subset.json.

Pairs are removed by these rules, in this order, and each removal is counted under its rule:

    an empty question or answer
    answers that are identical
    a training question that is also asked in an evaluation split
    an exact duplicate of an earlier pair of its split
    a near duplicate of an earlier training pair: Jaccard similarity of the word 5-grams of question and chosen answer, by MinHash

Of the rest of the training pairs the k best by `delta_score` are kept, all where k is null. Ties at the cut go to the row that comes
first in the raw file; the report states the value of the cut. Rows keep their raw order, and other columns than the four are carried
along.

A malformed row (not of its source's layout, which fetch_data found and data/raw/misfits.json says; without a value; with a score
that is no number) stops the stage. With `drop_malformed` such rows are removed before all others and counted by kind, and the report
gives the numbers of the first few of each.

The raw file is read in batches twice: first only to decide (a few numbers a row are held), then to copy the rows that
stay.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hermes import params
from hermes.artifacts import complete_file, complete_folder, open_parquet, write_json
from hermes.console import UserError, progress
from hermes.data.misfits import Misfit, read_misfits
from hermes.run import run_stage
from hermes.settings.subset import SubsetSettings

RAW, OUTPUT, REPORT = Path("data/raw"), Path("data/subset"), Path("reports/subset.json")
SPLITS = ("test", "validation", "train")  # held-out first: training rows are compared with them
COLUMNS = ["question", "chosen", "rejected", "delta_score"]
BATCH = 1024
SHOWN = 5  # malformed rows of a kind whose numbers the report gives
HASHES, BANDS = 64, 16


class Params(params.Params):
    """Parameters of subset."""

    subset: SubsetSettings


@dataclass
class Seen:
    """What has been read so far, to find repetitions: hashes of a split's pairs and of held-out questions, and MinHash bands."""

    pairs: set[bytes] = field(default_factory=set)
    held_out: set[bytes] = field(default_factory=set)
    bands: dict[tuple[int, bytes], list[np.ndarray]] = field(default_factory=dict)


def normalize(text: str) -> str:
    """A text in lowercase with single spaces, so that layout does not hide a repetition."""
    return " ".join(text.lower().split())


def digest(*texts: str) -> bytes:
    """A 16-byte hash of normalized texts."""
    return hashlib.blake2b("\0".join(map(normalize, texts)).encode(), digest_size=16).digest()


def minhash(text: str) -> np.ndarray:
    """The MinHash signature, (64,) uint64, of a text's word 5-grams (Broder 1997); of the whole text where it has fewer words."""
    found = re.findall(r"\w+", text.lower())
    grams = {" ".join(found[i : i + 5]) for i in range(max(1, len(found) - 4))}
    digests = [hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in sorted(grams)]
    values = np.array([int.from_bytes(value, "big") for value in digests], dtype=np.uint64)
    random = np.random.default_rng(0)
    a = random.integers(0, 1 << 63, size=(HASHES, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    b = random.integers(0, 1 << 64, size=(HASHES, 1), dtype=np.uint64)
    return ((a * values + b) >> np.uint64(32)).min(axis=1)  # multiply-shift hashing, modulo 2^64


def is_near_duplicate(
    signature: np.ndarray, bands: dict[tuple[int, bytes], list[np.ndarray]], similarity: float
) -> bool:
    """Whether an earlier signature that shares a band has at least this estimated Jaccard similarity; adds the signature."""
    keys = [(band, part.tobytes()) for band, part in enumerate(np.split(signature, BANDS))]
    found = any(np.mean(signature == other) >= similarity for key in keys for other in bands.get(key, ()))
    if not found:
        for key in keys:
            bands.setdefault(key, []).append(signature)
    return found


def reason_to_remove(row: dict[str, Any], settings: SubsetSettings, seen: Seen, is_train: bool) -> str | None:
    """The first rule that removes a pair, or None; remembers the pair (module docstring: the order of the rules)."""
    question, chosen, rejected = row["question"], row["chosen"], row["rejected"]
    if settings.drop_empty and not (question.strip() and chosen.strip() and rejected.strip()):
        return "empty_answer"
    if settings.drop_identical and normalize(chosen) == normalize(rejected):
        return "identical_answers"
    pair, asked = digest(question, chosen, rejected), digest(question)
    if is_train and settings.drop_evaluation_leaks and asked in seen.held_out:
        return "leaks_from_evaluation"
    if not is_train:
        seen.held_out.add(asked)
    if settings.drop_exact_duplicates and pair in seen.pairs:
        return "exact_duplicate"
    seen.pairs.add(pair)
    similarity = settings.near_duplicate_similarity
    if (
        is_train
        and similarity is not None
        and is_near_duplicate(minhash(f"{question} {chosen}"), seen.bands, similarity)
    ):
        return "near_duplicate"
    return None


def misfit_of(row: dict[str, Any]) -> Misfit | None:
    """Why a row cannot be a pair."""
    if empty := [name for name, value in row.items() if value is None]:
        return Misfit("missing_value", f"`{empty[0]}` is empty")
    if not math.isfinite(row.get("delta_score", 0.0)):
        return Misfit("no_score", f"delta_score is {row['delta_score']}; expected a finite number")
    return None


def read_rows(path: Path, ranked: bool) -> Iterator[tuple[int, dict[str, Any], Misfit | None]]:
    """The numbered rows of a raw split and what is wrong with each; only a batch of them is in memory.

    Only a split that is `ranked` needs a `delta_score`.

    Raises:
        UserError: a column is missing or of another type.
    """
    known = read_misfits(path)
    with open_parquet(path) as file:
        schema = file.schema_arrow
        columns = [name for name in COLUMNS if name != "delta_score" or name in schema.names]
        if ranked and "delta_score" not in columns:
            raise UserError(
                f"{path}: has no `delta_score` to rank by; set `subset.k: null`, or name its column in `data.columns.score`"
            )
        for name in columns:
            if name not in schema.names:
                raise UserError(f"{path}: column `{name}` is missing; found {', '.join(schema.names)}")
            kind = schema.field(name).type
            fits = (
                pa.types.is_floating(kind) or pa.types.is_integer(kind)
                if name == "delta_score"
                else pa.types.is_string(kind) or pa.types.is_large_string(kind)
            )
            if not fits:
                raise UserError(
                    f"{path}: column `{name}` holds {kind}; expected {'numbers' if name == 'delta_score' else 'text'}"
                )
        number = 0
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                yield number, row, known.get(number) or misfit_of(row)
                number += 1
    if not number:
        raise UserError(f"{path}: has no rows")


def decide(path: Path, settings: SubsetSettings, seen: Seen, is_train: bool) -> tuple[list[int], dict[str, Any]]:
    """The numbers of the rows to keep, ascending, and the counts for the report.

    Raises:
        UserError: a row is malformed while `drop_malformed` is off, or fewer rows are usable than `k`, or none.
    """
    seen.pairs.clear()  # one split of the source may serve as validation and test
    removed: dict[str, int] = {}
    malformed: dict[str, list[int]] = {}
    usable: list[tuple[float, int]] = []
    read = 0
    ranked = is_train and settings.k is not None
    for number, row, misfit in progress(read_rows(path, ranked), path.stem, unit="row"):
        read = number + 1
        if misfit and not settings.drop_malformed:
            raise UserError(
                f"{path}, row {number}: {misfit}; mend it or `data.format`, or leave such rows out with "
                "`subset.drop_malformed: true`"
            )
        if misfit:
            malformed.setdefault(misfit.kind, []).append(number)
        reason = f"malformed_{misfit.kind}" if misfit else reason_to_remove(row, settings, seen, is_train)
        if reason:
            removed[reason] = removed.get(reason, 0) + 1
        else:
            usable.append((-row.get("delta_score", 0.0), number))
    if not usable:
        rules = ", ".join(f"{count} {rule}" for rule, count in sorted(removed.items()))
        raise UserError(f"{path}: none of its {read} pairs is left ({rules}); see `subset` in params.yaml")
    kept, cut = usable, None
    if is_train and settings.k is not None:
        if settings.k > len(usable):
            raise UserError(
                f"params.yaml: `subset.k` asks for {settings.k} rows; {path} has {len(usable)} usable of {read}"
            )
        kept = sorted(usable)[: settings.k]
        value = -kept[-1][0]
        cut = {
            "delta_score": value,
            "tied_at_cut": sum(-score == value for score, _ in usable),
            "tied_kept": sum(-score == value for score, _ in kept),
        }
        if len(usable) > settings.k:
            removed["below_top_k"] = len(usable) - settings.k
    if not is_train and settings.held_out_k is not None and settings.held_out_k < len(usable):
        count = settings.held_out_k  # at equal distances
        kept = [usable[i * len(usable) // count] for i in range(count)]
        removed["beyond_held_out_k"] = len(usable) - len(kept)
    scores = [-score for score, _ in kept]
    summary: dict[str, Any] = {
        "read": read,
        "removed": removed,
        "kept": len(kept),
        "cut": cut,
        "delta_score": {"min": min(scores), "mean": round(sum(scores) / len(scores), 6), "max": max(scores)}
        if "delta_score" in row
        else None,
    }
    if malformed:
        summary["malformed_rows"] = {kind: numbers[:SHOWN] for kind, numbers in sorted(malformed.items())}
    return sorted(number for _, number in kept), summary


def copy_rows(source: Path, target: Path, kept: list[int]) -> None:
    """Copies the rows with these numbers, batch by batch, to a zstd Parquet file."""
    wanted, first = np.array(kept, dtype=np.int64), 0
    with (
        open_parquet(source) as file,
        complete_file(target) as temporary,
        pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd") as writer,
    ):
        for batch in file.iter_batches(BATCH):
            inside = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            writer.write_table(pa.Table.from_batches([batch.take(pa.array(inside))]))
            first += len(batch)


def main() -> None:
    settings = params.load(Params).subset
    seen, report = Seen(), {}
    with complete_folder(OUTPUT) as target:
        for split in SPLITS:
            source = RAW / f"{split}.parquet"
            if source.is_file():
                kept, report[split] = decide(source, settings, seen, is_train=split == "train")
                copy_rows(source, target / source.name, kept)
        if "train" not in report:
            raise UserError(f"{RAW}: has no train.parquet; run `dvc repro fetch_data`")
    write_json(REPORT, report)


if __name__ == "__main__":
    run_stage("subset", main)
