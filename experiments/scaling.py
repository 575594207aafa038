"""Section 5.2 at a size that anyone can run: loss and token error against parameters and compute.

    python train.py --data cifar10                                  # the tokenizer, in ckpt.pt
    python experiments/scaling.py --data cifar10 --dry-run          # what it is going to do
    python experiments/scaling.py --data cifar10 --depths 2 3 4 6   # the whole of it

Transformers of several depths, (7), on the same tokens, with the same batches and steps. Every depth
has a folder of its own and goes on after an interruption; what is finished is not trained again. So
depths can be shared among machines: run one with each --depths (--dry-run prints the commands), all
with the same --out, and at the end the whole. Writes scaling.csv and scaling.png (Figs. 5 and 6).
"""
import csv
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
import train                                                                # noqa: E402
from ablation import stage_of                                               # noqa: E402
from sample import Problem, parse, pick_device, precision, read_weights, run, to_uint8   # noqa: E402
from tokenizer import VQVAE                                                 # noqa: E402
from var import VAR                                                         # noqa: E402

WHAT = {'loss last': 'L, last scale', 'loss': 'L, all scales',
        'error last': 'Err, last scale', 'error': 'Err, all scales'}


@dataclass
class Options:
    """The options of the command line, as --name value."""
    ckpt: Path = Path('ckpt.pt')        # its tokenizer is used, and its settings
    data: str = 'cifar10'               # as for train.py
    depths: list = ('2', '3', '4', '6')     # of the transformers
    steps: int = 1000                   # of each
    batch: int = 32                     # pictures a step
    lr: float = 1.5e-3                  # peak learning rate at depth 4; others: times (4 / d) ** .5
    out: Path = Path('scaling')         # folder of all that this makes
    device: str = None                  # cuda, mps or cpu; the best there is if not given
    dry_run: bool = False               # print the plan with its time, and end


def parameters(var):
    """Weights but for embeddings and head: what (8) counts."""
    return sum(p.numel() for block in var.blocks for p in block.parameters())


def compute(var, pictures):
    """Training compute in PFlop: six for each weight and token, the attention's products too.

    Weights of AdaLN see one vector a picture, not one a token.
    """
    L, seen = len(var.lvl_1L[0]), torch.tensor(var.patch_nums) ** 2
    ada = sum(p.numel() for b in var.blocks for n, p in b.named_parameters() if 'ada_lin' in n)
    attention = 2 * (seen * seen.cumsum(0)).sum().item() * var.head.in_features * len(var.blocks)
    return 6 * pictures * ((parameters(var) - ada + var.head.weight.numel()) * L + ada + attention) / 1e15


def power_law(x, y):
    """(9) with an irreducible term: y = e + (b x)^a. Returns e, a, its standard error, b, r.

    For each e the rest is a line in log-log (10); e is that of the best Pearson coefficient r, and
    is 0 where no other makes the line straighter by more than 0.001. The error of a is for e given.
    """
    def line(e):
        log_x, log_y = np.log(x), np.log(y - e)
        r, slope = np.corrcoef(log_x, log_y)[0, 1], np.polyfit(log_x, log_y, 1)
        error = abs(slope[0]) * np.sqrt(max(0., 1 / r ** 2 - 1) / max(1, len(x) - 2))
        return r, (e, slope[0], error, np.exp(slope[1] / slope[0]), r)

    x, y = np.asarray(x, float), np.asarray(y, float)
    straight, best = line(0.), min((line(e) for e in np.linspace(0, .99, 100) * y.min()))
    return (best if best[0] < straight[0] - 1e-3 else straight)[1]


def finished(folder):
    """Rows {step: figures} of a depth's log.csv; an evaluation that was run twice counts once."""
    rows = {}
    for stage, step, _, name, value in csv.reader(open(folder / 'log.csv')):
        rows.setdefault(int(step), {})[name] = float(value)
    return rows


class Stage(train.TransformerStage):
    """Also keeps, at every evaluation, a picture of each of the first ten classes: for grid.py."""
    def evaluate(self):
        images = self.var.generate(self.vae, range(min(10, self.var.num_classes)), seed=0, **self.args.sampling)
        np.save(self.args.out / f'{round(100 * self.progress)}.npy', to_uint8(images))
        return super().evaluate()


def draw(out, models):
    """Figs. 5 and 6: the last figures against N, and the course of all depths against C."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 8), constrained_layout=True)
    laws = []
    for column, (name, title) in enumerate(WHAT.items()):
        N = np.array([n for _, n, _, _ in models])
        y = np.array([course[max(course)][name] for *_, course in models])
        e, a, error, b, r = power_law(N / 1e6, y)
        laws.append(f'{title} = {e:.3g} + ({b:.3g} N)^{a:.3g} (+- {error:.1g}), r {r:.4f}; N in million')
        x = np.geomspace(N.min(), N.max())
        axes[0, column].plot(N, y, 'o', color='C0')
        axes[0, column].plot(x, e + (b * x / 1e6) ** a, '--', color='grey')
        axes[0, column].set(xlabel='parameters N', xscale='log', yscale='log')
        axes[0, column].set_title(laws[-1].replace(' (+-', '\n(+-'), fontsize=9)
        points = []
        for d, _, C, course in models:
            part = [(C * step / max(course), figures[name]) for step, figures in course.items() if step]
            points += part
            axes[1, column].plot(*zip(*part), 'o-', label=f'd {d}', lw=1, ms=3)
        front = [p for p in sorted(points) if all(p[1] < q[1] for q in points if q[0] < p[0])]
        if len(front) > 2:
            e, a, error, b, r = power_law(*zip(*front))
            laws.append(f'{title} = {e:.3g} + ({b:.3g} C)^{a:.3g} (+- {error:.1g}), r {r:.4f}; C in PFlop')
            axes[1, column].plot(*zip(*front), 'k--', lw=1, label='Pareto front')
        axes[1, column].set(title=title, xlabel='training compute C, PFlop', xscale='log', yscale='log')
        axes[1, column].legend(fontsize=8)
    figure.savefig(out / 'scaling.png', dpi=70)
    with open(out / 'scaling.csv', 'w') as f:
        f.write('depth,parameters,PFlop,step,' + ','.join(WHAT) + '\n')
        f.writelines(f'{d},{n},{C * step / max(course):.4g},{step},'
                     + ','.join(f'{figures[name]:.5g}' for name in WHAT) + '\n'
                     for d, n, C, course in models for step, figures in course.items())
    print(*laws, sep='\n')


def main():
    given = Options(**parse(Options, __doc__))
    device, ckpt = pick_device(given.device), read_weights(given.ckpt)
    base = {k: v for k, v in ckpt['config'].items() if k not in ('data', 'steps', 'batch', 'lr')}
    args = train.Options(**base, data=given.data, steps=given.steps, batch=given.batch)
    args.device, args.workers, args.out, args.accumulate = device, 1, given.out, 1
    vae = VQVAE.from_state_dict(ckpt['vae'], ckpt['patch_nums']).to(device).eval().requires_grad_(False)
    # Part of what a finished depth is recognised by: another tokenizer makes other tokens.
    args.tokenizer = f'{given.ckpt} {vae.quantize.embedding.weight.sum().item()}'
    classes, V_z = ckpt['classes'], vae.quantize.embedding.weight.shape
    models, began = [], time.time()
    for d in map(int, given.depths):
        var = VAR(vae.patch_nums, d, len(classes), *V_z)
        models.append([d, parameters(var), compute(var, args.steps * args.batch), given.out / f'd{d}'])
    if given.dry_run:
        var = VAR(vae.patch_nums, 4, len(classes), *V_z).to(device).train()
        tokens = [torch.randint(V_z[0], (args.batch, p * p), device=device) for p in vae.patch_nums]
        for _ in range(2):                                          # the first one warms up
            getattr(torch, device.type).synchronize()
            start = time.time()
            with precision(device):
                labels = torch.zeros(args.batch, dtype=torch.long, device=device)
                loss, _ = var(labels, vae.var_input(tokens), tokens=torch.cat(tokens, dim=1))
            loss.mean().backward()
            getattr(torch, device.type).synchronize()
        pace = (time.time() - start) / compute(var, args.batch)     # seconds a PFlop, at depth 4
        for d, N, C, _ in models:
            print(f'd {d}: {N / 1e6:.2f} M parameters, {C:.3g} PFlop, about {C * pace / 60:.0f} min:  python '
                  f'{sys.argv[0]} --ckpt {given.ckpt} --data {given.data} --steps {args.steps} '
                  f'--batch {args.batch} --lr {given.lr} --out {given.out} --depths {d}')
        return
    *data, names = train.read_data(args)
    if names != classes:
        raise Problem(f'--data {given.data} has other classes than {given.ckpt}')
    args.out = models[0][3]                                         # no other machine writes there
    with precision(device):
        sets = [train.tokenize(vae, x, args, name) for x, name in zip(data, ('train', 'val'))]
    for model in models:
        d, _, _, folder = model
        args.depth, args.lr = d, given.lr * (4 / d) ** 0.5
        config = {k: v for k, v in vars(args).items() if k not in train.MACHINE}
        stage_of(lambda: Stage(args, vae, VAR(vae.patch_nums, d, len(classes), *V_z).to(device), *sets), args, folder,
                 **{k: ckpt[k] for k in ('version', 'classes', 'patch_nums', 'sampling')}, stage='transformer', config=config)
        model[3] = finished(folder)
        print(f'd {d}: {model[1] / 1e6:.2f} M parameters, {model[2]:.3g} PFlop,',
              ', '.join(f'{k} {model[3][max(model[3])][k]:.4f}' for k in WHAT), flush=True)
    if len(models) > 2:
        draw(given.out, models)
    print(f'{(time.time() - began) / 60:.0f} minutes, results in {given.out}')


if __name__ == '__main__':
    run(main)
