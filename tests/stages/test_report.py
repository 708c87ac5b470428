"""The report: same bytes for the same inputs, nothing from the network, no markup from a model, numbers as given."""

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from hermes import params
from hermes.console import UserError
from hermes.evaluation import evidence
from hermes.evaluation.benchmarks import SUITES, summary
from hermes.pages import figures, render, results
from hermes.pages.figures import _moving_mean
from hermes.pages.published_run import BASE, SETTINGS, deviations
from stages import report

ROOT = Path(__file__).parents[2]
KINDS = {"lowercase": True, "bullets": True, "json": True, "end_with": True, "brackets": False, "avoid_word": False}
TOPICS = ("tea", "rivers", "chess", "bread", "clouds")
MODELS = {"base": 0.3, "merged": 0.55, "f16": 0.55, "Q8_0": 0.55, "gptq": 0.52, "Q4_K_M": 0.5}
FILES = {"Q4_K_M": 105_000_000, "gptq": 113_000_000, "Q8_0": 145_000_000, "f16": 271_000_000}
COMPRESSED = {"gptq"}
GENERAL = {
    "prose": {"before": 21.0, "after": 22.05, "change": 0.05, "low": 0.03, "high": 0.07, "tokens": 24_000},
    "capitals": {"before": 0.6, "after": 0.59, "points": -1.0, "low": -3.0, "high": 1.0, "n": 104},
}
EVIL = 'x</div><script>alert("1")</script> | a cell | <img src="https://example.com/x.png"> `code` *bold*\n| --- |'


def write_reports(root: Path, beta: float = 0.1, seed: int = 0, rate: float | None = None) -> None:
    """Writes every file that the report reads, made up but consistent; `rate` is how often the trained models pass."""
    (root / "params.yaml").write_text(
        f"seed: 42\nbeta: {beta}\nloss_type: sigmoid\nprofile: cpu\nwandb: {{enabled: false, project: p}}\ncollect:\n  topics: 165\n"
        "profiles:\n  cpu:\n    train:\n      learning_rate: 5e-6\n      epochs: 1\n"
        "    quantize:\n      types: [Q8_0, Q4_K_M]\n"
        "  a40:\n    train:\n      learning_rate: 1e-6\n"
    )
    stages = params.read_yaml(ROOT / "dvc.yaml")["stages"].values()
    keys = sorted({key for stage in stages for key in stage.get("params", []) if isinstance(key, str)})
    _json(root / "dvc.yaml", {"stages": {"all": {"cmd": "true", "params": keys}}})
    reports, evaluation = root / "reports", root / "data/evaluation"
    random = Random(seed)
    answers = {
        name: _answers(name, random, rate if rate is not None and name != "base" else share)
        for name, share in MODELS.items()
    }
    for name, rows in answers.items():
        _write(evaluation / f"{name}.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        _json(evaluation / f"{name}.json", _result(name, rows, random))
    pairs = [
        [
            {"topic": row["topic"], "log_likelihoods": [random.gauss(-20 + gain, 2), random.gauss(-20 - gain, 2)]}
            for row in answers["base"]
        ]
        for gain in (0, 5)
    ]
    beside = {
        "answers": evidence.answers(answers["base"], answers["merged"]),
        "margins": evidence.margins(pairs[0], pairs[1], beta),
        "general": GENERAL,
    }
    _json(evaluation / "evidence.json", beside)
    against = {"merged": "base"} | dict.fromkeys(FILES, "merged")
    _json(evaluation / "comparison.json", {n: _compare(answers[old], answers[n], old) for n, old in against.items()})
    kl = {"hf_bf16": 1e-5, "f16": 2e-6, "Q8_0": 4e-4, "gptq": 0.07, "Q4_K_M": 0.021}
    _json(
        evaluation / "divergence.json",
        {
            name: {
                "mean_kl": value,
                "low": 0.9 * value,
                "high": 1.1 * value,
                "top1_agreement": 1 - value,
                "tokens": 5000,
                "by_topic": [[topic, 1000 * value, 1000] for topic in TOPICS],
            }
            for name, value in kl.items()
        },
    )
    apart = {
        "mean_kl": 0.0031,
        "top1_agreement": 0.99,
        "tokens": 9,
        "margin_difference": 0.25,
        "preferred_alike": 0.975,
    }
    rounding = {"weights": 9, "changed": 8, "swallowed": 0.4321, "relative_error": 0.0123}
    coarse = rounding | {"swallowed": 0.0567, "relative_error": 0.0089}
    merges = {
        "bf16": apart | {"rounding": rounding},
        "nf4": apart | {"mean_kl": 0.0017, "rounding": coarse},
        "rounding": {"base": "bf16"} | rounding,
    }
    _json(evaluation / "merge.json", merges)
    _json(
        root / "models/gguf/quantize.json",
        {
            "files": {name: _file(name) for name in FILES if name not in COMPRESSED},
            "metadata": {"architecture": "llama", "eos": 2},
            "importance": {"pairs": 128, "tokens": 10_263, "matrices": 210},
        },
    )
    _json(root / "models/compressed/compress.json", {"files": {name: _folder(name) for name in COMPRESSED}})
    _json(reports / "subset.json", {split: _subset(split) for split in ("train", "validation", "test")})
    _json(reports / "data.json", {split: _tokenized(split) for split in ("train", "validation", "test")})
    _training(reports / "train", random)


def _answers(model: str, random: Random, rate: float) -> list[dict[str, Any]]:
    rows = []
    for kind, seen in KINDS.items():
        for topic in TOPICS:
            for i in range(2):
                strict = random.random() < rate
                row = {
                    "id": f"{kind}-{topic}-{i}",
                    "topic": topic,
                    "kind": kind,
                    "seen": seen,
                    "strict": strict,
                    "finished": True,
                }
                text = EVIL if kind == "json" else f"@{model} on {topic}."
                rows.append(
                    row
                    | {"question": f"Tell me about {topic} ({kind}).", "answer": text, "grade": 0.9 if strict else 0.3}
                    | {"tokens": len(text) // 3}
                )
    return rows


def _accuracy(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"accuracy": sum(row["strict"] for row in rows) / len(rows), "n": len(rows)}


def _result(name: str, rows: list[dict[str, Any]], random: Random) -> dict[str, Any]:
    by_kind = {
        kind: _accuracy([row for row in rows if row["kind"] == kind]) | {"seen": seen} for kind, seen in KINDS.items()
    }
    seen, unseen = ([row for row in rows if row["seen"] is flag] for flag in (True, False))
    return {
        "model": name,
        "strict": {"seen": _accuracy(seen), "unseen": _accuracy(unseen), "by_kind": by_kind},
        "failures": {"empty": 1, "looping": 2, "unfinished": 3},
        "preference": {"accuracy": round(random.random(), 4), "n": 300},
        "perplexity": {"value": round(7 + random.random(), 4), "tokens": 4321, "answers": 60},
    }


def _compare(before: list[dict[str, Any]], after: list[dict[str, Any]], against: str) -> dict[str, Any]:
    def gain(keep: Any) -> dict[str, float]:
        pairs = [(a["strict"], b["strict"]) for a, b in zip(before, after, strict=True) if keep(a)]
        points = 100 * sum(b - a for a, b in pairs) / len(pairs)
        return {"points": points, "low": points - 9, "high": points + 9, "n": len(pairs)}

    by_kind = {kind: gain(lambda row, kind=kind: row["kind"] == kind) for kind in KINDS}
    return {
        "against": against,
        "strict": gain(lambda row: row["seen"]),
        "unseen": gain(lambda row: not row["seen"]),
        "preference": gain(lambda row: row["seen"]),
        "by_kind": by_kind,
    }


def _file(name: str) -> dict[str, Any]:
    matrices = {"Q4_K": 100, "Q5_0": 30} if name == "Q4_K_M" else {name.upper(): 211}
    bits = FILES[name] * 8 / 134_515_008
    fallback = 30 if name == "Q4_K_M" else 0
    return {
        "bytes": FILES[name],
        "bits_per_weight": round(bits, 4),
        "tensors": 272,
        "matrices_by_type": matrices,
        "fallback": fallback,
        "weight_error": 0.0 if name == "f16" else 0.0512,
        "weight_stretch": 0.0 if name == "f16" else 0.0189,
        "sha256": "0" * 64,
        "imatrix": name == "Q4_K_M",
    }


def _folder(name: str) -> dict[str, Any]:
    return {
        "bytes": FILES[name],
        "bits_per_weight": round(FILES[name] * 8 / 134_515_008, 4),
        "group_size": 32,
        "pairs": 128,
        "tokens": 10_263,
        "sha256": {"model.safetensors": "1" * 64},
    }


def _subset(split: str) -> dict[str, Any]:
    cut = {"delta_score": 0.25, "tied_at_cut": 4, "tied_kept": 3} if split == "train" else None
    removed = {"identical_answers": 2, "below_top_k": 1098} if split == "train" else {}
    read = 3100 if split == "train" else 300
    scores = {"min": 0.25, "mean": 0.5, "max": 0.9}
    return {"read": read, "removed": removed, "kept": read - sum(removed.values()), "cut": cut, "delta_score": scores}


def _tokenized(split: str) -> dict[str, Any]:
    read = _subset(split)["kept"]
    lengths = {part: {"min": 4, "mean": 40.25, "p95": 80, "max": 96} for part in ("prompt", "chosen", "rejected")}
    dropped = {"prompt_longer_than_512": 1}
    return {
        "read": read,
        "pairs": read - 1,
        "dropped": dropped,
        "truncated": dict.fromkeys(lengths, 0) | {"chosen": 7},
        "tokens": lengths,
    }


def _training(folder: Path, random: Random) -> None:
    history, evaluation = [], []
    for step in range(1, 121):
        margin = step / 60 + random.gauss(0, 0.2)
        row = {
            "step": step,
            "loss": 0.69 / (1 + step / 60) + 0.3,
            "preference_loss": 0.69 / (1 + step / 60),
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, 0.5 + step / 200),
        }
        history.append(
            row
            | {"rewards/chosen": margin / 2, "rewards/rejected": -margin / 2, "learning_rate": 5e-6, "grad_norm": 2.5}
        )
        if step % 40 == 1:
            rewards = {"rewards/chosen": -margin / 10, "rewards/rejected": -margin}
            evaluation.append(row | rewards | {"logps/chosen": -30 - margin, "logps/rejected": -30 - 10 * margin})
    for name, rows in (("history", history), ("evaluation", evaluation)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    summary = {
        "first_loss": 0.6931,
        "last_loss": 0.23,
        "steps": 120,
        "pairs": 1999,
        "epochs": 1.0,
        "reference_difference": 1.5e-6,
        "run": "0123456789abcdef",
    }
    _json(
        folder / "summary.json",
        summary | {"validation_step": 81, "validation_loss": 0.31, "validation_accuracy": 0.87},
    )


def _json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value, sort_keys=True))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Page(HTMLParser):
    """The tags and links of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "poster", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def outputs() -> dict[str, bytes]:
    folders = (path for folder in (report.FIGURES, results.REPORTS / "eval") for path in sorted(folder.iterdir()))
    paths = [report.METRICS, report.MARKDOWN, report.HTML, results.REPORTS / "quantize.json", *folders]
    return {path.as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report, made once for the tests that only read it."""
    root = tmp_path_factory.mktemp("report")
    write_reports(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        report.main()
    return root


@pytest.fixture
def page(built: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.chdir(built)
    return Page(report.HTML.read_text())


def test_the_same_inputs_give_the_same_bytes(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    first = outputs()
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    report.main()
    assert outputs() == first


def test_the_figures_carry_no_date_and_no_version(built: Path) -> None:
    for figure in (built / "reports" / "figures").glob("*.png"):
        assert not re.search(rb"tEXt|iTXt|tIME", figure.read_bytes())


def test_the_page_needs_no_network_and_its_only_script_is_its_own(page: Page) -> None:
    assert page.tags.count("script") == 1
    assert page.tags[-1] == "script"  # behind all that is data
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert all(link.startswith(("data:image/png;base64,", "#")) or link == "provenance.md" for link in page.links)
    assert "@import" not in page.text
    assert "url(" not in page.text


def test_the_page_begins_with_the_verdict_and_what_it_may_be_due_to(built: Path, page: Page) -> None:
    found = json.loads((built / "data/evaluation/evidence.json").read_text())
    head = page.text.split("How this run differs")[0]
    gains = json.loads((built / "data/evaluation/comparison.json").read_text())["merged"]
    sides = {report.side(gains[name]) for name in ("strict", "unseen", "preference")} - {"the same"}
    found_verdict = re.search(r"The verdict: ([^.]+)\.", head)
    assert found_verdict
    word = "better in one respect and worse in another" if len(sides) == 2 else (*sides, "no difference seen")[0]
    assert found_verdict[1] == (word if word == "worse" else f"{word}, at a cost")  # prose became more surprising
    words = found["answers"]["length"]["words"]
    assert f"Answers have {render.number(words['after'])} words instead of {render.number(words['before'])}" in head
    assert "the perplexity went from 21 to 22.05 (+5.0%, 95% interval +3.0% to +7.0%, 24,000 tokens)" in head
    assert "Capitals known: 60.0% before, 59.0% after (−1.0 points, −3.0 to +1.0, n = 104)." in head
    margins = found["margins"]
    assert f"The mean margin is {render.number(margins['mean']['mean'])}" in page.text
    assert (
        "The chosen answers became less likely, too: part of the margin" in page.text
    )  # their last reward is below zero
    moved = margins["chosen"]
    assert f"the chosen answers moved by {render.difference(moved['mean'])} nats in the mean" in page.text
    assert ("The chosen answers became less likely, too." in page.text) == (moved["high"] < 0)
    assert "At a cost: prose or capitals got worse" in head


def test_gains_decide_the_verdict() -> None:
    def row(low: float, high: float) -> dict[str, Any]:
        return {"gain": {"low": low, "high": high}}

    assert report.verdict([]) is None
    assert report.verdict([row(1, 2), row(-1, 1)]) == "better"
    assert report.verdict([row(-2, -1), row(-1, 1)]) == "worse"
    assert report.verdict([row(-1, 1)]) == "no difference seen"
    assert report.verdict([row(-2, -1), row(1, 2)]) == "better in one respect and worse in another"
    assert report.verdict([row(1, 2)], lost=True) == "better, at a cost"
    assert report.verdict([row(-1, 1)], lost=True) == "no difference seen, at a cost"
    assert report.verdict([row(-2, -1)], lost=True) == "worse"


def test_prose_or_capitals_beyond_their_interval_are_a_cost() -> None:
    def general(low: float, high: float) -> dict[str, Any]:
        return {"prose": {"low": low, "high": 0.2}, "capitals": {"low": -9.0, "high": high}}

    assert not report.has_lost(None)
    assert not report.has_lost(general(-0.01, 0.5))
    assert report.has_lost(general(0.01, 0.5))
    assert report.has_lost(general(-0.01, -0.5))


def test_every_link_of_the_page_has_its_target(page: Page) -> None:
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids


def test_an_answer_with_markup_is_shown_and_not_obeyed(page: Page) -> None:
    assert '<script>alert("1")</script>' in page.text
    assert page.tags.count("img") == 4


def test_an_answer_with_markup_stays_in_its_markdown_cell(built: Path) -> None:
    html = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(
        (built / "reports" / "report.md").read_text()
    )
    rendered = Page(html)
    assert "script" not in rendered.tags
    assert 'x</div><script>alert("1")</script> | a cell |' in rendered.text
    assert "`code` *bold*" in rendered.text
    assert sorted(link for link in rendered.links if link.endswith("png")) == [
        "figures/kinds.png",
        "figures/margins.png",
        "figures/quantization.png",
        "figures/training.png",
    ]


@pytest.mark.parametrize(("found", "shown"), [(1e-5, True), (0.0, False)])
def test_rounding_is_shown_where_the_merged_model_was_asked_with_some(
    found: float, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    path = tmp_path / "data/evaluation/divergence.json"
    divergence = json.loads(path.read_text())
    divergence["hf_bf16"]["mean_kl"] = found
    _json(path, divergence)
    monkeypatch.chdir(tmp_path)
    report.main()
    text = report.MARKDOWN.read_text()
    assert ("| merged, in Transformers |" in text) == ("Rounding alone does" in text) == shown


def test_a_name_with_markup_is_shown_and_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "x' <b>\u202e[y](https://example.com) ![z](data:image/png;base64,AA) `c` | *d*\n\n# e\n\n```"
    write_reports(tmp_path)
    params = YAML(typ="safe", pure=True).load(tmp_path / "params.yaml")
    params |= {"profile": "x", "profiles": {"x": {"train": {evil: evil, "learning_rate": 5e-6}}}}
    _json(tmp_path / "params.yaml", params)
    for name in ("reports/subset", "reports/data"):
        path = tmp_path / f"{name}.json"
        found = json.loads(path.read_text())
        found["train"]["removed" if "subset" in name else "dropped"][evil] = 0 if "data" in name else 5
        found["train"]["read"] += 5 if "subset" in name else 0
        _json(path, found)
    path = tmp_path / "models/gguf/quantize.json"
    _json(path, json.loads(path.read_text()) | {"metadata": {evil: evil}})
    monkeypatch.chdir(tmp_path)
    report.main()
    text, page = report.MARKDOWN.read_text(), Page(report.HTML.read_text())
    assert "\u202e" not in text + page.text
    assert page.tags.count("img") == 4
    assert page.tags.count("h1") == 1
    assert not {"b", "del"} & set(page.tags)
    assert all(link.startswith(("data:image/png;base64,", "#")) or link == "provenance.md" for link in page.links)
    assert "![z](data:image/png;base64,AA) `c` | *d* # e ```" in page.text
    rendered = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))
    assert [link for link in rendered.links if not link.startswith("figures/")] == ["provenance.md"]
    assert "b" not in rendered.tags


@pytest.mark.parametrize(
    "text",
    [
        "# a\n## b",
        "- a\n- b\n\n1. c\n2) d",
        "a\n---\nb\n===",
        "```\ncode\n```",
        "    a\n        b\n\tc",
        "> q\n+ r\n* s",
        "a | b\n:-: | :-:\nc | d",
        "a\nb\\\nc  \nd",
        "[a]: https://a.b\n\n[a]\n<https://a.b> https://a.b www.a.b",
        "&amp; &#42; <!-- x --> <b>c</b>\n~~~\n~~d~~",
    ],
)
def test_every_line_of_an_answer_is_text(text: str) -> None:
    page = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(render.lines(text, "> ")))
    assert set(page.tags) == {"blockquote", "p"} | ({"br"} & set(page.tags))
    shown = [" ".join(line.split()) for line in page.text.replace("\xa0", " ").splitlines() if line.strip()]
    assert shown == [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    for line in text.expandtabs(4).splitlines():
        if line.strip():
            assert line.rstrip() in page.text.replace("\xa0", " ")


@pytest.mark.parametrize(
    "text", ["@octocat", "ask @org/team, (@a-b)", "*@you*", "&#64;you", "\\@you", "me@example.com", "@@x"]
)
def test_an_answer_mentions_nobody_on_github(text: str) -> None:
    for shown in (render.lines(text, "> "), render.markdown(text)):
        page = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(shown))
        assert not re.search(r"@\w", page.text)  # GitHub looks for names in what is rendered
        assert page.text.replace("\u200b", "").strip() == text


def test_few_questions_make_a_first_look_which_names_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_line() -> str:
        report.main()
        return report.MARKDOWN.read_text().splitlines()[2]

    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert first_line().startswith("**A first look: 40 questions are too few to conclude anything.**")
    assert "18 points wide" in first_line()
    assert "make repro PROFILE" not in first_line()
    text = Path("params.yaml").read_text().replace("profile: cpu", "profile: other").replace("  cpu:\n", "  other:\n")
    Path("params.yaml").write_text(text.replace("    train:\n", "    data: {source: embedded}\n    train:\n", 1))
    assert "The whole run is `make repro PROFILE=cpu`." in first_line()
    path = Path("data/evaluation/comparison.json")
    comparison = json.loads(path.read_text())
    comparison["merged"]["strict"]["n"] = 200
    _json(path, comparison)
    assert "first look" not in first_line()


def test_settings_that_the_published_run_does_not_share_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    report.main()
    assert "| `train.learning_rate` | 5e-06 | 5e-05 |" in report.MARKDOWN.read_text()
    assert "| `train.epochs` |" not in report.MARKDOWN.read_text().split("## Parameters")[0]


def test_the_published_settings_are_those_of_its_profile() -> None:
    tree = YAML(typ="safe", pure=True).load(Path(__file__).parents[2] / "params.yaml")
    shown = params.flatten(results.shown_params(tree, "a40_published"))
    assert {key: shown[key] for key in SETTINGS} == {key: value for key, (value, _) in SETTINGS.items()}
    assert deviations(shown) == []


@pytest.mark.parametrize(("first", "wanted"), [(math.log(2), True), (1.0, False)])
def test_the_loss_of_an_untrained_policy_is_drawn_where_the_run_begins_there(first: float, wanted: bool) -> None:
    history = {key: [0.0, 1.0] for key in ("rewards/margins", "grad_norm", "learning_rate")}
    figure = figures.training_curves({**history, "step": [1, 2], "preference_loss": [first, 0.5]}, {})
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert ("ln 2, before training" in labels) is wanted


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (
            "reports/train/history.csv",
            lambda text: text[: len(text) // 2],
            r"not what a stage wrote \(a column is there twice, or a row",
        ),
        ("reports/train/history.csv", lambda text: "", "not the 120 steps"),
        ("reports/train/history.csv", lambda text: text.replace("\n1,", "\none,"), "not what a stage wrote"),
        ("data/evaluation/merged.jsonl", lambda text: text[:-9], "not what a stage wrote"),
        ("data/evaluation/comparison.json", lambda text: "[1]", "not what a stage wrote"),
    ],
)
def test_a_damaged_input_is_named_in_one_line(
    file: str, damage: Callable[[str], str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    (tmp_path / file).write_text(damage((tmp_path / file).read_text()))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{file}: {message}.*run `dvc repro"):
        report.main()


def test_control_characters_of_an_answer_are_replaced() -> None:
    assert render.clean("a\x00b\u202ec\nd") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\nd"


def test_the_metrics_are_those_of_the_inputs(built: Path) -> None:
    def read(name: str) -> Any:
        return json.loads((built / "reports" / name).read_text())

    found, gain, divergence = read("metrics.json"), read("eval/comparison.json")["merged"], read("eval/divergence.json")
    results = {name: read(f"eval/{name}.json") for name in MODELS}
    assert found["strict_accuracy"] == {name: result["strict"]["seen"]["accuracy"] for name, result in results.items()}
    assert found["strict_gain"] == gain["strict"]
    assert found["unseen_gain"] == {"points": gain["unseen"]["points"]}
    assert found["preference_accuracy"] == {
        name: results[name]["preference"]["accuracy"] for name in ("base", "merged")
    }
    assert found["perplexity"] == {name: results[name]["perplexity"]["value"] for name in ("base", "merged")}
    assert found["quantized_kl"] == {name: divergence[name]["mean_kl"] for name in FILES}
    assert found["train"] == {"first_loss": 0.6931}


def test_fixed_and_broken_questions_are_counted_and_chosen_by_id(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    inputs = results.read_inputs()
    old, new = (
        [json.loads(line) for line in Path(f"reports/eval/{name}.jsonl").read_text().splitlines()]
        for name in ("base", "merged")
    )
    ids = {
        kind: sorted(
            a["id"] for a, b in zip(old, new, strict=True) if a["kind"] == kind and b["strict"] and not a["strict"]
        )
        for kind in KINDS
    }
    assert {row["kind"]: row["fixed"] for row in report.kind_gains(inputs)} == {
        kind: len(found) for kind, found in ids.items()
    }
    fixed, broken = report.samples(inputs, list(KINDS))
    assert [sample["question"] for sample in fixed] == [
        f"Tell me about {ids[kind][0].split('-')[1]} ({kind})." for kind in KINDS if ids[kind]
    ]
    assert all(not sample["answers"]["base"]["strict"] and sample["answers"]["merged"]["strict"] for sample in fixed)
    assert all(sample["answers"]["base"]["strict"] and not sample["answers"]["merged"]["strict"] for sample in broken)
    assert broken
    assert list(fixed[0]["answers"]) == ["base", "merged", "Q4_K_M"]


def test_models_and_files_are_ordered_by_size(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built)
    inputs = results.read_inputs()
    assert list(inputs.results) == ["base", "merged", "f16", "Q8_0", "gptq", "Q4_K_M"]
    assert [file["name"] for file in report.quantized_files(inputs)] == ["f16", "Q8_0", "gptq", "Q4_K_M"]


def test_a_folder_of_4_bits_says_what_it_was_made_from(built: Path) -> None:
    text = (built / report.MARKDOWN).read_text()
    assert (
        f"| gptq | 4 bits in groups of 32, by 128 training pairs (10,263 tokens) | model.safetensors `{'1' * 64}` |"
        in text
    )
    assert "| gptq | 113.0 | 6.72 | – | – | – | 0.07 | 0.063 to 0.077 | 93.00% |" in text
    assert "100 Q4_K, 30 Q5_0, weighed |" in text


def test_the_params_are_those_of_the_selected_profile(page: Page) -> None:
    assert "train.learning_rate" in page.text
    assert "5e-06" in page.text
    assert "1e-06" not in page.text
    assert "topics" not in page.text


@pytest.mark.parametrize(
    ("low", "high", "verb"),
    [(1.0, 9.0, "raised"), (-9.0, -1.0, "lowered"), (-1.0, 9.0, "the interval includes no change")],
)
def test_the_headline_says_what_the_interval_allows(low: float, high: float, verb: str) -> None:
    sentence = report.headline({"points": 4.0, "low": low, "high": high, "n": 77}, 0.3, 0.34, "it")
    assert verb in sentence
    assert "n = 77" in sentence
    assert "from 30.0% to 34.0%" in sentence


@pytest.mark.parametrize(
    "missing",
    [
        "reports/subset.json",
        "reports/data.json",
        "reports/train/history.csv",
        "reports/train/summary.json",
        "models/gguf/quantize.json",
        "models/compressed/compress.json",
        "data/evaluation/Q8_0.json",
        "data/evaluation/merged.jsonl",
    ],
)
def test_a_missing_input_is_named_in_one_line(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path)
    (tmp_path / missing).unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^{missing}: no such file; run `dvc repro` to make it$"):
        report.main()
    assert not report.HTML.exists()


def test_a_run_without_validation_is_reported_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path)
    train = tmp_path / "reports" / "train"
    (train / "evaluation.csv").write_text("step,loss,rewards/margins,rewards/accuracies\n")
    summary = json.loads((train / "summary.json").read_text())
    _json(
        train / "summary.json", summary | dict.fromkeys(("validation_step", "validation_loss", "validation_accuracy"))
    )
    monkeypatch.chdir(tmp_path)
    report.main()
    assert "On the validation split" not in Page(report.HTML.read_text()).text


def test_a_run_that_measured_preference_alone_is_reported_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    evaluation = tmp_path / "data/evaluation"
    for path in [evaluation / f"{name}.json" for name in MODELS]:
        found = json.loads(path.read_text())
        _json(path, {key: found[key] for key in ("model", "preference")})
        path.with_suffix(".jsonl").write_text("")
    comparison = json.loads((evaluation / "comparison.json").read_text())
    empty: dict[str, Any] = {"strict": None, "unseen": None, "by_kind": {}}
    _json(evaluation / "comparison.json", {name: found | empty for name, found in comparison.items()})
    monkeypatch.chdir(tmp_path)
    report.main()
    page = Page(report.HTML.read_text())
    assert set(json.loads(report.METRICS.read_text())) == {
        "preference_accuracy",
        "preference_gain",
        "quantized_kl",
        "train",
    }
    gain = comparison["merged"]["preference"]
    word = {"better": "Better", "worse": "Worse", "the same": "The same"}[report.side(gain)]
    assert f"{word}: preferences" in page.text
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert "before-and-after-by-kind-of-instruction" not in page.ids
    assert sorted(path.name for path in report.FIGURES.iterdir()) == ["margins.png", "quantization.png", "training.png"]
    assert [file["score"] for file in report.quantized_files(results.read_inputs())] == [
        json.loads((evaluation / f"{name}.json").read_text())["preference"]["accuracy"]
        for name in ("f16", "Q8_0", "gptq", "Q4_K_M")
    ]


@pytest.mark.parametrize("with_general", [False, True])
def test_a_run_that_measured_no_gain_is_reported_with_its_cost(
    with_general: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    evaluation = tmp_path / "data/evaluation"
    for name in MODELS:
        _json(evaluation / f"{name}.json", {"model": name})
        (evaluation / f"{name}.jsonl").write_text("")
    nothing: dict[str, Any] = {"strict": None, "unseen": None, "preference": None, "by_kind": {}, "against": "base"}
    _json(evaluation / "comparison.json", dict.fromkeys(("merged", *FILES), nothing))
    _json(evaluation / "divergence.json", {})
    if with_general:
        _json(evaluation / "evidence.json", {"answers": None, "margins": None, "general": GENERAL})
    else:
        (evaluation / "evidence.json").unlink()  # as in results from before it was made
    merge = json.loads((evaluation / "merge.json").read_text())
    _json(evaluation / "merge.json", {"rounding": merge["rounding"]})
    monkeypatch.chdir(tmp_path)
    report.main()
    assert "so no gain is known" in report.MARKDOWN.read_text()
    cost = "**What it cost.** On prose of scientific abstracts the perplexity went from 21 to 22.05 (+5.0%,"
    assert (cost in report.MARKDOWN.read_text()) is with_general
    assert [path.name for path in report.FIGURES.iterdir()] == ["training.png"]


@pytest.mark.parametrize("kept", [[], ["Q8_0"]])
def test_a_run_with_one_gguf_file_or_none_evaluated_is_reported(
    kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    for name in ("comparison", "divergence"):
        path = tmp_path / f"data/evaluation/{name}.json"
        found = json.loads(path.read_text())
        _json(path, {key: value for key, value in found.items() if key not in FILES or key in kept})
    for path in (tmp_path / "models/gguf/quantize.json", tmp_path / "models/compressed/compress.json"):
        found = json.loads(path.read_text())
        _json(path, found | {"files": {name: file for name, file in found["files"].items() if name in kept}})
    monkeypatch.chdir(tmp_path)
    report.main()
    page = Page(report.HTML.read_text())
    assert page.tags.count("img") == 3 + len(kept)
    assert [name for name in FILES if f"| {name} | " in report.MARKDOWN.read_text().split("##")[0]] == kept


def test_a_file_that_was_not_evaluated_is_listed_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path)
    evaluation = tmp_path / "data/evaluation"
    for name in ("comparison", "divergence"):
        found = json.loads((evaluation / f"{name}.json").read_text())
        _json(evaluation / f"{name}.json", {key: value for key, value in found.items() if key != "Q8_0"})
    monkeypatch.chdir(tmp_path)
    report.main()
    assert "| Q8_0 | 145.0 | 8.62 | 0 of 272 | 5.12% | 1.89% | – | – | – | – | – |" in report.MARKDOWN.read_text()
    assert "Q8_0" not in json.loads(report.METRICS.read_text())["strict_accuracy"]


def test_counts_that_do_not_add_up_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path)
    path = tmp_path / "reports" / "subset.json"
    counts = json.loads(path.read_text())
    counts["train"]["removed"]["identical_answers"] += 1
    _json(path, counts)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`train` do not add up"):
        report.main()


def test_numbers_are_written_with_their_sign_and_without_false_ones() -> None:
    assert [render.points(value) for value in (17.25, -3.6, -0.04, 0.0)] == ["+17.2", "−3.6", "0.0", "0.0"]
    assert [render.number(value) for value in (0.69314, 1.5e-6, 4321, None)] == ["0.6931", "1.5e−06", "4,321", "–"]
    assert [render.difference(value) for value in (0.5, -0.5, 0.0, None)] == ["+0.5", "−0.5", "0", "–"]
    assert [render.setting(value) for value in (5e-6, None, True, ["a", "b"], "x")] == [
        "5e-06",
        "null",
        "true",
        "a, b",
        "x",
    ]


def test_the_moving_mean_keeps_a_straight_line_and_its_length() -> None:
    assert _moving_mean([1.0, 2.0, 3.0, 4.0, 5.0], 1) == [1.5, 2.0, 3.0, 4.0, 4.5]


def test_the_merge_is_compared_with_the_model_as_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    report.main()
    text = report.MARKDOWN.read_text()
    assert (
        "trained on the base in nf4 and merged onto the base in bf16. Rounding to 16 bits left 43.21% of the weights"
        in text
    )
    assert "| bf16 (this run) | 0.0031 | 99.00% | 0.25 | 97.5% | 43.21% | 1.23% |" in text
    assert "| nf4 | 0.0017 | 99.00% | 0.25 | 97.5% | 5.67% | 0.89% |" in text
    page = Page(report.HTML.read_text())
    assert all(number in page.text for number in ("43.21%", "1.23%", "5.67%", "0.89%"))


def test_the_published_curve_is_drawn_beside_that_of_a_run_on_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    report.main()
    figure = Path("reports/figures/training.png").read_bytes()
    assert "in the published run" not in report.MARKDOWN.read_text()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(
        text.replace("    quantize:\n", f"    model: {{source: {BASE}}}\n    quantize:\n", 1)
    )
    report.main()
    assert Path("reports/figures/training.png").read_bytes() != figure
    first = [float(line.split(",")[2]) for line in Path("reports/train/history.csv").read_text().splitlines()[1:63]]
    sentence = (
        f"Over the 62 steps that both have, the mean loss is {sum(first) / 62:.4} here and 0.5374 in the published run"
    )
    assert sentence in report.MARKDOWN.read_text()
    assert sentence[:40] in " ".join(Page(report.HTML.read_text()).text.split())


def test_suites_are_shown_with_their_differences_and_only_where_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    report.main()
    assert "suite" not in report.MARKDOWN.read_text() + report.HTML.read_text()
    assert "suites" not in json.loads(report.METRICS.read_text())
    names = [run for suite in SUITES.values() for run in suite.runs()]
    apart = 0.99**0.5 / 10  # half of the values so far above and half below the mean: a standard error of 0.01
    results = {
        model: {
            run: {
                "n": 100,
                "metrics": {metric: [0.4 + i / 20 + sign * apart for sign in (1, -1)] * 50 for metric in task.metrics},
                "truncated": 3,
                "revision": "ab" * 20,
                "questions": "0" * 64,
            }
            for _, task, run in names
        }
        for i, model in enumerate(MODELS)
    }
    found = {name: summary(suite, results) for name, suite in SUITES.items()}
    _json(tmp_path / "data/evaluation/suites.json", found)
    _write(tmp_path / "data/evaluation/suites/base/gsm8k-5-shot.jsonl.gz", "questions of others")
    report.main()
    text, page = report.MARKDOWN.read_text(), Page(report.HTML.read_text())
    # Four benchmarks of 8, 7, 1 and 18 tasks whose errors are 1 %: 0.25 x sqrt(1/8 + 1/7 + 1 + 1/18) x 1.96 = 0.6.
    assert "| base | 40.0% ± 0.6 | – | – | 40.0%" in text
    scores = "45.0% ± 0.7 | 45.0% ± 0.7 | 45.0% ± 2.0 | 45.0% ± 0.5 |"
    assert f"| merged | 45.0% ± 0.6 | **+5.0** | +5.0 to +5.0 | {scores}" in text
    assert "| n | 3,400 | | | 800 | 700 | 100 | 1,800 | " in text
    assert "| n | cut requests |" in text
    head = text.split("How this run differs")[0]
    assert "; Nous +5.0 points (+5.0 to +5.0, n = 3,400)" in head.split("What it cost")[0]
    assert "| Nous | 40.0% | 45.0% | +5.0 points | +5.0 to +5.0 | 3,400 |" in head
    clipped = "A gain counts what the averages clip below chance."
    assert clipped in text
    assert clipped in page.text
    shown = " | ".join(f"{40 + 5 * i}.0% ± 2.0" for i in range(len(MODELS)))
    row = f"| gsm8k | exact_match,strict-match | 5 | 100 | 3 | {shown} | {'ab' * 20} |"
    assert row in text
    assert text.count("Training pairs were not searched for its questions") == 3
    for suite in SUITES.values():
        assert all(line in text for line in suite.differs)
        assert all(line in " ".join(page.text.split()) for line in suite.differs)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert "benchmark-suites" in page.ids
    metrics = json.loads(report.METRICS.read_text())
    assert metrics["suites_gain"] == {name: suite["models"]["merged"]["gain"] for name, suite in found.items()}
    averages = metrics["suites"]["nous"]
    assert averages == {name: found["nous"]["models"][name]["average"]["score"] for name in MODELS}
    assert Path("reports/eval/suites.json").is_file()
    assert not Path("reports/eval/suites").exists()
