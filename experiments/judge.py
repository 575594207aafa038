"""A small classifier of 32 px pictures, by which samples are graded: who tells them, how far they are.

    python train.py && python experiments/judge.py                          # the built-in shapes
    python experiments/judge.py --ckpt ckpt.pt --data cifar10

It learns from the training pictures in minutes, is tried on the validation pictures, and then looks at
50 samples a class from ckpt.pt (seed 0, the checkpoint's own guidance and top-k): how many it tells as the
class asked for, and the Frechet distance of its features from those of the validation pictures. That
distance is comparable with others of the same number of samples by the same judge, and with no others.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import Problem, load_models, parse, pick_device, precision, run, to_tensor  # noqa: E402
from train import Options as Settings, read_data                                # noqa: E402


def everything(pictures, n):
    """n of a set, spread evenly: images (n, 3, H, W) in [-1, 1] and labels (n,)."""
    batches = list(pictures.load(pictures.middles(n)))
    images, indices = (torch.cat(parts) for parts in zip(*batches))
    return to_tensor(images), torch.from_numpy(pictures.labels)[indices]


class Judge(nn.Module):
    """images (B, 3, 32, 32) in [-1, 1] -> logits (B, classes); on the way, features (B, 128)."""
    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)                                    # the same judge in every process
        layers, c = [], 3
        for width in 32, 64, 128:
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            c = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * c, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def learn(self, x, y, steps=400, batch=128):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        for _ in range(steps):
            i = torch.randint(len(x), (batch,))
            # Blur and noise, so that a sample is not refused for being a little soft.
            images = x[i]
            soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode='bilinear')
            images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, soft, images)
            features = self.features(images + 0.1 * torch.randn_like(images))
            loss = F.cross_entropy(self.head(features), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def look(self, x):
        """Features (n, 128) and logits (n, classes)."""
        features = torch.cat([self.features(part) for part in x.split(500)])
        return features, self.head(features)

    def grade(self, drawn, real):
        """Of pictures drawn (classes, n, 3, H, W): the share of each class that it tells as this class,
        (classes,), and the Frechet distance of all to the features of real ones."""
        features, logits = self.look(drawn.flatten(0, 1))
        right = logits.argmax(1).view(drawn.shape[:2]) == torch.arange(len(drawn))[:, None]
        return right.float().mean(1), frechet(features, real)


def make_judge(train, val, classes, steps, n=5000):
    """A judge that has learned the training pictures, and its features of n validation pictures."""
    judge = Judge(len(classes)).learn(*everything(train, len(train.items)), steps)
    x, y = everything(val, n)
    features, logits = judge.look(x)
    print(f'judge: tells {(logits.argmax(1) == y).float().mean():.1%} of {len(y)} validation pictures', flush=True)
    return judge, features


def draw_each(vae, var, n, device, sampling):
    """n pictures of each class, whose number is the seed: (classes, n, 3, H, W) in [-1, 1]."""
    with precision(device):
        return torch.stack([var.generate(vae, [c] * n, seed=c, **sampling).cpu() * 2 - 1
                            for c in range(var.num_classes)])


def frechet(a, b):
    """The Frechet distance of two sets of features (n, c), as if they were Gaussian."""
    (m, S), (n, T) = ((x.double().mean(0), x.double().T.cov()) for x in (a, b))
    # The trace of (S T)^(1/2) is the sum of the roots of the eigenvalues of S T.
    roots = torch.linalg.eigvals(S @ T).real.clamp_min(0).sqrt().sum()
    return ((m - n).square().sum() + S.trace() + T.trace() - 2 * roots).item()


@dataclass
class Options:
    """The options of the command line, as --name value."""
    ckpt: Path = Path('ckpt.pt')        # the models to grade
    data: str = 'shapes'                # as for train.py: what the judge learns
    n: int = 50                         # samples a class
    steps: int = 400                    # of the judge's training
    device: str = None                  # cuda, mps or cpu; the best there is if not given


def main():
    given = Options(**parse(Options, __doc__))
    device = pick_device(given.device)
    vae, var, ckpt = load_models(given.ckpt)
    if var is None:
        raise Problem(f'{given.ckpt} has a tokenizer only')
    train, val, classes = read_data(Settings(data=given.data, size=vae.image_size))
    judge, real = make_judge(train, val, classes, given.steps)
    right, distance = judge.grade(draw_each(vae.to(device), var.to(device), given.n, device, ckpt['sampling']), real)
    for name, share in zip(classes, right.tolist()):
        print(f'{name:>10}: {share:.0%} of {given.n} samples')
    print(f'all: {right.mean():.1%} of {len(classes) * given.n} samples are told as the class asked for; '
          f'Frechet distance {distance:.1f}')


if __name__ == '__main__':
    run(main)
