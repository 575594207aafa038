"""A whole training run over time: validation loss, and the quality of samples.

    python experiments/curves.py --data cifar10                     # trains, then grades and draws
    python experiments/curves.py --data cifar10                     # again: continues where it was
    python experiments/curves.py --data cifar10 --out long -- --preset long

Paper: Section 5.2 and Fig. 7 show how loss and samples improve with training. This runs train.py,
keeps a copy of ckpt.pt every few minutes, and grades the copies by the classifier of judge.py: the
Frechet distance of 500 samples, and the share that is classified correctly. Prints a table to which
another run can be compared.
Writes into --out what train.py writes, ckpt-<seconds>.pt, train.txt (train.py's output), and
curves.png.
"""
import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge import draw_classes, train_classifier                            # noqa: E402
from tokenizer import UserError                                             # noqa: E402
from train import make_config, read_data                                    # noqa: E402
from var import Parser, load, number, pick_device, read_checkpoint, run     # noqa: E402


def read_log(path):
    """log.csv of train.py: {(stage, name): {step: (unix time, value)}}, steps in rising order.

    Of a figure that was written twice, because a run was interrupted, the last one counts.
    """
    log = {}
    with open(path, newline='') as f:
        for row in csv.DictReader(f):
            figures = log.setdefault((row['stage'], row['name']), {})
            figures[int(row['step'])] = (float(row['time']), float(row['value']))
    return {key: dict(sorted(figures.items())) for key, figures in log.items()}


def train_and_copy(args):
    """Runs train.py to its end, and copies ckpt.pt to ckpt-<seconds since the start>.pt.

    The file `start` holds the time of the start.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).resolve().parent.parent / 'train.py'
    ckpt, start_file = args.out / 'ckpt.pt', args.out / 'start'
    command = [sys.executable, str(script), '--data', args.data, '--size', '32',
               '--out', str(args.out)]
    if args.device:
        command += ['--device', args.device]
    if ckpt.exists():
        command.append('--resume')
    command += args.options
    copied = time.time()
    if not (ckpt.exists() and start_file.exists()):
        start_file.write_text(str(copied))
    start = float(start_file.read_text())
    with open(args.out / 'train.txt', 'a') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(2)
            if ckpt.exists() and time.time() - copied > args.every:
                copied = time.time()
                saved = ckpt.stat().st_mtime
                shutil.copy(ckpt, args.out / f'ckpt-{saved - start:.0f}.pt')
    if process.returncode:
        raise UserError(f'train.py ended with status {process.returncode}: see '
                        f'{args.out / "train.txt"}')


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data', default='cifar10', help='as for train.py, whose defaults are used')
    add('--every', type=number(int, 1), default=180, help='seconds between copies (default: 180)')
    add('--judge-steps', type=number(int, 1), default=1200,
        help='of the classifier (default: 1200)')
    add('--n', type=number(int, 1), default=50, help='samples per class (default: 50)')
    add('--out', type=Path, default=Path('curves'), help='folder for everything (default: curves)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    add('options', nargs='*', help='after --: options for train.py')
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    asked, trained = ' '.join([args.data, *args.options]), args.out / 'trained'
    if not trained.exists():
        train_and_copy(args)
        trained.write_text(asked)
    elif trained.read_text() != asked:
        raise UserError(f'{args.out} was trained with {trained.read_text()}: choose another --out')
    start = float((args.out / 'start').read_text())
    curves = {}                                         # of each figure: minutes and values
    for key, figures in read_log(args.out / 'log.csv').items():
        minutes = [(at - start) / 60 for at, _ in figures.values()]
        values = [value for _, value in figures.values()]
        curves[key] = (minutes, values)

    config = make_config({}, read_checkpoint(args.out / 'ckpt.pt')['config'])
    train, val, classes, _ = read_data(config)
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device,
                                        mirror=config.flip)
    files = {int(path.stem.removeprefix('ckpt-')) / 60: path for path in args.out.glob('ckpt-*.pt')}
    last_minutes, _ = curves['transformer', 'loss']
    files[last_minutes[-1]] = args.out / 'ckpt.pt'
    graded, distances, shares = [], [], []
    for minute, path in sorted(files.items()):
        if read_checkpoint(path).get('var') is None:    # a copy from before stage 2
            continue
        vae, var, ckpt = load(path)
        vae, var = vae.to(device), var.to(device)
        samples = draw_classes(vae, var, args.n, device, ckpt['sampling'])  # (C, n, H, W, 3)
        share, distance = classifier.grade(samples, real)
        graded.append(minute)
        distances.append(distance)
        shares.append(share.mean().item())
        print(f'minute {minute:.1f}: Frechet distance {distance:.1f}, {shares[-1]:.1%} classified '
              'correctly', flush=True)

    panels = {'tokenizer: PSNR, dB': curves.get(('tokenizer', 'PSNR'), ([], [])),
              'transformer: validation loss, nats per token': curves['transformer', 'loss'],
              'samples: Frechet distance': (graded, distances),
              'samples: share classified correctly': (graded, shares)}
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), constrained_layout=True)
    for axis, (title, (minutes, values)) in zip(axes, panels.items()):
        axis.plot(minutes, values, 'o-')
        axis.set_title(title, fontsize=10)
        axis.set(xlabel='minutes since the start', xlim=(0, None))
    figure.savefig(args.out / 'curves.png', dpi=70)
    for (stage, name), (minutes, values) in curves.items():
        if name in ('PSNR', 'loss', 'error'):
            points = [f'{value:.4g} ({minute:.1f} min)' for minute, value in zip(minutes, values)]
            print(f'{stage} {name}:', ', '.join(points))


if __name__ == '__main__':
    run(main)
