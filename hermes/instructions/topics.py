"""The topics of the embedded questions (topics.txt), and their three disjoint splits.

A topic belongs to one split only, so that no question of the validation or test split shares its subject with training.
The split is by position after a shuffle with a fixed seed: TEST and VALIDATION first, the rest is for training.
"""

from pathlib import Path
from random import Random

TEST, VALIDATION = 48, 40

TOPICS = tuple(map(str.strip, Path(__file__).with_name("topics.txt").read_text().split(";")))


def split_topics() -> dict[str, tuple[str, ...]]:
    """The topics of each split: {"test": ..., "validation": ..., "train": ...}, disjoint, in a fixed order."""
    shuffled = list(TOPICS)
    Random("topics").shuffle(shuffled)
    return {
        "test": tuple(shuffled[:TEST]),
        "validation": tuple(shuffled[TEST : TEST + VALIDATION]),
        "train": tuple(shuffled[TEST + VALIDATION :]),
    }
