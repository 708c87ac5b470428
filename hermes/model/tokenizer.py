"""Loading the tokenizer of a model folder."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes.console import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; neither the network is asked nor code of its own run.

    Raises:
        UserError: the folder is missing, damaged, or has no tokenizer.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run `dvc repro` to make it")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the libraries raise about the files of others
        raise UserError(
            f"{folder}: has no readable tokenizer ({type(error).__name__}: {error}); delete it and run `dvc repro`"
        ) from None
