"""Speed of this code on this machine: training, sampling, and VAR against raster-scan AR.

    python experiments/bench.py                             # under ten minutes on two cores
    python experiments/bench.py --depths 16 20 24 --baseline-depth 16 --batch 32 --draw 1 16 64

Paper: Table 1 (time of sampling), and the appendix on time complexity: O(n^4) for VAR, and O(n^6)
for raster-scan AR without cached keys and values. The sizes are the official ones, at 256 px. No
weights are needed, because speed does not depend on them. All times are medians. The peak matmul
throughput is measured first and last, so that figures can be read against what the machine gave in
between. The second command suits a large GPU.
Writes bench.csv and bench.png, the comparison of VAR and raster-scan AR.

Letters: B images per batch, n side of the last token map, d depth, V codes, L tokens of all scales.
"""
import csv
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from raster import Raster                                                   # noqa: E402
from tokenizer import VQVAE                                                 # noqa: E402
from var import (VAR, Parser, cast_linear_weights, compile_forward, number,  # noqa: E402
                 pick_device, precision, record_generate, run)

# The scales of the comparison, by n. The sides grow geometrically, as the appendix assumes.
GRIDS = {8: (1, 2, 3, 4, 6, 8),
         16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         24: (1, 2, 3, 4, 6, 8, 10, 13, 18, 24),
         32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
SAMPLING = dict(cfg=1.5, top_k=900, top_p=0.96)                 # as the release samples


def seconds_of(work, device, repetitions=3):
    """The median time of work(). One call before, which allocates memory, does not count."""
    work()
    synchronize(device)
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device):
    """Waits until the device has done all that was asked of it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def matmul_throughput(device, dtype):
    """FLOP/s of the product of two 4096 x 4096 matrices."""
    a = torch.randn(4096, 4096, device=device).to(dtype)
    b = torch.randn(4096, 4096, device=device).to(dtype)
    return 2 * 4096 ** 3 / seconds_of(lambda: a @ b, device, 5)


def peak_memory(device):
    """Peak memory in GiB so far: of all tensors on a GPU, else of the process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource                                         # not on Windows
    except ImportError:
        return float('nan')
    units_per_gib = 2 ** 20 if sys.platform == 'linux' else 2 ** 30         # KiB, or bytes on a Mac
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gib


# ---- What is measured ----


def tokenizer_training(ch, device, as_released):
    """Seconds per image of a forward and a backward pass of the tokenizer.

    as_released: in float32 and in the memory format NCHW, as the released network is written;
    otherwise as train.py does it.
    """
    vae = VQVAE(ch=ch).to(device).train()
    image = torch.rand(1, 3, 256, 256, device=device) * 2 - 1

    def to_latent_nchw(images):
        return vae.quant_conv(vae.encoder(images))

    if as_released:
        vae.to(memory_format=torch.contiguous_format)
        vae.to_latent = to_latent_nchw

    def step():
        with precision(device, 'float32' if as_released else None):
            rebuilt, quantizer_loss, _, _ = vae(image)
            loss = F.mse_loss(rebuilt, image) + quantizer_loss
        loss.backward()
        vae.zero_grad()

    return seconds_of(step, device, 3 if device.type == 'cuda' else 2)


def transformer_training(vae, d, B, device, peak, compiled):
    """A forward and a backward pass on given tokens: seconds per image, and FLOP/s as a share of
    `peak`."""
    var = VAR(depth=d).to(device).train()
    tokens = [torch.randint(var.vocab_size, (B, p * p), device=device) for p in var.patch_nums]
    labels = torch.randint(var.num_classes, (B,), device=device)
    x = vae.var_input(tokens)                                               # (B, L - 1, z)
    targets = torch.cat(tokens, dim=1)                                      # (B, L)

    def step():
        with precision(device):
            _, loss = var(labels, x, targets)
        loss.backward()
        var.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    if compiled:
        compile_forward(var.blocks, device)                     # as train.py --compile does
    seconds = seconds_of(step, device)
    return seconds / B, counter.get_total_flops() / seconds / peak


def sampling(vae, d, B, device, compiled):
    """Seconds for B images of 256 px: in total, and for the decoder alone. compiled: with the
    transformer as sample.py --compile makes it."""
    var = cast_linear_weights(VAR(depth=d).eval(), device)
    labels = torch.arange(B) % var.num_classes
    f_hat = torch.randn(B, 32, 16, 16, device=device)
    generate_images = partial(var.generate, vae, **SAMPLING)
    if compiled:
        compile_forward(var.blocks, device)
        if device.type == 'cuda':
            with precision(device):
                generate_images = record_generate(var, vae, B, **SAMPLING)

    def generate():
        with precision(device):
            generate_images(labels, seed=0)

    def decode():
        with precision(device), torch.no_grad():
            vae.to_image(f_hat)

    return seconds_of(generate, device), seconds_of(decode, device)


def token_generation(kind, d, n, device):
    """Seconds for the tokens of one image with guidance, without the decoder: by 'VAR', or by
    'raster', raster-scan AR with cached keys and values."""
    patch_nums = GRIDS[n] if kind == 'VAR' else (n,)
    vae = VQVAE(patch_nums, ch=32, ch_mult=(1,)).to(device).eval()
    vae.to_image = lambda f_hat: f_hat                          # no decoder
    source = Raster(vae) if kind == 'raster' else vae
    var = cast_linear_weights(VAR(source.patch_nums, depth=d).eval(), device)

    def generate():
        with precision(device):
            var.generate(source, [0], seed=0, **SAMPLING)

    repetitions = 1 if kind == 'raster' and n > 16 else 3       # it takes a pass per token
    return seconds_of(generate, device, repetitions)


def draw(sides, times, growth, d, path):
    """The comparison in log-log: times {kind: seconds of each side}, growth {kind: exponent}."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    labels = {'VAR': ('VAR', 4), 'raster': ('raster-scan AR, cached keys and values', 6)}
    for kind, (label, exponent) in labels.items():
        if kind in growth:
            label += f': n^{growth[kind]:.1f}\n(paper, without cache: n^{exponent})'
        axis.loglog(sides, times[kind], 'o-', label=label)
    axis.set(xlabel='side n of the last token map',
             ylabel=f'seconds per image, depth {d}, without decoder', xticks=sides)
    axis.set_xticklabels(sides)
    axis.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--depths', type=number(int, 1), nargs='+', default=[2, 4, 6, 16],
        help='that are trained and sampled, at 256 px (default: 2 4 6 16)')
    add('--batch', type=number(int, 1), default=4, help='images per training step (default: 4)')
    add('--draw', type=number(int, 1), nargs='+', default=[1, 8],
        help='images sampled at once (default: 1 8)')
    add('--baseline-depth', type=number(int, 1), default=6,
        help='depth of VAR and of raster-scan AR in their comparison (default: 6)')
    add('--grids', type=int, nargs='+', choices=GRIDS, default=[*GRIDS],
        help='sides of the last token map in that comparison (default: all of these)')
    add('--ch', type=number(int, 32), default=160, help='width of the tokenizer (default: 160)')
    add('--compile', action='store_true',
        help='training and sampling also with torch.compile, sampling on CUDA as one graph')
    add('--out', type=Path, default=Path('.'), help='folder of bench.csv and bench.png')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


def main():
    args = parse()
    torch.manual_seed(0)
    device, rows = pick_device(args.device), []
    hardware = f'{torch.get_num_threads()} threads'
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    print(f'{device} ({hardware}), torch {torch.__version__}', flush=True)

    def report(what, figures):
        """Prints figures {unit: value} of one measurement, and keeps them for bench.csv."""
        rows.extend((what, unit, value) for unit, value in figures.items())
        print(f'{what}:', ', '.join(f'{value:.4g} {unit}' for unit, value in figures.items()),
              flush=True)

    peak = matmul_throughput(device, torch.bfloat16)
    report('peak matmul throughput', {
        'GFLOP/s in bfloat16': peak / 1e9,
        'GFLOP/s in float32': matmul_throughput(device, torch.float32) / 1e9})

    vae = VQVAE(ch=args.ch).to(device).eval().requires_grad_(False)
    images = torch.rand(4, 3, 256, 256, device=device) * 2 - 1
    with precision(device), torch.no_grad():
        tokens = vae.encode(images)
        encoding = seconds_of(lambda: vae.encode(images), device)
        decoding = seconds_of(lambda: vae.decode(tokens), device)
    report('tokenizer, batch 4', {'s per image to encode': encoding / 4,
                                  's per image to decode': decoding / 4})

    variants = {'': False}                                      # in titles: whether it is compiled
    if args.compile:
        variants[', compiled'] = True
    for d in args.depths:
        for suffix, compiled in variants.items():
            seconds, share = transformer_training(vae, d, args.batch, device, peak, compiled)
            report(f'training depth {d}, batch {args.batch}{suffix}', {
                's per image': seconds, 'images/s': 1 / seconds,
                'of peak matmul throughput': share,
                'GiB of memory at most so far': peak_memory(device)})
    for d in args.depths:
        for B in args.draw:
            for suffix, compiled in variants.items():
                seconds, decoder = sampling(vae, d, B, device, compiled)
                report(f'sampling depth {d}, batch {B}{suffix}', {
                    's': seconds, 's of it in the decoder': decoder, 'images/s': B / seconds})

    ours = tokenizer_training(args.ch, device, as_released=False)
    released = tokenizer_training(args.ch, device, as_released=True)
    report('training the tokenizer', {'s per image': ours, 's per image in float32, NCHW': released,
                                      'times as fast': released / ours})

    times = {'VAR': [], 'raster': []}
    for n in args.grids:
        for kind in times:
            times[kind].append(token_generation(kind, args.baseline_depth, n, device))
        ours, baseline = times['VAR'][-1], times['raster'][-1]
        report(f'{n}x{n} tokens, depth {args.baseline_depth}', {
            's by VAR': ours, 's by raster-scan AR': baseline, 'times as fast': baseline / ours})
    growth = {}
    if len(args.grids) > 1:
        for kind in times:
            growth[kind] = np.polyfit(np.log(args.grids), np.log(times[kind]), 1)[0]
        report('growth with n', {'as exponent of VAR': growth['VAR'],
                                 'as exponent of raster-scan AR': growth['raster']})
    report('peak matmul throughput, at the end', {
        'GFLOP/s in bfloat16': matmul_throughput(device, torch.bfloat16) / 1e9})

    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / 'bench.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'unit', 'value'), *rows])
    draw(args.grids, times, growth, args.baseline_depth, args.out / 'bench.png')


if __name__ == '__main__':
    run(main)
