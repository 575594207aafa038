"""How many samples of the built-in shapes are told as the shape asked for, by a small classifier.

    python train.py && python experiments/judge_shapes.py           # trains the judge in a minute

The classifier learns from drawn shapes, is tried on drawn shapes that it has not seen, and then
looks at 50 samples a class from ckpt.pt (seed 0, the checkpoint's own guidance and top-k).
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import load_models, pick_device, precision, run, to_tensor      # noqa: E402
from train import SHAPES, shapes                                            # noqa: E402


def train_judge(steps=400, batch=128):
    torch.manual_seed(0)
    layers, c = [], 3
    for width in 32, 64, 128:
        layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        c = width
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(c * 16, 10))
    x, y = (torch.from_numpy(a) for a in shapes(8000, 32, seed=3))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3)
    for step in range(steps):
        i = torch.randint(len(x), (batch,))
        # Blur and noise, so that a sample is not refused for being a little soft.
        images = to_tensor(x[i])
        soft = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode='bilinear')
        images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, soft, images)
        loss = F.cross_entropy(judge(images + 0.1 * torch.randn_like(images)), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def main():
    with torch.enable_grad():
        judge = train_judge()
    x, y = shapes(2000, 32, seed=4)
    right = judge(to_tensor(x)).argmax(1) == torch.from_numpy(y)
    print(f'judge: {right.float().mean():.1%} of 2000 drawn shapes that it has not seen')
    device = pick_device()
    vae, var, ckpt = load_models(sys.argv[1] if len(sys.argv) > 1 else 'ckpt.pt')
    vae, var, shares = vae.to(device), var.to(device), []
    for c, name in enumerate(SHAPES):
        with precision(device):
            images = var.generate(vae, [c] * 50, seed=c, **ckpt['sampling'])
        shares.append((judge(images.cpu() * 2 - 1).argmax(1) == c).float().mean().item())
        print(f'{name:>9}: {shares[-1]:.0%} of 50 samples')
    print(f'all: {sum(shares) / 10:.1%} of 500 samples are told as the shape asked for')


if __name__ == '__main__':
    run(main)
