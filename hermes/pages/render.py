"""Pages from templates: a template becomes Markdown, and the Markdown one HTML file without links outward; its one script filters answers.

Everything that a template shows is data, unless a filter here says otherwise: `markdown` escapes it, so that neither a
model's answer nor a user's name is markup. Control characters and direction marks never reach a page. GitHub tells
everyone whom a comment names with an @. An @ that is data is followed by a space without width, so that it names nobody.
"""

import base64
import html
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from hermes.artifacts import complete_file

TEMPLATES = Path(__file__).parent / "templates"
PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")
INLINE = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")
BLOCK = re.compile(r"^(?: ?\d{1,9}(?=[.)](?: |$))| ?(?=(?:#{1,6}|[+-])(?: |$)|:?-+:? ?$|=+ ?$))")
DIRECTIONS = "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"


def environment() -> jinja2.Environment:
    """The templates, which escape whatever they show."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else markdown(value),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (percent, change, points, interval, margin, number, difference, setting, count, code, lines, gain, shell)
    made.filters |= {filter.__name__: filter for filter in filters}
    return made


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; one that rounds to nothing has no sign."""
    return "–" if value is None else f"{round(100 * value, digits) + 0.0:.{digits}f}%".replace("-", "−")


def change(value: float) -> str:
    """A relative change as a signed percentage; one that rounds to nothing has no sign."""
    return f"{points(100 * value)}%"


def points(value: float) -> str:
    """A signed difference in points; one that rounds to nothing has no sign."""
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"


def interval(gain: Mapping[str, float] | None) -> str:
    """The interval of a paired gain, in points."""
    return f"{points(gain['low'])} to {points(gain['high'])}" if gain else "–"


def gain(found: Mapping[str, float] | None) -> str:
    """A paired gain in points, bold where its interval leaves out zero."""
    if not found:
        return "–"
    shown = points(found["points"])
    return Markup(f"**{shown}**") if found["low"] > 0 or found["high"] < 0 else shown


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
    return value if isinstance(value, str) and "\n" not in value else json.dumps(value, ensure_ascii=False)


def count(value: int) -> str:
    """A count with thousands separated."""
    return f"{value:,}"


def clean(text: str) -> str:
    """A text without the control characters and direction marks that a page could be rearranged with."""
    return re.sub(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{DIRECTIONS}]", "\N{REPLACEMENT CHARACTER}", text)


def markdown(value: Any) -> Markup:
    """A text in one line that shows as it is: nothing in it is markup, HTML, a link, a cell of a table or a mention."""
    text = html.escape(re.sub(r"\s+", " ", clean(str(value))), quote=False)
    return Markup(BLOCK.sub(r"\g<0>\\", INLINE.sub(r"\\\g<0>", text)).replace("@", "@&#8203;"))


def lines(text: str, before: str = "") -> Markup:
    """A text of several lines that shows as it is, indentation included; each line has `before` in front of it."""
    rows = [row.rstrip().expandtabs(4) for row in clean(text.strip("\n").rstrip()).split("\n")]
    made = [Markup("&nbsp;" * (len(row) - len(row.lstrip()))) + markdown(row) for row in rows]
    ends = ["\\" if row and after else "" for row, after in zip(made, [*made[1:], ""], strict=True)]
    return Markup("\n".join(f"{before}{row}{end}".rstrip() for row, end in zip(made, ends, strict=True)))


def code(value: Any) -> Markup:
    """A text in one line as code, also inside a cell of a table."""
    text = " ".join(clean(str(value)).split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return Markup(f"{fence}{space}{text}{space}{fence}")


def shell(value: str) -> Markup:
    """A text as one word of a shell's command, in one line of a block of code."""
    return Markup(shlex.quote(" ".join(clean(value).split())))


def render(template: str, target: Path, content: Mapping[str, Any]) -> None:
    """Writes a Markdown page: a template of hermes/pages/templates filled with its content."""
    with complete_file(target) as temporary:
        temporary.write_text(clean(environment().get_template(template).render(content)))


def folded(body: str, name: str) -> str:
    """A page's body in which the table below the heading of this name is shown on demand; as it is where there is none."""
    heading, above, rest = body.partition(f'<h2 id="{name}">')
    before, opening, table = rest.partition('<div class="scroll">')
    inside, closing, after = table.partition("</table></div>")
    if not closing or "<h2" in before:
        return body
    rows = inside.count("<tr>") - 1
    table = f"<details><summary>{rows} rows</summary>{opening}{inside}{closing}</details>"
    return f"{heading}{above}{before}{table}{after}"


def render_html(page: Path) -> None:
    """Writes a Markdown page as HTML beside it, its pictures inside; links lead to the sections."""
    tokens = PARSER.parse(page.read_text())
    headings: dict[str, tuple[str, str]] = {}
    for token, text in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and text:
            title = "".join(part.content for part in text.children or ())
            slug = re.sub(r"\W+", "-", title.lower()).strip("-")
            name = slug if slug not in headings else f"{slug}-{len(headings)}"
            token.attrSet("id", name)
            headings[name] = (token.tag, html.escape(title))
        for part in token.children or ():
            if part.type == "image":
                picture = base64.b64encode((page.parent / str(part.attrs["src"])).read_bytes()).decode()
                part.attrSet("src", f"data:image/png;base64,{picture}")
    body = PARSER.renderer.render(tokens, PARSER.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = folded(body, "parameters")
    links = "".join(f'<a href="#{name}">{title}</a>' for name, (tag, title) in headings.items() if tag == "h2")
    before, heading, after = body.partition("<h2")
    title = next((title for tag, title in headings.values() if tag == "h1"), "")
    content = {"title": Markup(title), "body": Markup(f"{before}<nav>{links}</nav>\n{heading}{after}")}
    with complete_file(page.with_suffix(".html")) as temporary:
        temporary.write_text(environment().get_template("base.html.j2").render(content))
