"""Tests of the method: python -m pytest -q. Seeded, on the CPU, without a network.

The oracles: the official implementation's own numbers (assets/golden_*), the paper's algorithms
written out a second time, brute force, and runs of train.py that are killed, resumed and shared.
What is not the paper's is tested in support/test_support.py.
"""
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path

os.environ['CUDA_VISIBLE_DEVICES'] = ''         # also for the processes that are started here

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenizer
import train
from support.data import ImageSet
from support.losses import AdversarialLoss, PerceptualLoss
from support.run import run
from tokenizer import VQVAE
from var import VAR, block_causal_mask, draw, filter_logits

HERE = Path(__file__).resolve().parent
GOLDEN = sorted({*HERE.glob('assets/golden_*.json'), *HERE.glob('../shared/golden/*.json')})
CPU = torch.device('cpu')
# A deprecated call in this project's own lines is an error.
pytestmark = [pytest.mark.filterwarnings(f'error::{kind}:{module}')
              for kind in ('DeprecationWarning', 'FutureWarning')
              for module in ('var', 'tokenizer', 'train', 'sample', 'support')]


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, whether others ran before or not."""
    torch.manual_seed(0)


def refill(model, salt=''):
    """Weights that follow from names and shapes alone, as those behind the golden numbers."""
    for name, p in model.named_parameters():
        a = np.random.RandomState(zlib.crc32((salt + name).encode())).standard_normal(tuple(p.shape))
        if name.endswith('.weight') and 'emb' not in name:
            a = a / math.sqrt(np.prod(p.shape[1:])) if a.ndim > 1 else 1 + 0.2 * a
        else:
            a = 0.5 * a
        p.data.copy_(torch.from_numpy(a))
    return model.eval()


def models(patch_nums=(1, 2, 3, 4), depth=2, classes=5, ch_mult=(1, 2), **options):
    vae = refill(VQVAE(patch_nums, 64, 8, 32, ch_mult))
    return vae, refill(VAR(patch_nums, depth, classes, 64, 8, **options))


def areas(patch_nums):
    return [p * p for p in patch_nums]


# ---- The official numbers ----


@pytest.mark.parametrize('path', GOLDEN, ids=lambda p: p.stem)
@torch.no_grad()
def test_golden(path):
    case, want = json.loads(path.read_text()), np.load(path.with_suffix('.npz'))
    sides, V, z = case['patch_nums'], case['vocab_size'], case['z_channels']
    vae = VQVAE(sides, V, z, case['ch'], share_quant_resi=case['share_quant_resi'])
    var = VAR(sides, case['depth'], case['num_classes'], V, z, case['shared_aln'])
    for model, keys in ((vae, 'vae_keys'), (var, 'var_keys')):
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == case[keys]
        refill(model, case['salt'])

    def close(name, x):
        x = x[..., ::4, ::4] if x.ndim == 4 else x
        np.testing.assert_allclose(x.numpy(), want[name], atol=2e-4, err_msg=name)

    def equal(name, tokens):
        np.testing.assert_array_equal(torch.cat(tokens, 1).numpy(), want[name], name)

    small = np.random.RandomState(case['image_seed']).uniform(-1, 1, (case['batch'], 3, 8, 8))
    images = F.interpolate(torch.from_numpy(small.astype('float32')), mode='bilinear',
                           size=(case['image_size'],) * 2, align_corners=False)
    equal('tokens', vae.encode(images))
    tokens = list(torch.from_numpy(want['tokens']).long().split(areas(sides), dim=1))
    labels = torch.from_numpy(want['labels']).long()
    close('reconstruction', vae.decode(tokens))
    close('var_input', vae.var_input(tokens))
    close('logits', var(labels, torch.from_numpy(want['var_input']))[0])
    draw = partial(var.generate, vae, return_tokens=True)
    images, drawn = draw(labels, cfg=1.5, top_k=1, top_p=0)
    close('greedy_image', images)
    equal('greedy_tokens', drawn)
    probe = torch.empty(8).exponential_(generator=torch.Generator().manual_seed(7)).numpy()
    if not np.allclose(probe, want['rng_probe']):
        pytest.skip('this torch draws other random numbers: the seeded cases were not compared')
    images, drawn = draw(labels, cfg=0, top_k=0, top_p=0, seed=7)
    close('plain_image', images)
    equal('plain_tokens', drawn)
    images, drawn = draw(labels, cfg=1.5, top_k=40, top_p=0.9, seed=7)
    close('sample_image', images)
    equal('sample_tokens', drawn)
    draw = partial(var.generate, vae, cfg=3, top_k=40, top_p=0.95, seed=7)
    keep = torch.ones(sides[-1], sides[-1], dtype=torch.bool)
    inside = slice(round(.25 * sides[-1]), round(.75 * sides[-1]))
    keep[inside, inside] = False
    nobody = torch.full_like(labels, case['num_classes'])
    close('inpaint_image', draw(nobody, given=tokens, keep=keep))
    close('outpaint_image', draw(nobody, given=tokens, keep=~keep))
    close('edit_image', draw(labels, given=tokens, keep=keep))


# ---- The tokenizer ----


@torch.no_grad()
@pytest.mark.parametrize('sides, ch_mult', [((1, 2, 3, 4), (1, 2)), ((2, 5, 8), (1, 1, 2)), ((1,), (1,))])
def test_shapes_of_every_output(sides, ch_mult):
    vae, var = models(sides, ch_mult=ch_mult)
    size, L = sides[-1] * 2 ** (len(ch_mult) - 1), sum(areas(sides))
    images = torch.rand(2, 3, size, size) * 2 - 1
    tokens = vae.encode(images)
    assert [t.shape for t in tokens] == [(2, l) for l in areas(sides)]
    assert tokens[0].dtype == torch.int64 and vae.image_size == size
    x = vae.var_input(tokens)
    assert x.shape == (2, L - sides[0] ** 2, 8)
    logits, loss = var(torch.tensor([0, 5]), x)
    assert logits.shape == (2, L, 64) and loss is None
    assert vae.decode(tokens).shape == images.shape
    drawn, maps = var.generate(vae, torch.tensor([0, 5]), seed=1, return_tokens=True)
    assert drawn.shape == images.shape and 0 <= drawn.min() and drawn.max() <= 1
    assert [t.shape for t in maps] == [t.shape for t in tokens]
    rebuilt, loss = vae(images)
    assert rebuilt.shape == images.shape and loss.ndim == 0


@torch.no_grad()
def test_algorithms_1_and_2_as_printed():
    vae, _ = models((1, 2, 3, 4, 6, 8))
    q, images = vae.quantize, torch.rand(2, 3, 16, 16) * 2 - 1
    f = original = vae.to_latent(images)
    tokens, f_hat = [], torch.zeros_like(f)
    for k, p in enumerate(q.patch_nums):
        small = F.interpolate(f, size=(p, p), mode='area')
        distance = (small[:, None] - q.embedding.weight[None, :, :, None, None]).norm(dim=2)
        r_k = distance.argmin(1)                                            # (B, p, p)
        z_k = q.embedding.weight[r_k].permute(0, 3, 1, 2)
        if p < 8:
            z_k = F.interpolate(z_k, size=(8, 8), mode='bicubic', align_corners=False)
        conv = q.quant_resi['qresi_ls'][q.phi_index[k]]
        h = 0.5 * z_k + 0.5 * F.conv2d(z_k, conv.weight, conv.bias, padding=1)
        f, f_hat = f - h, f_hat + h
        tokens.append(r_k.flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(tokens, vae.encode(images)))
    want = vae.decoder(vae.post_quant_conv(f_hat)).clamp(-1, 1)
    torch.testing.assert_close(vae.decode(tokens), want)
    *_, undone = q.algorithm2(tokens)           # Algorithm 2 undoes 1, up to what is left of f
    torch.testing.assert_close(undone + f, original, atol=1e-4, rtol=1e-4)
    scales = vae.decode_scales(tokens)
    assert len(scales) == 6 and torch.equal(scales[-1], vae.decode(tokens))


@pytest.mark.parametrize('K, count', [(1, 4), (4, 4), (5, 4), (9, 4), (10, 10), (6, 3), (6, 1)])
def test_which_phi_serves_which_scale(K, count):
    """Against exact fractions for K without ties; the golden case of ten scales settles K = 10."""
    chosen = tokenizer.choose_phi(K, count)
    edge = Fraction(1, 12) if count == 4 else Fraction(1, 2 * count)
    ticks = [edge + (1 - 2 * edge) * Fraction(i, max(count - 1, 1)) for i in range(count)]
    for k in range(K):
        far = [abs(t - Fraction(k, max(K - 1, 1))) for t in ticks]
        assert far[chosen[k]] == min(far)
    assert tokenizer.choose_phi(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]    # as the comment has it


def test_every_weight_learns_and_dead_codes_revive():
    vae, images = VQVAE((1, 2, 4), 32, 8, 32, (1, 2)), torch.rand(16, 3, 8, 8) * 2 - 1
    for name, p in vae.named_parameters():      # branches that start at 0 would hide other weights
        if name.endswith(('conv2.weight', 'proj_out.weight')):
            torch.nn.init.normal_(p, std=0.1)
    rebuilt, loss = vae.eval()(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    still = [name for name, p in vae.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.abs().sum() > 0)]
    # Three scales use three of the four phi. Biases before a normalisation can have no effect.
    idle = f'qresi_ls.{min({*range(4)} - {*vae.quantize.phi_index})}'
    assert all(name.endswith('.bias') or idle in name for name in still), still
    vae.quantize.embedding.weight.zero_()
    assert not torch.cat(vae.encode(images), dim=1).any()       # all codes alike: total collapse
    vae.train()
    for _ in range(20):
        vae(images)
    assert torch.cat(vae.encode(images), dim=1).unique().numel() >= 24


def test_codes_are_means_of_their_vectors():
    q = VQVAE((1, 2), 4, 8, 32, (1,)).quantize
    tokens, vectors = torch.randint(4, (9, 5)), torch.randn(9, 5, 8)
    q.decay = 0
    q.update(tokens, vectors)
    for v in range(4):
        torch.testing.assert_close(q.embedding.weight[v], vectors[tokens == v].mean(0))
    before, hits = q.embedding.weight.clone(), q.ema_vocab_hit_SV.clone()
    assert hits[0].tolist() == [(tokens[:, 0] == v).sum() for v in range(4)]
    q.decay = 0.5
    q.update(tokens, vectors + 1)                               # halfway from the old to the new
    torch.testing.assert_close(q.embedding.weight, before + 0.5)
    torch.testing.assert_close(q.ema_vocab_hit_SV, hits)
    before = q.embedding.weight.clone()
    vectors[3, 2, 1] = math.nan                                 # a batch that is not finite
    q.update((tokens + 1) % 4, vectors)
    assert torch.equal(q.embedding.weight, before) and torch.equal(q.ema_vocab_hit_SV, hits)


def test_dead_codes_come_from_each_scale_alike():
    q = VQVAE((1, 2, 4), 30, 8, 32, (1,)).quantize
    vectors = q.scale_of_token.float()[None, :, None].expand(5, 21, 8)      # they tell their scale
    q.update(torch.zeros(5, 21, dtype=torch.int64), vectors)                # 1 to 29 are dead
    assert q.embedding.weight[1:, 0].long().bincount().tolist() == [9, 10, 10]


def test_training_pass_against_its_definition():
    """The loss, the straight-through estimator, and that only training moves the codebook."""
    vae, _ = models((1, 2, 4))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    q, f = vae.quantize, vae.to_latent(images)
    sums = list(q.algorithm2(vae.encode(images)))
    want = sum(1.25 * (s - f).square().mean() for s in sums) / 3
    rebuilt, loss = vae(images)
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(rebuilt.clamp(-1, 1), vae.decode(vae.encode(images)),
                               atol=1e-4, rtol=1e-4)
    weight = vae.encoder.conv_in.weight
    (through,) = torch.autograd.grad(rebuilt.sum(), weight, retain_graph=True)
    (direct,) = torch.autograd.grad(vae.to_image(f + (sums[-1] - f).detach()).sum(), weight)
    torch.testing.assert_close(through, direct, atol=1e-3, rtol=1e-3)
    before = q.embedding.weight.clone()
    vae(images)
    assert torch.equal(q.embedding.weight, before)
    vae.train()(images)
    assert not torch.equal(q.embedding.weight, before)


@torch.no_grad()
def test_tokens_are_those_of_float32_under_autocast():
    vae, _ = models()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    want = vae.encode(images)
    with torch.autocast('cpu', torch.bfloat16):
        assert vae.encoder(images).dtype == torch.bfloat16      # autocast is on
        assert all(torch.equal(a, b) for a, b in zip(vae.encode(images), want))


# ---- The transformer ----


@pytest.mark.parametrize('sides', [(1, 2), (1, 2, 3, 4), (2, 3), (1, 2, 3, 4, 6, 8)])
def test_mask_against_brute_force(sides):
    scale_of = [k for k, p in enumerate(sides) for _ in range(p * p)]
    want = [[0. if seen <= k else -math.inf for seen in scale_of] for k in scale_of]
    assert block_causal_mask(sides).tolist() == want
    assert VAR(sides, 1, 3, 8, 4).mask.tolist() == want


@pytest.mark.parametrize('grad', [False, True])     # the fused attention, and the one written out
def test_causality_of_the_transformer(grad):
    vae, var = models()
    labels, x, ends = torch.tensor([0, 1]), torch.randn(2, 29, 8), np.cumsum(areas(var.patch_nums))
    with torch.set_grad_enabled(grad):
        before = var(labels, x)[0]
        for k in range(1, 4):
            changed = x.clone()
            changed[:, ends[k - 1] - 1:ends[k] - 1] += 1        # the input of scale k
            after = var(labels, changed)[0]
            assert torch.equal(before[:, :ends[k - 1]], after[:, :ends[k - 1]])
            assert (before[:, ends[k - 1]:] != after[:, ends[k - 1]:]).any(-1).all()
        tokens = list(torch.randint(64, (2, 30)).split(areas(var.patch_nums), dim=1))
        before = var(labels, vae.var_input(tokens))[0]
        for k in range(4):                                      # r_k changes nothing up to scale k
            changed = [(t + (i == k)) % 64 for i, t in enumerate(tokens)]
            after = var(labels, vae.var_input(changed))[0]
            assert torch.equal(before[:, :ends[k]], after[:, :ends[k]])
            assert k == 3 or not torch.equal(before[:, ends[k]:], after[:, ends[k]:])


def test_attention_written_out_is_the_fused_one():
    _, var = models()
    inputs = torch.tensor([0, 1]), torch.randn(2, 29, 8)
    with torch.no_grad():
        fused = var(*inputs)[0]
    torch.testing.assert_close(var(*inputs)[0], fused)


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, {'shared_aln': True}])
@pytest.mark.parametrize('cfg', [0, 2.5])
def test_cached_generation_and_guidance_against_the_full_forward(options, cfg):
    vae, var = models(**options)
    labels = torch.tensor([3, 1, 4])
    images, tokens = var.generate(vae, labels, cfg=cfg, top_k=1, return_tokens=True)
    x = vae.var_input(tokens)
    wanted, free = var(labels, x)[0], var(torch.full_like(labels, 5), x)[0]
    sizes = areas(var.patch_nums)
    for k, (c, u) in enumerate(zip(wanted.split(sizes, dim=1), free.split(sizes, dim=1))):
        t = cfg * k / 3
        assert torch.equal(((1 + t) * c - t * u).argmax(-1), tokens[k])
    torch.testing.assert_close(images, vae.decode(tokens) / 2 + 0.5)
    assert len({str(row) for row in tokens[2].tolist()}) > 1    # the class has a say


def test_top_k_and_top_p_against_brute_force():
    logits = torch.randn(3, 7, 20).mul(2)
    for k, p in ((5, 0), (0, 0.7), (8, 0.5), (30, 0.9), (0, 1e-9), (0, 1.0), (0, 0)):
        for row, got in zip(logits.flatten(0, 1), filter_logits(logits, k, p).flatten(0, 1)):
            rank = row.argsort(descending=True)
            kept = rank[:k] if k else rank
            shares = row[kept].double().softmax(0)
            if 0 < p < 1:
                enough = [n for n in range(1, len(kept) + 1) if shares[:n].sum() >= p]
                kept = kept[:enough[0] if enough else len(kept)]
            assert got.isfinite().nonzero().flatten().tolist() == sorted(kept.tolist())
            assert torch.equal(got[kept], row[kept])


@pytest.mark.parametrize('shared', [False, True])
def test_sizes_follow_equations_7_and_8(shared):
    for d in (2, 4):
        var = VAR((1, 2), d, 10, 16, 8, shared)
        w = 64 * d
        assert var.pos_start.shape[-1] == w and len(var.blocks) == d == var.blocks[0].attn.heads
        rates = [block.drop_rate.item() for block in var.blocks]
        assert rates == pytest.approx([0.1 * d / 24 * i / (d - 1) for i in range(d)])
        weights = sum(p.numel() for name, p in var.named_parameters()
                      if 'weight' in name and ('blocks' in name or 'shared' in name))
        assert weights == (12 * d * w * w + 6 * w * w if shared else 18 * d * w * w)


def test_initial_weights():
    var, w = VAR((1, 2, 3), 4, 10, 64, 8), 256
    weights = dict(var.named_parameters())
    std = math.sqrt(1 / (3 * w))
    for name, factor in (('word_embed.weight', 1), ('blocks.0.attn.proj.weight', 8 ** -0.5),
                         ('blocks.3.ffn.fc2.weight', 8 ** -0.5), ('head.weight', 0.02), ('pos_1LC', 1)):
        assert weights[name].std().item() == pytest.approx(std * factor, rel=0.1), name
    ada = weights['blocks.2.ada_lin.1.weight']
    assert ada[:2 * w].std().item() == pytest.approx(std * 1e-5, rel=0.1)
    assert ada[2 * w:].std().item() == pytest.approx(std * 0.5, rel=0.1)
    assert not weights['blocks.1.attn.q_bias'].any()
    assert (weights['blocks.1.attn.scale_mul_1H11'] == math.log(4)).all()
    for depth, gate in ((16, 1e-3), (20, 1e-3), (24, 1e-4), (30, 1e-5)):
        var.init_weights(w, depth)
        assert ada[:2 * w].std().item() == pytest.approx(std * gate, rel=0.1)
    shared = VAR((1, 2, 3), 4, 10, 64, 8, shared_aln=True)
    shared.init_weights(w, 36)
    offset = shared.blocks[2].ada_gss[0, 0]                     # (6, w)
    assert offset[:2].std().item() == pytest.approx(w ** -0.5 * 5e-6, rel=0.15)
    assert offset[2:].std().item() == pytest.approx(w ** -0.5 * 0.5, rel=0.1)
    projection = shared.shared_ada_lin[1].weight.view(6, w, w)  # no gate factor, as in the release
    for part in projection:
        assert part.std().item() == pytest.approx(std, rel=0.1)


@torch.no_grad()
def test_label_dropout_and_stochastic_depth_belong_to_training(monkeypatch):
    _, var = models()
    x = torch.randn(1, 29, 8).expand(2, -1, -1)
    monkeypatch.setattr(var, 'label_dropout', 1.)
    var.blocks[1].drop_rate.fill_(0.)
    with_label, without = torch.tensor([1, 1]), torch.tensor([5, 5])
    dropped, nobody = var.train()(with_label, x)[0], var.eval()(without, x)[0]
    torch.testing.assert_close(dropped, nobody, atol=1e-4, rtol=1e-4)
    assert not torch.equal(var(with_label, x)[0], nobody)       # in evaluation the label counts
    gamma, block = torch.ones(4000, 1, 8), var.blocks[1].train()
    block.drop_rate.fill_(0.2)
    gates = block.drop_path(gamma)
    assert (gates == gates[..., :1]).all()                      # per image
    assert {*gates.unique().tolist()} == {0., 1.25}             # closed, or 1 / (1 - rate) open
    assert gates.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval().drop_path(gamma), gamma)
    block.train().drop_rate.fill_(1 - 1e-6)
    x = torch.randn(2, 5, 128)
    assert torch.equal(block(x, torch.ones(6, 2, 1, 128), torch.zeros(5, 5)), x)    # both closed


def test_loss_and_compiled_blocks():
    vae, var = models()
    var.train().label_dropout = 0.
    for block in var.blocks:
        block.drop_rate.zero_()
    tokens, labels = torch.randint(64, (3, 30)), torch.tensor([0, 3, 4])
    x = vae.var_input(tokens.split(areas(var.patch_nums), dim=1))
    logits, loss = var(labels, x, tokens)
    log_p = logits.double().log_softmax(-1)
    assert loss.item() == pytest.approx(-log_p.gather(2, tokens[..., None]).mean().item())
    want = torch.autograd.grad(loss, list(var.parameters()))
    for block in var.blocks:
        block.compile(backend='eager', fullgraph=True)          # one graph, no generated code
    compiled = var(labels, x, tokens)[1]
    torch.testing.assert_close(torch.autograd.grad(compiled, list(var.parameters())), want,
                               rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_loss_and_error_of_each_scale():
    vae, var = models()
    tokens, labels = torch.randint(64, (30, 30)), torch.arange(30) % 5      # parts of 25 and 5
    figures, sizes = train.grade_transformer(vae, var, tokens, labels, CPU), areas(var.patch_nums)
    logits, _ = var(labels, vae.var_input(tokens.split(sizes, dim=1)))
    nats = -logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]    # (30, 30)
    wrong = (logits.argmax(-1) != tokens).double()
    for name, x in (('loss', nats), ('error', wrong)):
        assert figures[name] == pytest.approx(x.mean().item(), rel=1e-4)
        for k, part in enumerate(x.split(sizes, dim=1)):
            assert figures[f'{name} {k}'] == pytest.approx(part.mean().item(), rel=1e-4)
        assert figures[f'{name} last'] == figures[f'{name} 3']


def test_draws_are_those_of_multinomial():
    logits = filter_logits(torch.randn(3, 7, 50), top_k=9)
    probabilities = logits.softmax(-1)
    draws = draw(probabilities, torch.Generator().manual_seed(1))
    want = torch.multinomial(probabilities.flatten(0, 1), 1,
                             generator=torch.Generator().manual_seed(1)).view(3, 7)
    assert torch.equal(draws, want)


@torch.no_grad()
def test_editing_keeps_what_it_is_told_to_keep():
    vae, var = models((1, 2, 4, 8))
    given = vae.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    keep = torch.zeros(8, 8)
    keep[:, :4] = 1
    draw = partial(var.generate, vae, torch.tensor([5, 5]), given=given, keep=keep)
    runs = [draw(seed=seed, return_tokens=True)[1] for seed in range(4)]
    for k, p in enumerate((1, 2, 4, 8)):
        left = torch.arange(p * p).view(p, p)[:, :max(p // 2, 1)].flatten()
        assert all(torch.equal(run_[k][:, left], given[k][:, left]) for run_ in runs)
        assert p == 1 or any(not torch.equal(run_[k], given[k]) for run_ in runs)


# ---- Losses and steps of training ----


def test_vgg16_is_a_distance():
    weights, c, at = {}, 3, 0
    for width, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convs):
            weights[f'features.{at}.weight'] = torch.randn(width, c, 3, 3) * 0.05
            weights[f'features.{at}.bias'] = torch.randn(width) * 0.05
            c, at = width, at + 2
        at += 1
    assert [*weights][-1] == 'features.28.bias'
    vgg = PerceptualLoss({**weights, 'classifier.0.bias': torch.zeros(3)})
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1

    def features(x):                                            # before each pooling, on ImageNet's scale
        mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
        x, at = ((x + 1) / 2 - mean) / std, 0
        for convs in (2, 2, 3, 3, 3):
            for _ in range(convs):
                x = F.conv2d(x, weights[f'features.{at}.weight'], weights[f'features.{at}.bias'], padding=1)
                x, at = x.relu(), at + 2
            yield x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
            x, at = F.max_pool2d(x, 2), at + 1

    want = sum((f - g).square().sum(1).mean() for f, g in zip(features(a), features(b))) / 5
    assert vgg(a, a) == 0 and vgg(a, b).item() == pytest.approx(want.item(), rel=1e-4)


def test_adversarial_loss():
    last, images, x = torch.nn.Parameter(torch.ones(3, 1, 1)), *torch.rand(2, 2, 3, 32, 32)
    loss, rebuilt = AdversarialLoss(0.5), last * x
    others, fool = F.mse_loss(rebuilt, images), -loss.disc(rebuilt).mean()
    hinge = (F.relu(1 - loss.disc(images)) + F.relu(1 + loss.disc(rebuilt))).mean() / 2
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm().item()
             for value in (others, fool)]
    total, weight = loss(images, rebuilt, others, last)
    assert weight.item() == pytest.approx(0.5 * norms[0] / norms[1], rel=1e-2)
    torch.testing.assert_close(total, weight * fool + hinge)
    # The decoder is to fool, the discriminator is to judge: neither gets the other's gradient.
    (of_decoder,) = torch.autograd.grad(total, last, retain_graph=True)
    torch.testing.assert_close(of_decoder,
                               weight * torch.autograd.grad(fool, last, retain_graph=True)[0])
    weights = list(loss.disc.parameters())
    torch.testing.assert_close(torch.autograd.grad(total, weights),
                               torch.autograd.grad(hinge, weights))


def test_equation_5_adds_up(tmp_path):
    """The first half of stage 1 has no L_G; the second has all terms."""
    stage = small_stage('tokenizer', tmp_path, tokenizer_steps=8)
    stage.perceptual = lambda rebuilt, images: (rebuilt - images).abs().max()
    stage.eval().config.perceptual = 3.
    stage.adversarial.forward = lambda *args: (7., torch.tensor(2.))
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    rebuilt, quantizer = stage.vae(x)
    want = (rebuilt - x).square().mean() + 0.2 * (rebuilt - x).abs().mean() + quantizer
    want = want.item() + 3 * (rebuilt - x).abs().max().item()
    found = []
    for stage.step in range(8):
        found.append(stage(images)[0].item())
    assert found == pytest.approx([want] * 4 + [want + 7] * 4, rel=1e-4)


def test_what_the_optimizer_decays(tmp_path):
    stage = small_stage('transformer', tmp_path)
    names = {p: name for name, p in stage.var.named_parameters()}
    adam = train.make_optimizer(stage)
    decayed, free = ({names[p] for p in group['params']} for group in adam.param_groups)
    matrices = ('word_embed', 'class_emb', 'head', 'blocks.0.ada_lin.1', 'head_nm.ada_lin.1',
                'blocks.0.attn.mat_qkv', 'blocks.0.attn.proj', 'blocks.0.ffn.fc1', 'blocks.0.ffn.fc2')
    assert decayed == {f'{name}.weight' for name in matrices}
    assert free == {*names.values()} - decayed
    assert [group['weight_decay'] for group in adam.param_groups] == [0.05, 0]
    assert adam.defaults['betas'] == (0.9, 0.95)


def test_learning_rate():
    """Warm-up over 2 % of the run, the peak until 5 %, then a line down to 0.01."""
    found = [train.learning_rate(progress) for progress in (0, 0.01, 0.02, 0.05, 0.525, 1)]
    assert found == pytest.approx([0.005, 0.5025, 1, 1, 0.505, 0.01])


def test_gradients_are_clipped(tmp_path):
    stage = small_stage('transformer', tmp_path, batch=16)
    forward = stage.forward
    stage.forward = lambda *batch: (1e4 * forward(*batch)[0], {})
    optimizer = train.make_optimizer(stage)
    figures = train.train_step(stage, optimizer, OFF, zero_batch('transformer'))
    weights = [p for group in optimizer.param_groups for p in group['params']]
    norms = [p.grad.norm() for p in weights if p.grad is not None]
    assert figures['gradient norm'] > 10
    assert torch.stack(norms).norm().item() == pytest.approx(2, rel=1e-3)


OFF = torch.amp.GradScaler('cpu', enabled=False)        # as train_stage has it, but in float16


def small_stage(name, tmp_path, **options):
    """A stage on 16 random images with a tiny network, in float32 and without dropout."""
    given = dict(data='cifar10', out=tmp_path, workers=0, precision='float32', ch=8, vocab_size=99,
                 patch_nums=(1, 2, 3, 4, 6, 8), device=CPU, **options)
    config = train.make_config(given, {})
    torch.manual_seed(0)
    vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
    images = ImageSet(np.zeros((16, 32, 32, 3), np.uint8), np.arange(16) % 4, 32)
    if name == 'tokenizer':
        return train.TokenizerStage(config, vae, images, images).train()
    vae.eval().requires_grad_(False)
    var = VAR(config.patch_nums, 1, 4, *vae.quantize.embedding.weight.shape)
    var.label_dropout = 0.
    stored = np.ones((16, 1, len(var.mask)), np.uint16), images.labels
    return train.TransformerStage(config, vae, var, stored, stored).train()


def zero_batch(name):
    """What batches() of small_stage(name) would yield, full of zeros."""
    images, labels = torch.zeros(16, 32, 32, 3, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64)
    tokens = torch.zeros(16, 130, dtype=torch.int64)
    return {'tokenizer': [images], 'transformer': [tokens, labels]}[name]


def gradients_of_a_step(tmp_path, n, fits=99, dropout=0.):
    """Of eight images by micro-batches of n, on a device where `fits` images fit into a pass; the
    second pass of four is the one that fails."""
    rng = torch.Generator().manual_seed(0)
    batch = [torch.randint(90, (8, 130), generator=rng), torch.arange(8) % 4]
    stage = small_stage('transformer', tmp_path, batch=8, micro_batch=n)
    stage.lr, stage.var.label_dropout, forward, passes = 0., dropout, stage.forward, []

    def limited(tokens, labels):
        passes.append(len(labels))
        result = forward(tokens, labels)
        if len(labels) > fits and passes.count(4) != 1:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return result

    stage.forward = limited
    figures = train.train_step(stage, train.make_optimizer(stage), OFF, batch)
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {**gradients, 'loss': figures['loss']}


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """1, 2, 4 and 3 (unequal) micro-batches give the same gradients."""
    want = gradients_of_a_step(tmp_path, 8)
    for n in (4, 2, 3):
        torch.testing.assert_close(gradients_of_a_step(tmp_path, n), want, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_halved_until_they_fit(tmp_path, capsys):
    """With dropout: the step that starts over draws the same random numbers."""
    found = gradients_of_a_step(tmp_path, 8, fits=3, dropout=0.5)
    said = capsys.readouterr().out
    assert '4 images per pass' in said and '2 images per pass' in said
    want = gradients_of_a_step(tmp_path, 2, dropout=0.5)
    assert all(torch.equal(found[name], want[name]) for name in want)
    with pytest.raises(torch.OutOfMemoryError):
        gradients_of_a_step(tmp_path, 8, fits=0)
    stage, passes = small_stage('tokenizer', tmp_path), []      # needs the whole batch

    def fail(images):
        passes.append(len(images))
        raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')

    stage.forward = fail
    with pytest.raises(RuntimeError):
        train.train_step(stage, train.make_optimizer(stage), OFF, zero_batch('tokenizer'))
    assert passes == [16]


def test_the_seed_and_the_learning_rate_of_a_step(tmp_path, monkeypatch):
    """Randomness depends on seed, stage, step and rank alone; the learning rate on the step."""
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda tensor: None)
    seeds = []
    for seed, name, step, rank in ((0, 'tokenizer', 1, 0), (0, 'tokenizer', 2, 0), (0, 'tokenizer', 1, 1),
                                   (0, 'transformer', 1, 0), (5, 'tokenizer', 1, 0), (0, 'tokenizer', 1, 0)):
        stage, seen = small_stage(name, tmp_path, seed=seed, steps=8, tokenizer_steps=8), []
        stage.register_forward_pre_hook(lambda *args: seen.append(torch.initial_seed()))
        monkeypatch.setattr(train, 'rank_and_world', lambda: (rank, 2))
        optimizer, stage.step = train.make_optimizer(stage), step
        train.train_step(stage, optimizer, OFF, zero_batch(name))
        assert optimizer.param_groups[0]['lr'] == stage.lr * train.learning_rate(step / 8)
        seeds += seen
    assert len({*seeds}) == 5 and seeds[0] == seeds[-1]


def test_rows_of_stored_tokens(tmp_path):
    """The views of an image have its label."""
    stage = small_stage('transformer', tmp_path, batch=4, steps=2)
    stored = np.arange(16 * 3 * 130).reshape(16, 3, 130) % 99, np.arange(16) % 4
    tokens, labels = stage.fetch_rows(stored, [0, 4, 47])
    for row, (image, view) in enumerate(((0, 0), (1, 1), (15, 2))):
        assert tokens[row].tolist() == stored[0][image, view].tolist() and labels[row] == image % 4


@pytest.mark.parametrize('name', ['tokenizer', 'transformer'])
def test_a_step_never_waits_for_the_device(name, tmp_path):
    """On fake tensors, whose values cannot be read: a step that reads one, as .item(), a boolean
    index or nonzero() do, would wait for a GPU, and fails here."""
    stage = small_stage(name, tmp_path, adversarial=0.5, tokenizer_steps=4)
    with FakeTensorMode():
        for module in stage.modules():
            for tensors in (module._parameters, module._buffers):
                for n, p in tensors.items():
                    if p is not None:
                        fake = torch.empty(p.shape, dtype=p.dtype)
                        parameter = isinstance(p, torch.nn.Parameter)
                        tensors[n] = torch.nn.Parameter(fake, p.requires_grad) if parameter else fake
        batch, optimizer = zero_batch(name), train.make_optimizer(stage)
        for stage.step in range(4):             # without and with discriminator
            figures = train.train_step(stage, optimizer, OFF, batch)
        with pytest.raises(Exception, match='item|data-dependent|DataDependent|_local_scalar'):
            figures['loss'].item()
        if name == 'transformer':
            labels = torch.zeros(2, dtype=torch.int64)
            stage.var.eval().generate(stage.vae, labels, top_k=9, top_p=0.9)


@pytest.mark.parametrize('name', ['tokenizer', 'transformer'])
def test_no_tensor_is_left_on_the_cpu(name, tmp_path, monkeypatch):
    """A step and a generation on the meta device, which like a GPU does not mix with the CPU."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **options: contextlib.nullcontext())
    stage = small_stage(name, tmp_path, adversarial=0.5, tokenizer_steps=4)
    stage.config.device = torch.device('meta')
    stage.to('meta')

    def on_meta(module, inputs):                # nn.Embedding would take indices on the CPU
        assert all(x.device.type == 'meta' for x in inputs if torch.is_tensor(x)), module

    for module in stage.modules():
        module.register_forward_pre_hook(on_meta)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad])
    for stage.step in range(4):
        figures = train.train_step(stage, optimizer, OFF, zero_batch(name))
    assert figures['loss'].device.type == 'meta'
    images = torch.zeros(2, 3, 32, 32, device='meta')
    if name == 'transformer':
        images = stage.var.eval().generate(stage.vae, [0, 1])
    assert stage.vae.decode(stage.vae.encode(images)).device.type == 'meta'


# ---- Runs ----

TINY = ('--size', 32, '--depth', 1, '--ch', 8, '--vocab-size', 99, '--tokenizer-batch', 4,
        '--batch', 4, '--tokenizer-steps', 4, '--steps', 3, '--workers', 0)


def write_images(root, n=6, classes=('cat', 'dog')):
    """Images of every kind, in class folders; and one that is cut short."""
    rng = np.random.default_rng(0)
    kinds = [('RGB', 'jpg'), ('L', 'png'), ('CMYK', 'jpg'), ('P', 'gif'), ('RGBA', 'webp'), ('RGB', 'bmp')]
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (40, 34 + 6 * i, 3), dtype=np.uint8))
            mode, end = kinds[i % 6]
            image.convert(mode).save(root / c / f'{i} é.{end}')
    whole = (root / classes[0] / '0 é.jpg').read_bytes()
    (root / classes[0] / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (root / classes[0] / '.hidden.jpg').write_bytes(whole)
    (root / classes[0] / 'notes.txt').write_text('no image')


def command(module, *words, monkeypatch, folder):
    """Runs a command as the shell would, in `folder` and on the CPU; its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr('sys.argv', [module.__name__ + '.py', *map(str, words), '--device', 'cpu'])
    try:
        run(module.main)
    except SystemExit as e:
        return e.code
    return 0


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with images and a run of train.py on them."""
    folder = tmp_path_factory.mktemp('trained')
    write_images(folder / 'images')
    with pytest.MonkeyPatch.context() as patch:
        assert command(train, '--data', 'images', *TINY, '--flip', monkeypatch=patch, folder=folder) == 0
    return folder


def launch(folder, module, *words, torchrun=(), extra=''):
    """Starts a command in a process of its own, in float32 on one thread, or by torchrun."""
    script = folder / f'{module}_{len(list(folder.iterdir()))}.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(HERE)!r})\nimport torch, sample, tokenizer, '
                      f'train, var\nfrom support.run import run\ntorch.set_num_threads(1)\n'
                      f'{extra}\nif __name__ == "__main__":\n    run({module}.main)\n')
    if torchrun:
        torchrun = ['-m', 'torch.distributed.run', *torchrun, '--']
    return subprocess.Popen([sys.executable, *torchrun, script, *map(str, words), '--device', 'cpu',
                             '--precision', 'float32'], cwd=folder, stdout=subprocess.DEVNULL,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'})


def same_weights(a, b):
    a, b = (torch.load(f, weights_only=True) for f in (a, b))
    return all(torch.equal(v, b[part][k]) for part in ('vae', 'var') for k, v in a[part].items())


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    words = '--ckpt', trained / 'model.pt', '--cls', 'all', '--n', 12, '--batch', 5
    two = '--standalone', '--nproc_per_node', '2'
    runs = [launch(tmp_path, 'sample', *words, '--npz', f'{len(how)}.npz', torchrun=how)
            for how in ((), two)]
    assert [run_.wait() for run_ in runs] == [0, 0]
    one, both = (np.load(tmp_path / name) for name in ('0.npz', f'{len(two)}.npz'))
    assert np.array_equal(one['arr_0'], both['arr_0']) and np.array_equal(one['arr_1'], both['arr_1'])


def test_two_machines_train_as_one_process_does(trained, tmp_path):
    """Two agents of torchrun with one --out. Without dropout, L_G, and the restart of dead codes,
    which are of each process's part of the batch."""
    words = ('--data', trained / 'images', *TINY, '--flip', '--micro-batch', 1, '--adversarial', 0,
             '--init', trained / 'model.pt')
    still = 'var.VAR.label_dropout = tokenizer.Quantizer.dead_below = 0.'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agent = ('--nnodes', '2', '--nproc_per_node', '1', '--rdzv_backend', 'c10d', '--rdzv_endpoint',
             f'127.0.0.1:{port}')
    runs = [launch(tmp_path, 'train', *words, '--out', 'one', extra=still)]
    runs += [launch(tmp_path, 'train', *words, '--out', 'two', extra=still, torchrun=agent)
             for _ in range(2)]
    assert [run_.wait() for run_ in runs] == [0, 0, 0]
    one, two = ([line.split(',') for line in (tmp_path / n / 'log.csv').read_text().splitlines()]
                for n in ('one', 'two'))
    assert [row[:2] + row[3:4] for row in one] == [row[:2] + row[3:4] for row in two] and len(one) > 25
    for a, b in zip(one[1:], two[1:]):
        # Rates differ, and these figures are of one process's part of the batch.
        if a[3] not in ('train images/s', 'train PSNR', 'train quantizer', 'train error'):
            assert float(a[4]) == pytest.approx(float(b[4]), rel=1e-3, abs=1e-4), (a, b)


def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    """Killed in stage 1, resumed, killed in stage 2, and resumed."""
    words = '--data', trained / 'images', *TINY, '--flip', '--tokenizer-steps', 30, '--steps', 40
    whole = launch(tmp_path, 'train', *words, '--out', 'whole')
    ckpt, deadline = tmp_path / 'killed' / 'ckpt.pt', time.time() + 60
    for kill_in in ('tokenizer', 'transformer'):
        always = 'train.SAVE_EVERY = -1'                        # it saves after every step
        run_ = launch(tmp_path, 'train', *words, '--out', 'killed', extra=always)
        state = {'stage': ''}
        # In stage 1 after L_G has started.
        first = 17 if kill_in == 'tokenizer' else 2
        while time.time() < deadline and (state['stage'] != kill_in or state['step'] < first):
            time.sleep(0.02)
            if ckpt.exists():
                state = torch.load(ckpt, weights_only=True)
        run_.kill()
        assert run_.wait() == -signal.SIGKILL and state['stage'] == kill_in
        words = '--resume', '--workers', 0
    assert launch(tmp_path, 'train', *words, '--out', 'killed').wait() == 0
    assert whole.wait() == 0
    assert same_weights(tmp_path / 'whole' / 'ckpt.pt', tmp_path / 'killed' / 'ckpt.pt')
    rows = (tmp_path / 'killed' / 'log.csv').read_text().splitlines()
    assert sum(row.startswith('stage,') for row in rows) == 1


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, monkeypatch, capsys):
    """The last good ckpt.pt stays, and a gradient that is not finite counts, too."""
    calls, forward = [], train.TokenizerStage.forward

    def poisoned(stage, images):
        loss, figures = forward(stage, images)
        calls.append(loss)
        if len(calls) == 3:
            loss = loss + (loss - loss.detach()).sqrt()         # finite, but not its gradient
        return loss, figures

    monkeypatch.setattr(train.TokenizerStage, 'forward', poisoned)
    monkeypatch.setattr(train, 'SAVE_EVERY', -1)
    words = ['--data', trained / 'images', *TINY, '--tokenizer-steps', 100, '--out', tmp_path]
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 2
    assert 'no longer finite' in capsys.readouterr().err
    ckpt = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert ckpt['step'] == 2 and all(v.isfinite().all() for v in ckpt['vae'].values())
    assert len(calls) == 3 and all(loss.isfinite() for loss in calls)
    monkeypatch.setattr(train, 'SAVE_EVERY', 60)                # seen where the loss is shown, too
    calls.clear()
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 2
    assert 3 <= len(calls) < 10


def test_float16(trained, tmp_path, monkeypatch, capsys):
    """The gradients that are clipped are not scaled ones, and steps that are not finite are left out
    until the scale is 1."""
    go = partial(command, train, '--precision', 'float16', '--workers', 0, '--out', tmp_path,
                 monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--data', trained / 'images', *TINY) == 0
    norms = [float(row.split(',')[4]) for row in (tmp_path / 'log.csv').read_text().splitlines()
             if 'gradient norm' in row]
    assert len(norms) == 7 and sum(norm < 1000 for norm in norms) >= 5
    scale = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['scaler']['scale']
    forward, calls = train.TransformerStage.forward, []

    def poisoned(stage, *batch):
        if len(calls) == 1:
            before.update({name: p.clone() for name, p in stage.var.named_parameters()})
        calls.append(0)
        loss, figures = forward(stage, *batch)
        return loss * math.inf, figures

    before = {}
    monkeypatch.setattr(train.TransformerStage, 'forward', poisoned)
    assert go('--resume', '--steps', 100) == 2
    assert 'no longer finite' in capsys.readouterr().err
    assert len(calls) >= math.log2(scale)


def test_fine_tuning(trained, tmp_path, monkeypatch, capsys):
    """--init starts from weights: with other classes, only the class embeddings are new."""
    write_images(tmp_path / 'other', 3, ('x', 'y', 'z'))
    source = trained / 'model.pt'
    go = partial(command, train, '--data', 'other', *TINY, monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--init', source, '--tokenizer', source, '--steps', 0, '--out', 'a') == 0
    before, after = (torch.load(f, weights_only=True)['var'] for f in (source, tmp_path / 'a' / 'model.pt'))
    changed = [k for k, v in before.items() if not torch.equal(v, after[k])]
    assert changed == ['class_emb.weight'] and len(after['class_emb.weight']) == 4
    assert torch.equal(after['class_emb.weight'][-1], before['class_emb.weight'][-1])      # no class
    assert go('--init', source, '--tokenizer-steps', 0, '--steps', 0, '--out', 'b') == 0    # stage 1, too
    assert same_weights(tmp_path / 'a' / 'model.pt', tmp_path / 'b' / 'model.pt')
    assert go('--init', source, '--tokenizer', source, '--depth', 2, '--out', 'c') == 2
    assert 'it needs the --depth' in capsys.readouterr().err
