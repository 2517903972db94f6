"""What lmms-eval shows of an item, and how it scores the answer: by its words."""

import base64
import io
from typing import Any

from PIL import Image


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(doc["picture"]))).convert("RGB")]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"same_words": float(results[0].split() == doc["truth"].split())}
