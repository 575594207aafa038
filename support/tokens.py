"""Stored tokens: stage 2 never runs the encoder.

Letters: N images of a set, L tokens of all scales.
"""
import time
import zipfile
import zlib

import numpy as np
import torch
import torch.distributed as dist

from support.data import Request, spread
from support.images import batch_size, to_tensor
from support.run import UserError, rank_and_world, tell, wait_for_all, write_file

PER_FILE = 2000         # images


def key_of_tokens(vae, images, views, config):
    """A number that depends on the tokenizer, on the images (of a folder on their names alone), and
    on how they are cropped."""
    crops = (views, config.flip, config.seed) if views > 1 else views
    key = zlib.crc32(repr((vae.patch_nums, images.size, crops)).encode())
    key = zlib.crc32(np.ascontiguousarray(images.items), key)
    for weights in vae.state_dict().values():
        key = zlib.crc32(weights.cpu().numpy().tobytes(), key)
    key = torch.tensor([key], device=config.device)
    if dist.is_initialized():       # GPUs round differently
        dist.broadcast(key, 0)
    return int(key)


def read_tokens(path, key):
    """Tokens (n, views, L) and the indices of their images (n,) in a file, or None if there is no
    such file, or it is cut short, or was made of something else."""
    try:
        with np.load(path) as f:
            return (f['tokens'], f['rows']) if f['key'] == key else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


@torch.no_grad()
def encode_views(vae, images, rows, views, config):
    """Tokens of the images of an ImageSet with the indices `rows`, as far as they can be read:
    uint16 (n, views, L), and their indices, int64 (n,).

    The first view is the centre crop, the others are random ones; with flip, every second view is
    mirrored.
    """
    L, B = sum(p * p for p in vae.patch_nums), batch_size(images.size)
    requests = []
    for start in range(0, len(rows), B):
        crops = []
        for row in rows[start:start + B]:
            for view in range(views):
                draw = None if view == 0 else (config.seed, view, row)
                crops.append(Request(row, draw, mirror=config.flip and view % 2 == 1))
        requests.append(crops)
    tokens, found = [np.empty((0, views, L), np.uint16)], [np.empty(0, np.int64)]
    for pixels, indices in images.load(requests, config.workers):
        # An image counts if all of its views could be read.
        whole, count = np.unique(indices.numpy(), return_counts=True)
        whole = whole[count == views]
        pixels = pixels[np.isin(indices.numpy(), whole)]                    # (n * views, H, W, 3)
        parts = [torch.cat(vae.encode(to_tensor(part.to(config.device))), dim=1).cpu()
                 for part in pixels.split(B) if len(part) > 0]
        if parts:
            tokens.append(torch.cat(parts).numpy().astype(np.uint16).reshape(-1, views, L))
            found.append(whole)
    return np.concatenate(tokens), np.concatenate(found)


def tokenize(vae, images, rows, config, name, views=1):
    """Tokens and labels of the images of an ImageSet with the indices `rows`, which rise, as far as
    they can be read: uint16 (N, views, L), and int64 (N,). UserError if no image can be read.

    They are stored in --out/tokens, PER_FILE images in a file; each process makes a part of the
    files. Images that a file lacks, because a disk was away, are read again.
    """
    rank, world = rank_and_world()
    folder, key = config.out / 'tokens', key_of_tokens(vae, images, views, config)
    files = {folder / f'{name}-{start}.npz': rows[start:start + PER_FILE]
             for start in range(0, len(rows), PER_FILE)}
    mine = list(files)[rank::world]
    began, made = time.monotonic(), 0           # files that were stored before take no time
    for done, path in enumerate(mine, start=1):
        stored = read_tokens(path, key)
        missing = sorted({*files[path]} - {*(stored[1].tolist() if stored else [])})
        if not missing:
            continue
        tokens, found = encode_views(vae, images, missing, views, config)
        if len(found) > 0:
            if stored:
                tokens = np.concatenate([stored[0], tokens])
                found = np.concatenate([stored[1], found])
            order = found.argsort()
            arrays = dict(tokens=tokens[order], rows=found[order], key=key)
            write_file(path, lambda f: np.savez(f, **arrays))
        made += 1
        left = (time.monotonic() - began) / made * (len(mine) - done)
        tell(f'tokens of {name}: {done} of {len(mine)} files, {left:.0f} s left')
    wait_for_all()
    stored = [pair for pair in (read_tokens(path, key) for path in files) if pair]
    if not stored:
        raise UserError(f'none of the images for {name} can be read')
    tokens = np.concatenate([tokens for tokens, _ in stored])
    found = np.concatenate([found for _, found in stored])
    if len(found) < len(rows):
        tell(f'left out of {name}: {len(rows) - len(found)} of {len(rows)} images, which cannot be '
             'read')
    return tokens, images.labels[found]


def tokenize_both(vae, train, val, config):
    """The stored tokens of all training images and of a thousand validation images, as tokenize()
    returns them."""
    return (tokenize(vae, train, range(len(train)), config, 'train', config.views),
            tokenize(vae, val, spread(len(val), 1000), config, 'val'))
