"""Grades a checkpoint: its tokenizer, its transformer and its samples.

    python experiments/evaluate.py                      # ckpt.pt, on the data of its training
    python experiments/evaluate.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth \
        --data ./imagenet

Tokenizer, on validation images (from 64 px on the middle 8/9 of the centre square): PSNR, codebook
usage of all scales and of each. Transformer, on the same images (Section 5.2): loss in nats per
token and token error, over all scales, of the last one, and of each.
Samples, of 32 and 64 px, where FID and IS (Section 5.1) say little: a small classifier of the
training images gives the share that it takes for the right class, and the Frechet distance of their
features from those of validation images, which should have all classes alike. Distances are
comparable only by the same classifier and for as many samples. The share is too high: a classifier
of a few classes learns the colours and textures that tell them apart.

Letters: N images of a set, B of a batch, H their side, n samples per class, C classes.
"""
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from sample import draw_all
from support.checkpoints import load
from support.data import read_data, spread
from support.grade import grade_tokenizer, grade_transformer
from support.images import crop, read_all, read_images, to_tensor
from support.options import a_count, at_least_1, make_parser, number
from support.run import UserError, autocast, pick_device, rank_and_world, run, show, tell

WIDTHS = {32: (32, 64, 128), 64: (32, 64, 128, 128)}        # of the layers, by side of the images


class Judge(nn.Module):
    """Images (B, 3, H, H) in [-1, 1] -> features (B, 128) and logits (B, C). size: H, 32 or 64."""

    def __init__(self, num_classes, size=32):
        super().__init__()
        layers, c = [], 3
        for width in WIDTHS[size]:                              # down to 4 x 4
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            c = width
        layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(c * 4 * 4, 128), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(128, num_classes)

    def forward(self, x):
        features = self.features(x)                                         # (B, 128)
        return features, self.head(features)                                # (B, C)

    def fit(self, images, labels, steps, mirror=False, batch=128):
        """Trains on uint8 images (N, H, H, 3) and labels (N,), both on the model's device. mirror:
        every second batch is mirrored, for samples of a model that was trained with --flip."""
        device = images.device
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        self.train()
        for step in range(steps):
            i = torch.randint(len(images), (batch,), device=device)
            x = to_tensor(images[i])                                        # (B, 3, H, H)
            if mirror and step % 2:
                x = x.flip(3)
            # Half of the images are blurred, and all get noise, so that a sample is not rejected
            # for being slightly soft.
            small = F.avg_pool2d(x, 2)                                      # (B, 3, H/2, H/2)
            blurred = F.interpolate(small, scale_factor=2, mode='bilinear')  # (B, 3, H, H)
            is_blurred = torch.rand(batch, 1, 1, 1, device=device) < 0.5
            x = torch.where(is_blurred, blurred, x)
            _, logits = self(x + 0.1 * torch.randn_like(x))                 # (B, C)
            loss = F.cross_entropy(logits, labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def classify(self, images):
        """uint8 images (N, H, H, 3), an array or a tensor -> features (N, 128), logits (N, C),
        both on the CPU."""
        device = self.head.weight.device
        parts = [self(to_tensor(part.to(device))) for part in torch.as_tensor(images).split(500)]
        features, logits = zip(*parts)
        return torch.cat(features).cpu(), torch.cat(logits).cpu()

    def grade(self, samples, real):
        """Of samples, uint8 (C, n, H, H, 3): the share of each class that is classified correctly,
        (C,), and the Frechet distance of all from `real`, features (N, 128)."""
        C, n = samples.shape[:2]
        features, logits = self.classify(samples.reshape(C * n, *samples.shape[2:]))
        correct = logits.argmax(1).view(C, n) == torch.arange(C)[:, None]   # (C, n)
        return correct.float().mean(1), frechet_distance(features, real)


def frechet_distance(a, b):
    """The Frechet distance of two sets of features (N, c), taken as Gaussian:
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) for their means m and covariances S."""
    a, b = a.double(), b.double()
    mean_a, mean_b = a.mean(0), b.mean(0)                                   # (c,)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                     # (c, c)
    # The trace of a root of a matrix is the sum of the roots of its eigenvalues.
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp_min(0)
    between_means = (mean_a - mean_b).square().sum()
    distance = between_means + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    return distance.item()


def read_squares(items, labels, n, config):
    """At most n of a set, evenly spread: images uint8 (N, H, H, 3) and labels (N,), tensors."""
    rows = spread(len(items), n)
    images, labels = read_all([items[row] for row in rows], labels[rows],
                              round(config.zoom * config.size))
    squares = np.stack([crop(image, config.size) for image in images])
    return torch.from_numpy(squares), torch.from_numpy(labels)


def train_judge(data, config, steps):
    """A Judge, trained on at most 50,000 training images, and its features (N, 128) of at most
    5,000 validation images."""
    torch.manual_seed(0)                                # on a CPU the same classifier in every run
    judge = Judge(len(data.classes), config.size).to(config.device)
    images, labels = read_squares(*data.train, 50000, config)
    judge.fit(images.to(config.device), labels.to(config.device), steps, config.flip)
    images, labels = read_squares(*data.val, 5000, config)
    features, logits = judge.classify(images)
    correct = (logits.argmax(1) == labels).float().mean()
    tell(f'classifier: {correct:.1%} of {len(labels)} validation images ({data.source}) are '
         'classified correctly')
    return judge, features


def draw_classes(vae, generate, n, C, precision_name=None):
    """n samples of each of C classes: uint8 (C, n, H, H, 3). None in all processes but the first.
    generate: as in draw_all()."""
    labels = torch.arange(C).repeat_interleave(n)                           # (C n,)
    frames = draw_all(vae, generate, labels, 0, precision_name)             # (C n, 1, H, H, 3)
    return None if frames is None else frames.reshape(C, n, *frames.shape[2:])


def main():
    parser = make_parser(__doc__, '--ckpt', '--tokenizer', '--data', '--precision', '--device')
    add = parser.add_argument
    add('--n', type=at_least_1, default=sys.maxsize,
        help='validation images for tokenizer and transformer, evenly spread [all]')
    add('--samples', type=number(int, 2), default=50, help='samples per class [50]')
    add('--judge-steps', type=a_count, default=400,
        help='of the classifier; 0: samples are not graded [400]')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load(args.ckpt, args.tokenizer, device)
    config = Namespace(**{**ckpt['config'], 'size': vae.image_size, 'device': device})
    config.precision = args.precision or config.precision
    if args.data:
        vars(config).update(data=args.data, classes=len(ckpt['classes']), limit=0)
    if 'data' not in config:
        raise UserError(f'{args.ckpt} does not tell its data: add --data')
    data = read_data(config)
    items, labels = data.val
    # Released files know their classes by number.
    if ckpt['classes'] not in (data.classes, [str(i) for i in range(len(data.classes))]):
        raise UserError(f'{args.ckpt} was not trained for the classes of {config.data}')
    samples = None                              # the Frechet distance needs two images
    if args.judge_steps and config.size in WIDTHS and len(items) > 1:
        generate = partial(var.generate, vae, **config.sampling)
        samples = draw_classes(vae, generate, args.samples, var.num_classes, config.precision)
    if rank_and_world()[0] > 0:                 # all processes draw, and the first one grades
        return

    chunks = read_images(items, spread(len(items), args.n), round(config.zoom * config.size))
    with autocast(device, config.precision):
        figures, tokens, rows = grade_tokenizer(vae, chunks, device)
        of = f'{len(rows)} validation images ({data.source})'
        show(f'tokenizer, {of}:', figures)
        figures = grade_transformer(vae, var, tokens, torch.from_numpy(labels[rows]), device)
        show(f'transformer, {of}:', figures)
    if samples is not None:
        judge, real = train_judge(data, config, args.judge_steps)
        shares, distance = judge.grade(samples, real)
        for name, share in zip(data.classes, shares.tolist()):
            tell(f'{name:>10}: {share:.0%} of {args.samples} samples')
        tell(f'all: {shares.mean():.1%} of {len(shares) * args.samples} samples are classified '
             f'correctly; Frechet distance {distance:.1f}, from {len(real)} validation images '
             f'({data.source})')


if __name__ == '__main__':
    run(main)
