"""Trains both stages of VAR (Fig. 4): the tokenizer, then the transformer, into one ckpt.pt.

    python train.py                                 # built-in shapes: minutes on a CPU
    python train.py --data cifar10                  # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet     # a folder of class folders, see README.md
    python train.py --resume                        # continues from ckpt.pt
    torchrun --nproc_per_node 8 train.py ...        # shares each batch among 8 processes

Paper: equation (5) and Section 3.2 for stage 1; Fig. 4, Section 4 and equation (6) for stage 2.
Departures from the paper and the released recipe:
- Stage 2 trains on stored tokens: of the centre crop, and of --views - 1 random crops.
- The learning rate decays to 0.01 of its peak at every depth. The peak is 1e-4 per 256 images, and
  at least 1e-4; some presets have others. AdamW's weight decay is 0.05. Batches and the number of
  steps are smaller.
- In the presets for CIFAR-10, Muon trains the weight matrices of the blocks, and AdamW the rest.
- L_P is LPIPS without its learned weights. In the presets for CIFAR-10 it compares the features of
  a small classifier that is first trained on the same images. L_G has a patch discriminator, not
  one like StyleGAN's. Stage 1 begins without quantization, and L_G sets in at its half.
What is random in a step depends on (seed, stage, step, rank) alone. On a CPU, a run that was
killed and resumed therefore ends with the same bits as one that was not. Several processes train as
one does, but for the dropout that each of them draws, and the classifier's batch normalisation,
which sees only the images of its process.
Writes into --out: ckpt.pt, to resume from; model.pt, the weights alone; log.csv, all figures;
reconstructions.png and samples.png; tokens-*.npy, the stored tokens.

Letters: B images per step, N images of a set, L tokens of all scales, l of one, K scales, V codes,
z code dimension.
"""
import argparse
import csv
import math
import os
import signal
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

from tokenizer import (VQVAE, UserError, all_processes, batch_size, conv3x3, crop, explain,
                       group_norm, make_grid, open_image, psnr, save_image, to_tensor,
                       to_uint8, write_file)
from var import (PRECISIONS, RELEASED, UNLOADABLE, VAR, VERSION, Parser, choose_precision,
                 compile_forward, number, pick_device, precision, rank_and_world, read_checkpoint,
                 run, wait_for_all)

# Addresses of what users fetch, and their sha256 or its first digits (torch.hub checks either).
VAE = ('https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
       '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c')
VGG = ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af')
CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')

SAVE_EVERY = 60         # at least so many seconds from one checkpoint to the next (0: every step)
SAVE_SHARE = 0.05       # at most this share of the time is spent on saving
MOST_SKIPPED = 30       # a run ends when so many steps in a row are not finite

# ---- Configuration ----


def option(default, help, kind=str, saved=True):
    """A field of Config that is also an option of the command line. kind converts its text; saved
    is False where a resumed run may have another value."""
    return field(default=default, metadata={'help': help, 'kind': kind, 'saved': saved})


def parse_sides(text):
    """'1,2,4' -> (1, 2, 4): the sides of the token maps, which have to rise."""
    sides = tuple(int(part) for part in text.split(','))
    if sides[0] < 1 or any(a >= b for a, b in zip(sides, sides[1:])):
        raise argparse.ArgumentTypeError(f'{text}: the sides of the token maps have to rise')
    return sides


count, at_least_1, nonnegative = number(int, 0), number(int, 1), number(float, 0, 1e6)


@dataclass
class Config:
    """Everything that defines a run, saved with its weights. The defaults are those of 256 px."""
    data: str = option('shapes', 'shapes, cifar10, or a folder of images')
    preset: str = option('', 'defaults to start from; else those of the data and the size')
    size: int = option(256, 'side of the images: 32, 64, 128, 256 or 512', at_least_1)
    classes: str = option('', 'use the first N classes of a folder, or the classes a,b,c')
    limit: int = option(0, 'use at most so many images per class of a folder; 0: all', count)
    patch_nums: tuple = option((1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
                               'sides of the token maps, as 1,2,4', parse_sides)
    depth: int = option(16, 'd: width 64 d, d heads, d blocks, equation (7)', at_least_1)
    saln: bool = option(False, 'share the AdaLN projection among the blocks, as at 512 px')
    tokenizer: str = option('official', 'train one, use the official one, or that of a file')
    init: str = option('', 'a file of weights to start from, for fine-tuning')
    tokenizer_steps: int = option(20000, 'steps of stage 1', count)
    tokenizer_batch: int = option(32, 'images per step of stage 1, of all processes', at_least_1)
    tokenizer_micro_batch: int = option(8, 'images per forward pass of stage 1', at_least_1)
    tokenizer_lr: float = option(1e-4, 'peak learning rate of stage 1', nonnegative)
    steps: int = option(50000, 'steps of stage 2, at most', count)
    epochs: float = option(300., 'passes of stage 2 over all stored views, at most; 0: no limit',
                           nonnegative)
    batch: int = option(256, 'images per step of stage 2, of all processes', at_least_1)
    micro_batch: int = option(8, 'images per forward pass of stage 2', at_least_1)
    lr: float = option(0., 'peak learning rate of stage 2; 0: 1e-4 per 256 images, at least 1e-4',
                       nonnegative)
    muon_lr: float = option(0., 'peak learning rate of Muon, for the weight matrices of the '
                            'blocks; 0: AdamW for all', nonnegative)
    views: int = option(1, 'stored crops per image: the centre, then random ones', at_least_1)
    flip: bool = option(False, 'mirror at random in stage 1, and every second view in stage 2, '
                        'which has two views at least')
    perceptual: float = option(1., 'weight of L_P in equation (5)', nonnegative)
    classifier_steps: int = option(0, 'steps of the classifier whose features L_P compares; it '
                                   'is trained first. 0: L_P compares those of VGG-16', count)
    adversarial: float = option(0.5, 'weight of L_G in equation (5), relative', nonnegative)
    seed: int = option(0, 'seed of everything random', count)
    # Set by the presets alone: the sizes of the VQVAE, and the sampling that suits the model.
    network: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=lambda: RELEASED['sampling'])
    # What follows does not define the run.
    out: Path = option(Path('.'), 'folder of ckpt.pt, model.pt, log.csv and images', Path, False)
    resume: bool = option(False, 'continue from ckpt.pt in --out', bool, False)
    device: str = option(None, 'cuda, mps or cpu; else the best there is', str, False)
    precision: str = option(None, f'{", ".join(PRECISIONS)}; else the best there is', str, False)
    workers: int = option(min(4, (os.cpu_count() or 1) - 1), 'processes that read images', count,
                          False)
    compile: bool = option(False, 'torch.compile the tokenizer and the transformer', bool, False)
    checkpointing: bool = option(False, 'recompute blocks in the backward pass, to save memory',
                                 bool, False)
    vgg: str = option(None, 'file of the VGG-16 weights, without internet', str, False)

    @property
    def has_classifier(self):
        """Whether the run begins with the classifier of L_P."""
        return self.tokenizer == 'train' and self.perceptual > 0 and self.classifier_steps > 0

    def settings(self):
        """What defines the run, and is saved with its weights, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.metadata.get('saved', True)}


# The presets hold what differs from Config. At 32 px a CPU makes more of many small steps than of
# few large ones: a minute of autoencoding CIFAR-10 ends at 27.1 dB with batches of 16, and at
# 25.5 dB with 32. What each choice gains is in experiments/README.md.
PLAIN = dict(
    size=32, patch_nums=(1, 2, 4, 8), depth=4, tokenizer='train', perceptual=0., adversarial=0.,
    tokenizer_batch=16, tokenizer_micro_batch=16, tokenizer_lr=1e-3,
    epochs=0., batch=16, micro_batch=16, lr=3e-3,
    network=dict(ch=32, ch_mult=(1, 2, 4), vocab_size=1024, z_channels=16, res_blocks=1,
                 normalise=False))
SMALL = dict(
    PLAIN, perceptual=1., classifier_steps=600, adversarial=0.5, tokenizer_steps=2800, steps=3000,
    batch=32, micro_batch=32, muon_lr=0.02, sampling=dict(cfg=6., top_k=100, top_p=1.))
PRESETS = {
    'shapes': dict(
        PLAIN, depth=3, tokenizer_steps=700, steps=1500, lr=5e-3,
        sampling=dict(cfg=4., top_k=20, top_p=1.),
        network=dict(PLAIN['network'], ch=16, vocab_size=256, z_channels=8)),
    '32': SMALL,
    'long': dict(
        SMALL, depth=5, flip=True, classifier_steps=1500, tokenizer_steps=7000, steps=4600,
        batch=64, micro_batch=64),
    '32-gpu': dict(
        SMALL, depth=8, tokenizer_steps=8000, tokenizer_batch=256, tokenizer_micro_batch=256,
        steps=8000, batch=256, micro_batch=256, network=dict(SMALL['network'], ch=64)),
    # At 64 px an eighth of the side, as 1,2,3,4,6,8, loses too much: after 400 steps of stage 1 on
    # Imagenette it ends at 20.1 dB, a quarter of the side at 23.0 dB. Of 250 samples, 81 % are
    # classified correctly with cfg 4 and 83 % with 8, but their Frechet distance is 49 and 89.
    '64': dict(
        PLAIN, size=64, patch_nums=(1, 2, 4, 8, 16), flip=True, tokenizer_steps=2200, steps=4700,
        sampling=dict(cfg=4., top_k=100, top_p=1.)),
    '128': dict(size=128, tokenizer='train', network=dict(ch=96, ch_mult=(1, 1, 2, 4))),
    '256': dict(size=256, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4))),
    '512': dict(size=512, network=dict(ch=160, ch_mult=(1, 1, 2, 2, 4)),
                patch_nums=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), saln=True)}


def parse():
    """What the command line gives, as a dict; an option that is not given is not in it."""
    parser = Parser(__doc__, epilog='[In brackets]: the defaults of 256 px.',
                    argument_default=argparse.SUPPRESS)
    for f in fields(Config):
        if 'help' not in f.metadata:
            continue
        name, text = '--' + f.name.replace('_', '-'), f.metadata['help']
        if f.default not in (None, ''):
            text += f' [{f.default}]'           # of 256 px, or the same in every preset
        if f.type is bool:
            parser.add_argument(name, action='store_true', help=text)
        else:
            parser.add_argument(name, type=f.metadata['kind'], help=text, metavar='X')
    return vars(parser.parse_args())


def default_preset(data, size):
    """The preset for the data and for the size that was asked for; size: None if none was."""
    if data == 'shapes' and size in (None, 32):
        return 'shapes'
    if size is not None:
        return str(size)
    is_folder = data != 'cifar10' and Path(data).is_dir() and cifar10_path(data) is None
    return '256' if is_folder else '32'


def make_config(given, saved):
    """The Config of a run. The command line (given) comes first, then what a resumed run had
    (saved), then the preset, then the defaults. UserError for values that do not fit together."""
    known = {f.name for f in fields(Config)}            # an older run can have others
    chosen = {name: value for name, value in saved.items() if name in known} | given
    if 'preset' in given and given['preset'] != saved.get('preset', given['preset']):
        raise UserError(f'--preset {given["preset"]}: this run has --preset {saved["preset"]}')
    if not chosen.get('preset'):
        chosen['preset'] = default_preset(chosen.get('data', Config.data), chosen.get('size'))
    if chosen['preset'] not in PRESETS:
        raise UserError(f'no preset for {chosen["preset"]}: choose from {", ".join(PRESETS)}')
    preset = PRESETS[chosen['preset']]
    config = Config(**{**preset, **chosen})
    if config.size != preset['size']:
        raise UserError(f'--size {config.size} does not fit --preset {config.preset}')
    latent = config.size // 2 ** (len(config.network['ch_mult']) - 1)       # its side, P
    if config.patch_nums[-1] != latent:
        raise UserError(f'--patch-nums: the last side must be {latent} for preset {config.preset}')
    if config.precision not in (None, *PRECISIONS):
        raise UserError(f'--precision {config.precision}: choose from {", ".join(PRECISIONS)}')
    _, world = rank_and_world()
    if config.batch % world or config.tokenizer_batch % world:
        raise UserError(f'--batch {config.batch} and --tokenizer-batch {config.tokenizer_batch} '
                        f'must be multiples of the {world} processes')
    if not config.lr:
        # Section 4; the lower limit is not the paper's.
        config.lr = 1e-4 * max(1, config.batch / 256)
    if config.flip:
        config.views = max(config.views, 2)     # the second view is the first that is mirrored
    return config


# ---- Data: shapes, CIFAR-10, folders ----

# The ten shapes: which points of the unit disc belong to each. A point is a complex number x + iy,
# y downwards. A point is in the star if it is outside of at most one of the lines between the tips.
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

    One of four colours on black or white. Colour, place, size and tilt are random and depend on the
    seed alone. Nine points per pixel tell how much of it is covered, so that edges are smooth.
    """
    colours = np.array([(220, 40, 40), (240, 200, 40), (50, 170, 60), (50, 90, 220)])
    inside = list(SHAPES.values())
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, 3 * size)
    labels = rng.integers(len(SHAPES), size=n)
    images = np.empty((n, size, size, 3), np.uint8)
    for image, label in zip(images, labels):
        front, back = rng.choice(colours), rng.choice([15, 245])
        radius, tilt = rng.uniform(.3, .42), rng.uniform(-.2, .2)
        x, y = rng.uniform(radius, 1 - radius, 2)
        points = ((grid - x) + 1j * (grid - y)[:, None]) / (radius * np.exp(1j * tilt))
        covered = inside[label](points).reshape(size, 3, size, 3).mean((1, 3))
        image[:] = back + covered[..., None] * (front - back)               # (size, size, 3)
    return images, labels


def fetch(address, sha256, folder=Path('data')):
    """The path of a file in folder, downloaded first if it is not there.

    Raises UserError without a network, or if the checksum is wrong: nothing is then left behind.
    """
    path = folder / address.split('/')[-1]
    if not path.exists() and os.environ.get('LOCAL_RANK', '0') == '0':      # once per machine
        folder.mkdir(parents=True, exist_ok=True)
        with explain(f'cannot fetch {address}', (OSError, RuntimeError), f'bring it to {path}'):
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
    wait_for_all()
    return path


def cifar10_path(data):
    """The archive or the folder of CIFAR-10 in binary form that a path means, or None."""
    for name in ('', 'cifar-10-batches-bin', 'cifar-10-binary.tar.gz'):
        path = Path(data) / name
        is_archive = path.is_file() and path.name.endswith('.tar.gz')
        if is_archive or (path / 'test_batch.bin').is_file():
            return path
    return None


def cifar10(path):
    """Training set and validation set, each uint8 (N, 32, 32, 3) and int64 (N,), and the classes.

    A record is a label byte and 3 x 1024 bytes of red, green and blue rows. The archive is read in
    memory, file by file and by name: nothing in it can be written to the disk.
    Raises UserError for a file that is not the whole of CIFAR-10.
    """
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    damaged = (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error)
    with explain(f'{path} is not the whole binary CIFAR-10', damaged, 'fetch it again'):
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in names}
        else:
            with tarfile.open(path) as tar:
                files = {Path(member.name).name: tar.extractfile(member).read() for member in tar
                         if Path(member.name).name in names}
        batches = b''.join(files[name] for name in names[:6])
        records = np.frombuffer(batches, np.uint8).reshape(-1, 3073)        # (60000, 3073)
        classes = files['batches.meta.txt'].decode().split()
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = records[:, 0].astype(np.int64)
    n = len(records) // 6                                       # the sixth batch is for validation
    return (images[:-n], labels[:-n]), (images[-n:], labels[-n:]), classes


LAYOUTS = ('expected are <class>/*, or train/<class>/* with or without val/<class>/*, or Tiny '
           'ImageNet or ImageNet as distributed, or images alone')
TRAIN_NAMES = ('train', 'training')
VAL_NAMES = ('val', 'valid', 'validation', 'test')              # the first one that is there


def tell(text):
    """Prints a line, in the first process alone."""
    if rank_and_world()[0] == 0:
        print(text, flush=True)


def subfolders(folder):
    """Names of the subfolders that are not hidden, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != '.')


def find_splits(root):
    """The names of root's subfolders for training and for validation; '' where there is none."""
    by_name = {name.lower(): name for name in subfolders(root)}
    train = [by_name[name] for name in TRAIN_NAMES if name in by_name]
    val = [by_name[name] for name in VAL_NAMES if name in by_name]
    return (train[0] if train else ''), (val[0] if train and val else '')


def images_below(root, folder):
    """Image files at any depth below root / folder, sorted: names relative to root.

    As a numpy array of bytes, which takes a tenth of the memory of a list of Path objects.
    """
    endings, names = tuple(Image.registered_extensions()), []
    for path, folders, files in os.walk(os.path.join(root, folder), followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != '.')
        relative = os.path.relpath(path, root)
        names += [os.fsencode(os.path.join(relative, name)) for name in sorted(files)
                  if name[0] != '.' and name.lower().endswith(endings)]
    return np.array(names, dtype=np.bytes_)


def by_class(root, folder):
    """{class: names of images} of the class folders in root / folder. Without any, the images that
    lie in it are the class ''. {} without images."""
    found = {name: images_below(root, os.path.join(folder, name))
             for name in subfolders(root / folder)}
    empty = [name for name, names in found.items() if len(names) == 0]
    found = {name: names for name, names in found.items() if len(names) > 0}
    if not found:
        names = images_below(root, folder)
        return {'': names} if len(names) > 0 else {}
    if empty:
        tell(f'no images in these class folders, left out: {", ".join(empty)}')
    return found


def validation_images(root, folder, train):
    """{class: names of images} of a validation folder; {} without any, or without labels."""
    found = by_class(root, folder)
    annotations = root / folder / 'val_annotations.txt'
    if found and annotations.exists():                          # Tiny ImageNet: file, class, box
        with open(annotations, newline='') as f:
            class_of = {row[0]: row[1] for row in csv.reader(f, delimiter='\t')}
        groups = {}
        for name in np.concatenate(list(found.values())):
            label = class_of.get(os.path.basename(os.fsdecode(name)), 'unknown')
            groups.setdefault(label, []).append(name)
        return {label: np.array(names) for label, names in groups.items()}
    without_labels = '' in found
    return {} if without_labels and '' not in train else found


def hold_out(groups):
    """Splits {class: names} for validation: every tenth image of a class, or the second one of a
    class with fewer than ten. Where every class has a single image, the same of the classes."""
    if all(len(names) == 1 for names in groups.values()):
        held = list(groups)[9::10] if len(groups) >= 10 else list(groups)[1:2]
        return ({name: groups[name] for name in groups if name not in held},
                {name: groups[name] for name in held})
    train, val = {}, {}
    for name, names in groups.items():
        held = np.arange(len(names)) % 10 == (9 if len(names) >= 10 else 1)
        train[name], val[name] = names[~held], names[held]
    return train, val


def labelled(groups, classes):
    """{class: names of images} -> all their names (N,), and labels (N,): indices of classes."""
    present = [name for name in classes if name in groups]
    labels = [np.full(len(groups[name]), classes.index(name)) for name in present]
    return np.concatenate([groups[name] for name in present]), np.concatenate(labels)


def read_folder(root, classes='', limit=0):
    """Training set and validation set, each names of files (N,) and labels (N,); the classes; the
    folder that the names are relative to; words for the classes. Prints what is used as what.

    See LAYOUTS for what is understood; raises UserError for anything else.
    """
    root = asked = Path(root)
    if not root.is_dir():
        what = 'a file; unpack it first' if root.is_file() else 'no such folder'
        raise UserError(f'--data {root}: {what}; {LAYOUTS}')
    # Archives often unpack into a folder with a single folder in it.
    while not find_splits(root)[0]:
        inner = subfolders(root)
        if len(inner) != 1 or not subfolders(root / inner[0]):
            break
        root = root / inner[0]
    train_folder, val_folder = find_splits(root)
    train = by_class(root, train_folder)
    if not train:
        packed = [*root.glob('**/*.parquet'), *root.glob('**/*.zip')]
        hint = f'{packed[0].name} has to be unpacked into image files; ' if packed else ''
        raise UserError(f'--data {asked}: no images in it; {hint}{LAYOUTS}')
    used = f'{root / train_folder}: training'
    val = validation_images(root, val_folder, train) if val_folder else {}
    if val:
        used += f'; {root / val_folder}: validation'
    elif val_folder:
        used += f'; {root / val_folder}: no labelled images, not used'
    if classes:
        chosen = sorted(train)[:int(classes)] if classes.isdecimal() else classes.split(',')
        unknown = [name for name in chosen if name not in train]
        if unknown:
            raise UserError(f'--classes {unknown[0]}: no such class folder in {root}')
        train = {name: train[name] for name in chosen}
        val = {name: names for name, names in val.items() if name in train}
    stray = sorted({*val} - {*train})
    if stray:
        raise UserError(f'{root / val_folder}: no training images of class {stray[0]}; {LAYOUTS}')
    names = sorted(train)
    if not val:
        train, val = hold_out(train)
        used += '; every tenth image of a class is held out for validation'
    if limit:
        train = {name: files[:limit] for name, files in train.items()}
        val = {name: files[:limit] for name, files in val.items()}
    if not any(map(len, train.values())) or not any(map(len, val.values())):
        raise UserError(f'--data {asked}: fewer than two images; {LAYOUTS}')
    tell(used)
    sets = labelled(train, names), labelled(val, names)
    if names == ['']:
        names = [root.resolve().name]
    return *sets, names, root, class_words(root, names)


def class_words(root, names):
    """What words.txt or LOC_synset_mapping.txt call each class; '' where nothing is known."""
    words = {}
    for path in (root / 'words.txt', root / 'LOC_synset_mapping.txt'):
        if path.exists():
            for line in path.read_text(errors='replace').splitlines():
                name, _, word = line.strip().partition('\t' if '\t' in line else ' ')
                words[name] = word
    return [words.get(name, '') for name in names]


def own_process_group(worker):
    """Keeps Ctrl-C and torchrun's signals, which go to a process group, from a reading process."""
    if hasattr(os, 'setpgrp'):
        os.setpgrp()


def spread(N, n):
    """n of the indices below N, evenly spread; all of them if N is smaller."""
    n = min(n, N)
    return [i * N // n for i in range(n)]


class ImageSet(torch.utils.data.Dataset):
    """A labelled set of images: uint8 (N, H, W, 3), or file names (N,) below a folder.

    An item is asked for as (index, draw, mirror). draw: None for the centre crop, or the seed of a
    random one. mirror: whether the image is flipped left to right.
    """

    def __init__(self, items, labels, size, folder=''):
        self.items, self.labels, self.size, self.folder = items, labels, size, str(folder)
        self.reported = set()       # files that could not be read
        self.chosen = {}            # what some() has read

    def __len__(self):
        return len(self.items)

    def path(self, index):
        return os.path.join(self.folder, os.fsdecode(self.items[index]))

    def __getitem__(self, request):
        """uint8 (size, size, 3), its index, and the messages of the files that could not be read.

        The next readable image takes the place of one that is not. If there is none, load() ends
        the run.
        """
        index, draw, mirror = request
        image, bad = None, []
        while image is None:
            try:
                if self.items.ndim > 1:
                    image = Image.fromarray(self.items[index])
                else:
                    image = open_image(self.path(index), self.size)
            except UserError as e:
                bad.append(str(e))
                index = (index + 1) % len(self)
                if len(bad) == len(self):
                    image = Image.new('RGB', (self.size, self.size))
        # The release makes the shorter side 1.125 x size. Here a small image is not enlarged to it.
        short = int(np.clip(min(image.size), self.size, round(1.125 * self.size)))
        rng = np.random.default_rng(draw) if draw is not None else None
        pixels = crop(image, self.size, short, rng)                         # (size, size, 3)
        return pixels[:, ::-1] if mirror else pixels, index, bad

    @staticmethod
    def collate(items):
        images, indices, bad = zip(*items)
        return torch.from_numpy(np.stack(images)), torch.tensor(indices), sum(bad, [])

    def load(self, batches, workers=0):
        """For each list of requests: images (B, size, size, 3) uint8, and indices (B,).

        Names each file that cannot be read once, on stderr. UserError if there is no other.
        """
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=workers,
                                             collate_fn=self.collate,
                                             worker_init_fn=own_process_group)
        for images, indices, bad in loader:
            for message in sorted({*bad} - self.reported):
                self.reported.add(message)
                print(f'skipped: {message} ({len(self.reported)} so far)', file=sys.stderr,
                      flush=True)
            if len(self.reported) == len(self):
                raise UserError(f'none of the {len(self)} images can be read')
            yield images, indices

    def centres(self, n):
        """Requests for the centre crops of n images, evenly spread, in batches that fit."""
        requests, B = [(i, None, False) for i in spread(len(self), n)], batch_size(self.size)
        return [requests[start:start + B] for start in range(0, len(requests), B)]

    def some(self, n, workers=0):
        """n images, evenly spread: uint8 (n, size, size, 3) and their labels (n,). They are read at
        the first call and kept."""
        if n not in self.chosen:
            images, indices = zip(*self.load(self.centres(n), workers))
            self.chosen[n] = torch.cat(images), torch.from_numpy(self.labels)[torch.cat(indices)]
        return self.chosen[n]


def read_data(config):
    """Two ImageSets, for training and validation, and the classes and words for them."""
    path = fetch(*CIFAR10) if config.data == 'cifar10' else cifar10_path(config.data)
    folder, words = '', None
    if config.data == 'shapes':
        train, val = shapes(8000, config.size, seed=1), shapes(1000, config.size, seed=2)
        classes = list(SHAPES)
    elif path:
        train, val, classes = cifar10(path)
    else:
        train, val, classes, folder, words = read_folder(config.data, config.classes, config.limit)
    train = ImageSet(*train, config.size, folder)
    val = ImageSet(*val, config.size, folder)
    return train, val, classes, words or [''] * len(classes)


def step_rows(n, batch, seed, start, stop):
    """For each step from start: the rows of this process's part of the batch, [(row, place)].

    Every epoch is one permutation of the n rows. A row depends only on its place in the run, so
    that a resumed run sees the same rows.
    """
    rank, world = rank_and_world()

    @lru_cache(2)                               # a batch can reach into the next epoch
    def permutation(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n)

    for step in range(start, stop):
        first = step * batch + rank * batch // world
        places = range(first, first + batch // world)
        yield [(int(permutation(place // n)[place % n]), place) for place in places]


# ---- Stored tokens: stage 2 never runs the encoder ----


def tokens_key(vae, images, views, config):
    """A number that changes with the tokenizer, the images, or how they are cropped."""
    crops = (views, config.flip, config.seed) if views > 1 else views
    key = zlib.crc32(repr((vae.patch_nums, images.size, crops)).encode())
    for weights in vae.state_dict().values():
        key = zlib.crc32(weights.cpu().numpy().tobytes(), key)
    if images.items.ndim == 1:                                  # names of files
        for index in range(len(images)):
            try:
                about = os.stat(images.path(index))
                key = zlib.crc32(b'%d %d' % (about.st_size, about.st_mtime_ns), key)
            except OSError:                                     # it is reported when it is read
                key = zlib.crc32(b'unreadable', key)
    return zlib.crc32(np.ascontiguousarray(images.items), key)


def open_tokens(path, shape):
    """The file of stored tokens, memory-mapped; made if it is not there, full of zeros."""
    if rank_and_world()[0] == 0 and not path.exists():
        for old in path.parent.glob(path.name.rpartition('-')[0] + '-*.npy'):
            old.unlink()                                # of another tokenizer or other images
        part = path.with_suffix('.part')
        np.lib.format.open_memmap(part, 'w+', np.int16, shape).flush()
        part.replace(path)
    wait_for_all()
    with explain(path, (OSError, ValueError), 'delete it'):
        return np.lib.format.open_memmap(path, 'r+')


@torch.no_grad()
def tokenize(vae, images, config, name, views=1):
    """Tokens of all images and their labels: memory-mapped int16 (N, views, L), and int64 (N,).

    The first view is the centre crop, the others are random ones; with flip, every second view is
    mirrored. Stored is token + 1, or -1 for a file that cannot be read, and 0 for what is still to
    be made: the file tokens-<name>-<key>.npy in --out grows while it is made, and a run that was
    killed continues where it was.
    """
    (rank, world), L = rank_and_world(), sum(p * p for p in vae.patch_nums)
    if vae.quantize.V > np.iinfo(np.int16).max - 1:
        raise UserError(f'tokens are stored in 16 bits: {vae.quantize.V} codes are too many')
    # All processes need the same key, even where another machine has other file times.
    key = tokens_key(vae, images, views, config) if rank == 0 else 0
    key = int(all_processes(torch.tensor([key], device=config.device))[0])
    config.out.mkdir(parents=True, exist_ok=True)
    stored = open_tokens(config.out / f'tokens-{name}-{key:08x}.npy', (len(images), views, L))
    missing = np.flatnonzero(stored[:, 0, 0] == 0)
    missing = missing[missing % world == rank]                  # this process's part of the images
    B = batch_size(images.size)
    batches = [missing[start:start + B] for start in range(0, len(missing), B)]

    def requests():
        for batch in batches:
            crops = [(int(i), None, False) for i in batch]
            for view in range(1, views):
                mirror = config.flip and view % 2 == 1
                crops += [(int(i), (config.seed, view, int(i)), mirror) for i in batch]
            yield crops

    began = time.time()
    for done, (wanted, (pixels, indices)) in enumerate(
            zip(batches, images.load(requests(), config.workers)), start=1):
        parts = [to_tensor(part.to(config.device)) for part in pixels.split(len(wanted))]
        rows = torch.stack([torch.cat(vae.encode(part), dim=1) for part in parts], dim=1)
        rows = rows.cpu().numpy().astype(np.int16) + 1                      # (B, views, L)
        rows[indices[:len(wanted)].numpy() != wanted] = -1      # another image took the place
        # The element that tells whether an image is done is written last.
        stored[wanted, :, 1:] = rows[:, :, 1:]
        stored[wanted, 1:, 0] = rows[:, 1:, 0]
        stored[wanted, 0, 0] = rows[:, 0, 0]
        if done % 40 == 0:
            left = (time.time() - began) / done * (len(batches) - done)
            tell(f'tokens of {name}: {B * done} of {len(missing)} images, {left:.0f} s left')
    stored.flush()
    wait_for_all()
    return stored, images.labels


def readable(stored):
    """Which rows of stored tokens (N, views, L), flattened to (N * views), hold tokens."""
    return np.flatnonzero(stored[:, :, 0] > 0)


# ---- The learned losses of equation (5) ----


class PerceptualLoss(nn.Module):
    """L_P of (5): the distance of two images in the features of a network, at several depths. This
    is LPIPS without its learned weights. The networks below have the method features(): images
    (B, 3, H, W) in [-1, 1] -> a map of each depth, (B, channels, height, width)."""

    def forward(self, rebuilt, images):
        """Images (B, 3, H, W) in [-1, 1], twice -> their mean distance, a scalar."""
        with torch.no_grad():                                   # the real images need no gradient
            real = self.features(images)
        distances = []
        for f, g in zip(self.features(rebuilt), real):
            # Vectors of unit length at every place.
            f, g = F.normalize(f.float(), dim=1), F.normalize(g.float(), dim=1)
            distances.append((f - g).square().sum(1).mean())
        return sum(distances) / len(distances)


class VGG16(PerceptualLoss):
    """Features of five depths of a VGG-16 that was trained on ImageNet, as in LPIPS.

    weights: a dict, torchvision's vgg16-397923af.pth. RuntimeError if it is another one.
    """
    WIDTHS = (64, 64, 'pool', 128, 128, 'pool', 256, 256, 256, 'pool', 512, 512, 512, 'pool',
              512, 512, 512, 'pool')

    def __init__(self, weights):
        super().__init__()
        layers, c = [], 3
        for width in self.WIDTHS:
            if width == 'pool':
                layers += [nn.MaxPool2d(2)]
            else:
                layers += [conv3x3(c, width), nn.ReLU()]
                c = width
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        convs = {name.removeprefix('features.'): value for name, value in weights.items()
                 if name.startswith('features.')}
        self.layers.load_state_dict(convs)
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer('deviation', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def features(self, images):
        x, found = (images / 2 + 0.5 - self.mean) / self.deviation, []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):                 # a depth ends
                found.append(x)
            x = layer(x)
        return found


class Classifier(PerceptualLoss):
    """Features of three depths of a classifier that is trained on the same images.

    At 32 px a VGG-16 would cost more than the tokenizer. The features have the sides H, H/2, H/4.
    Batch normalisation learns faster here than group normalisation: after 300 steps on CIFAR-10,
    61 % of the validation images are classified correctly, and 46 % with the other.
    """

    def __init__(self, num_classes, ch=32):
        super().__init__()
        depths, c = [], 3
        for width, stride in ((ch, 1), (2 * ch, 2), (4 * ch, 2)):
            depths.append(nn.Sequential(
                nn.Conv2d(c, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU()))
            c = width
        self.depths = nn.ModuleList(depths)
        self.head = nn.Linear(c, num_classes)
        self.to(memory_format=torch.channels_last)

    def features(self, images):
        x, found = images.contiguous(memory_format=torch.channels_last), []
        for depth in self.depths:
            x = depth(x)
            found.append(x)
        return found

    def classify(self, images):
        """Images (B, 3, H, W) -> logits (B, classes), float32."""
        return self.head(self.features(images)[-1].mean((2, 3))).float()


class PatchDiscriminator(nn.Sequential):
    """(B, 3, H, W) -> (B, 1, H/8, W/8): a score per patch, above 0 for real, below for rebuilt.
    VQGAN's, where (5) has one like StyleGAN's."""

    def __init__(self, ch=64):
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c in (ch, 2 * ch):
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), group_norm(2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, conv3x3(4 * ch, 1))


class AdversarialLoss(nn.Module):
    """lambda_G L_G of (5): the hinge loss of a patch discriminator, with the weight of VQGAN.

    lambda_G is `share` times the ratio of two gradient norms at the decoder's last layer: of the
    other losses, and of the adversarial loss. The gradients are those of the whole batch (all
    micro-batches and processes) of the step before, because a step's own are complete only after
    its last micro-batch.
    """

    def __init__(self, share, last_layer):
        super().__init__()
        self.share = share
        self.disc = PatchDiscriminator()
        self.register_buffer('weight', torch.zeros(()))                     # lambda_G
        # Sums over the micro-batches of one step, and so not part of a checkpoint.
        self.register_buffer('grad_others', torch.zeros_like(last_layer), persistent=False)
        self.register_buffer('grad_fool', torch.zeros_like(last_layer), persistent=False)

    def forward(self, images, rebuilt, others, last_layer, fraction):
        """The loss to minimise, of decoder and discriminator at once, a scalar.

        images, rebuilt (B, 3, H, W); others: the sum of the other losses, a scalar; fraction: how
        much of the batch this micro-batch is.
        """
        # For the decoder the discriminator's weights are constants, and the other way round, so
        # that one optimizer and one backward pass serve both.
        constants = {name: p.detach() for name, p in self.disc.named_parameters()}
        # In float32, because the gradient of a mean, times lambda_G and a scaler, exceeds float16.
        fool = -torch.func.functional_call(self.disc, constants, rebuilt).float().mean()
        real, fake = self.disc(images).float(), self.disc(rebuilt.detach()).float()
        judge = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2            # the discriminator's
        # The factor keeps small gradients from vanishing in float16; their ratio is the same.
        for loss, total in ((others, self.grad_others), (fool, self.grad_fool)):
            (gradient,) = torch.autograd.grad(4096 * loss, last_layer, retain_graph=True)
            total += fraction * gradient
        return self.weight * fool + judge

    @torch.no_grad()
    def after_step(self):
        """Sets lambda_G for the next step, from the gradients of the whole batch."""
        for total in (self.grad_others, self.grad_fool):
            if dist.is_initialized():
                dist.all_reduce(total)
        weight = self.share * self.grad_others.norm() / (self.grad_fool.norm() + 1e-4)
        self.weight.copy_(torch.where(weight.isfinite(), weight.clamp_max(1e4), self.weight))
        self.grad_others.zero_()
        self.grad_fool.zero_()


# ---- The stages: what is trained, on what, and by which loss ----


def random_crops(images, config, batch, start, stop):
    """For each step from start: images (B, size, size, 3) uint8 and their indices (B,), for this
    process. Crops and, with config.flip, mirroring are random."""
    def requests():
        for rows in step_rows(len(images), batch, config.seed, start, stop):
            draws = [(row, (config.seed, place)) for row, place in rows]
            yield [(row, draw, config.flip and np.random.default_rng((*draw, 1)).random() < 0.5)
                   for row, draw in draws]

    return images.load(requests(), config.workers)


class Stage(nn.Module):
    """What the loop trains. forward(*batch) returns the loss, a scalar, and figures to show. And:

    name, number            in the log, and in the seed of a step
    steps, batch, micro_batch, lr, muon_lr      muon_lr 0: AdamW for all
    rows                    what one epoch consists of
    step                    is set by the loop
    learned()               the modules that a checkpoint holds, by name
    batches(start)          for each step from start: this process's tensors, on the CPU
    after_step()            what follows the optimizers' step
    evaluate()              figures on validation images, by name; {}: none yet
    """
    step, muon_lr = 0, 0.

    def after_step(self):
        pass


class ClassifierStage(Stage):
    """Before stage 1: the classifier whose features L_P compares. Its batch and learning rate are
    those that suit CIFAR-10 on a CPU."""
    name, number = 'classifier', 3
    lr = 3e-3

    def __init__(self, config, classifier, train, val):
        super().__init__()
        self.config, self.classifier, self.train_set, self.val_set = config, classifier, train, val
        self.steps = config.classifier_steps
        self.batch = self.micro_batch = 128 - 128 % rank_and_world()[1]
        self.rows = len(train)

    def learned(self):
        return {'classifier': self.classifier}

    def batches(self, start):
        labels = torch.from_numpy(self.train_set.labels)
        for images, indices in random_crops(self.train_set, self.config, self.batch, start,
                                            self.steps):
            yield images, labels[indices]

    def forward(self, images, labels):
        """uint8 (B, H, W, 3), labels (B,) -> cross-entropy in nats, a scalar, and figures."""
        logits = self.classifier.classify(to_tensor(images))                # (B, classes)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {'accuracy': accuracy}

    @torch.no_grad()
    def evaluate(self):
        """Share of a thousand validation images that are classified correctly."""
        images, labels = self.val_set.some(1000, self.config.workers)       # (n, H, W, 3), (n,)
        found = []
        for part in images.split(batch_size(self.config.size)):
            logits = self.classifier.classify(to_tensor(part.to(self.config.device)))
            found.append(logits.argmax(1).cpu())
        return {'accuracy': (torch.cat(found) == labels).double().mean().item()}


class TokenizerStage(Stage):
    """Stage 1 of Fig. 4: the VQVAE, by equation (5)."""
    name, number = 'tokenizer', 1
    # The first quarter of the steps trains an autoencoder without quantization. The second half
    # has the adversarial loss, too.
    quantize_from, adversarial_from = 0.25, 0.5

    def __init__(self, config, vae, train, val, perceptual=None):
        super().__init__()
        self.config, self.vae, self.train_set, self.val_set = config, vae, train, val
        self.steps, self.lr = config.tokenizer_steps, config.tokenizer_lr
        self.batch, self.micro_batch = config.tokenizer_batch, config.tokenizer_micro_batch
        self.rows = len(train)
        self.assigned = []              # tokens and vectors of the micro-batches of a step
        if config.init:                 # a tokenizer that is trained already
            self.quantize_from = 0.
        self.perceptual, self.adversarial = perceptual, None
        if config.adversarial:
            self.adversarial = AdversarialLoss(config.adversarial, vae.decoder.conv_out.weight)

    def train(self, mode=True):
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()      # its batch normalisation is fixed
        return self

    @property
    def has_adversarial_loss(self):
        late = self.step >= self.adversarial_from * self.steps
        return self.adversarial is not None and late

    def learned(self):
        modules = {'vae': self.vae, 'adversarial': self.adversarial}
        return {name: module for name, module in modules.items() if module is not None}

    def batches(self, start):
        for images, _ in random_crops(self.train_set, self.config, self.batch, start, self.steps):
            yield (images,)

    def forward(self, images):
        """uint8 (B, H, W, 3) -> the loss (5), a scalar, and figures to show."""
        images = to_tensor(images)                                          # (B, 3, H, W)
        if self.step < self.quantize_from * self.steps:
            rebuilt, quantizer_loss = self.vae.to_image(self.vae.to_latent(images)), 0.
        else:
            rebuilt, quantizer_loss, tokens, vectors = self.vae(images)
            self.assigned.append((tokens, vectors))
        mse = F.mse_loss(rebuilt, images)                                   # || im - im_hat ||
        # L1 is not in (5): it keeps edges sharper.
        loss = mse + 0.2 * F.l1_loss(rebuilt, images) + quantizer_loss      # + || f - f_hat ||
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4),             # peak to peak is 2
                   'quantizer': torch.as_tensor(quantizer_loss).detach()}
        if self.perceptual is not None:
            distance = self.perceptual(rebuilt, images)                     # L_P
            loss = loss + self.config.perceptual * distance                 # + lambda_P L_P
        if self.has_adversarial_loss:
            last_layer, fraction = self.vae.decoder.conv_out.weight, len(images) / self.batch
            loss = loss + self.adversarial(images, rebuilt, loss, last_layer, fraction)
            figures['lambda_G'] = self.adversarial.weight.clone()
        return loss, figures

    def after_step(self):
        """Moves the codebook, with the vectors of all micro-batches. In quantized step t it becomes
        the mean over the t + 1 batches so far, as in k-means; from t = 49 on it is an EMA with
        decay 0.98. For a tokenizer that was trained before it is one from the start."""
        if self.assigned:
            t = self.step - self.quantize_from * self.steps
            tokens = torch.cat([tokens for tokens, _ in self.assigned])     # (B, L)
            vectors = torch.cat([vectors for _, vectors in self.assigned])  # (B, L, z)
            decay = 0.98 if self.config.init else min(0.98, t / (t + 1))
            self.vae.quantize.update(tokens, vectors, decay)
            self.assigned.clear()
        if self.has_adversarial_loss:
            self.adversarial.after_step()

    @torch.no_grad()
    def evaluate(self):
        """PSNR and codebook usage on validation images. Writes reconstructions.png: eight images,
        and below each its reconstructions from 1, 2, ... K scales. {} before quantization."""
        if self.step <= self.quantize_from * self.steps:
            return {}
        vae, device = self.vae, self.config.device
        n = 1000 if self.config.size <= 64 else 200
        images, _ = self.val_set.some(n, self.config.workers)               # (n, H, W, 3)
        few = images[spread(len(images), min(8, batch_size(self.config.size)))]
        scales = vae.decode_scales(vae.encode(to_tensor(few.to(device))))   # K of (8, 3, H, W)
        rows = [few.numpy(), *(to_uint8(x / 2 + 0.5) for x in scales)]
        save_image(self.config.out / 'reconstructions.png', [make_grid(rows)])
        decibels, hits = [], 0
        for part in images.split(batch_size(self.config.size)):
            part = to_tensor(part.to(device))                               # (B, 3, H, W)
            tokens = vae.encode(part)
            decibels.append(psnr(vae.decode(tokens), part))                 # (B,)
            hits = hits + vae.quantize.count(torch.cat(tokens, dim=1))      # (K, V)
        used = (hits.sum(0) > 0).float().mean()
        return {'PSNR': torch.cat(decibels).mean().item(), 'codebook usage': used.item()}


class TransformerStage(Stage):
    """Stage 2 of Fig. 4: the transformer, by cross-entropy over the tokens of all scales, which is
    -log p of equation (6) per token.

    train and val: stored tokens (N, views, L) and labels (N,), as tokenize() returns them.
    """
    name, number = 'transformer', 2

    def __init__(self, config, vae, var, train, val):
        super().__init__()
        self.config, self.vae, self.var = config, vae, var
        self.train_set, self.val_set = train, val
        self.lr, self.muon_lr = config.lr, config.muon_lr
        self.batch, self.micro_batch = config.batch, config.micro_batch
        self.readable = readable(train[0])
        self.rows = len(self.readable)
        self.steps = config.steps
        if config.epochs:
            self.steps = min(config.steps, math.ceil(config.epochs * self.rows / self.batch))

    def learned(self):
        return {'var': self.var}

    def fetch_rows(self, stored_set, rows):
        """Tokens (n, L) int64 and labels (n,) of rows of the flattened (N * views)."""
        (stored, labels), views = stored_set, stored_set[0].shape[1]
        tokens = stored.reshape(-1, stored.shape[2])[rows].astype(np.int64) - 1
        return torch.from_numpy(tokens), torch.from_numpy(labels[rows // views])

    def batches(self, start):
        for rows in step_rows(self.rows, self.batch, self.config.seed, start, self.steps):
            yield self.fetch_rows(self.train_set, self.readable[[row for row, _ in rows]])

    def forward(self, tokens, labels):
        """tokens (B, L), labels (B,) -> the loss in nats per token, a scalar, and figures."""
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)    # K of (B, l)
        logits, loss = self.var(labels, self.vae.var_input(maps), tokens)
        accuracy = (logits.argmax(-1) == tokens).float().mean()     # on ImageNet 4 to 6 % is normal
        return loss, {'accuracy': accuracy}

    def evaluate(self):
        """Loss and token error on a thousand validation images. Writes samples.png: eight samples
        of each of the first ten classes, two above 128 px."""
        config, rows = self.config, []
        n = 8 if config.size <= 128 else 2
        for label in range(min(10, self.var.num_classes)):
            images = self.var.generate(self.vae, [label] * n, seed=label, **config.sampling)
            rows.append(to_uint8(images))
        save_image(config.out / 'samples.png', [make_grid(rows)])
        wanted = readable(self.val_set[0])
        tokens, labels = self.fetch_rows(self.val_set, wanted[spread(len(wanted), 1000)])
        return grade_transformer(self.vae, self.var, tokens, labels, config.device)


@torch.no_grad()
def grade_transformer(vae, var, tokens, labels, device):
    """Loss in nats per token and share of wrong tokens (Section 5.2): over all scales, for the last
    scale, and for each scale (from 1), as a dict. tokens (N, L), labels (N,)."""
    sizes = [p * p for p in var.patch_nums]
    loss, wrong = 0, 0
    for r, label in zip(tokens.split(25), labels.split(25)):
        r, label = r.to(device), label.to(device)
        logits, _ = var(label, vae.var_input(r.split(sizes, dim=1)))        # (B, L, V)
        each = F.cross_entropy(logits.transpose(1, 2), r, reduction='none') # (B, L)
        loss = loss + each.sum(0) / len(tokens)                             # (L,)
        wrong = wrong + (logits.argmax(-1) != r).sum(0) / len(tokens)       # (L,)
    figures = {}
    for name, x in (('loss', loss), ('error', wrong)):
        per_scale = [part.mean().item() for part in x.split(sizes)]
        figures[name] = x.mean().item()
        figures[f'{name} last'] = per_scale[-1]
        for k, value in enumerate(per_scale, start=1):
            figures[f'{name} {k}'] = value
    return figures


# ---- One loop for all stages ----


def learning_rate(progress):
    """As a share of the peak: warm-up over 1/50 of the run, flat to 5 %, then linear to 0.01, as in
    the release."""
    warm_up = 0.005 + 0.995 * progress / 0.02
    decay = 1 - 0.99 * max(0, progress - 0.05) / 0.95
    return min(warm_up, decay)


def orthogonalise(matrix, dtype):
    """Nearly U V^T for a matrix U S V^T (m, n), by five Newton-Schulz iterations in dtype.

    Each applies a polynomial to the singular values, which are at most 1 at first. In the end they
    lie between about 0.5 and 1.5. The coefficients are Jordan's.
    """
    x = matrix.to(dtype)
    if x.shape[0] > x.shape[1]:                                             # the smaller product
        return orthogonalise(x.T, dtype).T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.T
        # x <- (3.4445 I - 4.775 x x^T + 2.0315 (x x^T)^2) x
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised (Jordan, kellerjordan.github.io/posts/muon, 2024).

    For weight matrices. It is stepped by a GradScaler, which sets found_inf: a tensor that is not 0
    if a gradient is not finite. Such a step changes nothing, and nothing waits for the GPU, as in
    fused AdamW; torch.optim.Muon would wait for the GPU, and its dtype would always be bfloat16.
    """
    _step_supports_amp_scaling = True       # tells GradScaler to set found_inf

    def __init__(self, matrices, lr, dtype):
        super().__init__(matrices, dict(lr=lr, momentum=0.95, weight_decay=0.01))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        finite = self.found_inf == 0
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            for p in group['params']:
                state = self.state[p]
                if not state:
                    state['momentum'] = torch.zeros_like(p)
                old = state['momentum']
                new = old.lerp(p.grad, 1 - momentum)
                direction = orthogonalise(p.grad.lerp(new, momentum), self.dtype)
                rows, columns = p.shape
                size = lr * max(1, rows / columns) ** 0.5
                moved = (p * (1 - lr * group['weight_decay'])).add(direction, alpha=-size)
                old.copy_(torch.where(finite, new, old))
                p.copy_(torch.where(finite, moved, p))


def make_optimizers(stage):
    """AdamW (Section 4), and Muon if the stage has a learning rate for it: [AdamW] or both.

    Muon is for the weight matrices of the blocks alone, those of AdaLN excepted. No weight decay
    on biases, gains, positions, scale embeddings, AdaLN offsets and attention scales; the class
    embedding is decayed, as in the release.
    """
    decayed, free, matrices = [], [], []
    for name, p in stage.named_parameters():
        if not p.requires_grad:
            continue
        exempt = any(part in name for part in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        if p.ndim < 2 or exempt:
            free.append(p)
        elif stage.muon_lr and 'blocks.' in name and 'ada_lin' not in name:
            matrices.append(p)
        else:
            decayed.append(p)
    groups = [{'params': decayed, 'weight_decay': 0.05}, {'params': free, 'weight_decay': 0.}]
    optimizers = [torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        name = choose_precision(stage.config.device, stage.config.precision)
        # A CPU without native bfloat16 would take many times as long in it.
        dtype = torch.bfloat16 if name == 'bfloat16' else torch.float32
        optimizers.append(Muon(matrices, stage.muon_lr, dtype))
    return optimizers


class FixedScaler(torch.amp.GradScaler):
    """A GradScaler whose scale stays 1: by default each step that is left out would halve it."""

    def update(self):
        super().update(1.)


def make_scaler(config):
    """Leaves out steps whose gradients are not finite, without waiting for the GPU. In float16 it
    also scales the loss, so that small gradients do not vanish; else its scale stays 1."""
    name = choose_precision(config.device, config.precision)
    if name == 'float16':
        return torch.amp.GradScaler(config.device.type, init_scale=2. ** 16)
    return FixedScaler(config.device.type, init_scale=1., growth_interval=2 ** 31 - 1)


def seed_everything(*numbers):
    """Seeds torch on all devices: what is drawn next depends on the numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def train_step(stage, optimizers, scaler, batch):
    """One step of a stage: micro-batches, gradient clipping, optimizers, codebook.

    batch: this process's tensors, on the CPU. Returns the loss of this process's part and figures
    of its last micro-batch, as scalars on the device: nothing here waits for a GPU.
    """
    config, (rank, world) = stage.config, rank_and_world()
    seed_everything(config.seed, stage.number, stage.step, 1 + rank)
    for optimizer, peak in zip(optimizers, (stage.lr, stage.muon_lr)):
        for group in optimizer.param_groups:
            group['lr'] = peak * learning_rate(stage.step / stage.steps)
        optimizer.zero_grad()
    if config.device.type == 'cuda':            # only a copy from pinned memory is asynchronous
        batch = [x.pin_memory() for x in batch]
    batch = [x.to(config.device, non_blocking=True) for x in batch]
    total = 0
    for part in zip(*(x.split(stage.micro_batch) for x in batch)):
        with precision(config.device, config.precision):
            loss, figures = stage(*part)
        # Gradient accumulation: the parts add up to the mean over the batch of all processes.
        loss = loss * len(part[0]) / stage.batch
        scaler.scale(loss).backward()
        total = total + loss.detach()
    norms = []
    for optimizer in optimizers:
        trained = [p for group in optimizer.param_groups for p in group['params']]
        weights = [p for p in trained if p.grad is not None]
        # Summed over the processes: once per step, not once per micro-batch.
        if world > 1:
            for p in weights:
                dist.all_reduce(p.grad)
        scaler.unscale_(optimizer)
        # Clipped by the norm of this optimizer's gradients: if they are not finite, the weights of
        # the other one keep gradients that are.
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 2.0))
        scaler.step(optimizer)
    scaler.update()
    seed_everything(config.seed, stage.number, stage.step)          # the same in all processes
    stage.after_step()
    return {'loss': total, **figures, 'gradient norm': torch.stack(norms).norm()}


def train_stage(stage, state):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step.

    Raises UserError when MOST_SKIPPED steps in a row are not finite. Ends the process when it is
    asked to stop (Ctrl-C, SIGTERM), after saving; at a second Ctrl-C, at once.
    """
    (rank, world), config, device = rank_and_world(), stage.config, stage.config.device
    optimizers, scaler = make_optimizers(stage), make_scaler(config)
    if state['optimizers']:
        with explain('ckpt.pt does not fit these options', (RuntimeError, ValueError, KeyError)):
            for optimizer, saved in zip(optimizers, state['optimizers'], strict=True):
                optimizer.load_state_dict(saved)
            for name, module in stage.learned().items():
                module.load_state_dict(state[name])
        # The growth interval tells float16 from the others: after a change the scaler starts anew.
        if state['scaler']['growth_interval'] == scaler.get_growth_interval():
            scaler.load_state_dict(state['scaler'])
    evaluate_every = max(1, stage.steps // 5)
    show_every = max(1, min(50, stage.steps // 20))
    stop = []                                   # the signals that asked to stop
    # How many steps in a row were not finite: now, and at most. Nothing waits for these tensors.
    skipped = most_skipped = torch.zeros((), device=device)

    def ask_to_stop(signum, frame):
        if stop and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(signum)

    handlers = {signum: signal.signal(signum, ask_to_stop)
                for signum in (signal.SIGINT, signal.SIGTERM)}
    start, began = state['step'], time.time()
    next_save = began + SAVE_EVERY
    batches = stage.train().batches(start)
    for step in range(start, stage.steps + 1):
        stage.step, last = step, step == stage.steps

        # Evaluate. One process does, and the others wait for its next step.
        if rank == 0 and (last or (step > 0 and step % evaluate_every == 0)):
            with precision(device, config.precision):
                figures = stage.eval().evaluate()
            stage.train()                                       # dropout is on again
            if figures:
                write_log(stage, step, figures)
                show(f'{stage.name} {step}', figures)

        # Save.
        stopped = agree_on_stop(stop, device)
        if rank == 0 and (last or stopped or time.time() > next_save):
            before = time.time()
            for name, module in stage.learned().items():
                state[name] = module.state_dict()
            state.update(step=step, optimizers=[optimizer.state_dict() for optimizer in optimizers],
                         scaler=scaler.state_dict())
            write_file(config.out / 'ckpt.pt', lambda f: torch.save(state, f))
            took = time.time() - before
            next_save = time.time() + (max(SAVE_EVERY, took / SAVE_SHARE) if SAVE_EVERY else 0)
        if stopped:
            wait_for_all()                      # torchrun ends all processes as soon as one ends
            tell(f'stopped at {stage.name} step {step}; --resume continues')
            sys.exit(128 + stopped)
        if last:
            break

        # Step.
        figures = train_step(stage, optimizers, scaler, next(batches))
        skipped = torch.where(figures['gradient norm'].isfinite(), 0., skipped + 1)
        most_skipped = torch.maximum(most_skipped, skipped)
        # Between evaluations and checkpoints, a single process waits for the GPU only here.
        if step % show_every == 0:
            if most_skipped >= MOST_SKIPPED:
                raise UserError(f'{MOST_SKIPPED} steps in a row of the {stage.name} were not '
                                'finite and were left out: --resume with a smaller --lr, '
                                '--muon-lr or --tokenizer-lr')
            if world > 1:
                dist.all_reduce(figures['loss'])                # its parts add up to the mean
            seconds = (time.time() - began) / (step + 1 - start)            # per step, all included
            figures = {name: float(value) for name, value in figures.items()}
            figures['learning rate'] = optimizers[0].param_groups[0]['lr']
            figures['images/s'] = stage.batch / seconds
            if stage.name != 'classifier':
                figures['tokens/s'] = figures['images/s'] * sum(p * p for p in config.patch_nums)
            if rank == 0:
                train = {f'train {name}': value for name, value in figures.items()}
                write_log(stage, step, train)
                show(f'{stage.name} {step}/{stage.steps}', figures,
                     f'{(stage.steps - step) * seconds / 60:.0f} min left')
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def agree_on_stop(stop, device):
    """The number of the signal that asked to stop, or 0. Several processes receive it at different
    steps, and have to agree at once: torchrun kills them after 30 seconds."""
    asked = max(stop, default=0)
    if not dist.is_initialized():
        return asked
    return int(all_processes(torch.tensor([asked], device=device)).max())   # waits for the GPU


def write_log(stage, step, figures):
    """Appends to log.csv one row per figure: (stage, step, unix time, name, value). A resumed run
    repeats the steps since the checkpoint, and their rows."""
    with open(stage.config.out / 'log.csv', 'a', newline='') as f:
        rows, now = csv.writer(f), f'{time.time():.1f}'
        if f.tell() == 0:                                       # a new file
            rows.writerow(['stage', 'step', 'time', 'name', 'value'])
        for name, value in figures.items():
            rows.writerow([stage.name, step, now, name, value])


def show(title, figures, *more):
    """Prints one line of figures."""
    parts = [f'{name} {value:.4g}' for name, value in figures.items()]
    print('  '.join([title, *parts, *more]), flush=True)


# ---- Models to train, and the command ----


def make_vae(config, saved=None):
    """The tokenizer: with the weights of a resumed run (saved), those of a file, or new ones."""
    if saved is not None:
        path, weights = 'ckpt.pt', saved
    elif config.tokenizer == 'train' and not config.init:
        vae = VQVAE(config.patch_nums, **config.network)
        # All codes are 0 at first, so that f_hat stays 0 and every scale sees the shrunk f. The
        # first update replaces them: one by the mean of all vectors, the others by random vectors.
        vae.quantize.embedding.weight.zero_()
        return vae
    else:
        path = config.init if config.tokenizer == 'train' else config.tokenizer
        if path == 'official':
            path = fetch(*VAE)
        weights = read_checkpoint(path).get('vae')
        if weights is None:
            raise UserError(f'{path} has no tokenizer')
    with explain(f'{path}: no tokenizer for --patch-nums {config.patch_nums}', UNLOADABLE):
        vae = VQVAE.from_state_dict(weights, config.patch_nums)
    if vae.image_size != config.size:
        raise UserError(f'{path} makes images of {vae.image_size} px with --patch-nums '
                        f'{config.patch_nums}, not --size {config.size}')
    return vae


def make_var(config, vae, num_classes, init=''):
    """The transformer: a new one, or one with the weights of the file `init`. Those of a resumed
    run are loaded by train_stage."""
    V, z = vae.quantize.embedding.weight.shape
    var = VAR(config.patch_nums, config.depth, num_classes, V, z, config.saln)
    weights = None
    if init:
        weights = read_checkpoint(init).get('var')
    if weights:
        fresh, known = var.class_emb.weight.detach(), weights['class_emb.weight']   # (classes+1, w)
        # Another number of classes gets new class embeddings; "no class" keeps its own.
        if known.shape[1:] == fresh.shape[1:] and len(known) != len(fresh):
            weights['class_emb.weight'] = torch.cat([fresh[:-1], known[-1:]])
        hint = 'it needs the --depth, the --patch-nums and the tokenizer that it was trained with'
        with explain(f'--init {init}', RuntimeError, hint):
            var.load_state_dict(weights)
    return var


def make_perceptual(config, train, val, num_classes, state):
    """The network of L_P, or None without L_P: a VGG-16, or a classifier, trained here first."""
    if not config.perceptual:
        return None
    if not config.has_classifier:
        path = config.vgg or fetch(*VGG)
        with explain(f'{path} is not the VGG-16 of torchvision', UNLOADABLE, 'see --vgg'):
            return VGG16(read_checkpoint(path))
    seed_everything(config.seed)
    classifier = Classifier(num_classes).to(config.device)
    if state['stage'] == 'classifier':
        stage = ClassifierStage(config, classifier, train, val)
        describe(stage, classifier)
        train_stage(stage, state)
        state.update(stage='tokenizer', step=0, optimizers=None)    # where --resume continues
        if dist.is_initialized():
            for statistic in classifier.buffers():
                dist.broadcast(statistic, 0)    # each process had those of its own images
    else:
        with explain('ckpt.pt does not fit these options', (KeyError, RuntimeError)):
            classifier.load_state_dict(state['classifier'])
    return classifier.requires_grad_(False)


def speed_up(vae, var, config):
    """--compile, and --checkpointing of the transformer's blocks."""
    if config.compile:
        # The decoder's last layer stays as it is: AdversarialLoss asks for its gradients twice.
        compile_forward([*vae.encoder.down, *vae.decoder.up, *var.blocks], config.device)
    if config.checkpointing:
        for block in var.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def new_state(config, classes, words):
    """The state of a run that begins. What an older run left in --out is moved aside."""
    if rank_and_world()[0] == 0:
        for name in ('ckpt.pt', 'log.csv'):
            path = config.out / name
            if path.exists():
                path.replace(path.with_suffix('.previous' + path.suffix))
    stage = 'tokenizer' if config.tokenizer == 'train' else 'transformer'
    if config.has_classifier:
        stage = 'classifier'
    return dict(version=VERSION, classes=classes, words=words, patch_nums=config.patch_nums,
                sampling=config.sampling, stage=stage, step=0, optimizers=None)


def describe(stage, model):
    """Prints the plan of a stage; warns where an example, a view of an image, is seen too often."""
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    times = stage.steps * stage.batch / stage.rows
    tell(f'{stage.name}: {weights:.1f} M weights, {stage.steps} steps of {stage.batch} images, '
         f'{times:.3g} epochs of {stage.rows} examples')
    if times > 1000:
        tell(f'warning: every example is seen {times:.0f} times: fewer steps will do')


def train_stage_1(config, vae, train, val, num_classes, state):
    """Trains the tokenizer from state['step'] on. In the end, state is that of stage 2's start."""
    perceptual = make_perceptual(config, train, val, num_classes, state)
    seed_everything(config.seed)                # a resumed run gets the same discriminator
    stage = TokenizerStage(config, vae, train, val, perceptual).to(config.device)
    describe(stage, vae)
    train_stage(stage, state)
    state.pop('adversarial', None)
    state.pop('classifier', None)
    state.update(stage='transformer', step=0, optimizers=None)      # where --resume continues
    vae.zero_grad()                             # frees the gradients


def main():
    given, state = parse(), {}
    given['device'] = pick_device(given.get('device'))          # joins the other processes as well
    path = given.get('out', Path()) / 'ckpt.pt'
    restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'    # by torchrun
    if 'resume' in given or restarted and path.exists():
        state = read_checkpoint(path)
        known = isinstance(state.get('config'), dict) and 'optimizers' in state
        if not known or state.get('version') != VERSION:
            raise UserError(f'{path} was not made by this train.py: nothing to resume')
    config = make_config(given, state.get('config', {}))
    (rank, world), device = rank_and_world(), config.device
    train, val, classes, words = read_data(config)
    tell(f'{len(train)} + {len(val)} images of {config.size} px in {len(classes)} classes; scales '
         f'{config.patch_nums}; {world} x {device}, {choose_precision(device, config.precision)}')
    if config.has_classifier and len(classes) == 1:
        tell('one class: there is no classifier to train, and the tokenizer does without L_P')
        config.perceptual = 0.
    seed_everything(config.seed)
    vae = make_vae(config, state.get('vae')).to(device)
    seed_everything(config.seed)                # var starts the same, whatever make_vae drew
    # Before stage 2 begins, a resumed run has no transformer yet.
    var = make_var(config, vae, len(classes), '' if 'var' in state else config.init).to(device)
    speed_up(vae, var, config)                  # fails now without a compiler, not after stage 1
    config.out.mkdir(parents=True, exist_ok=True)
    state = state or new_state(config, classes, words)
    state['config'] = config.settings()

    if state['stage'] != 'transformer':
        train_stage_1(config, vae, train, val, len(classes), state)
    vae.eval().requires_grad_(False)            # stage 2 leaves it as it is
    state['vae'] = vae.state_dict()

    stored = tokenize(vae, train, config, 'train', config.views)
    stored_val = tokenize(vae, val, config, 'val')
    stage = TransformerStage(config, vae, var, stored, stored_val)
    describe(stage, var)
    train_stage(stage, state)
    if rank == 0:
        names = ('version', 'config', 'classes', 'words', 'patch_nums', 'sampling', 'vae', 'var')
        final = {name: state[name] for name in names}
        write_file(config.out / 'model.pt', lambda f: torch.save(final, f))
        print(f'wrote {config.out / "model.pt"}, the weights alone, and samples.png', flush=True)


if __name__ == '__main__':
    run(main, 'a smaller --micro-batch, in stage 1 a smaller --tokenizer-micro-batch')
