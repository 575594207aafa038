"""Tests of the method: python -m pytest -q. Seeded, on the CPU, without a network.

The oracles: the official implementation's own numbers (assets/*.json), the paper's algorithms
written out a second time, brute force, and runs of train.py that are killed, resumed and shared.
"""
import json
import math
import signal
import socket
from contextlib import nullcontext
from fractions import Fraction

import support                                  # before torch: see there
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
import tokenizer
import train
from conftest import HERE, TINY, from_name, go, launch, models, read_ckpt, read_log, refill, same
from edit import kept_tokens
from support.grade import grade_transformer
from support.losses import AdversarialLoss, PerceptualLoss
from support.options import make_config
from tokenizer import VQVAE, Quantizer
from var import VAR, block_causal_mask, draw, filter_logits

AREAS = [1, 4, 9, 16]                           # of the scales of models(): 30 tokens
OFF = torch.amp.GradScaler('cpu', enabled=False)        # as train_stage has it, but in float16


# ---- The official numbers ----


@pytest.mark.parametrize('name', [path.stem for path in sorted(HERE.glob('assets/golden_*.json'))])
@torch.no_grad()
def test_golden(name):
    case = json.loads((HERE / 'assets' / f'{name}.json').read_text())
    want = np.load(HERE / 'assets' / f'{name}.npz')
    sides, V, z = case['patch_nums'], case['vocab_size'], case['z_channels']
    vae = VQVAE(sides, V, z, case['ch'], phi_count=case['share_quant_resi'])
    var = VAR(sides, case['depth'], case['num_classes'], V, z, case['shared_aln'])
    for model, keys in ((vae, 'vae_keys'), (var, 'var_keys')):
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == case[keys]
        refill(model, case['salt'])

    def close(name, x):
        x = x[..., ::4, ::4] if x.ndim == 4 else x
        np.testing.assert_allclose(x.numpy(), want[name], atol=2e-4, err_msg=name)

    def compare(name, labels, **options):
        """Tokens, where the case has them, and images, which the release has in [0, 1]."""
        drawn = var.generate(vae, labels, **options)
        if f'{name}_tokens' in want:
            assert np.array_equal(torch.cat(drawn, dim=1), want[f'{name}_tokens']), name
        close(f'{name}_image', vae.decode(drawn) / 2 + 0.5)

    small = np.random.RandomState(case['image_seed']).uniform(-1, 1, (case['batch'], 3, 8, 8))
    images = F.interpolate(torch.from_numpy(small.astype('float32')), mode='bilinear',
                           size=(case['image_size'],) * 2, align_corners=False)
    assert np.array_equal(torch.cat(vae.encode(images), dim=1), want['tokens'])
    tokens = list(torch.from_numpy(want['tokens']).long().split([p * p for p in sides], dim=1))
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
    keep = torch.ones(sides[-1], sides[-1], dtype=torch.bool)
    inside = slice(round(.25 * sides[-1]), round(.75 * sides[-1]))
    keep[inside, inside] = False
    nobody = torch.full_like(labels, case['num_classes'])
    for name, y, mask in (('inpaint', nobody, keep), ('outpaint', nobody, ~keep),
                          ('edit', labels, keep)):
        masks = [kept_tokens(mask, p) for p in sides]
        compare(name, y, cfg=3, top_k=40, top_p=0.95, seed=7, given=tokens, keep=masks)


def test_how_the_released_tokenizer_learns():
    """Loss and gradients of the published VQVAE.forward."""
    case = json.loads((HERE / 'assets' / 'stage1.json').read_text())
    vae = refill(VQVAE(case['patch_nums'], case['vocab_size'], case['z_channels'], case['ch']))
    shape = case['batch'], 3, case['image_size'], case['image_size']
    images = np.random.RandomState(case['image_seed']).uniform(-1, 1, shape)
    images = torch.from_numpy(images.astype('float32'))
    rebuilt, loss = vae(images)
    (F.mse_loss(rebuilt, images) + loss).backward()
    assert loss.item() == pytest.approx(case['quantizer_loss'], rel=1e-5)
    assert rebuilt.mean().item() == pytest.approx(case['reconstruction_mean'], abs=1e-5)
    mean_square = case['reconstruction_mean_square']
    assert rebuilt.square().mean().item() == pytest.approx(mean_square, rel=1e-4)
    weights = dict(vae.named_parameters())
    for name, norm in case['gradient_norms'].items():
        assert weights[name].grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize('kind', ['own', 'shared'])
def test_how_the_released_transformer_learns(kind):
    """Twenty steps of the official training, with this optimizer; and its learning rate."""
    course = json.loads((HERE / 'assets' / 'course.json').read_text())
    case, classes, B, V, z = course['cases'][kind], *(
        course[name] for name in ('num_classes', 'batch', 'vocab_size', 'z_channels'))
    var = VAR(course['patch_nums'], course['depth'], classes, V, z, kind == 'shared')
    for name, p in var.named_parameters():
        p.data.copy_(torch.from_numpy(from_name(name, p).astype('float32') * 0.05))
    var.lr = course['lr']                       # what make_optimizer reads of a stage
    optimizer, rng = train.make_optimizer(var), np.random.RandomState(5)
    names = {p: name for name, p in var.named_parameters()}
    assert sorted(names[p] for p in optimizer.param_groups[0]['params']) == sorted(case['decayed'])
    for loss_, norm_ in zip(case['losses'], case['norms'], strict=True):
        labels = torch.from_numpy(rng.randint(0, classes, B))
        x = torch.from_numpy(rng.standard_normal((B, len(var.mask) - 1, z)).astype('float32'))
        targets = torch.from_numpy(rng.randint(0, V, (B, len(var.mask))))
        optimizer.zero_grad()
        _, loss = var.eval()(labels, x, targets)        # without label dropout, without drop path
        loss.backward()
        norm = nn.utils.clip_grad_norm_(var.parameters(), course['clip'])
        optimizer.step()
        assert loss.item() == pytest.approx(loss_, rel=1e-5)
        assert norm.item() == pytest.approx(norm_, rel=1e-4)
    for name, p in var.named_parameters():
        assert p.sum().item() == pytest.approx(case['sums'][name], rel=1e-3, abs=2e-3), name
        assert p.square().sum().item() == pytest.approx(case['squares'][name], rel=1e-4, abs=1e-6)
    rate = course['learning_rate']
    found = [train.learning_rate(step, rate['steps']) for step in rate['at']]
    assert found == pytest.approx(rate['share_of_peak'], rel=1e-6)


# ---- The method ----


@torch.no_grad()
@pytest.mark.parametrize('sides, ch_mult', [((1, 2, 3, 4, 6, 8), (1, 2)), ((2, 5, 8), (1, 1, 2))])
def test_algorithms_1_and_2_as_printed(sides, ch_mult):
    vae, _ = models(sides, ch_mult=ch_mult)
    q, images = vae.quantize, torch.rand(2, 3, vae.image_size, vae.image_size) * 2 - 1
    f = vae.to_latent(images)
    tokens, f_hat = [], torch.zeros_like(f)
    for k, p in enumerate(sides):
        small = F.interpolate(f, size=(p, p), mode='area')
        distance = (small[:, None] - q.embedding.weight[None, :, :, None, None]).norm(dim=2)
        r_k = distance.argmin(1)                                            # (B, p, p)
        z_k = q.embedding.weight[r_k].permute(0, 3, 1, 2)
        z_k = F.interpolate(z_k, size=(8, 8), mode='bicubic', align_corners=False)
        conv = q.quant_resi['qresi_ls'][q.phi_index[k]]
        h = 0.5 * z_k + 0.5 * F.conv2d(z_k, conv.weight, conv.bias, padding=1)
        f, f_hat = f - h, f_hat + h
        tokens.append(r_k.flatten(1))
    maps = vae.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(tokens, maps, strict=True))
    want = vae.decoder(vae.post_quant_conv(f_hat)).clamp(-1, 1)
    torch.testing.assert_close(vae.decode(maps), want)
    assert torch.equal(vae.decode_scales(maps)[len(sides) - 1], vae.decode(maps))
    f, want = vae.to_latent(images), list(q.algorithm1(vae.to_latent(images)))
    with torch.autocast('cpu', torch.bfloat16):                 # also here all is in float32
        assert all(torch.equal(a, b) for a, b in zip(vae.encode(images), maps))
        torch.testing.assert_close(list(q.algorithm1(f)), want, rtol=0, atol=0)


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
            nn.init.normal_(p, std=0.1)
    codes = nn.init.normal_(vae.quantize.embedding.weight).clone()
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
    q.decay = 0.5                               # halfway; and a larger batch weighs no more
    q.update(tokens.repeat(64, 1), vectors.repeat(64, 1, 1) + 1)
    torch.testing.assert_close(q.embedding.weight, before + 0.5)
    torch.testing.assert_close(q.ema_vocab_hit_SV, hits)
    before, hits = q.embedding.weight.clone(), q.ema_vocab_hit_SV.clone()
    vectors[3, 2, 1] = math.nan                                 # a batch that is not finite
    q.update((tokens + 1) % 4, vectors)
    assert torch.equal(q.embedding.weight, before) and torch.equal(q.ema_vocab_hit_SV, hits)


def test_dead_codes_come_from_each_scale_alike():
    q = VQVAE((1, 2, 4), 30, 8, 32, (1,)).quantize
    vectors = q.scale_of_token.float()[None, :, None].expand(5, 21, 8)      # they tell their scale
    q.update(torch.zeros(5, 21, dtype=torch.int64), vectors)                # 1 to 29 are dead
    assert q.embedding.weight[1:, 0].long().bincount().tolist() == [9, 10, 10]
    restarted = q.ema_vocab_hit_SV.sum(0)[1:]                   # a tenth of the average usage
    torch.testing.assert_close(restarted, torch.full((29,), 0.1 / 30))


@pytest.mark.parametrize('sides', [(1, 2), (1, 2, 3, 4), (2, 3), (1, 2, 3, 4, 6, 8)])
def test_mask_against_brute_force(sides):
    scale_of = [k for k, p in enumerate(sides) for _ in range(p * p)]
    want = [[0. if seen <= k else -math.inf for seen in scale_of] for k in scale_of]
    assert block_causal_mask(sides).tolist() == VAR(sides, 1, 3, 8, 4).mask.tolist() == want


@pytest.mark.parametrize('grad', [False, True])     # the fused attention, and the one written out
def test_causality_of_the_transformer(grad):
    vae, var = models()
    labels, x, ends = torch.tensor([0, 1]), torch.randn(2, 29, 8), np.cumsum(AREAS)
    tokens = list(torch.randint(64, (2, 30)).split(AREAS, dim=1))
    with torch.set_grad_enabled(grad):
        before = var(labels, x)[0]
        for start, end in zip(ends, ends[1:]):                  # of each scale but the first
            changed = x.clone()
            changed[:, start - 1:end - 1] += 1                  # its input
            after = var(labels, changed)[0]
            assert torch.equal(before[:, :start], after[:, :start])
            assert (before[:, start:] != after[:, start:]).any(-1).all()
        before = var(labels, vae.var_input(tokens))[0]
        for k, end in enumerate(ends):                          # r_k changes nothing up to scale k
            changed = [(t + (i == k)) % 64 for i, t in enumerate(tokens)]
            after = var(labels, vae.var_input(changed))[0]
            assert torch.equal(before[:, :end], after[:, :end])
            assert k == 3 or not torch.equal(before[:, end:], after[:, end:])


@torch.no_grad()
@pytest.mark.parametrize('sides, shared', [((1, 2, 3, 4), False), ((2, 3, 4, 5), True)])
@pytest.mark.parametrize('cfg', [0, 2.5])
def test_cached_generation_and_guidance_against_the_full_forward(sides, shared, cfg):
    vae, var = models(sides, shared_aln=shared)
    labels, sizes = torch.tensor([3, 1, 4]), [p * p for p in sides]
    tokens = var.generate(vae, labels, cfg=cfg, top_k=1)
    x = vae.var_input(tokens)
    assert x.shape == (3, sum(sizes[1:]), 8) and [len(t[0]) for t in tokens] == sizes
    wanted, free = var(labels, x)[0], var(torch.full_like(labels, 5), x)[0]
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
    assert [filter_logits(tied, k).isfinite().sum() for k in (1, 3)] == [1, 3]
    p = torch.tensor([.1, .2, .7])
    drawn = draw(p.expand(1, 20000, 3), None).flatten().bincount(minlength=3)
    assert (drawn / 20000).tolist() == pytest.approx(p.tolist(), abs=.02)


@pytest.mark.parametrize('shared', [False, True])
def test_sizes_follow_equations_7_and_8(shared):
    for d in (2, 4):
        var, w = VAR((1, 2), d, 10, 16, 8, shared), 64 * d
        assert var.pos_start.shape[-1] == w and len(var.blocks) == d == var.blocks[0].attn.heads
        rates = [block.drop_rate.item() for block in var.blocks]
        assert rates == pytest.approx([0.1 * d / 24 * i / (d - 1) for i in range(d)])
        weights = sum(p.numel() for name, p in var.named_parameters()
                      if 'weight' in name and ('blocks' in name or 'shared' in name))
        assert weights == (12 * d * w * w + 6 * w * w if shared else 18 * d * w * w)


def test_initial_weights_and_the_scale_of_attention():
    var, w = VAR((1, 2, 3), 4, 10, 64, 8), 256
    weights, std = dict(var.named_parameters()), math.sqrt(1 / (3 * w))
    for name, factor in (('word_embed.weight', 1), ('blocks.0.attn.proj.weight', 8 ** -0.5),
                         ('blocks.3.ffn.fc2.weight', 8 ** -0.5), ('head.weight', 0.02),
                         ('pos_1LC', 1), ('head_nm.ada_lin.1.weight', 0.5)):
        assert weights[name].std().item() == pytest.approx(std * factor, rel=0.1), name
    assert not weights['blocks.1.attn.q_bias'].any()
    assert (weights['blocks.1.attn.scale_mul_1H11'] == math.log(4)).all()
    ada = weights['blocks.2.ada_lin.1.weight']
    assert ada[2 * w:].std().item() == pytest.approx(std * 0.5, rel=0.1)
    for depth, gate in ((4, 1e-5), (16, 1e-3), (20, 1e-3), (24, 1e-4), (30, 1e-5)):
        var.init_weights(w, depth)
        assert ada[:2 * w].std().item() == pytest.approx(std * gate, rel=0.1)
    shared = VAR((1, 2, 3), 4, 10, 64, 8, shared_aln=True)
    shared.init_weights(w, 36)
    offset = shared.blocks[2].ada_gss[0, 0]                     # (6, w)
    assert offset[:2].std().item() == pytest.approx(w ** -0.5 * 5e-6, rel=0.15)
    assert offset[2:].std().item() == pytest.approx(w ** -0.5 * 0.5, rel=0.1)
    for part in shared.shared_ada_lin[1].weight.view(6, w, w):  # no gate factor, as in the release
        assert part.std().item() == pytest.approx(std, rel=0.1)
    for learned, factor in ((math.log(4), 4.), (9, 100.)):      # attention: at first, at most
        shared.blocks[1].attn.scale_mul_1H11.data.fill_(learned)
        q, k = shared.blocks[1].attn.normalise(*torch.randn(2, 1, 4, 5, 64))
        torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 4, 5), factor))
        torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 4, 5))


@torch.no_grad()
def test_label_dropout_and_stochastic_depth_belong_to_training():
    (_, var), seen, labels = models(), [], torch.tensor([1, 1])
    var.class_emb.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    var.train()(torch.zeros(500).long(), torch.randn(500, 29, 8))
    assert (seen[0] == 5).float().mean().item() == pytest.approx(0.1, abs=0.05)
    x, var.label_dropout = torch.randn(1, 29, 8).expand(2, -1, -1), 1.
    var.blocks[1].drop_rate.fill_(0.)
    dropped, nobody = var.train()(labels, x)[0], var.eval()(labels * 5, x)[0]
    torch.testing.assert_close(dropped, nobody, atol=1e-4, rtol=1e-4)
    assert not torch.equal(var(labels, x)[0], nobody)           # in evaluation the label counts
    gamma, block = torch.ones(4000, 1, 8), var.blocks[1].train()
    block.drop_rate.fill_(0.2)
    gates = block.drop_path(gamma)
    assert (gates == gates[..., :1]).all()                      # per image
    assert {*gates.unique().tolist()} == {0., 1.25}             # closed, or 1 / (1 - rate) open
    assert gates.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval().drop_path(gamma), gamma)
    block.train().drop_rate.fill_(1 - 1e-6)                     # both branches are closed
    x = torch.randn(2, 5, 128)
    assert torch.equal(block(x, torch.ones(6, 2, 1, 128), torch.zeros(5, 5)), x)


def test_compiled_blocks():
    (vae, var), found = models(), []
    var.train().label_dropout = 0.
    tokens, labels = torch.randint(64, (3, 30)), torch.tensor([0, 3, 4])
    x = vae.var_input(tokens.split(AREAS, dim=1))
    for block in var.blocks:
        block.drop_rate.zero_()
    for _ in range(2):                                          # in eager mode, then compiled
        found.append(torch.autograd.grad(var(labels, x, tokens)[1], list(var.parameters())))
        for block in var.blocks:
            block.compile(backend='eager', fullgraph=True)      # one graph, no generated code
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_loss_and_error_of_each_scale():
    vae, var = models()
    tokens, labels = torch.randint(64, (30, 30)), torch.arange(30) % 5      # parts of 25 and 5
    figures = grade_transformer(vae, var, tokens, labels, 'cpu')
    logits, _ = var(labels, vae.var_input(tokens.split(AREAS, dim=1)))
    nats = -logits.double().log_softmax(-1).gather(2, tokens[..., None])[..., 0]    # (30, 30)
    wrong = (logits.argmax(-1) != tokens).double()
    for name, x in (('loss', nats), ('error', wrong)):
        assert figures[name] == pytest.approx(x.mean().item(), rel=1e-4)
        for k, part in enumerate(x.split(AREAS, dim=1)):
            assert figures[f'{name} {k}'] == pytest.approx(part.mean().item(), rel=1e-4)
        assert figures[f'{name} last'] == figures[f'{name} 3']


# ---- Training ----


def test_vgg16_is_a_distance():
    layers, c = [], 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        c = width or c
    weights = {f'features.{k}': v for k, v in nn.Sequential(*layers).state_dict().items()}
    assert [*weights][-1] == 'features.28.bias'                 # as torchvision has it

    def features(x):                            # before each pooling, on ImageNet's scale
        mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[:, :, None, None]
        x = ((x + 1) / 2 - mean) / std
        for layer in layers:
            if isinstance(layer, nn.MaxPool2d):
                yield x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
            x = layer(x)

    vgg = PerceptualLoss({**weights, 'classifier.0.bias': torch.zeros(3)})
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    want = sum((f - g).square().sum(1).mean() for f, g in zip(features(a), features(b))) / 5
    assert vgg(a, a) == 0 and vgg(a, b).item() == pytest.approx(want.item(), rel=1e-4)


def test_adversarial_loss():
    last, images, x = nn.Parameter(torch.ones(3, 1, 1)), *torch.rand(2, 2, 3, 32, 32)
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
    stage, seen = small_stage('tokenizer', tmp_path, tokenizer_steps=8), []
    stage.perceptual = lambda rebuilt, images: (rebuilt - images).abs().max()
    stage.eval().config.perceptual = 3.

    def adversarial(images, rebuilt, others, last_layer):
        seen.append(others.item())              # what lambda_G is relative to
        assert last_layer is stage.vae.decoder.conv_out.weight
        return 7., torch.tensor(2.)

    stage.adversarial.forward = adversarial
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8)
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    rebuilt, quantizer = stage.vae(x)
    error = (rebuilt - x).abs()
    want = (error.square().mean() + 0.2 * error.mean() + quantizer + 3 * error.max()).item()
    found = [stage(step, images)[0].item() for step in range(8)]
    assert found + seen == pytest.approx([want] * 4 + [want + 7] * 4 + [want] * 4, rel=1e-4)


def small_stage(name, tmp_path, **options):
    """A stage on 16 black images with a tiny network, in float32 and without dropout."""
    config = make_config(dict(data='cifar10', out=tmp_path, precision='float32', ch=8,
                              vocab_size=99, patch_nums=(1, 2, 3, 4, 6, 8),
                              device=torch.device('cpu'), **options))
    torch.manual_seed(0)
    vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
    if name == 'tokenizer':
        images = [np.zeros((32, 32, 3), np.uint8)] * 16
        return train.TokenizerStage(config, vae, images, images).train()
    var = VAR(config.patch_nums, 1, 4, *vae.quantize.embedding.weight.shape)
    var.label_dropout = 0.
    stored = np.ones((16, len(var.mask)), np.uint16), np.arange(16) % 4
    return train.TransformerStage(config, vae, var, stored, stored).train()


def test_micro_batches_add_up_to_the_batch(tmp_path):
    batch, want = [torch.randint(90, (8, 130)), torch.arange(8) % 4], None
    for n in (8, 4, 2, 3):
        stage, passes = small_stage('transformer', tmp_path, batch=8, micro_batch=n), []
        stage.register_forward_pre_hook(lambda stage, args: passes.append(len(args[1])))
        figures = train.gradients(stage, 0, batch, OFF)
        assert max(passes) == n and sum(passes) == 8
        assert not figures['loss'].requires_grad            # or it would hold the passes before
        found = [figures['loss'], *(p.grad for p in stage.parameters() if p.grad is not None)]
        want = want or found
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_the_seed_of_a_step(tmp_path, monkeypatch):
    """Randomness depends on seed, stage, step and rank alone."""
    seeds = []
    for seed, name, step, rank in (
            (0, 'tokenizer', 1, 0), (0, 'tokenizer', 2, 0), (0, 'tokenizer', 1, 1),
            (0, 'transformer', 1, 0), (5, 'tokenizer', 1, 0), (0, 'tokenizer', 1, 0)):
        stage = small_stage(name, tmp_path, seed=seed, steps=8, tokenizer_steps=8)
        stage.register_forward_pre_hook(lambda *args: seeds.append(torch.initial_seed()))
        batch = next(stage.batches(0))
        with monkeypatch.context() as patch:
            patch.setattr(train, 'rank_and_world', lambda: (rank, 2))
            train.gradients(stage, step, batch, OFF)
    assert len({*seeds}) == 5 and seeds[0] == seeds[-1]


def test_learning_rate_and_clipping_of_a_step(tmp_path, monkeypatch):
    stage, seen = small_stage('transformer', tmp_path, batch=16, steps=4), []
    forward = stage.forward

    def step(optimizer):
        assert stage.training
        weights = [p for group in optimizer.param_groups for p in group['params']]
        norms = [p.grad.norm() for p in weights if p.grad is not None]
        seen.append((optimizer.param_groups[1]['lr'], torch.stack(norms).norm().item()))

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    stage.forward = lambda *batch: (1e4 * forward(*batch)[0], {})
    stage.evaluate = lambda: {'dropout': stage.training}
    train.train_stage(stage, dict(step=0, optimizer=None))
    assert [lr for lr, _ in seen] == [stage.lr * train.learning_rate(i, 4) for i in range(4)]
    assert [norm for _, norm in seen] == pytest.approx([2] * 4, rel=1e-3)
    assert 'dropout,False' in (tmp_path / 'log.csv').read_text()


def test_rows_of_stored_tokens(tmp_path):
    """An epoch has all of them, with their labels."""
    stage = small_stage('transformer', tmp_path, batch=4, steps=12)
    tokens = np.arange(48 * 130).reshape(48, 130)                           # all are different
    stage.train_set = tokens.astype(np.uint16), np.arange(48) % 4
    found, labels = (torch.cat(x).tolist() for x in zip(*stage.batches(0)))
    assert sorted(found) == tokens.tolist()
    assert labels == [row[0] // 130 % 4 for row in found]


@pytest.mark.parametrize('name', ['tokenizer', 'transformer'])
def test_a_step_on_a_device_neither_mixes_nor_waits(name, tmp_path, monkeypatch):
    """The meta device does not mix with the CPU either, and .item() or nonzero() fail there."""
    monkeypatch.setattr(torch, 'autocast', lambda *args, **options: nullcontext())
    stage = small_stage(name, tmp_path, adversarial=0.5, tokenizer_steps=4)
    batch = [x.to('meta') for x in next(stage.batches(0))]
    stage.to('meta').config.device = torch.device('meta')

    def on_meta(module, inputs):                # nn.Embedding would take indices on the CPU
        assert all(x.device.type == 'meta' for x in inputs if torch.is_tensor(x)), module

    for module in stage.modules():
        module.register_forward_pre_hook(on_meta)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad])
    for step in range(4):                       # without and with discriminator
        train.gradients(stage, step, batch, OFF)
        optimizer.step()
    maps = stage.vae.encode(torch.zeros(2, 3, 32, 32, device='meta'))
    if name == 'transformer':
        maps = stage.var.eval().generate(stage.vae, torch.zeros(2).long(), top_k=9, top_p=.9)
    assert stage.vae.decode(maps).device.type == 'meta'


def test_two_processes_draw_what_one_draws(trained, tmp_path):
    words = '--ckpt', trained / 'ckpt.pt', '--cls', 'all', '--n', 12, '--batch', 5, '--npz'
    two = launch(tmp_path, sample, *words, 'two.npz',
                 torchrun=('--standalone', '--nproc_per_node', '2'))
    go(tmp_path, sample, *words, 'one.npz')
    assert two.wait(120) == 0
    one, two = (np.load(tmp_path / name) for name in ('one.npz', 'two.npz'))
    assert all(np.array_equal(one[name], two[name]) for name in ('arr_0', 'arr_1'))


def test_two_machines_train_as_one_process_does(trained, tmp_path, monkeypatch):
    """Without dropout, L_G and the restart of dead codes, which differ among processes."""
    words = ('--data', trained / 'images', *TINY, '--flip', '--micro-batch', 1, '--adversarial', 0,
             '--init', trained / 'ckpt.pt', '--tokenizer', 'train', '--out')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    agent = ('--nnodes', '2', '--nproc_per_node', '1', '--local-addr', '127.0.0.1',
             '--rdzv_backend', 'c10d', '--rdzv_endpoint', f'127.0.0.1:{port}')
    runs = [launch(tmp_path, train, *words, 'two', torchrun=agent, first=(
        'var.VAR.label_dropout = tokenizer.Quantizer.dead_below = 0.')) for _ in range(2)]
    monkeypatch.setattr(VAR, 'label_dropout', 0.)
    monkeypatch.setattr(Quantizer, 'dead_below', 0.)
    go(tmp_path, train, *words, 'one')
    assert [run.wait(120) for run in runs] == [0, 0]
    one, two = (read_log(tmp_path / name / 'log.csv') for name in ('one', 'two'))
    assert [*one] == [*two] and {stage for stage, _ in one} == {'tokenizer', 'transformer'}
    for stage, name in one:
        # Rates differ, and these figures are of one process's part of the batch.
        if name not in ('train images/s', 'train PSNR', 'train quantizer', 'train error'):
            assert one[stage, name] == pytest.approx(two[stage, name], rel=1e-3, abs=1e-4), name
    one, two = (np.load(tmp_path / name / 'tokens.npz') for name in ('one', 'two'))
    assert (one['train'] == two['train']).mean() > 0.99         # the weights' last bits can differ
    assert np.array_equal(one['train_labels'], two['train_labels']) and len(one['train']) == 18


def test_a_killed_run_ends_with_the_same_bits(trained, tmp_path):
    """It saves after every step, and is killed when it would save: a step is lost each time."""
    words = begin = ('--data', trained / 'images', *TINY, '--flip', '--tokenizer-steps', 12,
                     '--steps', 8, '--micro-batch', 3)
    for end, *before in ((('tokenizer', 8), 'tokenizer', 7),                # L_G starts at 6
                         ('tokens.npz', 'tokenizer', 12), (('transformer', 3), 'transformer', 2)):
        killed = launch(tmp_path, train, *words, '--out', 'killed', first=f'''
replace, train.SAVE_EVERY = os.replace, -1
def replace_or_die(part, path):
    state = train.torch.load(part, weights_only=True) if path.name == 'ckpt.pt' else {{}}
    if {end!r} in (path.name, (state.get('stage'), state.get('step'))):
        os.kill(os.getpid(), 9)
    replace(part, path)
os.replace = replace_or_die''')
        assert killed.wait(120) == -signal.SIGKILL
        state = read_ckpt(tmp_path / 'killed' / 'ckpt.pt')
        assert [state['stage'], state['step']] == before
        words = ['--resume']
    go(tmp_path, train, '--resume', '--out', 'killed')
    go(tmp_path, train, *begin, '--out', 'whole')
    a, b = (read_ckpt(tmp_path / name / 'ckpt.pt') for name in ('whole', 'killed'))
    assert same(a['vae'], b['vae']) and same(a['var'], b['var'])
    assert (tmp_path / 'killed' / 'log.csv').read_text().count('stage,') == 1


def test_a_loss_that_is_not_finite_ends_the_run(trained, tmp_path, monkeypatch):
    """The last good ckpt.pt stays, and a gradient that is not finite counts, too."""
    forward = train.TokenizerStage.forward

    def poisoned(stage, step, images):
        loss, figures = forward(stage, step, images)
        calls.append(loss)
        if len(calls) == 3:
            loss = loss + (loss - loss.detach()).sqrt()         # finite, but not its gradient
        return loss, figures

    monkeypatch.setattr(train.TokenizerStage, 'forward', poisoned)
    # Seen before ckpt.pt is written, and else where the loss is shown, at every fifth step.
    for seconds, last, step in ((-1, 3, 2), (60, 6, 0)):
        calls = []
        monkeypatch.setattr(train, 'SAVE_EVERY', seconds)
        words = '--data', trained / 'images', *TINY, '--tokenizer-steps', 100, '--out', last
        assert 'no longer finite' in go(tmp_path, train, *words, status=2)
        ckpt = read_ckpt(tmp_path / str(last) / 'ckpt.pt')
        assert (len(calls), ckpt['step']) == (last, step) and calls[2].isfinite()
        assert all(v.isfinite().all() for v in ckpt['vae'].values())


def test_float16(trained, tmp_path, monkeypatch):
    """Unscaled gradients are clipped; steps that are not finite are left out until scale 1."""
    go(tmp_path, train, '--data', trained / 'images', *TINY, '--precision', 'float16')
    norms = [norm for (_, name), values in read_log(tmp_path / 'log.csv').items()
             if name == 'train gradient norm' for norm in values.values()]
    assert len(norms) == 7 and sum(norm < 1000 for norm in norms) >= 5
    ckpt, calls = read_ckpt(tmp_path / 'ckpt.pt'), []
    assert ckpt['scaler']['scale'] > 8
    ckpt['scaler']['scale'] = 8.
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    forward = train.TransformerStage.forward
    monkeypatch.setattr(train.TransformerStage, 'forward', lambda *batch: (
        calls.append(0) or forward(*batch)[0] * math.inf, {}))
    assert 'no longer finite' in go(tmp_path, train, '--resume', '--steps', 100, status=2)
    assert 3 <= len(calls) <= 8
