"""Table 3 (Section 7) at a small size: what each component of VAR contributes.

    python experiments/ablation.py                          # the built-in shapes
    python experiments/ablation.py --data cifar10 --out ablation-cifar10

The rows are cumulative, as in the paper: raster-scan AR, VAR with plain LayerNorm, AdaLN, top-k,
guidance, normalised queries and keys, a deeper model. All transformers are trained on the same
images for the same number of steps, each in a folder of its own; a run that was interrupted
continues where it was. Cost is the time of sampling, relative to raster-scan AR with cached keys
and values. Frechet distance and the share that is classified correctly come from the classifier of
judge.py. Losses of raster-scan AR are left out, because its tokens come from another tokenizer.
Writes ablation.md, the table, and ablation.png, the first sample of each class, a row per row.

Letters: V codes, z code dimension, N weights.
"""
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge import draw_classes, train_classifier                            # noqa: E402
from raster import Raster                                                   # noqa: E402
from runs import train_or_load, train_tokenizer, validation_loss            # noqa: E402
from tokenizer import make_grid, save_image                                 # noqa: E402
from train import TransformerStage, make_config, read_data, tokenize        # noqa: E402
from var import VAR, Parser, number, pick_device, run                       # noqa: E402


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

    def unused_weights(self):
        """How many weights have no effect: the matrices of AdaLN."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if 'ada_lin' in name and p.ndim > 1)


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data', default='shapes', help='as for train.py')
    add('--depth', type=number(int, 1), default=3, help='of all rows but the last (default: 3)')
    add('--deeper', type=number(int, 1), default=5, help='depth of the last row (default: 5)')
    add('--steps', type=number(int, 1), default=1000, help='of each transformer (default: 1000)')
    add('--tokenizer-steps', type=number(int, 1), default=900,
        help='of both tokenizers, that with all scales and that with one (default: 900)')
    add('--top-k', type=number(int, 0), default=40, help='likeliest codes (default: 40)')
    add('--cfg', type=number(float, 0), default=4., help='guidance of the last scale (default: 4)')
    add('--n', type=number(int, 1), default=50, help='samples per class (default: 50)')
    add('--judge-steps', type=number(int, 1), default=400, help='of the classifier (default: 400)')
    add('--out', type=Path, default=Path('ablation'),
        help='folder for everything (default: ablation)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


def table_rows(args):
    """The rows of the table: name, folder of the run, tokens, class, depth, qk_norm, sampling."""
    plain = dict(cfg=0., top_k=0, top_p=1.)
    top_k = dict(plain, top_k=args.top_k)
    guided = dict(top_k, cfg=args.cfg)
    return [
        ('raster-scan AR', 'ar', 'raster', PlainNorm, args.depth, False, plain),
        ('VAR, plain LayerNorm', 'plain', 'scales', PlainNorm, args.depth, False, plain),
        ('+ AdaLN', 'adaln', 'scales', VAR, args.depth, False, plain),
        (f'+ top-k {args.top_k}', 'adaln', 'scales', VAR, args.depth, False, top_k),
        (f'+ guidance {args.cfg:g}', 'adaln', 'scales', VAR, args.depth, False, guided),
        ('+ normalised queries and keys', 'norm', 'scales', VAR, args.depth, True, guided),
        (f'+ deeper (depth {args.deeper})', 'deeper', 'scales', VAR, args.deeper, True, guided)]


def train_transformer(config, vae, stored, stored_val, model, num_classes, qk_norm):
    """A transformer of class `model` that is trained on stored tokens, and its validation loss in
    nats per token."""
    def make_stage():
        V, z = vae.quantize.embedding.weight.shape
        var = model(vae.patch_nums, config.depth, num_classes, V, z, qk_norm=qk_norm)
        return TransformerStage(config, vae, var.to(config.device), stored, stored_val)

    stage = train_or_load(make_stage, config)
    return stage.var, validation_loss(stage, stage.var)


def main():
    args = parse()
    device = pick_device(args.device)
    # Every row has AdamW and the plain losses of stage 1, whatever the preset of the data has.
    base = dict(data=args.data, size=32, steps=args.steps, tokenizer_steps=args.tokenizer_steps,
                perceptual=0., adversarial=0., muon_lr=0., device=device, workers=0)
    config = make_config(base, {})
    train, val, classes, _ = read_data(config)
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device)

    # Two tokenizers, with all scales and with the last one alone, and the tokens of all images.
    patch_nums = {'scales': config.patch_nums, 'raster': config.patch_nums[-1:]}
    vaes, stored = {}, {}
    for tokens in ('raster', 'scales'):
        given = dict(base, patch_nums=patch_nums[tokens], out=args.out / tokens)
        config = make_config(given, {})
        vae = train_tokenizer(config, train, val)
        stored[tokens] = (tokenize(vae, train, config, 'train'), tokenize(vae, val, config, 'val'))
        vaes[tokens] = Raster(vae) if tokens == 'raster' else vae

    lines = ['| | parameters | cost | Frechet distance | classified correctly | validation loss |',
             '|---|---|---|---|---|---|']
    sheet, trained, baseline_seconds = [], {}, None
    for name, folder, tokens, model, depth, qk_norm, sampling in table_rows(args):
        vae = vaes[tokens]
        if folder not in trained:
            given = dict(base, patch_nums=patch_nums[tokens], depth=depth, out=args.out / folder)
            trained[folder] = train_transformer(make_config(given, {}), vae, *stored[tokens], model,
                                                len(classes), qk_norm)
        var, loss = trained[folder]

        draw_classes(vae, var, 1, device, sampling)     # the first passes on a GPU take longer
        began = time.time()
        samples = draw_classes(vae, var, args.n, device, sampling)          # (C, n, H, W, 3)
        seconds = time.time() - began
        if baseline_seconds is None:                    # the first row is raster-scan AR
            baseline_seconds = seconds
        shares, distance = classifier.grade(samples, real)
        N = sum(p.numel() for p in var.parameters())
        if model is PlainNorm:
            N -= var.unused_weights()
        loss_text = f'{loss:.3f}' if tokens == 'scales' else ''
        lines.append(f'| {name} | {N / 1e6:.1f} M | {seconds / baseline_seconds:.2f} | '
                     f'{distance:.1f} | {shares.mean():.1%} | {loss_text} |')
        print(lines[-1], flush=True)
        sheet.append(samples[:, 0])
        save_image(args.out / 'ablation.png', [make_grid(sheet)])
        (args.out / 'ablation.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
