"""Section 5.2 at a small size: loss and token error against parameters and training compute.

    python train.py --data cifar10                                  # the tokenizer, in ckpt.pt
    python experiments/scaling.py --depths 2 3 4 6

Paper: equations (9) to (16), Figs. 5, 6 and 7. The loss is the whole cross-entropy; the paper plots
it less an irreducible part of 4.5 to 5, so that exponents of the loss cannot be compared.
Transformers of several depths, equation (7), are trained on the same tokens, with the same batches
and steps. Each depth has a folder of its own, continues where it was interrupted, and is not
trained again when it is complete. Depths can therefore be shared among machines: run the command on
each with some of the --depths, and at last with all of them, always with the same other options and
an --out that all see.
Writes scaling-grid.png (Fig. 7), a row per depth, with the samples of four classes, each after
growing shares of the training; and for three depths or more scaling.png (Figs. 5 and 6), and prints
the power laws. The figures of each depth are in its log.csv.

Letters: d depth, N parameters, C training compute, L tokens of all scales, V codes, z code
dimension, w width, H x W pixels.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ablation import train_or_load
from support.checkpoints import load
from support.data import read_data
from support.images import make_grid, save_image, to_uint8
from support.options import a_path, add_shared, at_least_1, make_config, make_parser, number
from support.run import UserError, pick_device, read_log, run, write_file
from support.tokens import key_of_tokens, tokenize_both
from train import TransformerStage
from var import VAR

FIGURES = {'loss last': 'L, last scale', 'loss': 'L, all scales',
           'error last': 'Err, last scale', 'error': 'Err, all scales'}


@dataclass
class Run:
    """One depth, trained. N as in (8), C in PFLOP; course: {step: figures}."""
    depth: int
    N: int
    C: float
    course: dict


def parameters(var):
    """N: the parameters of the blocks: what equation (8) counts, and their few biases and scales.
    """
    return sum(p.numel() for p in var.blocks.parameters())


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


def fit_power_law(x, y):
    """y = (b x)^a, equation (9), for points x (n,) and y (n,), by a line in log-log. Returns a, its
    standard error, b, and the Pearson coefficient of that line, as in (10)."""
    log_x, log_y = np.log(x), np.log(y)
    (a, offset), covariance = np.polyfit(log_x, log_y, 1, cov=True)
    r = np.corrcoef(log_x, log_y)[0, 1]
    return a, math.sqrt(covariance[0, 0]), np.exp(offset / a), r


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
    """Also stores, at every evaluation, a sample of each of the first four classes, for Fig. 7."""

    def evaluate(self, step):
        classes = list(range(min(4, self.var.num_classes)))
        maps = self.var.generate(self.vae, classes, seed=0, **self.config.sampling)
        images = to_uint8(self.vae.decode(maps))                            # (4, H, W, 3)
        path = self.config.out / f'samples-{step}.npy'
        write_file(path, lambda f: np.save(f, images))
        return super().evaluate(step)


def read_course(folder):
    """The evaluations of a trained depth, from log.csv: {step: {name: value}}."""
    log = read_log(folder / 'log.csv')
    return {step: {name: log['transformer', name][step] for name in FIGURES}
            for step in log['transformer', 'loss']}


# ---- Output ----


def draw_grid(runs, out):
    """Fig. 7: a row per depth; the columns are four classes, each after growing shares of the
    training, all from one seed."""
    rows = []
    for one in runs:
        samples = [np.load(out / f'd{one.depth}' / f'samples-{step}.npy') for step in one.course]
        samples = np.stack(samples, axis=1)                     # (4, evaluations, H, W, 3)
        rows.append(samples.reshape(-1, *samples.shape[2:]))
    save_image(out / 'scaling-grid.png', [make_grid(rows)])


def draw_laws(runs, path):
    """Figs. 5 and 6: the last figures against N (above) and all of them against C (below).

    Returns the power laws, a line each.
    """
    laws = []

    def fit(axis, x, y, title, symbol):
        """Draws a power law through points and names it in the title of the axis."""
        a, error, b, r = fit_power_law(x, y)
        law, quality = f'{title} = ({b:.3g} {symbol})^{a:.3g}', f'(+- {error:.1g}), r {r:.4f}'
        laws.append(f'{law} {quality}')
        axis.set_title(f'{law}\n{quality}', fontsize=9)
        axis.plot(x, (b * np.array(x)) ** a, '--', color='grey')

    figure, axes = plt.subplots(2, 4, figsize=(14, 7), constrained_layout=True)
    for (above, below), (name, title) in zip(axes.T, FIGURES.items()):
        N = [one.N / 1e6 for one in runs]
        y = [one.course[max(one.course)][name] for one in runs]
        above.plot(N, y, 'o')
        fit(above, N, y, title, 'N')
        points = []
        for one in runs:
            C = [one.C * step / max(one.course) for step in one.course]
            values = [figures[name] for figures in one.course.values()]
            below.plot(C, values, 'o-', label=f'depth {one.depth}', lw=1, ms=3)
            points += zip(C, values)
        front = pareto_front(points)
        if len(front) > 2:
            fit(below, *zip(*front), title, 'C')
        below.legend(fontsize=8)
        for axis, x in ((above, 'parameters N, millions'), (below, 'training compute C, PFLOP')):
            axis.set(xlabel=x, xscale='log', yscale='log')
            axis.yaxis.set_major_formatter('{x:.4g}')           # 4.2 instead of 4.2 x 10^0
            axis.yaxis.set_minor_formatter('{x:.4g}')
    figure.savefig(path, dpi=90)
    return laws


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_shared(parser, '--ckpt', '--data', '--device')
    add('--depths', type=at_least_1, nargs='+', default=[2, 3, 4, 6],
        help='of the transformers [2 3 4 6]')
    add('--steps', type=at_least_1, default=1000, help='of each [1000]')
    add('--batch', type=at_least_1, default=32, help='images per step [32]')
    add('--lr', type=number(float, 0), default=1.5e-3,
        help='peak learning rate at depth 4; at depth d it is sqrt(4 / d) times that [0.0015]')
    add('--out', type=a_path, default='scaling', help='folder for everything [scaling]')
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    vae, _, ckpt = load(args.ckpt)
    if 'config' not in ckpt:
        raise UserError(f'{args.ckpt} was not made by train.py')
    vae = vae.to(device).requires_grad_(False)
    base = dict(steps=args.steps, batch=args.batch, device=device)
    if args.data:
        base['data'] = args.data
    # Tokens go to the folder of the first depth, where no other machine writes.
    config = make_config(dict(base, out=args.out / f'd{args.depths[0]}'), ckpt['config'])
    train, val, classes, _ = read_data(config)
    stored, stored_val = tokenize_both(vae, train, val, config)
    key = key_of_tokens(vae, train, config.views, config)
    V, z = vae.quantize.embedding.weight.shape
    runs = []
    for depth in args.depths:
        config = make_config(dict(base, depth=depth, lr=args.lr * math.sqrt(4 / depth),
                                  out=args.out / f'd{depth}'), ckpt['config'])

        def make_stage():
            var = VAR(vae.patch_nums, depth, len(classes), V, z)
            return ScalingStage(config, vae, var, stored, stored_val)

        var = train_or_load(make_stage, config, key).var
        one = Run(depth, parameters(var), compute(var, args.steps * args.batch),
                  read_course(config.out))
        runs.append(one)
        last = one.course[args.steps]
        print(f'depth {depth}: {one.N / 1e6:.2f} M parameters, {one.C:.3g} PFLOP,',
              ', '.join(f'{name} {last[name]:.4f}' for name in FIGURES), flush=True)
    draw_grid(runs, args.out)
    if len(runs) > 2:
        laws = draw_laws(runs, args.out / 'scaling.png')
        print('N in millions, C in PFLOP:', *laws, sep='\n')


if __name__ == '__main__':
    run(main)
