"""Section `calibration`: which training pairs show what a model's weights are used for, before they are rounded."""

from hermes.params import Settings
from hermes.settings.base import Count


class CalibrationSettings(Settings):
    """How many training pairs are looked at, prompt and chosen answer, evenly spaced."""

    pairs: Count
