"""Kills training runs at random moments, resumes them, and compares the weights bit for bit.

    python experiments/kill.py                      # twenty runs on a CPU, some minutes
    python experiments/kill.py --runs 3

Not in the paper; it tests the claim of train.py that a run that was killed and resumed ends with
the same bits as one that was not. A small run of all stages is killed by SIGKILL after a random
time, and resumed to its end. Checkpoints are saved after every step here, so that most kills fall
into the writing of one or close to it. Exits with status 1 if any weight differs.
Writes into a temporary folder only.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tokenizer import UserError                                             # noqa: E402
from var import Parser, number, run                                         # noqa: E402

# The program of a run: train.py with a small network, and a checkpoint after every step.
PROGRAM = f'''
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
import var
train.SAVE_EVERY = 0
train.PRESETS['32']['network'] = dict(ch=8, ch_mult=(1, 2, 4), vocab_size=99, z_channels=8,
                                      res_blocks=1)
var.run(train.main)
'''
OPTIONS = ['--data', 'cifar', '--preset', '32', '--flip', '--views', '2', '--depth', '1',
           '--classifier-steps', '20',
           '--tokenizer-steps', '40', '--tokenizer-batch', '8', '--steps', '40', '--batch', '8',
           '--device', 'cpu', '--workers', '0']


def write_random_cifar10(folder, rng):
    """Random bytes in the layout of CIFAR-10's binary files, 40 records in each."""
    folder.mkdir()
    for name in [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']:
        records = bytearray(rng.randbytes(40 * 3073))
        records[::3073] = bytes(rng.randrange(10) for _ in range(40))       # the labels
        (folder / name).write_bytes(records)
    (folder / 'batches.meta.txt').write_text('\n'.join('abcdefghij'))


def start(folder, *more):
    """Starts a run in a folder; one thread each, because the order of sums depends on threads."""
    command = [sys.executable, '-c', PROGRAM, *OPTIONS, '--out', str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder.parent,
                            env=dict(os.environ, OMP_NUM_THREADS='1'))


def finish(process):
    """Waits for the end of a run. UserError if it fails."""
    status = process.wait()
    if status:
        raise UserError(f'train.py ended with status {status}')


def read_weights(folder):
    """All weights of both models in ckpt.pt, by name."""
    ckpt = torch.load(folder / 'ckpt.pt', weights_only=True)
    weights = {}
    for model in ('vae', 'var'):
        for name, value in ckpt[model].items():
            weights[f'{model}.{name}'] = value
    return weights


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_and_resume(folder, moment):
    """Kills a run after `moment` seconds and resumes it. Returns where it was killed, as a text."""
    process = start(folder)
    time.sleep(moment)
    process.kill()
    process.wait()
    if not (folder / 'ckpt.pt').exists():
        finish(start(folder))                               # there is nothing to resume yet
        return 'before the first checkpoint'
    ckpt = torch.load(folder / 'ckpt.pt', weights_only=True)
    finish(start(folder, '--resume'))
    return f'at {ckpt["stage"]} step {ckpt["step"]}'


def main():
    parser = Parser(__doc__)
    parser.add_argument('--runs', type=number(int, 1), default=20,
                        help='to be killed (default: 20)')
    args = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_cifar10(folder / 'cifar', rng)
        began = time.time()
        finish(start(folder / 'undisturbed'))
        seconds = time.time() - began
        expected, equal = read_weights(folder / 'undisturbed'), 0
        print(f'undisturbed: {seconds:.0f} s', flush=True)
        for i in range(args.runs):
            moment = rng.uniform(0.25, 0.95) * seconds
            where = kill_and_resume(folder / f'killed-{i}', moment)
            same = same_bits(expected, read_weights(folder / f'killed-{i}'))
            equal += same
            print(f'{i + 1}: killed after {moment:.1f} s, {where}: '
                  f'{"the same bits" if same else "OTHER BITS"}', flush=True)
    print(f'{equal} of {args.runs} end bit-identical with the undisturbed run')
    if equal < args.runs:
        sys.exit(1)


if __name__ == '__main__':
    run(main)
