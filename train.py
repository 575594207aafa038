"""Trains both stages of VAR (Fig. 4), the tokenizer and then the transformer, into one ckpt.pt.

    python train.py                                    # built-in shapes: a few minutes on a CPU
    python train.py --data cifar10                     # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet        # train/<class>/*, val/<class>/* or <class>/*
    python train.py --resume                           # goes on where ckpt.pt stopped
    python train.py --eval ckpt.pt --data cifar10      # grades a tokenizer and a transformer
    torchrun --nproc_per_node 8 train.py ...           # the same losses, shared by 8 processes

Paper: equation (5) and Section 3.2 for stage 1, Fig. 4 and Section 4 for stage 2.

All that is random is a function of the seed and of a step or a place in the run, and is drawn for
the whole batch, of which a process takes its part. So a run that was killed and resumed ends with
the same bits as one that was not, and N processes train to the losses of one.
"""
import argparse
import csv
import dataclasses
import math
import os
import signal
import sys
import tarfile
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel

from sample import (Problem, VERSION, center, fit, load_models, open_picture, pick_device,
                    precision, rank_and_world, read_weights, run, save_grid, to_tensor, to_uint8,
                    write_whole)
from tokenizer import VGG16, VQVAE, PatchDiscriminator
from var import VAR

HUB = 'https://huggingface.co/FoundationVision/var/resolve/main/'
DOWNLOADS = {  # name: address, sha256 (as far as it is known)
    'vae_ch160v4096z32.pth': (HUB + 'vae_ch160v4096z32.pth',
                              '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c'),
    'cifar-10-binary.tar.gz': ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
                               'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'),
    'vgg16-397923af.pth': ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af'),
}

# By size of picture: the scales, and the tokenizer, whose down-sampling is 2 ** (len(ch_mult) - 1).
TEN = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES = {
    32: ((1, 2, 3, 4, 6, 8), dict(ch=32, ch_mult=(1, 2, 4), vocab_size=1024, z_channels=16, res_blocks=1)),
    64: (TEN, dict(ch=64, ch_mult=(1, 2, 4), vocab_size=2048, z_channels=32)),
    128: (TEN, dict(ch=96, ch_mult=(1, 1, 2, 4), vocab_size=4096, z_channels=32)),
    256: (TEN, dict(ch=160, ch_mult=(1, 1, 2, 2, 4), vocab_size=4096, z_channels=32)),
    512: ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), dict(ch=160, ch_mult=(1, 1, 2, 2, 4))),
}


def option(default, gloss):
    return dataclasses.field(default=default, metadata={'help': gloss})


@dataclass
class Config:
    """What defines a run: saved in the checkpoint, and the options of the command line."""
    data: str = option('shapes', 'shapes, cifar10, the archive of CIFAR-10, or a folder of pictures')
    size: int = option(None, 'side of the pictures: 32 for shapes and CIFAR-10, else 256')
    patch_nums: str = option(None, 'sides of the scales, as 1,2,3,4,6,8; default by the size')
    depth: int = option(None, 'd: width 64 d, d heads, d blocks (7)')
    tokenizer: str = option('train', 'train one, official (fetched), or a file to take it from')
    tokenizer_steps: int = option(None, 'steps of stage 1')
    steps: int = option(None, 'steps of stage 2')
    batch: int = option(None, 'pictures a step, over all processes')
    accumulate: int = option(1, 'parts in which a batch is computed, to save memory')
    lr: float = option(None, 'peak learning rate of stage 2')
    tokenizer_lr: float = option(None, 'peak learning rate of stage 1')
    perceptual: float = option(None, 'weight of L_P in (5); off below 64 px')
    adversarial: float = option(None, 'weight of L_G in (5), from 3/4 of stage 1 on; off below 64 px')
    seed: int = option(0, 'of everything random')
    flip: bool = option(False, 'mirror pictures left to right at random')


def complete(cfg, device):
    """Fills in what the user left open: the paper's values from 64 px on, measured ones below."""
    native = Path(cfg.data).is_dir() and not cifar10_files(cfg.data)
    cfg.size = cfg.size or (256 if native else 32)
    if cfg.size not in SIZES:
        raise Problem(f'--size {cfg.size}: choose from {", ".join(map(str, SIZES))}')
    big, shapes, gpu = cfg.size >= 64, cfg.data == 'shapes', device.type == 'cuda'
    batch = cfg.batch or (64 if shapes else 128 if not big else 64 if gpu else 8)
    for name, value in dict(
            batch=batch, depth=16 if big and gpu else 6 if big else 3 if shapes else 4,
            tokenizer_steps=20000 if big else 300 if shapes else 20000 if gpu else 700,
            steps=50000 if big else 700 if shapes else 20000 if gpu else 800,
            lr=1e-4 * batch / 256 if big else 1e-3, tokenizer_lr=1e-4 if big else 1e-3,
            perceptual=float(big), adversarial=0.5 * big).items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    for name in ('depth', 'batch', 'accumulate'):
        if getattr(cfg, name) < 1:
            raise Problem(f'--{name} must be at least 1')
    if min(cfg.steps, cfg.tokenizer_steps) < 0:
        raise Problem('--steps and --tokenizer-steps must not be negative')
    parts = rank_and_world()[1] * cfg.accumulate
    if cfg.batch % parts:
        raise Problem(f'--batch {cfg.batch} cannot be shared by {parts} processes x --accumulate')
    scales, network = SIZES[cfg.size]
    try:
        sides = [int(p) for p in cfg.patch_nums.split(',')] if cfg.patch_nums else list(scales)
    except ValueError:
        raise Problem(f'--patch-nums {cfg.patch_nums}: numbers with commas, as 1,2,3,4,6,8') from None
    last = cfg.size // 2 ** (len(network['ch_mult']) - 1)
    if sides != sorted(set(sides)) or sides[0] < 1 or sides[-1] != last:
        raise Problem(f'--patch-nums must rise from 1 or more to {last} at {cfg.size} px')
    cfg.patch_nums = ','.join(map(str, sides))
    return cfg


# ----------------------------------------------------------------------------------------------
# Pictures to learn from

SHAPES = ['disc', 'ring', 'square', 'triangle', 'star', 'cross', 'heart', 'crescent', 'arrow', 'stripes']


def shapes(n, size=32, seed=0):
    """Ten kinds of drawn shapes: uint8 (n, size, size, 3) and their classes, int64 (n,).

    Colours, place, size and tilt are random, and a function of seed alone. Drawn four times as
    large and shrunk, which smooths the edges.
    """
    rng, side = np.random.default_rng(seed), 4 * size
    labels = rng.integers(len(SHAPES), size=n)
    pictures = np.empty((n, size, size, 3), np.uint8)
    turn = np.linspace(0, 2 * np.pi, 61)

    def polygon(angles, radii):
        return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)

    outlines = {  # within the unit circle, y downwards
        'square': polygon(np.pi / 4 + np.arange(4) * np.pi / 2, 1),
        'triangle': polygon(np.arange(3) * 2 * np.pi / 3, 1),
        'star': polygon(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, .42, 1)),
        'cross': np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3), (.3, 1), (-.3, 1),
                           (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]),
        'heart': np.stack([np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn)
                           - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16], axis=1),
        'arrow': np.array([(0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)]),
        'disc': polygon(turn, .9), 'ring': polygon(turn, .95), 'crescent': polygon(turn, .95)}
    for i, label in enumerate(labels):
        back = rng.integers(0, 256, 3)
        while np.abs((front := rng.integers(0, 256, 3)) - back).sum() < 250:    # must stand out
            pass
        r, tilt = side * rng.uniform(.25, .42), rng.uniform(-.3, .3)
        x, y = rng.uniform(r, side - r, 2)
        image = Image.new('RGB', (side, side), tuple(map(int, back)))
        draw, name = ImageDraw.Draw(image), SHAPES[label]

        def fill(outline, colour):
            c, s = np.cos(tilt), np.sin(tilt)
            points = outline @ np.array([[c, s], [-s, c]]) * r + (x, y)
            draw.polygon([tuple(p) for p in points.tolist()], fill=tuple(map(int, colour)))

        if name == 'stripes':
            for bar in (-.8, -.1, .6):
                fill(np.array([(-1, bar), (1, bar), (1, bar + .35), (-1, bar + .35)]), front)
        else:
            fill(outlines[name], front)
            if name in ('ring', 'crescent'):
                fill(outlines[name] * (.55 if name == 'ring' else .8)
                     + ((0, 0) if name == 'ring' else (.45, 0)), back)
        pictures[i] = np.asarray(image.resize((size, size), Image.BOX))
    return pictures, labels.astype(np.int64)


def fetch(name, folder):
    """folder/name, downloaded first if it is not there; it is kept only if its checksum is right."""
    path, (address, sha256) = Path(folder) / name, DOWNLOADS[name]
    if not path.exists() and rank_and_world()[0] == 0:
        print(f'fetching {address}', flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), sha256, progress=sys.stderr.isatty())
        except (urllib.error.URLError, OSError, RuntimeError) as e:
            raise Problem(f'cannot fetch {address} ({e}): bring the file to {path} yourself') from None
    if dist.is_initialized():
        dist.barrier()
    return path


def cifar10_files(data):
    """The archive or the folder of CIFAR-10's binary form that a path means; None for anything else."""
    for path in (Path(data), Path(data) / 'cifar-10-batches-bin'):
        if path.is_file() and path.name.endswith(('.tar.gz', '.tgz')) or (path / 'test_batch.bin').is_file():
            return path


def cifar10(path):
    """{'train', 'val'}: (uint8 (N, 32, 32, 3), int64 (N,)), and the names of the classes.

    A record is a label byte and 3 x 1024 bytes of red, green and blue rows. The archive is read in
    memory, file by file and by name: nothing in it can land anywhere on the disk.
    """
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    try:
        if path.is_file():
            with tarfile.open(path) as tar:
                found = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()
                         and Path(m.name).name in names}
        else:
            found = {n: (path / n).read_bytes() for n in names if (path / n).is_file()}
        raw = {n: np.frombuffer(found[n], np.uint8).reshape(-1, 3073) for n in names[:6]}
    except (tarfile.TarError, EOFError, KeyError, ValueError, OSError) as e:
        raise Problem(f'{path} is not the whole binary CIFAR-10 ({type(e).__name__}): fetch it again') from None
    sets = {'train': np.concatenate([raw[n] for n in names[:5]]), 'val': raw['test_batch.bin']}
    if max(s[:, 0].max() for s in sets.values()) > 9:
        raise Problem(f'{path}: labels above 9, not CIFAR-10')
    classes = found.get('batches.meta.txt', b'').decode().split() or [str(i) for i in range(10)]
    return {k: (s[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), s[:, 0].astype(np.int64))
            for k, s in sets.items()}, classes


def folder(root):
    """The same for a folder of class folders, with paths instead of pixels. Where there is no val
    folder, every tenth picture of a class is held out. Hidden files are passed over."""
    root, kinds = Path(root), Image.registered_extensions()
    if not root.is_dir():
        raise Problem(f'--data {root}: no such folder')

    def files(d):
        return sorted(f for f in d.iterdir() if f.suffix.lower() in kinds and f.name[0] != '.')

    def tree(d):
        return {c.name: found for c in sorted(d.iterdir()) if c.is_dir() and c.name[0] != '.'
                and (found := files(c))}
    train = tree(root / 'train' if (root / 'train').is_dir() else root) or {root.name: files(root)}
    val, classes = tree(root / 'val') if (root / 'val').is_dir() else {}, list(train)
    if not val:
        val = {c: fs[9::10] or fs[-1:] * (len(fs) > 1) for c, fs in train.items()}
        train = {c: [f for f in fs if f not in set(val[c])] for c, fs in train.items()}
    if unknown := set(val) - set(classes):
        raise Problem(f'{root / "val"}: no such class in train: {", ".join(sorted(unknown)[:3])}')
    if not any(train.values()):
        raise Problem(f'--data {root}: no pictures in it, nor in folders of classes under it')
    return {k: (sum(tree.values(), []), np.repeat([classes.index(c) for c in tree],
            [len(fs) for fs in tree.values()]).astype(np.int64))
            for k, tree in (('train', train), ('val', val))}, classes


class Pictures(torch.utils.data.Dataset):
    """A set of pictures, in memory or on disk. An item is asked for as (index, draw): draw None gives
    the middle of the picture, a seed a random crop and, with flip, its mirror image half of the time.

    Gives a uint8 (size, size, 3), its index, and what could not be read: instead of a bad picture
    comes the next good one."""

    def __init__(self, items, labels, size, flip=False):
        self.items, self.labels, self.size, self.flip = items, labels, size, flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, request):
        (index, draw), bad, size = request, [], self.size
        while len(bad) < len(self):
            try:
                item = self.items[index]
                image = open_picture(item, size) if isinstance(item, Path) else Image.fromarray(item)
                break
            except Problem as e:
                bad.append((index, str(e)))
                index = (index + 1) % len(self)
        else:
            raise Problem(f'none of the {len(self)} pictures can be read; the last: {bad[-1][1]}')
        # Shorter side to 1.125 x size, as the paper's; but a smaller picture is not blown up to that.
        image = fit(image, size, min(max(min(image.size), size), round(1.125 * size)))
        if draw is None:
            return center(image, size), index, bad
        rng = np.random.default_rng(draw)
        x, y = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
        picture = np.asarray(image.crop((x, y, x + size, y + size)))
        if self.flip and rng.random() < 0.5:
            picture = np.ascontiguousarray(picture[:, ::-1])
        return picture, index, bad


def collate(items):
    pictures, indices, bad = zip(*items)
    return torch.from_numpy(np.stack(pictures)), torch.tensor(indices), sum(bad, [])


class Order(torch.utils.data.Sampler):
    """For each step from `start`: the indices of this process's part of the batch, with their draws.

    The place of a picture in the run decides on both: every epoch is one permutation.
    """

    def __init__(self, n, cfg, start, stop):
        self.n, self.cfg, self.start, self.stop = n, cfg, start, stop

    def __iter__(self):
        (rank, world), B, epoch = rank_and_world(), self.cfg.batch, None
        for step in range(self.start, self.stop):
            places, part = range(step * B + rank * B // world, step * B + (rank + 1) * B // world), []
            for place in places:
                if epoch != place // self.n:
                    epoch = place // self.n
                    order = np.random.default_rng((self.cfg.seed, epoch)).permutation(self.n)
                part.append((int(order[place % self.n]), (self.cfg.seed, place)))
            yield part


def read_data(cfg):
    """(Pictures of train, Pictures of val, names of the classes) of what --data names."""
    if cfg.data == 'shapes':
        sets, classes = {'train': shapes(8000, cfg.size, 1), 'val': shapes(1000, cfg.size, 2)}, SHAPES
    elif cfg.data == 'cifar10':
        sets, classes = cifar10(cifar10_files('data') or fetch('cifar-10-binary.tar.gz', 'data'))
    else:
        path = cifar10_files(cfg.data)
        sets, classes = cifar10(path) if path else folder(cfg.data)
    return *(Pictures(*sets[k], cfg.size, cfg.flip and k == 'train') for k in ('train', 'val')), classes


# ----------------------------------------------------------------------------------------------
# The two stages: what is trained, on what, by which loss, and how good it is

class TokenizerStage(torch.nn.Module):
    """Stage 1: equation (5). As a module, so that DistributedDataParallel can hold all of it."""
    name, betas, weight_decay = 'tokenizer', (0.9, 0.95), 0.05

    def __init__(self, cfg, vae, train, val, device, workers, vgg=None):
        super().__init__()
        self.cfg, self.train_set, self.val_set, self.workers = cfg, train, val, workers
        self.steps, self.lr, self.vae, self.device, self.progress = (
            cfg.tokenizer_steps, cfg.tokenizer_lr, vae, device, 0)
        self.disc = PatchDiscriminator() if cfg.adversarial else None
        self.vgg = [vgg.to(device)] if vgg else None       # in a list: no part of what is trained
        self.noises, self.bad, self.model = 1, {}, vae

    def batches(self, start, stop):
        loader = torch.utils.data.DataLoader(
            self.train_set, batch_sampler=Order(len(self.train_set), self.cfg, start, stop),
            collate_fn=collate, num_workers=self.workers)
        for pictures, _, bad in loader:
            report(self.bad, bad)
            yield (pictures,)

    def forward(self, pictures, noise):
        images = to_tensor(pictures.to(self.device))
        rebuilt, quantizer, usage = self.vae(images, noise[:, 0])
        mse = F.mse_loss(rebuilt, images)
        loss = mse + 0.2 * F.l1_loss(rebuilt, images)
        if self.vgg:
            loss = loss + self.cfg.perceptual * self.vgg[0](rebuilt, images)
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4), 'quantizer': quantizer.detach()}
        if self.disc and self.progress >= 0.75:      # late: once the other losses have levelled off
            fool, judge = self.disc.losses(images, rebuilt)
            last = self.vae.decoder.conv_out.weight
            # As much pull on the last layer as the other losses have together (VQGAN).
            pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (loss, fool))
            loss = loss + self.cfg.adversarial * (pull / (push + 1e-4)).clamp_max(1e4) * fool + judge
            figures['adversarial'] = judge.detach()
        return loss + quantizer, figures, usage

    def after_step(self, usages):
        self.vae.quantize.update(*(torch.cat(parts) for parts in zip(*usages)))

    def evaluate(self, out):
        figures, shown = grade_tokenizer(self.vae, self.val_set, self.device, 2000)
        save_grid(out / 'reconstructions.png', shown)
        return figures


class TransformerStage(torch.nn.Module):
    """Stage 2: cross-entropy over the tokens of all scales alike, under the mask of Fig. 4."""
    name, betas, weight_decay = 'transformer', (0.9, 0.95), 0.05

    def __init__(self, cfg, vae, var, tokens, sampling, device):
        super().__init__()
        self.cfg, self.tokens, self.sampling, self.device, self.progress = cfg, tokens, sampling, device, 0
        self.steps, self.lr, self.var, self.vae = cfg.steps, cfg.lr, var, [vae]
        self.noises, self.model = 1 + 2 * len(var.blocks), var

    def batches(self, start, stop):
        tokens, labels = self.tokens['train']
        for part in Order(len(tokens), self.cfg, start, stop):
            index = [i for i, _ in part]
            yield tokens[index], labels[index]

    def forward(self, tokens, labels, noise):
        tokens, labels = tokens.to(self.device).long(), labels.to(self.device)
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)
        with torch.no_grad():
            x = self.vae[0].var_input(maps)
        logits = self.var(labels, x, noise)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        right = (logits.detach().argmax(-1) == tokens).float()
        return loss, {'loss': loss.detach(), 'accuracy': right.mean()}, None

    def after_step(self, _):
        pass

    def evaluate(self, out):
        figures = grade_transformer(self.vae[0], self.var, *self.tokens['val'], self.device, 2000)
        n = min(10, self.var.num_classes)
        images = self.var.generate(self.vae[0], torch.arange(n).repeat_interleave(8), seed=0, **self.sampling)
        save_grid(out / 'samples.png', np.split(to_uint8(images), n))
        return figures


def report(known, bad):
    """Names each unreadable picture once."""
    for index, why in bad:
        if known.setdefault(index, why) is why:
            print(f'skipped {why} ({len(known)} so far)', file=sys.stderr, flush=True)


@torch.no_grad()
def grade_tokenizer(vae, pictures, device, limit=None):
    """PSNR in dB, L1, and the use of the codebook over the middle of the first pictures.

    `usage k` is the share of what scale k could use at most, codes or tokens; `bits` the entropy of
    a token. Returns the figures, and for a picture: originals, then what each scale adds.
    """
    loader = torch.utils.data.DataLoader(
        pictures, batch_sampler=[[(i, None) for i in range(a, min(a + 50, limit or 10 ** 9, len(pictures)))]
                                 for a in range(0, min(limit or 10 ** 9, len(pictures)), 50)],
        collate_fn=collate)
    V, sizes = len(vae.quantize.embedding.weight), [p * p for p in vae.patch_nums]
    hits, psnr, l1, shown, n = torch.zeros(len(sizes), V), 0, 0, None, 0
    for batch, _, _ in loader:
        images = to_tensor(batch.to(device))
        tokens = vae.encode(images)
        rebuilt = vae.decode(tokens)
        psnr += (-10 * ((rebuilt - images).square().mean((1, 2, 3)) / 4).clamp_min(1e-10).log10()).sum().item()
        l1 += (rebuilt - images).abs().mean((1, 2, 3)).sum().item() / 2
        hits += torch.stack([t.flatten().bincount(minlength=V) for t in tokens]).cpu()
        n += len(images)
        if shown is None:
            stages = vae.decode_scales([t[:8] for t in tokens])
            shown = [batch[:8].numpy()] + [to_uint8(x / 2 + 0.5) for x in stages]
    p = hits.sum(0) / hits.sum()
    used = [(h > 0).sum().item() / min(V, n * s) for h, s in zip(hits, sizes)]
    return {'PSNR': psnr / n, 'L1': l1 / n, 'codes': (p > 0).sum().item(), 'of': V,
            'bits': -(p * p.clamp_min(1e-12).log2()).sum().item(),
            **{f'usage {k + 1}': u for k, u in enumerate(used)}}, shown


@torch.no_grad()
def grade_transformer(vae, var, tokens, labels, device, limit=None):
    """Cross-entropy in nats and share of wrong tokens: of all scales, the last one, each one (5.2)."""
    L, n = tokens.shape[1], min(limit or len(tokens), len(tokens))
    loss, wrong = torch.zeros(L), torch.zeros(L)
    for a in range(0, n, 50):
        t, y = tokens[a:min(a + 50, n)].to(device).long(), labels[a:min(a + 50, n)].to(device)
        logits = var(y, vae.var_input(t.split([p * p for p in var.patch_nums], dim=1)))
        loss += F.cross_entropy(logits.transpose(1, 2), t, reduction='none').sum(0).cpu()
        wrong += (logits.argmax(-1) != t).sum(0).cpu()
    parts = {'all': slice(None), 'last': slice(-var.patch_nums[-1] ** 2, None)}
    ends = np.cumsum([p * p for p in var.patch_nums])
    parts.update({str(k + 1): slice(e - p * p, e) for k, (e, p) in enumerate(zip(ends, var.patch_nums))})
    return {f'{what} {k}': (x[s].mean() / n).item()
            for k, s in parts.items() for what, x in (('loss', loss), ('error', wrong))}


@torch.no_grad()
def tokenize(vae, pictures, device, workers, flips=1):
    """All token maps of a set, once, as (N, L) int16, with labels (N,): the encoder never runs again.

    flips 2 adds the mirror images. Pictures that cannot be read are left out.
    """
    (rank, world), parts, kept, bad = rank_and_world(), [], [], {}
    mine = [[(i, None) for i in range(a, min(a + 64, len(pictures)))] for a in range(0, len(pictures), 64)]
    loader = torch.utils.data.DataLoader(
        pictures, batch_sampler=mine[rank::world], collate_fn=collate, num_workers=workers)
    for batch, index, unread in loader:
        report(bad, unread)
        images = to_tensor(batch.to(device))
        tokens = [torch.cat(vae.encode(im), 1).to(torch.int16).cpu() for im in (images, images.flip(3))[:flips]]
        parts.append(torch.stack(tokens, dim=1))
        kept.append(index)
    result = torch.cat(parts or [torch.zeros(0)]), torch.cat(kept or [torch.zeros(0)]), set(bad)
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, result)
        result = (torch.cat([r[0] for r in everyone if len(r[0])]),
                  torch.cat([r[1] for r in everyone if len(r[1])]), set().union(*(r[2] for r in everyone)))
    tokens, index, bad = result
    # A bad picture's stand-in came twice; every picture is kept once, in its own order.
    index, first = np.unique(index.numpy(), return_index=True)
    labels = torch.from_numpy(pictures.labels[index]).repeat_interleave(flips)
    return tokens[first].flatten(0, 1), labels


# ----------------------------------------------------------------------------------------------
# The training loop, for either stage

def learning_rate(progress):
    """As a share of the peak: a warm-up over 1/50 of the run, flat up to 5 %, then linear to 0.01."""
    if progress < 0.02:
        return 0.005 + 0.995 * progress / 0.02
    return 1 - 0.99 * max(0, progress - 0.05) / 0.95


def make_optimizer(stage):
    """AdamW; no decay on biases, gains, positions, scale embeddings, AdaLN offsets, attention scales."""
    decayed, free = [], []
    for name, p in stage.named_parameters():
        if p.requires_grad:
            kept = p.ndim < 2 or any(s in name for s in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
            (free if kept else decayed).append(p)
    groups = [{'params': decayed, 'weight_decay': stage.weight_decay}, {'params': free, 'weight_decay': 0.}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas, fused=True)


def fit_stage(stage, cfg, state, out, every, clip=2.0):
    """Trains one stage from state['step'] to its end: evaluates, saves and steps, in this order."""
    (rank, world), device = rank_and_world(), stage.device
    optimizer, last_saved = make_optimizer(stage), time.time()
    if state.get('optimizer'):
        optimizer.load_state_dict(state['optimizer'])
        if state.get('disc'):
            stage.disc.load_state_dict(state['disc'])
    model, stop, skipped, seen, since = stage.train(), [], 0, 0, time.time()
    if world > 1:
        model = DistributedDataParallel(stage, find_unused_parameters=bool(cfg.adversarial))
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}

    def save():
        if rank == 0:
            disc = getattr(stage, 'disc', None)
            state.update(optimizer=optimizer.state_dict(), disc=disc and disc.state_dict())
            state[{'tokenizer': 'vae', 'transformer': 'var'}[stage.name]] = stage.model.state_dict()
            write_whole(out / 'ckpt.pt', lambda f: torch.save(state, f))

    batches = stage.batches(state['step'], stage.steps)
    for step in range(state['step'], stage.steps + 1):
        state['step'], last = step, step == stage.steps
        if rank == 0 and (step and step % every == 0 or last):
            stage.eval()
            with precision(device):
                figures = stage.evaluate(out)
            stage.train()
            log(out / 'log.csv', stage.name, step, figures)
            since, seen = time.time(), 0
        # A signal may reach the processes at different steps: they stop together.
        flag = torch.tensor(len(stop), device=device)
        if world > 1:
            dist.all_reduce(flag)
        if flag or last or rank == 0 and time.time() - last_saved > 60:
            save()
            last_saved = time.time()
        if flag:
            print(f'\nstopped at {stage.name} step {step}; --resume goes on from {out / "ckpt.pt"}', flush=True)
            sys.exit(128 + (stop or [signal.SIGTERM])[0])
        if last:
            break

        seed = np.random.SeedSequence((cfg.seed, len(stage.name), step)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        noise = torch.rand(cfg.batch, stage.noises)
        noise = noise[rank * cfg.batch // world:(rank + 1) * cfg.batch // world].to(device)
        stage.progress = step / stage.steps
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(stage.progress)
        optimizer.zero_grad()
        parts = zip(*(x.chunk(cfg.accumulate) for x in (*next(batches), noise)))
        extras = []
        for part in parts:
            with precision(device):
                loss, figures, extra = model(*part)
            (loss / cfg.accumulate).backward()
            extras.append(extra)
        length = torch.nn.utils.clip_grad_norm_(stage.parameters(), clip)
        if torch.isfinite(length):
            optimizer.step()
            stage.after_step(extras)
            skipped = 0
        else:
            skipped += 1
            print(f'\n{stage.name} step {step}: gradient not finite, step left out', flush=True)
            if skipped == 10:
                raise Problem(f'ten steps in a row were not finite; {out / "ckpt.pt"} is the last good '
                              f'checkpoint: --resume from it with a smaller --lr or --tokenizer-lr')
        seen += cfg.batch
        if rank == 0 and (step % max(1, min(20, stage.steps // 20)) == 0):
            rate = seen / (time.time() - since)
            left = (stage.steps - step) * cfg.batch / rate
            print(f'{stage.name} {step}/{stage.steps}  ' + '  '.join(f'{k} {v:.3f}' for k, v in figures.items())
                  + f'  {rate:.0f} images/s  {left / 60:.0f} min left', end='\n', flush=True)
    state.update(step=0, optimizer=None, disc=None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log(path, stage, step, figures):
    """A line of figures to the screen and to log.csv: stage, step, seconds since 1970, name, value."""
    print(f'{stage} {step}: ' + '  '.join(f'{k} {v:.4g}' for k, v in figures.items()), flush=True)
    with open(path, 'a', newline='') as f:
        csv.writer(f).writerows([stage, step, round(time.time(), 1), k, v] for k, v in figures.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kind = {'action': 'store_true', 'default': None} if f.type is bool else {'type': f.type}
        parser.add_argument('--' + f.name.replace('_', '-'), help=f.metadata['help'], **kind)
    parser.add_argument('--workers', type=int, default=min(4, (os.cpu_count() or 1) - 1))
    parser.add_argument('--device', help='cuda, mps or cpu; the best there is by default')
    parser.add_argument('--vgg', help='the file of VGG-16 weights, for a machine without internet')
    parser.add_argument('--out', type=Path, default=Path('.'), help='folder of ckpt.pt, log.csv, pictures')
    parser.add_argument('--resume', action='store_true', help='go on from ckpt.pt in --out')
    args = vars(parser.parse_args())
    given = {f.name: args[f.name] for f in dataclasses.fields(Config) if args[f.name] is not None}
    out, device, (rank, world) = args['out'], pick_device(args['device']), rank_and_world()
    state, path = {}, out / 'ckpt.pt'
    if args['resume']:
        state = read_weights(path)
        if 'config' not in state or state.get('version') != VERSION:
            raise Problem(f'{path} was not made by train.py: nothing to resume')
        given = {**state['config'], **given}
    cfg = complete(Config(**given), device)
    train, val, classes = read_data(cfg)

    sides = [int(p) for p in cfg.patch_nums.split(',')]
    torch.manual_seed(cfg.seed)
    if state or cfg.tokenizer != 'train':
        source = path if state else (fetch('vae_ch160v4096z32.pth', 'data') if cfg.tokenizer == 'official'
                                     else cfg.tokenizer)
        vae = load_models(source)[0]
        if list(vae.patch_nums) != sides:
            vae = VQVAE.from_state_dict(vae.state_dict(), sides)
    else:
        vae = VQVAE(sides, **SIZES[cfg.size][1])
    V, z = vae.quantize.embedding.weight.shape
    var = VAR(sides, cfg.depth, len(classes), V, z)
    if state.get('var'):
        var.load_state_dict(state['var'])
    vae, var = vae.to(device), var.to(device)
    small = cfg.size < 64
    sampling = dict(cfg=3., top_k=100, top_p=1.) if small else dict(cfg=1.5, top_k=900, top_p=0.96)
    if not state:
        if path.exists() and rank == 0:
            os.replace(path, out / 'ckpt.previous.pt')
        state = dict(version=VERSION, config=dataclasses.asdict(cfg), classes=classes, patch_nums=sides,
                     sampling=sampling, step=0, stage='transformer' if cfg.tokenizer != 'train' else 'tokenizer',
                     vae=vae.state_dict(), var=None)
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        for name, model in (('tokenizer', vae), ('transformer', var)):
            print(f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters')
        print(f'data: {len(train)} pictures to learn from, {len(val)} to grade on, {len(classes)} classes\n'
              f'scales {cfg.patch_nums}: {sum(p * p for p in sides)} tokens of {V} codes a picture\n'
              f'{cfg.tokenizer_steps if cfg.tokenizer == "train" else 0} + {cfg.steps} steps of {cfg.batch} '
              f'pictures on {world} x {device}, '
              + ('bfloat16' if precision(device)._enabled else 'float32'), flush=True)
    if state['stage'] == 'tokenizer':
        vgg = None
        if cfg.perceptual:
            vgg = VGG16(read_weights(args['vgg'] or fetch('vgg16-397923af.pth', 'data')))
        stage = TokenizerStage(cfg, vae, train, val, device, args['workers'], vgg).to(device)
        fit_stage(stage, cfg, state, out, max(1, cfg.tokenizer_steps // 5))
        state.update(stage='transformer', vae=vae.state_dict())
    vae.eval().requires_grad_(False)
    with precision(device):
        tokens = {'train': tokenize(vae, train, device, args['workers'], 1 + cfg.flip),
                  'val': tokenize(vae, val, device, args['workers'])}
    stage = TransformerStage(cfg, vae, var, tokens, sampling, device).to(device)
    fit_stage(stage, cfg, state, out, max(1, cfg.steps // 5))


if __name__ == '__main__':
    run(main)
