"""Clusters of latents: the autoencoder's loss is the evidence bound, and chance is its own."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.evals._latent import Course, FeatureVAE, latent_means
from pipeline.evals.latent_clustering import Config, LatentClustering
from tests.unit.evals.clusterings import finds_classes_far_apart, points, refuses_more_clusters_than_samples


def test_the_autoencoders_loss_is_the_evidence_bound():
    torch.manual_seed(0)
    model, x, noise = FeatureVAE(5, 7, 2), torch.randn(6, 5), torch.randn(6, 2)
    mean, log_variance = model.encoder(x).chunk(2, dim=1)
    latent = torch.distributions.Normal(mean, (log_variance / 2).exp())
    output = torch.distributions.Normal(model.decoder(mean + noise * latent.stddev), 1.0)
    divergence = torch.distributions.kl_divergence(latent, torch.distributions.Normal(0.0, 1.0)).sum(1)
    constant = torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(())) * 5
    expected = (-output.log_prob(x).sum(1) + constant + 3 * divergence).mean()
    torch.testing.assert_close(model.loss(x, noise, 3.0), expected)


def test_latents_are_the_same_again_and_leave_the_generator_alone():
    course = Course(2, 8, 1.0, 20, 16, 1e-3, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = latent_means(points(), course)
    assert torch.equal(torch.rand(1), expected)
    np.testing.assert_array_equal(latent_means(points(), course), first)
    assert not np.allclose(latent_means(points(), course._replace(seed=2)), first)


def test_clusters_of_classes_far_apart_are_the_classes(lone_group):
    finds_classes_far_apart(LatentClustering(Config(steps=600, latent=4)), "latent_clustering")


def test_more_clusters_than_samples_are_refused(lone_group):
    refuses_more_clusters_than_samples(LatentClustering(Config(clusters=50)), "latent_clustering")
