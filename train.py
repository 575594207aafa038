"""Trains both stages of VAR (Fig. 4), the tokenizer and then the transformer, into one ckpt.pt.

    python train.py                                    # built-in shapes: minutes on a CPU
    python train.py --data cifar10                     # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet        # train/<class>/*, val/<class>/* or <class>/*
    python train.py --resume                           # goes on where ckpt.pt stopped
    python train.py --eval ckpt.pt --data ./imagenet   # grades both models of a checkpoint
    torchrun --nproc_per_node 8 train.py ...           # the same losses, shared by 8 processes

Paper: equation (5) and Section 3.2 for stage 1, Fig. 4 and Section 4 for stage 2.
Other than in the release: stage 2 sees every picture's middle, tokenized once, and no other crops;
at all depths the learning rate ends at 0.01 of its peak and the weight decay stays 0.05.
All that is random is a function of the seed and of a place in the run, and is drawn for the whole
batch, of which a process takes its part. So a run that was killed and resumed ends, on a CPU, with
the same bits as one that was not, and N processes train to the losses of one.
B pictures a step, L tokens of all scales, l of one, K scales, V codes, N pictures in a set.
"""
import os
import signal
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from sample import (RELEASED, VERSION, Problem, attempt, crop, load_models, open_picture, parse,
                    pick_device, precision, rank_and_world, read_weights, run, save_grid, to_tensor,
                    to_uint8, write_whole)
from tokenizer import VGG16, VQVAE, PatchDiscriminator, all_processes
from var import VAR

# Addresses, and sha256 or the beginning of it, which torch.hub is content with.
VAE = ('https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
       '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c')
VGG = 'https://download.pytorch.org/models/vgg16-397923af.pth', '397923af'
CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')

@dataclass
class Options:
    """The options, as --name value, here with the values of 256 px; PRESETS has the others."""
    data: str = 'shapes'            # or cifar10, its archive, or a folder of pictures
    size: int = 256                 # side of the pictures; 32 for shapes and CIFAR-10
    patch_nums: str = '1,2,3,4,5,6,8,10,13,16'      # sides of the scales
    depth: int = 16                 # d: width 64 d, d heads, d blocks, equation (7)
    tokenizer: str = 'train'        # train: one of its own; official: the released one; or a file
    tokenizer_steps: int = 20000    # steps of stage 1
    steps: int = 50000              # steps of stage 2
    batch: int = 32                 # pictures a step, over all processes
    accumulate: int = 4             # parts in which a process computes its batch, to save memory
    tokenizer_lr: float = 1e-4      # peak learning rate of stage 1
    lr: float = 0.                  # that of stage 2; 0: 1e-4 for 256 pictures a step (Section 4)
    perceptual: float = 1.          # weight of L_P in equation (5)
    adversarial: float = 0.5        # weight of L_G in equation (5), relative to the rest
    seed: int = 0                   # of everything random
    flip: bool = False              # mirror pictures left to right at random
    network: dict = field(default_factory=dict)     # sizes of the VQVAE, from PRESETS alone
    sampling: dict = field(default_factory=lambda: RELEASED['sampling'])    # as well; for sample.py
    # What follows does not define the run, and is not saved with it.
    workers: int = min(4, (os.cpu_count() or 1) - 1)    # processes that read pictures
    device: str = None              # cuda, mps or cpu; the best there is if not given
    compile: bool = False           # torch.compile: half a minute, then up to a quarter faster
    checkpointing: bool = False     # compute the transformer's blocks twice: half the memory
    vgg: str = None                 # file of the VGG-16 weights, for a machine without internet
    out: Path = Path('.')           # folder of ckpt.pt, log.csv and pictures
    resume: bool = False            # go on from ckpt.pt in --out; options given with it are changed
    eval: Path = None               # grade this checkpoint instead of training

SAVE_EVERY = 60                     # seconds
MACHINE = 'workers', 'device', 'compile', 'checkpointing', 'vgg', 'out', 'resume', 'eval'
# Batches are small at 32 px on a CPU, where steps count for more than pictures: in a minute of
# autoencoding CIFAR-10, 27.1 dB with batches of 16, 25.5 dB with 32. So small a transformer wants
# strong guidance: of 1,000 CIFAR-10 samples a classifier tells 71 % as the class asked for with
# cfg 8 and top-k 100 (Frechet distance 132), 64 % with 4 and 100 (143), 66 % with 4 and 40 (167).
# With z_channels 4 the first scale would use 62 % of the codes, not 15, but pictures suffer: after
# 350 steps their reconstructions are at a distance of 35, not 24 (experiments/choices.py).
SMALL = dict(size=32, patch_nums='1,2,3,4,6,8', depth=4, batch=16, accumulate=1, lr=3e-3,
             tokenizer_lr=1e-3, perceptual=0., adversarial=0., tokenizer_steps=3400, steps=4500,
             sampling=dict(cfg=8., top_k=100, top_p=1.),
             network=dict(ch=32, ch_mult=(1, 2, 4), vocab_size=1024, z_channels=16, res_blocks=1,
                          normalise=False))
PRESETS = {
    'cuda': dict(SMALL, depth=8, batch=256, tokenizer_steps=8000, steps=8000,
                 network=dict(SMALL['network'], ch=64)),
    'shapes': dict(SMALL, patch_nums='1,2,4,8', depth=3, lr=5e-3, steps=1500, tokenizer_steps=700,
                   sampling=dict(cfg=4., top_k=20, top_p=1.),
                   network=dict(SMALL['network'], ch=16, vocab_size=256, z_channels=8)),
    64: dict(network=dict(ch=64, ch_mult=(1, 2, 4), vocab_size=2048)),
    128: dict(network=dict(ch=96, ch_mult=(1, 1, 2, 4))),
    256: dict(network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4))),
    512: dict(network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4)), patch_nums='1,2,3,4,6,9,13,18,24,32')}

def settings():
    """The Options, and the checkpoint to go on from, or {}. Problem for what cannot be.

    The command line comes before what a resumed run had, and that before the preset.
    """
    given, state = parse(Options, __doc__), {}
    given['device'] = pick_device(given.get('device'))          # joins the other processes, too
    ckpt = given.get('out', Path()) / 'ckpt.pt'
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'        # by torchrun
    if 'resume' in given or restarted and ckpt.exists():
        state = read_weights(ckpt)
        if not isinstance(state.get('config'), dict) or state.get('version') != VERSION:
            raise Problem(f'{ckpt} was not made by this train.py: nothing to resume')
    given = dict(data='shapes') | state.get('config', {}) | given
    folder = Path(given['data']).is_dir() and not cifar10_path(given['data'])
    size = given.setdefault('size', 256 if folder else 32)      # CIFAR-10's files are no folder
    if size not in (32, *PRESETS):
        raise Problem(f'--size {size}: choose from 32, 64, 128, 256, 512')
    kind = size if size > 32 else 'shapes' if given['data'] == 'shapes' else given['device'].type
    args = Options(**PRESETS.get(kind, SMALL) | given)
    args.lr = args.lr or 1e-4 * args.batch / 256                # Section 4
    if args.tokenizer == 'official':
        args.tokenizer = str(fetch(*VAE))
    args.sides = [int(p) for p in args.patch_nums.split(',') if p.isdecimal()]
    last = size // 2 ** (len(args.network['ch_mult']) - 1)      # the side of the latent, P
    if min(args.depth, args.batch, args.accumulate, 1 + min(
            args.steps, args.tokenizer_steps, args.seed, args.workers)) < 1:
        raise Problem('--depth, --batch and --accumulate start at 1; steps, seed, workers at 0')
    if args.batch % (rank_and_world()[1] * args.accumulate):
        raise Problem(f'--batch {args.batch} is no multiple of processes times --accumulate')
    if args.eval and rank_and_world()[1] > 1:
        raise Problem('--eval is the work of one process')
    if sorted({*args.sides} - {0}) != args.sides or args.sides[-1:] != [last]:
        raise Problem(f'--patch-nums {args.patch_nums}: rising, to {last} at {size} px')
    return args, state

# ---- Pictures to learn from ----

# The ten shapes: which points of the unit disc belong to each. A point is a complex number x + iy,
# y downwards. A star is where at most one of the five lines between its tips has it outside.
TURNS = np.exp(2j * np.pi * np.arange(5) / 5)
SHAPES = {
    'disc': lambda z: abs(z) < .9,
    'ring': lambda z: abs(abs(z) - .75) < .2,
    'square': lambda z: np.maximum(abs(z.real), abs(z.imag)) < .7,
    'triangle': lambda z: (z.imag < .5) & (1.73 * abs(z.real) < z.imag + 1),
    'heart': lambda z: (1.44 * abs(z) ** 2 - 1) ** 3 < -2.49 * z.real ** 2 * z.imag ** 3,
    'arrow': lambda z: abs(z.real) < np.where(z.imag < -.1, z.imag + 1, .3 * (z.imag < 1)),
    'star': lambda z: sum((z * turn).imag < -.31 for turn in TURNS) < 2,
    'cross': lambda z: (abs(z) < .95) & (np.minimum(abs(z.real), abs(z.imag)) < .28),
    'crescent': lambda z: (abs(z) < .95) & (abs(z - .45) > .8),
    'stripes': lambda z: (abs(z) < .95) & (abs(abs(z.imag) - .35) > .17)}

def shapes(n, size=32, seed=0):
    """Ten kinds of drawn shapes: uint8 (n, size, size, 3) and their classes, int64 (n,).

    One of four colours on black or white; colour, place, size and tilt are random, and a function
    of the seed alone. Nine points a pixel say how much of it is covered, so that edges are smooth.
    """
    colours = np.array([(220, 40, 40), (240, 200, 40), (50, 170, 60), (50, 90, 220)])
    rng, grid, inside = np.random.default_rng(seed), np.linspace(0, 1, 3 * size), [*SHAPES.values()]
    labels, pictures = rng.integers(len(SHAPES), size=n), np.empty((n, size, size, 3), np.uint8)
    for picture, label in zip(pictures, labels):
        front, back = rng.choice(colours), rng.choice([15, 245])
        radius, tilt = rng.uniform(.3, .42), rng.uniform(-.2, .2)
        x, y = rng.uniform(radius, 1 - radius, 2)
        points = ((grid - x) + 1j * (grid - y)[:, None]) / (radius * np.exp(1j * tilt))
        share = inside[label](points).reshape(size, 3, size, 3).mean((1, 3))[..., None]
        picture[:] = back + share * (front - back)                              # (size, size, 3)
    return pictures, labels

def fetch(address, sha256, folder=Path('data')):
    """The file in folder, downloaded first if it is not there; kept if its checksum is right."""
    path = folder / address.split('/')[-1]
    if not path.exists() and os.environ.get('LOCAL_RANK', '0') == '0':      # one a machine
        folder.mkdir(parents=True, exist_ok=True)
        with attempt(f'cannot fetch {address}', f'no network or other content: bring it to {path}'):
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
    if dist.is_initialized():
        dist.barrier()
    return path

def cifar10_path(data):
    """The archive or the folder of CIFAR-10's binary form that a path means, or None."""
    for path in (Path(data) / x for x in ('', 'cifar-10-batches-bin', 'cifar-10-binary.tar.gz')):
        if path.is_file() and path.name.endswith('.tar.gz') or (path / 'test_batch.bin').is_file():
            return path

def cifar10(path):
    """Training set and validation set, each uint8 (N, 32, 32, 3) and int64 (N,), and the classes.

    A record is a label byte and 3 x 1024 bytes of red, green and blue rows. The archive is read in
    memory, file by file and by name: nothing in it can land anywhere on the disk.
    """
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    with attempt(f'{path} is not the whole binary CIFAR-10', 'fetch it again'):
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in names}
        else:
            with tarfile.open(path) as tar:
                files = {Path(m.name).name: tar.extractfile(m).read() for m in tar
                         if Path(m.name).name in names}
        *data, classes = (files[name] for name in names)
        records = np.frombuffer(b''.join(data), np.uint8).reshape(-1, 3073)     # (60000, 3073)
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels, n = records[:, 0].astype(np.int64), len(records) // 6               # the sixth is val
    return (pictures[:-n], labels[:-n]), (pictures[-n:], labels[-n:]), classes.decode().split()

def picture_folder(root):
    """The same for a folder of class folders, with paths instead of pixels.

    Where there is no val folder, every tenth picture of a class is held out, the second of fewer,
    and where no class has a second one, every tenth of all.
    Pictures right in the folder are one class. What begins with a dot is hidden, and no picture.
    """
    def pictures(pattern):
        return sorted(f for f in root.glob(pattern) if f.suffix.lower() in endings
                      and not any(part[0] == '.' for part in f.relative_to(root).parts))

    root, endings = Path(root), Image.registered_extensions()
    everything = pictures('train/*/*') or pictures('*/*') or pictures('*')      # one class
    groups = {}
    for f in everything:
        groups.setdefault(f.parent.name, []).append(f)
    number = {name: i for i, name in enumerate(sorted(groups))}
    held_out = [f for group in groups.values() for f in group[9::10] or group[1:2]]
    val = pictures('val/*/*') or held_out or everything[9::10] or everything[1:2]
    train = sorted({*everything} - {*val})              # sorted: the same on every machine
    if not train or not val:
        raise Problem(f'--data {root}: no such folder, or not two pictures in it or in its folders')
    if unknown := {f.parent.name for f in val} - {*number}:
        raise Problem(f'{root / "val"}: class {min(unknown)} is not in train')
    train, val = ((x, np.array([number[f.parent.name] for f in x])) for x in (train, val))
    return train, val, list(number)

def deaf(worker):
    """Keeps Ctrl-C, and torchrun's signal to the whole group, from processes that read pictures."""
    getattr(os, 'setpgrp', bool)()

def evenly(N, n):
    """n of the indices below N, or all of them, evenly spread."""
    return [i * N // min(n, N) for i in range(min(n, N))]

class Pictures:
    """A set of pictures, as arrays or paths, and their labels. One is asked for as (index, draw):
    draw None gives its middle, a seed a random crop and, with flip, often its mirror image."""
    def __init__(self, items, labels, size, flip=False):
        self.items, self.labels, self.size, self.flip, self.named = items, labels, size, flip, set()

    def __getitem__(self, request):
        """uint8 (size, size, 3), its index, and what could not be read: a list of messages.
        The next good picture stands in for a bad one. If there is none, load() ends the run."""
        (index, draw), size, bad = request, self.size, []
        image = None if isinstance(self.items[index], Path) else Image.fromarray(self.items[index])
        while image is None:
            try:
                image = open_picture(self.items[index], size)
            except Problem as e:
                bad.append(str(e))
                index = (index + 1) % len(self.items)
                image = Image.new('RGB', (size, size)) if len(bad) == len(self.items) else None
        # The paper's shorter side of 1.125 x size; but a small picture is not blown up to that.
        short = min(max(min(image.size), size), round(1.125 * size))
        rng = None if draw is None else np.random.default_rng(draw)     # a function of the draw
        picture = crop(image, size, short, rng)                         # (size, size, 3)
        return picture[:, ::-1] if rng and self.flip and rng.random() < 0.5 else picture, index, bad

    def load(self, batches, workers=0):
        """For each list of requests: pictures (B, size, size, 3), indices (B,). Names bad files."""
        for items in torch.utils.data.DataLoader(self, batch_sampler=batches, collate_fn=list,
                                                 num_workers=workers, worker_init_fn=deaf):
            pictures, indices, bad = zip(*items)                                # B of each
            for why in sorted({*sum(bad, [])} - self.named):
                self.named.add(why)
                print(f'skipped: {why} ({len(self.named)} so far)', file=sys.stderr, flush=True)
            if len(self.named) == len(self.items):
                raise Problem(f'none of the {len(self.items)} pictures can be read')
            yield torch.from_numpy(np.stack(pictures)), torch.tensor(indices)   # uint8, int64

    def middles(self, n=sys.maxsize):
        """Requests for the middles of n pictures, evenly spread over all, in batches of 50."""
        requests = [(i, None) for i in evenly(len(self.items), n)]
        return [requests[a:a + 50] for a in range(0, len(requests), 50)]

def order(n, args, start, stop):
    """For each step from `start`: (index, draw) of this process's part of the batch.

    The place of a picture in the run decides on both. Every epoch is one permutation of all n.
    """
    (rank, world), B = rank_and_world(), args.batch
    epoch = lru_cache(2)(lambda e: np.random.default_rng((args.seed, e)).permutation(n))
    for step in range(start, stop):
        places = range(step * B + rank * B // world, step * B + (rank + 1) * B // world)
        yield [(int(epoch(i // n)[i % n]), (args.seed, i)) for i in places]

def read_data(args):
    """Pictures to train on, Pictures to validate on, and the names of the classes of --data."""
    path = fetch(*CIFAR10) if args.data == 'cifar10' else cifar10_path(args.data)
    if args.data == 'shapes':
        train, val, classes = shapes(8000, args.size, 1), shapes(1000, args.size, 2), [*SHAPES]
    elif path:
        train, val, classes = cifar10(path)
    else:
        train, val, classes = picture_folder(args.data)
    return Pictures(*train, args.size, args.flip), Pictures(*val, args.size), classes

@torch.no_grad()
def tokenize(vae, pictures, args, name):
    """All token maps of a set, once, (N, L) int16, with labels (N,): no step runs the encoder.

    With its mirror images, where pictures are flipped. Those that cannot be read are left out.
    Kept as tokens-<name>.npz in --out with a key of tokenizer and pictures: the next run, and one
    that is resumed, find them there.
    """
    (rank, world), found, path = rank_and_world(), {}, args.out / f'tokens-{name}.npz'
    listed = [(str(f), *(os.stat(f)[6:9:2] if f.exists() else ())) if isinstance(f, Path) else
              zlib.crc32(f.tobytes()) for f in pictures.items]         # sizes and times, or pixels
    weights = [zlib.crc32(x.cpu().numpy().tobytes()) for x in vae.state_dict().values()]
    labels, what = pictures.labels, (vae.patch_nums, pictures.size, pictures.flip)
    key = zlib.crc32(repr((weights, listed, labels.tolist(), what)).encode())
    with attempt(path, 'damaged: delete it'):
        before = dict(np.load(path)) if path.exists() else {'key': None}
    if all_processes(torch.tensor([before['key'] == key], device=args.device)).all():
        return torch.from_numpy(before['tokens']), torch.from_numpy(before['labels'])
    for batch, indices in pictures.load(pictures.middles()[rank::world], args.workers):
        images = to_tensor(batch.to(args.device))                               # (B, 3, H, W)
        sides = [images, images.flip(3)][:1 + pictures.flip]
        maps = [torch.cat(vae.encode(x), dim=1).short().cpu() for x in sides]   # (B, L) each
        # By index, so that what stands in for an unreadable picture is not counted twice.
        found.update(zip(indices.tolist(), torch.stack(maps, dim=1).numpy()))
    if world > 1:
        dist.all_gather_object(parts := [None] * world, found)
        found = {i: maps for part in parts for i, maps in part.items()}
    kept = sorted(found)                                # so the number of processes changes nothing
    tokens, labels = np.concatenate([found[i] for i in kept]), labels[kept]
    labels = labels.repeat(1 + pictures.flip)
    if rank == 0:
        write_whole(path, lambda f: np.savez(f, key=key, tokens=tokens, labels=labels))
    return torch.from_numpy(tokens), torch.from_numpy(labels)

# ---- How good the two models are ----

def ssim(a, b):
    """Structural similarity of pictures (B, 3, H, W) in [0, 1], Wang et al. 2004: (B,).

    On the CPU. Gaussian window of 11 pixels, sigma 1.5; float64, as variances are differences.
    """
    g = (-torch.arange(-5, 6).double() ** 2 / 4.5).exp()
    window = (g[:, None] * g / g.sum() ** 2).expand(3, 1, 11, 11)
    x, y, xx, yy, xy = (F.conv2d(t.double(), window, groups=3) for t in (a, b, a * a, b * b, a * b))
    alike = (2 * x * y + 1e-4) * (2 * (xy - x * y) + 9e-4)
    return (alike / ((x * x + y * y + 1e-4) * (xx - x * x + yy - y * y + 9e-4))).mean((1, 2, 3))

@torch.no_grad()
def grade_tokenizer(vae, pictures, args, n):
    """Figures of the tokenizer on n of the pictures, as a dict; those pictures rebuilt, uint8
    (n, H, W, 3), their tokens (n, L) and labels (n,).

    Draws reconstructions.png: eight of them, and below what is rebuilt after each scale.

    PSNR in dB, SSIM, L1 (of 0 to 1), entropy in bits, and use of the codebook: `usage k` is the
    share of what scale k could use at most, which is all codes, or its own tokens if fewer.
    """
    batch, _ = next(pictures.load(pictures.middles(8)))                         # (8, H, W, 3)
    scales = vae.decode_scales(vae.encode(to_tensor(batch.to(args.device))))    # K of (8, 3, H, W)
    save_grid(args.out / 'reconstructions.png',
              [batch.numpy(), *(to_uint8(x / 2 + 0.5) for x in scales)])
    scores, found, l = [], [], torch.tensor(vae.patch_nums) ** 2                # (K,)
    for batch, indices in pictures.load(pictures.middles(n), args.workers):
        images = to_tensor(batch.to(args.device))                               # (B, 3, H, W)
        tokens = vae.encode(images)                                             # K of (B, l)
        a, b = (x.cpu() / 2 + 0.5 for x in (images, vae.decode(tokens)))        # in [0, 1]
        psnr = -10 * (a - b).square().mean((1, 2, 3)).clamp_min(1e-10).log10()  # (B,)
        scores.append(torch.stack([psnr, ssim(a, b), (a - b).abs().mean((1, 2, 3))]))
        maps = torch.cat(tokens, dim=1).cpu()                                   # (B, L)
        found.append((torch.from_numpy(to_uint8(b)), maps, indices))
    psnr, similar, l1 = torch.cat(scores, dim=1).mean(1).tolist()               # means of (3, n)
    rebuilt, tokens, indices = (torch.cat(parts) for parts in zip(*found))
    hits = vae.quantize.count(tokens.split(l.tolist(), dim=1))                  # (K, V)
    V = hits.shape[1]
    usage = (hits > 0).sum(1) / hits.sum(1).clamp_max(V)                        # (K,)
    bits = (l[:, None] * torch.special.entr(hits / hits.sum(1, keepdim=True))).sum() / np.log(2)
    return {'PSNR': psnr, 'SSIM': similar, 'L1': l1, 'codes used': (hits.sum(0) > 0).sum().item(),
            'of': V, 'bits a token': bits.item() / l.sum().item(), 'bits an image': bits.item(),
            **{f'usage {k}': u for k, u in enumerate(usage.tolist(), 1)}
            }, rebuilt.numpy(), tokens, torch.from_numpy(pictures.labels)[indices]

@torch.no_grad()
def grade_transformer(vae, var, tokens, labels, device):
    """Loss in nats and share of wrong tokens (Section 5.2) on tokens (N, L) and labels (N,).

    A dict: over all scales alike, for the last scale, and for each scale.
    """
    loss, wrong, scales, figures = 0, 0, [p * p for p in var.patch_nums], {}
    for maps, label in zip(tokens.to(device).long().split(25), labels.to(device).split(25)):
        each, right = var(label, vae.var_input(maps.split(scales, dim=1)), tokens=maps)     # (B, L)
        loss += each.sum(0) / len(tokens)                                       # (L,)
        wrong += (~right).sum(0) / len(tokens)                                  # (L,)
    for name, x in ('loss', loss), ('error', wrong):
        each = [part.mean().item() for part in x.split(scales)]
        figures |= {name: x.mean().item(), f'{name} last': each[-1]}
        figures |= {f'{name} {k}': v for k, v in enumerate(each, 1)}
    return figures

# ---- The two stages: what is trained, on what, and by which loss ----

class TokenizerStage(nn.Module):
    """Stage 1, equation (5). A module, to be moved, switched and saved as one."""
    name, noises = 'tokenizer', 1
    plain = 0.25     # share of the steps before quantization sets in: an autoencoder to begin with
    progress = 0.    # of the stage, from 0 to 1, set by the loop

    def __init__(self, args, vae, train, val):
        super().__init__()
        self.args, self.vae, self.train_set, self.val_set = args, vae, train, val
        self.steps, self.lr = args.tokenizer_steps, args.tokenizer_lr
        self.disc = PatchDiscriminator() if args.adversarial else None
        self.vgg = None
        if args.perceptual:
            file = args.vgg or fetch(*VGG)
            with attempt(f'{file}', 'not the VGG-16 weights of torchvision, see --vgg'):
                self.vgg = VGG16(read_weights(file))

    def batches(self, start):
        requests = order(len(self.train_set.items), self.args, start, self.steps)
        return ((pictures,) for pictures, _ in self.train_set.load(requests, self.args.workers))

    def forward(self, pictures, noise):
        """The loss, figures to show, and the use of codes, for move_codes()."""
        images = to_tensor(pictures)                                            # (B, 3, H, W)
        rebuilt, quantizer, usage = self.vae(images, noise[:, 0], self.progress >= self.plain)
        mse = F.mse_loss(rebuilt, images)                                       # the first of (5)
        loss = mse + 0.2 * F.l1_loss(rebuilt, images)
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4), 'quantizer': quantizer.detach()}
        if self.vgg:
            loss = loss + self.args.perceptual * self.vgg(rebuilt, images)      # lambda_P L_P
        if self.disc and self.progress >= 0.75:      # late: once the other losses have levelled off
            fool, judge = self.disc.losses(images, rebuilt)
            # As much pull on the last layer as all other losses have together (VQGAN).
            pull, push = (torch.autograd.grad(x, self.vae.decoder.conv_out.weight,
                                              retain_graph=True)[0].norm() for x in (loss, fool))
            weight = self.args.adversarial * (pull / (push + 1e-4)).clamp_max(1e4)
            loss = loss + weight * fool + judge                                 # lambda_G L_G
            figures['adversarial'] = judge.detach()
        return loss + quantizer, figures, usage                                 # the second of (5)

    def move_codes(self, usages):
        """Once a step, for all parts of its batch. While quantized steps are few their average is
        over all of them, as k-means would have it."""
        t = (self.progress - self.plain) * self.steps
        tokens, vectors = (torch.cat(parts) for parts in zip(*usages))          # (B, L), (B, L, z)
        self.vae.quantize.update(tokens, vectors, decay=min(0.98, t / (t + 1)))

    @torch.no_grad()
    def evaluate(self):
        """Figures on a thousand pictures; draws eight of them, and what is made of them."""
        return grade_tokenizer(self.vae, self.val_set, self.args, 1000)[0]

class TransformerStage(nn.Module):
    """Stage 2: cross-entropy over the tokens of all scales alike, under the mask of Fig. 4.

    train and val are pairs of tokens (N, L) and labels (N,), as tokenize() returns them.
    """
    name = 'transformer'

    def __init__(self, args, vae, var, train, val):
        super().__init__()
        self.args, self.train_set, self.val_set, self.vae, self.var = args, train, val, vae, var
        self.steps, self.lr, self.noises = args.steps, args.lr, 1 + 2 * len(var.blocks)

    def batches(self, start):
        for requests in order(len(self.train_set[0]), self.args, start, self.steps):
            yield [x[[i for i, _ in requests]] for x in self.train_set]

    def forward(self, tokens, labels, noise):
        """The loss, figures to show, and no use of codes: they stay as stage 1 left them."""
        tokens = tokens.long()
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)        # K of (B, l)
        each, right = self.var(labels, self.vae.var_input(maps), noise, tokens)
        loss = each.mean()
        # An accuracy of 4 to 6 % is normal.
        return loss, {'loss': loss.detach(), 'accuracy': right.float().mean()}, None

    def evaluate(self):
        """Figures on a thousand pictures; draws eight of each of the first ten classes."""
        rows = [self.var.generate(self.vae, [c] * 8, seed=c, **self.args.sampling)
                for c in range(min(10, self.var.num_classes))]
        save_grid(self.args.out / 'samples.png', [to_uint8(row) for row in rows])
        tokens, labels = (x[evenly(len(x), 1000)] for x in self.val_set)
        return grade_transformer(self.vae, self.var, tokens, labels, self.args.device)

# ---- One loop for both stages ----

def learning_rate(progress):
    """As a share of the peak: warm-up over 1/50 of the run, flat up to 5 %, then linear to 0.01."""
    return min(0.005 + 0.995 * progress / 0.02, 1 - 0.99 * max(0, progress - 0.05) / 0.95)

def make_optimizer(stage):
    """AdamW; no decay on biases, gains, positions, scale embeddings, AdaLN offsets, q scales."""
    groups = {0.05: [], 0.: []}
    for name, p in stage.named_parameters():
        free = p.ndim < 2 or any(s in name for s in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        groups[0. if free else 0.05] += [p] if p.requires_grad else []
    return torch.optim.AdamW([{'params': ps, 'weight_decay': wd} for wd, ps in groups.items()],
                             lr=stage.lr, betas=(0.9, 0.95), fused=True)

def show(name, figures, *more):
    print(name, *(f' {k} {v:.4g}' for k, v in figures.items()), *more, flush=True)

def train_stage(stage, args, state):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step."""
    (rank, world), B, start = rank_and_world(), args.batch, state['step']
    optimizer, every = make_optimizer(stage), stage.steps // 5 or max(1, stage.steps)
    learned = {n: m for n, m in stage.named_children() if n in ('vae', 'var', 'disc')}  # not VGG
    if state['optimizer']:
        with attempt('cannot resume', 'ckpt.pt was trained with another --depth or other scales'):
            optimizer.load_state_dict(state['optimizer'])
            for name, module in learned.items():
                module.load_state_dict(state[name])
    batches, stop, skipped = stage.train().batches(start), [], 0
    handlers = {number: signal.signal(number, lambda number, _: stop.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    began = saved = time.time()
    for step in range(start, stage.steps + 1):
        stage.progress, last = step / max(1, stage.steps), step == stage.steps
        if rank == 0 and (last or step and step % every == 0):
            with precision(args.device):
                figures = stage.eval().evaluate()
            stage.train()                           # label dropout and stochastic depth again
            show(f'{stage.name} {step}', figures)
            with open(args.out / 'log.csv', 'a') as f:
                f.writelines(f'{stage.name},{step},{time.time():.1f},{k},{v}\n'
                             for k, v in figures.items())
        # A signal may reach the processes at different steps: they agree on when to stop.
        stopped = all_processes(torch.tensor([max(stop, default=0)], device=args.device)).max()
        if rank == 0 and (last or stopped or time.time() - saved > SAVE_EVERY):
            state.update({name: module.state_dict() for name, module in learned.items()},
                         step=step, optimizer=optimizer.state_dict())
            write_whole(args.out / 'ckpt.pt', lambda f: torch.save(state, f))
            saved = time.time()
        if stopped:
            print(f'stopped at {stage.name} step {step}; --resume goes on', flush=True)
            sys.exit(128 + int(stopped))
        if last:
            break

        batch, usages = next(batches), []   # before seeding: the first one takes a random number
        seed = np.random.SeedSequence((args.seed, len(stage.name), step)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        noise = torch.rand(B, stage.noises)[rank * B // world:(rank + 1) * B // world]  # its part
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(stage.progress)
        optimizer.zero_grad()
        for part in zip(*(x.to(args.device).chunk(args.accumulate) for x in (*batch, noise))):
            with precision(args.device):
                loss, figures, usage = stage(*part)
            (loss / args.accumulate / world).backward()     # parts add up to the batch's mean
            usages.append(usage)
        weights = [p for group in optimizer.param_groups for p in group['params']]      # no other
        # Added up here, once a step. DistributedDataParallel does so after every part, and keeps
        # the process group for good: its threads sometimes aborted a process that had ended.
        if world > 1:
            gradients = [p.grad for p in weights if p.grad is not None]
            dist.all_reduce(total := torch.cat([g.flatten() for g in gradients]))
            for g, of_all in zip(gradients, total.split([g.numel() for g in gradients])):
                g.copy_(of_all.view_as(g))
        finite = torch.nn.utils.clip_grad_norm_(weights, 2.0).isfinite()
        skipped = 0 if finite else skipped + 1
        if finite:
            optimizer.step()
            if usages[0]:
                stage.move_codes(usages)
        elif skipped == 10:
            raise Problem('ten steps in a row were not finite. ckpt.pt is the last good one: '
                          '--resume with a smaller --lr or --tokenizer-lr')
        else:
            print(f'{stage.name} {step}: a gradient is not finite, step left out', flush=True)
        if rank == 0 and step % max(1, min(50, stage.steps // 20)) == 0:
            pace = (time.time() - began) / (step + 1 - start)       # seconds a step, all included
            show(f'{stage.name} {step}/{stage.steps}', figures, f' {B / pace:.0f} images/s, '
                 f'{(stage.steps - step) * pace / 60:.0f} min left')
    for number, handler in handlers.items():
        signal.signal(number, handler)

def make_vae(args, state):
    """The tokenizer to begin with: as a run left it, a new one, or that of a file."""
    if not state and args.tokenizer == 'train':
        vae = VQVAE(args.sides, **args.network)                     # a network of PRESETS
        # With all codes zero, the first residuals, from which the codes are drawn, are f itself.
        vae.quantize.embedding.weight.zero_()
        return vae
    source = 'ckpt.pt' if state else args.tokenizer
    with attempt(source, f'no tokenizer for --patch-nums {args.patch_nums}'):
        vae = VQVAE.from_state_dict((state or read_weights(source))['vae'], args.sides)
    if vae.image_size != args.size:
        raise Problem(f'{source} makes {vae.image_size} px of --patch-nums {args.patch_nums}, '
                      f'not --size {args.size}')
    return vae

def grade(args):
    """--eval: prints what the models of a checkpoint make of the validation set of --data, and
    writes the reconstructions for the field's evaluators, reconstructions.npz."""
    vae, var, _ = load_models(args.eval, None if args.tokenizer == 'train' else args.tokenizer)
    args.size, vae = vae.image_size, vae.to(args.device)
    _, val, classes = read_data(args)
    with precision(args.device):
        figures, rebuilt, tokens, labels = grade_tokenizer(vae, val, args, len(val.items))
        show('tokenizer', figures)
        arrays = dict(arr_0=rebuilt, arr_1=labels.numpy())
        write_whole(args.out / 'reconstructions.npz', lambda f: np.savez(f, **arrays))
        if var and var.num_classes == len(classes):
            var = var.to(args.device)
            show('transformer', grade_transformer(vae, var, tokens, labels, args.device))

def main():
    args, state = settings()
    if args.eval:
        return grade(args)
    (rank, world), ckpt, device = rank_and_world(), args.out / 'ckpt.pt', args.device
    train, val, classes = read_data(args)
    torch.manual_seed(args.seed)
    vae = make_vae(args, state).to(device)
    var = VAR(args.sides, args.depth, len(classes), *vae.quantize.embedding.weight.shape).to(device)
    if args.compile:                                # one graph serves all blocks
        with attempt('--compile', 'torch.compile wants a C++ compiler, on cuda Triton'):
            torch.compile(torch.sin)(torch.zeros(1, device=device))
            var.run_block = torch.compile(var.run_block)
    if args.checkpointing:
        var.run_block = partial(checkpoint, var.run_block, use_reentrant=False)
    config = {k: v for k, v in vars(args).items() if k not in (*MACHINE, 'sides')}
    if not state:
        state = dict(version=VERSION, classes=classes, patch_nums=args.sides, step=0,
                     sampling=args.sampling, vae=vae.state_dict(), optimizer=None,
                     stage='tokenizer' if args.tokenizer == 'train' else 'transformer')
        if ckpt.exists() and rank == 0:
            ckpt.replace(args.out / 'ckpt.previous.pt')             # nothing that existed is lost
    state['config'] = config                            # with what was changed on the command line
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (vae, var)]
        with precision(device):
            kind = 'bfloat16' if torch.is_autocast_enabled(device.type) else 'float32'
        print(f'{len(train.items)} + {len(val.items)} pictures of {args.size} px in {len(classes)} '
              f'classes; scales {args.patch_nums}: {len(var.lvl_1L[0])} tokens a picture\n'
              f'tokenizer: {sizes[0]:.1f} M weights, {args.tokenizer_steps} steps\n'
              f'transformer: depth {args.depth}, {sizes[1]:.1f} M weights, {args.steps} steps\n'
              f'{args.batch} pictures a step on {world} x {device}, {kind}', flush=True)
    if state['stage'] == 'tokenizer':
        train_stage(TokenizerStage(args, vae, train, val).to(device), args, state)
        state.update(stage='transformer', step=0, optimizer=None)   # what --resume goes on with
    vae.eval().requires_grad_(False)                # stage 2 of Fig. 4: the tokenizer is frozen
    with precision(device):
        maps = tokenize(vae, train, args, 'train'), tokenize(vae, val, args, 'val')
    train_stage(TransformerStage(args, vae, var, *maps), args, state)

if __name__ == '__main__':
    run(main)
