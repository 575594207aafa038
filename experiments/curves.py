"""A whole training against the clock: validation loss, and how far samples are from real pictures.

    python experiments/curves.py --data cifar10 --out curves            # trains, then grades and draws
    python experiments/curves.py --data cifar10 --out curves            # again: goes on where it was

It runs train.py, keeps a copy of ckpt.pt every few minutes, and grades the copies by a small classifier
that learns the data first (judge.py): Frechet distance of 500 samples, and the share that it tells as
the class asked for. Writes curves.png, and prints the table that another run can be held against.
"""
import csv
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge import draw_each, make_judge                                     # noqa: E402
from sample import Problem, load_models, parse, pick_device, run             # noqa: E402
from train import Options as Settings, read_data                            # noqa: E402


@dataclass
class Options:
    """The options of the command line, as --name value."""
    data: str = 'cifar10'               # as for train.py, whose defaults are used
    every: int = 180                    # seconds between two copies
    judge_steps: int = 1200             # of the classifier
    n: int = 50                         # samples a class
    out: Path = Path('curves')          # folder of the run, and of curves.png
    device: str = None                  # cuda, mps or cpu; the best there is if not given


def train(given):
    """Runs train.py to its end; copies ckpt.pt as ckpt-<seconds>.pt, and train.txt has what it says."""
    given.out.mkdir(parents=True, exist_ok=True)
    script, ckpt = Path(__file__).resolve().parent.parent / 'train.py', given.out / 'ckpt.pt'
    command = [sys.executable, str(script), '--data', given.data, '--size', '32', '--out', str(given.out)]
    command += ['--resume'] if ckpt.exists() else []
    command += ['--device', given.device] if given.device else []
    began = copied = time.time()
    if not ckpt.exists() or not (given.out / 'began').exists():
        (given.out / 'began').write_text(str(began))
    zero = float((given.out / 'began').read_text())
    with open(given.out / 'train.txt', 'a') as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(2)
            if ckpt.exists() and time.time() - copied > given.every:
                copied = time.time()
                shutil.copy(ckpt, given.out / f'ckpt-{ckpt.stat().st_mtime - zero:.0f}.pt')
    if process.returncode:
        raise Problem(f'train.py ended with status {process.returncode}: see {given.out / "train.txt"}')
    (given.out / 'trained').touch()


def main():
    given = Options(**parse(Options, __doc__))
    device = pick_device(given.device)
    if not (given.out / 'trained').exists():
        train(given)
    began = float((given.out / 'began').read_text())
    log = {}                                                                # {(stage, figure): [(minute, value)]}
    for stage, step, at, name, value in csv.reader(open(given.out / 'log.csv')):
        log.setdefault((stage, name), []).append(((float(at) - began) / 60, float(value)))
    minutes = {f: int(f.stem[5:]) / 60 for f in given.out.glob('ckpt-*.pt')}
    minutes[given.out / 'ckpt.pt'] = log['transformer', 'loss'][-1][0]

    pictures, val, classes = read_data(Settings(data=given.data, size=32))
    judge, real = make_judge(pictures, val, classes, given.judge_steps)
    distances, shares = [], []
    for path, minute in sorted(minutes.items(), key=lambda item: item[1]):
        vae, var, ckpt = load_models(path)
        if var is None:
            continue                                                        # still in stage 1
        right, distance = judge.grade(draw_each(vae.to(device), var.to(device), given.n, device, ckpt['sampling']), real)
        distances.append((minute, distance))
        shares.append((minute, right.mean().item()))
        print(f'minute {minute:.1f}: Frechet distance {distance:.1f}, {right.mean():.1%} told right', flush=True)

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), constrained_layout=True)
    for axis, points, label in zip(axes, (log['tokenizer', 'PSNR'], log['transformer', 'loss'], distances, shares),
                                   ('tokenizer: PSNR, dB', 'transformer: validation loss, nats a token',
                                    'samples: Frechet distance', 'samples told as the class asked for')):
        axis.plot(*zip(*points), 'o-')
        axis.set(title=label, xlabel='minutes since the start', xlim=(0, None))
    figure.savefig(given.out / 'curves.png', dpi=70)
    for (stage, name), points in log.items():
        if name in ('PSNR', 'loss', 'error'):
            print(f'{stage} {name}:', ', '.join(f'{value:.4g} ({minute:.1f} min)' for minute, value in points))


if __name__ == '__main__':
    run(main)
