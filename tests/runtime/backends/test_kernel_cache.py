"""The kernel cache is complete or absent, and losing it is never an error."""

from pathlib import Path

import pytest

from runtime.backends import kernel_cache


def test_a_written_cache_is_read_back(tmp_path: Path):
    path = tmp_path / "deep" / "plan.bin"
    assert kernel_cache.write(path, b"kernels")
    assert kernel_cache.read(path) == b"kernels"
    assert [each.name for each in path.parent.iterdir()] == ["plan.bin"], "no partial file"


@pytest.mark.parametrize("cut", [0, 10, 32, 38])
def test_a_truncated_cache_is_ignored(tmp_path: Path, cut: int):
    path = tmp_path / "plan.bin"
    kernel_cache.write(path, b"kernels")
    path.write_bytes(path.read_bytes()[:cut])
    assert kernel_cache.read(path) is None


def test_a_changed_cache_is_ignored(tmp_path: Path):
    path = tmp_path / "plan.bin"
    kernel_cache.write(path, b"kernels")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert kernel_cache.read(path) is None


def test_a_missing_cache_is_not_an_error(tmp_path: Path):
    assert kernel_cache.read(tmp_path / "plan.bin") is None
    assert kernel_cache.read(tmp_path) is None


def test_a_failed_write_is_not_an_error_and_keeps_the_old_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "plan.bin"
    kernel_cache.write(path, b"old")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "replace", refuse)
    assert not kernel_cache.write(path, b"new")
    assert kernel_cache.read(path) == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["plan.bin"]
    (tmp_path / "file").write_bytes(b"")
    assert not kernel_cache.write(tmp_path / "file" / "plan.bin", b"new")


def test_each_plan_has_its_own_file_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.kernels_file("ab12") == tmp_path / "mistralc" / "kernels" / "ab12.bin"
