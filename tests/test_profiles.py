"""What docs/published.md says of the profiles is what params.yaml has, and the published profile is the published run."""

import math
import re
from pathlib import Path
from typing import Any

from hermes.params import read_yaml

ROOT = Path(__file__).parent.parent
PROFILES = read_yaml(ROOT / "params.yaml")["profiles"]
ROW = re.compile(r"^\| `([a-z_.]+)` \| (.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)


def flat(profile: str) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, body in PROFILES[profile].items() for key, value in body.items()}


def shown_as(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_the_table_names_every_difference_with_both_values_and_no_other() -> None:
    published, repaired = flat("a40_published"), flat("a40")
    assert published.keys() == repaired.keys()
    rows = {key: (left, right) for key, left, right, _ in ROW.findall((ROOT / "docs/published.md").read_text())}
    assert rows.keys() == {key for key in published if published[key] != repaired[key]}
    for key, (left, right) in rows.items():
        for shown, value in ((left, published[key]), (right, repaired[key])):
            described = isinstance(value, dict) or len(shown_as(value)) > 60
            assert described or shown == shown_as(value), key


def test_the_published_profile_makes_62_steps_whose_learning_rate_only_rises() -> None:
    train = PROFILES["a40_published"]["train"]
    assert (
        PROFILES["a40_published"]["subset"]["k"] // (train["batch_size"] * train["accumulation"])
        == train["max_steps"]
        == 62
    )
    reached = train["learning_rate"] * (train["max_steps"] - 1) / train["warmup_steps"]
    assert math.isclose(reached, 3.05e-5)
    assert train["warmup_steps"] > train["max_steps"]
