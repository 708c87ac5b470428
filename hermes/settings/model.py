"""Section `model`: where the base model comes from."""

from pydantic import model_validator

from hermes.params import Settings
from hermes.settings.sources import check_source


class ModelSettings(Settings):
    """Where the base model comes from."""

    source: str
    revision: str | None
    chat_template: str | None

    @model_validator(mode="after")
    def _is_pinned(self) -> "ModelSettings":
        check_source(self.source, self.revision)
        return self
