"""Table 3 (Section 7) at a small size: what each component of VAR contributes.

    python experiments/ablation.py                          # the built-in shapes
    python experiments/ablation.py --data cifar10 --out ablation-cifar10

The rows are cumulative, as in the paper. All transformers are trained on the same images for the
same number of steps, each in a folder of its own. Cost is the time of sampling, relative to
raster-scan AR with cached keys and values. Frechet distance and the share that is classified
correctly come from the classifier of evaluate.py, the loss from a thousand validation images.
Losses of raster-scan AR are left out, because its tokens come from another tokenizer.
Writes ablation.md, the table, and ablation.png, a row of samples for each row of the table.

Letters: H x W pixels, C classes, n samples of each, h heads, l tokens, V codes, z code dimension.
"""
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import torch

from evaluate import draw_classes, train_judge
from raster import Raster
from support.checkpoints import build
from support.data import read_data, read_tokens
from support.images import make_grid, save_image
from support.options import (a_count, a_guidance, add_shared, at_least_1, make_config,
                             make_parser)
from support.run import UserError, pick_device, run, tell
from train import TransformerStage, train_stage, train_tokenizer
from var import VAR


class PlainNorm(VAR):
    """A VAR with plain LayerNorm: learned gains, shifts and gates that do not depend on the class.

    They are the biases of AdaLN, whose matrices are multiplied by zero. The class is then known
    from the start token alone. Gates start at 1, as plain residual branches have none.
    """

    def modulations(self, condition):
        blocks, head = super().modulations(torch.zeros_like(condition))
        plain = []
        for gamma1, gamma2, scale1, scale2, shift1, shift2 in blocks:
            plain.append((1 + gamma1, 1 + gamma2, scale1, scale2, shift1, shift2))
        return plain, head


def use_plain_attention(var):
    """Takes the normalisation of queries and keys (B, h, l, 64), and its learned scale, out of all
    blocks. The plain scaled dot product is 0.25 q.k / sqrt(64), with the release's factor 0.25."""
    for block in var.blocks:
        block.attn.normalise = lambda q, k: (q * (0.25 / math.sqrt(64)), k)
        del block.attn.scale_mul_1H11


def new_folder(path):
    """Makes a folder. UserError if it is there: no experiment overwrites another one."""
    try:
        path.mkdir(parents=True)
    except FileExistsError as e:
        raise UserError(f'--out {path} is there: choose another, or move it away') from e


def train(stage):
    """Trains a TransformerStage in a new folder, config.out. Returns the transformer, for sampling,
    and figures of validation images, {name: {step: value}}."""
    new_folder(stage.config.out)
    train_stage(stage, dict(stage='transformer', step=0, optimizer=None))
    log = read_log(stage.config.out / 'log.csv')
    return stage.var.eval(), {name: values for (_, name), values in log.items()}


def make_rows(args, patch_nums):
    """The rows of the table: their names, and what each changes in the row before it."""
    return [
        ('raster-scan AR', dict(patch_nums=patch_nums[-1:], model=PlainNorm, depth=args.depth,
                                normalised=False, top_k=0, cfg=0.)),
        ('VAR, plain LayerNorm', dict(patch_nums=patch_nums)),
        ('+ AdaLN', dict(model=VAR)),
        (f'+ top-k {args.top_k}', dict(top_k=args.top_k)),
        (f'+ guidance {args.cfg:g}', dict(cfg=args.cfg)),
        ('+ normalised queries and keys', dict(normalised=True)),
        (f'+ deeper (depth {args.deeper})', dict(depth=args.deeper))]


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--data', default='shapes', help='as for train.py [shapes]')
    add('--depth', type=at_least_1, default=3, help='of all rows but the last [3]')
    add('--deeper', type=at_least_1, default=5, help='depth of the last row [5]')
    add('--steps', type=at_least_1, default=1000, help='of each transformer [1000]')
    add('--tokenizer-steps', type=at_least_1, default=900, help='of both tokenizers [900]')
    add('--top-k', type=a_count, default=40, help='likeliest codes [40]')
    add('--cfg', type=a_guidance, default=4., help='guidance of the last scale [4]')
    add('--n', type=at_least_1, default=50, help='samples per class [50]')
    add('--judge-steps', type=at_least_1, default=400, help='of the classifier [400]')
    add('--out', type=Path, default='ablation', help='a new folder for everything [ablation]')
    add_shared(parser, '--device')
    args = parser.parse_args()
    # Every tokenizer has the plain losses, whatever the recipe of the data has.
    given = dict(data=args.data, size=32, steps=args.steps, tokenizer_steps=args.tokenizer_steps,
                 perceptual=0., adversarial=0., device=pick_device(args.device))
    config = make_config(given)
    data = read_data(config)
    classes = torch.arange(len(data.classes))                               # (C,)
    new_folder(args.out)
    judge, real = train_judge(data, config, args.judge_steps)

    lines = ['| | parameters | cost | Frechet distance | classified correctly | validation loss |',
             '|---|---|---|---|---|---|']
    now, sheet, baseline_seconds = Namespace(), [], None
    for i, (title, change) in enumerate(make_rows(args, config.patch_nums)):
        vars(now).update(change)
        torch.manual_seed(0)
        if 'patch_nums' in change:
            config = make_config({**given, 'patch_nums': now.patch_nums,
                                  'out': args.out / f'{i}-tokenizer'})
            vae, _ = build(config, data.classes)
            train_tokenizer(config, data, vae, dict(stage='tokenizer', step=0, optimizer=None))
            tokens = read_tokens(config.out)
            vae = vae if len(now.patch_nums) > 1 else Raster(vae)
        if not {*change} <= {'top_k', 'cfg'}:   # these two are options of sampling
            config = make_config({**given, 'depth': now.depth, 'out': args.out / f'{i}'})
            V, z = vae.quantize.embedding.weight.shape
            var = now.model(vae.patch_nums, now.depth, len(classes), V, z)
            if not now.normalised:
                use_plain_attention(var)
            var, figures = train(TransformerStage(config, vae, var, *tokens))

        sampling = dict(cfg=now.cfg, top_k=now.top_k, top_p=0.)
        draw_classes(vae, var, 1, classes, sampling)    # the first passes on a GPU take longer
        began = time.monotonic()
        samples = draw_classes(vae, var, args.n, classes, sampling)         # (C, n, H, W, 3)
        seconds = time.monotonic() - began
        baseline_seconds = baseline_seconds or seconds  # the first row is raster-scan AR
        shares, distance = judge.grade(samples, real)
        loss = f'{figures["loss"][args.steps]:.3f}' if i > 0 else ''
        weights = sum(p.numel() for name, p in var.named_parameters()   # that have an effect
                      if now.model is VAR or 'ada_lin' not in name or p.ndim == 1)
        lines.append(f'| {title} | {weights / 1e6:.1f} M | '
                     f'{seconds / baseline_seconds:.2f} | {distance:.1f} | {shares.mean():.1%} | '
                     f'{loss} |')
        tell(lines[-1])
        sheet.append(samples[:, 0])                                         # (C, H, W, 3)
        save_image(args.out / 'ablation.png', make_grid(sheet))
        (args.out / 'ablation.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
