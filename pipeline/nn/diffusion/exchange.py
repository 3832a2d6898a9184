"""A U-Net and its noise levels in the layout of diffusers' ``UNet2DModel`` and ``DDPMScheduler``, or why not.

Nothing of diffusers is imported: names and settings are those that its 0.42 reads from files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Export
from pipeline.nn.convolution import Conv
from pipeline.nn.diffusion.levels import TIME_SCALE
from pipeline.nn.diffusion.model import Denoiser
from pipeline.nn.diffusion.process import Discrete, Process
from pipeline.nn.diffusion.samplers import Variance
from pipeline.nn.unet import Norm, ResBlock, Step, UNet

PREDICTION = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}
VARIANCE = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}


def check(denoiser: Denoiser, process: Process) -> tuple[UNet, Discrete]:
    """Whether diffusers can hold the model.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    net = denoiser.network
    if not isinstance(net, UNet):
        raise ConfigError("UNet2DModel is a U-Net; this network is a transformer")
    groups = {m.num_groups for m in net.modules() if isinstance(m, Norm)}
    for wrong, reason in (
        (denoiser.reader is not None, "UNet2DModel is told no text, and other U-Nets attend to it in other blocks"),
        (net.config.embedding != "sinusoidal", "its Fourier features are of the logarithm of the time"),
        (net.config.resample != "conv", "its blocks that resample have no skip connection of their own"),
        (len(groups) > 1, f"its norms all have one number of groups; these have {sorted(groups)}"),
        (denoiser.target not in PREDICTION, "it has no input scaling of EDM"),
    ):
        if wrong:
            raise ConfigError(f"diffusers cannot hold this model: {reason}")
    if not isinstance(process, Discrete):
        raise ConfigError("diffusers cannot hold this model: its schedule is continuous")
    if len(process.levels) != TIME_SCALE:
        raise ConfigError(
            f"diffusers cannot hold this model: it tells the network the number of the step, and of "
            f"{len(process.levels)} steps that is not a time out of {TIME_SCALE:g}"
        )
    return net, process


def offered(denoiser: Denoiser, process: Process, shape: tuple[int, int, int], variance: Variance) -> dict[str, Export]:
    """The files, which diffusers reads as a folder, or why there are none; ``shape``: C, H, W of what is diffused."""
    weights = "diffusers/unet/diffusion_pytorch_model.safetensors"
    try:
        net, discrete = check(denoiser, process)
    except ConfigError as error:
        return {weights: Export(None, f"not written: {error}")}
    return {
        weights: Export(unet_weights(net), "diffusers.UNet2DModel.from_pretrained('FOLDER/unet')"),
        "diffusers/unet/config.json": Export(
            json.dumps(unet_settings(net, shape[1:], shape[0]), indent=2), "its configuration"
        ),
        "diffusers/scheduler/scheduler_config.json": Export(
            json.dumps(scheduler_settings(denoiser, discrete, variance)),
            "diffusers.DDPMScheduler.from_pretrained('FOLDER/scheduler')",
        ),
    }


def unet_settings(net: UNet, image_size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Arguments of ``UNet2DModel``."""
    config = net.config
    heights = [image_size[0] >> level for level in range(len(config.multipliers))]
    attends = ["Attn" if height in config.attention else "" for height in heights]
    return {
        "_class_name": "UNet2DModel",
        "sample_size": list(image_size),
        "in_channels": channels,
        "out_channels": net.conv_out.weight.shape[0],
        "block_out_channels": [m * config.channels for m in config.multipliers],
        "layers_per_block": config.blocks,
        "down_block_types": [f"{a}DownBlock2D" for a in attends],
        "up_block_types": [f"{a}UpBlock2D" for a in reversed(attends)],
        "attention_head_dim": config.head_dim,
        "norm_num_groups": net.norm_out.num_groups,
        "attn_norm_num_groups": net.norm_out.num_groups,
        "norm_eps": net.norm_out.eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": None if net.embedding.label is None else net.embedding.label.num_embeddings,
    }


def scheduler_settings(denoiser: Denoiser, process: Discrete, variance: Variance) -> dict[str, Any]:
    """Arguments of ``DDPMScheduler``; the levels themselves are given, so that every schedule is exact."""
    levels = process.levels
    alpha_bar = levels.a**2
    beta = 1 - alpha_bar / alpha_bar.roll(1).index_fill(0, alpha_bar.new_zeros(1).long(), 1.0)
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(levels),
        "trained_betas": beta.tolist(),
        "prediction_type": PREDICTION[denoiser.target],
        "variance_type": VARIANCE[variance],
        "clip_sample": True,
        "timestep_spacing": "trailing",
    }


def unet_weights(net: UNet) -> dict[str, Tensor]:
    """State of ``UNet2DModel``, by its names."""
    return {name: value.detach().clone() for name, value in _named(net)}


def _named(net: UNet) -> Iterator[tuple[str, Tensor]]:
    yield from _plain("time_embedding.linear_1", net.embedding.time1)
    yield from _plain("time_embedding.linear_2", net.embedding.time2)
    if net.embedding.label is not None:
        yield "class_embedding.weight", net.embedding.label.weight
    yield from _plain("conv_in", net.conv_in)
    last = len(net.config.multipliers) - 1
    for own, module in (*net.down.items(), *net.up.items()):
        side, level, number = own.split("_")
        block = f"{side}_blocks.{level if side == 'down' else last - int(level)}"
        if number in ("half", "twice"):
            yield from _plain(f"{block}.{side}samplers.0.conv", module.conv)  # pyright: ignore[reportArgumentType]
        else:
            yield from _step(block, number, module)
    for number, module in enumerate(net.middle.values()):
        yield from _step("mid_block", str(number), module)
    yield from _plain("conv_norm_out", net.norm_out)
    yield from _plain("conv_out", net.conv_out)


def _step(block: str, number: str, step: nn.Module) -> Iterator[tuple[str, Tensor]]:
    assert isinstance(step, Step)
    yield from _residual(f"{block}.resnets.{number}", step.block)
    if step.attention is None:
        return
    there, own = f"{block}.attentions.{number}", step.attention
    yield from _plain(f"{there}.group_norm", own.norm)
    for name, weight, bias in zip("qkv", own.qkv.weight.chunk(3), own.qkv.bias.chunk(3), strict=True):
        yield f"{there}.to_{name}.weight", weight
        yield f"{there}.to_{name}.bias", bias
    yield from _plain(f"{there}.to_out.0", own.out)


def _residual(there: str, block: ResBlock) -> Iterator[tuple[str, Tensor]]:
    for theirs, module in (
        ("norm1", block.norm1), ("conv1", block.conv1), ("time_emb_proj", block.told), ("norm2", block.norm2),
        ("conv2", block.conv2),
    ):  # fmt: skip
        yield from _plain(f"{there}.{theirs}", module)
    if isinstance(block.shortcut, Conv):
        yield from _plain(f"{there}.conv_shortcut", block.shortcut)


def _plain(name: str, layer: nn.Linear | Conv | Norm) -> Iterator[tuple[str, Tensor]]:
    weight = layer.weight.permute(0, 3, 1, 2) if isinstance(layer, Conv) else layer.weight
    yield f"{name}.weight", weight.contiguous()
    yield f"{name}.bias", layer.bias
