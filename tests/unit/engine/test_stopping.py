"""A rank that is asked to stop: by signals, by the stop file, or by several of them at once."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.core.files import stamp
from pipeline.engine.stopping import OLD_STOP, STOP_SIGNALS, StopRequest


@pytest.fixture
def request_to_stop(tmp_path):
    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopRequest(tmp_path)
    stop.listen()
    yield stop
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_each_signal_is_a_request_and_names_itself(number, request_to_stop):
    assert not request_to_stop.asked()
    signal.raise_signal(number)
    assert request_to_stop.asked() and request_to_stop.reason == number.name


def test_ctrl_c_twice_interrupts_at_once(request_to_stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, None])
def test_ctrl_c_once_saves_although_the_request_came_another_way_as_well(first, request_to_stop, tmp_path):
    """As from ``scancel --full --signal=INT``, for which the agent puts down the stop file."""
    if first is None:
        (tmp_path / "stop").touch()
    else:
        signal.raise_signal(first)
    assert request_to_stop.asked()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:  # would end the tests
        pytest.fail("the rank does not save")
    assert request_to_stop.asked()


def test_what_an_earlier_start_was_asked_is_forgotten_but_not_what_this_one_was(tmp_path, monkeypatch):
    (tmp_path / "stop").touch()
    StopRequest(tmp_path).forget_old()
    assert not (tmp_path / "stop").exists()

    (tmp_path / "stop").touch()
    monkeypatch.setenv(OLD_STOP, stamp(tmp_path / "stop") or "")
    os.utime(tmp_path / "stop", ns=(1, 2))  # asked again, between the launcher's start and the rank's
    stop = StopRequest(tmp_path)
    stop.forget_old()
    assert stop.asked() and (tmp_path / "stop").exists()

    monkeypatch.setenv(OLD_STOP, "none")
    StopRequest(tmp_path).forget_old()
    assert (tmp_path / "stop").exists()
