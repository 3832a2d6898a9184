"""The same codes and images as diffusers' AutoencoderKL and VQModel, from the files that an export writes."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.protocols import DataFacts
from pipeline.nn.generative.autoencoder import from_diffusers
from pipeline.nn.generative.frozen import FrozenAutoencoder, FrozenConfig
from pipeline.objectives import vq_vae
from pipeline.objectives.vae import VAE, Config
from pipeline.run.export import write

diffusers = pytest.importorskip("diffusers", reason="make parity installs it")

NETWORK = {"channels": 16, "multipliers": (1, 2, 2), "blocks": 2, "groups": 8, "latent": 4}


@pytest.mark.parametrize("attention", [True, False])
def test_an_export_is_loaded_strictly_and_says_the_same(tmp_path, attention):
    torch.manual_seed(0)
    model = VAE(Config(network=NETWORK | {"attention": attention}), DataFacts((32, 32), ())).eval()
    for name, export in model.exports().items():
        write(tmp_path / name, export)
    peer, loading = diffusers.AutoencoderKL.from_pretrained(tmp_path / "diffusers/vae", output_loading_info=True)
    assert not any(loading.values()), loading
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        own, other = model.posterior(image), peer.encode(image.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(own.mean, other.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(2 * own.log_std, other.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.kl().sum(dim=(1, 2, 3)), other.kl(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.model.decode(own.mean), peer.decode(other.mean).sample, rtol=1e-4, atol=1e-5)
    model.model.load_state_dict(from_diffusers(peer.state_dict()))


def test_codes_are_those_of_vq_model(tmp_path):
    torch.manual_seed(0)
    model = vq_vae.VQVAE(vq_vae.Config(network=NETWORK, codes=50), DataFacts((32, 32), ())).eval()
    for name, export in model.exports().items():
        write(tmp_path / name, export)
    peer, loading = diffusers.VQModel.from_pretrained(tmp_path / "diffusers/vqvae", output_loading_info=True)
    assert not any(loading.values()), loading
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        x, own = model.encode(image)
        latents = peer.encode(image.float() / 127.5 - 1).latents
        torch.testing.assert_close(x, latents, rtol=1e-4, atol=1e-5)
        found, _, (_, _, index) = peer.quantize(latents)
        assert torch.equal(index.flatten(), own.index.flatten())
        torch.testing.assert_close(model.model.decode(own.z), peer.decode(latents).sample, rtol=1e-4, atol=1e-5)
    assert found.shape == own.z.shape


@pytest.mark.parametrize("kind", ["vae", "vq_vae"])
def test_a_frozen_autoencoder_is_read_from_diffusers_own_file(tmp_path, kind):
    torch.manual_seed(0)
    config = FrozenConfig(kind=kind, weights=str(tmp_path), network=NETWORK)
    settings = {
        "block_out_channels": (16, 32, 32), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    }  # fmt: skip
    peer = (
        diffusers.AutoencoderKL(**settings) if kind == "vae" else diffusers.VQModel(num_vq_embeddings=512, **settings)
    )
    peer.eval().save_pretrained(tmp_path)
    own = FrozenAutoencoder(config, (3, 32, 32))
    own.fill(str(tmp_path / "diffusion_pytorch_model.safetensors"))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        coded = peer.encode(image.float() / 127.5 - 1)
        latents = coded.latent_dist.mean if kind == "vae" else coded.latents
        decoded = peer.decode(latents).sample
    torch.testing.assert_close(own.latents(image, None), latents, rtol=1e-4, atol=1e-5)
    expected = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    assert (own.image(latents).float() - expected).abs().max() <= 1
