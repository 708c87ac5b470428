"""The keys that no stage tracks, since they shape no result by themselves: `wandb`, and `collect`, which made data/embedded."""

from hermes.params import Settings
from hermes.settings.base import Threads


class TrackingSettings(Settings):
    """Whether and where a training run is logged."""

    enabled: bool
    project: str


class CollectSettings(Settings):
    """How data/embedded was sampled; changing one of these and running `make collect` makes another data set."""

    topics: int
    samples: int
    demonstrated_samples: int
    temperature: float
    max_new_tokens: int
    tie_margin: float
    contrast_share: float
    chunk_topics: int
    slots: int
    threads: Threads
