"""Fixtures of the tests of data_prep."""

import os

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)  # a busy machine is no bug
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """What survives a loss of power cannot be tested here, and waiting for it takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
