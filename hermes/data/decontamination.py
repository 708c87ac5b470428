"""Whether a training pair repeats a question of a benchmark suite: by the runs of eight words that both have.

A question is what its task shows the model, and each text of its row besides. A pair repeats it when question, answers and earlier turns
of the pair hold at least half of the runs of one of these texts (Tulu 3, arXiv 2411.15124, section 3.2). A text of four to seven words is
one run, which the whole question of a pair repeats. Shorter ones say too little. A run that more than `COMMON` texts have is the wording of
a task, and does not count.

Runs are kept as hashes, since authors of benchmarks ask that their questions are not spread.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from hermes.artifacts import open_parquet, write_parquet

RUN, SHORTEST = 8, 4  # words
COMMON = 20  # texts
FILE = "suites.parquet"


@cache
def word_hash(word: str) -> int:
    """8 bytes of a word's hash."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")


def runs(text: str) -> np.ndarray:
    """The distinct hashes, (runs,) uint64 ascending, of a text's runs of words; of the whole text where it has fewer words."""
    words = np.array([word_hash(word) for word in re.findall(r"[^\W_]+", text.lower())], dtype=np.uint64)
    length = min(RUN, len(words))
    found = np.zeros(len(words) - length + 1 if length else 0, dtype=np.uint64)
    for place in range(length):
        found = found * np.uint64(0x9E3779B97F4A7C15) + words[place : place + len(found)]  # modulo 2^64
    return np.unique(found) if len(words) >= SHORTEST else found[:0]


def write_questions(texts: Iterable[tuple[str, str, str]], path: Path) -> None:
    """Writes the runs of texts, each behind its suite and task, as a Parquet file (suite, task, runs)."""
    rows: dict[tuple[int, ...], tuple[str, str]] = {}
    for suite, task, text in texts:
        if len(found := runs(text)):
            rows.setdefault(tuple(found.tolist()), (suite, task))
    each = [np.array(row, dtype=np.uint64) for row in rows]
    values, counts = np.unique(np.concatenate([runs(""), *each]), return_counts=True)
    wording = set(values[counts > COMMON].tolist())
    table = [
        {"suite": suite, "task": task, "runs": kept}
        for row, (suite, task) in rows.items()
        if (kept := [run for run in row if run not in wording])
    ]
    schema = pa.schema({"suite": pa.string(), "task": pa.string(), "runs": pa.list_(pa.uint64())})
    write_parquet(path, pa.Table.from_pylist(table, schema=schema))


class Questions:
    """The questions of suites, from the file that `write_questions` made.

    Attributes:
        names: (suite, task) of each text.
    """

    def __init__(self, path: Path) -> None:
        with open_parquet(path) as file:
            table = file.read(columns=["suite", "task", "runs"])
        self.names = list(zip(table["suite"].to_pylist(), table["task"].to_pylist(), strict=True))
        lists = table["runs"].combine_chunks()
        self.sizes = lists.value_lengths().to_numpy(zero_copy_only=False)
        found = lists.flatten().to_numpy()
        order = np.argsort(found, kind="stable")
        self.runs, self.holders = found[order], np.repeat(np.arange(len(table)), self.sizes)[order]

    def repeated_by(self, question: str, others: Sequence[str]) -> tuple[str, str] | None:
        """The (suite, task) of the first text that a pair with this question and these other texts repeats."""
        found = np.unique(np.concatenate([runs(question), runs(" ".join([question, *others]))]))
        first, behind = (np.searchsorted(self.runs, found, side) for side in ("left", "right"))
        hit = [self.holders[a:b] for a, b in zip(first, behind, strict=True) if a < b]
        if not hit:
            return None
        texts, counts = np.unique(np.concatenate(hit), return_counts=True)
        repeated = texts[2 * counts >= self.sizes[texts]]
        return self.names[repeated[0]] if len(repeated) else None
