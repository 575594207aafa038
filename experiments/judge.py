"""Grades the samples of a checkpoint by a small classifier.

    python train.py && python experiments/judge.py                  # the built-in shapes
    python experiments/judge.py --ckpt ckpt.pt --steps 1200         # on the data of its training

Paper: the metrics of Section 5.1 and Table 1, at a size where FID and IS say little. The classifier
is trained on the training images and tested on the validation images. Then 50 samples per class are
drawn with the checkpoint's own guidance and top-k. Prints the share of the samples that is
classified correctly, as the class that was asked for, and the Frechet distance of their features
from those of the validation images, which should have all classes alike, as the samples have. Such
a distance is comparable only with others of the same classifier and of the same number of samples.
It takes images of 32 or 64 px. Writes no files.

The share is too high: a classifier of a few classes learns the colours and textures that tell them
apart, and does not ask for the thing itself.

Letters: N images of a set, B of a batch, H their side, n samples per class, C classes.
"""
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import data_config, match_classes
from sample import draw_all, load_both
from support.data import read_data
from support.images import to_tensor
from support.options import add_shared, at_least_1, make_parser
from support.run import UserError, pick_device, rank_and_world, run

WIDTHS = {32: (32, 64, 128), 64: (32, 64, 128, 128)}        # of the layers, by side of the images


class Judge(nn.Module):
    """Images (B, 3, H, H) in [-1, 1] -> features (B, 128) and logits (B, C). size: H, 32 or 64."""

    def __init__(self, num_classes, size=32):
        super().__init__()
        layers, c = [], 3
        for width in WIDTHS[size]:                              # down to 4 x 4
            layers.append(nn.Conv2d(c, width, 3, padding=1))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2))
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
        features, logits = [], []
        for part in torch.as_tensor(images).split(500):
            f, s = self(to_tensor(part.to(device)))
            features.append(f.cpu())
            logits.append(s.cpu())
        return torch.cat(features), torch.cat(logits)

    def grade(self, samples, real):
        """Grades samples, uint8 (C, n, H, H, 3). real: features of validation images (N, 128).

        Returns the share of each class that is classified correctly, (C,), and the Frechet distance
        of all samples.
        """
        C, n = samples.shape[:2]
        features, logits = self.classify(samples.reshape(C * n, *samples.shape[2:]))
        found = logits.argmax(1).view(C, n)
        correct = found == torch.arange(C)[:, None]                         # (C, n)
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


def train_classifier(train, val, classes, steps, device, n=5000, mirror=False):
    """A classifier trained on one ImageSet, and its features (n, 128) of n images of another.
    UserError for images of another size than 32 or 64 px."""
    if train.size not in WIDTHS:
        raise UserError(f'the classifier takes images of 32 or 64 px, not of {train.size} px')
    torch.manual_seed(0)                                # on a CPU the same classifier in every run
    classifier = Judge(len(classes), train.size).to(device)
    images, labels = train.some(len(train))
    classifier.fit(images.to(device), labels.to(device), steps, mirror)
    images, labels = val.some(n)
    features, logits = classifier.classify(images)
    correct = (logits.argmax(1) == labels).float().mean()
    print(f'classifier: {correct:.1%} of {len(labels)} validation images are classified correctly',
          flush=True)
    return classifier, features


def draw_classes(vae, var, n, indices, sampling):
    """n samples of each class of `indices` (C,), a tensor: uint8 (C, n, H, W, 3). None in all
    processes but the first."""
    labels = indices.repeat_interleave(n)
    frames = draw_all(vae, partial(var.generate, vae, **sampling), labels)
    if frames is None:
        return None
    return frames[:, -1].reshape(len(indices), n, *frames.shape[2:])


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_shared(parser, '--ckpt', '--data', '--device')
    add('--n', type=at_least_1, default=50, help='samples per class [50]')
    add('--steps', type=at_least_1, default=400, help='steps of the classifier [400]')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load_both(device, args.ckpt)
    config = data_config(ckpt, vae.image_size, args.data)
    train, val, classes, _ = read_data(config)
    indices = match_classes(classes, ckpt, var)
    classifier, real = train_classifier(train, val, classes, args.steps, device,
                                        mirror=config.flip)
    samples = draw_classes(vae, var, args.n, indices, ckpt['sampling'])
    if rank_and_world()[0] > 0:
        return
    shares, distance = classifier.grade(samples, real)
    for name, share in zip(classes, shares.tolist()):
        print(f'{name:>10}: {share:.0%} of {args.n} samples')
    print(f'all: {shares.mean():.1%} of {len(classes) * args.n} samples are classified correctly; '
          f'Frechet distance {distance:.1f}')
    print(f'This is too kind: the classifier knows these {len(classes)} classes alone.')


if __name__ == '__main__':
    run(main)
