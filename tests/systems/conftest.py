"""Runs of two ranks, started as the fault tests start them."""

from tests.faults.conftest import _server, environment, server  # noqa: F401 - fixtures
