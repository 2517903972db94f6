"""Keys of clients: everything but a list of open paths needs one, where there are any.

a file, an environment variable --read_keys--> SHA-256 of each
Authorization: Bearer KEY --tenant--> digest of the key: whose memory the request may find
"""

import hashlib
import hmac
import os
from collections.abc import Collection
from pathlib import Path

from llava_mini_jax.errors import InputError
from llava_mini_jax.serving.errors import ApiError

VARIABLE = "LLAVA_MINI_API_KEYS"
_SCHEME = "bearer"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_keys(file: Path | None) -> frozenset[bytes]:
    """Digests of the keys in a file, one a line, and in the environment, between commas.

    Never from arguments, which every process of the machine can read. Raises InputError for a file
    that cannot be read or has no key.
    """
    keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",")]
    if VARIABLE in os.environ and not any(keys):
        raise InputError(f"the environment variable {VARIABLE} has no key; set one, or unset it")
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--api-key-file {file} cannot be read ({error})") from error
        if not any(lines):
            raise InputError(f"--api-key-file {file} has no key; write one a line")
        keys += lines
    for key in keys:
        if not key.isascii() or any(letter.isspace() for letter in key):
            raise InputError(
                "a key has a space or a character beyond ASCII, which no header can hold"
            )
    return frozenset(digest(key) for key in keys if key)


def tenant(authorization: str | None, keys: Collection[bytes]) -> str:
    """Whose request it is; "" where no keys are wanted. ApiError 401 without a right key."""
    if not keys:
        return ""
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != _SCHEME or not key.strip():
        raise ApiError(401, "no API key is given; send the header Authorization: Bearer KEY")
    given = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
    # All of them, always: how long it takes tells nothing.
    found = [hmac.compare_digest(given, known) for known in keys]
    if not any(found):
        raise ApiError(401, "the API key is not known to this server; send another one")
    return given.hex()
