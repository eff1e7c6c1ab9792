"""What README.md and the documents say: links, the first lines of use, who serves which operator."""

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from cvctoolkit import ops
from cvctoolkit._library import record_calls
from cvctoolkit.ops import FAMILIES
from cvctoolkit.ops.cameras import unproject_depth

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs a checkout")

DOCUMENTS = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("cvctoolkit/**/*.md"), *ROOT.glob("benchmarks/*.md")
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_first_lines_of_use_run_as_written():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    v, u = torch.meshgrid(torch.linspace(-1, 1, 60), torch.linspace(-1, 1, 80), indexing="ij")
    depth = 3 + 0.4 * torch.cos(3 * u) * torch.cos(2 * v)
    K = torch.tensor([[70.0, 0, 40], [0, 70, 30], [0, 0, 1]])
    points = unproject_depth(depth, K).requires_grad_()
    names = dict(depth=depth, points=points, valid=torch.ones_like(depth, dtype=torch.bool))
    exec(code, names)
    shell = names["shell"]
    a, b = shell.faces.long(), shell.faces.roll(-1, 1).long()
    edges = (torch.minimum(a, b) * len(shell.vertices) + torch.maximum(a, b)).flatten().sort().values
    assert torch.equal(edges[::2], edges[1::2]) and edges[::2].diff().all() and len(shell.faces) > 100_000
    shell.vertices.sum().backward()
    assert points.grad.isfinite().all() and points.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["pointmap", "mesh", "sdf"])
def test_examples_of_the_geometry_run_as_written(name):
    v, u = torch.meshgrid(torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 50), indexing="ij")
    depth, K = 3 + 0.3 * torch.cos(3 * u) * v, torch.tensor([[60.0, 0, 25], [0, 60, 20], [0, 0, 1]])
    points = unproject_depth(depth, K)
    mesh = ops.pointmap_to_mesh(points)
    vertices = ops.normalize_points(mesh.vertices).points
    names = dict(
        torch=torch, depth=depth, points=points, mask=torch.ones(40, 50, dtype=torch.bool), conf=torch.rand(40, 50),
        image=torch.rand(40, 50, 3), vertices=vertices, faces=mesh.faces, scan=torch.rand(30, 3), height=40, width=50,
        origins=torch.randn(9, 3), directions=torch.randn(9, 3), K=K, viewmat=torch.eye(4),
        loss=lambda vertices, faces: vertices.square().sum(),
    )  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/ops/{name}.md").read_text(), re.S)
    assert blocks
    for code in blocks:
        exec(textwrap.dedent(code), names)


def table():
    """[(functions named in a row, what its last column says)] of the table of operators."""
    rows = re.search(r"## Operators\n.*?\n\|---.*?\n(.*?)\n\n", README.read_text(), re.S)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in rows[1].splitlines()]
    return [(re.findall(r"`(\w+)`", functions), backends) for _, functions, backends in cells]


def served(function):
    """Who serves the operator that a function is about: the one of its name, else the last that it calls."""
    module = importlib.import_module(function.__module__.rsplit(".", 1)[0] + ".samples")
    sample = next(s for s in module.samples() if s.op is function and "empty" not in s.name)
    kwargs = sample.make(torch.float32, "cpu")
    with record_calls() as calls:
        sample.op(**kwargs)
    operators = [operator for operator, _ in calls]
    if all(list(operator.backends) == ["reference"] for operator in operators):
        return {"torch"}
    operator = next((o for o in operators if o.name == function.__name__), operators[-1])
    kernels = operator.backends["native"].kernels if "native" in operator.backends else ()
    if operator.name == "reciprocal_matches":  # composed of the mesh family's native operators
        kernels = ("build_bvh", "closest_point_on_mesh")
    on_cuda = " ".join(source.read_text() for source in ROOT.glob("csrc/*/*.cu"))
    names = {"CPU"} if kernels else set()
    names |= {"CUDA"} if kernels and all(f'impl("{k}"' in on_cuda for k in kernels) else set()
    return names | {"reference"} | {n for n in ("Triton", "xformers", "SDPA") if n.lower() in operator.backends}


@pytest.mark.parametrize(
    "functions,backends", table() if README.exists() else [], ids=lambda x: x[0] if isinstance(x, list) and x else "row"
)
def test_table_of_operators_is_true(functions, backends):
    said = set(backends.split(", "))
    for name in functions:
        function = getattr(ops, name)
        if inspect.isclass(function) or "composed of these" in said:
            continue
        expected = {"torch"} if backends.startswith("torch") else said
        assert served(function) == expected, name


def test_every_function_is_documented_where_one_looks():
    rows = {name for functions, _ in table() for name in functions}
    for family in FAMILIES:
        name = family.__name__.rsplit(".", 1)[1]
        texts = " ".join(
            p.read_text() for p in [*ROOT.glob(f"docs/ops/{name}*.md"), *Path(family.__file__).parent.glob("*.md")]
        )
        for function in family.__all__:
            assert (
                function in rows or re.search(rf"\b{function}\b", texts) or inspect.isclass(getattr(family, function))
            ), function
