"""The catalogue of GPUs: its figures, and looking up names."""

import dataclasses

import pytest

from graphs.errors import UsageError
from graphs.gpu_catalogue import ALIASES, GPUS, find_gpu, version
from graphs.precisions import PRECISIONS
from graphs.targets import TARGETS


def test_every_gpu_has_a_source_and_plausible_figures() -> None:
    for key, gpu in GPUS.items():
        assert gpu.source.startswith("NVIDIA "), key
        assert gpu.source.endswith(("datasheet", "whitepaper")), key
        assert 16e9 <= gpu.memory_bytes <= 200e9, key
        # Every GPU reads its whole memory 10 to 80 times a second.
        assert 10 <= gpu.bandwidth_bytes_per_s / gpu.memory_bytes <= 80, key


def test_the_figures_are_those_of_the_datasheets() -> None:
    figures = {
        key: (gpu.compute_capability, gpu.memory_bytes / 1e9, gpu.bandwidth_bytes_per_s / 1e9)
        for key, gpu in GPUS.items()
    }
    assert figures == {
        "rtx3090": ("8.6", 24, 936),
        "rtx4090": ("8.9", 24, 1008),
        "rtx5090": ("12.0", 32, 1792),
        "rtx6000ada": ("8.9", 48, 960),
        "a10": ("8.6", 24, 600),
        "l4": ("8.9", 24, 300),
        "l40s": ("8.9", 48, 864),
        "a100-40gb": ("8.0", 40, 1555),
        "a100-80gb": ("8.0", 80, 2039),
        "h100": ("9.0", 80, 3350),
        "h100-pcie": ("9.0", 80, 2000),
        "h200": ("9.0", 141, 4800),
    }


def test_bandwidth_of_geforce_is_bus_width_times_data_rate() -> None:
    # Bus width in bits and Gbit/s per pin, both from the whitepapers.
    for key, bus, rate in (("rtx3090", 384, 19.5), ("rtx4090", 384, 21.0), ("rtx5090", 512, 28.0)):
        assert GPUS[key].bandwidth_bytes_per_s == bus / 8 * rate * 1e9


@pytest.mark.parametrize(
    ("capability", "supported"),
    [("7.0", False), ("7.5", True), ("8.0", True), ("8.6", True), ("8.7", False), ("8.9", True),
     ("9.0", False), ("10.0", False), ("12.0", True), ("12.1", True), ("1.2", False)],
)  # fmt: skip
def test_tensorrt_rtx_supports_turing_to_ada_and_blackwell_but_not_hopper(
    capability: str, *, supported: bool
) -> None:
    assert TARGETS["rtx"].supports(capability) is supported


def test_hopper_supports_fp8_but_not_tensorrt_rtx() -> None:
    least = PRECISIONS["fp8"].min_compute_capability
    assert least is not None
    found = {
        name: (
            version(gpu.compute_capability) >= least,
            TARGETS["rtx"].supports(gpu.compute_capability),
        )
        for name, gpu in GPUS.items()
    }
    assert (found["h100"], found["a100-80gb"]) == ((True, False), (False, True))
    assert found["rtx5090"] == (True, True)


def test_compute_capabilities_compare_as_numbers() -> None:
    assert version("12.0") > version("8.9") > version("8.0")


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "GeForce RTX 4090", "rtx_4090"])
def test_a_gpu_is_found_by_common_spellings(name: str) -> None:
    assert find_gpu(name) is GPUS["rtx4090"]


def test_every_alias_names_a_gpu_of_the_catalogue() -> None:
    assert ALIASES.keys().isdisjoint(GPUS)
    assert find_gpu("A100") is GPUS["a100-80gb"]
    assert all(find_gpu(alias).name for alias in ALIASES)


def test_an_unknown_gpu_is_refused_with_a_list_of_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'rtx9090'.*rtx3090, rtx4090.*h200.*memory and band"):
        find_gpu("rtx9090")


def test_a_gpu_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPUS["l4"].memory_bytes = 1  # type: ignore[misc]
