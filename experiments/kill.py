"""Kills a small training run by SIGKILL at twenty random moments of both stages, resumes it each time,
and holds every end against that of an undisturbed run, bit for bit.

    python experiments/kill.py                     # on a CPU, some minutes

The run saves after every step here, so that most kills fall into the writing of a checkpoint or beside it.
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
RUN = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import train, sample; train.SAVE_EVERY = 0; '
       'train.SMALL["network"] = dict(ch=8, ch_mult=(1, 2, 4), vocab_size=99, z_channels=8, res_blocks=1); '
       'sample.run(train.main)')
WORDS = ['--data', 'cifar', '--flip', '--depth', '1', '--batch', '8', '--tokenizer-steps', '40',
         '--steps', '40', '--device', 'cpu', '--workers', '0']


def start(folder, *words):
    return subprocess.Popen([sys.executable, '-c', RUN, *WORDS, '--out', str(folder), *words],
                            stdout=subprocess.DEVNULL, cwd=folder.parent, env=dict(os.environ, OMP_NUM_THREADS='1'))


def weights(folder):
    ckpt = torch.load(folder / 'ckpt.pt', weights_only=True)
    return {**{'vae.' + k: v for k, v in ckpt['vae'].items()}, **{'var.' + k: v for k, v in ckpt['var'].items()}}


def main():
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = folder / 'cifar'
        data.mkdir()
        for name in [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']:
            records = bytearray(rng.randbytes(40 * 3073))
            records[::3073] = bytes(rng.randrange(10) for _ in range(40))
            (data / name).write_bytes(records)
        (data / 'batches.meta.txt').write_text('\n'.join('abcdefghij'))
        began = time.time()
        assert start(folder / 'whole').wait() == 0
        whole, seconds, same = weights(folder / 'whole'), time.time() - began, 0
        print(f'undisturbed: {seconds:.0f} s')
        for i in range(20):
            out, moment = folder / f'killed{i}', rng.uniform(0.25, 0.95) * seconds
            run = start(out)
            time.sleep(moment)
            run.kill()
            run.wait()
            begun = (out / 'ckpt.pt').exists()
            at = torch.load(out / 'ckpt.pt', weights_only=True) if begun else dict(stage='nothing', step='')
            assert start(out, *['--resume'] * begun).wait() == 0
            end = weights(out)
            equal = all(torch.equal(v, end[k]) for k, v in whole.items())
            same += equal
            print(f'{i + 1}: killed after {moment:.1f} s, at {at["stage"]} {at["step"]}; '
                  f'{"the same bits" if equal else "OTHER BITS"}', flush=True)
    print(f'{same} of 20 end bit-identical with the undisturbed run')


if __name__ == '__main__':
    main()
