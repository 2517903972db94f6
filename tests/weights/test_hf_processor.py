"""Processor files: every field that changes pixels is honoured or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD, ImageConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields
from llava_mini_jax.weights.export_json import config_files
from llava_mini_jax.weights.folders import open_model
from llava_mini_jax.weights.hf_processor import (
    OPENAI_CLIP,
    Processor,
    image_config,
    image_settings,
    processor_of,
    read_processor,
)
from tests import tiny
from tests.weights.test_import_export import bundle

# As transformers 4.43 and 5.24 write it.
CLIP_336 = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
READ = Processor(
    size=336, pad=False, squeezes=False, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic"
)


def found(**fields: Any) -> Processor:
    values = {name: value for name, value in (CLIP_336 | fields).items() if value is not ...}
    return processor_of(values, "preprocessor_config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": 336, "crop_size": 336},
        {"image_processor_type": ..., "feature_extractor_type": "CLIPFeatureExtractor"},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": False},
        {"do_pad": None, "pad_size": None, "input_data_format": None, "data_format": "x"},
        {"rescale_factor": 1 / 255, "processor_class": "LlavaProcessor", "do_convert_rgb": None},
    ],
    ids=str,
)
def test_files_that_say_what_clip_does(fields: dict[str, Any]) -> None:
    assert found(**fields) == READ


def test_a_file_without_a_size_means_the_class_default() -> None:
    assert found(size=..., crop_size=...).size == 224


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": 1}, '"resample" is 1'),
        ({"resample": "bicubic"}, '"resample" is'),
        ({"rescale_factor": 1 / 127.5}, '"rescale_factor"'),
        ({"do_center_crop": False}, '"do_center_crop" is False'),
        ({"do_resize": False}, '"do_resize"'),
        ({"do_rescale": False}, '"do_rescale"'),
        ({"do_normalize": False}, '"do_normalize"'),
        ({"do_convert_rgb": False}, '"do_convert_rgb"'),
        ({"crop_size": 224}, "crop_size 224 with size 336"),
        ({"size": {"height": 300, "width": 336}}, '"size".*one side in pixels'),
        ({"size": {"longest_edge": 336}}, '"size".*one side in pixels'),
        ({"size": {"shortest_edge": 336, "longest_edge": 336}}, "one side in pixels"),
        ({"size": {}}, "one side in pixels"),
        ({"size": "big"}, "one side in pixels"),
        ({"size": -3}, "one side in pixels"),
        ({"size": True}, "one side in pixels"),
        ({"do_pad": True}, 'do_pad" is true for CLIPImageProcessor'),
        ({"pad_size": {"height": 400, "width": 400}}, '"pad_size"'),
        ({"image_processor_type": "Siglip2ImageProcessorFast"}, "NaFlex"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "LlavaNextImageProcessor"),
        ({"image_mean": None, "image_std": [1, 1]}, '"image_std".*three numbers'),
        ({"image_mean": 0.5}, '"image_mean"'),
        ({"image_mean": [0.5, 0.5, "0.5"]}, '"image_mean".*three numbers'),
        ({"image_std": [0.5, 0.5, 0.0]}, '"image_std".*above 0'),
        ({"do_flip_channel_order": True}, '"do_flip_channel_order"'),
        ({"use_square_size": True}, '"use_square_size"'),
        ({"auto_map": {"AutoImageProcessor": "x.P"}}, '"auto_map"'),
    ],
    ids=str,
)
def test_steps_that_are_not_supported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        found(**fields)


SIGLIP_384 = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "SiglipProcessor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}


def test_what_siglip_does() -> None:
    half = (0.5, 0.5, 0.5)
    read = Processor(size=384, pad=False, squeezes=True, mean=half, std=half, resample="bilinear")
    assert processor_of(SIGLIP_384, "x") == read
    short = {"image_processor_type": "SiglipImageProcessor"}  # the class's own values
    assert processor_of(short, "x") == dataclasses.replace(read, size=224, resample="bicubic")
    assert image_settings(read, 384, pad=False, grid=1).aspect == "squeeze"
    assert image_settings(read, 384, pad=True, grid=1).resample == "bilinear"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_center_crop": True}, '"do_center_crop" is True'),
        ({"crop_size": {"height": 384, "width": 384}}, '"crop_size"'),
        ({"size": {"shortest_edge": 384}}, '"size".*both sides'),
        ({"size": {"height": 384, "width": 512}}, '"size".*one side'),
        ({"rescale_factor": 1 / 127.5}, '"rescale_factor"'),
        ({"do_normalize": False}, '"do_normalize"'),
        ({"max_num_patches": 256}, '"max_num_patches"'),
        ({"resample": 0}, '"resample" is 0'),
    ],
    ids=str,
)
def test_what_siglip_does_not(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        processor_of(SIGLIP_384 | fields, "x")


def write(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(values))


def test_where_a_folder_says_it(tmp_path: Path) -> None:
    assert read_processor(tmp_path, None) == OPENAI_CLIP
    # transformers 5 writes one file, with the image processor inside of it.
    write(
        tmp_path, "processor_config.json", {"image_processor": CLIP_336, "image_token": "<image>"}
    )
    assert read_processor(None, tmp_path) == READ
    # Before, it held what belongs to the prompt, and the other file was all.
    write(tmp_path, "processor_config.json", {"patch_size": 14, "image_token": "<image>"})
    assert read_processor(tmp_path) == OPENAI_CLIP
    write(tmp_path, "preprocessor_config.json", CLIP_336)
    assert read_processor(tmp_path) == READ
    write(tmp_path, "processor_config.json", {"image_processor": CLIP_336})
    assert read_processor(tmp_path) == READ
    other = CLIP_336 | {"image_mean": [0.5, 0.5, 0.5]}
    write(tmp_path, "processor_config.json", {"image_processor": other})
    with pytest.raises(InputError, match="treat images differently"):
        read_processor(tmp_path)
    write(tmp_path, "processor_config.json", {"image_processor": "CLIP"})
    with pytest.raises(InputError, match="expected an object"):
        read_processor(tmp_path)


def settings(processor: Processor = READ, size: int = 336, **config: Any) -> ImageConfig:
    return image_config(Fields(config, "config.json"), processor, size)


def test_image_settings_of_llava_folders() -> None:
    padded = ImageConfig(
        size=336,
        aspect="pad",
        grid=2,
        split="split_then_pad",
        repeat_whole=False,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resample="bicubic",
    )
    assert settings(image_aspect_ratio="pad", resolution_ratio=2) == padded
    assert settings(image_aspect_ratio="square").aspect == settings().aspect == "crop"
    assert settings(OPENAI_CLIP, size=224).size == 224
    for config, message in (
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"image_aspect_ratio": "highres"}, "highres"),
        ({"image_aspect_ratio": "crop_split"}, "crop_split"),
        ({"image_aspect_ratio": 1}, "expected text"),
        ({"resolution_ratio": -1}, "resolution_ratio"),
        ({"resolution_ratio": [2]}, "resolution_ratio"),
    ):
        with pytest.raises(InputError, match=message):
            settings(**config)
    with pytest.raises(InputError, match="images of 336 pixels, but the tower takes 224"):
        settings(size=224)


def test_padding_and_squeezing_must_agree_with_the_model() -> None:
    llava = found(image_processor_type="LlavaImageProcessor", do_pad=True)
    assert settings(llava, image_aspect_ratio="pad").aspect == "pad"
    with pytest.raises(InputError, match="do_pad"):
        settings(llava, image_aspect_ratio="square")
    squeezing = found(size={"height": 336, "width": 336})
    assert settings(squeezing, image_aspect_ratio="pad").aspect == "pad"  # squares stay squares
    # As CLIP's class does it: both sides to 336, whatever the image's shape.
    assert image_settings(squeezing, 336, pad=False, grid=1).aspect == "squeeze"


@pytest.mark.parametrize("aspect", ["pad", "crop", "squeeze"])
@pytest.mark.parametrize("format", ["llava-hf", "llava-1.5"])
def test_an_export_says_whether_pictures_are_padded(
    tmp_path: Path, format: str, aspect: str
) -> None:
    given = bundle(tiny.model("llava-1.5"))
    images = dataclasses.replace(given.images, aspect=aspect, resample="bilinear")
    given = dataclasses.replace(given, images=images)
    for name, values in config_files(given, format).items():
        write(tmp_path, name, values)
    tensor = {"model.vision_tower.vision_tower.x": np.ones(1)}
    save_file(tensor, tmp_path / "model.safetensors")
    found, _ = open_model(tmp_path, compute_dtype="float32")
    assert (found.images.aspect, found.images.resample) == (aspect, "bilinear")
    assert found.model.vision.resample == "bilinear"
