"""LLaVA-Mini in JAX: images and videos as one token each for a language model.

    import llava_mini_jax

    model = llava_mini_jax.load("path/of/a/model")
    model.generate("What is this?", images=["cat.jpg"])

    session = llava_mini_jax.Session(model)  # a conversation; videos of any length
    session.show_video("safari.mp4")
    for piece in session.ask("What happens?"):
        print(piece, end="")

The stable interface is `load`, `Model` and `Session`; their arguments `Turn` (of a conversation),
`Settings` (of an answer), `FrameSampling` (of a video) and `Budget` (of a session); and
`InputError`, which is raised for input that cannot be used. Everything else may change between
versions, also names without an underscore.

Array names end in the letters of their dimensions, and einsum strings use the same letters:

    B  batch rows                       N  heads
    I  images or frames of a row        K  key/value heads
    J  parts of an image                G  query heads of a key/value head, N / K
    P  patches of a part                H  width of a head
    Q  compressed tokens of an image    D  width of the language model
    T  text, or query positions         E  width of the vision tower
    S  sequence, or key positions       M  width of an MLP
    L  layers                           V  vocabulary
                                        Y X C  rows, columns and colours of pixels
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_mini_jax.data.media.video import FrameSampling
    from llava_mini_jax.data.text.templates import Turn
    from llava_mini_jax.errors import InputError
    from llava_mini_jax.inference.answer import Settings
    from llava_mini_jax.inference.model import Model, load
    from llava_mini_jax.inference.session import Session
    from llava_mini_jax.inference.shelf import Budget

    __version__: str

__all__ = [
    "Budget",
    "FrameSampling",
    "InputError",
    "Model",
    "Session",
    "Settings",
    "Turn",
    "__version__",
    "load",
]

_HOMES = {
    "Budget": "inference.shelf",
    "FrameSampling": "data.media.video",
    "InputError": "errors",
    "Model": "inference.model",
    "Session": "inference.session",
    "Settings": "inference.answer",
    "Turn": "data.text.templates",
    "load": "inference.model",
}


def __getattr__(name: str) -> Any:
    """Public names on first use: importing the package alone imports neither jax nor anything."""
    if name == "__version__":
        from importlib.metadata import version

        return version("llava-mini-jax")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
