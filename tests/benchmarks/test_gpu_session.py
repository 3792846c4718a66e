"""The first session on a GPU, as far as it needs neither a GPU nor stub libraries."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import torch

from benchmarks.gpu import fill, first_session, one_arch, pack, rehearse, shapes
from benchmarks.gpu.correctness import TURNS, ring_cases
from benchmarks.gpu.first_session import CORRECTNESS, PHASES, SPEED, Step
from benchmarks.gpu.variants import VARIANTS
from exporter.checks.verify import bundle_reference
from exporter.decoder.model import empty_caches
from graphs.errors import MistralcError
from graphs.manifest import read_manifest
from runtime.system import release

ROOT = Path(first_session.__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny bundles without weights, by name."""
    folder = tmp_path_factory.mktemp("shapes")
    wanted = ("small-window-fp16", "small-mixed-int4wo")
    chosen = [one for one in shapes.small(rehearse.tiny(2)) if one.name in wanted]
    for one in chosen:
        shapes.write_shapes(one, folder / one.name)
    return {name: folder / name for name in wanted}


# Graphs without weights, and weights made in place


@pytest.mark.parametrize("name", ["small-window-fp16", "small-mixed-int4wo"])
def test_weights_are_made_where_the_graph_looks_for_them(
    written: dict[str, Path], name: str, tmp_path: Path
) -> None:
    bundle = fill.fill(written[name], "shipped", tmp_path / name, CPU)
    size = (bundle / fill.WEIGHTS).stat().st_size
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    linked = 0
    for weight in model.graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place:
            linked += 1
            assert place["location"] == fill.WEIGHTS
            assert int(place["offset"]) + int(place["length"]) <= size
    assert linked > 0
    manifest = read_manifest(bundle)
    with safetensors.safe_open(bundle / fill.WEIGHTS, framework="pt") as file:
        names = set(manifest.model.weight_shapes())
        assert names <= set(file.keys())
        gain = file.get_tensor("model.norm.weight").float()
        assert 0.8 <= gain.min() <= gain.max() <= 1.2


def test_made_weights_keep_the_variance_of_activations(
    written: dict[str, Path], tmp_path: Path
) -> None:
    """Within a tenth: the smallest linear has 49,152 weights, whose variance is off by 1%."""
    for name, folder in written.items():
        bundle = fill.fill(folder, "shipped", tmp_path / name, CPU)
        reference = bundle_reference(bundle, read_manifest(bundle))
        linear = reference.model.layers[0].mlp.up_proj
        x = torch.randn(64, reference.spec.hidden_size, generator=torch.Generator().manual_seed(0))
        assert float(linear(x).std()) == pytest.approx(1, rel=0.1)


def test_variants_share_one_file_of_weights(written: dict[str, Path], tmp_path: Path) -> None:
    made = [fill.fill(written["small-window-fp16"], variant, tmp_path, CPU)
            for variant in ("shipped", "unfused")]  # fmt: skip
    assert (made[0] / fill.WEIGHTS).samefile(made[1] / fill.WEIGHTS)
    assert (made[0] / "model.onnx").read_bytes() != (made[1] / "model.onnx").read_bytes()


# The reference


@pytest.mark.parametrize("name", ["small-window-fp16", "small-mixed-int4wo"])
def test_the_reference_stays_on_its_device(
    written: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """The device `meta` has shapes only; PyTorch refuses to mix it with any other."""
    bundle = fill.fill(written[name], "shipped", tmp_path, CPU)
    meta = torch.device("meta")
    reference = bundle_reference(bundle, read_manifest(bundle), meta)
    ids = torch.zeros(1, 5, dtype=torch.int64, device=meta)
    logits, present = reference(ids, ids, ids, empty_caches(reference.spec, 1, 5, meta))
    assert logits.device == present[0].device == meta
    assert logits.shape == (1, 5, reference.spec.vocab_size)


def test_texts_go_four_times_around_every_ring(written: dict[str, Path]) -> None:
    for folder in written.values():
        build = read_manifest(folder).build
        cases = ring_cases(build)
        assert [case.name for case in cases] == ["chunks", "single steps", "mixed"]
        assert len({case.tokens for case in cases}) == 1
        sliding = [size for size in build.spec.windows if size is not None]
        if build.spec.slides:
            assert cases[0].tokens > TURNS * max(build.ring.capacity(size) for size in sliding)
        else:
            assert cases[0].tokens == build.ring.context
            assert cases[0].tokens > 3 * build.ring.capacity(sliding[0])


# Steps


def test_every_step_has_its_bundle_and_variant() -> None:
    known = {one.name: one.variants for one in (*shapes.small(), *shapes.large())}
    for step in (*CORRECTNESS, *SPEED):
        if step.bundle:
            assert step.variant in known[step.bundle]
            assert step.variant in VARIANTS
    for steps, _ in PHASES.values():
        for place, step in enumerate(steps):
            later = {following.bundle for following in steps[place + 1 :]}
            assert step.keeps_weights == bool(step.bundle and step.bundle in later)


def test_the_steps_of_a_phase_fit_into_its_time() -> None:
    for steps, seconds in PHASES.values():
        assert sum(step.seconds for step in steps) <= seconds


def test_a_step_that_fails_or_hangs_costs_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(text: str) -> dict[str, Any]:
        monkeypatch.setattr(first_session, "command", lambda *_: iter([sys.executable, "-c", text]))
        return first_session.run(Step(module="none", seconds=1), tmp_path, tmp_path, "cpu")

    monkeypatch.setattr(first_session, "LIMIT_FACTOR", 1)
    assert program("print('{\"a\": 1}')")["result"] == {"a": 1}
    failed = program("print('{\"a\": 2}'); raise SystemExit('words')")
    assert not failed["ok"]
    assert failed["result"] == {"a": 2}
    assert failed["error"] == "words"
    assert program("import time; time.sleep(9)")["error"] == "stopped after 1 s"


def test_the_rehearsal_notices_what_is_missing() -> None:
    rows = {"1": {"cases": dict.fromkeys(("chunks", "single steps", "mixed"))}}
    line: dict[str, Any] = {
        "step": "correctness a shipped", "ok": False,
        "result": {"passed": False, "captured": True, "rows": rows},
    }  # fmt: skip
    assert list(rehearse.faults_of(line)) == []
    assert "passed, although" in next(
        rehearse.faults_of({**line, "result": {**line["result"], "passed": True}})
    )
    assert "not captured" in next(
        rehearse.faults_of({**line, "result": {**line["result"], "captured": False}})
    )
    assert "no result" in next(rehearse.faults_of({**line, "result": None, "error": "words"}))


# The packed folder


def fat_binary(*entries: tuple[int, bytes]) -> bytes:
    body = b"".join(
        one_arch.ENTRY.pack(2, 1, 64, len(code)) + bytes(12) + struct.pack("<I", architecture)
        + bytes(32) + code
        for architecture, code in entries
    )  # fmt: skip
    return one_arch.BINARY.pack(one_arch.MAGIC, 1, 16, len(body)) + body


def test_only_the_code_of_one_architecture_is_kept() -> None:
    first = fat_binary((80, b"a" * 32), (90, b"b" * 24))
    data = bytearray(b"head" * 2 + first + bytes(8) + fat_binary((90, b"c" * 16)) + b"tail")
    before = bytes(data)
    assert one_arch.keep_one(data, (8, len(data) - 4), 90) == 24 + 16
    assert bytes(data) == before.replace(b"a" * 32, bytes(32))
    with pytest.raises(MistralcError, match=r"\[80, 90\], and 75 was asked for"):
        one_arch.keep_one(data, (8, len(data) - 4), 75)


def test_the_same_files_give_the_same_archive(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack.write_archive(tmp_path / name, [("x/y.py", b"text"), ("z", b"")], preset=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_sources_of_the_pack_need_neither_gguf_nor_an_installation(tmp_path: Path) -> None:
    for name, data in pack.sources():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    program = (
        "import sys; sys.modules['gguf'] = sys.modules['rich'] = sys.modules['tests'] = None\n"
        "import benchmarks.gpu.correctness as one, benchmarks.gpu.speed, benchmarks.gpu.machine\n"
        "print(one.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_a_source_tree_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = release.mistralc_version()

    def missing(name: str) -> str:
        raise release.PackageNotFoundError(name)

    monkeypatch.setattr(release, "version", missing)
    assert release.mistralc_version() == installed
