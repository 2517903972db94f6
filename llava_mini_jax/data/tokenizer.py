"""Tokenizers from a folder or from the Hugging Face hub, quietly and without torch."""

import logging
import re
import warnings
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError


def _is_news(record: logging.LogRecord) -> bool:
    known = ("PyTorch was not found", "You are using a model of type")
    return not record.getMessage().startswith(known)


def load_tokenizer(source: Path | str) -> Any:
    """The fast tokenizer of a model folder, or of a name on the Hugging Face hub.

    A folder is read without any connection. Raises InputError for what is neither, for a folder
    without tokenizer files, and for a hub name that is not in the local cache while offline.
    """
    for name in ("transformers", "transformers.configuration_utils"):
        logging.getLogger(name).addFilter(_is_news)
    # It reads config.json too, and comments on a field that is written for older versions.
    warnings.filterwarnings("ignore", ".*rope_scaling.*deprecated", FutureWarning)
    from transformers import AutoTokenizer

    is_folder = Path(source).is_dir()
    if not is_folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(
            f"There is no folder {source} to load a tokenizer from; give a model folder, or a"
            " name on the Hugging Face hub such as lmsys/vicuna-7b-v1.5."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if is_folder:
            raise InputError(
                f"The folder {source} has no tokenizer that can be loaded ({first_line(error)});"
                " put tokenizer.json (or tokenizer.model) and tokenizer_config.json there."
            ) from error
        tokenizer = _download_tokenizer(str(source))
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {source} ({type(tokenizer).__name__}) gives no character offsets;"
            " put a tokenizer.json into the folder."
        )
    return tokenizer


def _download_tokenizer(name: str) -> Any:
    from huggingface_hub import constants, get_session
    from transformers import AutoTokenizer

    try:
        # One short try first: without it, five retries of each file take most of a minute.
        get_session().head(constants.ENDPOINT, timeout=10)
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the connection's, the hub's and the files' own errors
        raise InputError(
            f"Cannot load the tokenizer {name}: it is neither a folder nor in the local cache, and"
            f" the Hugging Face hub does not give it ({first_line(error)}). Check the name and"
            " the connection, or download it elsewhere and give the folder."
        ) from error


def first_line(error: Exception) -> str:
    """The gist of an exception, to be part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
