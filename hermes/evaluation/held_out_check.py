"""What evaluate will ask, tried before anything is trained: the stage tokenize calls this, which refuses and shapes no output."""

from transformers import PreTrainedTokenizerBase

from hermes.evaluation.held_out import read_held_out
from hermes.settings import experiment


def check_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses held-out rows that evaluate could not ask.

    Raises:
        UserError: a row is not what the chat template or `evaluate.context` takes.
    """
    read_held_out(experiment.check().profile.evaluate, tokenizer)
