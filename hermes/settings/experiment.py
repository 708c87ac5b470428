"""The whole of params.yaml: what all sections of a profile say together.

Every run checks this first, so that a mistake in the last stage's section stops the first stage. It refuses and shapes no output, so no
stage depends on it.
"""

from pathlib import Path
from typing import get_args

from pydantic import model_validator

from hermes import params
from hermes.bits import Bits
from hermes.params import PARAMS, Settings
from hermes.settings.base import BaseSettings
from hermes.settings.calibration import CalibrationSettings
from hermes.settings.compress import CompressSettings, Method
from hermes.settings.data import DataSettings
from hermes.settings.evaluate import EvaluateSettings
from hermes.settings.merge import MergeSettings
from hermes.settings.model import ModelSettings
from hermes.settings.quantize import LADDERS, QuantizeSettings
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
    calibration: CalibrationSettings
    quantize: QuantizeSettings
    compress: CompressSettings
    evaluate: EvaluateSettings

    @model_validator(mode="after")
    def _sections_agree(self) -> "Profile":
        if self.merge.base == "nf4" and self.base.quantization != "nf4":
            raise ValueError("`merge.base: nf4` needs `base.quantization: nf4`, which training would have used")
        methods = {*get_args(Method)}
        asked: set[str] = set()
        for named in (self.evaluate.types, self.evaluate.suite_types):
            asked |= {*named} if isinstance(named, list) else set()
        if self.evaluate.types == "all" and "f16" in self.evaluate.suite_types:
            raise ValueError(
                "`evaluate.suite_types` asks for f16, which `evaluate.types: all` leaves out; name it there"
            )
        # The model decides which ladder is made; only one can be.
        ladders = [self.quantize.types] if isinstance(self.quantize.types, list) else LADDERS.values()
        for key, missing in (
            ("quantize.types", min((asked - methods - {"f16", *ladder} for ladder in ladders), key=len)),
            ("compress.methods", asked & methods - {*self.compress.methods}),
        ):
            if missing:
                raise ValueError(
                    f"`evaluate.types` or `suite_types` asks for {min(missing)}, which is not made; add it to `{key}` or take it out"
                )
        if (pairs := self.compress.awq_pairs) > self.calibration.pairs:
            raise ValueError(
                f"`compress.awq_pairs` is {pairs}; `calibration.pairs` is {self.calibration.pairs}: it can be no more"
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
