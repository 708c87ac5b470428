"""The published run's curve and rows, as things to compare with."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hermes.artifacts import sha256_file
from hermes.console import UserError
from hermes.pages import published_run
from hermes.params import read_yaml
from tools import compare_published, repro

ROOT = Path(__file__).resolve().parents[2]


def test_the_curve_has_the_published_steps_and_mean() -> None:
    assert len(published_run.LOSSES) == 62
    assert sum(published_run.LOSSES) / 62 == pytest.approx(0.5374, abs=1e-4)


def test_a_run_is_compared_over_the_steps_that_both_have() -> None:
    found = published_run.curve_difference([0.6931, 0.5931, 0.7930])
    assert found == pytest.approx(
        {"steps": 3, "mean": 0.6930667, "published_mean": 0.6930667, "mean_absolute": 0.0666667}, abs=1e-6
    )


ROWS = [("q1", "a", "b"), ("q2", "a", "b"), ("q2", "a", "b"), ("q3", "a", "b")]


def test_equal_tables_are_told_as_such() -> None:
    found = compare_published.compare_rows(ROWS, ROWS)
    assert found["first_difference"] is None
    assert compare_published.sentences(found) == ["4 rows here, 4 published, 4 the same; no row differs in its place"]


def test_rows_that_differ_are_named_and_repeated_ones_counted() -> None:
    theirs = [ROWS[0], ROWS[1], ROWS[3], ("q4", "a", "b")]
    found = compare_published.compare_rows(ROWS, theirs)
    assert compare_published.sentences(found) == [
        "4 rows here, 4 published, 3 the same; the first row that differs is 2",
        "only here: 'q2'",
        "only published: 'q4'",
    ]
    assert compare_published.compare_rows(ROWS[:2], ROWS)["first_difference"] == 2


def a_run(kept: int = 4, source: str = published_run.DATA, **removed: int) -> None:
    """What the last run left that the comparison looks at."""
    for path in (compare_published.MANIFEST, compare_published.REPORT, compare_published.ROWS):
        path.parent.mkdir(parents=True, exist_ok=True)
    compare_published.MANIFEST.write_text(json.dumps({"source": source}))
    report = {"train": {"read": kept + sum(removed.values()), "kept": kept, "removed": removed}}
    compare_published.REPORT.write_text(json.dumps(report))
    rows = [dict(zip(compare_published.COLUMNS, row, strict=True)) for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), compare_published.ROWS)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An empty folder, and in place of the Hub three of the four rows; says whether they were asked for."""
    asked: list[bool] = []

    def rows() -> tuple[str, list[tuple[str, str, str]]]:
        asked.append(True)
        return "60bac7f" + "0" * 33, ROWS[1:]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_published, "published_rows", rows)
    monkeypatch.setattr(compare_published, "KEPT", 4)
    return asked


def test_the_comparison_is_kept_with_the_hash_of_the_rows(
    no_hub: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(below_top_k=6283)
    compare_published.main()
    assert json.loads(compare_published.COMPARISON.read_text()) == {
        "source": compare_published.SUBSET,
        "revision": "60bac7f" + "0" * 33,
        "subset_sha256": sha256_file(compare_published.ROWS),
        "rows": 4,
        "published_rows": 3,
        "common": 3,
        "first_difference": 0,
        "only_here": ["q1"],
        "only_published": [],
    }
    assert capsys.readouterr().out.splitlines() == [
        "4 rows here, 3 published, 3 the same; the first row that differs is 0",
        "only here: 'q1'",
        "kept in reports/compare-published.json",
    ]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            {"exact_duplicate": 1, "near_duplicate": 2, "below_top_k": 9},
            "also removed pairs by exact_duplicate, near_duplicate; the published subset is the top 4",
        ),
        ({"malformed_missing_value": 1}, "also removed pairs by malformed_missing_value"),
        ({"kept": 2100}, "the last run kept 2,100 pairs; the published subset has 4"),
        ({"source": "embedded"}, f"the last run's data are embedded, not {published_run.DATA}"),
    ],
)
def test_a_subset_that_was_made_otherwise_is_not_compared(
    no_hub: list[bool], run: dict[str, Any], message: str
) -> None:
    a_run(**run)
    with pytest.raises(UserError, match=rf"^.*{message}.*; run `make repro PROFILE=a40_published` first$"):
        compare_published.main()
    assert not compare_published.COMPARISON.exists()
    assert no_hub == []


def test_rows_of_another_run_than_the_report_are_not_compared(
    no_hub: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(kept=2000)
    monkeypatch.setattr(compare_published, "KEPT", 2000)
    with pytest.raises(
        UserError, match=r"^data/subset/train\.parquet: has 4 rows, and reports/subset\.json speaks of 2,000; run"
    ):
        compare_published.main()
    assert no_hub == []


def test_a_run_of_such_a_subset_is_compared_once_and_another_never(
    no_hub: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run(below_top_k=6283)
    assert repro.beside_the_published()[0].startswith("4 rows here, 3 published, 3 the same")
    assert repro.beside_the_published() == []
    assert no_hub == [True]
    a_run(source="embedded")
    assert repro.beside_the_published() == []

    def closed() -> None:
        raise UserError("no network")

    compare_published.COMPARISON.unlink()
    a_run(below_top_k=6283)
    monkeypatch.setattr(compare_published, "published_rows", closed)
    (line,) = repro.beside_the_published()
    assert line == "not compared with the published pairs: no network; make compare-published does it later"


def test_no_run_is_one_line(no_hub: list[bool]) -> None:
    with pytest.raises(UserError, match=r"^data/raw/manifest\.json: no such file"):
        compare_published.main()
    a_run()
    compare_published.ROWS.unlink()
    with pytest.raises(UserError, match=r"^data/subset/train\.parquet: no such file"):
        compare_published.main()


def test_the_profile_that_is_asked_for_makes_such_a_subset() -> None:
    profile = read_yaml(ROOT / "params.yaml")["profiles"]["a40_published"]
    assert profile["data"]["source"] == published_run.DATA
    assert profile["subset"].pop("k") == compare_published.KEPT == 2000
    assert not any(profile["subset"].values())
    assert profile["model"]["source"] == published_run.BASE
