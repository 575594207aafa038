"""Tests of what is not the paper's: files, folders, checkpoints, the commands, the experiments.

They run with those of test_var.py, by python -m pytest -q. The oracles are real files of every
kind, damaged ones, and the commands themselves.
"""
import ast
import dataclasses
import hashlib
import http.server
import importlib
import io
import json
import operator
import os
import pickle
import re
import signal
import sqlite3
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from test_var import (CPU, HERE, TINY, command, launch, models, same_weights,  # noqa: F401
                      seed, trained, write_images)

sys.path.insert(0, str(HERE / 'experiments'))

import edit
import evaluate
import judge
import reject
import sample
import train
from raster import Raster
from support import data, options, tokens
from support import run as running
from support.checkpoints import class_indices, fetch, load
from support.data import ImageSet, Request
from support.folders import LAYOUTS, class_words, read_folder
from support.grade import ssim
from support.images import batch_size, crop, open_image, to_tensor, to_uint8
from support.options import make_config
from support.run import (UserError, cast_linear_weights, precision, read_log, run, seed_of,
                         write_file)
from support.tokens import tokenize
from tokenizer import VQVAE
from var import VAR

# A deprecated call in this project's own lines is an error.
pytestmark = [pytest.mark.filterwarnings(f'error::{kind}:{module}')
              for kind in ('DeprecationWarning', 'FutureWarning')
              for module in ('var', 'tokenizer', 'train', 'sample', 'support', 'edit', 'evaluate',
                             'reject')]


# ---- Weights in files ----


def test_weights_in_files(tmp_path):
    for kind in ({}, {'shared_aln': True}):
        vae, var = models((1, 3, 4), 3, 7, **kind)
        again = VAR.from_state_dict(var.state_dict())
        assert again.patch_nums == (1, 3, 4) and again.num_classes == 7
        for a, b in ((var, again), (vae, VQVAE.from_state_dict(vae.state_dict(), (1, 3, 4)))):
            a, b = dict(a.named_parameters()), dict(b.named_parameters())
            assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

    def check(*files):
        found_vae, found_var, ckpt = load(*files)
        assert torch.equal(found_var.pos_1LC, var.pos_1LC) and ckpt['sampling']['top_k'] == 900
        assert torch.equal(found_vae.quantize.embedding.weight, vae.quantize.embedding.weight)

    one, two = tmp_path / 'var.pth', tmp_path / 'vae.pth'
    torch.save(var.state_dict(), one)
    torch.save(vae.state_dict(), two)
    check(one, two)                                             # two files, as released
    torch.save({'trainer': {'var_wo_ddp': var.state_dict(), 'vae_local': vae.state_dict()}}, one)
    check(one)                                                  # the official trainer's


class Evil:
    def __reduce__(self):
        return Path.touch, (Path('touched'),)


def test_a_transformer_with_the_tokenizer_of_another(tmp_path):
    """Of the same shape; released files, which come apart, cannot tell."""
    vae, var = models()
    torch.save({'vae': vae.state_dict(), 'var': var.state_dict()}, tmp_path / 'model.pt')
    torch.save({'vae': vae.state_dict()}, tmp_path / 'same.pt')
    other = {k: v + ('embedding' in k) for k, v in vae.state_dict().items()}
    torch.save(other, tmp_path / 'other.pth')
    torch.save(var.state_dict(), tmp_path / 'released.pth')
    load(tmp_path / 'model.pt', tmp_path / 'same.pt')
    load(tmp_path / 'released.pth', tmp_path / 'other.pth')
    with pytest.raises(UserError, match='another tokenizer than that of .*other.pth'):
        load(tmp_path / 'model.pt', tmp_path / 'other.pth')


# ---- Images in files ----


def test_images_of_every_kind(tmp_path):
    def mean(name, image, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(open_image(tmp_path / name, 8)).mean((0, 1))

    red = Image.new('RGB', (20, 10), (200, 20, 30))
    for mode, name in (('RGB', 'a.png'), ('CMYK', 'b.tiff'), ('P', 'c.png'), ('RGBA', 'd.webp')):
        assert np.abs(mean(name, red.convert(mode)) - (200, 20, 30)).max() < 12, name
    assert mean('e.png', Image.new('RGBA', (9, 9), (0, 0, 0, 0))).min() == 255     # white behind it
    for depth in (np.uint16, np.float32):
        with pytest.raises(UserError, match='converted to 8 bits'):
            mean('f.tiff', Image.fromarray(np.ones((9, 9), depth)))
    exif = red.getexif()
    exif[0x112] = 6                                             # turned by a quarter
    red.save(tmp_path / 'i.jpg', exif=exif)
    assert open_image(tmp_path / 'i.jpg', 8).size == (10, 20)
    Image.new('1', (14000, 14000)).save(tmp_path / 'bomb.png')
    (tmp_path / 'empty.jpg').write_bytes(b'')
    for name in ('bomb.png', 'empty.jpg'):
        with pytest.raises(UserError, match=name):
            open_image(tmp_path / name, 8)


def test_images_as_disks_have_them(tmp_path):
    """A very long one, and a photograph of 108 megapixels."""
    Image.new('RGB', (200_000, 1), 'red').save(tmp_path / 'long.png')
    assert (crop(open_image(tmp_path / 'long.png', 128), 128) == (255, 0, 0)).all()
    Image.new('L', (12_000, 9_000), 99).save(tmp_path / 'photo.jpg')
    assert (crop(open_image(tmp_path / 'photo.jpg', 64), 64) == 99).all()


def test_one_run_in_a_folder(trained, tmp_path, monkeypatch, capsys):
    """While it lasts, and not after it was killed."""
    words = ('--data', trained / 'images', *TINY, '--out', tmp_path / 'out')
    first = launch(tmp_path, 'train', *words, '--tokenizer-steps', 9999)
    try:
        while first.poll() is None and not (tmp_path / 'out' / 'log.csv').exists():
            time.sleep(0.05)
        assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 2
        assert 'another run is at work there' in capsys.readouterr().err
        assert not (tmp_path / 'out' / 'previous-1').exists()
    finally:
        first.kill()
    assert first.wait() == -signal.SIGKILL
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 0


def test_nothing_is_lost_when_the_disk_refuses(tmp_path):
    write_file(tmp_path / 'a', lambda f: f.write(b'old'))

    def fail(f):
        f.write(b'new')
        raise OSError(28, 'No space left on device')

    with pytest.raises(UserError, match='cannot write .*No space left'):
        write_file(tmp_path / 'a', fail)
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']
    resource = pytest.importorskip('resource')                  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, limits[1]))
    try:                                                        # as on a disk with a MiB left
        with pytest.raises(UserError, match='cannot write .*a: ') as e:
            write_file(tmp_path / 'a', lambda f: torch.save(torch.zeros(2 ** 19), f))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'File too large' in str(e.value) or 'the disk may be full' in str(e.value)
    assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']


# ---- Data ----


def test_shapes_depend_on_the_seed_alone():
    a, b, c = data.shapes(40, 32, 0), data.shapes(40, 32, 0), data.shapes(40, 32, 1)
    assert a[0].shape == (40, 32, 32, 3) and a[0].dtype == np.uint8 and a[1].dtype == np.int64
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0]) and len(data.SHAPES) == 10


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def names_of(pair):
    return [os.fsdecode(name).replace(os.sep, '/') for name in pair[0]], pair[1].tolist()


def test_layouts_of_folders(tmp_path, capsys):
    """{name: files, and what is expected of them: classes, training and validation images}"""
    numbers = [f'{i:02d}' for i in range(20)]
    cases = {
        'classes': ([f'{c}/{i}.jpg' for c in ('b', 'a') for i in numbers], 'a b', 36, 4),
        'few': (['a/1.jpg', 'a/2.jpg', 'b/1.jpg'], 'a b', 2, 1),
        'splits': (['train/a/1.jpg', 'train/b/1.jpg', 'val/b/2.jpg'], 'a b', 2, 1),
        'capitals': (['Train/a/1.jpg', 'Validation/a/2.jpg', 'Validation/a/3.JPEG'], 'a', 1, 2),
        'test split': (['train/a/1.jpg', 'test/a/2.jpg'], 'a', 1, 1),
        'val before test': (['train/a/1.jpg', 'test/a/2.jpg', 'val/a/3.jpg', 'val/a/4.jpg'],
                            'a', 1, 2),
        'tiny': (['train/n1/images/n1_0.JPEG', 'train/n2/images/n2_0.JPEG', 'val/images/val_0.JPEG',
                  'val/images/val_1.JPEG', 'test/images/test_0.JPEG'], 'n1 n2', 2, 2),
        'imagenet': ([f'train/n1/{i}.JPEG' for i in numbers] + ['val/x.JPEG'], 'n1', 18, 2),
        'flat splits': (['train/1.jpg', 'train/2.jpg', 'val/3.jpg'], 'images', 2, 1),
        'flat': ([f'{i}.jpg' for i in numbers], 'images', 18, 2),
        'empty val': (['train/1.jpg', 'train/2.jpg', 'val/notes.txt'], 'images', 1, 1),
        'images': (['a/images/1.jpg', 'a/images/2.jpg', 'b/images/1.jpg', 'b/x/2.jpg'],
                   'a b', 2, 1),
        'years': (['cat/1.jpg', 'cat/2.jpg', 'cat/2021/3.jpg', 'cat/2022/4.jpg'], 'cat', 1, 1),
        'beside': (['train/a/1.jpg', 'val/a/2.jpg', 'notes/1.jpg'], 'a', 1, 1),
        'labels': (['train/1.jpg', 'val/2.jpg', 'annotations/1.xml'], 'images', 1, 1),
        'kaggle': ([f'train/n1/{i}.JPEG' for i in numbers] + ['val/x.JPEG', 'test/x.JPEG'],
                   'n1', 18, 2),
    }
    for name, (files, classes, n, n_val) in cases.items():
        root = tmp_path / name
        touch(root, *files, 'a/.hidden.jpg' if name == 'classes' else 'readme.txt')
        if name == 'tiny':
            labels = 'val_0.JPEG\tn2\t0\nval_1.JPEG\tn1\t0\n'
            (root / 'val' / 'val_annotations.txt').write_text(labels)
            (root / 'words.txt').write_text('n1\tgoldfish, Carassius auratus\nn3\tcow\n')
        if name == 'kaggle':
            (tmp_path / 'LOC_synset_mapping.txt').write_text('n1 goldfish, Carassius auratus\n')
        training, val, found = read_folder(root)
        words = class_words(root, found)
        assert ' '.join(found) == classes, name
        (a, _), (b, val_labels) = names_of(training), names_of(val)
        assert (len(a), len(b)) == (n, n_val) and not {*a} & {*b}, name
        assert all((root / file).exists() for file in a + b), name
        said = capsys.readouterr().out
        assert ('no labelled images' in said) == (name in ('imagenet', 'empty val', 'kaggle')), said
        assert ('held out' in said) == (name in (
            'classes', 'few', 'imagenet', 'flat', 'empty val', 'images', 'kaggle', 'years'))
        assert ('2 folders in class folders' in said) == (name == 'years')
        if name == 'tiny':
            assert val_labels == [0, 1] and b == ['val/images/val_1.JPEG', 'val/images/val_0.JPEG']
            assert words == ['goldfish, Carassius auratus', '']
            assert options.classes_of(['Goldfish', 'n2'], 2, found, words) == [0, 1]
        if name == 'kaggle':
            assert words == ['goldfish, Carassius auratus']
    touch(tmp_path / 'gap', 'a/1.jpg', 'a/2.jpg', 'empty/notes.txt')
    assert read_folder(tmp_path / 'gap')[2] == ['a']
    assert 'no images directly in empty: left out' in capsys.readouterr().out
    touch(tmp_path / 'no pictures', 'a/1.jpg', 'a/2.jpg', 'papers/1.pdf')
    assert read_folder(tmp_path / 'no pictures')[2] == ['a']
    touch(tmp_path / 'mixed', '1.jpg', 'sub/2.jpg', 'sub/3.jpg')
    capsys.readouterr()
    assert read_folder(tmp_path / 'mixed')[2] == ['sub']
    assert '1 images beside the class folders' in capsys.readouterr().out
    touch(tmp_path / 'nas', 'a/1.jpg', 'a/2.jpg', 'a/@eaDir/3.jpg', '@eaDir/4.jpg',
          '__MACOSX/5.jpg', '#recycle/6.jpg', 'lost+found/7.jpg')
    training, val, found = read_folder(tmp_path / 'nas')
    assert found == ['a'] and len(training[0]) + len(val[0]) == 2
    touch(tmp_path / 'phone', 'a/1.jpg', 'a/2.jpg', *(f'a/{i}.HEIC' for i in range(50)))
    capsys.readouterr()
    read_folder(tmp_path / 'phone')
    assert f'left out of {tmp_path / "phone"}: 50 .heic' in capsys.readouterr().out
    touch(tmp_path / 'wrapped', 'top/train/a/1.jpg', 'top/train/a/2.jpg')
    touch(tmp_path / 'stray', 'train/a/1.jpg', 'val/z/1.jpg')
    touch(tmp_path / 'parquet', 'data/train-00000.parquet', 'data/train-00001.parquet')
    touch(tmp_path, 'x.zip')
    touch(tmp_path / 'u-net', 'train/images/1.jpg', 'train/images/2.jpg', 'train/masks/1.png')
    touch(tmp_path / 'by class', 'images/a/1.jpg', 'images/a/2.jpg', 'masks/1.png')
    for name in ('u-net', 'by class'):
        with pytest.raises(UserError, match='images/, and images in masks/ beside it'):
            read_folder(tmp_path / name)
    touch(tmp_path / 'dogs', 'train/cat.0.jpg', 'train/dog.0.jpg', 'test1/1.jpg')
    with pytest.raises(UserError, match='images in train/ and in test1/: if both are classes'):
        read_folder(tmp_path / 'dogs')
    for name, why in (('stray', 'class z'), ('parquet', 'but 2 .parquet'), ('wrapped', 'no images'),
                      ('x.zip', 'unpack it'), ('nowhere', 'no such folder'),
                      ('few/b', 'no class has two images')):
        with pytest.raises(UserError, match=why) as e:
            read_folder(tmp_path / name)
        assert LAYOUTS in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('source', ['shapes', 'cifar10', 'folder'])
def test_classes_and_limit_hold_for_every_kind_of_data(source, tmp_path, monkeypatch):
    draw_shapes = data.shapes
    monkeypatch.setattr(data, 'shapes', lambda n, size, seed: draw_shapes(n // 20, size, seed))
    monkeypatch.setattr(data, 'fetch', lambda *_: make_cifar(tmp_path)[0])
    write_images(tmp_path / 'folder', 12, ('ant', 'bee', 'cow', 'dog'))
    asked = str(tmp_path / source) if source == 'folder' else source

    def read(**options):
        return data.read_data(make_config(dict(data=asked, size=32, **options)))

    training, _, everything, _ = read()
    names = [everything[2], everything[0]]
    chosen, val, classes, _ = read(classes=','.join(names), limit=3)
    assert classes == names and {*chosen.labels} == {0, 1} and len(val) >= 2
    for c, name in enumerate(names):
        of_class = training.items[training.labels == everything.index(name)][:3]
        assert np.array_equal(chosen.items[chosen.labels == c], of_class) and len(of_class) == 3
    assert read(classes='3')[2] == everything[:3]


def test_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'shapes')
    assert data.read_data(make_config(dict(data='shapes')))[2] == list(data.SHAPES)
    said = capsys.readouterr().out
    assert 'does not mean the folder of that name here: for that one, ./shapes' in said
    assert data.read_data(make_config(dict(data='./shapes', size=32)))[2] == ['cat', 'dog']
    (tmp_path / 'cifar10').mkdir()
    monkeypatch.setattr(data, 'fetch', killed)                  # said before a download can fail
    with pytest.raises(KeyboardInterrupt):
        data.read_data(make_config(dict(data='cifar10')))
    assert './cifar10' in capsys.readouterr().out


def test_image_set(tmp_path, capsys):
    write_images(tmp_path / 'all', 12)
    training, _, classes = read_folder(tmp_path / 'all')
    images = ImageSet(*training, 32, tmp_path / 'all')
    wanted = [[Request(i, (0, i)) for i in range(23)]]
    (batch, index), = images.load(wanted)
    assert batch.shape == (22, 32, 32, 3) and classes == ['cat', 'dog']
    assert images.labels.dtype == np.int64
    assert capsys.readouterr().out.count('cut.jpg') == 1
    cut = next(i for i in range(23) if 'cut.jpg' in images.path(i))
    assert index.tolist() == [i for i in range(23) if i != cut]     # nothing takes its place
    again, _ = next(images.load(wanted))
    assert torch.equal(batch, again)                            # the crop depends on the draw alone
    assert 'cut.jpg' not in capsys.readouterr().out             # it was named before
    mirrored, _ = next(images.load([[Request(i, (0, i), True) for i in range(23)]]))
    assert torch.equal(mirrored, batch.flip(2))
    from_workers, _ = next(images.load(wanted, workers=1))
    assert torch.equal(from_workers, batch)
    pixels, *_ = images.collate([images[Request(0)]])
    assert type(pixels) is np.ndarray                   # a tensor would take shared memory
    # In training another one takes the place, chosen by the draw.
    replaced = [Request(cut, (0, place), replace=True) for place in range(40)]
    (_, index), = images.load([replaced])
    assert len(index) == 40 and cut not in index and len(index.unique()) > 10
    assert torch.equal(next(images.load([replaced]))[1], index)
    for i in range(12):
        (tmp_path / 'all' / f'{i}.jpg').write_bytes(b'version https://git-lfs.github.com/spec/v1')
    names = np.array([b'%d.jpg' % i for i in range(12)])
    pointers = ImageSet(names, np.zeros(12, int), 32, tmp_path / 'all')
    with pytest.raises(UserError, match='none of the images can be read'):
        pointers.some(12)
    assert capsys.readouterr().out.count('left out: ') == 10
    with pytest.raises(UserError, match='100 images in a row cannot be read'):
        list(data.random_crops(pointers, make_config(dict(workers=0)), 4, 0, 1))


class Deadly(ImageSet):
    def read(self, request):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reading_process_is_killed(capsys):
    """As the system does when memory ends."""
    images = Deadly(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, int), 32)
    with pytest.raises(SystemExit) as e:
        run(lambda: list(images.load([[Request(0)]], workers=1)))
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count('\n') == 1 and 'try a smaller --workers' in error


def test_batches_and_crops():
    assert [batch_size(s) for s in (32, 128, 256, 384, 512, 1024)] == [50, 50, 16, 7, 4, 1]
    x, y = np.meshgrid(np.arange(40), np.arange(32))
    image = Image.fromarray(np.stack([x, y, y], axis=2).astype(np.uint8))   # 40 x 32
    assert crop(image, 32)[0, 0].tolist() == [4, 0, 0]          # the centre
    assert crop(image, 32, 1.125)[0, 0].tolist() == [4, 0, 0]   # a small image is not enlarged
    lefts = {int(crop(image, 32, rng=np.random.default_rng(i))[0, 0, 0]) for i in range(100)}
    assert {*range(1, 8)} <= lefts <= {*range(9)}
    corners = {tuple(crop(image, 16, 2, np.random.default_rng(i))[0, 0, :2]) for i in range(50)}
    assert len({x for x, _ in corners}) > 10 and len({y for _, y in corners}) > 10
    assert len({int(x) - int(y) for x, y in corners}) > 10      # drawn on their own
    # The release's: the shorter side to 1.125 x size, then a square. Here in one call of Pillow.
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((300, 250), Image.BICUBIC)
    twice = photo.resize((135, 112), Image.LANCZOS).crop((17, 6, 117, 106))
    assert np.abs(crop(photo, 100, 1.125).astype(int) - np.asarray(twice)).mean() < 2
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_tensor(bytes_)), bytes_)


def test_random_crops_are_mirrored_at_random():
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    image = np.stack([x, y, y], axis=2).astype(np.uint8)
    images = ImageSet(image[None], np.zeros(1, int), 32)
    for flip in (False, True):
        config = make_config(dict(flip=flip, workers=0))
        batches = list(data.random_crops(images, config, 8, 0, 5))
        crops = torch.cat(batches).int()                                    # (40, 32, 32, 3)
        mirrored = crops[:, 0, 0, 0] > crops[:, 0, -1, 0]
        assert 10 < mirrored.sum() < 30 if flip else not mirrored.any()
        assert len({tuple(corner) for corner in crops[:, 0, 0].tolist()}) > 20


def test_spread():
    assert data.spread(10, 3) == [0, 3, 6] and data.spread(2, 5) == [0, 1]


def test_every_epoch_is_a_permutation():
    rows = [row for step in data.step_rows(10, 4, 0, 0, 5) for row, _ in step]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    assert [row for step in data.step_rows(10, 4, 0, 3, 5) for row, _ in step] == rows[12:]


def make_cifar(folder):
    """Writes an archive like that of CIFAR-10. Returns its path, and its records (6, 10, 3073)."""
    files = folder / 'cifar-10-batches-bin'
    files.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 10, 3073), dtype=np.uint8)
    records[..., 0] = rng.permuted(np.tile(np.arange(10), (6, 1)), axis=1)
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']
    for name, batch in zip(names, records):
        (files / name).write_bytes(batch.tobytes())
    (files / 'batches.meta.txt').write_text('\n'.join('abcdefghij') + '\n\n')
    archive = folder / 'cifar-10-binary.tar.gz'
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(files, files.name)
        tar.add(files / 'test_batch.bin', '../../escaped.bin')
    return archive, records


def test_cifar10(tmp_path, monkeypatch):
    archive, records = make_cifar(tmp_path)
    training, (x, y), classes = data.cifar10(archive)
    assert classes == list('abcdefghij') and len(training[0]) == 50
    assert y.tolist() == records[5, :, 0].tolist() and y.dtype == np.int64
    assert x[3, 5, 7].tolist() == [records[5, 3, 1 + c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert not list(tmp_path.parent.glob('**/escaped.bin'))
    # The download, from a server on this machine: kept if the checksum is right, else not.
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(
        http.server.SimpleHTTPRequestHandler, directory=archive.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}/{archive.name}'
    with pytest.raises(UserError, match='cannot fetch.*bring it to'):
        fetch(address, '0' * 64, tmp_path / 'bad')
    assert not list((tmp_path / 'bad').iterdir())
    got = fetch(address, hashlib.sha256(archive.read_bytes()).hexdigest(), tmp_path / 'good')
    assert got.read_bytes() == archive.read_bytes()
    server.shutdown()
    server.server_close()
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match='whole'):
        data.cifar10(archive)


def token_setup(tmp_path, monkeypatch, **options):
    """Six small files, of which the fifth is damaged, as an ImageSet; a tokenizer and a config; and
    a list that receives what is read."""
    monkeypatch.setattr(tokens, 'PER_FILE', 4)
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (12, 9, 3), np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / '4.png').write_bytes(b'damaged')
    images = ImageSet(np.array([b'%d.png' % i for i in range(6)]), np.arange(6) % 2, 8, tmp_path)
    config = make_config(dict(out=tmp_path / 'out', workers=0, device=CPU, **options))
    asked, load_ = [], images.load

    def recorded(batches, workers):
        asked.extend(request.index for batch in batches for request in batch)
        return load_(batches, workers)

    monkeypatch.setattr(images, 'load', recorded)
    return VQVAE((1, 2, 4), 16, 4, 8, (1, 2)), images, config, asked


def test_stored_tokens(tmp_path, monkeypatch, capsys):
    """They are those of the crops; found again; and made anew where something else is asked for."""
    vae, images, config, asked = token_setup(tmp_path, monkeypatch, flip=True, views=3)
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    stored, labels = tokenize(vae, images, range(6), config, 'train', 3)
    assert stored.shape == (5, 3, 21) and labels.tolist() == [0, 1, 0, 1, 1]    # without the fifth
    assert 'left out of train: 1 of 6 images' in capsys.readouterr().out
    for v in range(3):                          # the centre, a mirrored random crop, a random crop
        draw = None if v == 0 else (0, v, 2)
        pixels = images.read(Request(2, draw, v == 1))
        want = torch.cat(vae.encode(to_tensor(pixels[None].copy())), dim=1)
        assert stored[2, v].tolist() == want[0].tolist()
    some, labels = tokenize(vae, images, [1, 3], config, 'val')
    assert np.array_equal(some[:, 0], stored[[1, 3], 0]) and labels.tolist() == [1, 1]
    asked.clear()
    assert np.array_equal(tokenize(vae, images, range(6), config, 'train', 3)[0], stored)
    assert asked == [4] * 3                                     # only what could not be read
    fewer = ImageSet(images.items[[0, 1, 2, 3, 5, 5]], images.labels, 8, tmp_path)
    with torch.no_grad():
        other = VQVAE.from_state_dict({k: -v for k, v in vae.state_dict().items()}, (1, 2, 4))
    for change in (dict(seed=7), dict(flip=False)):
        asked.clear()
        tokenize(vae, images, range(6), dataclasses.replace(config, **change), 'train', 3)
        assert {*asked} == {*range(6)}, change
    assert not np.array_equal(tokenize(other, images, range(6), config, 'train', 3)[0], stored)
    assert len(tokenize(vae, fewer, range(6), config, 'train', 3)[0]) == 6


def test_stored_tokens_after_a_mishap(tmp_path, monkeypatch, capsys):
    """Files that a kill or a copy left incomplete, and a disk that was away."""
    vae, images, config, asked = token_setup(tmp_path, monkeypatch)
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    go = partial(tokenize, vae, images, range(6), config, 'train')
    want, folder = go()[0], tmp_path / 'out' / 'tokens'
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:300]),
                   lambda path: path.write_bytes(b'')):
        damage(folder / 'train-4.npz')
        asked.clear()
        assert np.array_equal(go()[0], want) and {*asked} == {4, 5}
    (tmp_path / 'was away').mkdir()
    away = ('1.png', '4.png', '5.png')          # one of four images, and all of a file
    for path in folder.iterdir():
        path.unlink()
    for name in away:
        (tmp_path / name).rename(tmp_path / 'was away' / name)
    assert len(go()[0]) == 3 and not (folder / 'train-4.npz').exists()
    for name in away:
        (tmp_path / 'was away' / name).rename(tmp_path / name)
    asked.clear()
    assert np.array_equal(go()[0], want) and {*asked} == {1, 4, 5}
    for i in range(6):
        (tmp_path / f'{i}.png').write_bytes(b'damaged')
    with pytest.raises(UserError, match='none of the images for val can be read'):
        tokenize(vae, images, range(6), config, 'val')


def test_stored_tokens_belong_to_a_run(trained, tmp_path, monkeypatch):
    """New pictures under the old names: a new run in the same folder does not train on old tokens.
    Wherever the pictures lie, --resume uses what is stored."""
    write_images(tmp_path / 'images')
    words = '--data', 'images', *TINY, '--tokenizer', trained / 'model.pt'
    go = partial(command, train, monkeypatch=monkeypatch, folder=tmp_path)
    assert go(*words) == 0
    before = (tmp_path / 'tokens' / 'train-0.npz').read_bytes()
    (tmp_path / 'images').rename(tmp_path / 'moved')
    assert go('--resume', '--data', 'moved', '--workers', 0) == 0
    assert (tmp_path / 'tokens' / 'train-0.npz').read_bytes() == before
    for path in (tmp_path / 'moved').glob('*/0*.jpg'):
        Image.new('RGB', (40, 40), 'red').save(path)
    (tmp_path / 'moved').rename(tmp_path / 'images')
    assert go(*words) == 0
    old, new = np.load(io.BytesIO(before)), np.load(tmp_path / 'tokens' / 'train-0.npz')
    assert np.array_equal(old['rows'], new['rows'])
    assert not np.array_equal(old['tokens'], new['tokens'])


def test_only_validation_images_that_are_graded_are_tokenized(trained, tmp_path, monkeypatch):
    asked = {}

    def note(vae, images, rows, config, name, views=1):
        asked[name] = len(rows), views
        if name == 'val':
            raise KeyboardInterrupt

    monkeypatch.setattr(tokens, 'tokenize', note)
    monkeypatch.setattr(data, 'shapes', lambda n, size, seed: (
        np.zeros((4 * n, 32, 32, 3), np.uint8), np.arange(4 * n) % 10))
    (tmp_path / 'shapes').mkdir()               # no --data: the drawn ones are meant
    words = *TINY, '--tokenizer-steps', 0, '--views', 3, '--out', 'shapes'
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 130
    assert asked == {'train': (32000, 3), 'val': (1000, 1)}


# ---- The commands ----


def test_train_and_sample(trained, monkeypatch):
    written = {'ckpt.pt', 'model.pt', 'log.csv', 'samples.png', 'reconstructions.png'}
    assert written <= {*os.listdir(trained)}
    ckpt = torch.load(trained / 'model.pt', weights_only=True)
    assert ckpt['classes'] == ['cat', 'dog'] and ckpt['config']['depth'] == 1
    assert not {'optimizer', 'adversarial'} & {*ckpt}
    log = read_log(trained / 'log.csv')
    figures = {'PSNR', 'codebook usage', 'loss', 'loss last', 'error 3', 'train loss',
               'train images/s', 'train lambda_G', 'train gradient norm', 'train learning rate'}
    assert figures <= {name for _, name in log}
    assert list(log['transformer', 'loss']) == [1, 2, 3]
    go = partial(command, sample, monkeypatch=monkeypatch, folder=trained)
    assert go('--cls', 'all', '--n', 3, '--out', 'a.png', '--scales', 'grow.gif') == 0
    assert Image.open(trained / 'a.png').size == (34 * 3 - 2, 34 * 2 - 2)
    growing = Image.open(trained / 'grow.gif')
    assert growing.n_frames == 4 and growing.size == (34 * 3 - 2, 34 * 2 - 2)
    assert go('--cls', 'all', '--n', 2, '--batch', 1, '--seed', 2 ** 63 - 1) == 0
    assert go('--cls', 'dog', '--n', 2, '--out', 'b.png', '--scales', 'grow.png', '--top-k', 99999,
              '--ckpt', 'model.pt') == 0
    assert Image.open(trained / 'grow.png').size == (34 * 4 - 2, 34 * 2 - 2)
    for name in ('d.png', 'e.png'):
        assert go('--cls', 1, '--n', 1, '--out', name) == 0
    assert (trained / 'd.png').read_bytes() == (trained / 'e.png').read_bytes()
    words = '--cls', 'all', '--n', 40, '--seed', 7, '--cfg', 0, '--top-k', 3, '--npz', 'a.npz'
    assert go(*words) == 0
    with np.load(trained / 'a.npz') as f:                       # as the evaluators read it
        images, labels = f['arr_0'], f['arr_1']
    assert images.shape == (80, 32, 32, 3) and images.dtype == np.uint8
    order = np.random.default_rng(7).permutation(80)
    assert labels.tolist() == np.array([0] * 40 + [1] * 40)[order].tolist() != sorted(labels)
    vae, var, ckpt = load(trained / 'ckpt.pt')
    sampling = {**ckpt['sampling'], 'cfg': 0, 'top_k': 3}
    for i, part in enumerate((slice(50), slice(50, 80))):       # the npz holds what Python draws
        with precision(CPU):
            maps = var.generate(vae, labels[part], seed=seed_of(7, i), **sampling)
            assert np.array_equal(images[part], to_uint8(vae.decode(maps)))


def test_edit_and_reject(trained, monkeypatch, tmp_path, capsys):
    photo, ckpt = trained / 'images' / 'dog' / '1 é.png', ('--ckpt', trained / 'ckpt.pt')
    mask = np.zeros((80, 80), np.uint8)
    mask[10:35, 40:75] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    go = partial(command, edit, photo, *ckpt, '--n', 2, monkeypatch=monkeypatch, folder=tmp_path)
    generate, asked = VAR.generate, []

    def noted(*args, **options):
        asked.append(options)
        return generate(*args, **options)

    monkeypatch.setattr(VAR, 'generate', noted)
    assert go('--mask', 'mask.png', '--paste', '--cls', 'cat', '--cfg', 2, '--out', 'a.png') == 0
    sheet = np.asarray(Image.open(tmp_path / 'a.png'))
    assert sheet.shape == (32, 34 * 4 - 2, 3)
    whole, masked, one = sheet[:, :32], sheet[:, 34:66], sheet[:, 68:100]
    kept = np.asarray(Image.fromarray(mask).resize((32, 32), Image.LANCZOS)) <= 127
    assert (masked[~kept] == 128).all() and np.array_equal(masked[kept], whole[kept])
    assert np.array_equal(one[:, :8], whole[:, :8]) and not np.array_equal(one[~kept], whole[~kept])
    vae, _, _ = load(trained / 'ckpt.pt')
    tokens, keep = vae.encode(to_tensor(whole[None].copy())), kept.reshape(8, 4, 8, 4).all((1, 3))
    assert all(torch.equal(*pair) for pair in zip(asked[0]['given'], tokens))
    assert np.array_equal(asked[0]['keep'], keep) and asked[0]['cfg'] == 2
    black, white = np.zeros((32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 255, np.uint8)
    assert (edit.paste(black, white, ~kept)[0][~kept] == 255).all()
    assert go('--box', '0,0,.5,.5', '--box', '.5,.5,1,1', '--cls', 'cat', '--outside') == 0
    for n in (2, 1000):
        layers = torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, n)
        classifier = torch.nn.Sequential(*layers).eval()
        exported = torch.export.export(classifier, (torch.rand(6, 3, 32, 32),))
        torch.export.save(exported, tmp_path / f'{n}.pt2')
    go = partial(command, reject, *ckpt, '--n', 3, monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--rounds', 2, '--npz', 'best.npz') == 0
    assert np.load(tmp_path / 'best.npz')['arr_0'].shape == (6, 32, 32, 3)
    assert go('--rounds', 2, '--classifier', '2.pt2') == 0
    assert Image.open(tmp_path / 'best.png').size == (34 * 3 - 2, 34 * 2 - 2)
    # Columns 0 and 1 of this one are other classes.
    assert go('--rounds', 2, '--classifier', '1000.pt2') == 2
    assert '--classifier has 1000 classes, and the transformer 2' in capsys.readouterr().err


def test_masks_of_any_shape(tmp_path):
    """A mask is stretched over the photograph, and its transparent part marks nothing."""
    Image.new('RGB', (80, 40)).save(tmp_path / 'photo.png')
    half = np.zeros((50, 50, 4), np.uint8)
    half[:, 25:] = 255                                          # white on a transparent layer
    Image.fromarray(half).save(tmp_path / 'layer.png')
    half[..., 3] = 255
    Image.fromarray(half).convert('L').resize((80, 40)).save(tmp_path / 'same.png')
    for name in ('layer.png', 'same.png'):
        _, mask = edit.open_both(tmp_path / 'photo.png', tmp_path / name, 32)
        assert (mask[:, :15] < 128).all() and (mask[:, 17:] > 127).all(), name


def test_evaluate(trained, monkeypatch, capsys, tmp_path):
    assert command(evaluate, '--ckpt', trained / 'model.pt', '--data', trained / 'images',
                   monkeypatch=monkeypatch, folder=tmp_path) == 0
    said = capsys.readouterr().out
    with np.load(tmp_path / 'reconstructions.npz') as f:
        rebuilt, labels = f['arr_0'], f['arr_1']
    assert rebuilt.shape == (2, 32, 32, 3) and labels.tolist() == [0, 1]
    _, (files, _), _ = read_folder(trained / 'images')
    val = []
    for name in files:
        image = open_image(trained / 'images' / os.fsdecode(name), 32)
        val.append(crop(image, 32, 1.125))
    val = np.stack(val)
    psnr = np.mean([-10 * np.log10(((a / 255. - b / 255.) ** 2).mean())
                    for a, b in zip(val, rebuilt)])
    assert float(said.split('PSNR ')[1].split()[0]) == pytest.approx(psnr, abs=0.02)
    assert 'loss last' in said and 'error 3' in said
    vae, _, _ = load(trained / 'ckpt.pt')
    bits = 0
    with torch.no_grad():
        for r_k in vae.encode(to_tensor(val)):
            p = r_k.unique(return_counts=True)[1] / r_k.numel()
            bits += -(p * p.log2()).sum().item() * r_k.shape[1]
    assert float(said.split('bits per image ')[1].split()[0]) == pytest.approx(bits, abs=1)
    used = torch.cat(vae.encode(to_tensor(val)), dim=1).unique().numel()
    assert float(said.split('codebook usage ')[1].split()[0]) == pytest.approx(used / 99, rel=1e-3)


def test_ssim_against_its_definition():
    a, b = torch.rand(2, 2, 3, 20, 24)
    x = np.arange(-5, 6)
    window = np.exp(-(x[:, None] ** 2 + x ** 2) / 4.5)
    window /= window.sum()
    for i in range(2):
        values = []
        for c, y, z in np.ndindex(3, 10, 14):
            p, q = (t[i, c, y:y + 11, z:z + 11].double().numpy() for t in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            both = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 1e-4) * (2 * both + 9e-4)
                          / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
        assert ssim(2 * a - 1, 2 * b - 1)[i].item() == pytest.approx(np.mean(values), abs=1e-6)


def test_boxes_of_editing():
    boxes = [edit.parse_box('0,0,.25,.25'), edit.parse_box('.5,.5,1,1')]
    new, pixels = edit.new_positions(8, 32, boxes)
    assert new.sum() == 4 + 16 and new[:2, :2].all() and new[4:, 4:].all() and pixels.sum() == 320
    assert np.array_equal(edit.new_positions(8, 32, boxes, outside=True)[0], ~new)


@torch.no_grad()
def test_rejection_keeps_the_best():
    vae, var = models()
    labels = torch.tensor([1, 2, 1])
    draws = [var.generate(vae, labels, seed=seed_of(5, i), cfg=0) for i in range(3)]
    scores = []
    for maps in draws:                                          # log p by its definition, (6)
        x, target = vae.var_input(maps), torch.cat(maps, 1)
        told, untold = (var(y, x)[0].log_softmax(-1).gather(2, target[..., None]).sum((1, 2))
                        for y in (labels, torch.full_like(labels, 5)))
        scores.append(told - untold)
    seeds = {seed_of(seed_of(seed, batch), i)
             for seed in range(9) for batch in range(9) for i in range(9)}
    assert len(seeds) == 9 ** 3                                 # no draw is another one's
    kept = reject.best_of(vae, var, 3, None, labels, 5, cfg=0)
    for i, best in enumerate(torch.stack(scores).argmax(0)):
        assert all(torch.equal(r[i], d[i]) for r, d in zip(kept, draws[best]))

    def brightness(x):
        return torch.stack([x.mean((1, 2, 3)) * c for c in range(5)], 1) * 100

    kept = reject.best_of(vae, var, 3, brightness, labels, 5, cfg=0)
    want = torch.stack([brightness(vae.decode(maps)).log_softmax(1)[range(3), labels]
                        for maps in draws])
    for i, best in enumerate(want.argmax(0)):
        assert all(torch.equal(r[i], d[i]) for r, d in zip(kept, draws[best]))


@torch.no_grad()
def test_raster_scan_generation_against_the_full_forward():
    """Next-token prediction: the input of a token is the embedding of the one before it."""
    vae = Raster(models((2,), ch_mult=(1,))[0])
    _, var = models(vae.patch_nums)
    labels = torch.tensor([3, 1, 4])
    tokens = torch.cat(var.generate(vae, labels, cfg=0, top_k=1), dim=1)                # (3, 4)
    x = vae.embedding.weight[tokens[:, :-1]]
    assert torch.equal(vae.var_input(tokens.split(1, dim=1)), x)
    assert torch.equal(var(labels, x)[0].argmax(-1), tokens)
    images = vae.decode(tokens.split(1, dim=1))
    assert torch.equal(images, vae.vae.decode([tokens]))


def test_frechet_distance_of_gaussians():
    x = torch.randn(500, 4)
    assert judge.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    want = (2 * x.mean(0) + 1).square().sum() + 4 * x.T.cov().trace()       # (3 - 1) ** 2 is 4
    assert judge.frechet_distance(x, 3 * x + 1) == pytest.approx(want.item(), rel=1e-4)


def test_classes_are_matched_by_name(trained, tmp_path, monkeypatch, capsys):
    """Or by order, said, without names; a single class needs no name."""
    assert class_indices(['b', 'a'], ['a', 'b', 'c'], 3) == [1, 0]
    assert class_indices(['b', 'x'], ['a', 'b'], 2) == [1, None]
    assert class_indices(['x', 'y'], [], 2) == [0, 1] and class_indices(['x'], ['y'], 1) == [0]
    assert class_indices(['x', 'y'], [], 3) == [None, None]
    ckpt = torch.load(trained / 'model.pt', weights_only=True)
    losses = []
    for name, change in (('a', {}), ('b', {'classes': ['dog', 'cat']}), ('c', {'classes': []}),
                         ('d', {'classes': ['cat', 'cow']})):
        if name == 'b':                                 # the same model, classes in another order
            table = ckpt['var']['class_emb.weight']
            change = {**change, 'var': {**ckpt['var'], 'class_emb.weight': table[[1, 0, 2]]}}
        torch.save({**ckpt, **change}, tmp_path / f'{name}.pt')
        status = command(evaluate, '--ckpt', f'{name}.pt', '--data', trained / 'images',
                         monkeypatch=monkeypatch, folder=tmp_path)
        said, error = capsys.readouterr()
        assert status == (2 if name == 'd' else 0)
        assert ('is taken for the i-th of cat, dog' in said) == (name == 'c')
        losses.append(said.split('  loss ')[1].split()[0] if status == 0 else error)
    assert losses[0] == losses[1] == losses[2] and 'does not know 1 of the 2' in losses[3]


def test_sizes_come_from_the_weights(tmp_path, monkeypatch, capsys):
    """A model of 512 px is graded, and its options are those of the next smaller size."""
    assert make_config(dict(data='x', size=512)).batch == 256
    sides = (1, 2, 16)                                          # 16 times 2 ** 5 pixels
    vae = VQVAE(sides, 16, 4, 4, (1, 1, 1, 1, 1, 1), res_blocks=1)
    assert vae.image_size == 512
    torch.save({'vae': vae.state_dict(), 'patch_nums': sides}, tmp_path / 'big.pt')
    write_images(tmp_path / 'images', 2)
    assert command(evaluate, '--ckpt', 'big.pt', '--data', 'images', monkeypatch=monkeypatch,
                   folder=tmp_path) == 0
    assert np.load(tmp_path / 'reconstructions.npz')['arr_0'].shape == (2, 512, 512, 3)


def test_the_plan_and_what_a_resumed_run_keeps(trained, tmp_path, monkeypatch, capsys):
    config = make_config({'data': str(trained / 'images')})
    assert (config.size, config.tokenizer, config.lr) == (256, 'official', 1e-4)
    assert config.flip and config.views == 2                    # no image is always the same crop
    assert make_config({'data': 'cifar10'}).size == 32
    saved = make_config({'data': 'x', 'size': 32, 'depth': 3, 'precision': 'float16'}).settings()
    resumed = make_config({'steps': 7}, saved | {'gone': 1})
    assert (resumed.steps, resumed.depth, resumed.ch) == (7, 3, 32)
    assert resumed.precision == 'float16'
    with monkeypatch.context() as patch:
        patch.setattr('support.options.rank_and_world', lambda: (0, 3))
        with pytest.raises(UserError, match='--batch 16 must be a multiple of the 3 processes'):
            make_config({})
        with pytest.raises(UserError, match='--tokenizer-batch 16 must be'):
            make_config({'batch': 3})
        make_config({'batch': 3, 'tokenizer': 'x'})             # without stage 1
    small = [word for word in TINY if word != '--steps'][:-3]   # without --steps 3 --workers 0
    words = '--data', trained / 'images', *small, '--workers', 0, '--out', tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_stage', lambda stage, state: state.update(var={}))
        assert command(train, *words, monkeypatch=patch, folder=tmp_path) == 0
        # 300 times each of 11 images, of which one turns out to be unreadable.
        assert '825 steps of 4, each of 10 images 330 times' in capsys.readouterr().out
    words = '--data', trained / 'images', *TINY, '--out', tmp_path
    assert command(train, *words, monkeypatch=monkeypatch, folder=tmp_path) == 0
    capsys.readouterr()
    go = partial(command, train, '--resume', '--out', tmp_path, '--workers', 0,
                 monkeypatch=monkeypatch, folder=trained)
    assert go('--steps', 5, '--batch', 8) == 0
    assert '5 steps of 8' in (said := capsys.readouterr().out) and 'learning rate 0.003' in said
    assert go('--patch-nums', '1,8') == 2
    said = capsys.readouterr().err
    assert '--patch-nums (1, 8): ' in said and 'has (1, 2, 4, 8)' in said
    assert go('--init', trained / 'model.pt') == 2
    assert 'leave out --init' in capsys.readouterr().err


def test_data_that_changed_before_a_run_is_resumed(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / 'images')
    go = partial(command, train, '--data', 'images', *TINY, monkeypatch=monkeypatch,
                 folder=tmp_path)
    assert go() == 0
    (tmp_path / 'images' / 'dog').rename(tmp_path / 'images' / 'ant')
    assert go('--resume') == 2
    assert 'have changed since this run began: ant, dog' in capsys.readouterr().err
    write_images(tmp_path / 'images', 6, ('bee', 'dog'))
    assert go('--resume') == 2


def test_terminals(monkeypatch):
    """One that does not know a letter; and a notebook's stream: write() and flush() alone."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr('sys.stdout', screen)
    run(lambda: print('caf\u00e9', flush=True))
    assert screen.buffer.getvalue() == rb'caf\xe9' + os.linesep.encode()
    written = []
    monkeypatch.setattr('sys.stdout', SimpleNamespace(write=written.append, flush=lambda: None))
    run(lambda: print('x', flush=True))
    assert written == ['x', '\n']


def test_paths_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.setattr('sys.argv', ['train.py', '--out=~/runs/a', '--data=~/b', '--init=~/c.pt'])
    given = options.parse('')
    assert given == dict(out=tmp_path / 'runs' / 'a', data=str(tmp_path / 'b'),
                         init=str(tmp_path / 'c.pt'))


@torch.no_grad()
def test_cast_weights_draw_the_same_tokens():
    """What autocast would do for each batch is done once."""
    vae, var = models()
    with precision(CPU, 'bfloat16'):
        want = var.generate(vae, [0, 1, 2], seed=0)
        cast = cast_linear_weights(var, CPU, 'bfloat16')
        found = cast.generate(vae, [0, 1, 2], seed=0)
    assert cast.head.weight.dtype == torch.bfloat16 and cast.pos_1LC.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(want, found))


def test_gradients_of_all_processes_are_summed_in_one_transfer(monkeypatch):
    transfers = []

    def all_reduce(x):                                          # with another process of the same
        transfers.append(x.numel())
        x.mul_(2)

    monkeypatch.setattr(running.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(running.dist, 'all_reduce', all_reduce)
    before = [torch.randn(3), torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)]
    after = [x.clone() for x in before]
    running.add_up(after)
    assert transfers == [123] and all(torch.equal(2 * a, b) for a, b in zip(before, after))


def test_surroundings(trained, tmp_path, monkeypatch, capsys):
    """No compiler, file systems."""
    go = partial(command, train, '--data', trained / 'images', *TINY, '--out', tmp_path,
                 folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr('torch._inductor.config.cpp.cxx', ('no-such-compiler',))
        capsys.readouterr()
        assert go('--compile', monkeypatch=patch) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and '--compile does not work here' in error
    with monkeypatch.context() as patch:
        patch.setenv('WORLD_SIZE', '2')
        assert go(monkeypatch=patch) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and 'start by torchrun, or unset it' in error
    class NoLocks:                                              # a file system without them
        def execute(self, sql):
            raise sqlite3.OperationalError('disk I/O error')

        def close(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(running.sqlite3, 'connect', lambda path, timeout: NoLocks())
        assert go(monkeypatch=patch) == 0
        assert 'no file can be locked there' in capsys.readouterr().out


def killed(*args):
    raise KeyboardInterrupt


@pytest.mark.parametrize('source', ['--init', '--tokenizer', 'official'])
def test_a_run_that_is_killed_before_stage_2_is_resumed_from_its_folder_alone(
        source, trained, tmp_path, monkeypatch):
    """The file that it started from, and the network, are gone."""
    (tmp_path / 'start.pt').write_bytes((trained / 'model.pt').read_bytes())
    go = partial(command, train, '--workers', 0, monkeypatch=monkeypatch, folder=tmp_path)
    words = ['--data', trained / 'images', *TINY, source, 'start.pt']
    if source == '--init':
        words += ['--tokenizer', 'train']
    if source == 'official':
        words[-2:] = ['--tokenizer', 'official']
        monkeypatch.setattr('support.checkpoints.fetch', lambda *args: 'start.pt')
    assert go(*words, '--out', 'whole') == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, 'tokenize_both', killed)
        assert go(*words, '--out', 'killed') == 130
    (tmp_path / 'start.pt').unlink()
    assert go('--resume', '--out', 'killed') == 0
    assert same_weights(tmp_path / 'whole' / 'model.pt', tmp_path / 'killed' / 'model.pt')


def test_a_new_run_moves_the_old_one_aside(trained, tmp_path, monkeypatch, capsys):
    """What was moved aside before stays; and --init can be a file that is moved."""
    words = '--data', trained / 'images', *TINY, '--flip', '--out', tmp_path
    go = partial(command, train, *words, monkeypatch=monkeypatch, folder=tmp_path)
    assert go() == 0
    first = (tmp_path / 'model.pt').read_bytes()
    assert go('--init', tmp_path / 'model.pt') == 0
    said = capsys.readouterr().out
    assert 'moved ckpt.pt, model.pt, log.csv, tokens of an earlier run to' in said
    assert go() == 0
    assert (tmp_path / 'previous-1' / 'model.pt').read_bytes() == first
    assert same_weights(tmp_path / 'ckpt.pt', tmp_path / 'previous-1' / 'ckpt.pt')
    assert {*os.listdir(tmp_path / 'previous-2')} == {'ckpt.pt', 'model.pt', 'log.csv', 'tokens'}


def test_a_single_class_needs_no_name(trained, tmp_path, monkeypatch):
    """faces/ is moved, and graded on a folder of another name."""
    go = partial(command, train, *TINY, monkeypatch=monkeypatch, folder=tmp_path)
    write_images(tmp_path, 6, ('faces', 'people'))
    assert go('--data', 'faces') == 0
    (tmp_path / 'faces').rename(tmp_path / 'job3')
    assert go('--data', 'job3', '--resume') == 0
    assert command(evaluate, '--data', 'people', monkeypatch=monkeypatch, folder=tmp_path) == 0


def test_a_tokenizer_brings_its_scales(trained, tmp_path, monkeypatch, capsys):
    go = partial(command, train, '--data', trained / 'images', *TINY, '--steps', 1,
                 monkeypatch=monkeypatch, folder=tmp_path)
    assert go('--patch-nums', '1,3,8', '--out', 'a') == 0
    assert go('--tokenizer', 'a/model.pt', '--out', 'b') == 0
    ckpt = torch.load('b/model.pt', weights_only=True)
    assert tuple(ckpt['patch_nums']) == (1, 3, 8) and load('b/model.pt')[1].patch_nums == (1, 3, 8)
    assert go('--tokenizer', 'a/model.pt', '--patch-nums', '1,2,4,8', '--out', 'c') == 2
    assert 'a/model.pt has (1, 3, 8)' in capsys.readouterr().err


def test_bad_input_gets_one_line_and_status_2(trained, monkeypatch, capsys, tmp_path):
    (tmp_path / 'empty').mkdir()
    touch(tmp_path, *(f'broken/cat/{i}.jpg' for i in range(3)),
          *(f'half/dog/{i}.jpg' for i in range(9)))
    write_images(tmp_path / 'half', 6, ('cat',))
    whole = (trained / 'ckpt.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(whole[:len(whole) // 2])
    torch.save({'something': 'else'}, tmp_path / 'other.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'ckpt.pt').write_bytes((trained / 'model.pt').read_bytes())
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps(Evil()))
    torch.save({'version': 1, 'vae': Evil()}, tmp_path / 'evil2.pt')
    vae, var = models()
    torch.save(var.state_dict(), tmp_path / 'var.pth')
    torch.save(VQVAE(ch=32, ch_mult=(1,)).state_dict(), tmp_path / 'vae.pth')
    Image.new('L', (9, 9)).save(tmp_path / 'black.png')
    (tmp_path / 'data').mkdir()
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'data' / 'vgg16-397923af.pth')
    ckpt, photo = ('--ckpt', trained / 'ckpt.pt'), trained / 'images' / 'dog' / '1 é.png'
    box, data_ = ('--box', '0,0,.5,.5'), ('--data', trained / 'images')
    cases = [
        (train, ['--data', 'nowhere'], 'no such folder'),
        (train, ['--data', 'empty'], 'no images'),
        (train, ['--data', 'broken', *TINY], 'images in a row cannot be read'),
        (train, [*data_, '--classes', 0, *TINY], 'no such class'),
        (train, ['--data', 'half', *TINY, '--tokenizer', trained / 'model.pt', '--out', 'x'],
         'of class dog can'),
        (train, ['--size', 48], 'images of 32 px'),
        (train, ['--data', 'half', '--size', 128], 'images of 64 px'),
        (train, ['--patch-nums', '1,2,5'], 'images of 20 px'),
        (train, ['--patch-nums', '2,1'], 'which rise'),
        (train, ['--patch-nums', '8'], 'at least two'),
        (train, ['--patch-nums', 'x'], 'invalid'),
        (train, ['--depth', 0], 'at least 1'),
        (train, ['--lr', -1], 'out of range'),
        (train, ['--lr', 'x'], "invalid float value: 'x'"),
        (train, ['--seed', -1], 'out of range'),
        (train, ['--precision', 'int8'], 'choose from'),
        (train, ['--nothing', 1], 'unrecognized'),
        (train, ['--resume'], 'No such file'),
        (train, ['--resume', '--out', trained / 'images'], 'No such'),
        (train, ['--resume', '--out', 'old'], 'nothing to resume'),
        (train, [*data_, '--classes', 'cow', *TINY], 'no such class'),
        (train, [*data_, *TINY, '--perceptual', 1], 'VGG-16'),
        (train, [*data_, *TINY, '--tokenizer', 'var.pth'], 'has no tokenizer'),
        (train, [*data_, *TINY, '--tokenizer', 'vae.pth'], 'makes images of 8 px'),
        (sample, [], 'cannot read ckpt.pt: No such file'),
        (sample, ['--ckpt', 'cut.pt'], 'damaged'),
        (sample, ['--ckpt', 'other.pt'], 'no tokenizer'),
        (sample, ['--ckpt', 'list.pt'], 'cannot read'),
        (sample, ['--ckpt', 'evil.pt'], 'evil.pt'),
        (sample, ['--ckpt', 'evil2.pt'], 'could run code'),
        (sample, ['--ckpt', 'var.pth'], 'add --tokenizer'),
        (sample, ['--ckpt', 'vae.pth'], 'tokenizer only'),
        (sample, ['--ckpt', 'var.pth', '--tokenizer', trained / 'ckpt.pt'],
         'was trained with another tokenizer'),
        (sample, [*ckpt, '--cls', 'cow'], 'no such class'),
        (sample, [*ckpt, '--cls', 2], 'no such class'),
        (sample, [*ckpt, '--top-p', 2], 'from 0 to 1'),
        (sample, [*ckpt, '--n', 0], 'at least 1'),
        (sample, [*ckpt, '--n', 1, '--out', 'a.xyz'], 'use .png'),
        (sample, [*ckpt, '--cfg', 'nan'], 'from 0 to 100'),
        (sample, [*ckpt, '--seed', 2 ** 63], 'from 0 to'),
        (train, [*data_, *TINY, '--out', trained / 'log.csv' / 'x'], 'log.csv'),
        (train, ['--data', trained / 'images', '--size', 32, '--out', trained / 'images' / 'run'],
         'would train on the pictures'),
        (sample, [*ckpt, '--n', 1, '--out', trained / 'log.csv' / 'a.png'], 'cannot write'),
        (sample, [*ckpt, '--n', 1, '--npz', trained / 'log.csv' / 'a.npz'], 'cannot write'),
        (edit, [*ckpt, 'nothing.jpg', *box], 'nothing.jpg'),
        (edit, [*ckpt, photo], 'to generate'),
        (edit, [*ckpt, photo, '--box', '0,0,1,1'], 'to generate'),
        (edit, [*ckpt, photo, '--box', '0,0,2,.5'], 'fractions'),
        (edit, [*ckpt, photo, '--box', 'middle'], 'fractions'),
        (edit, [*ckpt, photo, '--mask', 'var.pth'], 'cannot read'),
        (edit, [*ckpt, photo, '--mask', 'black.png'], 'to generate'),
        (reject, [*ckpt, '--rounds', 0], 'at least 1'),
        (reject, [*ckpt, '--classifier', 'var.pth'], 'torch.export'),
    ]
    for module, words, why in cases:
        capsys.readouterr()
        status = command(module, *words, monkeypatch=monkeypatch, folder=tmp_path)
        error = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and 'error: ' in error[-1] and why in error[-1], (words, error)
        lines = [line for line in error if not line.startswith('usage: ')]
        assert len(lines) == 1, (words, error)
    assert not (tmp_path / 'touched').exists() and (trained / 'ckpt.pt').read_bytes() == whole


def test_out_of_memory_gets_a_hint_and_a_fault_keeps_its_traceback(capsys):
    def fail(error):
        raise error

    for error in (torch.OutOfMemoryError('CUDA out of memory'), MemoryError(),
                  RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')):
        with pytest.raises(SystemExit):
            run(partial(fail, error))
        assert 'a smaller --tokenizer-batch in stage 1' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='a fault'):
        run(partial(fail, RuntimeError('a fault')))


# ---- The README ----


def test_names_in_the_readme_exist():
    """README.md links [`Class.method`](file.py): each name is defined in its file."""
    text = (HERE / 'README.md').read_text()
    links = re.findall(r'\[`([\w.]+)`\]\(([\w/]+\.py)\)', text)
    assert len(links) > 20
    for name, file in links:
        lines, at = (HERE / file).read_text().splitlines(), 0
        for part in name.removeprefix(Path(file).stem + '.').split('.'):
            pattern = rf'\s*(class|def) {part}\b|{part}\b.* = '
            at = next((i for i in range(at, len(lines)) if re.match(pattern, lines[i])), None)
            assert at is not None, f'{name} is not in {file}'
    for page in (HERE / 'README.md', HERE / 'experiments' / 'README.md'):
        for picture in re.findall(r'[("]([\w./]+\.png)[)"]', page.read_text()):
            assert (page.parent / picture).exists(), picture


def test_python_of_the_readme_runs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    Image.new('RGB', (40, 50), 'red').save(trained / 'photo.jpg')
    blocks = re.findall(r'```python\n(.*?)```', (HERE / 'README.md').read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_names_in_the_tour_exist():
    """The notebook is executed by hand; here only its imports and attributes are looked up."""
    cells = json.loads((HERE / 'experiments' / 'tour.ipynb').read_text())['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    vae, model = models()
    known, looked_up = {'vae': vae, 'var': model}, 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith('torch'):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split('.')
            if chain[0] in known and all(part.isidentifier() for part in chain):
                operator.attrgetter('.'.join(chain[1:]))(known[chain[0]])
                looked_up += 1
    assert looked_up > 20 and len(cells) <= 27

