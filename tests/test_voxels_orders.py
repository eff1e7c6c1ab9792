"""Keys and orders of voxels: order laws, curves, what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit import ops
from tests.native import native_module
from tests.voxel_sets import BACKENDS, GOOD, KINDS, ORDERS, arranged, big, lists, rows_of, tensor

# --- large sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_large_sorts_are_those_of_the_reference_for_any_thread_count(kind):
    coords = big(kind, 150_000 if kind == "outliers" else 50_000, 3)
    threads = torch.get_num_threads()
    for order, size in ORDERS:
        expected = ops.voxel_sort(coords, order, block_size=size, backend="reference")
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found = ops.voxel_sort(coords, order, block_size=size)
                assert all(torch.equal(x, y) for x, y in zip(found, expected)), f"{order}, {count} threads"
        finally:
            torch.set_num_threads(threads)


# --- keys, orders, curves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=lists)
def test_keys_compare_like_rows(backend, rows):
    keys = ops.voxel_keys(tensor(rows), backend=backend).tolist()
    assert [r for _, r in sorted(zip(keys, rows))] == sorted(rows)
    assert all(k == ((b * 2**16 + x) * 2**16 + y) * 2**16 + z for k, (b, x, y, z) in zip(keys, rows))


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=arranged, order=st.sampled_from(ORDERS))
def test_orders_are_stable_permutations(backend, rows, order):
    name, size = order
    found = ops.voxel_sort(tensor(rows), name, block_size=size, backend=backend)

    def key(row):
        b, *xyz = row
        if name == "lexicographic":
            return row
        if name == "block":
            return (b, *(c // size for c in xyz), *(c % size for c in xyz))
        return b, getattr(ops, f"{name}_encode")(torch.tensor(xyz), backend="reference").item()

    expected = sorted(range(len(rows)), key=lambda i: key(rows[i]))
    assert found.permutation.tolist() == expected
    assert found.inverse[found.permutation].tolist() == list(range(len(rows)))
    assert rows_of(found.coords) == [rows[i] for i in expected]


cells = st.lists(
    st.tuples(*[st.one_of(st.integers(0, 2**21 - 1), st.sampled_from([0, 1, 2**21 - 1]))] * 3), max_size=40
)


@pytest.mark.parametrize("curve", ["morton", "hilbert"])
@given(xyz=cells, codes=st.lists(st.integers(0, 2**63 - 1), max_size=40))
def test_curves_go_there_and_back(curve, xyz, codes):
    encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
    xyz, codes = torch.tensor(xyz, dtype=torch.int64).reshape(-1, 3), torch.tensor(codes, dtype=torch.int64)
    for there in BACKENDS:
        for back in BACKENDS:
            assert torch.equal(decode(encode(xyz, backend=there), backend=back).long(), xyz)
            assert torch.equal(encode(decode(codes, backend=back), backend=there), codes)


@given(xyz=cells)
def test_morton_interleaves_bits_with_x_first(xyz):
    def code(x, y, z):
        return int("".join(a + b + c for a, b, c in zip(*(format(v, "021b") for v in (x, y, z)))), 2)

    found = ops.morton_encode(torch.tensor(xyz, dtype=torch.int64).reshape(-1, 3))
    assert found.tolist() == [code(*c) for c in xyz]


@pytest.mark.parametrize("backend", BACKENDS)
@given(start=st.one_of(st.integers(0, 2**63 - 70), st.sampled_from([8**k - 32 for k in range(2, 21)])))
def test_hilbert_takes_unit_steps(backend, start):
    xyz = ops.hilbert_decode(torch.arange(64) + start, backend=backend)
    assert (xyz.diff(dim=0).abs().sum(1) == 1).all()


def test_hilbert_fills_every_cube_before_it_leaves_it():
    for k in range(6):
        xyz = ops.hilbert_decode(torch.arange(8**k))
        assert xyz.min() == 0 and xyz.max() == 2**k - 1
        assert len(torch.unique(ops.morton_encode(xyz))) == 8**k


def test_curves_agree_on_every_instruction_set():
    from cvctoolkit import _native

    xyz = torch.randint(2**21, (1000, 3), generator=torch.Generator().manual_seed(0))
    for wish in ("baseline", "avx2", "avx512"):
        with _native.restricted_isa(wish):
            for curve in ("morton", "hilbert"):
                encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
                codes = encode(xyz)
                assert torch.equal(codes, encode(xyz, backend="reference"))
                assert torch.equal(decode(codes).long(), xyz)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_orders_blocks_and_codes_are_refused():
    with pytest.raises(ValueError, match="order must be one of"):
        ops.voxel_sort(GOOD, "z")
    for options in (dict(order="block"), dict(block_size=4), dict(order="hilbert", block_size=4)):
        with pytest.raises(ValueError, match="block_size goes with"):
            ops.voxel_sort(GOOD, **options)
    for size in (0, -1, 16385):
        with pytest.raises(ValueError, match="block_size must be"):
            ops.voxel_sort(GOOD, "block", block_size=size)
    with pytest.raises(TypeError, match="block_size must be an integer"):
        ops.voxel_sort(GOOD, "block", block_size=2.0)
    for curve in ("morton", "hilbert"):
        encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
        for backend in BACKENDS:
            for bad in (-1, 2**21):
                with pytest.raises(ValueError, match="must lie in"):
                    encode(torch.tensor([[0, bad, 0]]), backend=backend)
            with pytest.raises(ValueError, match="got a negative one"):
                decode(torch.tensor([3, -1]), backend=backend)
        with pytest.raises(ValueError, match="dtype int64"):
            decode(torch.tensor([3], dtype=torch.int32))


# --- the device pipelines, run on the host ----------------------------------------------------------------------------


@given(xyz=cells)
@settings(max_examples=30)
def test_device_curves_give_what_the_reference_gives(xyz):
    module = native_module()
    xyz = torch.tensor([*xyz, (0, -1, 0), (0, 0, 2**21)], dtype=torch.int32)
    for curve, hilbert in (("morton", False), ("hilbert", True)):
        codes = module.curve_encode_pipeline(xyz.numpy(), hilbert)
        assert codes[:-2].tolist() == getattr(ops, f"{curve}_encode")(xyz[:-2]).tolist()
        assert codes[-2:].tolist() == [-1, -1]
        back = module.curve_decode_pipeline(codes, hilbert)
        assert back[:-2].tolist() == xyz[:-2].tolist() and (back[-2:] == -1).all()
