"""The same codes and images as diffusers' AutoencoderKL and VQModel, from the files that an export writes."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.protocols import DataFacts
from pipeline.nn.generative.autoencoder import from_diffusers
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
