"""How fast this code is, on the machine that runs it: training, sampling, and VAR against raster-scan AR.

    python experiments/bench.py                             # under ten minutes on two cores
    python experiments/bench.py --depths 16 20 24 --rival 16 --batch 32 --draw 1 16 64     # one large GPU

No weights are needed: speed does not depend on them. Medians; matrix products are timed first and last, so
that figures can be read against what the machine does in these minutes. Writes bench.csv and bench.png.
"""
import csv
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
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
from sample import parse, pick_device, precision, ready, run                # noqa: E402
from tokenizer import VQVAE                                                 # noqa: E402
from var import VAR                                                         # noqa: E402

# n_k of about a^(k-1), as the paper's appendix has it, for the grids of 8, 16, 24 and 32 tokens a side.
GRIDS = {8: (1, 2, 3, 4, 6, 8), 16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         24: (1, 2, 3, 4, 6, 8, 10, 13, 18, 24), 32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


@dataclass
class Options:
    """The options of the command line, as --name value."""
    depths: list = ('2', '4', '6', '16')    # that are trained and sampled, at 256 px
    batch: int = 4                      # pictures a step in training
    draw: list = ('1', '8')             # pictures drawn at once
    rival: int = 6                      # depth of VAR and of the raster-scan AR
    grids: list = ('8', '16', '24', '32')   # tokens a side in that comparison
    compile: bool = False               # training also with torch.compile, as by train.py --compile
    out: Path = Path('.')               # folder of bench.csv and bench.png
    device: str = None                  # cuda, mps or cpu; the best there is if not given


def seconds(work, device, runs=3, warm=1):
    """The median time of a call; the first ones, which allocate, do not count."""
    times = []
    for _ in range(warm + runs):
        start = time.perf_counter()
        work()
        getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def product_rate(device, dtype):
    """FLOP a second of a matrix product of 4096."""
    a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
    return 2 * 4096 ** 3 / seconds(lambda: a @ b, device, 5)


def memory(device):
    """The most memory that the process, or on a GPU its tensors, ever had: GiB."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:                                         # on Windows
        return float('nan')
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'linux' else 30)


def tokenizer_training(device, plain):
    """Seconds of forward and backward for one picture. plain: as the released network is written, float32 with
    the channels first; otherwise as train.py does it."""
    vae, image = VQVAE().to(device).train(), torch.rand(1, 3, 256, 256, device=device) * 2 - 1
    if plain:
        vae.to(memory_format=torch.contiguous_format).latent = lambda images: vae.quant_conv(vae.encoder(images))

    def step():
        with precision(device) if not plain else nullcontext():
            rebuilt, quantizer, _ = vae(image)
        (F.mse_loss(rebuilt, image) + quantizer).backward()
        vae.zero_grad()

    return seconds(step, device, 3 if device.type == 'cuda' else 2)


def training(vae, d, given, device, rate, compiled):
    """One step's forward and backward, tokens given: seconds an image, share of the matrix rate."""
    var = VAR(depth=d).to(device).train()
    maps = [torch.randint(4096, (given.batch, p * p), device=device) for p in var.patch_nums]
    labels, x, tokens = torch.randint(1000, (given.batch,), device=device), vae.var_input(maps), torch.cat(maps, dim=1)

    def step():
        with precision(device):
            loss, _ = var(labels, x, tokens=tokens)
        loss.mean().backward()
        var.zero_grad()

    with FlopCounterMode(display=False) as counter, precision(device):      # of one picture, nothing computed twice
        F.cross_entropy(var(labels[:1], x[:1]).transpose(1, 2), tokens[:1]).backward()
    if compiled:
        var.run_block = torch.compile(var.run_block)
    each = seconds(step, device) / given.batch
    return each, counter.get_total_flops() / each / rate


def drawing(vae, d, B, device):
    """Seconds for B pictures of 256 px as the release draws them: all of it, and its decoder alone."""
    var = ready(VAR(depth=d).eval(), device)
    f_hat = torch.randn(B, 32, 16, 16, device=device)

    def all_of_it():
        with precision(device):
            var.generate(vae, torch.arange(B), cfg=1.5, top_k=900, top_p=0.96, seed=0)

    def decoder():
        with precision(device), torch.no_grad():
            vae.picture(f_hat)

    return seconds(all_of_it, device), seconds(decoder, device)


def rivals(d, n, device):
    """Seconds for one grid of n x n tokens at depth d, guided: by VAR, and by cached raster-scan AR."""
    times = []
    for kind in 'VAR', 'raster':
        vae = VQVAE(GRIDS[n] if kind == 'VAR' else (n,), ch=32, ch_mult=(1,)).to(device).eval()
        vae.picture = lambda f_hat: f_hat                       # the decoder has no part in this
        source = vae if kind == 'VAR' else Raster(vae)
        var = ready(VAR(GRIDS[n] if kind == 'VAR' else source.sides, depth=d).eval(), device)

        def generate():
            with precision(device), torch.no_grad():
                var.generate(source, [0], cfg=1.5, top_k=900, top_p=0.96, seed=0)

        times.append(seconds(generate, device, 3 if kind == 'VAR' or n <= 16 else 1))
    return times


def main():
    given = Options(**parse(Options, __doc__))
    torch.manual_seed(0)
    device, rows = pick_device(given.device), []
    name = torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'{device} ({name}), torch {torch.__version__}')

    def tell(what, **figures):
        rows.extend((what, k, v) for k, v in figures.items())
        print(f'{what}:', ', '.join(f'{v:.4g} {k}' for k, v in figures.items()), flush=True)

    rate = product_rate(device, torch.bfloat16)
    tell('matrix product', **{'GFLOP/s in bfloat16': rate / 1e9,
                              'in float32': product_rate(device, torch.float32) / 1e9})
    vae = VQVAE().to(device).eval().requires_grad_(False)
    images = torch.rand(4, 3, 256, 256, device=device) * 2 - 1
    with precision(device), torch.no_grad():
        tokens = vae.encode(images)
        tell('tokenizer, batch 4', **{'s an image to encode': seconds(lambda: vae.encode(images), device) / 4,
                                      'to decode': seconds(lambda: vae.decode(tokens), device) / 4})
    for d in map(int, given.depths):
        for how in ('', ', compiled')[:1 + given.compile]:
            each, share = training(vae, d, given, device, rate, bool(how))
            tell(f'training d{d}, batch {given.batch}{how}', **{'s an image': each, 'images/s': 1 / each,
                 'of the matrix rate': share, 'GiB at most so far': memory(device)})
    for d in map(int, given.depths):
        for B in map(int, given.draw):
            whole, decoder = drawing(vae, d, B, device)
            tell(f'sampling d{d}, batch {B}', **{'s': whole, 's of it in the decoder': decoder, 'images/s': B / whole})
    ours, plain = (tokenizer_training(device, plain) for plain in (False, True))
    tell('training the tokenizer', **{'s an image': ours, 'in float32, channels first': plain, 'times as fast': plain / ours})
    grids = [int(n) for n in given.grids]
    times = np.array([rivals(given.rival, n, device) for n in grids])                   # (grids, 2)
    slopes = [np.polyfit(np.log(grids), np.log(column), 1)[0] for column in times.T]
    for n, (ours, theirs) in zip(grids, times):
        tell(f'{n}x{n} tokens, d{given.rival}', **{'s by VAR': ours, 's by raster-scan AR': theirs,
                                                   'times as fast': theirs / ours})
    tell('growth with the side n of the grid', **{'VAR: n to the': slopes[0], 'raster-scan AR: n to the': slopes[1]})
    tell('matrix product, at the end', **{'GFLOP/s in bfloat16': product_rate(device, torch.bfloat16) / 1e9})

    given.out.mkdir(parents=True, exist_ok=True)
    with open(given.out / 'bench.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('what', 'unit', 'value'), *rows])
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for column, slope, label, ideal in zip(times.T, slopes, ('VAR', 'raster-scan AR, cached'), (4, 6)):
        axis.loglog(grids, column, 'o-', label=f'{label}: n^{slope:.1f} (paper, without a cache: n^{ideal})')
    axis.set(xlabel='tokens a side, n', ylabel=f'seconds a picture, d{given.rival}, without decoder', xticks=grids)
    axis.set_xticklabels(grids)
    axis.minorticks_off()
    axis.legend()
    figure.savefig(given.out / 'bench.png', dpi=80)


if __name__ == '__main__':
    run(main)
