"""Section `reference`."""

from pydantic import PositiveInt

from hermes.params import Settings


class ReferenceSettings(Settings):
    """How many pairs a forward takes."""

    batch_size: PositiveInt
