"""The mathematics of denoising diffusion: noise levels, parametrisations, weights, samplers, likelihood."""
