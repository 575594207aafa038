"""Tests: python -m pytest -q test_var.py. Seeded, no network, under 90 seconds on two CPU cores.

The oracles: the official implementation's own numbers (assets/golden_*), the paper's algorithms
written out a second time, brute force, and real files and commands.
"""
import argparse
import hashlib
import http.server
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import sample
import train
import var as var_module
from tokenizer import VGG16, VQVAE, PatchDiscriminator
from var import VAR, Block, block_causal_mask, filter_logits

HERE = Path(__file__).resolve().parent
GOLDEN = sorted({*HERE.glob('assets/golden_*.json'), *HERE.glob('../shared/golden/*.json')})
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


def cuts(patch_nums):
    return [p * p for p in patch_nums]


# ------------------------------------------------------------------------------------------------
# The official numbers

@pytest.mark.parametrize('path', GOLDEN, ids=lambda p: p.stem)
@torch.no_grad()
def test_golden(path):
    case, want = json.loads(path.read_text()), np.load(path.with_suffix('.npz'))
    sides, V, z = case['patch_nums'], case['vocab_size'], case['z_channels']
    vae = VQVAE(sides, V, z, case['ch'], share_quant_resi=case['share_quant_resi'])
    var = VAR(sides, case['depth'], case['num_classes'], V, z, case['shared_aln'],
              case['attn_l2_norm'])
    for model, keys in (vae, 'vae_keys'), (var, 'var_keys'):
        assert {k: list(v.shape) for k, v in model.official_state_dict().items()} == case[keys]
        refill(model, case['salt'])

    def close(name, x):
        x = x[..., ::4, ::4] if x.ndim == 4 else x
        np.testing.assert_allclose(x.numpy(), want[name], atol=2e-4, err_msg=name)

    def equal(name, tokens):
        np.testing.assert_array_equal(torch.cat(tokens, 1).numpy(), want[name], name)

    small = np.random.RandomState(case['image_seed']).uniform(-1, 1, (case['batch'], 3, 8, 8))
    images = F.interpolate(torch.from_numpy(small.astype('float32')), size=(case['image_size'],) * 2,
                           mode='bilinear', align_corners=False)
    equal('tokens', vae.encode(images))
    tokens = list(torch.from_numpy(want['tokens']).long().split(cuts(sides), dim=1))
    labels = torch.from_numpy(want['labels']).long()
    close('reconstruction', vae.decode(tokens))
    close('var_input', vae.var_input(tokens))
    close('logits', var(labels, torch.from_numpy(want['var_input'])))
    draw = partial(var.generate, vae, return_tokens=True)
    images, drawn = draw(labels, cfg=1.5, top_k=1, top_p=0)
    close('greedy_image', images), equal('greedy_tokens', drawn)
    probe = torch.empty(8).exponential_(generator=torch.Generator().manual_seed(7)).numpy()
    if not np.allclose(probe, want['rng_probe']):
        pytest.skip("this torch draws other random numbers: the seeded cases were not compared")
    images, drawn = draw(labels, cfg=0, top_k=0, top_p=0, seed=7)
    close('plain_image', images), equal('plain_tokens', drawn)
    images, drawn = draw(labels, cfg=1.5, top_k=40, top_p=0.9, seed=7)
    close('sample_image', images), equal('sample_tokens', drawn)
    draw = partial(var.generate, vae, cfg=3, top_k=40, top_p=0.95, seed=7)
    close('smooth_image', draw(labels, smooth=True))
    box = argparse.Namespace(box=['.25,.25,.75,.75'], mask=None, outside=False)
    keep = ~torch.from_numpy(sample.new_places(box, sides[-1], case['image_size'])[0])
    nobody = torch.full_like(labels, case['num_classes'])
    close('inpaint_image', draw(nobody, given=tokens, keep=keep))
    close('outpaint_image', draw(nobody, given=tokens, keep=~keep))
    close('edit_image', draw(labels, given=tokens, keep=keep))


# ------------------------------------------------------------------------------------------------
# The tokenizer

@torch.no_grad()
@pytest.mark.parametrize('sides, ch_mult', [((1, 2, 3, 4), (1, 2)), ((2, 5, 8), (1, 1, 2)), ((1,), (1,))])
def test_shapes_of_every_output(sides, ch_mult):
    vae, var = models(sides, ch_mult=ch_mult)
    size, L = sides[-1] * 2 ** (len(ch_mult) - 1), sum(cuts(sides))
    images = torch.rand(2, 3, size, size) * 2 - 1
    tokens = vae.encode(images)
    assert [t.shape for t in tokens] == [(2, l) for l in cuts(sides)]
    assert tokens[0].dtype == torch.int64 and vae.image_size == size
    x = vae.var_input(tokens)
    assert x.shape == (2, L - sides[0] ** 2, 8)
    assert var(torch.tensor([0, 5]), x).shape == (2, L, 64)
    assert vae.decode(tokens).shape == images.shape
    drawn, maps = var.generate(vae, torch.tensor([0, 5]), seed=1, return_tokens=True)
    assert drawn.shape == images.shape and 0 <= drawn.min() and drawn.max() <= 1
    assert [t.shape for t in maps] == [t.shape for t in tokens]
    rebuilt, loss, usage = vae(images)
    assert rebuilt.shape == images.shape and loss.ndim == 0
    assert usage[0].shape == (2, L) and usage[1].shape == (2, L, 8)


@torch.no_grad()
def test_algorithms_1_and_2_as_printed():
    vae, _ = models((1, 2, 3, 4, 6, 8))
    q, images = vae.quantize, torch.rand(2, 3, 16, 16) * 2 - 1
    f = original = vae.latent(images)
    tokens, f_hat = [], torch.zeros_like(f)
    for k, p in enumerate(q.patch_nums):
        small = F.interpolate(f, size=(p, p), mode='area')
        distance = (small[:, None] - q.embedding.weight[None, :, :, None, None]).norm(dim=2)
        r_k = distance.argmin(1)                                                # (B, p, p)
        z_k = q.embedding.weight[r_k].permute(0, 3, 1, 2)
        z_k = F.interpolate(z_k, size=(8, 8), mode='bicubic', align_corners=False) if p < 8 else z_k
        h = 0.5 * z_k + 0.5 * q.quant_resi['qresi_ls'][q.phi_of_scale[k]](z_k)
        f, f_hat = f - h, f_hat + h
        tokens.append(r_k.flatten(1))
    assert all(torch.equal(a, b) for a, b in zip(tokens, vae.encode(images)))
    torch.testing.assert_close(vae.decode(tokens), vae.decoder(vae.post_quant_conv(f_hat)).clamp(-1, 1))
    *_, undone = q.algorithm2(tokens)               # Algorithm 2 undoes 1, up to what is left of f
    torch.testing.assert_close(undone + f, original, atol=1e-4, rtol=1e-4)
    scales = vae.decode_scales(tokens)
    assert len(scales) == 6 and torch.equal(scales[-1], vae.decode(tokens))


@pytest.mark.parametrize('K, share', [(1, 4), (4, 4), (5, 4), (9, 4), (10, 10), (6, 3), (6, 1)])
def test_which_phi_serves_which_scale(K, share):
    """Against exact fractions, for K without ties; the golden case of ten scales settles K = 10."""
    phi = VQVAE(range(1, K + 1), 8, 8, 32, (1,), share).quantize.phi_of_scale
    edge = Fraction(1, 12) if share == 4 else Fraction(1, 2 * share)
    ticks = [edge + (1 - 2 * edge) * Fraction(i, max(share - 1, 1)) for i in range(share)]
    for k in range(K):
        far = [abs(t - Fraction(k, max(K - 1, 1))) for t in ticks]
        assert phi[k] in [i for i in range(share) if far[i] == min(far)]


def test_training_moves_every_weight_and_keeps_codes_alive():
    vae, images = VQVAE((1, 2, 4), 32, 8, 32, (1, 2)), torch.rand(16, 3, 8, 8) * 2 - 1
    for name, p in vae.named_parameters():                     # branches that start at 0 hide weights
        if name.endswith(('conv2.weight', 'proj_out.weight')):
            torch.nn.init.normal_(p, std=0.1)
    rebuilt, loss, _ = vae(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    still = [n for n, p in vae.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.abs().sum() > 0)]
    # Three scales use three of the four phi. Biases before a normalisation may be without effect.
    idle = f'qresi_ls.{min({*range(4)} - {*vae.quantize.phi_of_scale})}'
    assert all(n.endswith('.bias') or idle in n for n in still), still
    vae.quantize.embedding.weight.zero_()
    assert not torch.cat(vae.encode(images), dim=1).any()      # all codes alike: total collapse
    for t in range(20):
        vae.quantize.update(*vae(images)[2], decay=t / (t + 1))
    assert torch.cat([r.flatten() for r in vae.encode(images)]).unique().numel() >= 24


def test_codes_are_means_of_their_vectors():
    q = VQVAE((1, 2), 4, 8, 32, (1,)).quantize
    tokens, vectors = torch.randint(4, (9, 5)), torch.randn(9, 5, 8)
    q.update(tokens, vectors, decay=0)
    for v in range(4):
        torch.testing.assert_close(q.embedding.weight[v], vectors[tokens == v].mean(0))
    before, hits = q.embedding.weight.clone(), q.ema_vocab_hit_SV.sum(0)
    q.update(tokens, vectors + 1, decay=0.5)                   # halfway between the old and the new
    torch.testing.assert_close(q.embedding.weight, before + 0.5)
    torch.testing.assert_close(q.ema_vocab_hit_SV.sum(0), hits)


def test_scale_dropout_and_straight_through():
    vae, _ = models((1, 2, 4))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    rebuilt = vae(images, noise=torch.tensor([0.0, 0.9]))[0]   # the first scale alone; all scales
    stages = vae.decode_scales(vae.encode(images))
    torch.testing.assert_close(rebuilt[0].clamp(-1, 1), stages[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rebuilt[1].clamp(-1, 1), stages[-1][1], atol=1e-4, rtol=1e-4)
    plain = vae(images, quantized=False)
    assert plain[2] is None and plain[1] == 0
    (gradient,) = torch.autograd.grad(vae(images)[0].sum(), vae.encoder.conv_in.weight)
    assert gradient.abs().sum() > 0


def test_learned_losses():
    shapes, c, at = {}, 3, 0
    for width, convs in (64, 2), (128, 2), (256, 3), (512, 3), (512, 3):
        for _ in range(convs):
            shapes[f'features.{at}.weight'], shapes[f'features.{at}.bias'] = (width, c, 3, 3), (width,)
            c, at = width, at + 2
        at += 1
    weights = {k: torch.randn(s) * 0.05 for k, s in shapes.items()}
    assert [k for k in weights][-1] == 'features.28.bias'
    vgg, a, b = VGG16({**weights, 'classifier.0.bias': torch.zeros(3)}), *torch.rand(2, 1, 3, 32, 32)
    assert vgg(a, a) == 0 and vgg(a, b) > 0
    disc = PatchDiscriminator(8)
    fake = b.requires_grad_()
    fool, judge = disc.losses(a, fake)
    fool.backward(retain_graph=True)
    assert fake.grad.abs().sum() > 0 and all(p.grad is None for p in disc.parameters())
    fake.grad = None
    judge.backward()
    assert fake.grad is None and all(p.grad is not None for p in disc.parameters())
    torch.testing.assert_close(fool, -disc(fake).mean())
    torch.testing.assert_close(judge, (F.relu(1 - disc(a)).mean() + F.relu(1 + disc(fake)).mean()) / 2)


# ------------------------------------------------------------------------------------------------
# The transformer

@pytest.mark.parametrize('sides', [(1, 2), (1, 2, 3, 4), (2, 3), (1, 2, 3, 4, 6, 8)])
def test_mask_against_brute_force(sides):
    scale_of = [k for k, p in enumerate(sides) for _ in range(p * p)]
    want = [[0. if scale_of[j] <= scale_of[i] else -math.inf for j in range(len(scale_of))]
            for i in range(len(scale_of))]
    assert block_causal_mask(sides).tolist() == want


@torch.no_grad()
@pytest.mark.parametrize('training', [False, True])
def test_causality_of_the_transformer(training):
    vae, var = models()
    var.train(training)
    labels, x, ends = torch.tensor([0, 1]), torch.randn(2, 29, 8), np.cumsum(cuts(var.patch_nums))
    noise = torch.ones(2, 5)
    before = var(labels, x, noise)
    for k in range(1, 4):
        changed = x.clone()
        changed[:, ends[k - 1] - 1:ends[k] - 1] += 1           # the input of scale k
        after = var(labels, changed, noise)
        assert torch.equal(before[:, :ends[k - 1]], after[:, :ends[k - 1]])
        assert (before[:, ends[k - 1]:] != after[:, ends[k - 1]:]).any(-1).all()
    tokens = list(torch.randint(64, (2, 30)).split(cuts(var.patch_nums), dim=1))
    before = var(labels, vae.var_input(tokens), noise)
    for k in range(4):                                         # r_k changes nothing up to scale k
        changed = [t + (i == k) for i, t in enumerate(tokens)]
        after = var(labels, vae.var_input([t % 64 for t in changed]), noise)
        assert torch.equal(before[:, :ends[k]], after[:, :ends[k]])
        assert k == 3 or not torch.equal(before[:, ends[k]:], after[:, ends[k]:])


@torch.no_grad()
def test_causality_of_algorithm_1():
    vae, _ = models()
    f = vae.latent(torch.rand(1, 3, 8, 8))
    runs = [[], []]
    for other, run in zip((0, 1), runs):
        steps = vae.quantize.algorithm1(f)
        for k in range(4):
            if k == 2 and other:                               # another r_3 is forced on the algorithm
                vae.quantize.nearest = lambda x: torch.full(x.shape[:2], 63)
            run.append(next(steps)[0])
            vae.quantize.__dict__.pop('nearest', None)
    same = [torch.equal(a, b) for a, b in zip(*runs)]
    assert same[:3] == [True, True, False]


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, {'shared_aln': True}, {'qk_norm': False}])
@pytest.mark.parametrize('cfg', [0, 2.5])
def test_cached_generation_and_guidance_against_the_full_forward(options, cfg):
    vae, var = models(**options)
    labels = torch.tensor([3, 1, 4])
    images, tokens = var.generate(vae, labels, cfg=cfg, top_k=1, return_tokens=True)
    x = vae.var_input(tokens)
    wanted, free = var(labels, x), var(torch.full_like(labels, 5), x)
    for k, (c, u) in enumerate(zip(*(y.split(cuts(var.patch_nums), dim=1) for y in (wanted, free)))):
        t = cfg * k / 3
        assert torch.equal(((1 + t) * c - t * u).argmax(-1), tokens[k])
    torch.testing.assert_close(images, vae.decode(tokens) / 2 + 0.5)
    assert len({*map(str, tokens[2].tolist())}) > 1            # the class has a say


def test_top_k_and_top_p_against_brute_force():
    logits = torch.randn(3, 7, 20).mul(2)
    for k, p in (5, 0), (0, 0.7), (8, 0.5), (30, 0.9), (0, 1e-9), (0, 1.0), (0, 0):
        for row, got in zip(logits.flatten(0, 1), filter_logits(logits, k, p).flatten(0, 1)):
            rank = row.argsort(descending=True)
            kept = rank[:k] if k else rank
            shares = row[kept].double().softmax(0)
            if 0 < p < 1:
                kept = kept[:next(n for n in range(1, 21) if shares[:n].sum() >= p or n == len(kept))]
            assert got.isfinite().nonzero().flatten().tolist() == sorted(kept.tolist())
            assert torch.equal(got[kept], row[kept])


@pytest.mark.parametrize('shared', [False, True])
def test_sizes_follow_equations_7_and_8(shared):
    for d in (2, 4):
        var = VAR((1, 2), d, 10, 16, 8, shared)
        w = 64 * d
        assert var.pos_start.shape[-1] == w and len(var.blocks) == d == var.blocks[0].attn.heads
        assert max(b.drop_rate for b in var.blocks) == pytest.approx(0.1 * d / 24)
        weights = sum(p.numel() for n, p in var.named_parameters()
                      if 'weight' in n and ('blocks' in n or 'shared' in n))
        assert weights == (12 * d * w * w + 6 * w * w if shared else 18 * d * w * w)
    assert 18 * 6 * 384 ** 2 == 73728 * 6 ** 3                 # (8), 15.9 M at d = 6


def test_initial_weights():
    var, ada = VAR((1, 2, 3), 4, 10, 64, 8), 'blocks.2.ada_lin.1.weight'
    w, weights = 256, dict(var.named_parameters())
    std = math.sqrt(1 / (3 * w))
    for name, factor in (('word_embed.weight', 1), ('blocks.0.attn.proj.weight', 8 ** -0.5), (
            'blocks.3.ffn.fc2.weight', 8 ** -0.5), ('head.weight', 0.02), ('pos_1LC', 1)):
        assert weights[name].std().item() == pytest.approx(std * factor, rel=0.1), name
    assert weights[ada][:2 * w].std().item() == pytest.approx(std * 1e-5, rel=0.1)
    assert weights[ada][2 * w:].std().item() == pytest.approx(std * 0.5, rel=0.1)
    assert not weights['blocks.1.attn.q_bias'].any()
    assert (weights['blocks.1.attn.scale_mul_1H11'] == math.log(4)).all()


def test_label_dropout_and_stochastic_depth_belong_to_training():
    _, var = models()
    labels, x, noise = torch.tensor([1, 1]), torch.randn(1, 29, 8).expand(2, -1, -1), torch.ones(2, 5)
    noise[0, 0] = 0.05                                         # the first image loses its label
    with torch.no_grad():
        a, b = var.train()(labels, x, noise)
        nobody = var(torch.tensor([5]), x[:1], torch.ones(1, 5))[0]
        c, d = var.eval()(labels, x, noise)
        assert torch.equal(c, d) and not torch.equal(a, b)
        torch.testing.assert_close(a, nobody, atol=1e-4, rtol=1e-4)
        # A branch that is dropped adds nothing, one that is kept adds 1 / (1 - rate) of itself.
        block, h, zero, one = var.blocks[1], torch.randn(1, 3, 128), torch.zeros(1, 1, 128), torch.ones(1, 1, 128)
        for gates in (one, zero), (zero, one):
            branch = block(h, (*gates, zero, zero, zero, zero), [3]) - h
            for draw, share in (0.001, 0), (0.5, 1 / (1 - 0.1 * 2 / 24)):
                dropped = block(h, block.drop((*gates, zero, zero, zero, zero), torch.full((1, 2), draw)), [3]) - h
                torch.testing.assert_close(dropped, branch * share)


def test_tokens_are_kept_until_something_changes(tmp_path, monkeypatch):
    vae, args = VQVAE((1, 2), 16, 4, 8, (1, 2)), argparse.Namespace(out=tmp_path, device='cpu', workers=0)
    items, labels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8), np.arange(6) % 2
    tokens, told = train.tokenize(vae, train.Pictures(items, labels, 4, flip=True), args, 'train')
    assert tokens.shape == (12, 5) and told.tolist() == [0, 0, 1, 1] * 3
    encode = vae.encode
    monkeypatch.setattr(vae, 'encode', None)                   # from here on, encoding would fail
    again = train.tokenize(vae, train.Pictures(items, labels, 4, flip=True), args, 'train')
    assert torch.equal(again[0], tokens) and torch.equal(again[1], told)
    for other in ((items[::-1], labels, 4, True), (items, 1 - labels, 4, True), (items, labels, 4, False)):
        with pytest.raises(TypeError):
            train.tokenize(vae, train.Pictures(*other), args, 'train')
    monkeypatch.setattr(vae, 'encode', encode)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(-1)                         # another tokenizer, other tokens
    assert not torch.equal(train.tokenize(vae, train.Pictures(items, labels, 4, True), args, 'train')[0], tokens)


def test_losses_in_pieces_and_blocks_compiled_or_checkpointed_against_the_whole():
    vae, var = models((1, 2, 3, 4, 6))                         # 66 tokens: a piece and the beginning of one
    tokens, labels, noise = torch.randint(64, (3, 66)), torch.tensor([0, 3, 4]), torch.rand(3, 5)
    noise[0, 1] = 0.                                           # a branch that stochastic depth leaves out
    inputs = labels, vae.var_input(tokens.split(cuts(var.patch_nums), dim=1)), noise
    logits = var.train()(*inputs).transpose(1, 2)
    whole = F.cross_entropy(logits, tokens, reduction='none')
    wanted = torch.autograd.grad(whole.square().sum(), [*var.parameters()])
    compiled = torch.compile(Block.__call__, backend='eager', fullgraph=True)      # that it is one graph, not its speed
    for var.run_block in Block.__call__, compiled, partial(checkpoint, compiled, use_reentrant=False):
        each, right = var(*inputs, tokens)
        torch.testing.assert_close(each, whole)
        assert torch.equal(right, logits.argmax(1) == tokens)
        found = torch.autograd.grad(each.square().sum(), [*var.parameters()])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_scale_by_scale_is_that_under_the_mask(monkeypatch):
    attention, x, mask = var_module.Attention(128, 2, qk_norm=True), torch.randn(3, 21, 128), block_causal_mask((1, 2, 4))
    each = attention(x, [1, 5, 21], None)
    monkeypatch.setattr(var_module, 'attend',
                        lambda q, k, v: (q @ k.transpose(2, 3) + mask).softmax(-1) @ v)
    torch.testing.assert_close(each, attention(x, [21], None))     # all tokens at once, with the mask


@torch.no_grad()
def test_editing_keeps_what_it_is_told_to_keep():
    vae, var = models((1, 2, 4, 8), ch_mult=(1, 2))
    given = vae.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    keep = torch.zeros(8, 8)
    keep[:, :4] = 1
    draw = partial(var.generate, vae, torch.tensor([5, 5]), given=given, keep=keep, return_tokens=True)
    runs = [draw(seed=s)[1] for s in range(4)]
    for k, p in enumerate((1, 2, 4, 8)):
        left = torch.arange(p * p).view(p, p)[:, :max(p // 2, 1)].flatten()
        assert all(torch.equal(r[k][:, left], given[k][:, left]) for r in runs)
        assert p == 1 or any(not torch.equal(r[k], given[k]) for r in runs)


@torch.no_grad()
def test_seeds():
    vae, var = models()
    a, b, c = (var.generate(vae, torch.tensor([1, 2]), seed=s) for s in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_round_trip_of_weights(tmp_path):
    for options in {}, {'shared_aln': True}, {'qk_norm': False}:
        vae, var = models((1, 3, 4), 3, 7, **options)
        again = VAR.from_state_dict(var.official_state_dict())
        assert again.patch_nums == (1, 3, 4) and again.num_classes == 7
        for a, b in (var, again), (vae, VQVAE.from_state_dict(vae.official_state_dict(), (1, 3, 4))):
            b = b.state_dict()
            assert a.state_dict().keys() == b.keys()
            assert all(torch.equal(v, b[k]) for k, v in a.state_dict().items())
    for kind in 'released', 'official trainer':
        files = tmp_path / 'var.pth', tmp_path / 'vae.pth'
        if kind == 'released':
            torch.save(var.state_dict(), files[0]), torch.save(vae.state_dict(), files[1])
            loaded = sample.load_models(*files)
        else:
            torch.save({'trainer': {'var_wo_ddp': var.state_dict(), 'vae_local': vae.state_dict()}},
                       files[0])
            loaded = sample.load_models(files[0])
        assert torch.equal(loaded[1].pos_1LC, var.pos_1LC) and loaded[2]['sampling']['top_k'] == 900
        assert torch.equal(loaded[0].quantize.embedding.weight, vae.quantize.embedding.weight)


# ------------------------------------------------------------------------------------------------
# Data

def test_shapes_are_a_function_of_the_seed():
    a, b, c = train.shapes(40, 32, 0), train.shapes(40, 32, 0), train.shapes(40, 32, 1)
    assert a[0].shape == (40, 32, 32, 3) and a[0].dtype == np.uint8 and a[1].dtype == np.int64
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0]) and len(train.SHAPES) == 10


def write_pictures(root, n=6, classes=('cat', 'dog')):
    """Pictures of every kind, in folders of classes; and one that is cut short."""
    rng = np.random.default_rng(0)
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(n):
            image = Image.fromarray(rng.integers(0, 256, (40, 34 + 6 * i, 3), dtype=np.uint8))
            mode, end = [('RGB', 'jpg'), ('L', 'png'), ('CMYK', 'jpg'), ('P', 'gif'), ('RGBA', 'webp'),
                         ('RGB', 'bmp')][i % 6]
            image.convert(mode).save(root / c / f'{i} é.{end}')
    whole = (root / classes[0] / '0 é.jpg').read_bytes()
    (root / classes[0] / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (root / classes[0] / '.hidden.jpg').write_bytes(whole)
    (root / classes[0] / 'notes.txt').write_text('no picture')


def test_pictures_of_every_kind(tmp_path):
    def colour(name, image, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(sample.open_picture(tmp_path / name, 8)).mean((0, 1))

    red = Image.new('RGB', (20, 10), (200, 20, 30))
    for mode, name in ('RGB', 'a.png'), ('CMYK', 'b.tiff'), ('P', 'c.png'), ('RGBA', 'd.webp'):
        assert np.abs(colour(name, red.convert(mode)) - (200, 20, 30)).max() < 12, name
    assert np.abs(colour('e.png', Image.new('RGBA', (9, 9), (0, 0, 0, 0))) - 255).max() == 0
    grey = Image.fromarray(np.full((9, 9), 32896, np.uint16))
    grey.putpixel((0, 0), 65535)
    assert np.abs(colour('f.png', grey) - 128).max() < 3
    exif = red.getexif()
    exif[0x112] = 6                                            # turned by a quarter
    red.save(tmp_path / 'g.jpg', exif=exif)
    assert sample.open_picture(tmp_path / 'g.jpg', 8).size == (10, 20)
    for name, data in ('empty.jpg', b''), ('cut.png', (tmp_path / 'a.png').read_bytes()[:40]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(sample.Problem, match=name):
            sample.open_picture(tmp_path / name, 8)


def test_folder_of_pictures(tmp_path, capsys):
    write_pictures(tmp_path / 'all', 12)
    training, val, classes = train.picture_folder(tmp_path / 'all')
    assert classes == ['cat', 'dog'] and [len(training[0]), len(val[0])] == [23, 2]
    assert not set(training[0]) & set(val[0])
    pictures = train.Pictures(*training, 32, flip=True)
    (batch, index), = pictures.load([[(i, (0, i)) for i in range(23)]])
    assert batch.shape == (23, 32, 32, 3) and 'cut.jpg' in capsys.readouterr().err
    cut = next(i for i, f in enumerate(pictures.items) if f.name == 'cut.jpg')
    assert index[cut] == cut + 1 and pictures.labels.tolist() == [0] * 12 + [1] * 11
    again, _ = next(pictures.load([[(i, (0, i)) for i in range(23)]]))
    assert torch.equal(batch, again)                           # the crop is a function of the draw
    write_pictures(tmp_path / 'two' / 'train')
    write_pictures(tmp_path / 'two' / 'val', 3, ('dog',))
    _, val, classes = train.picture_folder(tmp_path / 'two')
    assert classes == ['cat', 'dog'] and set(val[1]) == {1}
    for i in range(20):                                         # one picture a class
        (tmp_path / 'single' / f'{i:02d}').mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(tmp_path / 'single' / f'{i:02d}' / 'a.png')
    training, val, classes = train.picture_folder(tmp_path / 'single')
    assert (len(training[0]), val[1].tolist(), len(classes)) == (18, [9, 19], 20)
    assert train.picture_folder(tmp_path / 'all' / 'dog')[2] == ['dog']


def make_cifar(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 10, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    for name, r in zip([f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin'], records):
        (folder / name).write_bytes(r.tobytes())
    (folder / 'batches.meta.txt').write_text('\n'.join('abcdefghij') + '\n\n')
    return records


def test_cifar10(tmp_path):
    records = make_cifar(tmp_path / 'cifar-10-batches-bin')
    archive = tmp_path / 'www' / 'cifar-10-binary.tar.gz'
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(tmp_path / 'cifar-10-batches-bin', 'cifar-10-batches-bin')
        tar.add(tmp_path / 'cifar-10-batches-bin' / 'test_batch.bin', '../../escaped.bin')
    for data in tmp_path, tmp_path / 'cifar-10-batches-bin', archive, archive.parent:
        training, (x, y), classes = train.cifar10(train.cifar10_path(data))
        assert classes == list('abcdefghij') and len(training[0]) == 50
        assert y.tolist() == records[5, :, 0].tolist()
        assert x[3, 5, 7].tolist() == [records[5, 3, 1 + c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert not list(tmp_path.parent.glob('**/escaped.bin'))
    # The download, from a server on this machine: kept if the checksum is right, else not.
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(
        http.server.SimpleHTTPRequestHandler, directory=archive.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/{archive.name}'
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    for name, sha256 in ('bad', '0' * 64), ('good', digest):
        if name == 'bad':
            with pytest.raises(sample.Problem, match='cannot fetch'):
                train.fetch(address, sha256, tmp_path / name)
            assert not list((tmp_path / name).iterdir())
        else:
            got = train.fetch(address, sha256, tmp_path / name)
            assert got.name == archive.name and got.read_bytes() == archive.read_bytes()
    server.shutdown()
    server.server_close()
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(sample.Problem, match='whole'):
        train.cifar10(archive)


# ------------------------------------------------------------------------------------------------
# The commands

def command(module, *words, monkeypatch, folder):
    """Runs train.py or sample.py as the shell would, in `folder`; its exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr('sys.argv', [module.__name__ + '.py', *map(str, words)])
    try:
        sample.run(module.main)
    except SystemExit as e:
        return e.code
    return 0


# A network that is quick to train, for all that follows.
train.SMALL['network'] = dict(ch=8, ch_mult=(1, 2, 4), vocab_size=99, z_channels=8, res_blocks=1,
                              normalise=False)
TINY = ('--size', 32, '--depth', 1, '--batch', 4, '--tokenizer-steps', 3, '--steps', 3, '--workers', 0,
        '--device', 'cpu')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    write_pictures(folder / 'pictures')
    with pytest.MonkeyPatch.context() as patch:
        assert command(train, '--data', 'pictures', *TINY, '--flip', monkeypatch=patch, folder=folder) == 0
    return folder


def test_train_and_sample(trained, monkeypatch, capsys):
    assert {'ckpt.pt', 'log.csv', 'samples.png', 'reconstructions.png'} <= {*os.listdir(trained)}
    ckpt = torch.load(trained / 'ckpt.pt', weights_only=True)
    assert ckpt['classes'] == ['cat', 'dog'] and ckpt['config']['depth'] == 1
    names = {line.split(',')[3] for line in (trained / 'log.csv').read_text().splitlines()}
    assert {'PSNR', 'loss', 'loss last', 'error', 'error last', 'codes used'} <= names
    go = partial(command, sample, monkeypatch=monkeypatch, folder=trained)
    assert go('--cls', 'all', '--n', 3, '--out', 'a.png', '--scales', 'grow.gif') == 0
    assert Image.open(trained / 'a.png').size == (34 * 3 - 2, 34 * 2 - 2)
    assert Image.open(trained / 'grow.gif').n_frames == 6
    assert go('--cls', 'dog', '--n', 2, '--out', 'b.png', '--scales', 'grow.png', '--smooth',
              '--top-k', 99999) == 0
    assert Image.open(trained / 'grow.png').size == (34 * 6 - 2, 34 * 2 - 2)
    photo = trained / 'pictures' / 'dog' / '1 é.png'
    edit = partial(go, '--edit', photo, '--n', 2, '--out', 'c.png', '--box', '0,0,.5,.5')
    assert edit() == edit('--cls', 'cat', '--box', '.5,.5,1,1') == edit('--outside') == 0
    assert Image.open(trained / 'c.png').size == (34 * 4 - 2, 32)
    assert go('--cls', 1, '--n', 1, '--out', 'd.png') == go('--cls', 1, '--n', 1, '--out', 'e.png') == 0
    assert (trained / 'd.png').read_bytes() == (trained / 'e.png').read_bytes()

def test_editing_outputs(trained, monkeypatch, tmp_path):
    """Masks, pasting, several boxes, rejection, png and npz, from the command line."""
    go = partial(command, sample, '--ckpt', trained / 'ckpt.pt', monkeypatch=monkeypatch, folder=tmp_path)
    photo = trained / 'pictures' / 'dog' / '1 é.png'
    mask = np.zeros((80, 80), np.uint8)
    mask[10:35, 40:75] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    edit = ('--edit', photo, '--n', 2, '--paste')
    assert go(*edit, '--mask', 'mask.png', '--out', 'a.png') == 0
    whole, masked, one, two = np.split(np.asarray(Image.open(tmp_path / 'a.png'))[:, :134], [34, 68, 102], 1)
    whole, masked, one = whole[:, :32], masked[:, :32], one[:, :32]
    kept = np.asarray(Image.fromarray(mask).resize((32, 32), Image.LANCZOS)) <= 127
    assert (masked[~kept] == 128).all() and np.array_equal(masked[kept], whole[kept])
    far = kept & (np.add.outer(np.arange(32) ** 0, np.arange(32)) < 8)         # away from the soft edge
    assert np.array_equal(one[far], whole[far]) and not np.array_equal(one[~kept], whole[~kept])
    args = argparse.Namespace(mask=None, box=['0,0,.25,.25', '.5,.5,1,1'], outside=False)
    new, pixels = sample.new_places(args, 8, 32)
    assert new.sum() == 4 + 16 and new[:2, :2].all() and new[4:, 4:].all() and pixels.sum() == 20 * 16
    judge = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 2)).eval()
    torch.jit.trace(judge, torch.rand(2, 3, 32, 32)).save(tmp_path / 'judge.pt')
    torch.export.save(torch.export.export(judge, (torch.rand(6, 3, 32, 32),)), tmp_path / 'judge.pt2')
    for name in 'judge.pt', 'judge.pt2':
        assert go('--n', 3, '--reject', 3, '--classifier', name, '--out', f'{name}.png') == 0
    assert (tmp_path / 'judge.pt.png').read_bytes() == (tmp_path / 'judge.pt2.png').read_bytes()
    assert go('--cls', 0, 1, '--n', 3, '--png', 'all') == 0
    assert sorted(os.listdir(tmp_path / 'all')) == [f'{i:06d}.png' for i in range(6)]
    assert go('--cls', 'all', '--n', 40, '--npz', 'a.npz') == 0
    with np.load(tmp_path / 'a.npz') as f:                      # as the evaluators read it
        pictures, labels = f['arr_0'], f['arr_1']
    assert pictures.shape == (80, 32, 32, 3) and pictures.dtype == np.uint8
    assert sorted(labels) == [0] * 40 + [1] * 40 and labels.tolist() != sorted(labels)
    vae, var, ckpt = sample.load_models(trained / 'ckpt.pt')
    with sample.precision(torch.device('cpu')):
        first = var.generate(vae, torch.tensor([0] * 40 + [1] * 10), seed=0, **ckpt['sampling'])
    order = np.random.default_rng(0).permutation(80)            # the npz holds what Python draws
    assert np.array_equal(pictures[np.argsort(order)][:50], sample.to_uint8(first))


@torch.no_grad()
def test_rejection_keeps_the_best(tmp_path):
    vae, var = models()
    labels = torch.tensor([1, 2, 1])
    draws = [var.generate(vae, labels, seed=s, cfg=0, return_tokens=True) for s in (5, 6, 7)]
    images, tokens = sample.draw(vae, var, labels, 5, 3, cfg=0)
    log_p = []
    for _, drawn in draws:                                      # log p by its definition, (6)
        x, target = vae.var_input(drawn), torch.cat(drawn, 1)
        log_p.append(sum(-F.cross_entropy(var(y, x).transpose(1, 2), target, reduction='none').sum(1) * sign
                         for y, sign in ((labels, 1), (torch.full_like(labels, 5), -1))))
    best = torch.stack(log_p).argmax(0)
    for i, r in enumerate(best):
        assert torch.equal(images[i], draws[r][0][i])
        assert all(torch.equal(a[i], b[i]) for a, b in zip(tokens, draws[r][1]))
    brightness = lambda x: torch.stack([x.mean((1, 2, 3)) * c for c in range(5)], 1) * 100  # noqa: E731
    images, _ = sample.draw(vae, var, labels, 5, 3, brightness, cfg=0)
    want = torch.stack([brightness(x).log_softmax(1)[range(3), labels] for x, _ in draws]).argmax(0)
    assert all(torch.equal(images[i], draws[r][0][i]) for i, r in enumerate(want))


def launch(folder, processes, module, *words, **patches):
    """Runs a command in processes of its own, in float32 on one thread each; its exit status."""
    script = folder / f'{module}_float32.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(HERE)!r})\nimport torch, sample, train\n'
                      'torch.cpu._is_avx512_bf16_supported = lambda: False\ntorch.set_num_threads(1)\n'
                      f'train.SMALL["network"] = {train.SMALL["network"]}\n'
                      + ''.join(f'{k.replace("__", ".")} = {v!r}\n' for k, v in patches.items())
                      + f'if __name__ == "__main__":\n    sample.run({module}.main)\n')
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), '--']
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), script, *map(str, words)],
                            cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    words = '--ckpt', trained / 'ckpt.pt', '--cls', 'all', '--n', 40
    runs = [launch(tmp_path, n, 'sample', *words, '--npz', f'{n}.npz') for n in (1, 2)]
    assert [run.wait() for run in runs] == [0, 0]
    one, two = (np.load(tmp_path / f'{n}.npz') for n in (1, 2))
    assert np.array_equal(one['arr_0'], two['arr_0']) and np.array_equal(one['arr_1'], two['arr_1'])


def test_two_processes_train_to_the_losses_of_one_and_a_kill_changes_nothing(trained, tmp_path):
    words, ends = ('--data', trained / 'pictures', *TINY, '--flip'), {}
    first = launch(tmp_path, 1, 'train', *words, '--out', 'killed', train__SAVE_EVERY=0)
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / 'killed' / 'ckpt.pt').exists():
        time.sleep(0.01)
    time.sleep(1)                                               # it saves after every step
    first.kill(), first.wait()
    for name, n, *resume in ('one', 1), ('two', 2), ('killed', 1, '--resume'):
        assert launch(tmp_path, n, 'train', *words, '--out', name, *resume).wait() == 0
        ends[name] = torch.load(tmp_path / name / 'ckpt.pt', weights_only=True)
    for part in 'vae', 'var':
        assert all(torch.equal(v, ends['killed'][part][k]) for k, v in ends['one'][part].items())
    one, two = ([line.split(',') for line in (tmp_path / name / 'log.csv').read_text().splitlines()]
                for name in ('one', 'two'))
    assert [row[:2] + row[3:4] for row in one] == [row[:2] + row[3:4] for row in two] and len(one) > 25
    for a, b in zip(one, two):
        assert float(a[4]) == pytest.approx(float(b[4]), rel=1e-3, abs=1e-4), (a, b)


def test_eval(trained, monkeypatch, capsys, tmp_path):
    go = partial(command, train, '--eval', trained / 'ckpt.pt', '--data', trained / 'pictures', '--out',
                 tmp_path, '--workers', 0, '--device', 'cpu', monkeypatch=monkeypatch, folder=tmp_path)
    assert go() == 0
    said = capsys.readouterr().out
    with np.load(tmp_path / 'reconstructions.npz') as f:
        rebuilt, labels = f['arr_0'], f['arr_1']
    assert rebuilt.shape == (2, 32, 32, 3) and labels.tolist() == [0, 1]
    _, val, _ = train.picture_folder(trained / 'pictures')
    val = np.stack([sample.crop(sample.open_picture(f, 32), 32, min(36, Image.open(f).size[1])) for f in val[0]])
    psnr = np.mean([-10 * np.log10(((a / 255. - b / 255.) ** 2).mean()) for a, b in zip(val, rebuilt)])
    assert float(said.split('PSNR ')[1].split()[0]) == pytest.approx(psnr, abs=0.1)
    assert 'loss 6' in said and 'error last' in said
    vae, _, _ = sample.load_models(trained / 'ckpt.pt')
    with torch.no_grad(), sample.precision(torch.device('cpu')):
        maps = vae.encode(sample.to_tensor(val))
    bits = 0
    for r_k in maps:
        share = r_k.unique(return_counts=True)[1] / r_k.numel()
        bits += -(share * share.log2()).sum().item() * r_k.shape[1]
    assert float(said.split('bits an image ')[1].split()[0]) == pytest.approx(bits, abs=1)


def test_ssim_against_its_definition():
    a, b = torch.rand(2, 2, 3, 20, 24)
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / 4.5)
    window /= window.sum()
    for i in range(2):
        values = []
        for c in range(3):
            for y in range(10):
                for z in range(14):
                    p, q = (t[i, c, y:y + 11, z:z + 11].double().numpy() for t in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    both = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * both + 9e-4) / (
                        (mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
        assert train.ssim(a, b)[i].item() == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize('stop_at', [2, 5])
def test_a_stopped_run_ends_with_the_same_bits(trained, tmp_path, monkeypatch, stop_at):
    calls, rate = [], train.learning_rate

    def interrupt(progress):
        calls.append(progress)
        if len(calls) == 2 * stop_at:
            signal.raise_signal(signal.SIGTERM)
        return rate(progress)

    go = partial(command, train, '--out', tmp_path, monkeypatch=monkeypatch, folder=trained)
    monkeypatch.setattr(train, 'learning_rate', interrupt)
    assert go('--data', 'pictures', *TINY, '--flip') == 128 + signal.SIGTERM
    assert go('--resume', '--device', 'cpu', '--workers', 0) == 0
    assert len(calls) == 12                 # two groups of weights, six steps: none was made twice
    a, b = (torch.load(f / 'ckpt.pt', weights_only=True) for f in (trained, tmp_path))
    for part in 'vae', 'var':
        assert all(torch.equal(v, b[part][k]) for k, v in a[part].items())


def test_accumulation_gives_the_gradient_of_the_whole_batch(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.torch.cpu, '_is_avx512_bf16_supported', lambda: False, raising=False)
    ends = []
    for parts in 1, 2:
        out = tmp_path / str(parts)
        assert command(train, '--data', 'pictures', *TINY, '--accumulate', parts, '--out', out,
                       monkeypatch=monkeypatch, folder=trained) == 0
        ends.append(torch.load(out / 'ckpt.pt', weights_only=True))
    for part in 'vae', 'var':
        for k, v in ends[0][part].items():
            torch.testing.assert_close(v, ends[1][part][k], atol=2e-3, rtol=1e-2, msg=k)


@pytest.mark.parametrize('bad, status', [({1}, 0), ({*range(1, 40)}, 2)])
def test_steps_that_are_not_finite(trained, tmp_path, monkeypatch, capsys, bad, status):
    """One is left out, as if it had not been; ten in a row end the run with the last good checkpoint."""
    calls, forward = [], train.TokenizerStage.forward

    def poisoned(stage, pictures, noise):
        loss, *rest = forward(stage, pictures, noise)
        calls.append(loss)
        return (loss * (np.nan if len(calls) - 1 in bad else 1), *rest)

    monkeypatch.setattr(train.TokenizerStage, 'forward', poisoned)
    monkeypatch.setattr(train, 'SAVE_EVERY', 0)
    words = ['--data', trained / 'pictures', *TINY, '--tokenizer-steps', 20, '--out', tmp_path]
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == status
    out, error = capsys.readouterr()
    assert out.count('not finite') == min(len(bad), 9) and ('smaller --lr' in error) == bool(status)
    ckpt = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert all(v.isfinite().all() for v in ckpt['vae'].values())


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('touched'),)


def test_bad_input_gets_one_line_and_status_2(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'broken' / 'cat').mkdir(parents=True)
    for i in range(3):
        (tmp_path / 'broken' / 'cat' / f'{i}.jpg').write_bytes(b'\xff\xd8')
    whole = (trained / 'ckpt.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(whole[:len(whole) // 2])
    torch.save({'something': 'else'}, tmp_path / 'other.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps(Evil()))
    torch.save({'version': 1, 'vae': Evil()}, tmp_path / 'evil2.pt')
    vae, var = models()
    Image.new('L', (9, 9)).save(tmp_path / 'black.png')
    narrow = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 1))
    torch.jit.trace(narrow, torch.rand(2, 3, 32, 32)).save(tmp_path / 'narrow.pt')
    torch.save(var.state_dict(), tmp_path / 'var.pth')
    torch.save(VQVAE(ch=32, ch_mult=(1,)).state_dict(), tmp_path / 'vae.pth')
    ckpt, photo = ('--ckpt', trained / 'ckpt.pt'), trained / 'pictures' / 'dog' / '1 é.png'
    bad = [
        (train, ['--data', 'nowhere'], 'no such folder'), (train, ['--data', 'empty'], 'two pictures'),
        (train, ['--data', 'broken', *TINY], 'none of'), (train, ['--size', 48], 'choose from'),
        (train, ['--patch-nums', '1,2,5'], 'rising'), (train, ['--patch-nums', 'x'], 'rising'),
        (train, ['--depth', 0], 'start at 1'), (train, ['--device', 'warp'], 'warp'),
        (train, ['--batch', 3, '--accumulate', 2], 'multiple'), (train, ['--resume'], 'cannot read'),
        (train, ['--resume', '--out', tmp_path / 'empty'], 'cannot read'),
        (sample, [], 'cannot read ckpt.pt'), (sample, ['--ckpt', 'cut.pt'], 'cut short'),
        (sample, ['--ckpt', 'other.pt'], 'no checkpoint'), (sample, ['--ckpt', 'list.pt'], 'no checkpoint'),
        (sample, ['--ckpt', 'evil.pt'], 'evil.pt'), (sample, ['--ckpt', 'evil2.pt'], 'evil2.pt'),
        (sample, ['--ckpt', 'var.pth'], 'add --tokenizer'), (sample, ['--ckpt', 'vae.pth'], 'tokenizer only'),
        (sample, ['--ckpt', 'var.pth', '--tokenizer', trained / 'ckpt.pt'], ''),
        (sample, [*ckpt, '--cls', 'cow'], 'no such class'), (sample, [*ckpt, '--cls', 2], 'no such class'),
        (sample, [*ckpt, '--top-p', 2], '0 to 1'), (sample, [*ckpt, '--n', 0], 'start at'),
        (sample, [*ckpt, '--n', 1, '--out', 'a.xyz'], 'kind of picture'),
        (sample, [*ckpt, '--n', 1, '--out', trained / 'log.csv' / 'a.png'], 'cannot write'),
        (sample, [*ckpt, '--edit', 'nothing.jpg', '--box', '0,0,.5,.5'], 'nothing.jpg'),
        (sample, [*ckpt, '--edit', photo], 'must be new'),
        (sample, [*ckpt, '--edit', photo, '--box', '0,0,1,1'], 'must be new'),
        (sample, [*ckpt, '--edit', photo, '--box', '0,0,2,.5'], '--box'),
        (sample, [*ckpt, '--edit', photo, '--box', 'middle'], 'fractions'),
        (sample, [*ckpt, '--edit', photo, '--mask', 'var.pth'], 'not a whole picture'),
        (sample, [*ckpt, '--edit', photo, '--mask', 'black.png'], 'must be new'),
        (sample, [*ckpt, '--reject', 0], 'start at 1'), (sample, [*ckpt, '--paste'], '--edit'),
        (sample, [*ckpt, '--n', 1, '--reject', 2, '--classifier', 'var.pth'], 'no file of TorchScript'),
        (sample, [*ckpt, '--n', 1, '--reject', 2, '--classifier', 'narrow.pt'], 'lacks a class'),
        (sample, [*ckpt, '--n', 1, '--npz', trained / 'log.csv' / 'a.npz'], 'cannot write'),
        (sample, [*ckpt, '--n', 1, '--png', trained / 'log.csv'], 'cannot write'),
        (train, ['--eval', 'cut.pt'], 'cut short'), (train, ['--eval', 'var.pth'], 'add --tokenizer'),
        (train, ['--data', trained / 'pictures', *TINY, '--perceptual', 1, '--vgg', 'var.pth'], 'VGG-16')]
    for module, words, why in bad:
        capsys.readouterr()
        status = command(module, *words, monkeypatch=monkeypatch, folder=tmp_path)
        error = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and error[-1].startswith('error: ') and why in error[-1], (words, error)
        assert len([line for line in error if not line.startswith('skipped')]) == 1, (words, error)
    assert not (tmp_path / 'touched').exists() and (trained / 'ckpt.pt').read_bytes() == whole


def test_fuzzed_pictures(tmp_path):
    """300 files that were pictures: each is read as one or gets one line, and never a traceback."""
    rng, whole = np.random.default_rng(0), []
    noise = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for mode, kind in (('RGB', 'png'), ('RGB', 'jpeg'), ('CMYK', 'jpeg'), ('P', 'gif'), ('RGBA', 'webp'),
                       ('RGB', 'bmp'), ('L', 'tiff'), ('I;16', 'png')):
        image = noise.convert('L').convert(mode) if mode == 'I;16' else noise.convert(mode)
        image.save(tmp_path / f'{mode[0]}.{kind}')
        whole.append((tmp_path / f'{mode[0]}.{kind}').read_bytes())
    good = 0
    for i in range(300):
        data = bytearray(whole[i % len(whole)])
        if i % 3 == 0:
            data = data[:rng.integers(len(data))]              # cut short
        elif i % 3 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            a, b = sorted(rng.integers(len(data), size=2))
            data = data[b:] + data[a:b] + data[:a]             # swapped
        (tmp_path / 'x').write_bytes(data)
        try:
            image = sample.open_picture(tmp_path / 'x', 32)
            good += sample.crop(image, 32).shape == (32, 32, 3)
        except sample.Problem as e:
            assert len(str(e).splitlines()) == 1
    assert 50 < good < 250
    Image.new('1', (30000, 30000)).save(tmp_path / 'bomb.png')
    with pytest.raises(sample.Problem, match='bomb.png'):
        sample.open_picture(tmp_path / 'bomb.png', 32)


def test_fuzzed_checkpoints(trained, tmp_path, monkeypatch):
    """300 files that were checkpoints: none runs code; what is damaged gets one line."""
    monkeypatch.chdir(tmp_path)
    rng, whole = np.random.default_rng(0), (trained / 'ckpt.pt').read_bytes()
    ckpt, loaded = torch.load(trained / 'ckpt.pt', weights_only=True), 0
    true = sample.load_models(trained / 'ckpt.pt')[1].state_dict()
    for i in range(300):
        data = bytearray(whole)
        if i % 4 == 0:
            data = data[:rng.integers(len(data))]
        elif i % 4 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif i % 4 == 2:                                       # an entry that is another's, or evil
            keys = [*ckpt, 'other']
            swapped = {**ckpt, keys[rng.integers(len(keys))]: [*ckpt.values(), Evil()][rng.integers(len(keys))]}
            torch.save(swapped, 'x.pt')
            data = Path('x.pt').read_bytes()
        else:
            data = bytearray(pickle.dumps({'vae': Evil(), 'x': i}))
            data[rng.integers(len(data))] ^= rng.integers(2)
        Path('x.pt').write_bytes(data)
        try:
            _, var, _ = sample.load_models('x.pt')
            # Where a damaged file is read, the damage was not in what is used.
            loaded += var is None or all(torch.equal(v, true[k]) for k, v in var.state_dict().items())
        except sample.Problem as e:
            assert len(str(e).splitlines()) == 1
    assert 10 < loaded < 150 and not Path('touched').exists()


def test_nothing_is_lost_when_the_disk_refuses(tmp_path, monkeypatch):
    sample.write_whole(tmp_path / 'a', lambda f: f.write(b'old'))
    with pytest.raises(sample.Problem, match='cannot write'):
        def fail(f):
            f.write(b'new')
            raise OSError(28, 'No space left on device')
        sample.write_whole(tmp_path / 'a', fail)
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']
