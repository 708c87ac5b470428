"""Section `reference`."""

from hermes.params import Settings
from hermes.settings.base import Count


class ReferenceSettings(Settings):
    """How many pairs a forward takes."""

    batch_size: Count
