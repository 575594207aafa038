"""What both test files share: small models, images, a run of train.py, and the commands."""
import csv
import io
import math
import os
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# The operations are tiny. Both are read when torch is loaded, also by processes started here.
os.environ.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')

import support                                  # before torch: see there
import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / 'experiments'))

import train
from tokenizer import VQVAE
from var import VAR

# In float32, so that the results do not depend on the processor.
TINY = ('--size', 32, '--depth', 1, '--ch', 8, '--vocab-size', 99, '--tokenizer-batch', 4,
        '--batch', 4, '--tokenizer-steps', 4, '--steps', 3, '--precision', 'float32')


def pytest_configure(config):
    """A warning about this project's own lines is an error."""
    for module in ('var', 'tokenizer', 'train', 'sample', 'support', 'edit', 'evaluate', 'reasons'):
        for kind in ('DeprecationWarning', 'FutureWarning', 'UserWarning'):
            config.addinivalue_line('filterwarnings', f'error::{kind}:{module}')


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, whether others ran before or not."""
    torch.manual_seed(0)


def from_name(name, p):
    """Random numbers that follow from the name and the shape of a parameter."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(p.shape))


def refill(model, salt=''):
    """Weights that follow from names and shapes alone, as those behind the golden numbers."""
    for name, p in model.named_parameters():
        a = from_name(salt + name, p)
        if name.endswith('.weight') and 'emb' not in name:
            a = a / math.sqrt(np.prod(p.shape[1:])) if a.ndim > 1 else 1 + 0.2 * a
        else:
            a = 0.5 * a
        p.data.copy_(torch.from_numpy(a))
    return model.eval()


def models(patch_nums=(1, 2, 3, 4), depth=2, classes=5, ch_mult=(1, 2), **options):
    vae = refill(VQVAE(patch_nums, 64, 8, 32, ch_mult))
    return vae, refill(VAR(patch_nums, depth, classes, 64, 8, **options))


def write_images(root, n=6, classes=('cat', 'dog')):
    """Images of several shapes in class folders, and files that are none."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (40, 34 + 6 * i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i} é.png')
        for other in ('.hidden.png', 'notes.txt'):
            (root / name / other).write_text('no image')


def go(folder, module, *words, status=0):
    """Runs a command in a folder. Returns what it prints, or if it fails its error, one line."""
    said, error, found = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(error):
        patch.chdir(folder)
        patch.setattr('sys.argv', [f'{module.__name__}.py', *map(str, words)])
        try:
            train.run(module.main)
        except SystemExit as e:
            found = e.code
    lines = [line for line in error.getvalue().splitlines() if not line.startswith('usage: ')]
    assert found == status and len(lines) == (status != 0), (words, found, error.getvalue())
    return lines[0] if status else said.getvalue()


def launch(folder, module, *words, torchrun=(), first=''):
    """Starts a command in a process of its own, or by torchrun, after the lines `first`."""
    code = (f'import sys\nsys.path.insert(0, {str(HERE)!r})\nimport os, sample, tokenizer, train, '
            f'var\n{first}\ntrain.run({module.__name__}.main)')
    if torchrun:
        torchrun = '-m', 'torch.distributed.run', '--no-python', *torchrun, '--', sys.executable
    return subprocess.Popen([sys.executable, *torchrun, '-c', code, *map(str, words)], cwd=folder,
                            stdout=subprocess.DEVNULL)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A folder with images and a run of train.py on them."""
    folder = tmp_path_factory.mktemp('trained')
    write_images(folder / 'images')
    go(folder, train, '--data', 'images', *TINY, '--flip')
    return folder


def read_log(path):
    """log.csv of train.py: {(stage, name): {step: value}}. Of a figure that was written twice,
    because a run was interrupted, the last one counts; a row that a kill has cut has no value."""
    log = {}
    with open(path, newline='') as f:
        for row in csv.DictReader(f):
            if row['value']:
                log.setdefault((row['stage'], row['name']), {})[int(row['step'])] = float(
                    row['value'])
    return log


def read_ckpt(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two state dicts have the same bits."""
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
