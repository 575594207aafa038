"""Tests of the method: python -m pytest -q. Seeded, on the CPU, without a network.

The oracles: the official implementation's own numbers (assets/*.json), the paper's algorithms
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
import weakref
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

import tokenizer
import train
from support.data import ImageSet
from support.grade import grade_transformer
from support.losses import AdversarialLoss, PerceptualLoss
from support.options import make_config
from support.run import run
from tokenizer import VQVAE, Quantizer
from var import VAR, block_causal_mask, draw, filter_logits

HERE = Path(__file__).resolve().parent
GOLDEN = sorted(HERE.glob('assets/golden_*.json'))
CPU = torch.device('cpu')
# A deprecated call in this project's own lines is an error.
pytestmark = [pytest.mark.filterwarnings(f'error::{kind}:{module}')
              for kind in ('DeprecationWarning', 'FutureWarning')
              for module in ('var', 'tokenizer', 'train', 'sample', 'support')]


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, whether others ran before or not."""
    torch.manual_seed(0)


def from_name(name, p):
    """Random numbers that follow from the name and the shape of a parameter."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))


def refill(model, salt=''):
    """Weights that follow from names and shapes alone, as those behind the golden numbers."""
    for name, p in model.named_parameters():
        a = from_name(salt + name, p)
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
    vae = VQVAE(sides, V, z, case['ch'], phi_count=case['share_quant_resi'])
    var = VAR(sides, case['depth'], case['num_classes'], V, z, case['shared_aln'])
    for model, keys in ((vae, 'vae_keys'), (var, 'var_keys')):
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == case[keys]
        refill(model, case['salt'])

    def close(name, x):
        x = x[..., ::4, ::4] if x.ndim == 4 else x
        np.testing.assert_allclose(x.numpy(), want[name], atol=2e-4, err_msg=name)

    def equal(name, maps):
        np.testing.assert_array_equal(torch.cat(maps, 1).numpy(), want[name], name)

    def compare(name, labels, **options):
        """Tokens, where the case has them, and images, which the release has in [0, 1]."""
        drawn = var.generate(vae, labels, **options)
        if f'{name}_tokens' in want:
            equal(f'{name}_tokens', drawn)
        close(f'{name}_image', vae.decode(drawn) / 2 + 0.5)

    small = np.random.RandomState(case['image_seed']).uniform(-1, 1, (case['batch'], 3, 8, 8))
    images = F.interpolate(torch.from_numpy(small.astype('float32')), mode='bilinear',
                           size=(case['image_size'],) * 2, align_corners=False)
    equal('tokens', vae.encode(images))
    tokens = list(torch.from_numpy(want['tokens']).long().split(areas(sides), dim=1))
    labels = torch.from_numpy(want['labels']).long()
    close('reconstruction', vae.decode(tokens))
    close('var_input', vae.var_input(tokens))
    close('logits', var(labels, torch.from_numpy(want['var_input']))[0])
    compare('greedy', labels, cfg=1.5, top_k=1, top_p=0)
    probe = torch.empty(8).exponential_(generator=torch.Generator().manual_seed(7)).numpy()
    if not np.allclose(probe, want['rng_probe']):
        pytest.skip('this torch draws other random numbers: the seeded cases were not compared')
    compare('plain', labels, cfg=0, top_k=0, top_p=0, seed=7)
    compare('sample', labels, cfg=1.5, top_k=40, top_p=0.9, seed=7)
    edit = partial(compare, cfg=3, top_k=40, top_p=0.95, seed=7, given=tokens)
    keep = torch.ones(sides[-1], sides[-1], dtype=torch.bool)
    inside = slice(round(.25 * sides[-1]), round(.75 * sides[-1]))
    keep[inside, inside] = False
    nobody = torch.full_like(labels, case['num_classes'])
    edit('inpaint', nobody, keep=keep)
    edit('outpaint', nobody, keep=~keep)
    edit('edit', labels, keep=keep)


def test_how_the_released_tokenizer_learns():
    """Loss and gradients of the published VQVAE.forward."""
    case = json.loads((HERE / 'assets' / 'stage1.json').read_text())
    vae = VQVAE(case['patch_nums'], case['vocab_size'], case['z_channels'], case['ch'])
    refill(vae)
    shape = case['batch'], 3, case['image_size'], case['image_size']
    images = np.random.RandomState(case['image_seed']).uniform(-1, 1, shape).astype('float32')
    images = torch.from_numpy(images)
    rebuilt, loss = vae(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    assert loss.item() == pytest.approx(case['quantizer_loss'], rel=1e-5)
    mean, mean_square = case['reconstruction_mean'], case['reconstruction_mean_square']
    assert rebuilt.mean().item() == pytest.approx(mean, abs=1e-5)
    assert rebuilt.square().mean().item() == pytest.approx(mean_square, rel=1e-4)
    weights = dict(vae.named_parameters())
    for name, norm in case['gradient_norms'].items():
        assert weights[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('kind', ['own', 'shared'])
def test_how_the_released_transformer_learns(kind):
    """Twenty steps of the official training, with this optimizer and this clipping."""
    course = json.loads((HERE / 'assets' / 'course.json').read_text())
    case, classes, V, z = (course['cases'][kind], course['num_classes'], course['vocab_size'],
                           course['z_channels'])
    var = VAR(course['patch_nums'], course['depth'], classes, V, z, kind == 'shared')
    for name, p in var.named_parameters():
        p.data.copy_(torch.from_numpy(from_name(name, p).astype('float32') * 0.05))
    var.lr = course['lr']                       # what make_optimizer reads of a stage
    optimizer, rng = train.make_optimizer(var), np.random.RandomState(5)
    names = {p: name for name, p in var.named_parameters()}
    assert sorted(names[p] for p in optimizer.param_groups[0]['params']) == sorted(case['decayed'])
    B, L, losses, norms = course['batch'], len(var.mask), [], []
    for _ in range(course['steps']):
        labels = torch.from_numpy(rng.randint(0, classes, B))
        x = torch.from_numpy(rng.standard_normal((B, L - 1, z)).astype('float32'))
        targets = torch.from_numpy(rng.randint(0, V, (B, L)))
        optimizer.zero_grad()
        _, loss = var.eval()(labels, x, targets)        # without label dropout, without drop path
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(var.parameters(), course['clip']).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(case['losses'], rel=1e-5)
    assert norms == pytest.approx(case['norms'], rel=1e-4)
    for name, p in var.named_parameters():
        assert p.sum().item() == pytest.approx(case['sums'][name], rel=1e-3, abs=2e-3), name
        assert p.square().sum().item() == pytest.approx(case['squares'][name], rel=1e-4, abs=1e-6)


def test_learning_rate_is_the_released_one():
    case = json.loads((HERE / 'assets' / 'course.json').read_text())['learning_rate']
    found = [train.learning_rate(step, case['steps']) for step in case['at']]
    assert found == pytest.approx(case['share_of_peak'], rel=1e-6)


# ---- The tokenizer ----


@torch.no_grad()
@pytest.mark.parametrize('sides, ch_mult', [((1, 2, 3, 4), (1, 2)), ((2, 5, 8), (1, 1, 2))])
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
    drawn = var.generate(vae, torch.tensor([0, 5]), seed=1)
    assert [t.shape for t in drawn] == [t.shape for t in tokens]
    rebuilt, loss = vae(images)
    assert rebuilt.shape == images.shape and loss.ndim == 0


@torch.no_grad()
def test_algorithms_1_and_2_as_printed():
    vae, _ = models((1, 2, 3, 4, 6, 8))
    q, images = vae.quantize, torch.rand(2, 3, 16, 16) * 2 - 1
    f = vae.to_latent(images)
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


def test_the_example_of_the_quantizer():
    """The numbers in its docstring; and what is wrong if wide_k is subtracted in phi's place."""
    q = Quantizer((1, 2), 4, 1, 1)
    q.embedding.weight.data = torch.tensor([[-2.], [0.], [1.], [3.]])
    f = torch.tensor([[1.2, 3.1], [3.7, 4.0]])[None, None]
    (one, shrunk, first), (two, residual, last) = q.algorithm1(f)
    assert shrunk.item() == pytest.approx(3) and one.item() == 3 and (first == 3).all()
    torch.testing.assert_close(residual[0, :, 0], torch.tensor([-1.8, 0.1, 0.7, 1.0]))
    assert two.tolist() == [[0, 1, 2, 2]] and last.flatten().tolist() == [1, 3, 4, 4]
    q.phi(0).weight.data *= 2 * (2.8 / 3) - 1                   # phi makes 2.8 of 3
    (_, _, first), (_, residual, _) = q.algorithm1(f)
    torch.testing.assert_close(first, torch.full_like(first, 2.8))
    torch.testing.assert_close(residual[0, :, 0], f.flatten() - 2.8)


def test_every_weight_learns_and_dead_codes_revive():
    vae, images = VQVAE((1, 2, 4), 32, 8, 32, (1, 2)), torch.rand(16, 3, 8, 8) * 2 - 1
    for name, p in vae.named_parameters():      # branches that start at 0 would hide other weights
        if name.endswith(('conv2.weight', 'proj_out.weight')):
            assert not p.any()
            torch.nn.init.normal_(p, std=0.1)
    codes = torch.nn.init.normal_(vae.quantize.embedding.weight).clone()
    rebuilt, loss = vae.eval()(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    assert torch.equal(vae.quantize.embedding.weight, codes)    # they move in training alone
    still = [name for name, p in vae.named_parameters() if p.requires_grad and (
        p.grad is None or not p.grad.abs().sum() > 0)]
    # Three scales use three of the four phi. Biases before a normalisation can have no effect.
    idle = f'qresi_ls.{min({*range(4)} - {*vae.quantize.phi_index})}'
    assert all(name.endswith('.bias') or idle in name for name in still), still
    vae, h = VQVAE((1, 2, 4), 32, 8, 32, (1, 2)).train(), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(vae.quantize.phi(0)(h), h)       # a new one: phi is the identity,
    assert not torch.cat(vae.encode(images), dim=1).any()       # and all codes are zero
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
    counts = tokens[:, 0].bincount(minlength=4)
    torch.testing.assert_close(hits[0] * 45, counts.float())    # shares of all 45 tokens
    q.decay = 0.5
    q.update(tokens, vectors + 1)                               # halfway from the old to the new
    torch.testing.assert_close(q.embedding.weight, before + 0.5)
    torch.testing.assert_close(q.ema_vocab_hit_SV, hits)
    before = q.embedding.weight.clone()
    vectors[3, 2, 1] = math.nan                                 # a batch that is not finite
    q.update((tokens + 1) % 4, vectors)
    assert torch.equal(q.embedding.weight, before) and torch.equal(q.ema_vocab_hit_SV, hits)


def test_usage_does_not_depend_on_the_batch_or_its_unit():
    """A trained codebook goes on with a batch 64 times as large, and from files with the release's
    counts, without counts, and with another number of scales: no code restarts."""
    vae = VQVAE((1, 2, 4), 32, 8, 32, (1, 2)).train()
    for _ in range(60):
        vae(torch.rand(4, 3, 8, 8) * 2 - 1)
    weights, images = vae.state_dict(), torch.rand(256, 3, 8, 8) * 2 - 1
    hits = 'quantize.ema_vocab_hit_SV'
    for n in (weights[hits], weights[hits] * 1e5, weights[hits] * 0, weights[hits][:2]):
        again = VQVAE.from_state_dict({**weights, hits: n}, (1, 2, 4)).train()
        before = again.quantize.embedding.weight.clone()
        assert 0.5 < again.quantize.ema_vocab_hit_SV.sum() < 1.5
        again(images)
        # An EMA moves by a fiftieth; a restarted code becomes another vector.
        moved = (again.quantize.embedding.weight - before).norm(dim=1)
        assert 0 < moved.max() < 0.2 * before.norm(dim=1).mean()


def test_dead_codes_come_from_each_scale_alike():
    q = VQVAE((1, 2, 4), 30, 8, 32, (1,)).quantize
    vectors = q.scale_of_token.float()[None, :, None].expand(5, 21, 8)      # they tell their scale
    q.update(torch.zeros(5, 21, dtype=torch.int64), vectors)                # 1 to 29 are dead
    assert q.embedding.weight[1:, 0].long().bincount().tolist() == [9, 10, 10]
    restarted = q.ema_vocab_hit_SV.sum(0)[1:]                   # a tenth of the average usage
    torch.testing.assert_close(restarted, torch.full((29,), 0.1 / 30))


@torch.no_grad()
def test_tokens_are_those_of_float32_under_autocast():
    vae, _ = models()
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    want, f = vae.encode(images), vae.to_latent(images)
    steps = list(vae.quantize.algorithm1(f))
    with torch.autocast('cpu', torch.bfloat16):
        assert vae.encoder(images).dtype == torch.bfloat16      # autocast is on
        assert all(torch.equal(a, b) for a, b in zip(vae.encode(images), want))
        torch.testing.assert_close(list(vae.quantize.algorithm1(f)), steps, rtol=0, atol=0)


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


@torch.no_grad()
@pytest.mark.parametrize('options', [{}, {'shared_aln': True}])
@pytest.mark.parametrize('cfg', [0, 2.5])
def test_cached_generation_and_guidance_against_the_full_forward(options, cfg):
    vae, var = models(**options)
    labels = torch.tensor([3, 1, 4])
    tokens = var.generate(vae, labels, cfg=cfg, top_k=1)
    x = vae.var_input(tokens)
    wanted, free = var(labels, x)[0], var(torch.full_like(labels, 5), x)[0]
    sizes = areas(var.patch_nums)
    for k, (c, u) in enumerate(zip(wanted.split(sizes, dim=1), free.split(sizes, dim=1))):
        t = cfg * k / 3
        assert torch.equal(((1 + t) * c - t * u).argmax(-1), tokens[k])
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
    tied = torch.zeros(1, 1, 20)                                # as logits of bfloat16 can be
    for k in (1, 3):
        assert filter_logits(tied, k).isfinite().sum() == k
    p = torch.tensor([.1, .2, .7])
    drawn = draw(p.expand(1, 20000, 3), None).flatten().bincount(minlength=3)
    assert (drawn / 20000).tolist() == pytest.approx(p.tolist(), abs=.02)
    vae, var = models()
    torch.nn.init.zeros_(var.head.weight)
    torch.nn.init.zeros_(var.head.bias)
    draws = [torch.cat(var.generate(vae, [0, 1], top_k=1, seed=seed), 1) for seed in (0, 1)]
    assert torch.equal(*draws)                                  # greedy, whatever the seed


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
                         ('blocks.3.ffn.fc2.weight', 8 ** -0.5), ('head.weight', 0.02),
                         ('pos_1LC', 1), ('head_nm.ada_lin.1.weight', 0.5)):
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


def test_scale_of_attention_is_at_most_100():
    attention = VAR((1, 2), 2, 10, 64, 8).blocks[1].attn
    for learned, factor in ((math.log(4), 4), (9, 100)):
        attention.scale_mul_1H11.data.fill_(learned)
        q, k = attention.normalise(*torch.randn(2, 1, 2, 5, 64))
        torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 2, 5), float(factor)))
        torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 2, 5))


@torch.no_grad()
def test_label_dropout_and_stochastic_depth_belong_to_training(monkeypatch):
    _, var = models()
    seen = []
    hook = var.class_emb.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    var.train()(torch.zeros(500, dtype=torch.int64), torch.randn(500, 29, 8))
    hook.remove()
    assert (seen[0] == 5).float().mean().item() == pytest.approx(0.1, abs=0.05)
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


def test_compiled_blocks():
    vae, var = models()
    var.train().label_dropout = 0.
    for block in var.blocks:
        block.drop_rate.zero_()
    tokens, labels = torch.randint(64, (3, 30)), torch.tensor([0, 3, 4])
    x = vae.var_input(tokens.split(areas(var.patch_nums), dim=1))
    _, loss = var(labels, x, tokens)
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
    figures, sizes = grade_transformer(vae, var, tokens, labels, CPU), areas(var.patch_nums)
    logits, _ = var(labels, vae.var_input(tokens.split(sizes, dim=1)))
    nats = -logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]    # (30, 30)
    wrong = (logits.argmax(-1) != tokens).double()
    for name, x in (('loss', nats), ('error', wrong)):
        assert figures[name] == pytest.approx(x.mean().item(), rel=1e-4)
        for k, part in enumerate(x.split(sizes, dim=1)):
            assert figures[f'{name} {k}'] == pytest.approx(part.mean().item(), rel=1e-4)
        assert figures[f'{name} last'] == figures[f'{name} 3']


@torch.no_grad()
def test_editing_keeps_what_it_is_told_to_keep():
    vae, var = models((1, 2, 4, 8))
    given = vae.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    keep = torch.zeros(8, 8)
    keep[:, :4] = 1
    edit = partial(var.generate, vae, torch.tensor([5, 5]), given=given, keep=keep)
    runs = [edit(seed=seed) for seed in range(4)]
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

    def features(x):                            # before each pooling, on ImageNet's scale
        mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
        x, at = ((x + 1) / 2 - mean) / std, 0
        for convs in (2, 2, 3, 3, 3):
            for _ in range(convs):
                weight, bias = weights[f'features.{at}.weight'], weights[f'features.{at}.bias']
                x, at = F.conv2d(x, weight, bias, padding=1).relu(), at + 2
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
    seen = []

    def adversarial(images, rebuilt, others, last_layer):
        seen.append(others.item())
        assert last_layer is stage.vae.decoder.conv_out.weight
        return 7., torch.tensor(2.)

    stage.adversarial.forward = adversarial
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    rebuilt, quantizer = stage.vae(x)
    want = (rebuilt - x).square().mean() + 0.2 * (rebuilt - x).abs().mean() + quantizer
    want = want.item() + 3 * (rebuilt - x).abs().max().item()
    found = []
    for step in range(8):
        found.append(stage(step, images)[0].item())
    assert found == pytest.approx([want] * 4 + [want + 7] * 4, rel=1e-4)
    assert seen == pytest.approx([want] * 4, rel=1e-4)          # what lambda_G is relative to


OFF = torch.amp.GradScaler('cpu', enabled=False)        # as train_stage has it, but in float16


def small_stage(name, tmp_path, **options):
    """A stage on 16 random images with a tiny network, in float32 and without dropout."""
    given = dict(data='cifar10', out=tmp_path, workers=0, precision='float32', ch=8, vocab_size=99,
                 patch_nums=(1, 2, 3, 4, 6, 8), device=CPU, **options)
    config = make_config(given)
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
    images = torch.zeros(16, 32, 32, 3, dtype=torch.uint8)
    labels = torch.zeros(16, dtype=torch.int64)
    tokens = torch.zeros(16, 130, dtype=torch.int64)
    return {'tokenizer': [images], 'transformer': [tokens, labels]}[name]


def gradients_of_a_step(tmp_path, n, fails=(), dropout=0.):
    """Of eight images by micro-batches of n. fails: the passes, from 0, in which memory ends. What
    a failed pass held is freed before the next."""
    rng = torch.Generator().manual_seed(0)
    batch = [torch.randint(90, (8, 130), generator=rng), torch.arange(8) % 4]
    stage = small_stage('transformer', tmp_path, batch=8, micro_batch=n)
    stage.var.label_dropout, forward, passes, held = dropout, stage.forward, [], []

    def limited(step, tokens, labels):
        assert not any(loss() is not None for loss in held)
        passes.append(len(labels))
        loss, figures = forward(step, tokens, labels)
        if len(passes) - 1 in fails:
            held.append(weakref.ref(loss))

            def fail(gradient):                 # as memory ends in a backward pass
                raise torch.OutOfMemoryError('CUDA out of memory')

            loss.register_hook(fail)
        return loss, figures

    stage.forward = limited
    figures = train.gradients(stage, 0, batch, OFF)
    assert not figures['loss'].requires_grad            # or it would hold the passes before
    found = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {**found, 'loss': figures['loss']}


def test_micro_batches_add_up_to_the_batch(tmp_path):
    """1, 2, 4 and 3 (unequal) micro-batches give the same gradients."""
    want = gradients_of_a_step(tmp_path, 8)
    for n in (4, 2, 3):
        torch.testing.assert_close(gradients_of_a_step(tmp_path, n), want, rtol=1e-4, atol=1e-5)


def test_micro_batches_are_halved_until_they_fit(tmp_path, capsys):
    """With dropout: the step that starts over draws the same random numbers."""
    # Memory ends with all eight, and with the second four.
    found = gradients_of_a_step(tmp_path, 8, fails=(0, 2), dropout=0.5)
    said = capsys.readouterr().out
    assert '4 images per pass' in said and '2 images per pass' in said
    want = gradients_of_a_step(tmp_path, 2, dropout=0.5)
    assert all(torch.equal(found[name], want[name]) for name in want)
    with pytest.raises(torch.OutOfMemoryError):
        gradients_of_a_step(tmp_path, 8, fails=range(99))
    stage, passes = small_stage('tokenizer', tmp_path), []      # needs the whole batch

    def fail(step, images):
        passes.append(len(images))
        raise RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')

    stage.forward = fail
    with pytest.raises(RuntimeError):
        train.gradients(stage, 0, zero_batch('tokenizer'), OFF)
    assert passes == [16]


def test_the_seed_of_a_step(tmp_path, monkeypatch):
    """Randomness depends on seed, stage, step and rank alone."""
    seeds = []
    for seed, name, step, rank in (
            (0, 'tokenizer', 1, 0), (0, 'tokenizer', 2, 0), (0, 'tokenizer', 1, 1),
            (0, 'transformer', 1, 0), (5, 'tokenizer', 1, 0), (0, 'tokenizer', 1, 0)):
        stage = small_stage(name, tmp_path, seed=seed, steps=8, tokenizer_steps=8)
        stage.register_forward_pre_hook(lambda *args: seeds.append(torch.initial_seed()))
        monkeypatch.setattr(train, 'rank_and_world', lambda: (rank, 2))
        train.gradients(stage, step, zero_batch(name), OFF)
    assert len({*seeds}) == 5 and seeds[0] == seeds[-1]


def run_stage(name, tmp_path, monkeypatch, steps=4, **options):
    """A stage after train_stage() on zeros, and what each step's optimizer saw: learning rates and
    norms of the gradients."""
    stage = small_stage(name, tmp_path, steps=steps, tokenizer_steps=steps, **options)
    stage.batches = lambda start: (zero_batch(name) for _ in range(start, steps))
    make, seen = train.make_optimizer, []

    def evaluate(step):
        assert not stage.training                       # no dropout
        return {}

    def recorded(stage):
        optimizer = make(stage)

        def note(optimizer, *args):
            assert stage.training
            (lr,) = {group['lr'] for group in optimizer.param_groups}
            weights = [p for group in optimizer.param_groups for p in group['params']]
            norms = [p.grad.norm() for p in weights if p.grad is not None]
            seen.append((lr, torch.stack(norms).norm().item()))

        optimizer.register_step_pre_hook(note)
        return optimizer

    stage.evaluate = evaluate
    monkeypatch.setattr(train, 'make_optimizer', recorded)
    train.train_stage(stage, dict(step=0, optimizer=None))
    return stage, seen


def test_learning_rate_and_clipping_of_a_step(tmp_path, monkeypatch):
    forward = train.TransformerStage.forward
    monkeypatch.setattr(train.TransformerStage, 'forward',
                        lambda stage, *batch: (1e4 * forward(stage, *batch)[0], {}))
    stage, seen = run_stage('transformer', tmp_path, monkeypatch, batch=16)
    assert [lr for lr, _ in seen] == [stage.lr * train.learning_rate(i, 4) for i in range(4)]
    assert [norm for _, norm in seen] == pytest.approx([2] * 4, rel=1e-3)


def test_saving_takes_two_percent_of_the_time(tmp_path, monkeypatch):
    """A step takes a second, and ckpt.pt ten: it is written every 500 seconds, not every minute."""
    clock, saved = [0.], []

    def write_state(state, step, *rest):
        clock[0] += 10
        saved.append(step)

    monkeypatch.setattr(train.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(train, 'write_state', write_state)

    def slow(stage, step, images):
        clock[0] += 1
        return stage.vae.quant_conv.weight.sum(), {}

    monkeypatch.setattr(train.TokenizerStage, 'forward', slow)
    run_stage('tokenizer', tmp_path, monkeypatch, steps=1200, adversarial=0.)
    assert saved == [61, 562, 1063, 1200]


def test_rows_of_stored_tokens(tmp_path):
    """The views of an image have its label, and an epoch has all views of all images."""
    stage = small_stage('transformer', tmp_path, batch=4, steps=12)
    stored = np.arange(16 * 3 * 130).reshape(16, 3, 130) % 99, np.arange(16) % 4
    stage = train.TransformerStage(stage.config, stage.vae, stage.var, stored, stored)
    epoch = torch.cat([tokens for tokens, _ in stage.batches(0)]).tolist()
    assert sorted(epoch) == sorted(stored[0].reshape(48, 130).tolist())
    tokens, labels = stage.fetch_rows(stored, [0, 4, 47])
    for row, (image, view) in enumerate(((0, 0), (1, 1), (15, 2))):
        assert tokens[row].tolist() == stored[0][image, view].tolist() and labels[row] == image % 4


@pytest.mark.parametrize('name', ['tokenizer', 'transformer'])
def test_a_step_on_a_device_neither_mixes_nor_waits(name, tmp_path, monkeypatch):
    """On the meta device, which like a GPU does not mix with the CPU, and whose values cannot be
    read: .item(), a boolean index or nonzero(), which would wait for a GPU, fail here."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **options: contextlib.nullcontext())
    stage = small_stage(name, tmp_path, adversarial=0.5, tokenizer_steps=4).to('meta')

    def on_meta(module, inputs):                # nn.Embedding would take indices on the CPU
        assert all(x.device.type == 'meta' for x in inputs if torch.is_tensor(x)), module

    for module in stage.modules():
        module.register_forward_pre_hook(on_meta)
    stage.config.device = torch.device('meta')
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad])
    for step in range(4):                       # without and with discriminator
        figures = train.gradients(stage, step, [x.to('meta') for x in zero_batch(name)], OFF)
        optimizer.step()
    with pytest.raises(RuntimeError, match='meta'):
        figures['loss'].item()
    maps = stage.vae.encode(torch.zeros(2, 3, 32, 32, device='meta'))
    if name == 'transformer':
        labels = torch.zeros(2, dtype=torch.int64)
        maps = stage.var.eval().generate(stage.vae, labels, top_k=9, top_p=.9)
    assert stage.vae.decode(maps).device.type == 'meta'


# ---- Runs ----

TINY = ('--size', 32, '--depth', 1, '--ch', 8, '--vocab-size', 99, '--tokenizer-batch', 4,
        '--batch', 4, '--tokenizer-steps', 4, '--steps', 3, '--workers', 0)


def write_images(root, n=6, classes=('cat', 'dog')):
    """Images of every kind, in class folders; and one that is cut short."""
    rng = np.random.default_rng(0)
    kinds = [('RGB', 'jpg'), ('L', 'png'), ('CMYK', 'jpg'), ('P', 'gif'), ('RGBA', 'webp'),
             ('RGB', 'bmp')]
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
    words = '--data', 'images', *TINY, '--flip'
    with pytest.MonkeyPatch.context() as patch:
        assert command(train, *words, monkeypatch=patch, folder=folder) == 0
    return folder


def launch(folder, module, *words, torchrun=(), extra=''):
    """Starts a command in a process of its own, in float32 on one thread, or by torchrun."""
    script = folder / f'{module}_{len(list(folder.iterdir()))}.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(HERE)!r})\n'
                      f'import torch, sample, tokenizer, train, var\n'
                      f'from support.run import run\ntorch.set_num_threads(1)\n'
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
    assert [run_.wait(120) for run_ in runs] == [0, 0]
    one, both = (np.load(tmp_path / name) for name in ('0.npz', f'{len(two)}.npz'))
    assert all(np.array_equal(one[name], both[name]) for name in ('arr_0', 'arr_1'))


def test_two_machines_train_as_one_process_does(trained, tmp_path):
    """Two agents of torchrun with one --out. Without dropout, L_G, and the restart of dead codes,
    which are of each process's part of the batch."""
    words = ('--data', trained / 'images', *TINY, '--flip', '--micro-batch', 1, '--adversarial', 0,
             '--init', trained / 'model.pt', '--tokenizer', 'train')
    still = 'var.VAR.label_dropout = tokenizer.Quantizer.dead_below = 0.'
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agent = ('--nnodes', '2', '--nproc_per_node', '1', '--local-addr', '127.0.0.1',
             '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'127.0.0.1:{port}')
    runs = [launch(tmp_path, 'train', *words, '--out', 'one', extra=still)]
    runs += [launch(tmp_path, 'train', *words, '--out', 'two', extra=still, torchrun=agent)
             for _ in range(2)]
    assert [run_.wait(120) for run_ in runs] == [0, 0, 0]
    one, two = ([line.split(',') for line in (tmp_path / n / 'log.csv').read_text().splitlines()]
                for n in ('one', 'two'))
    assert {row[0] for row in one} == {'stage', 'tokenizer', 'transformer'}
    assert [row[:2] + row[3:4] for row in one] == [row[:2] + row[3:4] for row in two]
    for a, b in zip(one[1:], two[1:]):
        # Rates differ, and these figures are of one process's part of the batch.
        if a[3] not in ('train images/s', 'train PSNR', 'train quantizer', 'train error'):
            assert float(a[4]) == pytest.approx(float(b[4]), rel=1e-3, abs=1e-4), (a, b)


def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    """Killed in stage 1, after L_G has started, resumed, killed in stage 2, and resumed. It saves
    before every step, and is killed when it would save: a step is lost each time."""
    words = '--data', trained / 'images', *TINY, '--flip', '--tokenizer-steps', 30, '--steps', 40
    whole = launch(tmp_path, 'train', *words, '--out', 'whole')
    for end in (('tokenizer', 18), ('transformer', 3)):
        deadly = ('import os\nwrite = train.write_state\ntrain.SAVE_EVERY = -1\n'
                  'train.SAVING = float("inf")\ndef save(state, step, *rest):\n'
                  f'    if (state["stage"], step) == {end}:\n        os.kill(os.getpid(), 9)\n'
                  '    write(state, step, *rest)\ntrain.write_state = save')
        run_ = launch(tmp_path, 'train', *words, '--out', 'killed', extra=deadly)
        assert run_.wait(120) == -signal.SIGKILL
        state = torch.load(tmp_path / 'killed' / 'ckpt.pt', weights_only=True)
        assert (state['stage'], state['step'] + 1) == end
        words = '--resume', '--workers', 0
    assert launch(tmp_path, 'train', *words, '--out', 'killed').wait(120) == 0
    assert whole.wait(120) == 0
    assert same_weights(tmp_path / 'whole' / 'ckpt.pt', tmp_path / 'killed' / 'ckpt.pt')
    rows = (tmp_path / 'killed' / 'log.csv').read_text().splitlines()
    assert sum(row.startswith('stage,') for row in rows) == 1


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, monkeypatch, capsys):
    """The last good ckpt.pt stays, and a gradient that is not finite counts, too."""
    calls, forward = [], train.TokenizerStage.forward

    def poisoned(stage, step, images):
        loss, figures = forward(stage, step, images)
        calls.append(loss)
        if len(calls) == 3:
            loss = loss + (loss - loss.detach()).sqrt()         # finite, but not its gradient
        return loss, figures

    monkeypatch.setattr(train.TokenizerStage, 'forward', poisoned)
    monkeypatch.setattr(train, 'SAVE_EVERY', -1)
    monkeypatch.setattr(train, 'SAVING', math.inf)
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
    """The gradients that are clipped are not scaled ones, and steps that are not finite are left
    out until the scale is 1."""
    go = partial(command, train, '--precision', 'float16', '--workers', 0, '--out', tmp_path,
                 monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--data', trained / 'images', *TINY) == 0
    norms = [float(row.split(',')[4]) for row in (tmp_path / 'log.csv').read_text().splitlines()
             if 'gradient norm' in row]
    assert len(norms) == 7 and sum(norm < 1000 for norm in norms) >= 5
    scale = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['scaler']['scale']
    forward, calls = train.TransformerStage.forward, []

    def poisoned(stage, *batch):
        calls.append(0)
        loss, figures = forward(stage, *batch)
        return loss * math.inf, figures

    monkeypatch.setattr(train.TransformerStage, 'forward', poisoned)
    assert go('--resume', '--steps', 100) == 2
    assert 'no longer finite' in capsys.readouterr().err
    assert len(calls) >= math.log2(scale)


def test_fine_tuning(trained, tmp_path, monkeypatch, capsys):
    """Each row of the table of make_models: which weights of --init a run starts from."""
    write_images(tmp_path / 'other', 3, ('dog', 'x', 'y'))
    source = trained / 'model.pt'
    go = partial(command, train, '--data', 'other', *TINY, '--steps', 0, monkeypatch=monkeypatch,
                 folder=tmp_path)
    assert go('--init', source, '--out', 'a') == 0              # its tokenizer is kept
    before = torch.load(source, weights_only=True)
    after = torch.load(tmp_path / 'a' / 'model.pt', weights_only=True)
    assert all(torch.equal(v, after['vae'][k]) for k, v in before['vae'].items())
    before, after = before['var'], after['var']
    changed = [k for k, v in before.items() if not torch.equal(v, after[k])]
    assert changed == ['class_emb.weight']
    (_, dog, nobody), new = before['class_emb.weight'], after['class_emb.weight']
    assert torch.equal(new[0], dog) and torch.equal(new[3], nobody)         # by name
    assert new[1:3].std().item() == pytest.approx((1 / (3 * 64)) ** 0.5, rel=0.3)
    assert '2 of 3 classes are new to the transformer: x, y' in capsys.readouterr().out
    # Stage 1 goes on from its tokenizer.
    assert go('--init', source, '--tokenizer', 'train', '--tokenizer-steps', 0, '--out', 'b') == 0
    assert same_weights(tmp_path / 'a' / 'model.pt', tmp_path / 'b' / 'model.pt')
    assert 'tokenizer: ' in capsys.readouterr().out
    assert go('--init', source, '--depth', 2, '--out', 'c') == 2
    assert '--depth 2: ' in (said := capsys.readouterr().err) and 'model.pt has 1' in said
    # The family of the 512 px model; a file without transformer; a damaged one.
    ckpt = torch.load(source, weights_only=True)
    vae = VQVAE.from_state_dict(ckpt['vae'], (1, 2, 4, 8))
    var = VAR((1, 2, 4, 8), 1, 3, *vae.quantize.embedding.weight.shape, shared_aln=True)
    torch.save(var.state_dict(), tmp_path / 'd36.pth')
    torch.save(ckpt['vae'], tmp_path / 'vae.pth')
    torch.save({**ckpt, 'var': {'lvl_1L': ckpt['var']['lvl_1L']}}, tmp_path / 'damaged.pt')
    assert go('--init', 'd36.pth', '--tokenizer', source, '--out', 'd') == 0
    after = torch.load(tmp_path / 'd' / 'model.pt', weights_only=True)['var']
    assert all(torch.equal(v, after[k]) for k, v in var.state_dict().items())
    scales = ('--patch-nums', '1,2,4,8')                        # which a released tokenizer lacks
    assert go('--init', 'vae.pth', *scales, '--out', 'e') == 0
    assert 'vae.pth has no transformer: it will be a new one' in capsys.readouterr().out
    for name in ('damaged.pt', 'd36.pth'):
        assert go('--init', name, '--out', 'f') == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and ('not the weights' in error or 'no tokenizer' in error)
