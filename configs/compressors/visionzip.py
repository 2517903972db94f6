"""VisionZip at 54 + 10 tokens, as in its README; its authors tune nothing, or the projector."""

from configs import compared
from llava_mini_jax.models.compressors.visionzip import VisionZipConfig
from llava_mini_jax.training.stages import TrainConfig


def config() -> TrainConfig:
    return compared.stage_2(VisionZipConfig(layer=22, dominant=54, contextual=10))
