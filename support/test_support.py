"""Tests of what is not the paper's: files, folders, options, the commands, the experiments.

The oracles are real files of every kind, damaged ones, and the commands themselves.
"""
import ast
import base64
import importlib
import json
import operator
import os
import pickle
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import support                                  # before torch: see there
import numpy as np
import pytest
import torch
from PIL import Image

import edit
import evaluate
import reasons
import sample
import train
from conftest import HERE, TINY, go, models, read_ckpt, read_log, refill, same, write_images
from raster import Raster
from support import checkpoints, data, images, options
from support import run as running
from support.images import crop, fit, open_image, to_tensor, to_uint8
from support.options import make_config
from support.run import UserError, seed_of
from var import VAR


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def released(trained, tmp_path, monkeypatch):
    """Files as the released ones, vae.pth and var.pth, of small models. Returns their weights."""
    for name, value in dict(vocab_size=99, ch=8, network=options.SMALL).items():
        monkeypatch.setitem(options.RECIPES, name, (*options.RECIPES[name][:-1], value))
    weights = read_ckpt(trained / 'ckpt.pt')['vae']
    var = VAR((1, 2, 4, 8), 2, 3, 99, 16, shared_aln=True).state_dict()
    torch.save(weights, tmp_path / 'vae.pth')
    torch.save(var, tmp_path / 'var.pth')
    return weights, var


def test_released_files(released, tmp_path):
    """As a pair, and as the official trainer nests them. Their sizes are measured."""
    weights, shared = released
    others = VAR((2, 3, 5, 8), 1, 7, 99, 16).state_dict()
    for sides, var in (((1, 2, 4, 8), shared), ((2, 3, 5, 8), others)):
        torch.save(var, tmp_path / 'var.pth')
        nested = {'trainer': {'var_wo_ddp': var, 'vae_local': weights}}
        torch.save(nested, tmp_path / 'both.pth')
        for names in (('var.pth', 'vae.pth'), ('both.pth',)):
            vae, found, ckpt = checkpoints.load(*(tmp_path / name for name in names))
            assert same(vae.state_dict(), weights) and same(found.state_dict(), var)
            assert vae.patch_nums == found.patch_nums == sides
            assert ckpt['classes'] == list('0123456')[:found.num_classes]
            assert ckpt['config']['sampling'] == dict(cfg=1.5, top_k=900, top_p=0.96)


DEEP = {                                        # of 16 bits per colour: Pillow writes none
    'deep.png': 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAAC0lEQVR4nGNgAAMAAAcAAbKGrPQAAAAA'
                'SUVORK5CYII=',
    'deep.tif': 'SUkqAAgAAAAHAAABAwABAAAAAQAAAAEBAwABAAAAAQAAAAIBAwADAAAAYgAAAAYBAwABAAAAAgAA'
                'ABEBBAABAAAAaAAAABUBAwABAAAAAwAAABcBBAABAAAABgAAAAAAAAAQABAAEAAAAAAAAAA='}


def test_images_of_every_kind(tmp_path):
    colour = (200, 20, 30)
    red, blue = Image.new('RGB', (20, 10), colour), Image.new('RGB', (20, 10), 'blue')
    clear = Image.new('RGBA', (20, 10), (*colour, 0))           # nothing is opaque: colours count
    exif = red.getexif()
    exif[0x112] = 6                                             # turned by a quarter
    for name, image, how in (
            ('a.png', red, {}), ('b.tif', red.convert('CMYK'), {}), ('c.png', red.convert('P'), {}),
            ('d.webp', red.convert('RGBA'), {}), ('f.jpg', red, dict(exif=exif)),
            ('e.png', clear, {}), ('g.gif', red, dict(save_all=True, append_images=[blue]))):
        image.save(tmp_path / name, **how)
        found = open_image(tmp_path / name, 8)
        assert np.abs(np.asarray(found).mean((0, 1)) - colour).max() < 12, name
        assert found.size == ((10, 20) if name == 'f.jpg' else (20, 10))
    clear.paste('black', (0, 0, 10, 10))
    clear.save(tmp_path / 'half.png')                           # white behind the other half
    assert np.asarray(open_image(tmp_path / 'half.png', 8)).mean() == 127.5
    for name, content in DEEP.items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    Image.fromarray(np.ones((9, 9), np.uint16)).save(tmp_path / 'grey.tif')
    for name in (*DEEP, 'grey.tif'):
        Image.open(tmp_path / name).load()                      # Pillow would read it
        with pytest.raises(UserError, match=f'{name}: more than 8 bits per channel'):
            open_image(tmp_path / name, 8)
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'a.png').read_bytes()[:-30])
    (tmp_path / 'empty.jpg').touch()
    for name in ('cut.png', 'empty.jpg', 'none.jpg'):
        with pytest.raises(UserError, match=f'cannot read .*{name}: '):
            open_image(tmp_path / name, 8)


def test_fit_and_crop():
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((300, 250), Image.BICUBIC)
    # The release's: the shorter side to 1.125 x size, then a square. Here in one call of Pillow.
    want = np.asarray(photo.resize((135, 112), Image.LANCZOS).crop((17, 6, 117, 106)))
    assert np.abs(crop(fit(photo, 112), 100).astype(int) - want).mean() < 2
    for image, box, size in ((photo.resize((400, 10)), (185, 0, 215, 10), (60, 20)),
                             (photo.resize((10, 400)), (0, 185, 10, 215), (20, 60))):
        want = image.crop(box).resize(size, Image.LANCZOS)      # at most 3 : 1, the middle
        assert np.abs(fit(image, 20) - np.asarray(want, float)).mean() < 2
    x, y = np.meshgrid(np.arange(40), np.arange(34))
    pixels, rng = np.stack([x, y, y], axis=2), np.random.default_rng(0)
    assert crop(pixels, 32)[0, 0].tolist() == [4, 1, 1]         # the centre
    corners = {tuple(crop(pixels, 32, rng.random(2))[0, 0, :2]) for _ in range(500)}
    assert corners == {(x, y) for x in range(9) for y in range(3)}
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_tensor(every)), every)


def test_images_are_read_once(tmp_path, capsys):
    """One in a hundred may be unreadable."""
    whole = [np.full((8, 8 + i % 5, 3), i % 251, np.uint8) for i in range(1200)]
    items = [image if i % 100 else str(tmp_path / f'{i}.jpg') for i, image in enumerate(whole)]
    found, labels = images.read_all(items, np.arange(1200), 8)
    said = capsys.readouterr().out
    assert said.count('left out: cannot read') == 10 and '900.jpg' in said
    assert labels.tolist() == [i for i in range(1200) if i % 100]
    assert all(np.array_equal(a, whole[i]) for a, i in zip(found, labels, strict=True))
    items[7] = str(tmp_path / '7.jpg')
    with pytest.raises(UserError, match='13 of 1200 images cannot be read'):
        list(images.read_images(items, range(1200), 8))


def test_nothing_is_lost_when_the_disk_refuses(tmp_path):
    (tmp_path / 'a').write_bytes(b'old')
    for error in (OSError(28, 'No space left on device'), RuntimeError('of torch.save')):
        with pytest.raises(UserError, match='cannot write .*a; the disk may be full: '):
            running.write_file(tmp_path / 'a', Mock(side_effect=error))
        assert (tmp_path / 'a').read_bytes() == b'old' and os.listdir(tmp_path) == ['a']


def test_layouts_of_folders(tmp_path):
    """{name: files, classes, how many images are for training and for validation, from where}"""
    held = 'held out'
    cases = {
        'classes': (['b/1.jpg', 'b/2.JPEG', 'a/1.png', 'a/2.gif'], 'a b', 2, 2, held),
        'images': (['a/images/1.jpg', 'a/images/2.jpg', 'a/x/3.jpg'], 'a', 1, 1, held),
        'splits': (['train/a/1.jpg', 'train/b/1.jpg', 'val/b/2.jpg'], 'a b', 2, 1, 'val/'),
        'capitals': (['Train/a/1.jpg', 'Valid/a/2.jpg', 'Valid/a/3.jpg'], 'a', 1, 2, 'Valid/'),
        'val before test': (['train/a/1.jpg', 'test/a/2.jpg', 'val/a/3.jpg'], 'a', 1, 1, 'val/'),
        'no labels': (['train/a/1.jpg', 'train/a/2.jpg', 'val/3.jpg'], 'a', 1, 1, held),
        'stray': (['train/a/1.jpg', 'train/a/2.jpg', 'val/z/3.jpg'], 'a', 1, 1, held),
        'flat': (['1.jpg', '2.jpg'], 'images', 1, 1, held),
        'flat splits': (['train/1.jpg', 'train/2.jpg', 'val/3.jpg'], 'images', 2, 1, 'val/'),
        'bus': ([f'{c}/{i}.jpg' for c in ('bus', 'train') for i in '12'], 'bus train', 2, 2, held),
        'numbers': (['10/1.jpg', '10/2.jpg', '2/1.jpg', '2/2.jpg', 'x/3'], '2 10', 2, 2, held),
        'endings': (['a/1.jpg', 'a/2.jpg', 'a/3.h5', 'a/4.ps', 'b/5.mpg'], 'a', 1, 1, held),
        'beside': (['a/1.jpg', 'a/2.jpg', '3.jpg'], 'a', 1, 1, held)}
    for name, (files, classes, n, n_val, source) in cases.items():
        touch(tmp_path / name, *files)
        *sets, found = data.read_folder(tmp_path / name)
        assert ' '.join(sets[0]) == classes and found == source, name
        train_, val = ([path for part in groups.values() for path in part] for groups in sets)
        assert (len({*train_}), len({*val} - {*train_})) == (n, n_val), name
        assert all(os.path.exists(path) for path in train_ + val), name


def test_what_is_held_out_stays_so():
    names, held = [f'{i}.jpg' for i in range(600)], []
    for root, part in (('before', names[:100]), ('after', names)):
        groups = {c: [f'{root}/{c}/{name}' for name in part] for c in 'ab'}
        training, val = data.hold_out(groups)
        assert all(sorted(training[c] + val[c]) == sorted(groups[c]) for c in 'ab')
        held.append({c: {os.path.basename(path) for path in val[c]} for c in 'ab'})
    assert all(held[0][c] == held[1][c] & {*names[:100]} for c in 'ab')
    assert all(0.07 < len(held[1][c]) / 600 < 0.13 for c in 'ab') and held[1]['a'] != held[1]['b']


def test_the_work_grows_with_the_classes_and_not_with_their_square(monkeypatch):
    class Name(str):                                            # counts its comparisons
        compared, __hash__ = 0, str.__hash__

        def __eq__(self, other):
            Name.compared += 1
            assert Name.compared < 10 * 20_000
            return str.__eq__(self, other)

    groups = {Name(f'n{i}'): ['1.jpg', '2.jpg'] for i in range(20_000)}
    monkeypatch.setattr(data, 'read_folder', lambda root: (*data.hold_out(groups), 'held out'))
    for classes, n in ((0, 20_000), (15_000, 15_000)):
        found = data.read_data(make_config(dict(data='x', size=32, classes=classes)))
        assert len(found.classes) == n == found.train[1][-1] + 1


def test_subsets_and_names_of_classes(tmp_path, monkeypatch):
    names = ['2', 'cat', 'dog, hot']
    touch(tmp_path, *(f'cifar10/{name}/{i}.jpg' for name in names for i in range(40)))
    monkeypatch.chdir(tmp_path)
    words = 'train.py --size 32 --data ./cifar10 --limit 9 --classes 2'
    monkeypatch.setattr('sys.argv', words.split())
    found = data.read_data(make_config(options.parse('')))
    items, labels = found.train
    assert found.classes == ['2', 'cat'] and labels.tolist() == [0] * 9 + [1] * 9
    assert {Path(path).parent.name for path in items[:9]} == {'2'}
    assert {*found.val[1]} == {0, 1} and not {*items} & {*found.val[0]}
    for words, labels in ((['dog, hot', '2', '1'], [2, 0, 1]), (['all'], [0, 1, 2]), (None, [3])):
        asked = Mock(cls=words, n=1)                            # a name before it is a number
        assert options.chosen_labels(asked, {'classes': names}, [3]).tolist() == labels


def test_cifar10(tmp_path):
    records = np.random.default_rng(0).integers(0, 256, (6, 10, 3073), dtype=np.uint8)
    records[..., 0] = np.arange(10)[::-1]
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    with tarfile.open(tmp_path / 'x.tar.gz', 'w:gz') as tar:
        for name, content in zip(names, [*records, b'a b c d e f g h i j']):
            (tmp_path / name).write_bytes(bytes(content))
            tar.add(tmp_path / name, f'cifar-10-batches-bin/{name}')
    with pytest.raises(UserError, match='cannot fetch.*bring it to'):       # by its checksum
        checkpoints.fetch((tmp_path / 'x.tar.gz').as_uri(), '0' * 64, tmp_path / 'bad')
    assert not os.listdir(tmp_path / 'bad')
    found, labels, classes = data.cifar10(tmp_path / 'x.tar.gz')
    assert classes == list('abcdefghij') and labels.tolist() == [*range(9, -1, -1)] * 6
    assert found[57, 5, 7].tolist() == [records[5, 7, 1 + c * 1024 + 5 * 32 + 7] for c in range(3)]


def test_rows_and_crops_of_stage_1():
    """Every epoch is a permutation; crops are anywhere in an image, and mirrored at random."""
    rows = np.concatenate([rows for _, rows in data.step_rows(10, 4, 0, 0, 5)]).tolist()
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10)) and rows[:10] != rows[10:]
    steps, later = zip(*data.step_rows(10, 4, 0, 3, 5))
    assert steps == (3, 4) and np.concatenate(later).tolist() == rows[12:]
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    items = [np.stack([x, y, y], axis=2).astype(np.uint8)]
    for flip in (False, True):
        config = make_config(dict(flip=flip, tokenizer_steps=5, tokenizer_batch=8))
        stage = train.TokenizerStage(config, None, items, items)
        crops = torch.cat([batch for batch, in stage.batches(0)]).int()     # (40, 32, 32, 3)
        assert torch.equal(next(stage.batches(3))[0], crops[24:32])
        mirrored = crops[:, 0, 0, 0] > crops[:, 0, -1, 0]
        assert 10 < mirrored.sum() < 30 if flip else not mirrored.any()
        for corners, most in ((crops[:, 0, :, 0].amin(1), 32), (crops[:, 0, 0, 1], 16)):
            assert corners.min() < most / 8 and most * 7 / 8 < corners.max() <= most
            assert len(corners.unique()) > most / 2


@torch.no_grad()
def test_stored_tokens():
    """Those of the centre, and of crops anywhere, of which every second one is mirrored."""
    (vae, _), rng, places = models((1, 2, 4)), np.random.default_rng(0), [[], [], []]
    items = list(rng.integers(0, 256, (6, 10, 16, 3), dtype=np.uint8))
    config = Mock(seed=0, zoom=1.25, flip=True, device='cpu')
    rows, tokens = zip(*data.tokenize(vae, [*items[:3], 'none.png', *items[3:]], 3, config))
    assert rows[::3] == (0, 1, 2, 4, 5, 6) and tokens[0].dtype == np.uint16
    corners = [(y, x) for y in range(3) for x in range(9)]
    for image, views in zip(items, np.stack(tokens).reshape(6, 3, -1), strict=True):
        for view, row in enumerate(views):
            crops = np.stack([image[y:y + 8, x:x + 8] for y, x in corners])
            crops = crops[:, :, ::-1].copy() if view == 1 else crops
            every = torch.cat(vae.encode(to_tensor(crops)), dim=1).tolist()
            places[view].append(corners[every.index(row.tolist())])
    assert places[0] == [(1, 4)] * 6 and places[1] != places[2]
    assert len({*places[1]}) > 3 and len({*places[2]}) > 3


def test_processes_see_the_same_images(monkeypatch):
    monkeypatch.setattr(running, 'dist', Mock(
        get_rank=lambda: 0, get_world_size=lambda: 3, gather_object=lambda x, parts: (
            parts.__setitem__(slice(3), [x, [x[0] - 1, x[1]], x]))))
    monkeypatch.setattr(data, 'read_folder', lambda root: ({'a': ['1', '2']}, {'a': ['3']}, 'val/'))
    with pytest.raises(UserError, match='do not see the same .*2, 1.*1, 1.*2, 1'):
        data.read_data(make_config(dict(data='x')))


def test_how_a_run_begins(trained, tmp_path, monkeypatch):
    """Until stage 2 there is nothing to sample from, although --init has a transformer."""
    shutil.copytree(trained / 'images', tmp_path / 'images')
    words = '--data', 'images', *TINY, '--init', trained / 'ckpt.pt', '--tokenizer', 'train'
    new_models, path = train.new_models, tmp_path / 'ckpt.pt'
    with monkeypatch.context() as patch:                        # another run begins meanwhile
        patch.setattr(train, 'new_models', lambda *args: path.touch() or new_models(*args))
        assert 'ckpt.pt is there: --resume' in go(tmp_path, train, *words, status=2)
        patch.setattr(train, 'new_models', new_models)          # and was killed at once
        patch.setattr(train, 'train_stage', Mock(side_effect=KeyboardInterrupt))
        go(tmp_path, train, *words, '--resume', status=130)
    whole = path.read_bytes()
    assert 'ckpt.pt is there: --resume' in go(tmp_path, train, *words, status=2)
    assert 'ckpt.pt has no trained transformer' in go(tmp_path, sample, status=2)
    shutil.copytree(tmp_path / 'images/cat', tmp_path / 'images/cow')
    assert 'had other classes when this run began' in go(tmp_path, train, '--resume', status=2)
    assert path.read_bytes() == whole
    shutil.rmtree(tmp_path / 'images/cow')
    go(tmp_path, train, '--resume', '--tokenizer-steps', 2)
    assert {*read_log(tmp_path / 'log.csv')['tokenizer', 'train loss']} == {0, 1}
    words = '--data', 'images', *TINY, '--tokenizer-steps', 0, '--steps', 0, '--out', 'new'
    assert 'a new run begins' in go(tmp_path, train, *words, '--resume')
    assert {*os.listdir(tmp_path / 'new')} == {'ckpt.pt', 'tokens.npz'}


def test_what_resume_may_change(trained, tmp_path):
    """In stage 2, without the pictures, and after a kill within a row of the log."""
    for name in ('ckpt.pt', 'tokens.npz', 'log.csv'):
        shutil.copy(trained / name, tmp_path)
    resume = '--resume', '--data', 'images', *TINY, '--flip'    # all of them as they were
    for words in (['--limit', 3], ['--seed', 1], ['--views', 3], ['--no-flip'], ['--batch', 8],
                  ['--tokenizer-steps', 9], ['--classes', 1], ['--data', 'shapes']):
        error = go(tmp_path, train, *resume, *words, status=2)
        assert words[0].replace('no-', '') in error and '--resume cannot change it' in error
    assert (tmp_path / 'ckpt.pt').read_bytes() == (trained / 'ckpt.pt').read_bytes()
    os.truncate(tmp_path / 'log.csv', (tmp_path / 'log.csv').stat().st_size - 5)
    go(tmp_path, train, *resume, *'--steps 5 --lr .1 --micro-batch 2 --precision float16'.split())
    ckpt = read_ckpt(tmp_path / 'ckpt.pt')
    changes = dict(steps=5, lr=.1, micro_batch=2, precision='float16')
    assert ckpt['step'] == 5 and changes.items() <= ckpt['config'].items()
    old, new = (read_log(folder / 'log.csv') for folder in (trained, tmp_path))
    lost = [(*key, step) for key, values in old.items() for step in values
            if new[key].get(step) != values[step]]
    assert lost == [('transformer', 'error 3', 3)] and [*new['transformer', 'loss']][-1] == 5


def test_what_a_run_starts_from(trained, released, tmp_path, monkeypatch):
    """--tokenizer and --init: which weights are new, and which are those of a file."""
    weights, transformer = released
    write_images(tmp_path / 'images', 3, ('dog', 'x', 'y'))
    monkeypatch.setattr(checkpoints, 'fetch', lambda *args: tmp_path / 'vae.pth')
    before = read_ckpt(trained / 'ckpt.pt')['var']

    def start(*words):
        """The state dicts of both models, after no steps."""
        none = '--patch-nums', '1,2,4,8', '--tokenizer-steps', 0, '--steps', 0
        go(tmp_path, train, '--data', 'images', *TINY, *none, '--out', 'run', *words)
        ckpt = read_ckpt(tmp_path / 'run' / 'ckpt.pt')
        shutil.rmtree(tmp_path / 'run')
        return ckpt['vae'], ckpt['var']

    assert not same(start()[0], weights)
    for name in ('official', 'vae.pth', trained / 'ckpt.pt'):
        vae, var = start('--tokenizer', name)
        assert same(vae, weights) and not same(var, before)
    vae, var = start('--init', 'var.pth', '--tokenizer', 'vae.pth', '--depth', 2)
    assert same(vae, weights) and same(var, transformer)
    assert same(start('--init', 'vae.pth')[0], weights)
    shutil.rmtree(tmp_path / 'images' / 'y')
    for words in ([], ['--tokenizer', 'train']):                # stage 1 goes on, for no steps
        vae, var = start('--init', trained / 'ckpt.pt', *words)
        assert same(vae, weights) and same(var, before)


@torch.no_grad()
def test_sample(trained, tmp_path):
    draw = partial(go, tmp_path, sample, '--ckpt', trained / 'ckpt.pt')
    draw('--n', 3, '--out', 'a.png', '--scales', 'b.png')
    assert Image.open(tmp_path / 'a.png').size == (34 * 3 - 2, 34 * 2 - 2)
    assert Image.open(tmp_path / 'b.png').size == (34 * 4 - 2, 34 * 6 - 2)
    vae, var, ckpt = checkpoints.load(trained / 'ckpt.pt')
    ckpt['var'] = refill(var).state_dict()                      # classes and guidance have a say
    for name in ('float32', 'bfloat16'):                        # the default is that of the run
        ckpt['config']['precision'] = name
        torch.save(ckpt, tmp_path / 'other.pt')
        draw(*'--ckpt other.pt --cls all --n 40 --seed 7 --cfg 0 --top-k 3 --npz a.npz'.split())
        drawn, labels = np.load(tmp_path / 'a.npz').values()    # arr_0, and arr_1
        order = np.random.default_rng(7).permutation(80)
        assert labels.tolist() == np.array([0] * 40 + [1] * 40)[order].tolist() != sorted(labels)
        for i, part in enumerate((slice(50), slice(50, 80))):   # it holds what Python draws
            with torch.autocast('cpu', torch.bfloat16, enabled=name == 'bfloat16'):
                maps = var.generate(vae, labels[part], 0, 3, 0., seed=seed_of(7, i))
                assert np.array_equal(drawn[part], to_uint8(vae.decode(maps)))
    for part, name in (('var', 'head.weight'), ('vae', 'decoder.conv_out.weight')):
        ckpt = read_ckpt(trained / 'ckpt.pt')                   # it overflows in float16 alone
        ckpt[part][name] *= 1e9
        torch.save(ckpt, tmp_path / 'other.pt')
        error = draw('--ckpt', 'other.pt', '--precision', 'float16', '--out', 'c.png', status=2)
        assert 'try --precision float32' in error and not (tmp_path / 'c.png').exists()
        draw('--ckpt', 'other.pt', '--out', 'd.png')


@torch.no_grad()
def test_edit(trained, tmp_path):
    """What is inside of the boxes is drawn, and the rest is kept."""
    keep = torch.ones(8, 8, dtype=torch.bool)
    keep[:2, :2] = keep[4:, 3:6] = False
    kept = keep.numpy().repeat(4, 0).repeat(4, 1)
    vae, var, ckpt = checkpoints.load(trained / 'ckpt.pt')
    ckpt['var'] = refill(var).state_dict()                      # classes and guidance have a say
    torch.save(ckpt, tmp_path / 'ckpt.pt')
    go(tmp_path, edit, trained / 'images' / 'dog' / '1 é.png', '--box', 0, 0, .25, .25, '--box',
       .5, .375, 1, .75, '--out', 'a.png', '--n', 2, '--cls', 'cat', '--cfg', 2)
    sheet = np.pad(np.asarray(Image.open(tmp_path / 'a.png')), ((0, 0), (0, 2), (0, 0)))
    photo, masked, *drawn = sheet.reshape(32, 4, 34, 3)[:, :, :32].transpose(1, 0, 2, 3)
    assert (masked[~kept] == 128).all() and np.array_equal(masked[kept], photo[kept])
    given = vae.encode(to_tensor(photo[None].copy()))
    maps = var.generate(vae, [0, 0], **{**ckpt['config']['sampling'], 'cfg': 2}, given=given,
                        keep=[edit.kept_tokens(keep, p) for p in (1, 2, 4, 8)], seed=seed_of(0, 0))
    assert np.array_equal(np.stack(drawn), to_uint8(vae.decode(maps)))
    assert (maps[-1] == given[-1])[:, keep.flatten()].all() and (maps[0] == given[0]).all()
    new = edit.new_positions(8, [(0, 0, 1, .5)], outside=True)
    assert not new[:, :4].any() and new[:, 4:].all()


@torch.no_grad()
def test_rejection_keeps_the_best():
    vae, var = models()
    labels, scores = torch.tensor([1, 2, 1]), []
    draws = [var.generate(vae, labels, seed=seed_of(5, i), cfg=0) for i in range(3)]
    for maps in draws:                                          # log p by its definition, (6)
        x, target = vae.var_input(maps), torch.cat(maps, 1)
        told, untold = (var(y, x)[0].log_softmax(-1).gather(2, target[..., None]).sum((1, 2))
                        for y in (labels, torch.full_like(labels, 5)))
        scores.append(told - untold)
    kept = reasons.best_of(vae, var, 3, labels, 5, cfg=0)
    for i, best in enumerate(torch.stack(scores).argmax(0)):
        assert all(torch.equal(r[i], d[i]) for r, d in zip(kept, draws[best]))


@torch.no_grad()
def test_raster_scan():
    """The input of a token is the embedding of the one before it."""
    vae, tokens = Raster(models((2,), ch_mult=(1,))[0]), torch.randint(64, (3, 4))
    x = vae.embedding.weight[tokens[:, :-1]]
    assert torch.equal(vae.var_input(tokens.split(1, dim=1)), x)
    assert torch.equal(vae.decode(tokens.split(1, dim=1)), vae.vae.decode([tokens]))


@pytest.mark.parametrize('row', [name for name, x in reasons.ROWS.items() if {'see', 'var'} & {*x}])
@torch.no_grad()
def test_what_is_changed_alone_is_changed_in_training_and_in_generation(row):
    """Greedy tokens, drawn with a cache, against the full forward."""
    (vae, _), labels = models((8,) if 'raster' in row else (1, 2, 4, 8)), torch.tensor([3, 1, 4])
    seen = reasons.ROWS[row].get('see', lambda vae: vae)(vae)
    var = refill(VAR(seen.patch_nums, 1, 5, 64, 8))
    reasons.ROWS[row].get('var', lambda var: None)(var)
    maps = var.generate(seen, labels, cfg=0, top_k=1)
    logits, _ = var(labels, seen.var_input(maps))
    assert torch.equal(logits.argmax(-1), torch.cat(maps, dim=1))
    assert reasons.Constant(2) * 0 / 3 * 5. == 10               # as VAR.generate uses its cfg


def test_evaluate(trained, tmp_path):
    """PSNR and Frechet distance by their definitions."""
    words = evaluate, '--data', trained / 'images', '--judge-steps', 2, '--samples', 2
    figures = dict(re.findall(r'[ ;]{2}([a-zA-Z ]+) ([\d.]+)', go(trained, *words)))
    assert 0 < float(figures['loss']) < 10 and float(figures['Frechet distance']) > 0
    torch.save({**read_ckpt(trained / 'ckpt.pt'), 'classes': ['dog', 'cat']}, tmp_path / 'ckpt.pt')
    assert 'was not trained for the classes of' in go(tmp_path, *words, status=2)
    paths = [path for part in data.read_folder(trained / 'images')[1].values() for path in part]
    real = np.stack([crop(fit(open_image(path, 32), 32), 32) for path in paths])
    vae, _, _ = checkpoints.load(trained / 'ckpt.pt')
    rebuilt = to_uint8(vae.decode(vae.encode(to_tensor(real))).detach())
    errors = ((real / 255. - rebuilt / 255.) ** 2).mean((1, 2, 3))
    assert float(figures['PSNR']) == pytest.approx(-10 * np.log10(errors).mean(), abs=0.02)
    x = torch.randn(500, 4)
    want = (2 * x.mean(0) + 1).square().sum() + 4 * x.T.cov().trace()       # (3 - 1) ** 2 is 4
    assert evaluate.frechet_distance(x, 3 * x + 1) == pytest.approx(want.item(), rel=1e-4)


def test_bad_input_gets_one_line_and_status_2(trained, released, monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path('touched'),)

    touch(tmp_path, *(f'broken/cat/{i}.jpg' for i in range(3)), 'archive/top/train/a/1.jpg')
    whole = (trained / 'ckpt.pt').read_bytes()
    (tmp_path / 'cut.pt').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps(Evil(), 2))
    (tmp_path / 'data').mkdir()
    files = {'other.pt': {'something': 'else'}, 'evil2.pt': {'vae': Evil()},
             'damaged.pt': {**read_ckpt(trained / 'ckpt.pt'), 'vae': {'x': torch.zeros(1)}},
             'data/vgg16-397923af.pth': {'features.0.weight': torch.zeros(1)}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    Image.new('RGB', (9, 9)).save(tmp_path / 'photo.png')
    photo = (tmp_path / 'photo.png').read_bytes()
    ckpt, blocked = ('--ckpt', trained / 'ckpt.pt'), trained / 'log.csv' / 'x'
    new = '--data', trained / 'images', *TINY, '--out', 'new'
    change = 'photo.png', *ckpt
    cases = [
        (train, ['--data', 'nowhere'], 'no such folder; expected are'),
        (train, ['--data', 'archive'], "no images in it, but the folders ['top']; expected"),
        (train, ['--data', 'broken', *TINY, '--out', 'a'], 'more than one in a hundred'),
        (train, [*new, '--size', 48], 'images of 32 px'),
        (train, [*new, '--vocab-size', 2 ** 16 + 1], 'from 2 to 65536'),
        (train, [*new, '--lr', 'nan'], 'out of range'),
        (train, [*new, '--device', 'cuda'], '--device cuda'),
        (train, [*new, '--out', 'b', '--perceptual', 1], 'VGG-16'),
        (train, [*new, '--tokenizer', 'var.pth'], 'has no tokenizer'),
        (train, [*new, '--init', trained / 'ckpt.pt', '--depth', 2], 'ckpt.pt has 1'),
        (train, ['--init', trained / 'ckpt.pt', '--out', 'c'], 'not the weights of this model'),
        (train, [*new, '--init', 'damaged.pt'], 'damaged.pt: not the weights of this model'),
        (train, [*new, '--out', blocked], 'log.csv'),
        (sample, ['--ckpt', 'cut.pt'], 'damaged'),
        (sample, ['--ckpt', 'other.pt'], 'is no checkpoint of train.py'),
        (sample, ['--ckpt', 'evil.pt'], 'cannot read evil.pt'),
        (sample, ['--ckpt', 'evil2.pt'], 'could run code'),
        (sample, ['--ckpt', 'var.pth'], 'add --tokenizer'),
        (sample, [*ckpt, '--cls', 'cat', 2], '--cls 2: no such class'),
        (sample, [*ckpt, '--out', 'a.gif'], 'must end with .png'),
        (sample, ['--ckpt', 'none.pt', '--out', blocked / 'a.png'], 'log.csv/x'),
        (sample, ['--ckpt', 'none.pt', '--npz', blocked / 'a.npz'], 'log.csv/x'),
        (sample, ['--ckpt', 'none.pt', '--scales', blocked / 'a.png'], 'log.csv/x'),
        (edit, ['nothing.jpg', *ckpt, '--box', 0, 0, 1, .5], 'nothing.jpg'),
        (edit, [*change, '--box', 0, 0, 1, .5, '--out', './photo.png'], 'overwrite the photo'),
        (edit, [*change, '--box', 0, 0, 1, 1], 'must cover 1 to 63'),
        (edit, [*change, '--box', 0, 0, 2, .5], 'out of range: from 0 to 1'),
        (evaluate, ['--ckpt', 'var.pth', '--tokenizer', 'vae.pth'], 'add --data'),
        (train, new, 'environment variable RANK expected')]
    for module, words, why in cases:
        monkeypatch.setenv('WORLD_SIZE', '2' if 'RANK' in why else '1')
        error = go(tmp_path, module, *words, status=2)
        assert 'error: ' in error and why in error, (words, error)
    assert not (tmp_path / 'touched').exists() and (trained / 'ckpt.pt').read_bytes() == whole
    assert (tmp_path / 'photo.png').read_bytes() == photo


def test_out_of_memory_gets_a_hint_and_a_fault_keeps_its_traceback(tmp_path):
    for error in (torch.OutOfMemoryError('CUDA out of memory'), MemoryError(),
                  RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED')):
        ending = Mock(__name__='x', main=Mock(side_effect=error))
        assert '--micro-batch in stage 2' in go(tmp_path, ending, status=2)
    with pytest.raises(RuntimeError, match='a fault'):
        running.run(Mock(side_effect=RuntimeError('a fault')))


def test_support_is_loaded_before_torch(monkeypatch):
    """It tells OpenMP not to wait in a loop, unless the user has said how."""
    for path in (*HERE.glob('*.py'), *HERE.glob('experiments/*.py')):
        imported = re.findall(r'^(?:import|from) (\w+)', text := path.read_text(), re.M)
        if 'run(main)' in text:
            ours = [name for name in imported if name in ('torch', 'support', 'train', 'sample')]
            assert ours[0] == 'support', path
    monkeypatch.setenv('OMP_WAIT_POLICY', 'ACTIVE')
    monkeypatch.delenv('GOMP_SPINCOUNT', raising=False)
    importlib.reload(support)
    assert 'GOMP_SPINCOUNT' not in os.environ
    monkeypatch.delenv('OMP_WAIT_POLICY')
    importlib.reload(support)
    assert os.environ['GOMP_SPINCOUNT'] == '3000'


def test_readme(trained, tmp_path, monkeypatch):
    """README.md links [`Class.method`](file.py#L9): the line where it is defined."""
    text = (HERE / 'README.md').read_text()
    links = re.findall(r'\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)\)', text)
    assert len(links) > 40
    for name, file, line in links:
        lines, at = (HERE / file).read_text().splitlines(), 0
        for part in name.removeprefix(Path(file).stem + '.').split('.'):
            pattern = rf'\s*(class|def) {part}\b|{part}\b.* = '
            at = next((i for i in range(at, len(lines)) if re.match(pattern, lines[i])), None)
            assert at is not None, f'{name} is not in {file}'
        assert at + 1 == int(line), f'{name} is in line {at + 1} of {file}'
    for page in (HERE / 'README.md', HERE / 'experiments' / 'README.md'):
        for picture in re.findall(r'[("]([\w./]+\.png)[)"]', page.read_text()):
            assert (page.parent / picture).exists(), picture
    shutil.copy(trained / 'ckpt.pt', tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (40, 50), 'red').save('photo.jpg')
    assert (blocks := re.findall(r'```python\n(.*?)```', text, re.S))
    for block in blocks:
        exec(block, {})


def test_names_in_the_tour_exist():
    """The notebook is executed by hand; here only its imports and attributes are looked up."""
    cells = json.loads((HERE / 'experiments' / 'tour.ipynb').read_text())['cells']
    code = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
    known, looked_up = dict(zip(('vae', 'var'), models())), 0
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
