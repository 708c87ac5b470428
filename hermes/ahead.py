"""What later stages could not take, found before anything is trained: tokenize calls this, which refuses and shapes no output."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hermes.evaluation.held_out import read_held_out
from hermes.model.base_check import check_adapter
from hermes.settings import experiment


def check_ahead(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses an adapter that could not be merged, and held-out rows that evaluate could not ask.

    Raises:
        UserError: says which.
    """
    profile = experiment.check().profile
    check_adapter(base, profile.train, profile.merge.base)
    read_held_out(profile.evaluate, tokenizer)
