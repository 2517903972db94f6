"""What a folder says about its images' way to pixels: CLIP's steps or SigLIP's, or a refusal.

    processor_config.json  (transformers 5: everything under "image_processor")  --.
    preprocessor_config.json                                                      --+--> Processor

The steps that are supported are CLIP's: shortest side to `size` with a bicubic or bilinear filter,
centre crop to the same size, numbers between 0 and 1, mean and deviation; before them, if LLaVA's
own image processor says `do_pad`, a square canvas of the mean colour. SigLIP's have no crop: both
sides become `size`, which squeezes an image that is no square. Field names: transformers 5.24.
"""

import dataclasses
from pathlib import Path
from typing import Any

from llava_mini_jax.backbones import SIGLIP_MEAN, SIGLIP_STD
from llava_mini_jax.data.media.images import CLIP_MEAN, CLIP_STD, FILTERS, ImageConfig
from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.weights.hf_fields import words

FILES = ("processor_config.json", "preprocessor_config.json")
_CLIP_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor")
_LLAVA_PROCESSORS = ("LlavaImageProcessor",)
_SIGLIP_PROCESSORS = ("SiglipImageProcessor",)
_HARMLESS = words(
    """
    processor_class data_format input_data_format device return_tensors disable_grouping
    image_seq_length num_image_tokens patch_size image_token chat_template
    num_additional_image_tokens vision_feature_select_strategy backend use_fast
    _valid_processor_keys _processor_class
    """
)


@dataclasses.dataclass(frozen=True)
class Processor:
    size: int | None  # side in pixels; None: the tower's, for a folder that says nothing
    pad: bool  # images are padded to squares first (LLaVA's own processor)
    squeezes: bool  # images that are no squares lose their shape
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str


OPENAI_CLIP = Processor(
    size=None, pad=False, squeezes=False, mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic"
)


def read_processor(*folders: Path | None) -> Processor:
    """The processor of the first folder that has one; OpenAI CLIP's if none has.

    Raises InputError for steps that are not supported, and for two files that disagree.
    """
    for folder in folders:
        if folder is None:
            continue
        found = {}
        for path in (folder / name for name in FILES):
            values = read_json(path) if path.is_file() else {}
            if path.name == "processor_config.json":
                # Before 5.0 this file held only what belongs to the prompt.
                values = Fields(values, str(path)).object("image_processor") or {}
            if values:
                found[path.name] = processor_of(values, str(path))
        if len(set(found.values())) > 1:
            raise InputError(
                f"{folder}: {' and '.join(FILES)} treat images differently"
                f" ({', '.join(map(str, found.values()))}); remove the wrong one"
            )
        if found:
            return next(iter(found.values()))
    return OPENAI_CLIP


def processor_of(values: dict[str, Any], where: str) -> Processor:
    """The Processor of one file's fields."""
    f = Fields(values, where)
    kind = f.get("image_processor_type", str, f.get("feature_extractor_type", str, "CLIP"))
    name = kind.removesuffix("Fast").removesuffix("Pil")  # the same steps on another library
    known = (*_CLIP_PROCESSORS, *_LLAVA_PROCESSORS, *_SIGLIP_PROCESSORS)
    if name not in (*known, "CLIP"):
        flexible = " (NaFlex: as many patches as an image needs)" if "Siglip2" in name else ""
        raise InputError(
            f'{where}: image_processor_type "{kind}"{flexible} is not supported; use one of'
            f" {', '.join(known)}"
        )
    siglip = name in _SIGLIP_PROCESSORS
    _refuse_other_steps(f, siglip)
    pad = f.get("do_pad", bool, False)
    if pad and name not in _LLAVA_PROCESSORS:
        raise InputError(f'{where}: "do_pad" is true for {kind}; only LLaVA\'s processors pad')
    size, squeezes = _side(f, "size"), siglip or _is_pair(f, "size")
    if siglip and f.values.get("size") is not None and not _is_pair(f, "size"):
        raise f.wrong("size", 'both sides in pixels, such as {"height": 384, "width": 384}')
    if not siglip and size != (crop := _side(f, "crop_size")):
        raise InputError(
            f"{where}: crop_size {crop} with size {size}; only a crop to the same size is supported"
        )
    mean = _colours(f, "image_mean", SIGLIP_MEAN if siglip else CLIP_MEAN)
    std = _colours(f, "image_std", SIGLIP_STD if siglip else CLIP_STD)
    if min(std) <= 0:
        raise f.wrong("image_std", "three numbers above 0")
    # PIL's numbers, which the files hold.
    filters = {int(number): name for name, number in FILTERS.items()}
    f.only("resample", *filters, because="images are resized with another filter")
    resample = filters[f.values.get("resample") or int(FILTERS["bicubic"])]
    f.finish(_HARMLESS)
    return Processor(size=size, pad=pad, squeezes=squeezes, mean=mean, std=std, resample=resample)


def _refuse_other_steps(f: Fields, siglip: bool) -> None:
    """Fields with which images go another way than CLIP's, or SigLIP's."""
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        f.only(step, True, because="a step of CLIP's is left out")
    if siglip:
        f.only("do_center_crop", False, because="images are cropped, which SigLIP's are not")
        f.only("crop_size", because="images are cropped, which SigLIP's are not")
        f.only("default_to_square", False, True, because="")  # both sides are said: no effect
    else:
        f.only("do_center_crop", True, because="a step of CLIP's is left out")
        f.only("default_to_square", False, because="images are squeezed to squares")
        f.only("use_square_size", False, because="images are squeezed to squares")
    f.only("rescale_factor", 1 / 255, because="pixels are scaled by another factor")
    f.only("crop_pct", because="images are cropped before they are resized")
    f.only("pad_size", because="images are padded to a given size")
    f.only("size_divisor", because="sides are rounded to a multiple")


def image_config(config: Fields, processor: Processor, size: int) -> ImageConfig:
    """The image settings of a model of the release's or LLaVA's format, for a tower of `size`.

    Of config.json, `image_aspect_ratio` ("pad", or "square" for a centre crop, the default of
    LLaVA's training) and `resolution_ratio` are read. Raises InputError for any other value, such
    as LLaVA-NeXT's "anyres", "highres" and "crop_split", which cut images into parts.
    """
    aspect = config.get("image_aspect_ratio", str, "square")
    if aspect not in ("pad", "square"):
        raise InputError(
            f"{config.where} asks for image_aspect_ratio {aspect!r}, which LLaVA-Mini models do not"
            ' use; set it to "pad" or "square", and resolution_ratio to 2 for high resolution.'
        )
    pad = aspect == "pad"
    if processor.pad and not pad:
        raise InputError(
            f'{config.where}: image_aspect_ratio is "{aspect}", but the image processor pads'
            " (do_pad); correct one of them"
        )
    return image_settings(processor, size, pad=pad, grid=config.size("resolution_ratio", 1))


def image_settings(processor: Processor, size: int, *, pad: bool, grid: int) -> ImageConfig:
    """ImageConfig of these; a processor for another size than the tower's is refused."""
    if processor.size not in (None, size):
        raise InputError(
            f"the image processor makes images of {processor.size} pixels, but the tower takes"
            f" {size}; use the tower's own preprocessor_config.json"
        )
    aspect = "squeeze" if processor.squeezes else "crop"
    return ImageConfig(
        size=size,
        aspect="pad" if pad else aspect,
        grid=grid,
        split="split_then_pad",
        repeat_whole=False,
        mean=processor.mean,
        std=processor.std,
        resample=processor.resample,
    )


def _side(f: Fields, name: str) -> int:
    """336 from 336, {"shortest_edge": 336} or {"height": 336, "width": 336}; 224 if absent, as in
    CLIP's image processor."""
    value = f.get(name, object, 224)
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    given = {key: side for key, side in sides.items() if side is not None}
    whole = all(type(side) is int and 0 < side < 2**15 for side in given.values())
    known = set(given) in ({"shortest_edge"}, {"height", "width"})
    if not whole or not known or len(set(given.values())) != 1:
        raise f.wrong(name, 'one side in pixels, such as {"shortest_edge": 336}')
    return next(iter(given.values()))


def _is_pair(f: Fields, name: str) -> bool:
    value = f.values.get(name)
    return isinstance(value, dict) and value.get("height") is not None


def _colours(
    f: Fields, name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = f.get(name, list, list(default))
    numbers = [float(v) for v in value if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) != 3 or len(value) != 3:
        raise f.wrong(name, "three numbers, for red, green and blue")
    return numbers[0], numbers[1], numbers[2]
