"""Score distillation refuses what it cannot use, and says why."""

import math

import pytest
import torch

from cvctoolkit import _backend, ops
from tests.distillation_tools import BACKENDS, TABLE

# --- bad input --------------------------------------------------------------------------------------------------------

X = torch.zeros(3, 4)
BAD_NOISE = [
    (dict(t=torch.tensor([0, 1000, 2])), ValueError, r"t must be in \[0, 999\], got 1000"),
    (dict(t_plus=torch.tensor([-1])), ValueError, r"t_plus must be in \[0, 999\], got -1"),
    (dict(t=torch.zeros(3)), ValueError, "t must have dtype int32, int64 .it indexes a table., got float32"),
    (dict(t=5), TypeError, "t must be a torch.Tensor, got int"),
    (dict(t=torch.zeros(2, dtype=torch.int64)), ValueError, r"t must have shape \[3\] or \[1\], got \[2\]"),
    (dict(t=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError, "t must be on cpu"),
    (dict(t_plus=None), TypeError, "t_plus must be a torch.Tensor"),
    (dict(alphas_cumprod=TABLE.to("meta")), ValueError, "alphas_cumprod must be on cpu"),
    (dict(alphas_cumprod=TABLE.half()), ValueError, "alphas_cumprod must have dtype float32, float64, got float16"),
    (dict(alphas_cumprod=TABLE[:0]), ValueError, "alphas_cumprod must not be empty"),
    (dict(alphas_cumprod=TABLE[None]), ValueError, r"alphas_cumprod must have shape \[T\]"),
    (dict(alphas_cumprod=None), ValueError, "give alphas_cumprod, or sigmas and path"),
    (dict(alphas_cumprod=None, sigmas=TABLE), ValueError, "path must be 'edm' or 'flow' with sigmas"),
    (dict(sigmas=TABLE), ValueError, "takes alphas_cumprod alone"),
    (dict(path="flow"), ValueError, "takes sigmas alone"),
    (dict(path="ve"), ValueError, "path must be one of 'vp', 'edm', 'flow', got 've'"),
    (dict(noise=X[:, :2]), ValueError, r"noise must have the shape of x, \[3, 4\], got \[3, 2\]"),
    (dict(noise=X.int()), ValueError, "noise must have dtype .*, got int32"),
    (dict(x=X[0]), ValueError, r"x must have shape \[B, ...\]"),
    (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    (dict(dtype=torch.int32), ValueError, "dtype must be a floating dtype"),
]


@pytest.mark.parametrize("change,error,message", BAD_NOISE, ids=[m for _, _, m in BAD_NOISE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_noise_is_refused(change, error, message, backend):
    t = torch.tensor([1, 2, 3])
    good = dict(x=X, noise=X, t=t, t_plus=t, alphas_cumprod=TABLE)
    ops.add_noise_pair(**good, backend=backend)
    with pytest.raises(error, match=message):
        ops.add_noise_pair(**{**good, **change}, backend=backend)


def test_noise_levels_without_a_table_stay_on_their_path():
    for path, wrong in (("flow", 1.5), ("flow", math.nan), ("edm", -0.1), ("edm", math.nan)):
        with pytest.raises(ValueError, match=r"t must be in \[0, "):
            ops.noised_batch(X, X, torch.tensor([wrong]), path=path)
    with pytest.raises(ValueError, match="t must have dtype float32, float64"):
        ops.noised_batch(X, X, torch.tensor([1]), path="edm")
    with pytest.raises(ValueError, match="path 'vp' needs alphas_cumprod"):
        ops.noised_batch(X, X, torch.tensor([1]), path="vp")
    with pytest.raises(ValueError, match="copies must be >= 1"):
        ops.noised_batch(X, X, torch.tensor([0.5]), path="edm", copies=0)


BAD_FORM = [
    (dict(predictions=[X, X[:2]]), ValueError, r"predictions\[1\] must have the shape of x, \[3, 4\], got \[2, 4\]"),
    (dict(predictions=X), TypeError, "predictions must be a sequence of tensors, got Tensor"),
    (dict(predictions=[]), ValueError, "predictions must be 1 to 8 tensors, got 0"),
    (dict(predictions=[X] * 9), ValueError, "predictions must be 1 to 8 tensors, got 9"),
    (dict(predictions=[X, X.to("meta")]), ValueError, r"predictions\[1\] must be on cpu like x, got meta"),
    (dict(predictions=[X, X.long()]), ValueError, r"predictions\[1\] must have dtype"),
    (dict(predictions=[X, None]), TypeError, r"predictions\[1\] must be a torch.Tensor, got NoneType"),
    (dict(coefficients=[1.0]), ValueError, "coefficients must have one entry per prediction, 2, got 1"),
    (dict(coefficients=[1.0, math.nan]), ValueError, r"coefficients\[1\] must be finite"),
    (dict(coefficients=[1.0, "1"]), TypeError, r"coefficients\[1\] must be a number"),
    (dict(weight="dreamfusion"), ValueError, "weight must be one of 'uniform', 'sds', 'fantasia3d'"),
    (dict(weight=None), TypeError, "weight must be a number"),
    (dict(weight=torch.ones(2)), ValueError, r"weight must have shape \[3\] or \[1\], got \[2\]"),
    (dict(weight="sds", t=None), ValueError, "t is needed by the weight or the prediction type"),
    (dict(weight="sds", alphas_cumprod=None), ValueError, "give alphas_cumprod"),
    (dict(prediction_type="v"), ValueError, "prediction_type must be one of 'epsilon', 'v_prediction'"),
    (dict(prediction_type=["epsilon"]), ValueError, "prediction_type must have one entry per prediction"),
    (dict(prediction_type="sample"), ValueError, "x_t is needed to convert"),
    (dict(prediction_type="flow", x_t=X), ValueError, "prediction_type 'flow' does not exist on path 'vp'"),
    (dict(at_t_plus=[0, 1], prediction_type="sample", x_t=X), ValueError, "t_plus is needed"),
    (dict(noise_coefficient=-1.0), ValueError, "noise is needed with a noise_coefficient"),
    (dict(noise=X[:1], noise_coefficient=-1.0), ValueError, "noise must have the shape of x"),
    (dict(clamp=-1.0), ValueError, "clamp must be >= 0"),
    (dict(nonfinite="ignore"), ValueError, "nonfinite must be one of"),
    (dict(reduction="sum"), ValueError, "reduction must be one of 'batch_sum', 'mean', 'none', got 'sum'"),
    (dict(t=torch.tensor([5, 6, 1000])), ValueError, r"t must be in \[0, 999\], got 1000"),
    (dict(x=X.long()), ValueError, "x must have dtype"),
]


@pytest.mark.parametrize("change,error,message", BAD_FORM, ids=[m for _, _, m in BAD_FORM])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_combinations_are_refused(change, error, message, backend):
    good = dict(
        x=X, predictions=[X, X], coefficients=[1.0, -1.0], weight="sds", t=torch.tensor([1, 2, 3]), alphas_cumprod=TABLE
    )
    ops.score_distillation(**good, backend=backend)
    with pytest.raises(error, match=message):
        ops.score_distillation(**{**good, **change}, backend=backend)


def test_bad_named_losses_are_refused():
    good = dict(t=torch.tensor([1]), alphas_cumprod=TABLE)
    with pytest.raises(ValueError, match=r"asd_loss: eps_t_uncond is needed with guidance_scale=7\.5"):
        ops.asd_loss(X, X, X, guidance_scale=7.5, **good)
    with pytest.raises(ValueError, match="sds_loss: eps_uncond is needed with guidance_scale=1"):
        ops.sds_loss(X, X, X, guidance_scale=1, cfg_formulation="original", **good)
    with pytest.raises(ValueError, match=r"vsd_loss: eps_lora_uncond is needed with guidance_scale_lora=2\.0"):
        ops.vsd_loss(X, X, X, guidance_scale_lora=2.0, **good)
    with pytest.raises(ValueError, match="cfg_formulation must be one of"):
        ops.sds_loss(X, X, X, cfg_formulation="imagen", **good)
    with pytest.raises(ValueError, match="asd_loss: mode must be one of 'stop_grad', 'mse_through'"):
        ops.asd_loss(X, X, X, mode="mse", **good)
    with pytest.raises(ValueError, match="clamp cannot be given with mode='mse_through'"):
        ops.asd_loss(X, X, X, mode="mse_through", clamp=1.0)
    with pytest.raises(ValueError, match=r"asd_loss: t must be in \[0, 999\], got 4000"):
        ops.asd_loss(X, X, X, mode="mse_through", weight="sds", t=torch.tensor([4000]), alphas_cumprod=TABLE)


@pytest.mark.parametrize("change,message", [
    (dict(t=torch.zeros(3)), "t must have dtype int32, int64"),
    (dict(plus_ratio=-0.1), "plus_ratio must be >= 0"),
    (dict(min_step=1000), "min_step must be <= 999"),
    (dict(num_train_timesteps=1), "num_train_timesteps must be >= 2"),
])  # fmt: skip
def test_bad_times_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ops.asd_timesteps(**{"t": torch.tensor([5]), "min_step": 2, **change})


def test_what_triton_cannot_serve_is_refused_with_reasons(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_backend, "interpreter_fault", lambda: None)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="takes up to four predictions"):
        ops.score_distillation(X, [X] * 5, [1.0] * 5, "uniform", backend="triton")
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        ops.score_distillation(X.double(), [X], [1.0], "uniform", backend="triton")
