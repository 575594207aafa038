"""Section 5.2 at a small size: loss and token error against parameters and training compute.

    python train.py --data cifar10                                  # the tokenizer and the tokens
    python experiments/scaling.py --depths 2 3 4 6

Paper: equations (9) to (16), Figs. 5, 6 and 7. The loss is the whole cross-entropy; the paper plots
it less an irreducible part of 4.5 to 5, so that exponents of the loss cannot be compared.
Transformers of several depths, equation (7), are trained on the tokens.npz beside --ckpt, with the
same batches and steps, each in a folder of its own.
Writes scaling-grid.png (Fig. 7), a row per depth, with the samples of four classes, each after
growing shares of the training; for three depths or more also scaling.png, Figs. 5 and 6.

Letters: d depth, N parameters, C training compute, L tokens of all scales, V codes, z code
dimension, w width, H x W pixels.
"""
import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import numpy as np
import torch
from matplotlib.figure import Figure

from reasons import Stage
from support.checkpoints import build, load
from support.data import read_tokens
from support.images import make_grid, save_image, to_uint8
from support.options import at_least_1, make_parser, nonnegative
from support.run import pick_device, run, show, tell
from train import train_stage

FIGURES = {'loss last': 'L, last scale', 'loss': 'L, all scales',
           'error last': 'Err, last scale', 'error': 'Err, all scales'}


class ScalingStage(Stage):
    """Also keeps, of every evaluation, a sample of each of the first four classes, for Fig. 7."""
    samples = ()                                                # arrays (4, H, W, 3)

    def evaluate(self):
        classes = list(range(min(4, self.var.num_classes)))
        maps = self.var.generate(self.vae, classes, seed=0, **self.config.sampling)
        self.samples += (to_uint8(self.vae.decode(maps)),)
        return super().evaluate()


def size_and_compute(var, images):
    """N in millions, the parameters of the blocks: what equation (8) counts, and their few biases
    and scales. C in PFLOP: six for each weight and token, for each weight of AdaLN and image, and
    for each product of attention, also those that the mask removes."""
    L, w = len(var.mask), var.head.in_features
    N = sum(p.numel() for p in var.blocks.parameters())
    ada = sum(p.numel() for name, p in var.blocks.named_parameters() if 'ada_lin' in name)
    per_token = N - ada + var.head.weight.numel()
    attention = 2 * L * L * w * len(var.blocks)                 # q k^T, and the weights times v
    return N / 1e6, 6 * images * (per_token * L + ada + attention) / 1e15


def fit_power_law(x, y):
    """y = (b x)^a, equation (9), for points x (n,) and y (n,), by a line in log-log. Returns a, its
    standard error, b, and the Pearson coefficient of that line, as in (10)."""
    log_x, log_y = np.log(x), np.log(y)
    (a, offset), covariance = np.polyfit(log_x, log_y, 1, cov=True)
    r = np.corrcoef(log_x, log_y)[0, 1]
    return a, math.sqrt(covariance[0, 0]), np.exp(offset / a), r


def draw_law(axis, points, title, symbol):
    """Draws a power law through points (x, y), names it in the title of the axis and prints it."""
    x, y = np.array(points).T                                               # (n,) each
    a, error, b, r = fit_power_law(x, y)
    law, quality = f'{title} = ({b:.3g} {symbol})^{a:.3g}', f'(+- {error:.1g}), r {r:.4f}'
    axis.set_title(f'{law}\n{quality}', fontsize=9)
    axis.plot(x, (b * x) ** a, '--', color='grey')
    tell(f'{law} {quality}')


def draw_laws(trained, path):
    """Figs. 5 and 6: the last figures against N (above), and those of all evaluations against C
    (below), with the power law of the Pareto front. trained: {depth: (N, C, figures of the
    evaluations)}."""
    figure = Figure(figsize=(14, 7), layout='constrained')
    for (above, below), (name, title) in zip(figure.subplots(2, 4).T, FIGURES.items()):
        of_N, of_C = [], []
        for depth, (N, C, history) in trained.items():
            values = [figures[name] for figures in history]
            spent = C * np.arange(1, len(values) + 1) / len(values)
            below.plot(spent, values, 'o-', label=f'depth {depth}', lw=1, ms=3)
            of_N.append((N, values[-1]))
            of_C += zip(spent, values)
        above.plot(*zip(*of_N), 'o')
        draw_law(above, of_N, title, 'N')
        # The front: what is below all points with less compute.
        front = [(x, y) for x, y in sorted(of_C) if all(y < v for u, v in of_C if u < x)]
        if len(front) > 2:
            draw_law(below, front, title, 'C')
        below.legend(fontsize=8)
        for axis, x in ((above, 'parameters N, millions'), (below, 'training compute C, PFLOP')):
            axis.set(xlabel=x, xscale='log', yscale='log')
            axis.yaxis.set_major_formatter('{x:.4g}')           # 4.2 instead of 4.2 x 10^0
            axis.yaxis.set_minor_formatter('{x:.4g}')
    figure.savefig(path, dpi=90)


def main():
    parser = make_parser(__doc__, '--ckpt', '--device')
    add = parser.add_argument
    add('--depths', type=at_least_1, nargs='+', default=[2, 3, 4, 6], help='[2 3 4 6]')
    add('--steps', type=at_least_1, default=1000, help='of each [1000]')
    add('--batch', type=at_least_1, default=32, help='images per step [32]')
    add('--lr', type=nonnegative, default=1.5e-3,
        help='peak learning rate at depth 4; at depth d it is sqrt(4 / d) times that [0.0015]')
    add('--out', type=Path, default='scaling', help='a new folder for everything [scaling]')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, _, ckpt = load(args.ckpt)
    tokens = read_tokens(args.ckpt.parent)
    args.out.mkdir(parents=True)                                # an OSError if it is there
    trained, grid = {}, []
    for depth in args.depths:
        config = Namespace(**ckpt['config'])
        vars(config).update(depth=depth, steps=args.steps, batch=args.batch, device=device,
                            lr=args.lr * math.sqrt(4 / depth), out=args.out / f'd{depth}')
        torch.manual_seed(0)
        _, var = build(config, ckpt['classes'])
        config.out.mkdir()
        stage = ScalingStage(config, vae, var, *tokens)
        train_stage(stage, dict(stage='transformer', step=0, optimizer=None))
        N, C = size_and_compute(var, args.steps * args.batch)
        trained[depth] = N, C, stage.history
        show(f'depth {depth}: {N:.2f} M parameters, {C:.3g} PFLOP', stage.history[-1], FIGURES)
        samples = np.stack(stage.samples, axis=1)               # (4, evaluations, H, W, 3)
        grid.append(samples.reshape(-1, *samples.shape[2:]))
        save_image(args.out / 'scaling-grid.png', make_grid(grid))
    if len(trained) > 2:
        tell('N in millions, C in PFLOP:')
        draw_laws(trained, args.out / 'scaling.png')


if __name__ == '__main__':
    run(main)
