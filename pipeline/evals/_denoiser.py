"""Diffusion models among what makes images."""

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext
from pipeline.nn.diffusion.model import Generator


def denoiser_of(ctx: EvalContext) -> Generator:
    """The generator, which must be a diffusion model.

    Raises:
        ConfigError: it is something else.
    """
    generator = ctx.encoders["generator"]
    if not isinstance(generator, Generator):
        raise ConfigError("this evaluation measures diffusion models, and the run has trained something else")
    return generator
