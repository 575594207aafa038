"""Table 3 (Section 7) at a small size: what each component of VAR contributes.

    python experiments/ablation.py                          # the built-in shapes
    python experiments/ablation.py --data cifar10 --out ablation-cifar10

The rows are cumulative, as in the paper: raster-scan AR, VAR with plain LayerNorm, AdaLN, top-k,
guidance, normalised queries and keys, a deeper model. All transformers are trained on the same
images for the same number of steps, each in a folder of its own; a run that was interrupted
continues where it was. Cost is the time of sampling, relative to raster-scan AR with cached keys
and values. Frechet distance and the share that is classified correctly come from the classifier of
judge.py, the loss from a thousand validation images. Losses of raster-scan AR are left out, because
its tokens come from another tokenizer.
Writes ablation.md, the table, and ablation.png, a row of samples for each row of the table.

Letters: B images per batch, H x W pixels, C classes, n samples of each, w width, h heads, l tokens,
V codes, z code dimension.
"""
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from judge import draw_classes, train_classifier
from raster import Raster
from support.checkpoints import read_checkpoint
from support.data import read_data
from support.images import make_grid, save_image
from support.options import (a_count, a_guidance, a_path, add_shared, at_least_1, make_config,
                             make_parser)
from support.run import cast_linear_weights, pick_device, read_log, run
from support.tokens import key_of_tokens, tokenize_both
from tokenizer import VQVAE
from train import TokenizerStage, TransformerStage, train_stage
from var import VAR

# ---- What the paper's components are compared with ----


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


def scale_only(q, k):
    """Queries and keys (B, h, l, 64) of the plain scaled dot product, 0.25 q.k / sqrt(64).

    The factor 0.25 is the release's, for models without normalised queries and keys.
    """
    return q * (0.25 / math.sqrt(64)), k


def use_plain_attention(var):
    """Takes the normalisation of queries and keys, and its learned scale, out of all blocks."""
    for block in var.blocks:
        block.attn.normalise = scale_only
        del block.attn.scale_mul_1H11


def used_weights(var):
    """How many weights have an effect: those of a PlainNorm without the matrices of AdaLN."""
    plain = isinstance(var, PlainNorm)
    return sum(p.numel() for name, p in var.named_parameters()
               if not (plain and 'ada_lin' in name and p.ndim > 1))


# ---- Runs that continue ----


def train_or_load(make_stage, config, tokens=None):
    """The stage that make_stage() returns, trained, in evaluation mode and without gradients.

    It is trained in config.out: continued where it was interrupted, and only loaded if ckpt.pt
    there is complete. tokens: the key_of_tokens() that a transformer is trained on. A checkpoint
    with other settings or of other tokens is replaced.
    """
    trained_on, path = dict(config=config.settings(), tokens=tokens), config.out / 'ckpt.pt'
    config.out.mkdir(parents=True, exist_ok=True)
    state = read_checkpoint(path) if path.exists() else {}
    if any(state.get(name) != value for name, value in trained_on.items()):
        state = dict(trained_on, step=0, optimizer=None)
        for old in (path, config.out / 'log.csv'):
            old.unlink(missing_ok=True)
    torch.manual_seed(config.seed)
    stage = make_stage().to(config.device)
    if state['step'] < stage.steps:
        train_stage(stage, state)
    else:
        for name, module in stage.learned().items():
            module.load_state_dict(state[name])
    return stage.eval().requires_grad_(False)


def train_tokenizer(config, train, val):
    """The VQVAE of a config, trained; the stored tokens of training and validation images; and
    their key_of_tokens()."""
    def make_stage():
        vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
        return TokenizerStage(config, vae, train, val)

    vae = train_or_load(make_stage, config).vae
    key = key_of_tokens(vae, train, config.views, config)
    return vae, *tokenize_both(vae, train, val, config), key


def train_transformer(config, num_classes, vae, stored, stored_val, key, model, normalised):
    """A transformer of class `model`, trained on stored tokens, ready for sampling, and its
    validation loss in nats per token. vae: a VQVAE or a Raster; normalised: whether queries and
    keys are."""
    def make_stage():
        V, z = vae.quantize.embedding.weight.shape
        var = model(vae.patch_nums, config.depth, num_classes, V, z)
        if not normalised:
            use_plain_attention(var)
        return TransformerStage(config, vae, var, stored, stored_val)

    var = train_or_load(make_stage, config, key).var
    loss = read_log(config.out / 'log.csv')['transformer', 'loss'][config.steps]
    return cast_linear_weights(var, config.device), loss


# ---- The table ----


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--data', default='shapes', help='as for train.py [shapes]')
    add('--depth', type=at_least_1, default=3, help='of all rows but the last [3]')
    add('--deeper', type=at_least_1, default=5, help='depth of the last row [5]')
    add('--steps', type=at_least_1, default=1000, help='of each transformer [1000]')
    add('--tokenizer-steps', type=at_least_1, default=900,
        help='of both tokenizers, that with all scales and that with one [900]')
    add('--top-k', type=a_count, default=40, help='likeliest codes [40]')
    add('--cfg', type=a_guidance, default=4., help='guidance of the last scale [4]')
    add('--n', type=at_least_1, default=50, help='samples per class [50]')
    add('--judge-steps', type=at_least_1, default=400, help='of the classifier [400]')
    add('--out', type=a_path, default='ablation', help='folder for everything [ablation]')
    add_shared(parser, '--device')
    return parser.parse_args()


def table_rows(args):
    """The rows of the table: name, folder, tokenizer, class, depth, whether queries and keys are
    normalised, sampling. Rows with the same folder have the same transformer."""
    plain = dict(cfg=0., top_k=0, top_p=1.)
    top_k = dict(plain, top_k=args.top_k)
    guided = dict(top_k, cfg=args.cfg)
    d = args.depth
    return [
        ('raster-scan AR', 'ar', 'raster', PlainNorm, d, False, plain),
        ('VAR, plain LayerNorm', 'plain', 'scales', PlainNorm, d, False, plain),
        ('+ AdaLN', 'adaln', 'scales', VAR, d, False, plain),
        (f'+ top-k {args.top_k}', 'adaln', 'scales', VAR, d, False, top_k),
        (f'+ guidance {args.cfg:g}', 'adaln', 'scales', VAR, d, False, guided),
        ('+ normalised queries and keys', 'norm', 'scales', VAR, d, True, guided),
        (f'+ deeper (depth {args.deeper})', 'deeper', 'scales', VAR, args.deeper, True, guided)]


def main():
    args = parse()
    device = pick_device(args.device)
    # Every tokenizer has the plain losses, whatever the preset of the data has.
    base = dict(data=args.data, size=32, steps=args.steps, tokenizer_steps=args.tokenizer_steps,
                perceptual=0., adversarial=0., device=device)
    config = make_config(base)
    train, val, classes, _ = read_data(config)
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device)

    # Two tokenizers, with the last scale alone and with all, and the tokens of all images.
    patch_nums = {'raster': config.patch_nums[-1:], 'scales': config.patch_nums}
    tokenized = {}
    for name, sides in patch_nums.items():
        config = make_config(dict(base, patch_nums=sides, out=args.out / name))
        vae, *stored = train_tokenizer(config, train, val)
        tokenized[name] = [Raster(vae) if name == 'raster' else vae, *stored]

    lines = ['| | parameters | cost | Frechet distance | classified correctly | validation loss |',
             '|---|---|---|---|---|---|']
    sheet, trained, baseline_seconds = [], {}, None
    for name, folder, tokens, model, depth, normalised, sampling in table_rows(args):
        vae = tokenized[tokens][0]
        if folder not in trained:
            config = make_config(dict(base, patch_nums=patch_nums[tokens], depth=depth,
                                      out=args.out / folder))
            trained[folder] = train_transformer(config, len(classes), *tokenized[tokens], model,
                                                normalised)
        var, loss = trained[folder]

        every = torch.arange(len(classes))
        draw_classes(vae, var, 1, every, sampling)      # the first passes on a GPU take longer
        began = time.monotonic()
        samples = draw_classes(vae, var, args.n, every, sampling)           # (C, n, H, W, 3)
        seconds = time.monotonic() - began
        baseline_seconds = baseline_seconds or seconds  # the first row is raster-scan AR
        shares, distance = classifier.grade(samples, real)
        loss_text = f'{loss:.3f}' if tokens == 'scales' else ''
        lines.append(f'| {name} | {used_weights(var) / 1e6:.1f} M | '
                     f'{seconds / baseline_seconds:.2f} | {distance:.1f} | {shares.mean():.1%} | '
                     f'{loss_text} |')
        print(lines[-1], flush=True)
        sheet.append(samples[:, 0])                                         # (C, H, W, 3)
        save_image(args.out / 'ablation.png', [make_grid(sheet)])
        (args.out / 'ablation.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
