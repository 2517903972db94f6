"""Where a model folder lies: on this machine, or in the Hugging Face hub's cache.

path --> as it is;  owner/name, owner/name@revision --what is read of it--> its snapshot
"""

import re
from pathlib import Path

from llava_mini_jax.errors import InputError

# Of a hub's repository what is read here, tokenizer included: beside safetensors there may be the
# same weights as torch's, TensorFlow's and Flax's, and originals of other frameworks in folders.
TEXT_FILES = ("*.json", "*.model", "*.jinja", "*.txt")


def resolve_folder(name: str | Path) -> Path:
    """A local folder as it is, or a hub name as its (downloaded) snapshot.

    "owner/model@revision" is a branch, a tag or a commit of the hub's repository.
    """
    path = expanded(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path} is a file; give the model's folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name)):
        raise InputError(f"model folder {path} does not exist: check the path")
    try:
        return _download(*str(name).partition("@")[::2])
    except Exception as error:  # the hub raises a dozen unrelated types
        raise InputError(
            f'"{name}" is not a local folder and could not be fetched from the hub '
            f"({type(error).__name__}): {_remedy(error)}, or download the model and give its folder"
        ) from error


def _remedy(error: Exception) -> str:
    """What helps: of a gated repository, LLaMA-3.1's for one, neither name nor network is wrong."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            "the repository is gated, so ask for access on its page and log in (`hf auth login`, or"
            " HF_TOKEN in the environment)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private: check the name, or log in"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision: check the name after @"
    return "check the name and the network"


def _download(name: str, revision: str) -> Path:
    """The snapshot: its weights as safetensors, or torch's where there are none."""
    import huggingface_hub

    def fetch(weights: str) -> Path:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=[*TEXT_FILES, weights],
            ignore_patterns="*/*",
        )
        return Path(found)

    folder = fetch("*.safetensors")
    if (folder / "adapter_config.json").is_file():
        return fetch("*.bin")  # LLaVA's adapters have theirs, and what was trained beside them
    return folder if any(folder.glob("*.safetensors")) else fetch("pytorch_model*.bin")


def expanded(name: str | Path) -> Path:
    """The path with "~" for a home folder, where there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # "~nosuchuser"
        return Path(name)
