"""Epipolar attention inside diffusers' temporal decoder: the real class, a small random one."""

import copy

import pytest
import torch

from cvctoolkit.nn import DepthTruncatedEpipolarAttention, EpipolarUpBlock, add_epipolar_attention
from cvctoolkit.ops import intrinsics_from_extent
from cvctoolkit.ops.cameras.samples import poses
from tests.oracles import oracle

diffusers = oracle("diffusers")

VIEWS, SIDE = 3, 16


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    ).eval()


def scene(batch=2):
    g = torch.Generator().manual_seed(0)
    viewmats = poses(g, batch, VIEWS).float()
    viewmats[..., :3, 3] = torch.tensor([0.0, 0.0, 2.0])
    Ks = intrinsics_from_extent(torch.full((batch, VIEWS), 2.0), SIDE, SIDE)
    depth = 1.5 + torch.rand(batch, VIEWS, SIDE, SIDE, generator=g)
    latents = torch.randn(batch * VIEWS, 4, SIDE // 2, SIDE // 2, generator=g)
    front = torch.rand(batch, 3, SIDE, SIDE, generator=g) * 2 - 1
    return latents, dict(depth=depth, Ks=Ks, viewmats=viewmats, width=SIDE, height=SIDE), front


def patched(autoencoder, train=False, **options):
    vae = copy.deepcopy(autoencoder)
    guide = add_epipolar_attention(vae.decoder, num_views=VIEWS, num_samples=(3, 2), **options)
    if train:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in guide.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return vae, guide


def test_an_untrained_patch_changes_nothing(autoencoder):
    latents, views, front = scene()
    vae, guide = patched(autoencoder)
    unchanged = []
    for block in guide.blocks:
        block.attention.register_forward_hook(lambda _, args, out: unchanged.append(torch.equal(args[0], out)))
    with torch.no_grad():
        expected = autoencoder.decode(latents, num_frames=VIEWS).sample
        with guide(**views, front=front):
            out = vae.decode(latents, num_frames=VIEWS).sample
    assert unchanged == [True, True]
    assert torch.allclose(out, expected, atol=1e-5)  # convolutions round by where their operands lie in memory


def test_fused_decodes_as_the_paper(autoencoder):
    latents, views, front = scene()
    images, gradients = [], []
    for impl in ("paper", "fused"):
        vae, guide = patched(autoencoder, train=True, impl=impl)
        vae.double()
        leaf = latents.double().requires_grad_()
        with guide(**views, front=front):
            out = vae.decode(leaf, num_frames=VIEWS).sample
        out.square().mean().backward()
        images.append(out.detach())
        gradients.append([leaf.grad, *(p.grad for p in guide.parameters())])
    assert torch.allclose(images[0], images[1], rtol=1e-8, atol=1e-8)
    for paper, fused in zip(*gradients):
        assert torch.allclose(paper, fused, rtol=1e-6, atol=1e-9)


def test_attention_sits_at_the_blocks_own_resolution(autoencoder):
    vae, guide = patched(autoencoder)
    assert [b.attention.dim for b in guide.blocks] == [64, 32]
    assert [b.attention.num_samples for b in guide.blocks] == [3, 2]
    seen = []
    for block in guide.blocks:
        block.attention.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    latents, views, _ = scene(1)
    with torch.no_grad(), guide(**views):
        vae.decode(latents, num_frames=VIEWS)
    assert seen == [(1, VIEWS, 64, 8, 8), (1, VIEWS, 32, 16, 16)]


def test_the_front_image_reaches_the_other_views_through_attention_alone(autoencoder):
    _, views, front = scene(1)
    _, guide = patched(autoencoder, train=True)
    block = guide.blocks[0]
    x = torch.randn(VIEWS, 64, 8, 8, generator=torch.Generator().manual_seed(2))

    def attended(image):
        with torch.no_grad(), guide(**views, front=image):
            return block._attend(x)

    change = (attended(front) - attended(None)).abs().amax((1, 2, 3))
    assert (change > 1e-4).all()
    with torch.no_grad():
        block.attention.to_out.weight.zero_()
    change = (attended(front) - attended(None)).abs().amax((1, 2, 3))
    assert change[0] > 1e-4 and (change[1:] == 0).all()


def test_gradient_checkpointing(autoencoder):
    latents, views, front = scene(1)
    vae, guide = patched(autoencoder, train=True)
    vae.train()

    def gradients():
        vae.zero_grad()
        with guide(**views, front=front):
            vae.decode(latents, num_frames=VIEWS).sample.square().mean().backward()
        return [p.grad.clone() for p in guide.parameters()]

    plain = gradients()
    vae.enable_gradient_checkpointing()
    for a, b in zip(gradients(), plain):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)
    with guide(**views, front=front):
        loss = vae.decode(latents, num_frames=VIEWS).sample.mean()
    with pytest.raises(RuntimeError, match="backward inside"):
        loss.backward()


def test_a_half_precision_decoder(autoencoder):
    latents, views, front = scene(1)
    vae, guide = patched(autoencoder, train=True)
    with torch.no_grad(), guide(**views, front=front):
        exact = vae.decode(latents, num_frames=VIEWS).sample
        half = vae.to(torch.bfloat16).decode(latents.bfloat16(), num_frames=VIEWS).sample
    assert half.dtype == torch.bfloat16 and (half - exact).norm() <= 0.1 * exact.norm()


def test_training_touches_the_new_parameters(autoencoder):
    latents, views, front = scene(1)
    vae, guide = patched(autoencoder)
    vae.requires_grad_(False)
    names = {n for n, p in vae.named_parameters() if any(p is q for q in guide.parameters())}
    assert names and all(".attention." in n or ".front." in n for n in names)
    for p in guide.parameters():
        p.requires_grad_()
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-2)
    target = torch.zeros(VIEWS, 3, SIDE, SIDE)
    losses = []
    for _ in range(5):
        with guide(**views, front=front):
            loss = (vae.decode(latents, num_frames=VIEWS).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_copied_decoder_keeps_its_own_guide(autoencoder):
    latents, views, _ = scene(1)
    vae, guide = patched(autoencoder, train=True)
    twin = copy.deepcopy(vae)
    other = twin.decoder.up_blocks[0].guide
    assert other is not guide and other.blocks[0] is twin.decoder.up_blocks[0]
    with torch.no_grad():
        with guide(**views), pytest.raises(RuntimeError, match="no views are known"):
            twin.decode(latents, num_frames=VIEWS)
        with other(**views), guide(**views):
            a, b = (v.decode(latents, num_frames=VIEWS).sample for v in (vae, twin))
    assert torch.equal(a, b)


class TestBadInput:
    def test_outside_of_the_guide(self, autoencoder):
        vae, _ = patched(autoencoder)
        with pytest.raises(RuntimeError, match="no views are known"):
            vae.decode(scene()[0], num_frames=VIEWS)

    def test_a_chunk_of_the_views(self, autoencoder):
        latents, views, _ = scene(1)
        vae, guide = patched(autoencoder)
        with guide(**views), pytest.raises(ValueError, match="all views of a scene in one chunk"):
            vae.decode(latents[:2], num_frames=2)

    def test_no_place_for_a_front_image(self, autoencoder):
        _, views, front = scene(1)
        _, guide = patched(autoencoder, front_view=False)
        with pytest.raises(ValueError, match="front_view=False"), guide(**views, front=front):
            pass

    @pytest.mark.parametrize("name,value", [("depth", torch.ones(3, 4, 4)), ("front", torch.ones(1, 1, 4, 4))])
    def test_shapes(self, autoencoder, name, value):
        _, views, _ = scene(1)
        _, guide = patched(autoencoder)
        with pytest.raises(ValueError, match=f"{name} must have shape"), guide(**{**views, name: value}):
            pass

    def test_not_a_decoder(self, autoencoder):
        with pytest.raises(TypeError, match="decoder must be a TemporalDecoder"):
            add_epipolar_attention(torch.nn.Linear(1, 1))
        with pytest.raises(ValueError, match="num_samples must have 2 numbers"):
            add_epipolar_attention(copy.deepcopy(autoencoder).decoder)
        vae, guide = patched(autoencoder)
        with pytest.raises(TypeError, match="got EpipolarUpBlock"):
            add_epipolar_attention(vae.decoder, num_samples=(1, 1))
        with pytest.raises(TypeError, match="got Linear"):
            EpipolarUpBlock(torch.nn.Linear(1, 1), DepthTruncatedEpipolarAttention(4), guide)
