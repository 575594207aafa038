"""Why VAR is as it is: each choice changed alone, and what that costs.

    python experiments/reasons.py                               # all rows, three seeds
    python experiments/reasons.py --rows phi scales --seeds 0   # in parts: the rows that begin so

Paper: Table 3 (Section 7), whose rows add up, and choices that it does not measure. All rows have
the drawn shapes, the sizes of their preset, and the same steps. A row that changes the tokenizer
has a transformer of its own: token losses of two tokenizers cannot be compared, distances can. The
Frechet distance of samples and the share that is classified correctly come from the classifier of
evaluate.py.
Writes into --out a folder for each row (what is in it is not measured again), the table, reasons.md
(differences from the first row, over the seeds), and a row of samples for each row, reasons.png.

Letters as in tokenizer.py; C classes, n samples of each.
"""
import json
import math
import re
import sys
import time
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import train
from edit import kept_tokens
from evaluate import draw_classes, train_judge
from raster import Raster
from support.checkpoints import build
from support.data import read_data, read_tokens
from support.grade import grade_transformer
from support.images import make_grid, save_image, to_tensor, to_uint8
from support.options import a_count, at_least_1, make_config, make_parser
from support.run import autocast, pick_device, run, seed_of, write_file
from tokenizer import choose_phi
from var import VAR, Attention


# ---- Patches: of a new VQVAE (vae), of a new VAR (var), of what the transformer sees (see) ----


def residual_without_phi(vae):
    """Quantizer.algorithm1 subtracts the enlarged codes, and not phi of them."""
    q = vae.quantize

    def algorithm1(f):
        f_hat = subtracted = q.empty(len(f))                                # (B, z, P, P)
        for k in range(len(q.patch_nums)):
            vectors = q.shrink((f - subtracted).detach(), k)                # (B, l, z)
            r_k = q.nearest(vectors)                                        # (B, l)
            with torch.autocast(f.device.type, enabled=False):
                subtracted = subtracted + q.enlarge(q.embedding(r_k), k)    # (B, z, P, P)
            f_hat = q.add_scale(f_hat, k, r_k)
            yield r_k, vectors, f_hat

    q.algorithm1 = algorithm1


def loss_of_the_last_scale(vae):
    """VQVAE.forward has || f - f_hat || after the last scale alone."""
    def forward(images):
        f = vae.to_latent(images)                                           # (B, z, P, P)
        tokens, vectors, (*_, f_hat) = zip(*vae.quantize.algorithm1(f))
        if vae.training:
            vae.quantize.update(torch.cat(tokens, dim=1), torch.cat(vectors, dim=1))
        loss = F.mse_loss(f_hat, f.detach()) + 0.25 * F.mse_loss(f_hat.detach(), f)
        return vae.to_image(f + (f_hat - f).detach()), loss

    vae.forward = forward


def random_codes(vae):
    nn.init.normal_(vae.quantize.embedding.weight)


def nothing_before(vae):
    """VQVAE.var_input of a single scale, which is drawn from the class alone."""
    vae.var_input = lambda maps: vae.quantize.empty(len(maps[0])).flatten(2)[..., :0].mT


def last_codes(vae):
    """The input of scale k are the enlarged codes of r_{k-1}, and not f_hat."""
    seen, q = deepcopy(vae), vae.quantize
    seen.quantize.add_scale = lambda f_hat, k, r_k: q.enlarge(q.embedding(r_k), k)
    seen.decode = vae.decode
    return seen


def blind_within_a_scale(var):
    """A token sees itself and the scales before. Generation needs this mask as well."""
    same = var.lvl_1L[0] == var.lvl_1L[0][:, None]                          # (L, L)
    mask = var.mask.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)

    def forward(attn, x, _, cache=None):
        m = len(mask) if cache is None else cache.shape[3]      # x are the last l of m tokens
        return Attention.forward(attn, x, mask[m - x.shape[1]:m, :m].to(x.device), cache)

    for block in var.blocks:
        block.attn.forward = partial(forward, block.attn)


def larger_gates(var):
    for block in var.blocks:                    # a factor of 0.5, as AdaLN's other vectors have
        block.ada_lin[1].weight.data.unflatten(0, (6, -1))[:2] *= 0.5 / 1e-5


def open_gates(var):
    for block in var.blocks:
        block.ada_lin[1].bias.data.unflatten(0, (6, -1))[:2] = 1


def plain_layer_norm(gate, var):
    """VAR.modulations returns the biases of AdaLN: gains, shifts and gates, which start at `gate`,
    are learned for all classes alike. The class is known from the start token alone."""
    modulations = var.modulations

    def plain(condition):
        blocks, head = modulations(torch.zeros_like(condition))
        return [(gate + gamma1, gate + gamma2, *x) for gamma1, gamma2, *x in blocks], head

    var.modulations = plain


def plain_attention(var):
    """Attention.normalise: q.k / sqrt(64), times the release's 0.25."""
    for block in var.blocks:
        block.attn.normalise = lambda q, k: (q * (0.25 / math.sqrt(64)), k)
        del block.attn.scale_mul_1H11


class Constant(float):
    """A guidance that is the same at all scales: VAR.generate computes cfg * k / (K - 1)."""
    __mul__, __truediv__ = (lambda self, k: self), (lambda self, n: float(self))


BASE = 'as it is'
ROWS = {
    BASE: {},
    'phi: none': dict(vae=lambda vae: setattr(vae.quantize, 'phi', lambda k: nn.Identity())),
    'phi: one for all scales': dict(
        vae=lambda vae: setattr(vae.quantize, 'phi_index', choose_phi(4, 1))),
    'phi: two': dict(vae=lambda vae: setattr(vae.quantize, 'phi_index', choose_phi(4, 2))),
    'residual: without phi': dict(vae=residual_without_phi),
    'quantizer loss: last scale alone': dict(vae=loss_of_the_last_scale),
    'codebook: random start': dict(vae=random_codes),
    'codebook: random start, no restarts': dict(
        vae=lambda vae: (random_codes(vae), setattr(vae.quantize, 'dead_below', 0.))),
    'codebook: no restarts': dict(vae=lambda vae: setattr(vae.quantize, 'dead_below', 0.)),
    'codebook: restarts from all tokens alike': dict(           # 85, and not from each scale alike
        vae=lambda vae: (vae.quantize.sizes.fill_(85), vae.quantize.starts.zero_())),
    'scales: 4, 8': dict(patch_nums=(4, 8)),
    'scales: 8, guidance constant 2': dict(patch_nums=(8,), vae=nothing_before,
                                           sampling=dict(cfg=Constant(2))),
    'scales: 1, 8': dict(patch_nums=(1, 8)),
    'raster-scan AR, guidance constant 2': dict(tokenizer='scales: 8, guidance constant 2',
                                                see=Raster, sampling=dict(cfg=Constant(2))),
    'input: enlarged codes of r_{k-1}': dict(see=last_codes),
    'inside a scale: tokens do not see each other': dict(var=blind_within_a_scale),
    'gates: start at about 0.006': dict(var=larger_gates),
    'gates: start at 1': dict(var=open_gates),
    'positions and scale embeddings: none': dict(
        var=lambda var: setattr(var, 'positions', lambda: torch.zeros_like(var.pos_1LC))),
    'AdaLN: plain LayerNorm': dict(var=partial(plain_layer_norm, 0)),
    'AdaLN: plain LayerNorm, gates start at 1': dict(var=partial(plain_layer_norm, 1)),
    'queries and keys: not normalised': dict(var=plain_attention),
    'depth: 5': dict(depth=5),
    'top-k: all codes': dict(sampling=dict(top_k=0)),
    **{f'guidance: 0 to {t}': dict(sampling=dict(cfg=t)) for t in (0, 2, 8)},
    **{f'guidance: constant {t}': dict(sampling=dict(cfg=Constant(t))) for t in (1, 2, 4, 8)},
    'rejection: the best of 4': dict(rounds=4),
    'editing: the 1x1 kept': dict(edit=slice(0)),
    'editing: the 1x1 drawn': dict(edit=slice(1))}


# ---- What is measured ----


class Stage(train.TransformerStage):
    """Keeps the figures of its evaluations: one after each fifth of the steps. Draws no samples."""
    history = ()

    def evaluate(self):
        tokens, labels = (torch.from_numpy(x.astype(np.int64)) for x in self.val_set)
        graded = grade_transformer(self.vae, self.var, tokens, labels, self.config.device)
        self.history += (graded,)
        return graded


@torch.no_grad()
def grade_scales(vae, x):
    """Of images (B, 3, H, W): PSNR after each scale, and how many of the V codes each uses."""
    maps, decibels = vae.encode(x), []
    for x_k in vae.decode_scales(maps):
        mse = (x - x_k).square().mean((1, 2, 3))                            # (B,)
        decibels.append(-10 * (mse / 4).log10().mean().item())
    return {'PSNR': decibels[-1], 'PSNR by scale': decibels,
            'codes by scale': [len(r_k.unique()) for r_k in maps]}


@torch.no_grad()
def best_of(vae, var, rounds, labels, seed, **options):
    """Rejection sampling (Table 1, VAR-d30-re): K token maps (B, l) for labels (B,), of `rounds`
    draws the one with the greatest log p(tokens | class) - log p(tokens | no class). The paper's
    judge is a classifier of ImageNet. options: those of VAR.generate."""
    draws, scores = [], []
    for i in range(rounds):
        maps = var.generate(vae, labels, seed=seed_of(seed, i), **options)
        tokens, x = torch.cat(maps, dim=1), vae.var_input(maps)
        told, untold = (-F.cross_entropy(var(y, x)[0].mT, tokens, reduction='none').sum(1)  # (B,)
                        for y in (labels, torch.full_like(labels, var.num_classes)))
        draws.append(maps)
        scores.append(told - untold)
    best = torch.stack(scores).argmax(0)                                    # (B,)
    return [torch.stack(maps)[best, torch.arange(len(best))] for maps in zip(*draws)]


@torch.no_grad()
def edit(vae, var, photos, sampling, drawn):
    """Draws each class into n photos (C, n, 3, H, W) of the class before it, of which the outer
    tokens are kept, but those of the scales `drawn`: samples uint8 (C, n, H, H, 3). Also the share
    of the kept tokens of each scale that change if the removed part is grey before it is encoded.
    """
    P, samples, changed = vae.patch_nums[-1], [], []
    keep = torch.ones(P, P, dtype=torch.bool, device=photos.device)
    keep[1:-1, 1:-1] = False
    masks = [kept_tokens(keep, p) for p in vae.patch_nums]                  # K of (l,)
    for label, x in enumerate(photos.roll(1, dims=0)):
        maps, grey, edge = vae.encode(x), x.clone(), x.shape[2] // P
        grey[:, :, edge:-edge, edge:-edge] = 0.
        changed.append([(a != b)[:, mask].float().mean().item()             # nan if none is kept
                        for a, b, mask in zip(maps, vae.encode(grey), masks)])
        keeps = [torch.zeros_like(mask) for mask in masks[drawn]] + masks[drawn.stop:]
        maps = var.generate(vae, [label] * len(x), seed=label, given=maps, keep=keeps, **sampling)
        samples.append(to_uint8(vae.decode(maps)))
    return np.stack(samples), {'changed by scale': np.mean(changed, axis=0).tolist()}


def slug(name):
    """The name of a row's folder."""
    return re.sub(r'\W+', '-', name)


def measure(data, judge, real, rows, out, **given):
    """Yields for each of the rows its name, figures, and samples uint8 (C, n, H, H, 3)."""
    C, n, (items, labels) = len(data.classes), 50, data.val
    photos = np.stack([np.stack(items)[labels == c][:n] for c in range(C)])  # (C, n, H, H, 3)
    photos = to_tensor(photos.reshape(C * n, *photos.shape[2:])).to(given['device'])

    def start(name):
        torch.manual_seed(given['seed'])
        changed = {key: x for key, x in ROWS[name].items() if key in ('patch_nums', 'depth')}
        config = make_config({**given, 'out': out / slug(name), **changed})
        config.out.mkdir(parents=True, exist_ok=True)
        return config

    @cache
    def tokenizer(name):
        config = start(name)
        vae, _ = build(config, data.classes)
        ROWS[name].get('vae', lambda vae: None)(vae)
        train.train_tokenizer(config, data, vae, dict(stage='tokenizer', step=0, optimizer=None))
        return vae, read_tokens(config.out)

    @cache
    def transformer(name):
        row = ROWS[name]
        is_own = 'vae' in row or 'patch_nums' in row
        vae, tokens = tokenizer(name if is_own else row.get('tokenizer', BASE))
        config = start(name)
        seen = row.get('see', lambda vae: vae)(vae)
        var = VAR(seen.patch_nums, config.depth, C, *vae.quantize.embedding.weight.shape)
        row.get('var', lambda var: None)(var)
        stage = Stage(config, seen, var, *tokens)
        train.train_stage(stage, dict(stage='transformer', step=0, optimizer=None))
        last, K = stage.history[-1], len(vae.patch_nums)
        figures = {**grade_scales(vae, photos), 'loss': last['loss'],
                   'loss by fifth': [x['loss'] for x in stage.history]}
        if seen.patch_nums == vae.patch_nums:                   # Raster's are single tokens
            figures['loss by scale'] = [last[f'loss {k}'] for k in range(K)]
        return seen, var.eval(), figures

    for name in rows:
        row = ROWS[name]
        vae, var, figures = transformer(BASE if {*row} <= {'sampling', 'edit', 'rounds'} else name)
        sampling = {**make_config({}).sampling, **row.get('sampling', {})}
        if 'edit' in row:
            with autocast(photos.device):
                samples, changed = edit(vae, var, photos.unflatten(0, (C, n)), sampling,
                                        row['edit'])
            figures = {**figures, **changed}
        else:
            began, generate = time.monotonic(), partial(var.generate, vae, **sampling)
            if 'rounds' in row:
                generate = partial(best_of, vae, var, row['rounds'], **sampling)
            samples = draw_classes(vae, generate, n, C)
            figures = {**figures, 'ms per sample': 1e3 * (time.monotonic() - began) / (C * n)}
        shares, distance = judge.grade(samples, real)
        yield name, {**figures, 'distance': distance, 'correct': shares.mean().item()}, samples


def write_table(path, found):
    """found: {row: {seed: figures}}. Figures of the first row, and the others' differences from
    them with the same seed: means +- standard deviations. The last column has means of lists."""
    names = ['PSNR', 'loss', 'distance', 'correct', 'ms per sample']
    lines = [f'| | {" | ".join(names)} | |', '|---' * (len(names) + 2) + '|']
    for row, seeds in found.items():
        cells = []
        for name in names:
            x = [figures[name] - (row != BASE and found[BASE][seed][name])
                 for seed, figures in seeds.items() if name in figures]
            spread = f' +- {stdev(x):.2g}' if len(x) > 1 else ''
            cells.append(f'{mean(x):{"" if row == BASE else "+"}.3g}{spread}' if x else '')
        lists = [f'{name} {np.mean([figures[name] for figures in seeds.values()], axis=0).round(2)}'
                 for name in [*seeds.values()][0] if ' by ' in name]
        lines.append(f'| {row} | {" | ".join(cells)} | {"; ".join(lists)} |')
    path.write_text('\n'.join(lines) + '\n')


def main():
    parser = make_parser(__doc__, '--device')
    add = parser.add_argument
    add('--rows', nargs='+', default=[''], help='those whose names begin so [all]')
    add('--seeds', type=a_count, nargs='+', default=[0, 1, 2], help='[0 1 2]')
    add('--tokenizer-steps', type=at_least_1, default=250, help='of each tokenizer [250]')
    add('--steps', type=at_least_1, default=500, help='of each transformer [500]')
    add('--out', type=Path, default='reasons', help='folder of the results [reasons]')
    args = parser.parse_args()
    given = dict(device=pick_device(args.device), steps=args.steps,
                 tokenizer_steps=args.tokenizer_steps)
    config = make_config(given)
    data = read_data(config)
    judge, real = train_judge(data, config, 400)
    train.GRADED = 300                          # validation images of an evaluation: 1000 are slow
    for seed in args.seeds:
        rows = [name for name in ROWS if name.startswith((BASE, *args.rows))
                and not (args.out / slug(name) / f'{seed}.json').exists()]
        for name, figures, samples in measure(data, judge, real, rows, args.out / f'seed {seed}',
                                              **given, seed=seed):
            folder = args.out / slug(name)
            save_image(folder / f'{seed}.png', make_grid([samples[:, 0]]))
            text = json.dumps(figures).encode()
            write_file(folder / f'{seed}.json', lambda f: f.write(text))
    paths = {name: sorted((args.out / slug(name)).glob('*.json')) for name in ROWS}
    paths = {name: x for name, x in paths.items() if x}
    write_table(args.out / 'reasons.md', {name: {path.stem: json.loads(path.read_text())
                                                 for path in x} for name, x in paths.items()})
    strips = [[np.asarray(Image.open(x[0].with_suffix('.png')))] for x in paths.values()]
    save_image(args.out / 'reasons.png', make_grid(strips))


if __name__ == '__main__':
    run(main)
