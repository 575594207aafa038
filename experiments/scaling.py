"""Section 5.2 at a small size: loss and token error against parameters and training compute.

    python train.py --data cifar10                                  # the tokenizer, in ckpt.pt
    python experiments/scaling.py --dry-run                         # what is to be done
    python experiments/scaling.py --depths 2 3 4 6                  # all of it

Transformers of several depths, equation (7), are trained on the same tokens, with the same batches
and steps. Each depth has a folder of its own, continues where it was interrupted, and is not
trained again when it is complete. Depths can therefore be shared among machines: run one --depths
on each (--dry-run prints the commands), all with the same --out, and in the end the whole command.
Writes scaling.csv and, for three depths or more, scaling.png (Figs. 5 and 6) and the power laws.
The samples for Fig. 7, which grid.py draws, are in the folders of the depths.

Letters: N parameters, C training compute, L tokens of all scales, V codes, z code dimension.
"""
import csv
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import seconds_of                                                # noqa: E402
from curves import read_log                                                 # noqa: E402
from runs import open_run, read_same_data, train_or_load                    # noqa: E402
from tokenizer import to_uint8, write_file                                  # noqa: E402
from train import (TransformerStage, make_config, tokenize,                 # noqa: E402
                   tokens_key)
from var import VAR, Parser, number, pick_device, precision, run            # noqa: E402

FIGURES = {'loss last': 'L, last scale', 'loss': 'L, all scales',
           'error last': 'Err, last scale', 'error': 'Err, all scales'}


@dataclass
class Run:
    """One depth. N and C as in Section 5.2, C in PFLOP; course: {step: figures}, when trained."""
    depth: int
    N: int
    C: float
    folder: Path
    course: dict = None


def parameters(var):
    """N: the weights without embeddings and head, which is what equation (8) counts."""
    return sum(p.numel() for block in var.blocks for p in block.parameters())


def compute(var, images):
    """Training compute in PFLOP: six for each weight and token, and for each product of attention.

    The weights of AdaLN are applied once per image, not once per token. Attention is counted as it
    is computed, with the products that the mask removes.
    """
    L, w = len(var.mask), var.head.in_features
    ada = sum(p.numel() for name, p in var.blocks.named_parameters() if 'ada_lin' in name)
    per_token = parameters(var) - ada + var.head.weight.numel()
    attention = 2 * L * L * w * len(var.blocks)                 # q k^T, and the weights times v
    return 6 * images * (per_token * L + ada + attention) / 1e15


# ---- Power laws ----


@dataclass
class PowerLaw:
    """y = e + (b x)^a, equation (9) with an irreducible term e. error: the standard error of a for
    this e; r: the Pearson coefficient of the line in log-log, as in (10)."""
    e: float
    a: float
    error: float
    b: float
    r: float

    def text(self, y, x):
        return (f'{y} = {self.e:.3g} + ({self.b:.3g} {x})^{self.a:.3g} (+- {self.error:.1g}), '
                f'r {self.r:.4f}')


def fit_line(x, y, e):
    """The PowerLaw for a given e: a line through log x and log(y - e)."""
    log_x, log_y = np.log(x), np.log(y - e)
    r = np.corrcoef(log_x, log_y)[0, 1]
    a, offset = np.polyfit(log_x, log_y, 1)
    error = abs(a) * math.sqrt(max(0., 1 / r ** 2 - 1) / max(1, len(x) - 2))
    return PowerLaw(e, a, error, math.exp(offset / a), r)


def fit_power_law(x, y):
    """The PowerLaw of falling values y (n,) at x (n,): e is 0, or that of the straightest line if
    it improves r by more than 0.001."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    plain = fit_line(x, y, 0.)
    lines = [fit_line(x, y, share * y.min()) for share in np.linspace(0, 0.99, 100)]
    best = min(lines, key=lambda line: line.r)                  # r is -1 for a perfect line
    return best if best.r < plain.r - 1e-3 else plain


def pareto_front(points):
    """The points (compute, y) that are below all points with less compute, sorted."""
    front, lowest = [], math.inf
    for x, y in sorted(points):
        if y < lowest:
            front.append((x, y))
            lowest = y
    return front


# ---- Training ----


class ScalingStage(TransformerStage):
    """Also stores, at every evaluation, a sample of each of the first ten classes for grid.py."""

    def evaluate(self):
        classes = list(range(min(10, self.var.num_classes)))
        images = self.var.generate(self.vae, classes, seed=0, **self.config.sampling)
        percent = round(100 * self.step / self.steps)
        path = self.config.out / f'samples-{percent}.npy'
        write_file(path, lambda f: np.save(f, to_uint8(images)))            # (classes, H, W, 3)
        return super().evaluate()


def read_course(folder):
    """The evaluations of a trained depth, from log.csv: {step: {name: value}}."""
    log = read_log(folder / 'log.csv')
    course = {}
    for step in log['transformer', 'loss']:
        course[step] = {name: log['transformer', name][step][1] for name in FIGURES}
    return course


def seconds_per_pflop(vae, num_classes, batch, device):
    """The pace of training at depth 4, from one forward and backward pass of a batch."""
    V, z = vae.quantize.embedding.weight.shape
    var = VAR(vae.patch_nums, 4, num_classes, V, z).to(device).train()
    tokens = [torch.randint(V, (batch, p * p), device=device) for p in vae.patch_nums]
    labels = torch.zeros(batch, dtype=torch.long, device=device)

    def step():
        with precision(device):
            _, loss = var(labels, vae.var_input(tokens), torch.cat(tokens, dim=1))
        loss.backward()

    return seconds_of(step, device, repetitions=1) / compute(var, batch)


# ---- Output ----


def draw(runs, path):
    """Figs. 5 and 6: the last figures against N (above) and all of them against C (below).

    Returns the power laws, a line each.
    """
    laws = []
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    N = np.array([one.N / 1e6 for one in runs])
    for (above, below), (name, title) in zip(axes.T, FIGURES.items()):
        y = [one.course[max(one.course)][name] for one in runs]
        law = fit_power_law(N, y)
        laws.append(law.text(title, 'N') + '; N in millions')
        x = np.geomspace(N.min(), N.max())
        above.plot(N, y, 'o', color='C0')
        above.plot(x, law.e + (law.b * x) ** law.a, '--', color='grey')
        above.set(xlabel='parameters N, millions', xscale='log', yscale='log')
        above.set_title(law.text(title, 'N').replace(' (+-', '\n(+-'), fontsize=9)

        points = []
        for one in runs:
            steps = sorted(one.course)
            C = [one.C * step / steps[-1] for step in steps]
            values = [one.course[step][name] for step in steps]
            points += list(zip(C, values))
            below.plot(C, values, 'o-', label=f'depth {one.depth}', lw=1, ms=3)
        front = pareto_front(points)
        front_C, front_y = [C for C, _ in front], [y for _, y in front]
        title_below = title
        if len(front) > 2:
            law = fit_power_law(front_C, front_y)
            laws.append(law.text(title, 'C') + '; C in PFLOP')
            title_below = law.text(title, 'C').replace(' (+-', '\n(+-')
            below.plot(front_C, front_y, 'k--', lw=1, label='Pareto front')
        below.set(xlabel='training compute C, PFLOP', xscale='log', yscale='log')
        below.set_title(title_below, fontsize=9)
        below.legend(fontsize=8)
        for axis in (above, below):                     # 4.2 instead of 4.2 x 10^0
            axis.yaxis.set_major_formatter('{x:.4g}')
            axis.yaxis.set_minor_formatter('{x:.4g}')
    figure.savefig(path, dpi=70)
    return laws


def write_table(runs, path):
    with open(path, 'w', newline='') as f:
        table = csv.writer(f)
        table.writerow(['depth', 'parameters', 'PFLOP', 'step', *FIGURES])
        for one in runs:
            for step, figures in one.course.items():
                C = one.C * step / max(one.course)
                values = [f'{figures[name]:.5g}' for name in FIGURES]
                table.writerow([one.depth, one.N, f'{C:.4g}', step, *values])


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--ckpt', type=Path, default=Path('ckpt.pt'), help='its tokenizer and its options are used')
    add('--data', help='as for train.py; default: what --ckpt was trained on')
    add('--depths', type=number(int, 1), nargs='+', default=[2, 3, 4, 6],
        help='of the transformers (default: 2 3 4 6)')
    add('--steps', type=number(int, 1), default=1000, help='of each (default: 1000)')
    add('--batch', type=number(int, 1), default=32, help='images per step (default: 32)')
    add('--lr', type=number(float, 0), default=1.5e-3,
        help='peak learning rate at depth 4; at depth d it is sqrt(4 / d) times that')
    add('--out', type=Path, default=Path('scaling'),
        help='folder for everything (default: scaling)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    add('--dry-run', action='store_true', help='print the plan and the time it takes, and end')
    return parser.parse_args()


def main():
    args = parse()
    device, began = pick_device(args.device), time.time()
    vae, saved, shared = open_run(args.ckpt, device)
    V, z = vae.quantize.embedding.weight.shape
    classes, runs = shared['classes'], []
    for depth in args.depths:
        var = VAR(vae.patch_nums, depth, len(classes), V, z)
        C = compute(var, args.steps * args.batch)
        runs.append(Run(depth, parameters(var), C, args.out / f'd{depth}'))
    if args.dry_run:
        data = f'--data {args.data} ' if args.data else ''
        pace = seconds_per_pflop(vae, len(classes), args.batch, device)
        for one in runs:
            print(f'depth {one.depth}: {one.N / 1e6:.2f} M parameters, {one.C:.3g} PFLOP, about '
                  f'{one.C * pace / 60:.0f} min:  python {sys.argv[0]} --ckpt {args.ckpt} '
                  f'{data}--steps {args.steps} --batch {args.batch} --lr {args.lr} '
                  f'--out {args.out} --depths {one.depth}')
        return

    # epochs=0: all depths make the same number of steps, however few images there are.
    # saln=False: the scaling laws are about one AdaLN projection per block, equation (8).
    base = dict(steps=args.steps, batch=args.batch, epochs=0., saln=False, muon_lr=0.,
                device=device)
    if args.data:
        base['data'] = args.data
    # Tokens go to the folder of the first depth, where no other machine writes.
    config = make_config(dict(base, out=runs[0].folder), saved)
    train, val, _ = read_same_data(config, shared, len(classes))
    stored = tokenize(vae, train, config, 'train', config.views)
    stored_val = tokenize(vae, val, config, 'val')
    # Another tokenizer makes other tokens: what was trained on those is trained again.
    inputs = tokens_key(vae, train, config.views, config)
    for one in runs:
        lr = args.lr * math.sqrt(4 / one.depth)
        config = make_config(dict(base, depth=one.depth, lr=lr, out=one.folder), saved)

        def make_stage():
            var = VAR(vae.patch_nums, one.depth, len(classes), V, z).to(device)
            return ScalingStage(config, vae, var, stored, stored_val)

        train_or_load(make_stage, config, inputs, stage='transformer', **shared)
        one.course = read_course(one.folder)
        last = one.course[max(one.course)]
        print(f'depth {one.depth}: {one.N / 1e6:.2f} M parameters, {one.C:.3g} PFLOP,',
              ', '.join(f'{name} {last[name]:.4f}' for name in FIGURES), flush=True)
    write_table(runs, args.out / 'scaling.csv')
    if len(runs) > 2:
        print(*draw(runs, args.out / 'scaling.png'), sep='\n')
    print(f'{(time.time() - began) / 60:.0f} minutes, results in {args.out}')


if __name__ == '__main__':
    run(main)
