"""Pages from templates: how numbers and the texts of others are written there."""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from hermes.artifacts import complete_file
from hermes.pages.results import (
    Row,
)

TEMPLATES = Path(__file__).parent / "templates"


def scores(result: Row) -> list[str]:
    """The cells of a model in the table of scores: strict, unseen, preference, perplexity, empty, looping, unfinished."""
    strict, failures = result["strict"], result["failures"]
    return [
        percent(strict["seen"]["accuracy"] if strict else None),
        percent(strict["unseen"]["accuracy"] if strict else None),
        percent(result["preference"]["accuracy"] if result["preference"] else None),
        number(result["perplexity"]["value"] if result["perplexity"] else None),
        *(count(failures[name]) if failures else "–" for name in ("empty", "looping", "unfinished")),
    ]


def sizes(result: Row) -> str:
    """On how much each score rests."""
    found = []
    if result["strict"]:
        found += [
            f"{part} {result['strict'][key]['n']:,} questions"
            for part, key in (("strict", "seen"), ("unseen", "unseen"))
        ]
    if result["preference"]:
        found.append(f"preference {result['preference']['n']:,} pairs")
    if result["perplexity"]:
        found.append("perplexity {tokens:,} tokens of {answers:,} answers".format(**result["perplexity"]))
    return ", ".join(found)


def environment() -> jinja2.Environment:
    """The templates: HTML escapes all it is given; Markdown escapes through the `md` filter."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (percent, points, interval, margin, number, difference, setting, count, words, clean, data_uri)
    made.globals |= {"scores": scores, "sizes": sizes}
    made.filters |= {filter.__name__: filter for filter in filters} | {"md": markdown}
    return made


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; one that rounds to nothing has no sign."""
    return "–" if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f}%".replace("-", "−")


def points(value: float) -> str:
    """A signed difference in points; one that rounds to nothing has no sign."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def interval(gain: Mapping[str, float]) -> str:
    """The interval of a paired gain, in points."""
    return f"{points(gain['low'])} to {points(gain['high'])}"


def margin(score: Mapping[str, float]) -> str:
    """A score of a suite in percent, with half of its 95 % interval."""
    return f"{percent(score['score'])} ± {196 * score['stderr']:.1f}"


def number(value: float | None) -> str:
    """A measured number with four significant digits."""
    return "–" if value is None else f"{value:,.4g}".replace("-", "−")


def difference(value: float | None) -> str:
    """The same with its sign; no difference is zero without one."""
    return number(value) if not value else f"{value:+,.4g}".replace("-", "−")


def setting(value: Any) -> str:
    """A parameter as it is written in params.yaml."""
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "[]"
    return value if isinstance(value, str) else json.dumps(value)


def count(value: int) -> str:
    """A count with thousands separated."""
    return f"{value:,}"


def words(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def clean(text: str) -> str:
    """A text without the control characters and direction marks that a page could be rearranged with."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text
    )


def markdown(value: Any) -> str:
    """A text that shows as it is inside a cell of a Markdown table: nothing in it is markup, HTML or a new cell."""
    text = re.sub(r"[&<>]", lambda found: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[found[0]], clean(str(value)))
    text = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return "<br>".join(text.strip().splitlines())


def data_uri(path: Path) -> str:
    """A PNG as the text of a `src` attribute."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def render(template: str, target: Path, content: Mapping[str, Any]) -> None:
    """Writes a page: a template of hermes/pages/templates filled with its content."""
    with complete_file(target) as temporary:
        temporary.write_text(environment().get_template(template).render(content))
