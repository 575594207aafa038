"""Times this code at the official sizes: training images/s, and a 256 px picture from noise to pixels.

    python experiments/bench.py                    # d6 training, d16 sampling, on the best device

No weights are needed: speed does not depend on them. Medians; matrix products are timed first, so
that a figure can be read against what the machine does at that minute.
"""
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import pick_device, precision, ready                           # noqa: E402
from tokenizer import VQVAE                                                # noqa: E402
from var import VAR                                                        # noqa: E402


def median_seconds(work, device, runs):
    times = []
    for _ in range(runs + 1):                                              # the first one warms up
        start = time.perf_counter()
        work()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main():
    torch.manual_seed(0)
    device = pick_device(sys.argv[1] if len(sys.argv) > 1 else None)
    print(f'{device}, torch {torch.__version__}, {torch.get_num_threads()} threads')
    a, b = (torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, device, 5)
    print(f'bfloat16 matrix product: {2 * 4096 ** 3 / seconds / 1e9:.0f} GFLOP/s')

    vae, batch = VQVAE().to(device).eval().requires_grad_(False), 4
    var = VAR(depth=6).to(device).train()
    tokens = [torch.randint(4096, (batch, p * p), device=device) for p in var.patch_nums]
    labels, x = torch.randint(1000, (batch,), device=device), vae.var_input(tokens)

    def train():
        with precision(device):
            logits = var(labels, x)
        F.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, dim=1).flatten()).backward()
        var.zero_grad()

    seconds = median_seconds(train, device, 3)
    print(f'training d6, 256 px, batch {batch}: {seconds / batch:.3f} s an image, forward and backward')

    var = ready(VAR(depth=16).eval(), device)

    def sample():
        with precision(device):
            var.generate(vae, [284], cfg=1.5, top_k=900, top_p=0.96, seed=0)

    print(f'sampling d16, 256 px, batch 1: {median_seconds(sample, device, 3):.2f} s, decoder included')


if __name__ == '__main__':
    main()
