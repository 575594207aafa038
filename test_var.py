"""Tests: python -m pytest -q test_var.py. Seeded, on the CPU, without a network.

The oracles: the official implementation's own numbers (assets/golden_*), the paper's algorithms
written out a second time, brute force, and real files and commands.
"""
import ast
import contextlib
import hashlib
import http.server
import importlib
import json
import math
import operator
import os
import pickle
import re
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

os.environ['CUDA_VISIBLE_DEVICES'] = ''         # also for the processes that are started here

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / 'experiments'))

import edit
import evaluate
import reject
import sample
import tokenizer
import train
import var as var_module
from tokenizer import VQVAE, UserError, crop, open_image, to_tensor, to_uint8, write_file
from var import VAR, block_causal_mask, draw, filter_logits, load, precision, run

GOLDEN = sorted({*HERE.glob('assets/golden_*.json'), *HERE.glob('../shared/golden/*.json')})
CPU = torch.device('cpu')
# A deprecated call in this project's own lines is an error.
pytestmark = [pytest.mark.filterwarnings(f'error::{kind}:{module}')
              for kind in ('DeprecationWarning', 'FutureWarning')
              for module in ('var', 'tokenizer', 'train', 'sample', 'edit', 'evaluate', 'reject')]
# A network that is quick to train, for the commands and for small_stage().
NETWORK = dict(ch=8, ch_mult=(1, 2, 4), vocab_size=99, z_channels=8, res_blocks=1, normalise=False)
train.PRESETS['32']['network'] = NETWORK


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
    var = VAR(sides, case['depth'], case['num_classes'], V, z, case['shared_aln'],
              case['attn_l2_norm'])
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
    close('smooth_image', draw(labels, smooth=True))
    new, _ = edit.new_positions(sides[-1], case['image_size'], [(.25, .25, .75, .75)])
    keep = torch.from_numpy(~new)
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
    rebuilt, loss, all_tokens, vectors = vae(images)
    assert rebuilt.shape == images.shape and loss.ndim == 0
    assert all_tokens.shape == (2, L) and vectors.shape == (2, L, 8)


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
    rebuilt, loss, *_ = vae(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    still = [name for name, p in vae.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.abs().sum() > 0)]
    # Three scales use three of the four phi. Biases before a normalisation can have no effect.
    idle = f'qresi_ls.{min({*range(4)} - {*vae.quantize.phi_index})}'
    assert all(name.endswith('.bias') or idle in name for name in still), still
    vae.quantize.embedding.weight.zero_()
    assert not torch.cat(vae.encode(images), dim=1).any()       # all codes alike: total collapse
    for t in range(20):
        _, _, tokens, vectors = vae(images)
        vae.quantize.update(tokens, vectors, decay=t / (t + 1))
    assert torch.cat(vae.encode(images), dim=1).unique().numel() >= 24


def test_codes_are_means_of_their_vectors():
    q = VQVAE((1, 2), 4, 8, 32, (1,)).quantize
    tokens, vectors = torch.randint(4, (9, 5)), torch.randn(9, 5, 8)
    q.update(tokens, vectors, decay=0)
    for v in range(4):
        torch.testing.assert_close(q.embedding.weight[v], vectors[tokens == v].mean(0))
    before, hits = q.embedding.weight.clone(), q.ema_vocab_hit_SV.clone()
    assert hits[0].tolist() == [(tokens[:, 0] == v).sum() for v in range(4)]
    q.update(tokens, vectors + 1, decay=0.5)                    # halfway from the old to the new
    torch.testing.assert_close(q.embedding.weight, before + 0.5)
    torch.testing.assert_close(q.ema_vocab_hit_SV, hits)
    before = q.embedding.weight.clone()
    vectors[3, 2, 1] = math.nan                                 # a batch that is not finite
    q.update(tokens, vectors, decay=0.5)
    assert torch.equal(q.embedding.weight, before) and torch.equal(q.ema_vocab_hit_SV, hits)


def test_dead_codes_come_from_each_scale_alike():
    q = VQVAE((1, 2, 4), 30, 8, 32, (1,)).quantize
    vectors = q.scale_of_token.float()[None, :, None].expand(5, 21, 8)      # they tell their scale
    q.update(torch.zeros(5, 21, dtype=torch.int64), vectors, decay=0)       # 1 to 29 are dead
    assert q.embedding.weight[1:, 0].long().bincount().tolist() == [9, 10, 10]


def test_scale_dropout_and_straight_through(monkeypatch):
    vae, _ = models((1, 2, 4))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    stages = vae.decode_scales(vae.encode(images))
    draws = iter([torch.tensor([0.05, 0.5]), torch.tensor([0.2, 0.2])])    # chance, where to stop
    monkeypatch.setattr(torch, 'rand', lambda *shape, **options: next(draws))
    rebuilt = vae(images)[0].clamp(-1, 1)
    monkeypatch.undo()
    torch.testing.assert_close(rebuilt[0], stages[0][0], atol=1e-4, rtol=1e-4)      # one scale
    torch.testing.assert_close(rebuilt[1], stages[-1][1], atol=1e-4, rtol=1e-4)     # all scales
    (gradient,) = torch.autograd.grad(vae(images)[0].sum(), vae.encoder.conv_in.weight)
    assert gradient.abs().sum() > 0


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
@pytest.mark.parametrize('options', [{}, {'shared_aln': True}, {'qk_norm': False}])
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


def test_loss_and_blocks_compiled_or_checkpointed():
    vae, var = models()
    images = torch.rand(2, 3, vae.image_size, vae.image_size)
    rebuilt = vae.to_image(vae.to_latent(images))
    var.train().label_dropout = 0.
    for block in var.blocks:
        block.drop_rate.zero_()
    tokens, labels = torch.randint(64, (3, 30)), torch.tensor([0, 3, 4])
    x = vae.var_input(tokens.split(areas(var.patch_nums), dim=1))
    logits, loss = var(labels, x, tokens)
    log_p = logits.double().log_softmax(-1)
    assert loss.item() == pytest.approx(-log_p.gather(2, tokens[..., None]).mean().item())
    want = torch.autograd.grad(loss, list(var.parameters()))
    for compile_, checkpointing in ((True, False), (False, True), (True, True)):
        compiler = partial(torch.compile, backend='eager', fullgraph=True)      # one graph, no code
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, 'compile', compiler)
            options = dict(compile=compile_, checkpointing=checkpointing)
            train.speed_up(vae, var, train.Config(**options, device=CPU))
        loss = var(labels, x, tokens)[1]
        torch.testing.assert_close(torch.autograd.grad(loss, list(var.parameters())), want,
                                   rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.to_image(vae.to_latent(images)), rebuilt)
        levels = [*vae.encoder.down, *vae.decoder.up]
        assert compile_ == all('forward' in level.__dict__ for level in levels)
        assert all('forward' in block.__dict__ for block in var.blocks)
        for module in (*levels, *var.blocks):
            module.__dict__.pop('forward', None)


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
        for k, part in enumerate(x.split(sizes, dim=1), start=1):
            assert figures[f'{name} {k}'] == pytest.approx(part.mean().item(), rel=1e-4)
        assert figures[f'{name} last'] == figures[f'{name} 4']


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
    boxes = [edit.parse_box('0,0,.25,.25'), edit.parse_box('.5,.5,1,1')]
    new, pixels = edit.new_positions(8, 32, boxes)
    assert new.sum() == 4 + 16 and new[:2, :2].all() and new[4:, 4:].all() and pixels.sum() == 320
    assert np.array_equal(edit.new_positions(8, 32, boxes, outside=True)[0], ~new)


@torch.no_grad()
def test_rejection_keeps_the_best():
    vae, var = models()
    labels = torch.tensor([1, 2, 1])
    draws = [var.generate(vae, labels, seed=s, cfg=0, return_tokens=True) for s in (5, 6, 7)]
    scores = []
    for _, tokens in draws:                                     # log p by its definition, (6)
        x, target = vae.var_input(tokens), torch.cat(tokens, 1)
        told, untold = (var(y, x)[0].log_softmax(-1).gather(2, target[..., None]).sum((1, 2))
                        for y in (labels, torch.full_like(labels, 5)))
        scores.append(told - untold)
    images = reject.best_of(vae, var, labels, 3, 5, cfg=0)
    for i, best in enumerate(torch.stack(scores).argmax(0)):
        assert torch.equal(images[i], draws[best][0][i])

    def brightness(x):
        return torch.stack([x.mean((1, 2, 3)) * c for c in range(5)], 1) * 100

    images = reject.best_of(vae, var, labels, 3, 5, brightness, cfg=0)
    want = torch.stack([brightness(x).log_softmax(1)[range(3), labels] for x, _ in draws]).argmax(0)
    assert all(torch.equal(images[i], draws[best][0][i]) for i, best in enumerate(want))


# ---- Weights in files ----


def test_weights_as_any_program_saves_them(tmp_path):
    for options in ({}, {'shared_aln': True}, {'qk_norm': False}):
        vae, var = models((1, 3, 4), 3, 7, **options)
        again = VAR.from_state_dict(var.state_dict())
        assert again.patch_nums == (1, 3, 4) and again.num_classes == 7
        for a, b in ((var, again), (vae, VQVAE.from_state_dict(vae.state_dict(), (1, 3, 4)))):
            a, b = a.state_dict(), b.state_dict()
            assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

    def check(*files):
        found_vae, found_var, ckpt = load(*files)
        assert torch.equal(found_var.pos_1LC, var.pos_1LC) and ckpt['sampling']['top_k'] == 900
        assert torch.equal(found_vae.quantize.embedding.weight, vae.quantize.embedding.weight)

    one, two = tmp_path / 'var.pth', tmp_path / 'vae.pth'
    for prefix in ('', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'):
        wrapped = [{prefix + k: v for k, v in m.state_dict().items()} for m in (var, vae)]
        torch.save(wrapped[0], one)
        torch.save(wrapped[1], two)
        check(one, two)                                         # two files, as released
        torch.save({'trainer': {'var_wo_ddp': wrapped[0], 'vae_local': wrapped[1]}}, one)
        check(one)                                              # the official trainer's
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / 'x.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))
    with pytest.raises(UserError, match='safetensors file: convert it by'):
        load(tmp_path / 'x.safetensors')
    torch.save({'vae': Fraction(1, 2)}, tmp_path / 'objects.pt')
    with pytest.raises(UserError, match='holds fractions.Fraction, which is not loaded'):
        load(tmp_path / 'objects.pt')


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('touched'),)


def test_fuzzed_checkpoints(trained, tmp_path, monkeypatch):
    """200 files that were checkpoints: none runs code, and what is damaged gets one line."""
    monkeypatch.chdir(tmp_path)
    rng, whole = np.random.default_rng(0), (trained / 'model.pt').read_bytes()
    ckpt, loaded = torch.load(trained / 'model.pt', weights_only=True), 0
    true = load(trained / 'model.pt')[1].state_dict()
    for i in range(200):
        data = bytearray(whole)
        if i % 4 == 0:
            data = data[:rng.integers(len(data))]
        elif i % 4 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        elif i % 4 == 2:                                        # an entry that is another's, or evil
            keys = [*ckpt, 'other']
            value = [*ckpt.values(), Evil()][rng.integers(len(keys))]
            torch.save({**ckpt, keys[rng.integers(len(keys))]: value}, 'x.pt')
            data = Path('x.pt').read_bytes()
        else:
            data = bytearray(pickle.dumps({'vae': Evil(), 'x': i}))
            data[rng.integers(len(data))] ^= rng.integers(2)
        Path('x.pt').write_bytes(data)
        try:
            _, var, _ = load('x.pt')
            # Where a damaged file loads, the damage was not in what is used.
            loaded += var is None or all(torch.equal(v, true[k]) for k, v in var.state_dict().items())
        except UserError as e:
            assert len(str(e).splitlines()) == 1
    assert 10 < loaded < 100 and not Path('touched').exists()


# ---- Images in files ----


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


def test_images_of_every_kind(tmp_path):
    def mean(name, image, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(open_image(tmp_path / name, 8)).mean((0, 1))

    red = Image.new('RGB', (20, 10), (200, 20, 30))
    for mode, name in (('RGB', 'a.png'), ('CMYK', 'b.tiff'), ('P', 'c.png'), ('RGBA', 'd.webp')):
        assert np.abs(mean(name, red.convert(mode)) - (200, 20, 30)).max() < 12, name
    assert mean('e.png', Image.new('RGBA', (9, 9), (0, 0, 0, 0))).min() == 255     # white behind it
    # Depth: one factor per kind of file, whatever the brightest pixel of that file is.
    for value in (0, 200, 257 * 100, 65535):
        dark = Image.fromarray(np.full((9, 9), value, np.uint16))
        assert mean('f.png', dark).tolist() == [round(value / 257)] * 3, value
    for value in (0., 0.25, 1.):
        grey = Image.fromarray(np.full((9, 9), value, np.float32))
        assert mean('g.tiff', grey).tolist() == [math.floor(255 * value + 0.5)] * 3
    for bad in (2., -1., math.nan):
        with pytest.raises(UserError, match='expected 0 to 1'):
            mean('h.tiff', Image.fromarray(np.full((9, 9), bad, np.float32)))
    exif = red.getexif()
    exif[0x112] = 6                                             # turned by a quarter
    red.save(tmp_path / 'i.jpg', exif=exif)
    assert open_image(tmp_path / 'i.jpg', 8).size == (10, 20)
    Image.new('1', (30000, 30000)).save(tmp_path / 'bomb.png')
    (tmp_path / 'empty.jpg').write_bytes(b'')
    for name in ('bomb.png', 'empty.jpg'):
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name, 8)


def test_fuzzed_images(tmp_path):
    """240 files that were images: each is read as one or gets one line, and never a traceback."""
    rng, whole = np.random.default_rng(0), []
    noise = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for mode, kind in (('RGB', 'png'), ('RGB', 'jpeg'), ('CMYK', 'jpeg'), ('P', 'gif'), ('RGBA', 'webp'),
                       ('RGB', 'bmp'), ('L', 'tiff'), ('I;16', 'png')):
        image = noise.convert('L').convert(mode) if mode == 'I;16' else noise.convert(mode)
        image.save(tmp_path / f'{mode[0]}.{kind}')
        whole.append((tmp_path / f'{mode[0]}.{kind}').read_bytes())
    good = 0
    for i in range(240):
        data = bytearray(whole[i % len(whole)])
        if i % 3 == 0:
            data = data[:rng.integers(len(data))]               # cut short
        elif i % 3 == 1:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            a, b = sorted(rng.integers(len(data), size=2))
            data = data[b:] + data[a:b] + data[:a]              # swapped
        (tmp_path / 'x').write_bytes(data)
        try:
            good += crop(open_image(tmp_path / 'x', 32), 32).shape == (32, 32, 3)
        except UserError as e:
            assert len(str(e).splitlines()) == 1
    assert 40 < good < 200


def test_nothing_is_lost_when_the_disk_refuses(tmp_path):
    write_file(tmp_path / 'a', lambda f: f.write(b'old'))

    def fail(f):
        f.write(b'new')
        raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='cannot write .*No space left'):
        write_file(tmp_path / 'a', fail)
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']


# ---- Data ----


def test_shapes_depend_on_the_seed_alone():
    a, b, c = train.shapes(40, 32, 0), train.shapes(40, 32, 0), train.shapes(40, 32, 1)
    assert a[0].shape == (40, 32, 32, 3) and a[0].dtype == np.uint8 and a[1].dtype == np.int64
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0]) and len(train.SHAPES) == 10


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_of(root, pair):
    return [os.fsdecode(name).replace(os.sep, '/') for name in pair[0]], pair[1].tolist()


def test_layouts_of_folders(tmp_path, capsys):
    """{name: files, and what is expected of them: classes, training and validation images}"""
    numbers = [f'{i:02d}' for i in range(20)]
    cases = {
        'classes': ([f'{c}/{i}.jpg' for c in ('b', 'a') for i in numbers], 'a b', 36, 4),
        'few': (['a/1.jpg', 'a/2.jpg', 'b/1.jpg'], 'a b', 2, 1),
        'one each': ([f'{i}/x.jpg' for i in numbers], ' '.join(numbers), 18, 2),
        'two': (['a/x.jpg', 'b/x.jpg'], 'a b', 1, 1),
        'splits': (['train/a/1.jpg', 'train/b/1.jpg', 'val/b/2.jpg'], 'a b', 2, 1),
        'capitals': (['Train/a/1.jpg', 'Validation/a/2.jpg', 'Validation/a/3.JPEG'], 'a', 1, 2),
        'test split': (['train/a/1.jpg', 'test/a/2.jpg'], 'a', 1, 1),
        'val before test': (['train/a/1.jpg', 'test/a/2.jpg', 'val/a/3.jpg', 'val/a/4.jpg'], 'a', 1, 2),
        'tiny': (['train/n1/images/n1_0.JPEG', 'train/n2/images/n2_0.JPEG', 'val/images/val_0.JPEG',
                  'val/images/val_1.JPEG', 'test/images/test_0.JPEG'], 'n1 n2', 2, 2),
        'imagenet': ([f'train/n1/{i}.JPEG' for i in numbers] + ['val/x.JPEG'], 'n1', 18, 2),
        'flat splits': (['train/1.jpg', 'train/2.jpg', 'val/3.jpg'], 'flat splits', 2, 1),
        'flat': ([f'{i}.jpg' for i in numbers], 'flat', 18, 2),
        'empty val': (['train/1.jpg', 'train/2.jpg', 'val/notes.txt'], 'empty val', 1, 1),
        'deep': (['a/x/1.jpg', 'a/y/z/2.jpg', 'b/1.jpg', 'b/2.jpg'], 'a b', 2, 2),
        'wrapped': (['top/inner/train/a/1.jpg', 'top/inner/val/a/2.jpg'], 'a', 1, 1),
    }
    for name, (files, classes, n, n_val) in cases.items():
        root = tmp_path / name
        touch(root, *files, 'a/.hidden.jpg' if name == 'classes' else 'readme.txt')
        if name == 'tiny':
            (root / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn2\t0\nval_1.JPEG\tn1\t0\n')
            (root / 'words.txt').write_text('n1\tgoldfish, Carassius auratus\nn3\tcow\n')
        training, val, found, folder, words = train.read_folder(root)
        assert ' '.join(found) == classes, name
        (a, _), (b, val_labels) = names_of(root, training), names_of(root, val)
        assert (len(a), len(b)) == (n, n_val) and not {*a} & {*b}, name
        assert all((folder / file).exists() for file in a + b), name
        said = capsys.readouterr().out
        assert ('no labelled images' in said) == (name in ('imagenet', 'empty val')), said
        assert ('held out' in said) == (
            name in ('classes', 'few', 'one each', 'two', 'imagenet', 'flat', 'empty val', 'deep'))
        if name == 'tiny':
            assert val_labels == [0, 1] and b == ['val/images/val_1.JPEG', 'val/images/val_0.JPEG']
            assert words == ['goldfish, Carassius auratus', '']
            assert sample.classes_of(['Goldfish', 'n2'], 2, found, words) == [0, 1]
    training, _, found, *_ = train.read_folder(tmp_path / 'classes', classes='b', limit=5)
    assert found == ['b'] and len(training[0]) == 5
    assert train.read_folder(tmp_path / 'one each', classes='12')[2] == numbers[:12]
    touch(tmp_path / 'gap', 'a/1.jpg', 'a/2.jpg', 'empty/notes.txt')
    assert train.read_folder(tmp_path / 'gap')[2] == ['a']
    assert 'left out: empty' in capsys.readouterr().out
    touch(tmp_path / 'stray', 'train/a/1.jpg', 'val/z/1.jpg')
    touch(tmp_path / 'parquet', 'data/train-00000.parquet')
    touch(tmp_path, 'x.zip')
    for name, why in (('stray', 'class z'), ('parquet', 'has to be unpacked'), ('x.zip', 'unpack it'),
                      ('nowhere', 'no such folder'), ('few/b', 'fewer than two')):
        with pytest.raises(UserError, match=why) as e:
            train.read_folder(tmp_path / name)
        assert train.LAYOUTS in str(e.value) and len(str(e.value).splitlines()) == 1


def test_image_set(tmp_path, capsys):
    write_images(tmp_path / 'all', 12)
    training, _, classes, folder, _ = train.read_folder(tmp_path / 'all')
    images = train.ImageSet(*training, 32, folder)
    (batch, index), = images.load([[(i, (0, i), False) for i in range(23)]])
    assert batch.shape == (23, 32, 32, 3) and classes == ['cat', 'dog']
    assert capsys.readouterr().err.count('cut.jpg') == 1
    cut = next(i for i in range(23) if 'cut.jpg' in images.path(i))
    assert index[cut] == cut + 1 and index[cut - 1] == cut - 1  # the next image takes the place
    again, _ = next(images.load([[(i, (0, i), False) for i in range(23)]]))
    assert torch.equal(batch, again)                            # the crop depends on the draw alone
    assert 'cut.jpg' not in capsys.readouterr().err             # it was named before
    mirrored, _ = next(images.load([[(i, (0, i), True) for i in range(23)]]))
    assert torch.equal(mirrored, batch.flip(2))


def test_crops():
    x, y = np.meshgrid(np.arange(40), np.arange(32))
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))   # 40 x 32
    assert crop(image, 32)[0, 0].tolist() == [4, 0, 0]          # the centre
    lefts = {int(crop(image, 32, rng=np.random.default_rng(i))[0, 0, 0]) for i in range(100)}
    assert lefts == {*range(9)}
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_tensor(bytes_) / 2 + 0.5), bytes_)


def test_every_epoch_is_a_permutation():
    rows = [row for step in train.step_rows(10, 4, 0, 0, 5) for row, _ in step]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert [row for step in train.step_rows(10, 4, 0, 3, 5) for row, _ in step] == rows[12:]


def make_cifar(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 10, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
    for name, batch in zip(names, records):
        (folder / name).write_bytes(batch.tobytes())
    (folder / 'batches.meta.txt').write_text('\n'.join('abcdefghij') + '\n\n')
    return records


def test_cifar10(tmp_path):
    records = make_cifar(tmp_path / 'cifar-10-batches-bin')
    archive = tmp_path / 'www' / 'cifar-10-binary.tar.gz'
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(tmp_path / 'cifar-10-batches-bin', 'cifar-10-batches-bin')
        tar.add(tmp_path / 'cifar-10-batches-bin' / 'test_batch.bin', '../../escaped.bin')
    for data in (tmp_path, tmp_path / 'cifar-10-batches-bin', archive, archive.parent):
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
    with pytest.raises(UserError, match='cannot fetch.*bring it to'):
        train.fetch(address, '0' * 64, tmp_path / 'bad')
    assert not list((tmp_path / 'bad').iterdir())
    got = train.fetch(address, hashlib.sha256(archive.read_bytes()).hexdigest(), tmp_path / 'good')
    assert got.read_bytes() == archive.read_bytes()
    server.shutdown()
    server.server_close()
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match='whole'):
        train.cifar10(archive)


def test_stored_tokens(tmp_path, monkeypatch, capsys):
    """They are found again, made anew when something changes, and resumed after a kill."""
    vae = VQVAE((1, 2, 4), 16, 4, 8, (1, 2))
    rng = np.random.default_rng(0)
    files = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)).save(tmp_path / f'{i}.png')
        files.append(f'{i}.png'.encode())
    (tmp_path / '4.png').write_bytes(b'damaged')
    images = train.ImageSet(np.array(files), np.arange(6) % 2, 8, tmp_path)
    config = train.Config(out=tmp_path / 'out', workers=0, flip=True, views=3)
    config.device = CPU
    stored, labels = train.tokenize(vae, images, config, 'train', 3)
    assert stored.shape == (6, 3, 21) and labels.tolist() == [0, 1] * 3
    assert (stored[4] == -1).all() and train.readable(stored).tolist() == [*range(12), 15, 16, 17]
    for v in range(3):                          # the centre, a mirrored random crop, a random crop
        draw = None if v == 0 else (0, v, 2)
        pixels, *_ = images[2, draw, v == 1]
        want = torch.cat(vae.encode(to_tensor(pixels[None].copy())), dim=1) + 1
        assert stored[2, v].tolist() == want[0].tolist()
    whole = stored.copy()
    stored[3:5] = 0                                             # as a kill would leave it
    asked, load_ = [], images.load

    def recorded(batches, workers):
        asked.extend(batches)
        return load_(list(asked), workers)

    monkeypatch.setattr(images, 'load', recorded)
    again, _ = train.tokenize(vae, images, config, 'train', 3)
    assert np.array_equal(again, whole) and len(asked) == 1 and {i for i, *_ in asked[0]} == {3, 4}
    asked.clear()
    train.tokenize(vae, images, config, 'train', 3)
    assert not asked                                            # all found
    with torch.no_grad():
        vae.quant_conv.weight.mul_(-1)                          # another tokenizer, other tokens
    assert not np.array_equal(train.tokenize(vae, images, config, 'train', 3)[0], whole)
    assert len(list((tmp_path / 'out').iterdir())) == 1         # the old ones are gone


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
    vgg = train.VGG16({**weights, 'classifier.0.bias': torch.zeros(3)})
    a, b = torch.rand(2, 1, 3, 32, 32)
    assert vgg(a, a) == 0 and vgg(a, b) > 0


def test_the_classifier_learns_and_stage_1_leaves_it_alone(tmp_path):
    """Thirty steps tell black from white. L_P is a distance, and a step of stage 1 does not move it."""
    stage = small_stage('classifier', tmp_path, classifier_steps=30)
    stage.batch = stage.micro_batch = 16
    stage.train_set.labels %= 2
    stage.train_set.items[stage.train_set.labels == 1] = 255
    assert stage.eval().evaluate()['accuracy'] < 0.9
    optimizers, scaler = train.make_optimizers(stage.train()), train.make_scaler(stage.config)
    for stage.step, batch in enumerate(stage.batches(0)):
        assert (batch[0].flatten(1).float().mean(1) > 127).tolist() == (batch[1] == 1).tolist()
        train.train_step(stage, optimizers, scaler, batch)
    assert stage.eval().evaluate()['accuracy'] > 0.9
    classifier = stage.classifier
    a, b = (x.requires_grad_() for x in torch.rand(2, 1, 3, 32, 32))
    assert classifier(a, a) == 0 and classifier(a, b) > 0
    classifier(a, b).backward()
    assert a.grad.abs().sum() > 0 and b.grad is None

    tokenizer = small_stage('tokenizer', tmp_path)
    tokenizer.perceptual = classifier.requires_grad_(False)
    before = {k: v.clone() for k, v in classifier.state_dict().items()}
    optimizers = train.make_optimizers(tokenizer.train())
    train.train_step(tokenizer, optimizers, scaler, [batch[0]])
    for k, v in classifier.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_what_each_optimizer_trains(tmp_path):
    stage = small_stage('transformer', tmp_path)
    names = {p: name for name, p in stage.var.named_parameters()}
    adam, muon = train.make_optimizers(stage)
    decayed, free, matrices = ({names[p] for p in group['params']}
                               for group in adam.param_groups + muon.param_groups)
    in_blocks = ('attn.mat_qkv', 'attn.proj', 'ffn.fc1', 'ffn.fc2')
    others = ('word_embed', 'class_emb', 'head', 'blocks.0.ada_lin.1', 'head_nm.ada_lin.1')
    assert matrices == {f'blocks.0.{name}.weight' for name in in_blocks}
    assert decayed == {f'{name}.weight' for name in others}
    assert free == {*names.values()} - decayed - matrices
    assert [group['weight_decay'] for group in adam.param_groups] == [0.05, 0]
    assert adam.defaults['betas'] == (0.9, 0.95)


def test_learning_rate():
    """Warm-up over 2 % of the run, the peak until 5 %, then a line down to 0.01."""
    found = [train.learning_rate(progress) for progress in (0, 0.01, 0.02, 0.05, 0.525, 1)]
    assert found == pytest.approx([0.005, 0.5025, 1, 1, 0.505, 0.01])


def test_gradients_are_clipped(tmp_path):
    stage = small_stage('transformer', tmp_path, batch=16, micro_batch=16)
    forward = stage.forward
    stage.forward = lambda *batch: (1e4 * forward(*batch)[0], {})
    optimizers, scaler = train.make_optimizers(stage), train.make_scaler(stage.config)
    figures = train.train_step(stage, optimizers, scaler, zero_batch('transformer'))
    weights = [p for group in optimizers[0].param_groups for p in group['params']]
    norms = [p.grad.norm() for p in weights if p.grad is not None]
    assert figures['gradient norm'] > 10
    assert torch.stack(norms).norm().item() == pytest.approx(2, rel=1e-3)


def test_phases_of_stage_1(tmp_path):
    """A quarter without quantization, half without L_G; the codebook is a mean before an EMA."""
    stage, decays, judged = small_stage('tokenizer', tmp_path, tokenizer_steps=8), {}, []
    stage.vae.quantize.update = lambda tokens, vectors, decay: decays.update({stage.step: decay})
    for stage.step in range(8):
        _, figures = stage(*zero_batch('tokenizer'))
        if 'lambda_G' in figures:
            judged.append(stage.step)
        stage.after_step()
    assert decays == pytest.approx({2: 0, 3: 1 / 2, 4: 2 / 3, 5: 3 / 4, 6: 4 / 5, 7: 5 / 6})
    assert judged == [4, 5, 6, 7]


def test_adversarial_loss():
    last, images, x = torch.nn.Parameter(torch.ones(3, 1, 1)), *torch.rand(2, 2, 3, 32, 32)
    loss, rebuilt = train.AdversarialLoss(0.5, last), last * x
    others, fool = F.mse_loss(rebuilt, images), -loss.disc(rebuilt).mean()
    hinge = (F.relu(1 - loss.disc(images)) + F.relu(1 + loss.disc(rebuilt))).mean() / 2
    norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm().item()
             for value in (others, fool)]
    torch.testing.assert_close(loss(images, rebuilt, others, last, 1.), hinge)  # no weight yet
    loss.after_step()
    weight = 0.5 * norms[0] / norms[1]
    assert loss.weight.item() == pytest.approx(weight, rel=1e-2)
    torch.testing.assert_close(loss(images, rebuilt, others, last, 1.), loss.weight * fool + hinge)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='since torch 2.9')
def test_muon_is_that_of_torch():
    rng = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 24), (24, 8))]
                    for _ in range(2))
    optimizers = [train.Muon(ours, 0.02, torch.bfloat16),
                  torch.optim.Muon(theirs, 0.02, weight_decay=0.01, momentum=0.95)]
    scalers = [torch.amp.GradScaler('cpu', init_scale=1.) for _ in range(2)]
    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=rng)
            if step == 2:
                p.grad[0, 0] = math.inf             # left out by both
            q.grad = p.grad.clone()
        for optimizer, scaler in zip(optimizers, scalers):
            scaler.scale(torch.ones(()))
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_no_gradient_that_is_not_finite_reaches_muon(tmp_path):
    stage = small_stage('transformer', tmp_path, batch=16, micro_batch=16)
    optimizers, scaler = train.make_optimizers(stage), train.make_scaler(stage.config)
    batch = zero_batch('transformer')
    before = stage.var.blocks[0].ffn.fc1.weight.detach().clone()
    hook = stage.var.blocks[0].attn.proj.weight.register_hook(lambda gradient: gradient * math.nan)
    assert train.train_step(stage, optimizers, scaler, batch)['gradient norm'].isnan()
    hook.remove()
    assert torch.equal(stage.var.blocks[0].ffn.fc1.weight, before)
    figures = train.train_step(stage, optimizers, scaler, batch)
    assert figures['gradient norm'].isfinite()
    assert all(p.isfinite().all() for p in stage.parameters())


def small_stage(name, tmp_path, **options):
    """A stage on 16 random images with a tiny network, in float32 and without dropout."""
    given = dict(data='cifar10', out=tmp_path, workers=0, precision='float32',
                 patch_nums=(1, 2, 3, 4, 6, 8), **options)
    config = train.make_config(given, {})
    config.device = CPU
    torch.manual_seed(0)
    classifier = train.Classifier(4, ch=8)
    vae = VQVAE(config.patch_nums, **config.network)
    vae.scale_dropout = 0.
    images = train.ImageSet(np.zeros((16, 32, 32, 3), np.uint8), np.arange(16) % 4, 32)
    if name == 'classifier':
        return train.ClassifierStage(config, classifier, images, images).train()
    if name == 'tokenizer':
        classifier.requires_grad_(False)
        return train.TokenizerStage(config, vae, images, images, classifier).train()
    vae.requires_grad_(False)
    var = VAR(config.patch_nums, 1, 4, *vae.quantize.embedding.weight.shape)
    var.label_dropout = 0.
    stored = np.ones((16, 1, len(var.mask)), np.int16), images.labels
    return train.TransformerStage(config, vae, var, stored, stored).train()


def zero_batch(name):
    """What batches() of small_stage(name) would yield, full of zeros."""
    images, labels = torch.zeros(16, 32, 32, 3, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64)
    tokens = torch.zeros(16, 130, dtype=torch.int64)
    return {'classifier': [images, labels], 'tokenizer': [images], 'transformer': [tokens, labels]}[name]


@pytest.mark.parametrize('name', ['tokenizer', 'transformer'])
def test_micro_batches_add_up_to_the_batch(name, tmp_path):
    """1, 2, 4 and 3 (unequal) micro-batches give the same gradients, the adversarial ones too."""
    rng, found = torch.Generator().manual_seed(0), []
    images = torch.randint(256, (8, 32, 32, 3), dtype=torch.uint8, generator=rng)
    tokens, labels = torch.randint(90, (8, 130), generator=rng), torch.arange(8) % 4
    batch = [images] if name == 'tokenizer' else [tokens, labels]
    prefix = 'tokenizer_' if name == 'tokenizer' else ''
    for size in (8, 4, 2, 3):
        options = {prefix + 'batch': 8, prefix + 'micro_batch': size}
        stage = small_stage(name, tmp_path, adversarial=0.5, tokenizer_steps=40, **options)
        optimizers, scaler = train.make_optimizers(stage), train.make_scaler(stage.config)
        stage.lr = stage.muon_lr = 0.           # AdamW's first steps would enlarge rounding errors
        for stage.step in (31, 32):             # the second one has the adversarial weight
            train.train_step(stage, optimizers, scaler, batch)
        weight = stage.adversarial.weight if name == 'tokenizer' else torch.ones(())
        assert weight > 0
        found.append({**{n: p.grad for n, p in stage.named_parameters() if p.grad is not None},
                      'lambda_G': weight})
    for other in found[1:]:
        for n, gradient in found[0].items():
            torch.testing.assert_close(other[n], gradient, rtol=1e-4, atol=1e-5, msg=n)


@pytest.mark.parametrize('name', ['classifier', 'tokenizer', 'transformer'])
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
        batch = zero_batch(name)
        optimizers, scaler = train.make_optimizers(stage), train.make_scaler(stage.config)
        for stage.step in range(4):             # without and with quantization and discriminator
            figures = train.train_step(stage, optimizers, scaler, batch)
        with pytest.raises(Exception, match='item|data-dependent|DataDependent|_local_scalar'):
            figures['loss'].item()
        if name == 'transformer':
            labels = torch.zeros(2, dtype=torch.int64)
            stage.var.eval().generate(stage.vae, labels, smooth=True, top_k=9, top_p=0.9)


def test_a_step_that_is_not_finite_changes_no_weight(tmp_path):
    stage = small_stage('tokenizer', tmp_path, tokenizer_steps=40)
    optimizers, scaler = train.make_optimizers(stage), train.make_scaler(stage.config)
    images, stage.step = torch.zeros(16, 32, 32, 3, dtype=torch.uint8), 20
    train.train_step(stage, optimizers, scaler, [images])
    before = {k: v.clone() for k, v in stage.state_dict().items()}
    with torch.no_grad():
        stage.vae.decoder.conv_out.bias[0] = math.nan
    train.train_step(stage, optimizers, scaler, [images])
    assert scaler.get_scale() == 1                              # GradScaler would have halved it
    before['vae.decoder.conv_out.bias'][0] = math.nan
    for k, v in stage.state_dict().items():
        # The codebook is no optimizer's, and the encoder's vectors were finite.
        if not k.endswith(('quantize.embedding.weight', 'ema_vocab_hit_SV')):
            torch.testing.assert_close(v, before[k], rtol=0, atol=0, equal_nan=True, msg=k)


@pytest.mark.parametrize('name', ['classifier', 'tokenizer', 'transformer'])
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
    optimizers = [torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad])]
    scaler = torch.amp.GradScaler('cpu', enabled=False)         # neither knows the meta device
    batch = zero_batch(name)
    for stage.step in range(4):
        figures = train.train_step(stage, optimizers, scaler, batch)
    assert figures['loss'].device.type == 'meta'
    if name == 'classifier':
        return
    images = torch.zeros(2, 3, 32, 32, device='meta')
    if name == 'transformer':
        images = stage.var.eval().generate(stage.vae, [0, 1], smooth=True)
    assert stage.vae.decode(stage.vae.encode(images)).device.type == 'meta'


# ---- The commands ----

# L_G is active in the last two of four steps, and has a weight in the last one.
TINY = ('--size', 32, '--depth', 1, '--tokenizer-batch', 4, '--batch', 4, '--tokenizer-steps', 4,
        '--steps', 3, '--classifier-steps', 2, '--workers', 0)


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
    folder = tmp_path_factory.mktemp('trained')
    write_images(folder / 'images')
    with pytest.MonkeyPatch.context() as patch:
        assert command(train, '--data', 'images', *TINY, '--flip', monkeypatch=patch, folder=folder) == 0
    return folder


def test_train_and_sample(trained, monkeypatch):
    assert {'ckpt.pt', 'model.pt', 'log.csv', 'samples.png', 'reconstructions.png'} <= {*os.listdir(trained)}
    ckpt = torch.load(trained / 'model.pt', weights_only=True)
    assert ckpt['classes'] == ['cat', 'dog'] and ckpt['config']['depth'] == 1
    assert not {'optimizers', 'classifier', 'adversarial'} & {*ckpt}
    rows = [line.split(',') for line in (trained / 'log.csv').read_text().splitlines()]
    assert rows[0] == ['stage', 'step', 'time', 'name', 'value']
    assert {'PSNR', 'codebook usage', 'loss', 'loss last', 'error 4', 'train loss', 'train images/s',
            'train gradient norm', 'train learning rate'} <= {row[3] for row in rows}
    go = partial(command, sample, monkeypatch=monkeypatch, folder=trained)
    assert go('--cls', 'all', '--n', 3, '--out', 'a.png', '--scales', 'grow.gif') == 0
    assert Image.open(trained / 'a.png').size == (34 * 3 - 2, 34 * 2 - 2)
    assert Image.open(trained / 'grow.gif').n_frames == 4
    assert go('--cls', 'dog', '--n', 2, '--out', 'b.png', '--scales', 'grow.png', '--smooth',
              '--top-k', 99999, '--ckpt', 'model.pt') == 2
    assert go('--cls', 'dog', '--n', 2, '--out', 'b.png', '--scales', 'grow.png', '--top-k', 99999,
              '--ckpt', 'model.pt') == 0
    assert go('--cls', 'dog', '--n', 2, '--out', 'c.png', '--smooth') == 0
    assert Image.open(trained / 'grow.png').size == (34 * 4 - 2, 34 * 2 - 2)
    for name in ('d.png', 'e.png'):
        assert go('--cls', 1, '--n', 1, '--out', name) == 0
    assert (trained / 'd.png').read_bytes() == (trained / 'e.png').read_bytes()
    assert go('--cls', 0, 1, '--n', 3, '--png', 'all') == 0
    assert sorted(os.listdir(trained / 'all')) == [f'{i:06d}.png' for i in range(6)]
    assert go('--cls', 'all', '--n', 40, '--npz', 'a.npz') == 0
    with np.load(trained / 'a.npz') as f:                       # as the evaluators read it
        images, labels = f['arr_0'], f['arr_1']
    assert images.shape == (80, 32, 32, 3) and images.dtype == np.uint8
    order = np.random.default_rng(0).permutation(80)
    assert labels[order].tolist() == [0] * 40 + [1] * 40 and labels.tolist() != sorted(labels)
    vae, var, ckpt = load(trained / 'ckpt.pt')
    with precision(CPU):                                        # the npz holds what Python draws
        first = var.generate(vae, [0] * 40 + [1] * 10, seed=0, **ckpt['sampling'])
    assert np.array_equal(images[order][:50], to_uint8(first))


def test_sampling_continues_where_it_was_interrupted(trained, tmp_path, monkeypatch):
    calls, generate = [], VAR.generate

    def interrupted(*args, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(VAR, 'generate', interrupted)
    go = partial(command, sample, '--ckpt', trained / 'model.pt', '--cls', 0, '--n', 3, '--batch', 1,
                 monkeypatch=monkeypatch, folder=tmp_path)
    assert [go(), go()] == [130, 0] and len(calls) == 4         # three images, one call was cut off


def test_edit_and_reject(trained, monkeypatch, tmp_path):
    photo, ckpt = trained / 'images' / 'dog' / '1 é.png', ('--ckpt', trained / 'ckpt.pt')
    mask = np.zeros((80, 80), np.uint8)
    mask[10:35, 40:75] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    go = partial(command, edit, photo, *ckpt, '--n', 2, monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--mask', 'mask.png', '--paste', '--out', 'a.png') == 0
    sheet = np.asarray(Image.open(tmp_path / 'a.png'))
    assert sheet.shape == (32, 34 * 4 - 2, 3)
    whole, masked, one = sheet[:, :32], sheet[:, 34:66], sheet[:, 68:100]
    kept = np.asarray(Image.fromarray(mask).resize((32, 32), Image.LANCZOS)) <= 127
    assert (masked[~kept] == 128).all() and np.array_equal(masked[kept], whole[kept])
    assert np.array_equal(one[:, :8], whole[:, :8]) and not np.array_equal(one[~kept], whole[~kept])
    assert go('--box', '0,0,.5,.5', '--box', '.5,.5,1,1', '--cls', 'cat', '--outside') == 0
    judge = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 2)).eval()
    torch.export.save(torch.export.export(judge, (torch.rand(6, 3, 32, 32),)), tmp_path / 'judge.pt2')
    go = partial(command, reject, *ckpt, '--n', 3, monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--rounds', 2, '--npz', 'best.npz') == 0
    assert np.load(tmp_path / 'best.npz')['arr_0'].shape == (6, 32, 32, 3)
    assert go('--rounds', 2, '--classifier', 'judge.pt2') == 0
    assert Image.open(tmp_path / 'best.png').size == (34 * 3 - 2, 34 * 2 - 2)


def test_evaluate(trained, monkeypatch, capsys, tmp_path):
    assert command(evaluate, '--ckpt', trained / 'model.pt', '--data', trained / 'images',
                   monkeypatch=monkeypatch, folder=tmp_path) == 0
    said = capsys.readouterr().out
    with np.load(tmp_path / 'reconstructions.npz') as f:
        rebuilt, labels = f['arr_0'], f['arr_1']
    assert rebuilt.shape == (2, 32, 32, 3) and labels.tolist() == [0, 1]
    _, (files, _), _, folder, _ = train.read_folder(trained / 'images')
    val = []
    for name in files:
        image = open_image(folder / os.fsdecode(name), 32)
        val.append(crop(image, 32, min(36, min(image.size))))
    val = np.stack(val)
    psnr = np.mean([-10 * np.log10(((a / 255. - b / 255.) ** 2).mean()) for a, b in zip(val, rebuilt)])
    assert float(said.split('PSNR ')[1].split()[0]) == pytest.approx(psnr, abs=0.1)
    assert 'loss last' in said and 'error 4' in said
    vae, _, _ = load(trained / 'ckpt.pt')
    bits = 0
    with torch.no_grad():
        for r_k in vae.encode(to_tensor(val)):
            p = r_k.unique(return_counts=True)[1] / r_k.numel()
            bits += -(p * p.log2()).sum().item() * r_k.shape[1]
    assert float(said.split('bits per image ')[1].split()[0]) == pytest.approx(bits, abs=1)


def test_ssim_against_its_definition():
    a, b = torch.rand(2, 2, 3, 20, 24)
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / 4.5)
    window /= window.sum()
    for i in range(2):
        values = []
        for c, y, z in np.ndindex(3, 10, 14):
            p, q = (t[i, c, y:y + 11, z:z + 11].double().numpy() for t in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                          / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
        assert evaluate.ssim(a, b)[i].item() == pytest.approx(np.mean(values), abs=1e-6)


def launch(folder, processes, module, *words, extra=''):
    """Starts a command in processes of its own, in float32 on one thread each."""
    script = folder / f'{module}_{processes}.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(HERE)!r})\nimport torch, sample, tokenizer, '
                      f'train, var\ntorch.set_num_threads(1)\ntrain.PRESETS["32"]["network"] = {NETWORK}\n'
                      f'{extra}\nif __name__ == "__main__":\n    var.run({module}.main)\n')
    torchrun = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), '--']
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), script,
                             *map(str, words), '--device', 'cpu', '--precision', 'float32'],
                            cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    words = '--ckpt', trained / 'model.pt', '--cls', 'all', '--n', 40
    runs = [launch(tmp_path, n, 'sample', *words, '--npz', f'{n}.npz') for n in (1, 2)]
    assert [run_.wait() for run_ in runs] == [0, 0]
    one, two = (np.load(tmp_path / f'{n}.npz') for n in (1, 2))
    assert np.array_equal(one['arr_0'], two['arr_0']) and np.array_equal(one['arr_1'], two['arr_1'])


def test_two_processes_train_as_one_does(trained, tmp_path):
    """Without dropout and classifier, which each process has for itself."""
    words = '--data', trained / 'images', *TINY, '--flip', '--micro-batch', 1, '--perceptual', 0
    still = 'var.VAR.label_dropout = tokenizer.VQVAE.scale_dropout = 0.'
    runs = [launch(tmp_path, n, 'train', *words, '--out', n, extra=still) for n in (1, 2)]
    assert [run_.wait() for run_ in runs] == [0, 0]
    one, two = ([line.split(',') for line in (tmp_path / n / 'log.csv').read_text().splitlines()]
                for n in '12')
    assert [row[:2] + row[3:4] for row in one] == [row[:2] + row[3:4] for row in two] and len(one) > 25
    for a, b in zip(one[1:], two[1:]):
        # Rates differ, and these figures are of one process's part of the batch.
        own = ('train images/s', 'train tokens/s', 'train PSNR', 'train quantizer',
               'train accuracy')
        if a[3] not in own:
            assert float(a[4]) == pytest.approx(float(b[4]), rel=1e-3, abs=1e-4), (a, b)


def same_weights(a, b):
    a, b = (torch.load(f, weights_only=True) for f in (a, b))
    return all(torch.equal(v, b[part][k]) for part in ('vae', 'var') for k, v in a[part].items())


def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    words = '--data', trained / 'images', *TINY, '--flip', '--steps', 40
    always = 'train.SAVE_EVERY = 0'                             # it saves after every step
    first = launch(tmp_path, 1, 'train', *words, '--out', 'killed', extra=always)
    ckpt, state, deadline = tmp_path / 'killed' / 'ckpt.pt', {'step': 0}, time.time() + 60
    while time.time() < deadline and (state['step'] < 2 or state['stage'] != 'transformer'):
        time.sleep(0.02)
        if ckpt.exists():
            state = torch.load(ckpt, weights_only=True)
    first.kill()
    assert first.wait() == -signal.SIGKILL and state['step'] < 40
    for name, resume in (('whole', ()), ('killed', ('--resume',))):
        assert launch(tmp_path, 1, 'train', *words, '--out', name, *resume).wait() == 0
    assert same_weights(tmp_path / 'whole' / 'ckpt.pt', tmp_path / 'killed' / 'ckpt.pt')


def test_one_class_needs_no_classifier(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'images', 6, ('cat',))
    words = '--data', 'images', *TINY, '--steps', 0
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 0
    printed = capsys.readouterr().out
    assert 'without L_P' in printed and 'classifier 0/2' not in printed


@pytest.mark.parametrize('stop_at, times', [(1, 1), (2, 1), (4, 1), (5, 1), (7, 2)])
def test_a_stopped_run_ends_with_the_same_bits(trained, tmp_path, monkeypatch, stop_at, times):
    """Ctrl-C ends the run after its step, with a checkpoint; a second one ends it at once."""
    calls, step = [], train.train_step

    def interrupted(*args):
        calls.append(args[0].step)
        assert args[0].training                     # with dropout, after an evaluation as well
        if len(calls) == stop_at:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, 'SAVE_EVERY', 0)
    monkeypatch.setattr(train, 'train_step', interrupted)
    go = partial(command, train, '--out', tmp_path, '--workers', 0, monkeypatch=monkeypatch, folder=trained)
    assert go('--data', 'images', *TINY, '--flip') == 130
    assert go('--resume') == 0
    assert len(calls) == 9 + (times == 2)           # no step was made twice, but for the one cut off
    assert same_weights(trained / 'ckpt.pt', tmp_path / 'ckpt.pt')
    rows = (tmp_path / 'log.csv').read_text().splitlines()
    assert sum(row.startswith('stage,') for row in rows) == 1
    assert go('--data', 'images', *TINY) == 0       # a new run moves the old one aside
    assert same_weights(trained / 'ckpt.pt', tmp_path / 'ckpt.previous.pt')
    assert (tmp_path / 'log.previous.csv').read_text().splitlines() == rows


def test_two_processes_stop_together(trained, tmp_path):
    """One of them is asked to: both end after the same step, and the checkpoint is written."""
    asked = """
import signal
step = train.train_step

def interrupted(stage, *rest):
    if train.rank_and_world()[0] == 1 and stage.step == 2:
        signal.raise_signal(signal.SIGTERM)
    return step(stage, *rest)

train.train_step = interrupted
"""
    words = '--data', trained / 'images', *TINY, '--perceptual', 0, '--tokenizer-steps', 9
    both = launch(tmp_path, 2, 'train', *words, '--out', '.', extra=asked)
    try:
        assert both.wait(timeout=60) != 0
    finally:
        both.terminate()                                        # if they did not end
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert (state['stage'], state['step']) == ('tokenizer', 3)


def test_a_run_that_torchrun_restarts_is_resumed(trained, tmp_path, monkeypatch):
    (tmp_path / 'ckpt.pt').write_bytes((trained / 'ckpt.pt').read_bytes())
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    words = '--data', 'images', *TINY, '--out', tmp_path
    assert command(train, *words, monkeypatch=monkeypatch, folder=trained) == 0
    assert same_weights(trained / 'ckpt.pt', tmp_path / 'ckpt.pt')
    assert not (tmp_path / 'ckpt.previous.pt').exists()         # nothing was moved aside


def test_a_resumed_run_still_starts_from_init(trained, tmp_path, monkeypatch):
    """Stopped before stage 2 begins, it takes the transformer of --init once more."""
    step = train.train_step

    def interrupted(*args):
        monkeypatch.setattr(train, 'train_step', step)
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(train, 'train_step', interrupted)
    go = partial(command, train, '--out', tmp_path, '--workers', 0, monkeypatch=monkeypatch, folder=trained)
    assert go('--data', 'images', *TINY, '--init', 'model.pt', '--steps', 0) == 130
    assert go('--resume') == 0
    before, after = (torch.load(folder / 'model.pt', weights_only=True)['var'] for folder in (trained, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize('bad, status', [({1, 2, 4, 5, 7, 8}, 0), ({1, 2, 3}, 2)])
def test_steps_that_are_not_finite(trained, tmp_path, monkeypatch, capsys, bad, status):
    """Two are left out, again and again; three in a row end the run, with weights that are finite."""
    calls, forward = [], train.TokenizerStage.forward

    def poisoned(stage, images):
        loss, figures = forward(stage, images)
        calls.append(loss)
        return loss * (math.nan if len(calls) - 1 in bad else 1), figures

    monkeypatch.setattr(train.TokenizerStage, 'forward', poisoned)
    monkeypatch.setattr(train, 'SAVE_EVERY', 0)
    monkeypatch.setattr(train, 'MOST_SKIPPED', 3)
    words = ['--data', trained / 'images', *TINY, '--tokenizer-steps', 12, '--out', tmp_path]
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == status
    assert ('smaller --lr' in capsys.readouterr().err) == bool(status)
    ckpt = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    assert all(v.isfinite().all() for v in ckpt['vae'].values())


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


def test_the_plan_counts_epochs(trained, tmp_path, monkeypatch, capsys):
    config = train.make_config({'data': str(trained / 'images')}, {})
    assert (config.preset, config.tokenizer, config.lr) == ('256', 'official', 1e-4)
    assert train.make_config({'data': 'x', 'preset': '256', 'batch': 1024}, {}).lr == 4e-4
    resumed = train.make_config({'steps': 7}, {'data': 'x', 'preset': '32', 'depth': 3, 'gone': 1})
    assert (resumed.steps, resumed.depth, resumed.size) == (7, 3, 32)
    stage = small_stage('transformer', tmp_path, batch=8, steps=9999, epochs=3.)
    assert stage.steps == 6                                     # of 16 images
    stage = small_stage('transformer', tmp_path, batch=8, steps=9999)
    train.describe(stage, stage.var)
    assert 'warning: every example is seen 5000 times' in capsys.readouterr().out


def test_bad_input_gets_one_line_and_status_2(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / 'empty').mkdir()
    touch(tmp_path, *(f'broken/cat/{i}.jpg' for i in range(3)))
    whole = (trained / 'ckpt.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(whole[:len(whole) // 2])
    torch.save({'something': 'else'}, tmp_path / 'other.pt')
    torch.save({'classifier': {}}, tmp_path / 'early.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'ckpt.pt').write_bytes((trained / 'model.pt').read_bytes())
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps(Evil()))
    torch.save({'version': 1, 'vae': Evil()}, tmp_path / 'evil2.pt')
    vae, var = models()
    torch.save(var.state_dict(), tmp_path / 'var.pth')
    torch.save(VQVAE(ch=32, ch_mult=(1,)).state_dict(), tmp_path / 'vae.pth')
    Image.new('L', (9, 9)).save(tmp_path / 'black.png')
    ckpt, photo = ('--ckpt', trained / 'ckpt.pt'), trained / 'images' / 'dog' / '1 é.png'
    box, data = ('--box', '0,0,.5,.5'), ('--data', trained / 'images')
    cases = [
        (train, ['--data', 'nowhere'], 'no such folder'), (train, ['--data', 'empty'], 'no images'),
        (train, ['--data', 'broken', *TINY], 'none of the'), (train, ['--size', 48], 'choose from'),
        (train, ['--size', 32, '--preset', '64'], 'does not fit'), (train, ['--preset', 'x'], 'choose'),
        (train, ['--patch-nums', '1,2,5'], 'must be 8'), (train, ['--patch-nums', '2,1'], 'have to rise'),
        (train, ['--patch-nums', 'x'], 'invalid'),
        (train, ['--depth', 0], 'at least 1'), (train, ['--lr', -1], 'out of range'),
        (train, ['--lr', 'x'], "invalid float value: 'x'"), (train, ['--seed', -1], 'at least 0'),
        (train, ['--precision', 'int8'], 'choose from'), (train, ['--nothing', 1], 'unrecognized'),
        (train, ['--resume'], 'No such file'), (train, ['--resume', '--out', trained / 'images'], 'No such'),
        (train, ['--resume', '--out', trained, '--preset', 'long'], 'this run has --preset 32'),
        (train, ['--resume', '--out', 'old'], 'nothing to resume'),
        (train, [*data, '--classes', 'cow', *TINY], 'no such class'),
        (train, [*data, *TINY, '--classifier-steps', 0, '--vgg', 'var.pth'], 'VGG-16'),
        (train, [*data, *TINY, '--tokenizer', 'var.pth'], 'has no tokenizer'),
        (train, [*data, *TINY, '--tokenizer', 'vae.pth'], 'makes images of 8 px'),
        (sample, [], 'cannot read ckpt.pt: No such file'), (sample, ['--ckpt', 'cut.pt'], 'damaged'),
        (sample, ['--ckpt', 'other.pt'], 'no tokenizer'), (sample, ['--ckpt', 'list.pt'], 'cannot read'),
        (sample, ['--ckpt', 'early.pt'], 'continue with train.py --resume'),
        (sample, ['--ckpt', 'evil.pt'], 'evil.pt'), (sample, ['--ckpt', 'evil2.pt'], 'it could run code'),
        (sample, ['--ckpt', 'var.pth'], 'add --tokenizer'), (sample, ['--ckpt', 'vae.pth'], 'tokenizer only'),
        (sample, ['--ckpt', 'var.pth', '--tokenizer', trained / 'ckpt.pt'], 'was trained with another tokenizer'),
        (sample, [*ckpt, '--cls', 'cow'], 'no such class'), (sample, [*ckpt, '--cls', 2], 'no such class'),
        (sample, [*ckpt, '--top-p', 2], 'from 0 to 1'), (sample, [*ckpt, '--n', 0], 'at least 1'),
        (sample, [*ckpt, '--n', 1, '--out', 'a.xyz'], 'use .png'),
        (sample, [*ckpt, '--n', 1, '--out', trained / 'log.csv' / 'a.png'], 'cannot write'),
        (sample, [*ckpt, '--n', 1, '--npz', trained / 'log.csv' / 'a.npz'], 'cannot write'),
        (edit, [*ckpt, 'nothing.jpg', *box], 'nothing.jpg'), (edit, [*ckpt, photo], 'to generate'),
        (edit, [*ckpt, photo, '--box', '0,0,1,1'], 'to generate'),
        (edit, [*ckpt, photo, '--box', '0,0,2,.5'], 'fractions'),
        (edit, [*ckpt, photo, '--box', 'middle'], 'fractions'),
        (edit, [*ckpt, photo, '--mask', 'var.pth'], 'cannot read'),
        (edit, [*ckpt, photo, '--mask', 'black.png'], 'to generate'),
        (reject, [*ckpt, '--rounds', 0], 'at least 1'),
        (reject, [*ckpt, '--classifier', 'var.pth'], 'torch.export'),
        (evaluate, ['--ckpt', 'cut.pt'], 'damaged'), (evaluate, ['--ckpt', 'var.pth'], 'add --tokenizer')]
    for module, words, why in cases:
        capsys.readouterr()
        status = command(module, *words, monkeypatch=monkeypatch, folder=tmp_path)
        error = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and error[-1].startswith('error: ') and why in error[-1], (words, error)
        assert len([line for line in error if not line.startswith('skipped')]) == 1, (words, error)
    assert not (tmp_path / 'touched').exists() and (trained / 'ckpt.pt').read_bytes() == whole


def test_out_of_memory_gets_a_hint_and_a_fault_keeps_its_traceback(capsys):
    def fail(error):
        raise error

    for error in (torch.OutOfMemoryError('CUDA out of memory'), MemoryError(),
                  RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')):
        with pytest.raises(SystemExit):
            run(partial(fail, error))
        assert 'try a smaller --batch' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='a fault'):
        run(partial(fail, RuntimeError('a fault')))


# ---- The README ----


def test_links_to_lines_are_right():
    """README.md links names to lines; `python test_var.py` sets the numbers anew."""
    text = (HERE / 'README.md').read_text()
    assert text == with_line_numbers(text) and text.count('.py#L') > 20


def with_line_numbers(text):
    """A README whose links [`file.Name`](file.py#L1) point to where each name is defined."""
    def link(match):
        name, file = match.groups()
        lines, at = (HERE / file).read_text().splitlines(), 0
        for part in name.removeprefix(Path(file).stem + '.').removesuffix('()').split('.'):
            pattern = rf'\s*(class|def) {part}\b|{part}\b.* = |    {part}: '
            at = next((i for i in range(at, len(lines)) if re.match(pattern, lines[i])), None)
            assert at is not None, f'{name} is not in {file}'
        return f'[`{name}`]({file}#L{at + 1})'
    return re.sub(r'\[`([\w.()]+)`\]\(([\w/]+\.py)(?:#L\d+)?\)', link, text)


def test_python_of_the_readme_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    Image.new('RGB', (40, 50), 'red').save(trained / 'photo.jpg')
    blocks = re.findall(r'```python\n(.*?)```', (HERE / 'README.md').read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_names_in_the_tour_exist():
    """The notebook is executed by hand; here only its imports and attributes are looked up."""
    cells = json.loads((HERE / 'experiments' / 'tour.ipynb').read_text())['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    vae, model = models()
    known, looked_up = {'vae': vae, 'var': model, 'var_module': var_module}, 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith('torch'):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split('.')
            if chain[0] in known and all(part.isidentifier() for part in chain):
                operator.attrgetter('.'.join(chain[1:]))(known[chain[0]])
                looked_up += 1
    assert looked_up > 20 and len(cells) <= 25


if __name__ == '__main__':
    readme = HERE / 'README.md'
    readme.write_text(with_line_numbers(readme.read_text()))
