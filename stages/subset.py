"""Stage subset: data/raw -> data/subset, the top k pairs by `delta_score`, and reports/subset.json.

Pairs are removed by these rules, in this order, and each removal is counted under its rule:

    an empty question or answer
    answers that are identical
    a training question that is also asked in an evaluation split
    a training pair that repeats a question of a benchmark suite of `data.decontaminate` (hermes/data/decontamination.py)
    an exact duplicate of a better pair of its split
    a near duplicate of a better training pair: Jaccard similarity of the word 5-grams of question and chosen answer, by MinHash

A question is what was said before it, too: the same words after another conversation are another question. The better of two training
pairs has the larger `delta_score`; of equal ones, and in splits without scores, it is the one that comes first in the raw file.

Of the rest of the training pairs the k best are kept, all where k is null. The report states the value of the cut. Rows keep their raw
order, and other columns than these are carried along.

A malformed row (not of its source's layout, which fetch_data found and data/raw/misfits.json says; without a value; with a score
that is no number) stops the stage. With `drop_malformed` such rows are removed before all others and counted by kind, and the report
gives the numbers of the first few of each.

The raw file is read in batches twice: first only to decide (a few numbers a row are held), then to copy the rows that
stay.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hermes import params
from hermes.artifacts import check_together, complete_file, complete_folder, open_parquet, write_json, write_manifest
from hermes.console import UserError, progress
from hermes.data.decontamination import FILE, Questions
from hermes.data.misfits import UNDECIDED, Misfit, check_turns, read_misfits
from hermes.run import run_stage
from hermes.settings.subset import SubsetSettings

RAW, OUTPUT, REPORT = Path("data/raw"), Path("data/subset"), Path("reports/subset.json")
SPLITS = ("test", "validation", "train")  # held-out first: training rows are compared with them
COLUMNS = ["context", "question", "chosen", "rejected", "delta_score", "mixed_from"]
OPTIONAL = {"context", "delta_score", "mixed_from"}
BATCH = 1024
SHOWN = 5  # malformed rows of a kind whose numbers the report gives
HASHES, BANDS = 64, 16


class Params(params.Params):
    """Parameters of subset."""

    subset: SubsetSettings


class Candidate(NamedTuple):
    """A pair that no rule about it alone removes.

    Attributes:
        number: of its row.
        score: its `delta_score`, 0 where the split has none.
        digest: of its normalized texts.
        signature: for near duplicates (`minhash`); None where they are not looked for.
        source: that it is of; None where there is only one.
    """

    number: int
    score: float
    digest: bytes
    signature: np.ndarray | None
    source: str | None


def normalize(text: str) -> str:
    """A text in lowercase with single spaces, so that layout does not hide a repetition."""
    return " ".join(text.lower().split())


def digest(*texts: str) -> bytes:
    """A 16-byte hash of normalized texts."""
    return hashlib.blake2b("\0".join(map(normalize, texts)).encode(), digest_size=16).digest()


def minhash(text: str) -> np.ndarray:
    """The MinHash signature, (64,) uint64, of a text's word 5-grams (Broder 1997); of the whole text where it has fewer words."""
    found = re.findall(r"\w+", text.lower()) or [normalize(text)]  # a text of emoji alone has no words
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


def said_before(row: dict[str, Any]) -> list[str]:
    """The texts of the turns before the question, each behind the role that said it."""
    return [part for turn in row.get("context") or () for part in (turn["role"], turn["content"])]


def texts_of(row: dict[str, Any]) -> tuple[str, list[str]]:
    """The question of a pair, and all else that is said in it."""
    return row["question"], [*said_before(row), row["chosen"], row["rejected"]]


def reason_to_remove(row: dict[str, Any], settings: SubsetSettings, held_out: set[bytes], is_train: bool) -> str | None:
    """The first of the rules about one pair alone that removes it, or None; remembers the question of a held-out one."""
    question, chosen, rejected = row["question"], row["chosen"], row["rejected"]
    if settings.drop_empty and not (question.strip() and chosen.strip() and rejected.strip()):
        return "empty_answer"
    if settings.drop_identical and normalize(chosen) == normalize(rejected):
        return "identical_answers"
    asked = digest(*said_before(row), question)
    if is_train and settings.drop_evaluation_leaks and asked in held_out:
        return "leaks_from_evaluation"
    if not is_train:
        held_out.add(asked)
    return None


def without_repetitions(
    candidates: Iterable[Candidate], settings: SubsetSettings, removed: dict[str, int]
) -> list[Candidate]:
    """The candidates, the best first, but those that repeat a better one, which are counted as removed."""
    kept = []
    seen: set[bytes] = set()
    bands: dict[tuple[int, bytes], list[np.ndarray]] = {}
    for candidate in candidates:
        reason, similarity = None, settings.near_duplicate_similarity
        if settings.drop_exact_duplicates and candidate.digest in seen:
            reason = "exact_duplicate"
        elif candidate.signature is not None and is_near_duplicate(candidate.signature, bands, similarity or 1.0):
            reason = "near_duplicate"
        seen.add(candidate.digest)
        if reason:
            removed[reason] = removed.get(reason, 0) + 1
        else:
            kept.append(candidate)
    return kept


def misfit_of(row: dict[str, Any]) -> Misfit | None:
    """Why a row cannot be a pair."""
    if empty := [name for name, value in row.items() if value is None and name != "context"]:
        return Misfit("missing_value", f"`{empty[0]}` is empty")
    try:
        check_turns([*(row.get("context") or ()), {"role": "user", "content": ""}])
    except Misfit as misfit:
        return misfit
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
        columns = [name for name in COLUMNS if name not in OPTIONAL or name in schema.names]
        if ranked and "delta_score" not in columns:
            raise UserError(
                f"{path}: has no `delta_score` to rank by; set `subset.k: null`, or name its column in `data.columns.score`"
            )
        for name in columns:
            if name not in schema.names:
                raise UserError(f"{path}: column `{name}` is missing; found {', '.join(schema.names)}")
            kind = schema.field(name).type
            expected, fits = {
                "delta_score": ("numbers", pa.types.is_floating(kind) or pa.types.is_integer(kind)),
                "context": ("a list of messages with role and content", pa.types.is_list(kind)),
            }.get(name, ("text", pa.types.is_string(kind) or pa.types.is_large_string(kind)))
            if not fits:
                raise UserError(f"{path}: column `{name}` holds {kind}; expected {expected}")
        number = 0
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                yield number, row, known.get(number) or misfit_of(row)
                number += 1
    if not number:
        raise UserError(f"{path}: has no rows")


def decide(
    path: Path, settings: SubsetSettings, held_out: set[bytes], is_train: bool, suites: Questions | None = None
) -> tuple[list[int], dict[str, Any]]:
    """The numbers of the rows to keep, ascending, and the counts for the report.

    Args:
        path: of the split.
        settings: the rules.
        held_out: the questions of the splits before.
        is_train: whether it is the training split, which is ranked and kept free of held-out questions.
        suites: whose questions the training split may not repeat.

    Raises:
        UserError: a row is malformed while `drop_malformed` is off, or fewer rows are usable than `k`, or none.
    """
    removed: dict[str, int] = {}
    malformed: dict[str, list[int]] = {}
    repeating: list[tuple[int, str]] = []
    candidates: list[Candidate] = []
    read = 0
    ranked = is_train and settings.k is not None
    for number, row, misfit in progress(read_rows(path, ranked), path.stem, unit="row"):
        read = number + 1
        if misfit and misfit.kind not in UNDECIDED and not settings.drop_malformed:
            raise UserError(
                f"{path}, row {number}: {misfit}; mend it or `data.format`, or leave such rows out with "
                "`subset.drop_malformed: true`"
            )
        decided = not misfit or misfit.kind not in UNDECIDED
        if misfit and decided:
            malformed.setdefault(misfit.kind, []).append(number)
        reason = (
            ("malformed_" * decided + misfit.kind) if misfit else reason_to_remove(row, settings, held_out, is_train)
        )
        if not reason and suites and (found := suites.repeated_by(*texts_of(row))):
            reason = f"repeats_{found[0]}"
            repeating.append((number, found[1]))
        if reason:
            removed[reason] = removed.get(reason, 0) + 1
            continue
        before, question = said_before(row), row["question"]
        near = is_train and settings.near_duplicate_similarity is not None
        candidates.append(
            Candidate(
                number,
                row.get("delta_score", 0.0),
                digest(*before, question, row["chosen"], row["rejected"]),
                minhash(" ".join([*before, question, row["chosen"]])) if near else None,
                row.get("mixed_from"),
            )
        )
    if is_train:
        candidates.sort(key=lambda candidate: (-candidate.score, candidate.number))
    kept, cut = without_repetitions(candidates, settings, removed), None
    if not kept:
        rules = ", ".join(f"{count} {rule}" for rule, count in sorted(removed.items()))
        raise UserError(f"{path}: none of its {read} pairs is left ({rules}); see `subset` in params.yaml")
    if is_train and settings.k is not None:
        if settings.k > len(kept):
            raise UserError(
                f"params.yaml: `subset.k` asks for {settings.k} rows; {path} has {len(kept)} usable of {read}"
            )
        if len(kept) > settings.k:
            removed["below_top_k"] = len(kept) - settings.k
        value = kept[settings.k - 1].score
        tied = [candidate.score == value for candidate in kept]
        kept = kept[: settings.k]
        cut = {"delta_score": value, "tied_at_cut": sum(tied), "tied_kept": sum(tied[: settings.k])}
    if not is_train and settings.held_out_k is not None and settings.held_out_k < len(kept):
        removed["beyond_held_out_k"] = len(kept) - settings.held_out_k
        kept = [kept[i * len(kept) // settings.held_out_k] for i in range(settings.held_out_k)]
    scores = [candidate.score for candidate in kept]
    summary: dict[str, Any] = {
        "read": read,
        "removed": removed,
        "kept": len(kept),
        "cut": cut,
        "delta_score": {"min": min(scores), "mean": round(math.fsum(scores) / len(scores), 6), "max": max(scores)}
        if "delta_score" in row
        else None,
    }
    if "mixed_from" in row:
        summary["sources"] = dict(sorted(Counter(str(candidate.source) for candidate in kept).items()))
    if repeating:
        summary["repeating_rows"] = [{"row": number, "task": task} for number, task in repeating[:SHOWN]]
    if malformed:
        summary["malformed_rows"] = {kind: numbers[:SHOWN] for kind, numbers in sorted(malformed.items())}
    return sorted(candidate.number for candidate in kept), summary


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
    made_from = check_together(RAW)
    held_out: set[bytes] = set()
    report: dict[str, Any] = {}
    suites = Questions(RAW / FILE) if (RAW / FILE).is_file() else None
    with complete_folder(OUTPUT) as target:
        for split in SPLITS:
            source = RAW / f"{split}.parquet"
            if source.is_file():
                is_train = split == "train"
                kept, report[split] = decide(source, settings, held_out, is_train, suites if is_train else None)
                copy_rows(source, target / source.name, kept)
        if "train" not in report:
            raise UserError(f"{RAW}: has no train.parquet; run `dvc repro fetch_data`")
        write_manifest(target, made_from=made_from)
    write_json(REPORT, report)


if __name__ == "__main__":
    run_stage("subset", main)
