"""What every operator promises, on every backend and every sample (DESIGN: how an op is proved)."""

import importlib
import inspect

import pytest
import torch

from cvctoolkit import _backend
from cvctoolkit._library import OPERATORS, record_calls
from cvctoolkit.ops import FAMILIES
from cvctoolkit.testing import (
    Sample,
    assert_gradients_close,
    assert_within_budget,
    cotangents,
    leaves,
    noncontiguous,
    tensors,
)

SAMPLES = [s for family in FAMILIES for s in importlib.import_module(f"{family.__name__}.samples").samples()]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["native", "triton", "reference"]


def has_backend_argument(sample):
    return "backend" in inspect.signature(sample.op).parameters


def recorded(sample, dtype, device):
    """The operator calls behind a sample."""
    with record_calls() as calls:
        sample.op(**sample.make(dtype, device))
    return calls


def run(sample, kwargs, backend=None):
    return sample.op(**kwargs, **({"backend": backend} if has_backend_argument(sample) and backend else {}))


def require(sample, backend, device, dtype=torch.float32):
    """Skips, with the backend's own words, where it cannot serve the sample."""
    if not has_backend_argument(sample):
        if backend != "reference":
            pytest.skip("composed of torch operators")
        return
    for operator, args in recorded(sample, dtype, device):
        if backend not in operator.backends:
            pytest.skip(f"{operator.name} has no {backend} backend")
        why_not = _backend.reasons(backend, operator.backends[backend], args[:-1])
        if why_not:
            pytest.skip("; ".join(why_not))


def params(samples, backends=BACKENDS):
    """(sample, backend) pairs that can exist at all, so that skips mean something."""
    out = []
    for sample in samples:
        for backend in backends if has_backend_argument(sample) else ["reference"]:
            out.append(pytest.param(sample, backend, id=f"{sample}-{backend}"))
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample,backend", params(SAMPLES))
def test_values(sample: Sample, backend: str, device: str):
    require(sample, backend, device)
    result = run(sample, sample.make(torch.float32, device), backend)
    same = run(sample, sample.make(torch.float32, "cpu"), "reference")
    exact = run(sample, sample.make(torch.float64, "cpu"), "reference")
    if sample.compare is not None:
        sample.compare(result, same, exact)
        return
    assert len(tensors(result)) == len(tensors(same)) > 0
    for k, (a, b, c) in enumerate(zip(tensors(result), tensors(same), tensors(exact))):
        assert_within_budget(a.cpu(), b, c, atol=sample.atol, what=f"{sample} output {k}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample,backend", params([s for s in SAMPLES if s.differentiable]))
def test_gradients(sample: Sample, backend: str, device: str):
    require(sample, backend, device)

    def gradients(dtype, device, backend):
        kwargs = sample.make(dtype, device)
        inputs = leaves(kwargs, sample.differentiable)
        out = tensors(run(sample, kwargs, backend))
        pairs = [(t, w) for t, w in zip(out, cotangents(out)) if w is not None]
        assert pairs, f"{sample}: no output is differentiable"
        return torch.autograd.grad([t for t, _ in pairs], inputs, [w for _, w in pairs])

    got, expected = gradients(torch.float32, device, backend), gradients(torch.float64, "cpu", "reference")
    for name, a, b in zip(sample.differentiable, got, expected):
        assert_gradients_close(a, b, what=f"{sample} d/d{name}")


@pytest.mark.parametrize("sample,backend", params([s for s in SAMPLES if s.differentiable and s.gradcheck]))
def test_gradcheck(sample: Sample, backend: str):
    require(sample, backend, "cpu", torch.float64)
    kwargs = sample.make(torch.float64, "cpu")
    inputs = leaves(kwargs, sample.differentiable)

    def function(*values):
        out = tensors(run(sample, {**kwargs, **dict(zip(sample.differentiable, values))}, backend))
        return tuple(t for t in out if t.requires_grad)

    assert torch.autograd.gradcheck(function, inputs, nondet_tol=0)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck(sample: Sample):
    kwargs = sample.make(torch.float32, "cpu")
    leaves(kwargs, sample.differentiable)
    with record_calls() as calls:
        sample.op(**kwargs)
    if has_backend_argument(sample):
        assert calls, f"{sample} takes a backend but calls no operator"
    for operator, args in calls:
        args = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(operator.overload, tuple(args))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if has_backend_argument(s)], ids=str)
def test_compiles_to_one_graph(sample: Sample):
    kwargs = sample.make(torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda values: sample.op(**values), fullgraph=True, backend="aot_eager")
    for a, b in zip(tensors(compiled(kwargs)), tensors(sample.op(**sample.make(torch.float32, "cpu")))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sample,backend", params(SAMPLES))
def test_noncontiguous_and_repeatable(sample: Sample, backend: str, device: str):
    require(sample, backend, device)
    kwargs = sample.make(torch.float32, device)
    first = tensors(run(sample, kwargs, backend))
    strided = tensors(run(sample, {k: noncontiguous(v) for k, v in kwargs.items()}, backend))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = tensors(run(sample, sample.make(torch.float32, device), backend))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, strided, again):
        assert torch.equal(a, b), "non-contiguous inputs change the result"
        assert torch.equal(a, c), "the thread count or a second run changes the result"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sample,backend", params([s for s in SAMPLES if has_backend_argument(s)], ["native", "triton"])
)
def test_runs_on_the_current_stream(sample: Sample, backend: str):
    require(sample, backend, "cuda")
    kwargs = sample.make(torch.float32, "cuda")
    expected = tensors(run(sample, kwargs, backend))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)  # on another stream the operator would read what is not there yet
        late = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        found = tensors(run(sample, late, backend))
    side.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_inputs_are_not_modified(sample: Sample):
    kwargs = sample.make(torch.float32, "cpu")
    before = [t.clone() for t in tensors(list(kwargs.values()))]
    sample.op(**kwargs)
    for a, b in zip(before, tensors(list(kwargs.values()))):
        assert torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


def test_every_public_function_has_samples_and_an_empty_one():
    for family in FAMILIES:
        for name in family.__all__:
            function = getattr(family, name)
            if inspect.isclass(function):
                continue
            names = [s.name for s in SAMPLES if s.op is function]
            assert any("empty" in n for n in names), f"{name} has no sample with empty inputs"
            assert any("empty" not in n for n in names), f"{name} has no sample"


def test_every_public_function_is_documented():
    for family in FAMILIES:
        for name in family.__all__:
            function = getattr(family, name)
            doc = inspect.getdoc(function)
            assert doc, name
            if inspect.isfunction(function):
                for part in ("Args", "Returns", "Raises", *inspect.signature(function).parameters):
                    assert f"{part}:" in doc, f"{name}: {part} is not documented"


@pytest.mark.parametrize("sample", [s for s in SAMPLES if has_backend_argument(s)], ids=str)
def test_an_unknown_backend_is_refused(sample: Sample):
    name = sample.op.__name__
    with pytest.raises(ValueError, match=f"^{name}: no backend 'cuda_magic'"):
        sample.op(**sample.make(torch.float32, "cpu"), backend="cuda_magic")
    with pytest.raises(TypeError, match=f"^{name}: backend must be a string or None, got int"):
        sample.op(**sample.make(torch.float32, "cpu"), backend=3)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if has_backend_argument(s)], ids=str)
def test_a_backend_that_an_operator_lacks_is_refused(sample: Sample):
    """By whatever the function consists of, in its own name."""
    calls = recorded(sample, torch.float32, "cpu")
    for backend in _backend.ORDER:
        if all(backend in operator.backends for operator, _ in calls):
            continue
        try:
            sample.op(**sample.make(torch.float32, "cpu"), backend=backend)
        except ValueError as error:  # else a part of it is there, and that part was meant
            assert str(error).startswith(f"{sample.op.__name__}: "), error


STRANGERS = {
    "object": lambda value: object(),
    "string": lambda value: "nonsense",
    "list": lambda value: [object()],
    "nan": lambda value: float("nan"),
    "negative": lambda value: -7,
    "scalar": lambda value: torch.zeros(()),
    "many dimensions": lambda value: torch.zeros([1] * 9),
    "bytes": lambda value: torch.zeros(3, 4, dtype=torch.int8),
    "complex": lambda value: torch.zeros(2, 2, dtype=torch.complex64),
    "sparse": lambda value: torch.zeros(2, 2).to_sparse(),
    "one dimension more": lambda value: value[None] if isinstance(value, torch.Tensor) else object(),
    "one row": lambda value: value[:1] if isinstance(value, torch.Tensor) and value.dim() else object(),
}


@pytest.mark.parametrize("op", dict.fromkeys(s.op for s in SAMPLES), ids=lambda op: op.__name__)
def test_every_error_names_the_function_that_was_called(op):
    """Not one that it consists of; and no argument comes as far as to fail inside torch."""
    sample = next(s for s in SAMPLES if s.op is op and "empty" not in s.name)
    for argument in sample.make(torch.float32, "cpu"):
        for kind, stranger in STRANGERS.items():
            kwargs = sample.make(torch.float32, "cpu")
            kwargs[argument] = stranger(kwargs[argument])
            try:
                op(**kwargs)
            except Exception as error:
                refused = isinstance(error, (TypeError, ValueError)) and str(error).startswith(f"{op.__name__}: ")
                assert refused, (argument, kind, error)


def test_an_explicit_backend_is_refused_with_its_reasons():
    for name, operator in OPERATORS.items():
        if "triton" in operator.backends and not _backend.triton_interpreted():
            why_not = _backend.device_reasons("triton", operator.backends["triton"], "cpu")
            assert why_not and all(isinstance(w, str) and w for w in why_not), name
