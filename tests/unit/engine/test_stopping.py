"""A rank that is asked to stop: by signals, by the stop file, or by several of them at once."""

from __future__ import annotations

import signal

import pytest

from pipeline.engine.stopping import STOP_SIGNALS, StopRequest


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
