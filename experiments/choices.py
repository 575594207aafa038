"""Stage 1 (Section 3.2): what each choice in the tokenizer's training contributes.

    python experiments/choices.py --data cifar10                    # sixteen short runs
    python experiments/choices.py --only defaults '512 codes'       # two of them
    python experiments/choices.py --data cifar10 --seeds 5          # five seeds of the defaults

Each run differs from COMMON in one choice and trains on the same images. It has a folder of its
own and continues where it was interrupted. The Frechet distance is that of all validation
images, reconstructed, from the originals, in the features of the classifier of judge.py.
Writes choices.md, or seeds.md with --seeds.

Letters: K scales, L tokens of all scales.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import grade_tokenizer                                        # noqa: E402
from judge import frechet_distance, train_classifier                        # noqa: E402
from runs import train_tokenizer                                            # noqa: E402
from tokenizer import psnr, to_tensor                                       # noqa: E402
from train import PRESETS, make_config, read_data                           # noqa: E402
from var import Parser, number, pick_device, precision, run                 # noqa: E402

# What all runs have. L_P and L_G are left out, so that the choices are seen by themselves.
COMMON = dict(preset='32', perceptual=0., adversarial=0.)


# ---- The choices: each function changes a TokenizerStage before it is trained ----


def no_restart(stage):
    """Dead codes stay dead, but for the first update, which gives every code its first value."""
    quantizer = stage.vae.quantize
    usual_update, usual_limit = quantizer.update, quantizer.dead_below

    def update(tokens, vectors, decay):
        is_first = not quantizer.ema_vocab_hit_SV.any()
        quantizer.dead_below = usual_limit if is_first else 0.
        usual_update(tokens, vectors, decay)

    quantizer.update = update


def no_kmeans(stage):
    """The EMA has decay 0.98 from the start; by default it first averages over all steps so far."""
    usual_update = stage.vae.quantize.update

    def update(tokens, vectors, decay):
        usual_update(tokens, vectors, 0.98)

    stage.vae.quantize.update = update


def no_scale_dropout(stage):
    stage.vae.scale_dropout = 0.


def no_autoencoder_start(stage):
    stage.quantize_from = 0.


def cosine(stage):
    """The nearest code is that at the smallest angle. Its length stays that of the EMA."""
    quantizer = stage.vae.quantize

    def nearest(x):
        codes = F.normalize(quantizer.embedding.weight, dim=1)              # (V, z)
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ codes.T).argmax(-1)                         # (B, l)

    quantizer.nearest = nearest


def gradient(stage):
    """The codebook is trained by the quantizer loss. The first 50 quantized steps are EMA steps,
    which place the codes."""
    quantizer = stage.vae.quantize
    usual_update = quantizer.update
    quantizer.embedding.requires_grad_(True)

    def update(tokens, vectors, decay):
        quantized_steps = stage.step - stage.quantize_from * stage.steps
        if quantized_steps < 50:
            usual_update(tokens, vectors, decay)

    quantizer.update = update


# Of each choice: the function above, and what differs in the Config and in the VQVAE's sizes.
CHOICES = {
    'defaults': {},
    'no restart of dead codes': {'change': no_restart},
    'no k-means start': {'change': no_kmeans},
    'no scale dropout': {'change': no_scale_dropout},
    'quantized from the first step': {'change': no_autoencoder_start},
    'cosine similarity': {'change': cosine},
    'codebook trained by gradient': {'change': gradient},
    '256 codes': {'network': {'vocab_size': 256}},
    '512 codes': {'network': {'vocab_size': 512}},
    '2048 codes': {'network': {'vocab_size': 2048}},
    '4096 codes': {'network': {'vocab_size': 4096}},
    'code dimension 32': {'network': {'z_channels': 32}},
    'code dimension 8': {'network': {'z_channels': 8}},
    'code dimension 4': {'network': {'z_channels': 4}},
    'with group normalisation': {'network': {'normalise': True}},
    'adversarial loss': {'config': {'adversarial': 0.1}}}


# ---- Training and grading ----


def train_choice(name, seed, args, device, train, val):
    """The VQVAE of one run, trained or loaded."""
    choice = CHOICES[name]
    network = {**PRESETS[COMMON['preset']]['network'], **choice.get('network', {})}
    folder = args.out / f'{name.replace(" ", "-")}-{seed}'
    given = dict(COMMON, data=args.data, network=network, tokenizer_steps=args.steps, seed=seed,
                 device=device, workers=0, out=folder)
    config = make_config({**given, **choice.get('config', {})}, {})
    return train_tokenizer(config, train, val, choice.get('change'))


@torch.no_grad()
def psnr_of_scales(vae, images, scales):
    """PSNR in dB of images uint8 (n, H, W, 3) that are rebuilt from their first scales alone."""
    images = to_tensor(images)                                              # (n, 3, H, W)
    return psnr(vae.decode(vae.encode(images)[:scales]), images).mean().item()


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data', default='cifar10', help='as for train.py')
    add('--steps', type=number(int, 1), default=700, help='of each run (default: 700)')
    add('--only', nargs='+', choices=CHOICES, default=list(CHOICES), help='these runs')
    add('--seeds', type=number(int, 0), default=0, help='as many seeds of the defaults instead')
    add('--judge-steps', type=number(int, 1), default=1200,
        help='of the classifier (default: 1200)')
    add('--out', type=Path, default=Path('choices'),
        help='folder for everything (default: choices)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    config = make_config({**COMMON, 'data': args.data}, {})
    train, val, classes, _ = read_data(config)
    n, K = len(val), len(config.patch_nums)
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device, n)
    runs = [(name, 0) for name in args.only]
    if args.seeds:
        runs = [('defaults', seed) for seed in range(args.seeds)]
    scales = K // 2 + 1                                 # the coarse half, for the second column
    few, _ = val.some(300)                                                  # (300, H, W, 3)
    lines = [f'| | PSNR, dB | PSNR of {scales} scales, dB | SSIM | codes used | usage of the least '
             'used scale | bits per image | Frechet distance |',
             '|---|---|---|---|---|---|---|---|']
    for name, seed in runs:
        vae = train_choice(name, seed, args, device, train, val)
        with precision(device):
            figures, rebuilt, _, _ = grade_tokenizer(vae, val, n, device)   # rebuilt (n, H, W, 3)
            coarse = psnr_of_scales(vae, few.to(device), scales)
        features, _ = classifier.classify(rebuilt)
        distance = frechet_distance(features, real)
        least = min(figures[f'usage {k}'] for k in range(1, K + 1))
        title = f'{name}, seed {seed}' if args.seeds else name
        lines.append(f'| {title} | {figures["PSNR"]:.2f} | {coarse:.2f} | {figures["SSIM"]:.3f} | '
                     f'{figures["codes used"]} of {figures["of"]} | {least:.0%} | '
                     f'{figures["bits per image"]:.0f} | {distance:.2f} |')
        print(lines[-1], flush=True)
        path = args.out / ('seeds.md' if args.seeds else 'choices.md')
        path.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
