"""A review finds what changed between two states of a repository, wherever git and DVC keep their files."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo

from hermes import params
from hermes.console import UserError
from hermes.pages import render, results
from stages import report
from tests.stages.test_report import EVIL, Page, write_reports
from tools import review


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def commit_results(beta: float, rate: float) -> str:
    """Commits the reports of a made-up run; the answers of merged are in DVC's cache, the others in git."""
    write_reports(Path(), beta=beta, rate=rate)
    report.main()
    with Repo() as repo:
        repo.add("reports/eval/merged.jsonl")
    git("add", "--all")
    git("commit", "--quiet", "--message", f"beta {beta}")
    return git("rev-parse", "HEAD")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: the tag `first` (beta 0.1), the experiment `swift-fox` (0.5), and the working tree (0.2)."""
    root = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        git("init", "--quiet", "--initial-branch", "main")
        Repo.init().close()
        first = commit_results(beta=0.1, rate=0.3)
        git("tag", "first")
        experiment = commit_results(beta=0.5, rate=0.9)
        git("update-ref", f"refs/exps/{first[:2]}/{first[2:]}/swift-fox", experiment)
        git("reset", "--quiet", "--hard", "first")
        write_reports(root, beta=0.2, rate=0.6)
        report.main()
    return root


ENVIRONMENT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in (("NAME", "t"), ("EMAIL", "t@t"))
    },
}


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path))


def expected_flips(before: str, after: str) -> tuple[int, int]:
    old, new = ([json.loads(line)["strict"] for line in text.splitlines()] for text in (before, after))
    flips = [b - a for a, b in zip(old, new, strict=True)]
    return flips.count(1), flips.count(-1)


def test_a_review_of_the_working_tree_finds_what_changed() -> None:
    old, new = (review.open_revision(name).read("reports/eval/merged.jsonl") for name in ("first", None))
    fixed, broken = expected_flips(old, new)
    lines = review.review("first")
    assert lines[0] == "first -> working tree"
    assert lines[1] == "params changed   beta: 0.1 -> 0.2"
    assert f"{fixed} fixed, {broken} broken" in lines[3]
    page = Page((review.OUTPUT / "review.html").read_text())
    assert f"Fixed: fail before, pass now ({fixed})" in page.text
    assert f"Broken: pass before, fail now ({broken})" in page.text


def test_the_gain_pairs_the_questions_that_were_trained_on_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def spy(rows: list[tuple[str, str, float, float]]) -> dict[str, float]:
        asked[rows[0][0]] = rows
        return {"points": 1.0, "low": 0.5, "high": 1.5, "n": len(rows)}

    monkeypatch.setattr(review, "paired_gain", spy)
    lines = review.review("first", "swift-fox")
    assert lines[2] == "strict accuracy  +1.0 points, 95% interval +0.5 to +1.5, n = 40"
    seen, unseen = asked.values()
    assert {kind for kind, *_ in seen} == {"lowercase", "bullets", "json", "end_with"}
    assert {kind for kind, *_ in unseen} == {"brackets", "avoid_word"}
    assert sum(after - before for *_, before, after in seen) > 10


def test_an_experiment_is_found_by_its_name_and_a_commit_by_its_hash() -> None:
    by_name = review.open_revision("swift-fox")
    assert by_name.commit == git("for-each-ref", "--format", "%(objectname)", "refs/exps")
    by_hash = review.open_revision(by_name.commit[:10])
    assert review.load_run(by_name).params["beta"] == review.load_run(by_hash).params["beta"] == 0.5


def test_a_revision_is_read_without_touching_the_working_tree() -> None:
    def state() -> tuple[str, str, bytes]:
        changed = git("status", "--porcelain", "--", ":!reports/review")
        return changed, git("rev-parse", "HEAD"), Path("reports/metrics.json").read_bytes()

    before = state()
    review.review("first", "swift-fox")
    assert state() == before


def test_metrics_stand_side_by_side_with_their_difference() -> None:
    rows = review.side_by_side({"a": 1.0, "gone": 2.0}, {"a": 1.5, "new": 3.0})
    assert [(row.key, row.before, row.after, row.difference) for row in rows] == [
        ("a", 1.0, 1.5, 0.5),
        ("gone", 2.0, None, None),
        ("new", None, 3.0, None),
    ]


def test_only_params_that_differ_are_changes_and_a_null_is_not_an_absence() -> None:
    found = review.changes({"same": 1, "gone": None, "other": "x"}, {"same": 1, "other": "y", "new": []})
    assert [(change.key, change.before, change.after) for change in found] == [
        ("gone", None, review.ABSENT),
        ("other", "x", "y"),
        ("new", review.ABSENT, []),
    ]


def answer(strict: bool, text: str = "a", question: str = "q") -> results.Row:
    return {"question": question, "answer": text, "strict": strict, "kind": "json", "topic": "tea", "seen": True}


def test_answers_are_sorted_by_what_became_of_them() -> None:
    before = {"1": answer(True), "2": answer(False), **{id: answer(True) for id in "34567"}}
    after = {"1": answer(False), "2": answer(True), "3": answer(True, "b"), "4": answer(True, "b"), "5": answer(True)}
    found = review.compare_answers(before, after | {"6": answer(False, question="another")})
    assert found.broken == [(before["1"], after["1"])]
    assert found.fixed == [(before["2"], after["2"])]
    assert (found.reworded, found.same, found.unpaired) == (2, 1, 3)


def test_experiments_are_compared_in_the_order_of_their_names() -> None:
    lines = review.compare(["swift-fox", "first"])
    assert [line.split()[0] for line in lines] == ["first", "swift-fox", "read"]
    assert "beta=0.1" in lines[0]
    assert "beta=0.5" in lines[1]
    gain = json.loads(review.open_revision("swift-fox").read("reports/metrics.json"))["strict_gain"]
    assert render.points(gain["points"]) in lines[1]
    assert "train.learning_rate" not in (review.OUTPUT / "sweep.md").read_text()


def test_a_run_from_before_gains_were_kept_shows_its_scores_alone() -> None:
    run = review.Run("a", None, {}, {"preference_accuracy.merged": 0.75, "suites.nous.merged": 0.5}, {}, {})
    assert review._headline(run) == "preference 75.0%"
    assert [name for name, _, _ in review.scored([run])] == ["preference", "nous"]


def test_without_instructions_experiments_are_compared_by_preferences_and_suites() -> None:
    gain = {"points": 2.5, "low": 1.25, "high": 3.75, "n": 700}
    metrics = {"preference_accuracy": {"merged": 0.75}, "preference_gain": gain, "suites": {"nous": {"merged": 0.5}}}
    metrics["suites_gain"] = {"nous": gain | {"low": -1.25}}
    run = review.Run("a", None, {}, params.flatten(metrics), {}, {})
    assert review._headline(run) == "preference 75.0%, +2.5 points, 95% interval +1.2 to +3.8, n = 700"
    other = review.Run("b", None, {}, {}, {}, {})
    assert review._headline(other) == "no score"
    runs = [run, other]
    content = {"runs": runs, "differing": [], "spread": {}, "scored": review.scored(runs), "curves": Path("c.png")}
    render.render("sweep.md.j2", Path("sweep.md"), content)
    lines = Path("sweep.md").read_text().split("\n")
    assert lines[2].endswith(" Other columns are the averages of benchmark suites.")
    assert "| experiment | preference | gain | n | nous | gain | n | perplexity |" in lines
    row = "| a | 75.0% | **+2.5** (+1.2 to +3.8) | 700 | 50.0% | +2.5 (−1.2 to +3.8) | 700 | – |"
    assert row in lines
    assert "| b | – | – | – | – | – | – | – |" in lines


def test_the_spread_of_a_metric_is_over_all_experiments() -> None:
    review.compare(["swift-fox", "first"])
    spread = json.loads((review.OUTPUT / "sweep.json").read_text())["strict_accuracy.merged"]
    runs = {name: review.load_run(review.open_revision(name)) for name in ("first", "swift-fox")}
    assert spread["runs"] == {name: run.metrics["strict_accuracy.merged"] for name, run in runs.items()}
    low, high = sorted(spread["runs"].values())
    assert (spread["min"], spread["median"], spread["max"]) == (low, (low + high) / 2, high)
    assert low < high
    assert "strict_accuracy.merged" in (review.OUTPUT / "sweep.md").read_text()


def test_the_pages_need_no_network_and_show_markup_as_text() -> None:
    review.review("first", "swift-fox")
    review.compare(["swift-fox", "first"])
    for name in ("review", "sweep"):
        page = Page((review.OUTPUT / f"{name}.html").read_text())
        assert "script" not in page.tags
        assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
        assert page.tags.count("img") == 1
    assert EVIL.splitlines()[0] in Page((review.OUTPUT / "review.html").read_text()).text


def test_a_review_that_is_posted_as_a_comment_mentions_nobody() -> None:
    review.review("first", "swift-fox")
    text, page = (review.OUTPUT / "review.md").read_text(), Page((review.OUTPUT / "review.html").read_text())
    assert re.search(r"@&#8203;merged on \w+\.", text)
    assert not re.search(r"@\w", text)
    assert re.search(r"@\u200bmerged on \w+\.", page.text)


def test_the_same_revisions_give_the_same_pages() -> None:
    def written() -> list[bytes]:
        review.review("first", "swift-fox")
        return [(review.OUTPUT / f"review.{ending}").read_bytes() for ending in ("html", "md", "png")]

    assert written() == written()


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "",
        " ",
        "-h",
        "--output=x",
        "HEAD^{tree}",
        "main:params.yaml",
        "main..HEAD",
        "$(touch x)",
        "a\x1b[31mb",
    ],
)
def test_what_is_no_revision_is_an_error_in_one_line(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^`.*` is no commit, branch, tag or experiment here .*`dvc exp show`"
    ) as error:
        review.open_revision(name)
    assert str(error.value).isprintable()


def test_a_revision_without_reports_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    Repo.init().close()
    Path("params.yaml").write_text("profile: cpu\nprofiles:\n  cpu: {}\n")
    git("add", "--all")
    git("commit", "--quiet", "--message", "empty")
    with pytest.raises(UserError, match=r"^`HEAD` has no reports/metrics.json; run `dvc repro` there and commit"):
        review.compare(["HEAD"])
    with pytest.raises(UserError, match=r"^`working tree` has no reports/metrics.json; run `dvc repro`$"):
        review.load_run(review.open_revision(None))


def test_answers_missing_from_the_cache_are_an_error_and_not_a_trace(repository: Path) -> None:
    cache, hidden = repository / ".dvc" / "cache", repository / ".dvc" / "hidden"
    cache.rename(hidden)
    try:
        with pytest.raises(UserError, match=r"^`first` has no reports/eval/merged.jsonl; .*`dvc pull`$"):
            review.review("first", "swift-fox")
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        hidden.rename(cache)
