"""The one constructor of image encoders: what every objective needs of an encoder, so that none can forget a part.

Here come together: the timm backbone, drop path that belongs to the sample, batch norm over all ranks, the weights that
it starts from, and uint8 images in front. What is not decayed and which layer follows which, the encoder then tells.
"""

from __future__ import annotations

from typing import Any

from pipeline.nn.batch_norm import synchronise
from pipeline.nn.dropout import drop_per_sample
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, Pool, create_backbone
from pipeline.nn.images import Normalize
from pipeline.nn.projection import small_stem
from pipeline.nn.start import Start
from pipeline.nn.weights import load_encoder

CHOSEN = {"weight_init", "zero_init_last"}
"""Arguments of timm's models that are about initial weights."""


def construct_encoder(
    config: EncoderConfig,
    image_size: tuple[int, int],
    name: str,
    *,
    start: Start | None,
    pool: Pool = "native",
    stem_of_small_images: bool = False,
    norm_over_ranks: bool = True,
    **fixed: Any,
) -> ImageEncoder:
    """An encoder that is ready for training.

    Args:
        config: backbone, channels, and weights to start from.
        image_size: height and width of the images.
        name: of the objective; the random numbers of dropout belong to it.
        start: draws the initial weights as the method's authors did; None leaves them as timm draws them, and so do
            ``weight_init`` and ``zero_init_last`` among the config's ``encoder_args``, with which the user chooses.
        pool: how the backbone's output becomes one vector per image.
        stem_of_small_images: give a ResNet the stem for images of 32 pixels.
        norm_over_ranks: batch norm takes the statistics of the micro-batches of all ranks, without which neither loss
            nor gradient is that of the global batch; False is for methods that need it otherwise.
        fixed: arguments of ``timm.create_model`` that the objective decides, so that the user may not.

    Raises:
        ConfigError: the backbone cannot be built so, or does not see all of an image of this size.
        CheckpointError: the weights are unreadable, or of another model.
    """
    backbone = create_backbone(config, image_size, **fixed)
    drop_per_sample(backbone, name)
    if stem_of_small_images:
        small_stem(backbone, len(config.mean))
    if start is not None and not CHOSEN & config.encoder_args.keys():
        start(backbone)
    if norm_over_ranks:
        synchronise(backbone)
    if config.weights:
        load_encoder(backbone, config.weights, antialias=config.antialias)
    return ImageEncoder(Normalize(config.mean, config.std), backbone, pool)
