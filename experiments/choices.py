"""What each choice in the tokenizer's training is worth: all as they are but one, on the same pictures.

    python experiments/choices.py --data cifar10                    # eleven short runs
    python experiments/choices.py --data cifar10 --seeds 5          # instead: five seeds of the defaults

Each run has a folder of its own and goes on after an interruption. A small classifier learns the data first
(judge.py); its distance is that of all validation pictures, rebuilt, to the originals. Writes choices.md.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train                                                                # noqa: E402
from ablation import stage_of                                               # noqa: E402
from judge import everything, frechet, make_judge                           # noqa: E402
from sample import parse, pick_device, precision, run, to_tensor            # noqa: E402


@dataclass
class Options:
    """The options of the command line, as --name value."""
    data: str = 'cifar10'               # as for train.py
    steps: int = 700                    # of each run
    seeds: int = 0                      # so many seeds of the defaults, instead of the choices
    judge_steps: int = 1200             # of the classifier
    out: Path = Path('choices')         # folder of all that this makes
    device: str = None                  # cuda, mps or cpu; the best there is if not given


def nothing(stage):
    """All as it is."""

def no_restart(stage):
    """But in the first update, which gives every code its first place."""
    quantizer = stage.vae.quantize
    update, usual = quantizer.update, quantizer.dead_below

    def first_alone(tokens, vectors, decay):
        quantizer.dead_below = 0. if quantizer.ema_vocab_hit_SV.any() else usual
        update(tokens, vectors, decay)
    quantizer.update = first_alone

def no_kmeans(stage):
    """The moving average remembers 50 steps from the start, and not all steps so far."""
    update = stage.vae.quantize.update
    stage.vae.quantize.update = lambda tokens, vectors, decay: update(tokens, vectors, 0.98)

def no_scale_dropout(stage):
    forward = stage.forward
    stage.forward = lambda pictures, noise: forward(pictures, torch.ones_like(noise))

def no_plain_start(stage):
    stage.plain = 0.

def cosine(stage):
    """The nearest code by angle; its length is still that of the mean that it is."""
    def nearest(x):
        codes = F.normalize(quantizer.embedding.weight, dim=1)
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ codes.T).argmax(-1)
    quantizer = stage.vae.quantize
    quantizer.nearest = nearest

def gradient(stage):
    """Codes that the quantizer loss moves. The first fifty quantized steps place them as usual."""
    quantizer, move = stage.vae.quantize, stage.move_codes
    quantizer.embedding.requires_grad_(True)

    def move_codes(usages):
        if (stage.progress - stage.plain) * stage.steps < 50:
            move(usages)
    stage.move_codes = move_codes


# Each choice: what to change in the stage, and in the settings or the sizes of the network.
CHOICES = {
    'as it is': (nothing, {}), 'no restart of dead codes': (no_restart, {}),
    'no k-means start': (no_kmeans, {}), 'no scale dropout': (no_scale_dropout, {}),
    'quantized from the first step': (no_plain_start, {}), 'cosine look-up': (cosine, {}),
    'codes moved by gradient': (gradient, {}), 'codes of 8 dimensions': (nothing, {'z_channels': 8}),
    'codes of 4 dimensions': (nothing, {'z_channels': 4}), 'with group normalisation': (nothing, {'normalise': True}),
    'adversarial loss': (nothing, {'adversarial': 0.1})}


def main():
    given = Options(**parse(Options, __doc__))
    device, preset = pick_device(given.device), train.SMALL
    args = train.Options(**preset | dict(data=given.data))
    *data, classes = train.read_data(args)
    n = len(data[1].items)
    judge, real = make_judge(*data, classes, given.judge_steps, n)
    runs = [('as it is', seed) for seed in range(given.seeds)] or [(name, 0) for name in CHOICES]
    K = len(args.patch_nums.split(','))
    half = K // 2 + 1                                                       # scales: how good is the picture so far?
    few, _ = everything(data[1], 300)
    lines = [f'| | PSNR, dB | after scale {half} | SSIM | codes used | least used scale | distance |',
             '|---|---|---|---|---|---|---|']
    for name, seed in runs:
        change, settings = CHOICES[name]
        network = {k: settings.get(k, v) for k, v in preset['network'].items()}
        args = train.Options(**preset | dict(data=given.data, network=network, tokenizer_steps=given.steps, seed=seed,
                                             adversarial=settings.get('adversarial', 0.)))
        args.device, args.workers, args.sides = device, 0, [int(p) for p in args.patch_nums.split(',')]

        def make():
            stage = train.TokenizerStage(args, train.make_vae(args, {}).to(device), *data).to(device)
            change(stage)
            return stage

        vae = stage_of(make, args, given.out / f'{name.replace(" ", "-").replace(",", "")}-{seed}').vae
        with precision(device):
            figures, rebuilt, *_ = train.grade_tokenizer(vae, data[1], args, n)
            so_far = vae.decode(vae.encode(few.to(device))[:half]).cpu()
        early = -10 * ((so_far - few) / 2).square().mean((1, 2, 3)).log10().mean()
        features, _ = judge.look(to_tensor(rebuilt))
        worst = min(figures[f'usage {k}'] for k in range(1, K + 1))
        lines.append(f'| {name}{f", seed {seed}" if given.seeds else ""} | {figures["PSNR"]:.2f} | {early:.2f} | {figures["SSIM"]:.3f} | '
                     f'{figures["codes used"]} of {figures["of"]} | {worst:.0%} | {frechet(features, real):.2f} |')
        print(lines[-1], flush=True)
        (given.out / ('seeds.md' if given.seeds else 'choices.md')).write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
