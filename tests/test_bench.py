"""The harness on tiny work: a wrong contestant gets no speed-up, the rows carry what they should."""

import subprocess
import sys

import numpy as np
import pytest

harness = pytest.importorskip("benchmarks.harness")
from benchmarks import report, results  # noqa: E402
from benchmarks.peers import coarse_to_fine, restated_pointmap  # noqa: E402
from benchmarks.sdf import check_surface, compare_bands  # noqa: E402

QUICK = harness.Settings(quick=True, memory=False)


def _compare(found, truth):
    wrong = int((found != truth).sum())
    return f"{wrong} of {truth.size} differ" if wrong else ""


@pytest.fixture
def sorting():
    numbers = np.random.default_rng(0).integers(1000, size=20_000)

    def unsorted():
        return numbers

    def prepare(settings):
        return harness.Prepared(
            [
                harness.Contestant("ours", lambda: np.sort(numbers, kind="stable")),
                harness.Contestant("ours, broken", unsorted),
                harness.Contestant("peer", lambda: np.sort(numbers), package="numpy", truth=True),
                harness.Contestant("fast wrong peer", unsorted, package="numpy"),
            ],
            _compare,
            floor_bytes=8 * 2 * numbers.size,
            items=len,
        )

    return harness.Workload("made-up", "sort", prepare)


def test_wrong_results_get_no_ratio(sorting):
    rows = {r["contestant"]: r for r in harness.measure(sorting, QUICK)}
    for name in ("ours, broken", "fast wrong peer"):
        assert rows[name]["ratio"] is None
        assert rows[name]["exact"].endswith("of 20000 differ")
    # The fast wrong peer must not become the bar either.
    assert rows["peer"]["ratio"] == 1
    assert rows["ours"]["ratio"] == pytest.approx(rows["peer"]["median_s"] / rows["ours"]["median_s"])
    assert rows["ours"]["items"] == 20_000
    assert rows["ours"]["rounds"] == 9
    assert "numpy " + np.__version__ in rows["peer"]["versions"]


def test_peak_memory_counts_what_a_run_allocates():
    def prepare(settings):
        hungry = harness.Contestant("hungry", lambda: np.ones(8_000_000), truth=True)
        return harness.Prepared([hungry], lambda found, truth: "")

    (row,) = harness.measure(harness.Workload("made-up", "memory", prepare), QUICK)
    if row["peak_bytes"] is None:
        pytest.skip("this system does not let a process reset its memory high-water mark")
    assert 60e6 < row["peak_bytes"] < 80e6


def test_rows_survive_the_file_and_are_replaced_by_workload(tmp_path, sorting):
    path = tmp_path / "machine.csv"
    rows = harness.measure(sorting, QUICK)
    other = [{**rows[0], "workload": "another"}]
    results.merge(path, other)
    results.merge(path, rows)
    results.merge(path, rows)
    back = results.read(path)
    assert len(back) == len(rows) + 1
    assert {r["workload"] for r in back} == {"sort", "another"}
    assert back[0]["ratio"] == pytest.approx(other[0]["ratio"], rel=1e-4) if other[0]["ratio"] else True


def test_report_marks_inexact_rows(tmp_path, sorting):
    results.merge(tmp_path / "machine.csv", harness.measure(sorting, QUICK))
    text = report.tables(results.read(tmp_path / "machine.csv"))
    line = next(line for line in text.splitlines() if "fast wrong peer" in line)
    assert "of 20000 differ" in line


def test_compare_bands_counts_every_kind_of_fault():
    keys, distance = np.arange(10), np.linspace(0, 0.9, 10)
    assert compare_bands((keys, distance), (keys, distance), 1.0, 0.1) == ""
    assert "1 voxels missing" in compare_bands((keys[1:], distance[1:]), (keys, distance), 1.0, 0.1)
    assert "1 extra" in compare_bands((keys, distance), (keys[1:], distance[1:]), 1.0, 0.1)
    assert "10 distances off, by up to 1 voxel" in compare_bands((keys, distance + 0.1), (keys, distance), 2.0, 0.1)
    # A voxel at the rim may fall either way.
    assert compare_bands((keys[:-1], distance[:-1]), (keys, distance), 0.9 + 1e-8, 0.1) == ""


def test_check_surface_wants_closed_and_oriented():
    vertices = np.zeros((4, 3))
    tetrahedron = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
    assert check_surface(vertices, tetrahedron) == ""
    assert "open" in check_surface(vertices, tetrahedron[:3])
    flipped = tetrahedron.copy()
    flipped[0] = flipped[0, ::-1]
    assert "used twice" in check_surface(vertices, flipped)


@pytest.mark.parametrize("resolution", [20, 33, 64, 100])
def test_coarse_to_fine_finds_the_whole_band(resolution):
    def distance(points):
        return np.abs(np.linalg.norm(points, axis=1) - 0.95)

    coords, found = coarse_to_fine.narrow_band(distance, resolution, 2.5)
    centres = (np.arange(resolution) + 0.5) * 2 / resolution - 1
    dense = distance(np.stack(np.meshgrid(*[centres] * 3, indexing="ij"), -1).reshape(-1, 3)).reshape([resolution] * 3)
    assert len(coords) == (dense < 2.5 * 2 / resolution).sum()
    np.testing.assert_allclose(found, dense[tuple(coords[:, 1:].T)], atol=1e-6)


def test_restated_peers_agree_with_ours():
    import torch

    from cvctoolkit import ops

    generator = torch.Generator().manual_seed(0)
    points = torch.rand(13, 17, 3, generator=generator)
    mask = torch.rand(13, 17, generator=generator) < 0.8
    expected = ops.pointmap_to_mesh(points, mask)
    for peer in (restated_pointmap.plain_torch, restated_pointmap.utils3d_torch):
        for found, wanted in zip(peer(points, mask), expected, strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(restated_pointmap.utils3d_numpy(points.numpy(), mask.numpy()), expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy())
    depth = 1 + torch.rand(13, 17, generator=generator)
    expected = ops.depth_edge_mask(depth, rtol=0.5)
    assert torch.equal(restated_pointmap.depth_edge_torch(depth, 0.5), expected)
    np.testing.assert_array_equal(restated_pointmap.depth_edge_numpy(depth.numpy(), 0.5), expected.numpy())


def test_unknown_family_is_named():
    with pytest.raises(SystemExit, match="no family 'meshes'; there are"):
        harness.main(["meshes"])


@pytest.mark.parametrize("read, written", [(8000, 8000), (8000, 80_000), (80_000, 8000), (0, 0)])
def test_the_yardstick_is_no_peer(read, written, tmp_path):
    def prepare(settings):
        numbers = np.arange(1000)
        sorts = [harness.Contestant(name, lambda: np.sort(numbers), package=package, truth=bool(package))
                 for name, package in (("ours", ""), ("peer", "numpy"))]  # fmt: skip
        return harness.Prepared([*sorts, harness.copy_of(read, written)], _compare)

    rows = {r["contestant"]: r for r in harness.measure(harness.Workload("made-up", "copy", prepare), QUICK)}
    ours, copy = rows["ours"], rows[results.COPY]
    assert copy["result_bytes"] == written
    assert copy["ratio"] is None and copy["peak_bytes"] is None
    assert ours["ratio"] == pytest.approx(rows["peer"]["median_s"] / ours["median_s"])
    share = 100 * copy["median_s"] / ours["median_s"]
    assert results.of_copy(ours, list(rows.values())) == f"{share:.0f} %"
    results.merge(tmp_path / "machine.csv", list(rows.values()))
    line = next(
        line
        for line in report.tables(results.read(tmp_path / "machine.csv")).splitlines()
        if line.startswith("| ours |")
    )
    assert " % |" in line and "exact" in line


@pytest.mark.slow
def test_command_writes_rows(tmp_path):
    path = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "cvctoolkit", "bench", "pointmap", "--quick", "--filter", "518", "--no-memory"]
    subprocess.run([*command, "--csv", str(path)], check=True, timeout=300, stdout=subprocess.DEVNULL)
    rows = results.read(path)
    assert {r["workload"] for r in rows} == {"faces and compaction, 518² map", "depth edges 3×3, 518² map"}
    assert all(r["exact"] == "yes" for r in rows)
