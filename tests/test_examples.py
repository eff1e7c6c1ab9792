"""The examples do what their pictures claim."""

import runpy
from pathlib import Path

from tests.oracles import oracle

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_attention_finds_the_surface_round_a_noisy_depth(tmp_path, capsys):
    oracle("skimage")
    oracle("matplotlib").use("Agg")
    runpy.run_path(str(EXAMPLES / "epipolar_motorcycle.py"))["main"](["--out", str(tmp_path)])
    true, noisy, attention = (float(line.split()[-2]) for line in capsys.readouterr().out.splitlines())
    assert true > noisy + 3 and attention > noisy + 4
    assert {p.name for p in tmp_path.iterdir()} == {"epipolar.png", "epipolar_samples.png"}


def test_the_voxel_chain_keeps_the_front_and_completes_it(tmp_path, capsys):
    oracle("skimage")
    oracle("matplotlib").use("Agg")
    runpy.run_path(str(EXAMPLES / "voxel_chain.py"))["main"](["--out", str(tmp_path)])
    shell, cells, (kept, seam), (union, fixed) = (
        [int(word) for word in line.split() if word.isdigit()] if "," in line else int(line.split(": ")[1].split()[0])
        for line in capsys.readouterr().out.splitlines()
    )
    assert shell > 100 * cells and 0.2 * cells < kept < 0.6 * cells
    assert 0 < seam < kept and fixed == kept < union
    assert {p.name for p in tmp_path.iterdir()} == {"voxel_chain.png"}


def test_distillations_differ_as_their_formulas_say(tmp_path, capsys):
    oracle("matplotlib").use("Agg")
    runpy.run_path(str(EXAMPLES / "distillation_toy.py"))["main"](["--out", str(tmp_path), "--steps", "250"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][3:]
    found = {(method.strip(), kind.strip()): [float(v) for v in values] for method, kind, *values in rows}
    energy = {key: values[0] for key, values in found.items()}
    for kind in ("particles", "generator"):
        assert 10 * energy["VSD", kind] < min(energy[method, kind] for method in ("SDS", "CSD", "ASD"))  # samples
    assert energy["CSD", "generator"] > 5  # leaves the target behind
    modes = {key: values[2] for key, values in found.items()}
    assert modes["VSD", "particles"] == modes["ASD", "particles"] == modes["VSD", "generator"] == 4
    assert modes["SDS", "particles"] < 4 and modes["SDS", "generator"] == 1  # collapses
    assert (tmp_path / "distillation.png").exists()


def test_completion_ends_where_its_mode_says(tmp_path):
    oracle("matplotlib").use("Agg")
    example = runpy.run_path(str(EXAMPLES / "masked_flow.py"))
    errors = example["main"](["--out", str(tmp_path), "--seeds", "1"])
    strengths = example["STRENGTHS"]
    for mode in ("x0", "replace"):
        assert errors[mode] == sorted(errors[mode], reverse=True) and errors[mode][-1] < 1e-4
        gap = [e / (1 - s) for e, s in zip(errors[mode], strengths) if s < 1]  # to the nearest of the model's shapes
        assert max(gap) < 1.01 * gap[0]
    assert 0.1 < errors["literal"][-1] < 0.7 * errors["literal"][0]  # short of the target
    assert errors["velocity"][-1] > 0.8 * errors["velocity"][0]  # hardly moved
    assert (tmp_path / "flow.png").exists()


def test_a_sparse_autoencoder_learns_a_shell(tmp_path, capsys):
    oracle("matplotlib").use("Agg")
    example = runpy.run_path(str(EXAMPLES / "sparse_vae.py"))
    ious = example["main"](["--out", str(tmp_path), "--resolution", "20", "--steps", "40", "--shapes", "1"])
    assert len(ious) == 1 and ious[0] > 0.6  # of voxels that the decoder itself made
    first, *_, last = (float(line.split()[3][:-1]) for line in capsys.readouterr().out.splitlines() if "step" in line)
    assert last < first / 2
    assert (tmp_path / "sparse_vae.png").exists()
