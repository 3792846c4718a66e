"""NVIDIA's libraries are found in every part of the namespace package `nvidia`."""

import ctypes
import os
from pathlib import Path

import pytest

from runtime.backends import nvidia_libraries
from runtime.backends.nvidia_libraries import load_nvidia_libraries, packaged_folders

CUDA = ("libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcurand.so.10")


def install(site: Path, folder: str, *names: str) -> list[Path]:
    """Make files of these names where a package of NVIDIA has its libraries."""
    where = site / "nvidia" / folder / "lib"
    where.mkdir(parents=True)
    for name in names:
        (where / name).touch()
    return [where / name for name in names]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of libraries that the process has; those that are loaded are added."""
    present: list[str] = []

    def load(name: str, mode: int = ctypes.DEFAULT_MODE) -> object:
        if mode & os.RTLD_NOLOAD:
            if name not in present:
                raise OSError(f"{name} is not loaded")
        elif "broken" in name:
            raise OSError(f"{name}: file too short")
        else:
            present.append(Path(name).name)
        return object()

    monkeypatch.setattr(nvidia_libraries.ctypes, "CDLL", load)
    return present


def test_packages_in_several_places_are_searched_nearest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str]
) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    cudnn = install(near, "cudnn", "libcudnn.so.9", "libcudnn_ops.so.9")
    first = install(near, "cu13", "libcudart.so.13")
    rest = install(far, "cu13", *CUDA, "libnccl.so.2")
    old = install(far, "cublas", "libcublas.so.12")
    for place in (far, near):
        monkeypatch.syspath_prepend(place)
    folders = packaged_folders()
    places = [near / "nvidia/cu13/lib", near / "nvidia/cudnn/lib", far / "nvidia/cu13/lib",
              far / "nvidia/cublas/lib"]  # fmt: skip
    assert [folder for folder in folders if folder.is_relative_to(tmp_path)] == places
    monkeypatch.setattr(nvidia_libraries, "packaged_folders", lambda: places)
    found = load_nvidia_libraries("13")
    assert found == [first[0], rest[1], rest[0], rest[3], cudnn[0]], (
        "each once, after what it needs itself; neither another CUDA nor what is not needed"
    )
    assert [path.name for path in found] == loaded
    assert old[0] not in found


def test_what_the_process_has_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str]
) -> None:
    found = install(tmp_path, "cu13", *CUDA)
    monkeypatch.setattr(nvidia_libraries, "packaged_folders", lambda: [found[0].parent])
    loaded += ["libcudart.so.13", "libcublasLt.so.13"]
    assert [path.name for path in load_nvidia_libraries("13")] == ["libcublas.so.13", CUDA[3]]


def test_a_library_that_fails_to_load_is_left_to_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[str]
) -> None:
    found = install(tmp_path / "broken", "cu13", *CUDA)
    monkeypatch.setattr(nvidia_libraries, "packaged_folders", lambda: [found[0].parent])
    assert load_nvidia_libraries("13") == []


def test_without_such_packages_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_libraries.importlib.util, "find_spec", lambda name: None)
    assert load_nvidia_libraries("13") == []
