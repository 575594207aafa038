"""Images to train on: drawn shapes, CIFAR-10, those of folders; crops; and the stored tokens.

Letters: B images per batch, N images of a set, L tokens of all scales.
"""
import os
import shutil
import tarfile
import time
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from support.checkpoints import fetch
from support.folders import class_words, read_folder
from support.images import batch_size, crop, open_image, to_tensor
from support.run import (UserError, nfc, rank_and_world, reason, say, tell, wait_for_all,
                         write_file)

# ---- Drawn shapes ----

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


# ---- CIFAR-10 ----

CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')


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
    try:
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in names}
        else:
            with tarfile.open(path) as tar:
                files = {Path(member.name).name: tar.extractfile(member).read() for member in tar
                         if Path(member.name).name in names}
        batches = b''.join(files[name] for name in names[:6])
        records = np.frombuffer(batches, np.uint8).reshape(-1, 3073)        # (60000, 3073)
        classes = files['batches.meta.txt'].decode().split()
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as e:
        raise UserError(f'{path} is not the whole binary CIFAR-10 ({reason(e)}); fetch it again'
                        ) from e
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = records[:, 0].astype(np.int64)
    n = len(records) // 6                                       # the sixth batch is for validation
    return (images[:-n], labels[:-n]), (images[-n:], labels[-n:]), classes


# ---- Sets of images ----


def subset(pair, chosen, limit):
    """Items (N, ...) and labels (N,) of the chosen classes alone, at most `limit` of each (0: all).
    The labels become places in `chosen`, indices of classes."""
    items, labels = pair
    rows = [np.flatnonzero(labels == c)[:limit or None] for c in chosen]
    new_labels = np.repeat(np.arange(len(chosen)), [len(part) for part in rows])
    rows = np.concatenate(rows)
    return items[rows], new_labels.astype(np.int64)


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
        """The index; uint8 (size, size, 3), or None if the file cannot be read; and why."""
        index, draw, mirror = request
        try:
            if self.items.ndim > 1:
                image = Image.fromarray(self.items[index])
            else:
                image = open_image(self.path(index), self.size)
        except UserError as e:
            return index, None, str(e)
        # The release makes the shorter side 1.125 x size. Here a small image is not enlarged to it.
        rng = np.random.default_rng(draw) if draw is not None else None
        pixels = crop(image, self.size, 1.125, rng)                         # (size, size, 3)
        return index, pixels[:, ::-1] if mirror else pixels, ''

    def collate(self, items):
        """The readable images as an array: it comes from the workers through a pipe, where a tensor
        would come through shared memory, of which containers have little."""
        good = [(index, image) for index, image, _ in items if image is not None]
        pixels = np.empty((len(good), self.size, self.size, 3), np.uint8)
        for row, (_, image) in zip(pixels, good):
            row[:] = image
        return pixels, [index for index, _ in good], [error for *_, error in items if error]

    def load(self, batches, workers=0):
        """For each list of requests: images (B, size, size, 3) uint8, and indices (B,) int64.

        Files that cannot be read are left out. The first ten are named.
        """
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=workers,
                                             collate_fn=self.collate)
        for images, indices, errors in loader:
            for message in sorted({*errors} - self.reported):
                self.reported.add(message)
                if len(self.reported) <= 10:
                    say(f'left out: {message}')
            yield torch.from_numpy(images), torch.tensor(indices, dtype=torch.int64)

    def centres(self, n):
        """Requests for the centre crops of n images, evenly spread, in batches that fit."""
        requests, B = [(i, None, False) for i in spread(len(self), n)], batch_size(self.size)
        return [requests[start:start + B] for start in range(0, len(requests), B)]

    def some(self, n, workers=0):
        """n images, evenly spread: uint8 (n, size, size, 3) and their labels (n,). They are read at
        the first call and kept. UserError if none can be read."""
        if n not in self.chosen:
            images, indices = map(torch.cat, zip(*self.load(self.centres(n), workers)))
            if len(images) == 0:
                raise UserError('none of the images can be read')
            self.chosen[n] = images, torch.from_numpy(self.labels)[indices]
        return self.chosen[n]


def read_data(config):
    """Two ImageSets, for training and validation, and the classes and words for them."""
    path = fetch(*CIFAR10) if config.data == 'cifar10' else cifar10_path(config.data)
    folder = ''
    if config.data == 'shapes':
        train, val = shapes(8000, config.size, seed=1), shapes(1000, config.size, seed=2)
        classes = list(SHAPES)
    elif path:
        train, val, classes = cifar10(path)
    else:
        train, val, classes, folder = read_folder(config.data)
    if config.classes or config.limit:
        index_of = {nfc(name): i for i, name in enumerate(classes)}
        asked = config.classes or str(len(classes))
        names = classes[:int(asked)] if asked.isdecimal() else asked.split(',')
        unknown = [name for name in names if nfc(name) not in index_of]
        if unknown or not names:
            raise UserError(f'--classes {",".join(unknown) or asked}: there is no such class')
        chosen = [index_of[nfc(name)] for name in names]
        train, val = subset(train, chosen, config.limit), subset(val, chosen, config.limit)
        classes = [classes[i] for i in chosen]
        if not len(train[0]) or not len(val[0]):
            raise UserError('--classes: no images are left for training or validation')
    words = class_words(folder, classes) if folder else [''] * len(classes)
    train = ImageSet(*train, config.size, folder)
    val = ImageSet(*val, config.size, folder)
    return train, val, classes, words


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


def random_crops(images, config, batch, start, stop):
    """For each step from start: images (B, size, size, 3) uint8 for this process. Crops and, with
    config.flip, mirroring are random. UserError if no image of a step can be read."""
    def requests():
        for rows in step_rows(len(images), batch, config.seed, start, stop):
            draws = [(row, (config.seed, place)) for row, place in rows]
            yield [(row, draw, config.flip and np.random.default_rng((*draw, 1)).random() < 0.5)
                   for row, draw in draws]

    for pixels, _ in images.load(requests(), config.workers):
        if len(pixels) == 0:
            raise UserError('no image of a whole batch can be read: see the files named above')
        yield pixels


# ---- Stored tokens: stage 2 never runs the encoder ----

PER_FILE = 2000         # images


def tokens_key(vae, images, views, config):
    """A number that tells apart tokenizers, the paths of images, and how these are cropped."""
    crops = (views, config.flip, config.seed) if views > 1 else views
    folder = os.path.abspath(images.folder)
    key = zlib.crc32(repr((vae.patch_nums, images.size, crops, folder)).encode())
    key = zlib.crc32(np.ascontiguousarray(images.items), key)
    for weights in vae.state_dict().values():
        key = zlib.crc32(weights.cpu().numpy().tobytes(), key)
    key = torch.tensor([key], device=config.device)
    if dist.is_initialized():       # a GPU may have rounded the weights of each in its own way
        dist.broadcast(key, 0)
    return int(key)


@torch.no_grad()
def tokenize(vae, images, config, name, views=1):
    """Tokens of all readable images and their labels: uint16 (N, views, L), and int64 (N,).

    The first view is the centre crop, the others are random ones; with flip, every second view is
    mirrored. They are stored in --out, PER_FILE images in a file that is written whole. The
    processes, of one machine or of several that share --out, make a part of the files each, and a
    run that was killed makes those that are not there. UserError if no image can be read.
    """
    rank, world = rank_and_world()
    folder = config.out / f'tokens-{name}-{tokens_key(vae, images, views, config):08x}'
    if rank == 0:
        for old in config.out.glob(f'tokens-{name}-*'):
            if old != folder:                           # of another tokenizer or other images
                shutil.rmtree(old, ignore_errors=True)
    N, L = len(images), sum(p * p for p in vae.patch_nums)
    starts, B, began = range(0, N, PER_FILE), batch_size(images.size), time.time()
    missing = [start for start in starts[rank::world] if not (folder / f'{start}.npz').exists()]
    for done, start in enumerate(missing, start=1):
        requests = []
        for first in range(start, min(start + PER_FILE, N), B):
            batch = range(first, min(first + B, start + PER_FILE, N))
            crops = [(i, None, False) for i in batch]
            for view in range(1, views):
                mirror = config.flip and view % 2 == 1
                crops += [(i, (config.seed, view, i), mirror) for i in batch]
            requests.append(crops)
        tokens, rows = [np.empty((0, views, L), np.uint16)], [np.empty(0, np.int64)]
        for pixels, indices in images.load(requests, config.workers):
            if len(pixels) > 0:
                # A file can be read in all views or in none.
                each = [torch.cat(vae.encode(to_tensor(part.to(config.device))), dim=1)
                        for part in pixels.chunk(views)]                    # (B, L) of each view
                tokens.append(torch.stack(each, dim=1).cpu().numpy().astype(np.uint16))
                rows.append(indices.chunk(views)[0].numpy())
        arrays = dict(tokens=np.concatenate(tokens), rows=np.concatenate(rows))
        write_file(folder / f'{start}.npz', lambda f: np.savez(f, **arrays))
        left = (time.time() - began) / done * (len(missing) - done)
        tell(f'tokens of {name}: {done} of {len(missing)} files, {left:.0f} s left')
    wait_for_all()
    tokens, rows = [], []
    for start in starts:
        with np.load(folder / f'{start}.npz') as f:
            tokens.append(f['tokens'])
            rows.append(f['rows'])
    labels = images.labels[np.concatenate(rows)]
    if len(labels) < N:
        tell(f'left out of {name}: {N - len(labels)} of {N} images, which cannot be read')
    if len(labels) == 0:
        raise UserError(f'none of the images for {name} can be read')
    return np.concatenate(tokens), labels
