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

B pictures a step, L tokens of all scales, l tokens of one scale, z code dimension, V codes.

Options; what is not given follows from the data and the device, see PRESETS:
    --data             shapes, cifar10, the archive of CIFAR-10, or a folder of pictures
    --size             side of the pictures: 32 for shapes and CIFAR-10, else 256
    --patch-nums       sides of the scales, as 1,2,3,4,6,8
    --depth            d: width 64 d, d heads, d blocks, equation (7)
    --tokenizer        train one, official (fetched), or a file to take it from
    --tokenizer-steps  steps of stage 1
    --steps            steps of stage 2
    --batch            pictures a step, over all processes
    --accumulate       parts in which a process computes its batch, to save memory
    --tokenizer-lr     peak learning rate of stage 1
    --lr               peak learning rate of stage 2; above 32 px 1e-4 for 256 pictures a step
    --perceptual       weight of L_P in equation (5); 0 at 32 px
    --adversarial      weight of L_G in equation (5), relative to the rest; 0 at 32 px
    --seed             of everything random
    --flip             mirror pictures left to right at random
    --workers          processes that read pictures
    --device           cuda, mps or cpu; the best there is by default
    --vgg              file of the VGG-16 weights, for a machine without internet
    --out              folder of ckpt.pt, log.csv and pictures
    --resume           go on from ckpt.pt in --out; options given with it replace its own
"""
import argparse
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from sample import (Problem, VERSION, center, fit, load_models, open_picture, pick_device,
                    precision, rank_and_world, read_weights, run, save_grid, to_tensor, to_uint8,
                    write_whole)
from tokenizer import VGG16, VQVAE, PatchDiscriminator
from var import VAR

# A name, its address and its sha256, or the beginning of it, which torch.hub is content with.
DOWNLOADS = {
    'vae_ch160v4096z32.pth': (
        'https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
        '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c'),
    'cifar-10-binary.tar.gz': (
        'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'),
    'vgg16-397923af.pth': ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af')}

# What the user leaves open. Batches are small on a CPU, where steps count for more than pictures:
# in 100 s on CIFAR-10 stage 1 reaches 15.3 dB with batches of 128, and 19.3 dB with 32.
SMALL = dict(patch_nums='1,2,3,4,6,8', batch=16, accumulate=1, lr=1e-3, tokenizer_lr=2e-3,
             perceptual=0., adversarial=0.)
# The paper's setting for pictures of 256 px. Its learning rate, 1e-4 for 256 pictures a step,
# follows from the batch, and is set once that is known.
LARGE = dict(patch_nums='1,2,3,4,5,6,8,10,13,16', batch=32, accumulate=4, lr=None, depth=16,
             tokenizer_lr=1e-4, perceptual=1., adversarial=0.5, tokenizer_steps=20000, steps=50000)
# The tokenizer's network; it shrinks a picture by 2 ** (len(ch_mult) - 1), here to a quarter.
MINI = dict(ch=32, ch_mult=(1, 2, 4), vocab_size=1024, z_channels=16, res_blocks=1)
PRESETS = {
    'shapes': dict(SMALL, patch_nums='1,2,4,8', depth=3, lr=2e-3, tokenizer_lr=3e-3, steps=1000,
                   tokenizer_steps=750, network=dict(MINI, ch=16, vocab_size=256, z_channels=8)),
    'cpu': dict(SMALL, depth=4, tokenizer_steps=2000, steps=3000, network=MINI),
    'cuda': dict(SMALL, depth=8, tokenizer_steps=8000, steps=8000, batch=256,
                 network=dict(MINI, ch=64)),
    64: dict(LARGE, network=dict(ch=64, ch_mult=(1, 2, 4), vocab_size=2048)),
    128: dict(LARGE, network=dict(ch=96, ch_mult=(1, 1, 2, 4))),
    256: dict(LARGE, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4))),
    512: dict(LARGE, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4)),
              patch_nums='1,2,3,4,6,9,13,18,24,32')}
# The options and their types. Those of MACHINE do not define the run, and are not saved with it.
OPTIONS = dict(data=str, size=int, patch_nums=str, depth=int, tokenizer=str, tokenizer_steps=int,
               steps=int, batch=int, accumulate=int, tokenizer_lr=float, lr=float, perceptual=float,
               adversarial=float, seed=int, workers=int, device=str, vgg=str, out=Path)
MACHINE = dict(workers=min(4, (os.cpu_count() or 1) - 1), device=None, vgg=None, out=Path('.'),
               resume=False)


def settings():
    """The options, all filled in, and the checkpoint to go on from, or {}.

    What is given on the command line comes before what a resumed run had, and that before the
    preset. So the parser must answer with what was given alone: it suppresses all defaults, and
    leaves the help to the top of this file, where it can be read without running anything.
    """
    parser = argparse.ArgumentParser(
        usage='python train.py [options]', description=__doc__,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in OPTIONS.items():
        parser.add_argument('--' + name.replace('_', '-'), type=kind, help=argparse.SUPPRESS)
    for name in '--flip', '--resume':
        parser.add_argument(name, action='store_true', help=argparse.SUPPRESS)
    given, state = MACHINE | vars(parser.parse_args()), {}
    given['device'] = pick_device(given['device'])
    if given['resume']:
        state = read_weights(given['out'] / 'ckpt.pt')
        if not isinstance(state.get('config'), dict) or state.get('version') != VERSION:
            raise Problem(f'{given["out"]}/ckpt.pt was not made by train.py: nothing to resume')
    usual = dict(data='shapes', tokenizer='train', seed=0, flip=False)
    given = usual | state.get('config', {}) | given
    folder = Path(given['data']).is_dir() and not cifar10_path(given['data'])
    size = given.setdefault('size', 256 if folder else 32)
    if size not in (32, 64, 128, 256, 512):
        raise Problem(f'--size {size}: choose from 32, 64, 128, 256, 512')
    kind = size if size > 32 else 'shapes' if given['data'] == 'shapes' else given['device'].type
    args = argparse.Namespace(**PRESETS.get(kind, PRESETS['cpu']) | given)
    args.lr = args.lr or 1e-4 * args.batch / 256
    steps = min(args.steps, args.tokenizer_steps)
    if min(args.depth, args.batch, args.accumulate) < 1 or steps < 0:
        raise Problem('--depth, --batch and --accumulate start at 1, the steps at 0')
    if args.batch % (rank_and_world()[1] * args.accumulate):
        raise Problem(f'--batch {args.batch} is no multiple of processes times --accumulate')
    last = size // 2 ** (len(args.network['ch_mult']) - 1)
    args.sides = sorted({int(p) for p in args.patch_nums.split(',') if p.isdecimal()} - {0})
    if ','.join(map(str, args.sides)) != args.patch_nums or args.sides[-1] != last:
        raise Problem(f'--patch-nums {args.patch_nums}: rising, to {last} at {size} px')
    return args, state


# ------------------------------------------------------------------------------------------------
# Pictures to learn from

def outlines():
    """The ten shapes: functions that tell which points of the unit disc belong to them.

    A point is a complex number x + iy with y downwards. A star is where at most one of the five
    lines between its tips leaves the point on its outer side.
    """
    turns = np.exp(2j * np.pi * np.arange(5) / 5)
    return {
        'disc': lambda z: abs(z) < .9,
        'ring': lambda z: abs(abs(z) - .75) < .2,
        'square': lambda z: np.maximum(abs(z.real), abs(z.imag)) < .7,
        'triangle': lambda z: (z.imag < .5) & (1.73 * abs(z.real) < z.imag + 1),
        'heart': lambda z: (1.44 * abs(z) ** 2 - 1) ** 3 < -2.49 * z.real ** 2 * z.imag ** 3,
        'arrow': lambda z: abs(z.real) < np.where(z.imag < -.1, z.imag + 1, .3 * (z.imag < 1)),
        'star': lambda z: sum((z * turn).imag < -.31 for turn in turns) < 2,
        'cross': lambda z: (abs(z) < .95) & (np.minimum(abs(z.real), abs(z.imag)) < .28),
        'crescent': lambda z: (abs(z) < .95) & (abs(z - .45) > .8),
        'stripes': lambda z: (abs(z) < .95) & (abs(abs(z.imag) - .35) > .17)}


def shapes(n, size=32, seed=0):
    """Ten kinds of drawn shapes: uint8 (n, size, size, 3) and their classes, int64 (n,).

    One of four colours on black or white; colour, place, size and tilt are random, and a function
    of the seed alone. Nine points a pixel say how much of it is covered, so that edges are smooth.
    """
    colours = np.array([(220, 40, 40), (240, 200, 40), (50, 170, 60), (50, 90, 220)])
    rng, kinds = np.random.default_rng(seed), list(outlines().values())
    labels, pictures = rng.integers(len(kinds), size=n), np.empty((n, size, size, 3), np.uint8)
    grid = np.linspace(0, 1, 3 * size)
    for picture, label in zip(pictures, labels):
        front, back = rng.choice(colours), rng.choice([15, 245])
        radius, tilt = rng.uniform(.3, .42), rng.uniform(-.2, .2)
        x, y = rng.uniform(radius, 1 - radius, 2)
        points = ((grid - x) + 1j * (grid - y)[:, None]) / (radius * np.exp(1j * tilt))
        share = kinds[label](points).reshape(size, 3, size, 3).mean((1, 3))[..., None]
        picture[:] = back + share * (front - back)
    return pictures, labels


def fetch(name, folder='data'):
    """folder/name, downloaded first if it is not there; kept only if its checksum is right."""
    path, (address, sha256) = Path(folder) / name, DOWNLOADS[name]
    if not path.exists() and rank_and_world()[0] == 0:
        print(f'fetching {address}', flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
        except (OSError, RuntimeError) as e:                    # no network; a wrong checksum
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
        raw = b''.join(files[name] for name in names[:6])
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        classes = files['batches.meta.txt'].decode().split()
    except (tarfile.TarError, EOFError, KeyError, ValueError, OSError) as e:
        raise Problem(f'{path} is not the whole binary CIFAR-10 ({e}): fetch it again') from None
    pictures = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels, val = records[:, 0].astype(np.int64), len(records) // 6        # the sixth file
    sets = {'train': (pictures[:-val], labels[:-val]), 'val': (pictures[-val:], labels[-val:])}
    return sets, classes


def picture_folder(root):
    """The same for a folder of class folders, with paths instead of pixels.

    Where there is no val folder, every tenth picture of a class is held out, the second of fewer.
    Pictures right in the folder are one class. What begins with a dot is hidden, and no picture.
    """
    root, endings = Path(root), Image.registered_extensions()
    if not root.is_dir():
        raise Problem(f'--data {root}: no such folder')

    def pictures(pattern):
        return sorted(f for f in root.glob(pattern) if f.suffix.lower() in endings
                      and not any(part[0] == '.' for part in f.relative_to(root).parts))

    everything = pictures('train/*/*') or pictures('*/*') or pictures('*')
    number = {name: i for i, name in enumerate(sorted({f.parent.name for f in everything}))}
    groups = [[f for f in everything if f.parent.name == name] for name in number]
    val = pictures('val/*/*') or [f for group in groups for f in group[9::10] or group[1:2]]
    train = sorted({*everything} - {*val})
    if not train or not val:
        raise Problem(f'--data {root}: needs two pictures at least, in it or in folders of classes')
    if unknown := {f.parent.name for f in val} - {*number}:
        raise Problem(f'{root / "val"}: class {min(unknown)} is not in train')
    return {name: (files, np.array([number[f.parent.name] for f in files]))
            for name, files in (('train', train), ('val', val))}, list(number)


class Pictures:
    """A set of pictures, as arrays or paths, and their labels; read_data() makes them.

    An item is asked for as (index, draw): draw None gives the middle of the picture, a seed a
    random crop and, with flip, its mirror image half of the time.
    """

    def __init__(self, items, labels, size, flip=False):
        self.items, self.labels, self.size, self.flip, self.named = items, labels, size, flip, set()

    def __getitem__(self, request):
        """uint8 (size, size, 3), its index, and what could not be read: a list of messages.

        The next good picture stands in for a bad one. If there is none, load() ends the run.
        """
        (first, draw), n, size, bad = request, len(self.items), self.size, []
        image = Image.new('RGB', (size, size))       # what is left if none of them can be read
        for index in (i % n for i in range(first, first + n)):
            item = self.items[index]
            try:
                is_file = isinstance(item, Path)
                image = open_picture(item, size) if is_file else Image.fromarray(item)
                break
            except Problem as e:
                bad.append(str(e))
        # The paper's shorter side of 1.125 x size; but a small picture is not blown up to that.
        image = fit(image, size, min(max(min(image.size), size), round(1.125 * size)))
        if draw is None:
            return center(image, size), index, bad
        rng = np.random.default_rng(draw)
        x, y = rng.integers(np.array(image.size) - size + 1)
        picture = np.asarray(image.crop((x, y, x + size, y + size)))
        return picture[:, ::-1] if self.flip and rng.random() < 0.5 else picture, index, bad

    def load(self, batches, workers=0):
        """For each list of requests: pictures (B, size, size, 3), indices (B,). Names bad files."""
        for items in torch.utils.data.DataLoader(self, batch_sampler=batches, collate_fn=list,
                                                 num_workers=workers):
            pictures, indices, bad = zip(*items)
            for why in sorted({*sum(bad, [])} - self.named):
                self.named.add(why)
                print(f'skipped: {why} ({len(self.named)} so far)', file=sys.stderr, flush=True)
            if len(self.named) == len(self.items):
                raise Problem(f'none of the {len(self.items)} pictures can be read')
            yield torch.from_numpy(np.stack(pictures)), torch.tensor(indices)

    def middles(self, n, rank=0, world=1):
        """Requests for the middles of the first n in batches of 50, of which a process has some."""
        requests = [(i, None) for i in range(min(n, len(self.items)))]
        return [requests[a:a + 50] for a in range(0, len(requests), 50)][rank::world]


def read_data(args):
    """Pictures of train, Pictures of val, and the names of the classes, of what --data names."""
    path = cifar10_path('data' if args.data == 'cifar10' else args.data)
    if args.data == 'shapes':
        sets = {'train': shapes(8000, args.size, 1), 'val': shapes(1000, args.size, 2)}
        classes = list(outlines())
    elif args.data == 'cifar10' or path:
        sets, classes = cifar10(path or fetch('cifar-10-binary.tar.gz'))
    else:
        sets, classes = picture_folder(args.data)
    train, val = Pictures(*sets['train'], args.size, args.flip), Pictures(*sets['val'], args.size)
    return train, val, classes


def order(n, args, start, stop):
    """For each step from `start`: (index, draw) of this process's part of the batch.

    The place of a picture in the run decides on both. Every epoch is one permutation of all n.
    """
    (rank, world), B, epoch = rank_and_world(), args.batch, None
    for step in range(start, stop):
        part = []
        for place in range(step * B + rank * B // world, step * B + (rank + 1) * B // world):
            if epoch != place // n:
                epoch = place // n
                permutation = np.random.default_rng((args.seed, epoch)).permutation(n)
            part.append((int(permutation[place % n]), (args.seed, place)))
        yield part


@torch.no_grad()
def tokenize(vae, pictures, args, mirrored):
    """All token maps of a set, once, (N, L) int16, with labels (N,): the encoder never runs again.

    mirrored adds the mirror images. Pictures that cannot be read are left out.
    """
    (rank, world), found = rank_and_world(), {}
    for batch, indices in pictures.load(
            pictures.middles(len(pictures.items), rank, world), args.workers):
        images = to_tensor(batch.to(args.device))                               # (B, 3, H, W)
        versions = [images, images.flip(3)] if mirrored else [images]
        maps = [torch.cat(vae.encode(x), dim=1).short().cpu() for x in versions]
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
# The two stages: what is trained, on what, by which loss, and how good it is

class TokenizerStage(nn.Module):
    """Stage 1, equation (5). A module, so that DistributedDataParallel can hold all of it."""
    name, noises = 'tokenizer', 1
    plain = 0.2      # share of the steps before quantization sets in: an autoencoder to begin with
    progress = 0.    # of the stage, from 0 to 1, set by the loop

    def __init__(self, args, vae, train, val):
        super().__init__()
        self.args, self.vae, self.train_set, self.val_set = args, vae, train, val
        self.steps, self.lr, self.usages = args.tokenizer_steps, args.tokenizer_lr, []
        self.disc = PatchDiscriminator() if args.adversarial else None
        weights = args.perceptual and read_weights(args.vgg or fetch('vgg16-397923af.pth'))
        self.vgg = VGG16(weights) if weights else None

    def batches(self, start):
        requests = order(len(self.train_set.items), self.args, start, self.steps)
        return ((pictures,) for pictures, _ in self.train_set.load(requests, self.args.workers))

    def forward(self, pictures, noise):
        images = to_tensor(pictures)                                            # (B, 3, H, W)
        rebuilt, quantizer, usage = self.vae(images, noise[:, 0], self.progress >= self.plain)
        self.usages += [usage] if usage else []
        mse = F.mse_loss(rebuilt, images)
        loss = mse + 0.2 * F.l1_loss(rebuilt, images)
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4), 'quantizer': quantizer.detach()}
        if self.vgg:
            loss = loss + self.args.perceptual * self.vgg(rebuilt, images)
        if self.disc and self.progress >= 0.75:      # late: once the other losses have levelled off
            fool, judge = self.disc.losses(images, rebuilt)
            # As much pull on the last layer as all other losses have together (VQGAN).
            pull, push = (torch.autograd.grad(x, self.vae.decoder.conv_out.weight,
                                              retain_graph=True)[0].norm() for x in (loss, fool))
            weight = self.args.adversarial * (pull / (push + 1e-4)).clamp_max(1e4)
            loss = loss + weight * fool + judge
            figures['adversarial'] = judge.detach()
        return loss + quantizer, figures

    def after_step(self):
        """Moves the codes, once for all parts of the batch.

        While quantized steps are few the average is over all of them, as k-means would have it.
        """
        if self.usages:
            t = (self.progress - self.plain) * self.steps
            tokens, vectors = (torch.cat(parts) for parts in zip(*self.usages))
            self.vae.quantize.update(tokens, vectors, decay=min(0.98, t / (t + 1)))

    @torch.no_grad()
    def evaluate(self):
        """PSNR in dB and use of the codebook on the validation set, as a dict.

        `usage k` is the share of what scale k could use at most: all codes, or its own tokens if
        fewer. Draws eight pictures: the originals, then what is rebuilt after each scale.
        """
        vae, V, psnr, rows, n = self.vae, len(self.vae.quantize.embedding.weight), 0, [], 0
        hits = torch.zeros(len(vae.patch_nums), V)
        for batch, _ in self.val_set.load(self.val_set.middles(2000)):
            images = to_tensor(batch.to(self.args.device))                      # (B, 3, H, W)
            tokens = vae.encode(images)                                         # K of (B, l)
            error = (vae.decode(tokens) - images).square().mean((1, 2, 3)) / 4  # (B,)
            psnr, n = psnr - 10 * error.clamp_min(1e-10).log10().sum().item(), n + len(images)
            hits += torch.stack([r_k.flatten().bincount(minlength=V) for r_k in tokens]).cpu()
            if not rows:
                rebuilt = vae.decode_scales([r_k[:8] for r_k in tokens])
                rows = [batch[:8].numpy()] + [to_uint8(x / 2 + 0.5) for x in rebuilt]
        save_grid(self.args.out / 'reconstructions.png', rows)
        usage = [(h > 0).sum().item() / min(V, n * p * p) for h, p in zip(hits, vae.patch_nums)]
        return {'PSNR': psnr / n, 'codes used': (hits.sum(0) > 0).sum().item(), 'of': V,
                **{f'usage {k}': u for k, u in enumerate(usage, 1)}}


class TransformerStage(nn.Module):
    """Stage 2: cross-entropy over the tokens of all scales alike, under the mask of Fig. 4.

    train and val are pairs of tokens (N, L) and labels (N,), as tokenize() returns them.
    """
    name = 'transformer'

    def __init__(self, args, vae, var, train, val, sampling):
        super().__init__()
        self.args, self.train_set, self.val_set, self.sampling = args, train, val, sampling
        self.steps, self.lr, self.vae, self.var = args.steps, args.lr, vae, var
        self.noises, self.usages = 1 + 2 * len(var.blocks), []

    def batches(self, start):
        for requests in order(len(self.train_set[0]), self.args, start, self.steps):
            yield [x[[i for i, _ in requests]] for x in self.train_set]

    def logits(self, tokens, labels, noise=None):
        """Teacher forcing: what the transformer says to the true tokens (B, L) of all scales."""
        maps = tokens.long().split([p * p for p in self.var.patch_nums], dim=1)
        return self.var(labels, self.vae.var_input(maps), noise)                # (B, L, V)

    def forward(self, tokens, labels, noise):
        logits = self.logits(tokens, labels, noise)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten().long())
        right = (logits.detach().argmax(-1) == tokens).float().mean()
        return loss, {'loss': loss.detach(), 'accuracy': right}

    def after_step(self):
        """Nothing: the codes stay as stage 1 left them."""

    @torch.no_grad()
    def evaluate(self):
        """Loss in nats and share of wrong tokens on the validation set (Section 5.2), as a dict.

        Of all scales and of the last alone. Draws eight pictures of each of the first ten classes.
        """
        loss, wrong, n = 0, 0, min(2000, len(self.val_set[0]))
        for tokens, labels in zip(*(x[:n].to(self.args.device).split(50) for x in self.val_set)):
            logits = self.logits(tokens, labels).transpose(1, 2)                # (B, V, L)
            loss += F.cross_entropy(logits, tokens.long(), reduction='none').sum(0) / n
            wrong += (logits.argmax(1) != tokens).sum(0) / n                    # (L,)
        classes, last = min(10, self.var.num_classes), self.var.patch_nums[-1] ** 2
        labels = torch.arange(classes).repeat_interleave(8)
        images = self.var.generate(self.vae, labels, seed=0, **self.sampling)
        save_grid(self.args.out / 'samples.png', np.split(to_uint8(images), classes))
        return {'loss': loss.mean().item(), 'loss last': loss[-last:].mean().item(),
                'error': wrong.mean().item(), 'error last': wrong[-last:].mean().item()}


# ------------------------------------------------------------------------------------------------
# One loop for both stages

def learning_rate(progress):
    """As a share of the peak: warm-up over 1/50 of the run, flat up to 5 %, then linear to 0.01."""
    return min(0.005 + 0.995 * progress / 0.02, 1 - 0.99 * max(0, progress - 0.05) / 0.95)


def make_optimizer(stage):
    """AdamW; no decay on biases, gains, positions, scale embeddings, AdaLN, attention offsets."""
    groups = {0.05: [], 0.: []}
    for name, p in stage.named_parameters():
        free = p.ndim < 2 or any(s in name for s in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        groups[0. if free else 0.05] += [p] if p.requires_grad else []
    return torch.optim.AdamW([{'params': ps, 'weight_decay': wd} for wd, ps in groups.items()],
                             lr=stage.lr, betas=(0.9, 0.95), fused=True)


def train_stage(stage, args, state):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step."""
    (rank, world), B, device, start = rank_and_world(), args.batch, args.device, state['step']
    optimizer, every = make_optimizer(stage), max(1, stage.steps // 5)
    learned = {n: m for n, m in stage.named_children() if n in ('vae', 'var', 'disc')}
    if state['optimizer']:
        optimizer.load_state_dict(state['optimizer'])
        for name, module in learned.items():
            module.load_state_dict(state[name])
    model, batches, stop, skipped = stage.train(), stage.batches(start), [], 0
    if world > 1:
        # Not every weight has a part in every step of stage 1: phi begins late, and so does L_G.
        late = stage.name == 'tokenizer'
        model = nn.parallel.DistributedDataParallel(stage, find_unused_parameters=late)
    began = saved = time.time()
    handlers = {number: signal.signal(number, lambda number, _: stop.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    for step in range(start, stage.steps + 1):
        stage.progress, last = step / max(1, stage.steps), step == stage.steps
        if rank == 0 and (last or step and step % every == 0):
            stage.eval()
            with precision(device):
                figures = stage.evaluate()
            stage.train()
            print(stage.name, step, *(f' {k} {v:.4g}' for k, v in figures.items()), flush=True)
            with open(args.out / 'log.csv', 'a') as f:
                f.writelines(f'{stage.name},{step},{time.time():.1f},{k},{v}\n'
                             for k, v in figures.items())
        # A signal may reach the processes at different steps: they agree on when to stop.
        stopped = torch.tensor(max(stop, default=0), device=device)
        if world > 1:
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
        if rank == 0 and (last or stopped or time.time() - saved > 60):
            state.update({name: module.state_dict() for name, module in learned.items()},
                         step=step, optimizer=optimizer.state_dict())
            write_whole(args.out / 'ckpt.pt', lambda f: torch.save(state, f))
            saved = time.time()
        if stopped:
            print(f'stopped at {stage.name} step {step}; --resume goes on', flush=True)
            sys.exit(128 + int(stopped))
        if last:
            break

        batch = next(batches)      # before seeding, as the first one takes a random number more
        seed = np.random.SeedSequence((args.seed, len(stage.name), step)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        noise = torch.rand(B, stage.noises)[rank * B // world:(rank + 1) * B // world]
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(stage.progress)
        optimizer.zero_grad()
        stage.usages.clear()
        for part in zip(*(x.to(device).chunk(args.accumulate) for x in (*batch, noise))):
            with precision(device):
                loss, figures = model(*part)
            (loss / args.accumulate).backward()
        finite = torch.nn.utils.clip_grad_norm_(stage.parameters(), 2.0).isfinite()
        skipped = 0 if finite else skipped + 1
        if finite:
            optimizer.step()
            stage.after_step()
        elif skipped < 10:
            print(f'{stage.name} {step}: a gradient is not finite, step left out', flush=True)
        else:
            raise Problem('ten steps in a row were not finite. ckpt.pt is the last good one: '
                          '--resume with a smaller --lr or --tokenizer-lr')
        if rank == 0 and step % max(1, min(50, stage.steps // 20)) == 0:
            pace = (time.time() - began) / (step + 1 - start)       # seconds a step, all included
            print(f'{stage.name} {step}/{stage.steps} ', *(
                f'{k} {v:.3f} ' for k, v in figures.items()), f'{B / pace:.0f} images/s ',
                f'{(stage.steps - step) * pace / 60:.0f} min left', flush=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def main():
    args, state = settings()
    (rank, world), ckpt = rank_and_world(), args.out / 'ckpt.pt'
    train, val, classes = read_data(args)
    torch.manual_seed(args.seed)
    if args.tokenizer == 'train':
        vae = VQVAE(args.sides, **args.network)
        # With all codes zero, the first residuals, from which the codes are drawn, are f itself.
        vae.quantize.embedding.weight.zero_()
    else:
        source = fetch('vae_ch160v4096z32.pth') if args.tokenizer == 'official' else args.tokenizer
        vae = VQVAE.from_state_dict(load_models(source)[0].state_dict(), args.sides)
        if vae.image_size != args.size:
            raise Problem(f'{source} makes {vae.image_size} px of scales {args.patch_nums}, '
                          f'not --size {args.size}')
    var = VAR(args.sides, args.depth, len(classes), *vae.quantize.embedding.weight.shape)
    if not state:
        small = dict(cfg=3., top_k=100, top_p=1.)     # small models want a tighter draw
        state = dict(version=VERSION, classes=classes, step=0, patch_nums=args.sides,
                     config={k: v for k, v in vars(args).items() if k not in MACHINE},
                     sampling=small if args.size < 64 else dict(cfg=1.5, top_k=900, top_p=0.96),
                     stage='tokenizer' if args.tokenizer == 'train' else 'transformer',
                     vae=vae.state_dict(), optimizer=None)
        if ckpt.exists() and rank == 0:
            ckpt.replace(args.out / 'ckpt.previous.pt')
    vae.load_state_dict(state['vae'])
    vae, var = vae.to(args.device), var.to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (vae, var)]
        first = f'{args.tokenizer_steps} steps' if args.tokenizer == 'train' else args.tokenizer
        with precision(args.device):
            kind = 'bfloat16' if torch.is_autocast_enabled(args.device.type) else 'float32'
        print(f'{len(train.items)} + {len(val.items)} pictures of {args.size} px in {len(classes)} '
              f'classes; scales {args.patch_nums}: {len(var.lvl_1L[0])} tokens a picture\n'
              f'tokenizer: {sizes[0]:.1f} M weights, {first}; transformer: depth {args.depth}, '
              f'{sizes[1]:.1f} M weights, {args.steps} steps; {args.batch} pictures a step\n'
              f'{world} x {args.device}, {kind}', flush=True)
    if state['stage'] == 'tokenizer':
        train_stage(TokenizerStage(args, vae, train, val).to(args.device), args, state)
        state.update(stage='transformer', step=0, optimizer=None)
    vae.eval().requires_grad_(False)
    with precision(args.device):
        maps = [tokenize(vae, pictures, args, pictures.flip) for pictures in (train, val)]
    train_stage(TransformerStage(args, vae, var, *maps, state['sampling']), args, state)


if __name__ == '__main__':
    run(main)
