"""Trains both stages of VAR (Fig. 4), the tokenizer and then the transformer, into one ckpt.pt.

    python train.py                                    # built-in shapes: minutes on a CPU
    python train.py --data cifar10                     # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet        # train/<class>/*, val/<class>/* or <class>/*
    python train.py --resume                           # goes on where ckpt.pt stopped
    torchrun --nproc_per_node 8 train.py ...           # the same losses, shared by 8 processes

Paper: equation (5) and Section 3.2 for stage 1, Fig. 4 and Section 4 for stage 2.

All that is random is a function of the seed and of a place in the run, and is drawn for the whole
batch, of which a process takes its part. So a run that was killed and resumed ends with the same
bits as one that was not, and N processes train to the losses of one.
"""
import argparse
import csv
import dataclasses
import os
import re
import signal
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from sample import (Problem, VERSION, center, fit, load_models, open_picture, pick_device,
                    precision, rank_and_world, read_weights, run, save_grid, to_tensor, to_uint8,
                    write_whole)
from tokenizer import VGG16, VQVAE, PatchDiscriminator
from var import VAR

DOWNLOADS = {  # address, sha256 (of VGG-16 its beginning, as torch.hub checks it)
    'vae_ch160v4096z32.pth': (
        'https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
        '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c'),
    'cifar-10-binary.tar.gz': (
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'),
    'vgg16-397923af.pth': ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af')}

# What the user leaves open: scales, tokenizer (which shrinks by 2 ** (len(ch_mult) - 1)), recipe.
# Small batches on a CPU: in 100 s on CIFAR-10 stage 1 reaches 15.3 dB with 128, 19.3 dB with 32.
TEN = '1,2,3,4,5,6,8,10,13,16'
SMALL = dict(size=32, patch_nums='1,2,3,4,6,8', accumulate=1, batch=16, lr=1e-3, tokenizer_lr=2e-3,
             perceptual=0., adversarial=0.)
LARGE = dict(patch_nums=TEN, accumulate=4, batch=32, tokenizer_lr=1e-4, perceptual=1., adversarial=0.5,
             depth=16, tokenizer_steps=20000, steps=50000)
TINY_NET = dict(ch=16, ch_mult=(1, 2, 4), vocab_size=256, z_channels=8, res_blocks=1)
SMALL_NET = dict(ch=32, ch_mult=(1, 2, 4), vocab_size=1024, z_channels=16, res_blocks=1)
PRESETS = {
    'shapes': dict(SMALL, patch_nums='1,2,4,8', network=TINY_NET, tokenizer_lr=3e-3, depth=3, lr=2e-3,
                   tokenizer_steps=750, steps=900),
    'cpu': dict(SMALL, network=SMALL_NET, depth=4, tokenizer_steps=2000, steps=3000),
    'cuda': dict(SMALL, network=dict(SMALL_NET, ch=64), depth=8, tokenizer_steps=8000, steps=8000,
                 batch=256),
    64: dict(LARGE, network=dict(ch=64, ch_mult=(1, 2, 4), vocab_size=2048)),
    128: dict(LARGE, network=dict(ch=96, ch_mult=(1, 1, 2, 4))),
    256: dict(LARGE, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4))),
    512: dict(LARGE, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4)),
              patch_nums='1,2,3,4,6,9,13,18,24,32')}


def option(gloss, default=None):
    return dataclasses.field(default=default, metadata={'help': gloss})


@dataclass
class Config:
    """What defines a run: saved in the checkpoint, and the options of the command line."""
    data: str = option('shapes, cifar10, the archive of CIFAR-10, or a folder of pictures', 'shapes')
    size: int = option('side of the pictures: 32 for shapes and CIFAR-10, else 256')
    patch_nums: str = option('sides of the scales, as 1,2,3,4,6,8; default by the size')
    depth: int = option('d: width 64 d, d heads, d blocks (7)')
    tokenizer: str = option('train one, official (fetched), or a file to take it from', 'train')
    tokenizer_steps: int = option('steps of stage 1')
    steps: int = option('steps of stage 2')
    batch: int = option('pictures a step, over all processes')
    accumulate: int = option('parts in which a process computes its batch, to save memory')
    lr: float = option('peak learning rate of stage 2; large pictures: 1e-4 a 256 pictures')
    tokenizer_lr: float = option('peak learning rate of stage 1')
    perceptual: float = option('weight of L_P in (5); 0 below 64 px')
    adversarial: float = option('weight of L_G in (5), relative to the rest; 0 below 64 px')
    seed: int = option('of everything random', 0)
    flip: bool = option('mirror pictures left to right at random', False)

    network: dict = None

    def complete(self, device):
        """Fills in what the user left open. Raises Problem for what does not go together."""
        folder = Path(self.data).is_dir() and not cifar10_path(self.data)
        size = self.size or (256 if folder else 32)
        kind = size if size != 32 else 'shapes' if self.data == 'shapes' else device.type
        if size != 32 and size not in PRESETS:
            raise Problem(f'--size {size}: choose from 32, 64, 128, 256, 512')
        for name, value in {**PRESETS.get(kind, PRESETS['cpu']), 'size': size}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.lr = self.lr or 1e-4 * self.batch / 256
        if min(self.depth, self.batch, self.accumulate) < 1 or min(self.steps, self.tokenizer_steps) < 0:
            raise Problem('--depth, --batch and --accumulate start at 1, the steps at 0')
        if self.batch % (rank_and_world()[1] * self.accumulate):
            raise Problem(f'--batch {self.batch} is no multiple of processes times --accumulate '
                          f'{self.accumulate}')
        last = size // 2 ** (len(self.network['ch_mult']) - 1)
        if not re.fullmatch(r'\d+(,\d+)*', self.patch_nums) or self.sides[0] < 1 or (
                self.sides[-1] != last or self.sides != sorted(set(self.sides))):
            raise Problem(f'--patch-nums {self.patch_nums}: rising, with commas, to {last} at {size} px')
        return self

    @property
    def sides(self):
        return [int(p) for p in self.patch_nums.split(',')]


# ----------------------------------------------------------------------------------------------
# Pictures to learn from

def outlines():
    """The ten shapes: polygons in the unit circle, y downwards, and whether each is drawn or cut out."""
    turn, points = np.linspace(0, 2 * np.pi, 61), np.arange(10)

    def around(angles, radii):
        return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], axis=1)

    def loop(radius, x=0):
        return around(turn, radius) + (x, 0)

    heart = np.stack([np.sin(turn) ** 3, -(13 * np.cos(turn) - 5 * np.cos(2 * turn)
                                           - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16], axis=1)
    arrow = [(0, -1), (.8, -.1), (.3, -.1), (.3, 1), (-.3, 1), (-.3, -.1), (-.8, -.1)]
    bars = [[(-1, y), (1, y), (1, y + .35), (-1, y + .35)] for y in (-.85, -.15, .55)]
    upright = [(y, x) for x, y in (np.array(bars[1]) * (.9, 1.6))]
    return {'disc': [(loop(.9), 1)], 'ring': [(loop(.95), 1), (loop(.55), 0)],
            'square': [(around(turn[::15] + np.pi / 4, 1), 1)],
            'triangle': [(around(turn[::20], 1), 1)], 'heart': [(heart, 1)], 'arrow': [(arrow, 1)],
            'star': [(around(points * np.pi / 5, np.where(points % 2, .42, 1)), 1)],
            'cross': [(np.array(bars[1]) * (.9, 1.6), 1), (upright, 1)],
            'crescent': [(loop(.95), 1), (loop(.8, .45), 0)], 'stripes': [(b, 1) for b in bars]}


def shapes(n, size=32, seed=0):
    """Ten kinds of drawn shapes: uint8 (n, size, size, 3) and their classes, int64 (n,).

    One of eight colours on a grey ground; colour, place, size and tilt are random, and a function of
    seed alone. Drawn four times as large and shrunk, which smooths the edges.
    """
    colours = [(220, 40, 40), (240, 140, 20), (240, 220, 40), (50, 170, 60), (40, 180, 190),
               (50, 90, 220), (140, 60, 190), (235, 110, 180)]
    rng, side, kinds = np.random.default_rng(seed), 4 * size, list(outlines().values())
    labels, pictures = rng.integers(len(kinds), size=n), np.empty((n, size, size, 3), np.uint8)
    for i, label in enumerate(labels):
        front, back = colours[rng.integers(8)], (int(rng.choice([15, 90, 245])),) * 3
        r, tilt = side * rng.uniform(.25, .42), rng.uniform(-.3, .3)
        middle, (c, s) = rng.uniform(r, side - r, 2), (np.cos(tilt), np.sin(tilt))
        image = Image.new('RGB', (side, side), back)
        for outline, drawn in kinds[label]:
            points = outline @ np.array([[c, s], [-s, c]]) * r + middle
            ImageDraw.Draw(image).polygon(points.flatten().tolist(), front if drawn else back)
        pictures[i] = np.asarray(image.resize((size, size), Image.BOX))
    return pictures, labels


def fetch(name, folder='data'):
    """folder/name, downloaded first if it is not there; it is kept only if its checksum is right."""
    path, (address, sha256) = Path(folder) / name, DOWNLOADS[name]
    if not path.exists() and rank_and_world()[0] == 0:
        print(f'fetching {address}', flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
        except (OSError, RuntimeError) as e:          # no network; a checksum that is wrong
            raise Problem(f'cannot fetch {address} ({e}): bring the file to {path}') from None
    if dist.is_initialized():
        dist.barrier()
    return path


def cifar10_path(data):
    """The archive or the folder of CIFAR-10's binary form that a path means, or None."""
    for path in (Path(data) / x for x in ('', 'cifar-10-batches-bin', 'cifar-10-binary.tar.gz')):
        if path.is_file() and path.name.endswith('.tar.gz') or (path / 'test_batch.bin').is_file():
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
                files = {Path(m.name).name: tar.extractfile(m).read() for m in tar
                         if m.isfile() and Path(m.name).name in names}
        else:
            files = {name: (path / name).read_bytes() for name in names}
        raw = [np.frombuffer(files[name], np.uint8).reshape(-1, 3073) for name in names[:6]]
        if not all(r[:, 0].max() < 10 for r in raw):
            raise ValueError('a label above 9')
        classes = files['batches.meta.txt'].decode().split()
    except (tarfile.TarError, EOFError, KeyError, ValueError, OSError) as e:
        raise Problem(f'{path} is not the whole binary CIFAR-10 ({e}): fetch it again') from None
    sets = {'train': np.concatenate(raw[:5]), 'val': raw[5]}
    return {name: (r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), r[:, 0].astype(np.int64))
            for name, r in sets.items()}, classes


def picture_folder(root):
    """The same for a folder of class folders, with paths instead of pixels. Where there is no val
    folder, every tenth picture of a class is held out. Pictures right in the folder are one class."""
    root, kinds = Path(root), Image.registered_extensions()
    if not root.is_dir():
        raise Problem(f'--data {root}: no such folder')

    def visible(folder):
        return sorted(f for f in folder.iterdir() if f.name[0] != '.') if folder.is_dir() else []

    def pictures(folder):
        return [f for f in visible(folder) if f.suffix.lower() in kinds]

    def tree(folder):
        return {c.name: found for c in visible(folder) if (found := pictures(c))}

    train, val = tree(root / 'train') or tree(root) or {root.name: pictures(root)}, tree(root / 'val')
    if unknown := [c for c in val if c not in train]:
        raise Problem(f'{root / "val"}: class {unknown[0]} is not in train')
    if not val:
        val = {c: fs[9::10] or fs[1:2] for c, fs in train.items()}
        train = {c: [f for f in fs if f not in val[c]] for c, fs in train.items()}
    if not any(train.values()) or not any(val.values()):
        raise Problem(f'--data {root}: needs two pictures at least, in it or in folders of classes')
    classes = list(train)
    return {name: ([f for fs in found.values() for f in fs],
                   np.repeat([classes.index(c) for c in found], [len(fs) for fs in found.values()]))
            for name, found in (('train', train), ('val', val))}, classes


class Pictures(torch.utils.data.Dataset):
    """A set of pictures, arrays or paths. An item is asked for as (index, draw): draw None gives the
    middle of the picture, a seed a random crop and, with flip, its mirror image half of the time.
    It is a uint8 (size, size, 3), its index, and a list of what could not be read: the next good
    picture stands in for a bad one."""

    def __init__(self, items, labels, size, flip):
        self.items, self.labels, self.size, self.flip = items, labels, size, flip

    def __len__(self):
        return len(self.items)

    def __getitem__(self, request):
        (index, draw), bad, size = request, [], self.size
        while len(bad) < len(self):
            item = self.items[index]
            try:
                image = open_picture(item, size) if isinstance(item, Path) else Image.fromarray(item)
                break
            except Problem as e:
                bad.append((index, str(e)))
                index = (index + 1) % len(self)
        else:
            return None, None, bad
        # The paper's shorter side of 1.125 x size; but a small picture is not blown up to that.
        image = fit(image, size, min(max(min(image.size), size), round(1.125 * size)))
        if draw is None:
            return center(image, size), index, bad
        rng = np.random.default_rng(draw)
        x, y = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
        picture = np.asarray(image.crop((x, y, x + size, y + size)))
        return picture[:, ::-1] if self.flip and rng.random() < 0.5 else picture, index, bad

    def load(self, batches, workers=0):
        """For each list of requests: pictures (B, size, size, 3), indices (B,). Names bad files."""
        named = set()
        for items in DataLoader(self, batch_sampler=batches, collate_fn=list, num_workers=workers):
            pictures, indices, bad = zip(*items)
            for index, why in sum(bad, []):
                if index not in named:
                    named.add(index)
                    print(f'skipped: {why} ({len(named)} so far)', file=sys.stderr, flush=True)
            if pictures[0] is None:
                raise Problem(f'none of the {len(self)} pictures can be read')
            yield torch.from_numpy(np.stack(pictures)), torch.tensor(indices)

    def middles(self, limit=None, rank=0, world=1, batch=50):
        """Requests for the middles of the first pictures, batch by batch, a process's share."""
        n = min(len(self), limit or len(self))
        return [[(i, None) for i in range(a, min(a + batch, n))]
                for a in range(0, n, batch)[rank::world]]


def order(n, cfg, start, stop):
    """For each step from `start`: (index, draw) of this process's part of the batch.

    The place of a picture in the run decides on both. Every epoch is one permutation of all n.
    """
    (rank, world), B, epoch = rank_and_world(), cfg.batch, None
    for step in range(start, stop):
        part = []
        for place in range(step * B + rank * B // world, step * B + (rank + 1) * B // world):
            if epoch != place // n:
                epoch = place // n
                permutation = np.random.default_rng((cfg.seed, epoch)).permutation(n)
            part.append((int(permutation[place % n]), (cfg.seed, place)))
        yield part


def read_data(cfg):
    """(Pictures of train, Pictures of val, names of the classes) of what --data names."""
    if cfg.data == 'shapes':
        sets, classes = {'train': shapes(8000, cfg.size, 1), 'val': shapes(1000, cfg.size, 2)}, [
            *outlines()]
    elif cfg.data == 'cifar10' or cifar10_path(cfg.data):
        path = cifar10_path('data' if cfg.data == 'cifar10' else cfg.data)
        sets, classes = cifar10(path or fetch('cifar-10-binary.tar.gz'))
    else:
        sets, classes = picture_folder(cfg.data)
    train, val = (Pictures(*sets[k], cfg.size, cfg.flip and k == 'train') for k in ('train', 'val'))
    return train, val, classes


# ------------------------------------------------------------------------------------------------
# The two stages: what is trained, on what, by which loss, and how good it is

class TokenizerStage(nn.Module):
    """Stage 1, equation (5). A module, so that DistributedDataParallel can hold all of it."""
    name, noises = 'tokenizer', 1
    plain = 0.2      # share of the steps before quantization sets in: an autoencoder to begin with
    progress = 0.    # of the stage, from 0 to 1, set by the loop

    def __init__(self, cfg, vae, train, val, workers, vgg):
        super().__init__()
        self.cfg, self.train_set, self.val_set, self.workers = cfg, train, val, workers
        self.steps, self.lr, self.vae, self.vgg = cfg.tokenizer_steps, cfg.tokenizer_lr, vae, vgg
        self.disc = PatchDiscriminator() if cfg.adversarial else None

    def batches(self, start):
        requests = order(len(self.train_set), self.cfg, start, self.steps)
        return ((pictures,) for pictures, _ in self.train_set.load(requests, self.workers))

    def forward(self, pictures, noise):
        images = to_tensor(pictures)
        rebuilt, quantizer, usage = self.vae(images, noise[:, 0], self.progress >= self.plain)
        mse = F.mse_loss(rebuilt, images)
        loss = mse + 0.2 * F.l1_loss(rebuilt, images)
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4), 'quantizer': quantizer.detach()}
        if self.vgg:
            loss = loss + self.cfg.perceptual * self.vgg(rebuilt, images)
        if self.disc and self.progress >= 0.75:      # late: once the other losses have levelled off
            fool, judge = self.disc.losses(images, rebuilt)
            last = self.vae.decoder.conv_out.weight
            # As much pull on the last layer as all other losses have together (VQGAN).
            pull, push = (torch.autograd.grad(x, last, retain_graph=True)[0].norm()
                          for x in (loss, fool))
            loss = loss + self.cfg.adversarial * (pull / (push + 1e-4)).clamp_max(1e4) * fool + judge
            figures['adversarial'] = judge.detach()
        return loss + quantizer, figures, usage

    def after_step(self, usages):
        if usages[0]:
            # While quantized steps are few the average is over all of them, as k-means would have it.
            t = (self.progress - self.plain) * self.steps
            tokens, vectors = (torch.cat(parts) for parts in zip(*usages))
            self.vae.quantize.update(tokens, vectors, decay=min(0.98, t / (t + 1)))

    def evaluate(self, out, device):
        figures, rows = grade_tokenizer(self.vae, self.val_set, device, limit=2000)
        save_grid(out / 'reconstructions.png', rows)
        return figures


class TransformerStage(nn.Module):
    """Stage 2: cross-entropy over the tokens of all scales alike, under the mask of Fig. 4."""
    name = 'transformer'

    def __init__(self, cfg, vae, var, train, val, sampling):
        super().__init__()
        self.cfg, self.train_set, self.val_set, self.sampling = cfg, train, val, sampling
        self.steps, self.lr, self.vae, self.var = cfg.steps, cfg.lr, vae, var
        self.noises = 1 + 2 * len(var.blocks)

    def batches(self, start):
        for part in order(len(self.train_set[0]), self.cfg, start, self.steps):
            yield [x[[i for i, _ in part]] for x in self.train_set]

    def logits(self, tokens, labels, noise=None):
        maps = tokens.long().split([p * p for p in self.var.patch_nums], dim=1)
        return self.var(labels, self.vae.var_input(maps), noise)                # (B, L, V)

    def forward(self, tokens, labels, noise):
        logits = self.logits(tokens, labels, noise)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten().long())
        right = (logits.detach().argmax(-1) == tokens).float().mean()
        return loss, {'loss': loss.detach(), 'accuracy': right}, None

    def after_step(self, _):
        pass

    @torch.no_grad()
    def evaluate(self, out, device):
        """Loss in nats and share of wrong tokens on the validation set (5.2); draws a row a class."""
        loss, wrong, n = 0, 0, min(2000, len(self.val_set[0]))
        for tokens, labels in zip(*(x[:n].to(device).split(50) for x in self.val_set)):
            logits = self.logits(tokens, labels).transpose(1, 2)                # (B, V, L)
            loss += F.cross_entropy(logits, tokens.long(), reduction='none').sum(0) / n
            wrong += (logits.argmax(1) != tokens).sum(0) / n
        classes, last = min(10, self.var.num_classes), self.var.patch_nums[-1] ** 2
        labels = torch.arange(classes).repeat_interleave(8)
        images = self.var.generate(self.vae, labels, seed=0, **self.sampling)
        save_grid(out / 'samples.png', np.split(to_uint8(images), classes))
        return {'loss': loss.mean().item(), 'loss last': loss[-last:].mean().item(),
                'error': wrong.mean().item(), 'error last': wrong[-last:].mean().item()}


@torch.no_grad()
def grade_tokenizer(vae, pictures, device, limit=None):
    """PSNR in dB and the use of the codebook over the middles of the first pictures, as a dict.

    `usage k` is the share of what scale k could use at most: all codes, or its own tokens if fewer.
    Also returns rows of eight pictures: the originals, then what is rebuilt after each scale.
    """
    V, sizes = len(vae.quantize.embedding.weight), [p * p for p in vae.patch_nums]
    hits, psnr, rows, n = torch.zeros(len(sizes), V), 0, [], 0
    for batch, _ in pictures.load(pictures.middles(limit)):
        images = to_tensor(batch.to(device))
        tokens = vae.encode(images)
        error = (vae.decode(tokens) - images).square().mean((1, 2, 3)) / 4
        psnr, n = psnr - 10 * error.clamp_min(1e-10).log10().sum().item(), n + len(images)
        hits += torch.stack([t.flatten().bincount(minlength=V) for t in tokens]).cpu()
        rows = rows or [batch[:8].numpy()] + [
            to_uint8(x / 2 + 0.5) for x in vae.decode_scales([t[:8] for t in tokens])]
    usage = [(h > 0).sum().item() / min(V, n * l) for h, l in zip(hits, sizes)]
    return {'PSNR': psnr / n, 'codes used': (hits.sum(0) > 0).sum().item(), 'of': V,
            **{f'usage {k}': u for k, u in enumerate(usage, 1)}}, rows


@torch.no_grad()
def tokenize(vae, pictures, device, workers, mirrored):
    """All token maps of a set, once, (N, L) int16, with labels (N,): the encoder never runs again.

    mirrored adds the mirror images. Pictures that cannot be read are left out.
    """
    (rank, world), found = rank_and_world(), {}
    for batch, indices in pictures.load(pictures.middles(None, rank, world), workers):
        images = to_tensor(batch.to(device))
        maps = [torch.cat(vae.encode(x), dim=1).short().cpu()
                for x in (images, images.flip(3))[:1 + mirrored]]
        # By index, so that what stands in for an unreadable picture is not counted twice.
        found.update(zip(indices.tolist(), torch.stack(maps, dim=1).numpy()))
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, found)
        found = {i: maps for part in everyone for i, maps in part.items()}
    kept = sorted(found)
    labels = torch.from_numpy(np.repeat(pictures.labels[kept], 1 + mirrored))
    return torch.from_numpy(np.concatenate([found[i] for i in kept])), labels


# ------------------------------------------------------------------------------------------------
# One loop for both stages

def learning_rate(progress):
    """As a share of the peak: warm-up over 1/50 of the run, flat up to 5 %, then linear to 0.01."""
    return min(0.005 + 0.995 * progress / 0.02, 1 - 0.99 * max(0, progress - 0.05) / 0.95)


def make_optimizer(stage):
    """AdamW; no decay on biases, gains, positions, scale embeddings, AdaLN and attention offsets."""
    groups = {0.05: [], 0.: []}
    for name, p in stage.named_parameters():
        free = p.ndim < 2 or any(s in name for s in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        groups[0. if free else 0.05] += [p] if p.requires_grad else []
    return torch.optim.AdamW([{'params': ps, 'weight_decay': wd} for wd, ps in groups.items()],
                             lr=stage.lr, betas=(0.9, 0.95), fused=True)


def train_stage(stage, cfg, state, out, device):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step."""
    (rank, world), B, optimizer = rank_and_world(), cfg.batch, make_optimizer(stage)
    learned = {n: m for n, m in stage.named_children() if n in ('vae', 'var', 'disc')}
    if state['optimizer']:
        optimizer.load_state_dict(state['optimizer'])
        for name, module in learned.items():
            module.load_state_dict(state[name])
    model, stop, skipped, timer = stage.train(), [], 0, (time.time(), state['step'])
    if world > 1:
        model = DistributedDataParallel(stage, find_unused_parameters=bool(cfg.adversarial))
    saved, batches = time.time(), stage.batches(state['step'])
    handlers = {s: signal.signal(s, lambda s, _: stop.append(s))
                for s in (signal.SIGINT, signal.SIGTERM)}
    for step in range(state['step'], stage.steps + 1):
        stage.progress, last = step / max(1, stage.steps), step == stage.steps
        if rank == 0 and (last or step and step % max(1, stage.steps // 5) == 0):
            stage.eval()
            with precision(device):
                log(out, stage.name, step, stage.evaluate(out, device))
            stage.train()
            timer = time.time(), step
        # A signal may reach the processes at different steps: they agree on when to stop.
        stopped = torch.tensor(max(stop, default=0), device=device)
        if world > 1:
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
        if rank == 0 and (last or stopped or time.time() - saved > 60):
            state.update({n: m.state_dict() for n, m in learned.items()},
                         step=step, optimizer=optimizer.state_dict())
            write_whole(out / 'ckpt.pt', lambda f: torch.save(state, f))
            saved = time.time()
        if stopped:
            print(f'stopped at {stage.name} step {step}; --resume goes on', flush=True)
            sys.exit(128 + int(stopped))
        if last:
            break

        batch = next(batches)      # before seeding, as the first one takes a random number more
        seed = np.random.SeedSequence((cfg.seed, len(stage.name), step)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        noise = torch.rand(B, stage.noises)[rank * B // world:(rank + 1) * B // world]
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(stage.progress)
        optimizer.zero_grad()
        extras = []
        for part in zip(*(x.to(device).chunk(cfg.accumulate) for x in (*batch, noise))):
            with precision(device):
                loss, figures, extra = model(*part)
            (loss / cfg.accumulate).backward()
            extras.append(extra)
        if torch.nn.utils.clip_grad_norm_(stage.parameters(), 2.0).isfinite():
            optimizer.step()
            stage.after_step(extras)
            skipped = 0
        else:
            skipped += 1
            print(f'{stage.name} {step}: a gradient is not finite, step left out', flush=True)
            if skipped == 10:
                raise Problem('ten steps in a row were not finite. ckpt.pt is the last good one: '
                              '--resume with a smaller --lr or --tokenizer-lr')
        if rank == 0 and step % max(1, min(50, stage.steps // 20)) == 0:
            rate = (step + 1 - timer[1]) * B / (time.time() - timer[0])
            print(f'{stage.name} {step}/{stage.steps}  '
                  + '  '.join(f'{k} {v:.3f}' for k, v in figures.items()) + f'  {rate:.0f} images/s'
                  f'  {(stage.steps - step) * B / rate / 60:.0f} min left', flush=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def log(out, stage, step, figures):
    """Figures to the screen and, each as a line (stage, step, time, name, value), to log.csv."""
    print(f'{stage} {step}: ' + '  '.join(f'{k} {v:.4g}' for k, v in figures.items()), flush=True)
    with open(out / 'log.csv', 'a', newline='') as f:
        csv.writer(f).writerows([stage, step, round(time.time(), 1), k, v] for k, v in figures.items())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = [f for f in dataclasses.fields(Config) if f.metadata]
    for f in options:
        kind = {'action': 'store_true', 'default': None} if f.type is bool else {'type': f.type}
        parser.add_argument('--' + f.name.replace('_', '-'), help=f.metadata['help'], **kind)
    add = parser.add_argument
    add('--workers', type=int, default=min(4, (os.cpu_count() or 1) - 1), help='that read pictures')
    add('--device', help='cuda, mps or cpu; the best there is by default')
    add('--vgg', help='file of the VGG-16 weights, for a machine without internet')
    add('--out', type=Path, default=Path('.'), help='folder of ckpt.pt, log.csv and pictures')
    add('--resume', action='store_true', help='go on from ckpt.pt in --out')
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in options if getattr(args, f.name) is not None}
    device, path, state = pick_device(args.device), args.out / 'ckpt.pt', {}
    if args.resume:
        state = read_weights(path)
        if not isinstance(state.get('config'), dict) or state.get('version') != VERSION:
            raise Problem(f'{path} was not made by train.py: there is nothing to resume')
        given = {**state['config'], **given}
    cfg = Config(**given).complete(device)
    train, val, classes = read_data(cfg)

    torch.manual_seed(cfg.seed)
    if cfg.tokenizer == 'train':
        vae = VQVAE(cfg.sides, **cfg.network)
        vae.quantize.embedding.weight.zero_()     # the first residuals, which codes start from, are f
    else:
        source = fetch('vae_ch160v4096z32.pth') if cfg.tokenizer == 'official' else cfg.tokenizer
        vae = VQVAE.from_state_dict(load_models(source)[0].state_dict(), cfg.sides)
    var = VAR(cfg.sides, cfg.depth, len(classes), *vae.quantize.embedding.weight.shape)
    if not state:
        small = dict(cfg=3., top_k=100, top_p=1.)     # small models want a tighter draw
        state = dict(version=VERSION, config=dataclasses.asdict(cfg), classes=classes, step=0,
                     sampling=small if cfg.size < 64 else dict(cfg=1.5, top_k=900, top_p=0.96),
                     stage='tokenizer' if cfg.tokenizer == 'train' else 'transformer',
                     patch_nums=cfg.sides, vae=vae.state_dict(), optimizer=None)
        if path.exists() and rank_and_world()[0] == 0:
            os.replace(path, args.out / 'ckpt.previous.pt')
    vae.load_state_dict(state['vae'])
    vae, var = vae.to(device), var.to(device)
    args.out.mkdir(parents=True, exist_ok=True)
    if rank_and_world()[0] == 0:
        sizes = [f'{sum(p.numel() for p in m.parameters()) / 1e6:.1f} M' for m in (vae, var)]
        print(f'tokenizer ({cfg.tokenizer}) {sizes[0]}, {cfg.tokenizer_steps} steps; transformer '
              f'{sizes[1]}, depth {cfg.depth}, {cfg.steps} steps; {cfg.batch} pictures a step\n'
              f'{len(train)} + {len(val)} pictures of {cfg.size} px, {len(classes)} classes; scales '
              f'{cfg.patch_nums}: {sum(p * p for p in cfg.sides)} tokens a picture\n'
              f'{rank_and_world()[1]} x {device}, '
              + ('bfloat16' if precision(device)._enabled else 'float32'), flush=True)
    if state['stage'] == 'tokenizer':
        vgg = VGG16(read_weights(args.vgg or fetch('vgg16-397923af.pth'))) if cfg.perceptual else None
        stage = TokenizerStage(cfg, vae, train, val, args.workers, vgg).to(device)
        train_stage(stage, cfg, state, args.out, device)
        state.update(stage='transformer', step=0, optimizer=None)
    vae.eval().requires_grad_(False)
    with precision(device):
        maps = [tokenize(vae, pictures, device, args.workers, mirrored)
                for pictures, mirrored in ((train, cfg.flip), (val, False))]
    stage = TransformerStage(cfg, vae, var, *maps, state['sampling'])
    train_stage(stage, cfg, state, args.out, device)


if __name__ == '__main__':
    run(main)
