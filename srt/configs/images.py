"""How a checkpoint wants images: sizes of views, features a view, pixel normalisation. Read by tokenizer and worker."""

from __future__ import annotations

from typing import Final

from srt.configs.plan import ImageConfig
from srt.configs.section import Section
from srt.configs.step3p7 import ImageTokens, VisionConfig
from srt.errors import StartupError

CROP_SIZE: Final = 504
MAX_SIZE: Final = 3024
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
STD: Final = (0.26862954, 0.26130258, 0.27577711)
"""What the published releases were trained with; preprocessor_config.json may say otherwise."""
DOWNSAMPLERS: Final = 2


def features_of(size: int, patch_size: int) -> int:
    """Features that the tower makes of a square view: the grid of patches is halved twice, rounding up."""
    side = size // patch_size
    for _ in range(DOWNSAMPLERS):
        side = -(-side // 2)
    return side * side


def read_images(vision: VisionConfig, tokens: ImageTokens, processor: Section) -> ImageConfig:
    """Join config.json and preprocessor_config.json (empty where the checkpoint has none).

    Raises: StartupError if they contradict each other, or ask for what is not implemented.
    """
    for name, served in {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 2,
        "vision_patch_size": vision.patch_size,
        "downsampler_stride": 2**DOWNSAMPLERS,
    }.items():
        processor.demand(name, served)
    config = ImageConfig(
        image_token_id=tokens.image_token_id,
        view_size=_square(processor, vision.image_size),
        view_tokens=tokens.image_tokens,
        crop_size=processor.integer("patch_size", default=CROP_SIZE),
        crop_tokens=tokens.crop_tokens,
        max_size=processor.integer("max_image_size", default=MAX_SIZE),
        mean=_channels(processor, "image_mean", MEAN),
        std=_channels(processor, "image_std", STD),
    )
    for what, size, count in (
        ("image_token_len", config.view_size, config.view_tokens),
        ("patch_token_len", config.crop_size, config.crop_tokens),
    ):
        made = features_of(size, vision.patch_size)
        if size % vision.patch_size or made != count:
            raise StartupError(
                f"config.json.{what} is {count}, but a view of {size} pixels gives {made} features "
                f"with patches of {vision.patch_size} pixels"
            )
    return config


def _square(processor: Section, image_size: int) -> int:
    """`size`, which must be that of the tower's position table."""
    size = processor.maybe_section("size")
    for side in ("height", "width"):
        if size is not None:
            size.demand(side, image_size)
    return image_size


def _channels(processor: Section, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = tuple(processor.numbers(name)) or default
    if len(values) != 3:
        raise processor.wrong(name, list(values), "three numbers")
    return values
