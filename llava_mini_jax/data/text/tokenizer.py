"""Tokenizers from a folder or from the Hugging Face hub, quietly and without torch.

    tokenizer.json --tried in a process of its own--> its ids, as they are
    tokenizer.model, and what else there is --transformers--> the tokenizer of its class
    tokenizer_config.json, special_tokens_map.json, chat_template.jinja --> special tokens, template

config.json is not read. Where there is a tokenizer.json it is the truth: transformers would build
another tokenizer of its vocabulary, with the class's own normalizer, splitting and decoder, if
tokenizer_config.json names a class that has some.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_mini_jax import environment
from llava_mini_jax.data.text.tokenizer_files import TokenizerFiles, read_files
from llava_mini_jax.data.text.tokenizer_trial import Trial
from llava_mini_jax.errors import InputError

# Of a repository on the hub.
_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_MORE_FILES = ("vocab.json", "merges.txt", "additional_chat_templates/*")


def load_tokenizer(source: Path | str) -> Any:
    """The fast tokenizer of a model folder, or of a name on the Hugging Face hub.

    A folder is read without any connection. Raises InputError for what is neither, for a folder
    without tokenizer files or with damaged ones, and for a hub name that is not in the local cache
    while offline.
    """
    is_folder = Path(source).is_dir()
    if not is_folder and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(
            f"There is no folder {source} to load a tokenizer from; give a model folder, or a"
            " name on the Hugging Face hub such as lmsys/vicuna-7b-v1.5."
        )
    folder = Path(source) if is_folder else _from_hub(str(source))
    files = read_files(folder)
    path = folder / "tokenizer.json"
    tokenizer = _from_json(path, files) if path.is_file() else _from_others(folder, files)
    tokenizer.chat_template = files.chat_template
    return tokenizer


def _from_json(path: Path, files: TokenizerFiles) -> Any:
    with Trial(path) as trial:  # meanwhile this process reads transformers
        shell = environment.transformers().PreTrainedTokenizerFast
        trial.result()
    with told(str(path), "is not a tokenizer that can be loaded"):
        tokenizer = shell(
            tokenizer_file=str(path),
            clean_up_tokenization_spaces=False,
            **files.options,
        )
        backend = tokenizer.backend_tokenizer
        # A text is read whole; whoever cuts or fills up rows says so elsewhere.
        backend.no_truncation()
        backend.no_padding()
    if getattr(backend.model, "dropout", None):
        raise InputError(
            f"{path}: its model has a dropout of {backend.model.dropout}, so a text has other ids"
            ' each time it is read; set "dropout" to null'
        )
    files.add_declared(backend)
    # Set, not given above: those would become tokens that the file does not know.
    for name, token in files.special_tokens(backend).items():
        setattr(tokenizer, name, token)
    return tokenizer


def _from_others(folder: Path, files: TokenizerFiles) -> Any:
    """As transformers makes it of other files, those of the model kept out of its sight."""
    transformers, name = environment.transformers(), files.class_name
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as place:
        for path in sorted(folder.iterdir()):
            if path.name.endswith((".model", ".txt", ".json")) and path.name not in _NOT_ITS:
                Path(place, path.name).symlink_to(path.resolve())
        names = {path.name for path in Path(place).iterdir()}
        try:
            with told(str(folder), "has no tokenizer that can be loaded"):
                # Without any of them, some classes would make a vocabulary of three words.
                if not any(n.endswith((".model", ".txt")) or n in _VOCABULARIES for n in names):
                    raise FileNotFoundError("there are no files of one")
                if name is None or name.startswith("Llama"):
                    if "tokenizer.model" not in names:
                        raise FileNotFoundError("there is no tokenizer.model")
                    tokenizer = transformers.LlamaTokenizer.from_pretrained(
                        place, add_bos_token=files.add_bos
                    )
                else:
                    tokenizer = transformers.AutoTokenizer.from_pretrained(
                        place,
                        config=transformers.PreTrainedConfig(),
                        local_files_only=True,
                        trust_remote_code=False,
                    )
                tokenizer.name_or_path = str(folder)
        except InputError as error:
            raise InputError(
                f"{str(error).rstrip('.')}; put tokenizer.json (or tokenizer.model) and"
                " tokenizer_config.json there."
            ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"The tokenizer of {folder} ({type(tokenizer).__name__}) gives no character offsets;"
            " put a tokenizer.json into the folder."
        )
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


_VOCABULARIES = ("vocab.json", "tekken.json")
_NOT_ITS = ("config.json", "generation_config.json", "preprocessor_config.json")


def _from_hub(name: str) -> Path:
    """The folder in the local cache that holds a repository's tokenizer."""
    from huggingface_hub import constants, get_session, snapshot_download

    wanted = [*_FILES, *_MORE_FILES]
    with contextlib.suppress(OSError, ValueError):  # not in the cache
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if any(folder.glob("tokenizer*")):
            return folder
    try:
        # One short try first: without it, five retries of each file take most of a minute.
        get_session().head(constants.ENDPOINT, timeout=10)
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the connection's, the hub's and the files' own errors
        raise InputError(
            f"Cannot load the tokenizer {name}: it is neither a folder nor in the local cache, and"
            f" the Hugging Face hub does not give it ({first_line(error)}). Check the name and"
            " the connection, or download it elsewhere and give the folder."
        ) from error


@contextlib.contextmanager
def told(what: str, fault: str) -> Iterator[None]:
    """What the tokenizer libraries raise, as a sentence; panics of their Rust code included."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic is no Exception
        raise InputError(f"{what} {fault} ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The gist of an exception, to be part of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]
