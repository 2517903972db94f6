"""The model inside other people's tools, each imported only where the tool is installed; imports
inference and what it stands on.
"""

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval's entry point group `lmms_eval.models` asks for: names and where they live."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    place = "llava_mini_jax.integrations.lmms_eval.LmmsEvalModel"
    return ModelManifest(model_id="llava_mini_jax", simple_class_path=place)
