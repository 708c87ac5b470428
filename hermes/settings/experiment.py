"""The whole of params.yaml: what all sections of a profile say together.

Every run checks this first, so that a mistake in the last stage's section stops the first stage. It refuses and shapes no output, so no
stage depends on it.
"""

from pathlib import Path

from pydantic import model_validator

from hermes import params
from hermes.bits import Bits
from hermes.params import PARAMS, Settings
from hermes.settings.base import BaseSettings
from hermes.settings.data import DataSettings
from hermes.settings.evaluate import EvaluateSettings
from hermes.settings.merge import MergeSettings
from hermes.settings.model import ModelSettings
from hermes.settings.quantize import QuantizeSettings
from hermes.settings.reference import ReferenceSettings
from hermes.settings.subset import SubsetSettings
from hermes.settings.tokenize import TokenizeSettings
from hermes.settings.train import Science, TrainSettings
from hermes.settings.untracked import CollectSettings, TrackingSettings


class Profile(Settings):
    """All sections of a profile."""

    data: DataSettings
    model: ModelSettings
    subset: SubsetSettings
    tokenize: TokenizeSettings
    base: BaseSettings
    reference: ReferenceSettings
    train: TrainSettings
    merge: MergeSettings
    quantize: QuantizeSettings
    evaluate: EvaluateSettings

    @model_validator(mode="after")
    def _sections_agree(self) -> "Profile":
        if self.merge.base == "nf4" and self.base.quantization != "nf4":
            raise ValueError("`merge.base: nf4` needs `base.quantization: nf4`, which training would have used")
        if missing := sorted(set(self.evaluate.types) - {"f16", *self.quantize.types}):
            raise ValueError(
                f"`evaluate.types` asks for {missing[0]}, which is not made; add it to `quantize.types` or take it out"
            )
        return self


class Experiment(Science):
    """All keys of params.yaml, with the sections of one profile."""

    bits: Bits
    collect: CollectSettings
    wandb: TrackingSettings
    profile: Profile


def check(path: Path = PARAMS, profile: str | None = None) -> Experiment:
    """Reads all parameters of a profile, the selected one unless named.

    Raises:
        UserError: all that is wrong with them, in one line.
    """
    tree = params.read_yaml(path)
    name = params.selected_profile(tree if profile is None else {**tree, "profile": profile}, path)
    params.reject_unknown_keys(tree, path)
    values = {key: value for key, value in tree.items() if key != "profiles"} | {"profile": tree["profiles"][name]}
    return params.validated(Experiment, values, {"profile": f"profiles.{name}"}, path)
