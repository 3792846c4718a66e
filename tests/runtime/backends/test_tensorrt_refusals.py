"""What a TensorRT session refuses: steps, plans, and hosts that cannot run it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends import tensorrt
from runtime.backends.plan_validity import explain
from runtime.backends.tensorrt import TrtSession
from runtime.system import host
from tests.support import tiny
from tests.support.device_session import (
    FLOAT32,
    RING,
    SPEC,
    check_decoder,
    full_ring,
    open_plan,
)

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'mistralc[rtx]'")
pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[rtx]'")

from tests.support.fake_gpu import FakeTrt, fake_tensorrt

ROOT = Path(__file__).resolve().parents[3]


def step(session: TrtSession, position: int, count: int = 1) -> Any:
    ids = tiny.tokens(SPEC, count)[None]
    return session.step(ids, np.arange(position, position + count)[None], np.array([[count - 1]]))


@pytest.mark.parametrize(("first", "count"), [(4, 3), (5, 2), (17, 2)])
def test_a_step_across_the_rings_end_is_refused_and_writes_nothing(
    session: TrtSession, fake: FakeTrt, first: int, count: int
):
    fake.cudart.calls.clear()
    with pytest.raises(MistralcError, match="the end is crossed"):
        step(session, first, count)
    assert not fake.cudart.calls


def test_a_ring_that_differs_from_the_plans_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"shape of past_key\.0 in the plan is .*6.*export"):
        open_plan(plan, ring=RingSpec(chunk=5, context=1))


def test_a_chunk_that_no_profile_covers_is_refused(fake: FakeTrt, plan: Path):
    fake.profiles = [(1, 2)]
    with pytest.raises(
        MistralcError, match=r"1 rows and steps of 1 to 3 tokens.*rows 1 to 1, tokens 1 to 2"
    ):
        open_plan(plan)
    assert not fake.cudart.live


def test_a_batch_that_no_profile_covers_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"for 2 rows.*than --max-batch"):
        open_plan(plan, batch=2)


def test_each_context_uses_its_own_profile(fake: FakeTrt, plan: Path):
    fake.profiles = [(1, 1), (1, 3)]
    with open_plan(plan) as session:
        assert [context.profile for context in fake.engines[0].contexts] == [0, 1]
        check_decoder(session, SPEC, RING, FLOAT32)


def test_a_plan_whose_caches_are_copied_is_refused(fake: FakeTrt, plan: Path):
    fake.separate = True
    with pytest.raises(
        MistralcError, match=r"memory of present_key\.0 in the plan is its own; past_key\.0"
    ):
        open_plan(plan)


def test_a_plan_of_another_type_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"type of past_key\.0 in the plan is .*FLOAT; .*HALF"):
        open_plan(plan, activation="float16")


def test_a_damaged_plan_is_refused_with_tensorrts_verdict(fake: FakeTrt, tmp_path: Path):
    path = tmp_path / "engine.plan"
    path.write_bytes(b"damaged")
    with pytest.raises(MistralcError, match=r"\(7 bytes\): it is damaged .*Copy the bundle again"):
        open_plan(path)
    assert not fake.cudart.live


@pytest.mark.parametrize(
    ("diagnostics", "words"),
    [
        ([], r"Magic tag does not match\. Copy the bundle again"),
        (["VERSION_MISMATCH"], r"another version of TensorRT built it\. .*or install the version"),
        (["UNSUPPORTED_CC"], r"GPUs of another compute capability\. Export the checkpoint again"),
        (["OLD_CUDA_DRIVER"], r"driver is older than the plan needs\. Update the NVIDIA driver"),
    ],
)
def test_a_refused_plan_is_explained_by_the_verdict_or_by_tensorrts_log(
    fake: FakeTrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diagnostics: Any, words: str
):
    verdict = explain("INVALID", diagnostics)
    monkeypatch.setattr(tensorrt, "validity", lambda *_: verdict)
    path = tmp_path / "engine.plan"
    path.write_bytes(b"damaged")
    with pytest.raises(MistralcError, match=words):
        open_plan(path)


def test_a_plan_larger_than_the_free_memory_is_refused(plan: Path):
    with fake_tensorrt(SPEC, RING, total=5000) as fake:
        fake.refuse = True
        with pytest.raises(MistralcError, match=r"no room for the weights and the ring: [\d,]+"):
            open_plan(plan)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_plan_is_refused(tmp_path: Path, *, exists: bool):
    path = tmp_path / "engine.plan"
    if exists:
        path.touch()
    with pytest.raises(MistralcError, match=r"missing or empty.*Copy the bundle again"):
        open_plan(path)


def test_resize_accepts_the_full_capacities_only(session: TrtSession):
    session.resize(full_ring(SPEC, RING).capacities)
    with pytest.raises(MistralcError, match="does not change"):
        session.resize({4: 3, 16: 3})


def run_without(module: str, plan: Path) -> str:
    """The error of opening a session in a process that cannot import `module`."""
    program = f"""
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from graphs.contract import GraphContract
from graphs.errors import MistralcError
from graphs.spec import RingSpec
from graphs.targets import TARGETS
from runtime.backends.tensorrt import TrtSession
from tests.support.make_checkpoint import tiny_spec
ring = RingSpec(chunk=3, context=9)
contract = GraphContract(spec=tiny_spec(), ring=ring, activation="float16")
try:
    TrtSession(Path({str(plan)!r}), contract, TARGETS["rtx"])
except MistralcError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_without_tensorrt_the_error_names_the_extra_to_install(plan: Path):
    assert "pip install 'mistralc[rtx]'" in run_without("tensorrt_rtx", plan)


def test_without_cuda_bindings_the_error_names_the_extra_to_install(plan: Path):
    message = run_without("cuda", plan)
    assert "cuda.bindings.runtime" in message
    assert "pip install 'mistralc[rtx]'" in message


@pytest.mark.skipif(host.cuda().problem is None, reason="there is a GPU")
def test_without_a_gpu_the_error_suggests_the_cpu_target(plan: Path):
    with pytest.raises(MistralcError, match=r"needs an NVIDIA GPU, and here .*--target cpu"):
        open_plan(plan, activation="float16")


def test_a_driver_that_is_too_old_is_reported(monkeypatch: pytest.MonkeyPatch, plan: Path):
    if host.cuda().problem is None:
        pytest.skip("there is a driver")
    monkeypatch.setattr(host, "cuda", lambda: host.Cuda(version=(11, 8)))  # cudart finds no driver
    with pytest.raises(MistralcError, match=r"failed in cuda\w+: .*Install a driver for CUDA 13"):
        open_plan(plan, activation="float16")
