"""Fixtures for TensorRT sessions on the fake GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from runtime.backends.tensorrt import TrtSession
from tests.support import tiny
from tests.support.device_session import RING, SPEC, open_plan

if TYPE_CHECKING:
    from tests.support.fake_gpu import FakeTrt


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "plan" for the fake GPU: an ONNX model."""
    path = tmp_path_factory.mktemp("fake") / "engine.plan"
    path.write_bytes(tiny.model_bytes(SPEC, "cpu"))
    return path


@pytest.fixture
def fake() -> Iterator["FakeTrt"]:
    """The fake TensorRT, in place of the real one."""
    from tests.support.fake_gpu import fake_tensorrt  # skips the test without CUDA's bindings

    with fake_tensorrt(SPEC, RING) as module:
        yield module


@pytest.fixture(params=["rtx", "tensorrt"])
def session(request: pytest.FixtureRequest, fake: "FakeTrt", plan: Path) -> Iterator[TrtSession]:
    """A session of either TensorRT on the fake GPU."""
    with open_plan(plan, request.param) as opened:
        yield opened
