"""What the commands share: errors, options, devices, precision, processes, log, atomic files."""
import argparse
import atexit
import csv
import math
import os
import sys
import time
import unicodedata
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# ---- Errors and options ----


class UserError(Exception):
    """One line that says what is wrong and what to do. The commands print it and exit with 2."""


def reason(e):
    """The words of an exception, in one line."""
    lines = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).split('\n')
    return ' '.join(line.strip() for line in lines[:2]).strip(' .:')


def is_out_of_memory(e):
    """Whether an exception of CUDA or its libraries, of torch on the CPU or of numpy says so."""
    signs = ('out of memory', 'alloc_failed', 'allocate memory', 'memoryerror')
    text = f'{type(e).__name__} {e}'.lower()
    return any(sign in text for sign in signs)


def run(main):
    """Runs a command. A UserError or an OSError ends in one line and status 2, Ctrl-C in one line
    and 130. Any other exception is a fault of the program, and keeps its traceback."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors='backslashreplace')           # names that a terminal cannot show
    try:
        return main()
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        sys.exit(130)                                           # as shells have it: 128 + SIGINT
    except (UserError, OSError) as e:
        message = e
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        message = 'out of memory: try a smaller --batch, in stage 1 a smaller --tokenizer-batch'
    with suppress(OSError):                                     # where the terminal is closed
        print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def make_parser(description):
    """An argparse parser that shows the description as it is written, and a usage of one line."""
    return argparse.ArgumentParser(description=description, usage='%(prog)s [options], see --help',
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def a_path(text):
    """An argparse type: a Path. The shell leaves the ~ of --out=~/runs as it is."""
    return Path(text).expanduser()


def nfc(text):
    """Text with composed letters: a Mac writes the é of a folder's name as two characters."""
    return unicodedata.normalize('NFC', text)


A_SEED = (int, 0, 2 ** 63 - 1)              # what number() takes for a seed and for guidance
A_GUIDANCE = (float, 0, 100)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            limit = f'at least {low}' if high == math.inf else f'from {low} to {high}'
            raise argparse.ArgumentTypeError(f'{text} is out of range: {limit}')
        return value
    convert.__name__ = kind.__name__                            # argparse shows it in its messages
    return convert


# ---- Devices and precision ----


def pick_device(name=None):
    """The named device, or cuda where there is one, else cpu. UserError if it cannot be used.

    Under torchrun it also joins the process group; each process takes the GPU of its local rank.
    """
    local_rank, world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(f'cuda:{local_rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device)                           # only use shows whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f'--device {name}: {reason(e)}') from e
    if device.type == 'cuda':
        torch.cuda.set_device(device)                           # for the collectives
    if world > 1 and not dist.is_initialized():
        # The others wait while one downloads or evaluates: longer than the default of ten minutes.
        on_gpu = device.type == 'cuda'
        dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=timedelta(hours=2),
                                device_id=device if on_gpu else None)
        # Without this, a thread of the group sometimes aborts the process at its exit.
        atexit.register(dist.destroy_process_group)
    return device


PRECISIONS = ('bfloat16', 'float16', 'float32')


def choose_precision(device, name=None):
    """name, or without one the fastest of PRECISIONS that the device computes natively."""
    if name:
        return name
    if device.type == 'cuda':
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):                                # Ampere and later
            return 'bfloat16'
        if capability >= (7, 0):                                # V100, T4: matrix units for float16
            return 'float16'
    if device.type == 'cpu':
        native = getattr(torch.cpu, '_is_avx512_bf16_supported', None)
        if native is not None and native():
            return 'bfloat16'
    return 'float32'


def precision(device, name=None):
    """An autocast context in the named precision, by default in the device's best one."""
    name = choose_precision(device, name)
    if name == 'float32':
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, name))


def cast_linear_weights(var, device, name=None):
    """Casts the weights of linear maps once, where autocast would cast them anew for each batch.

    For sampling under precision() with the same arguments: the tokens stay the same, and the
    weights take half the memory. Returns the transformer, on the device.
    """
    dtype = getattr(torch, choose_precision(device, name))
    for module in var.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    return var.to(device)


# ---- Processes ----


def rank_and_world():
    """The rank of this process and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(x):
    """In the first process a list of every process's x, a picklable object; None in the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [x]
    parts = [None] * world if rank == 0 else None
    dist.gather_object(x, parts)
    return parts


# ---- The log and files ----


def say(text, end='\n'):
    """Prints a text. Where the terminal or the pipe is closed, the run goes on in silence."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, 'w')


def tell(text, end='\n'):
    """Prints a text, in the first process alone."""
    if rank_and_world()[0] == 0:
        say(text, end)


def write_log(path, stage, step, figures):
    """Appends to a csv file one row per figure: (stage, step, unix time, name, value). A resumed
    run repeats the steps since the checkpoint, and their rows."""
    with open(path, 'a', newline='') as f:
        rows, now = csv.writer(f), f'{time.time():.1f}'
        if f.tell() == 0:                                       # a new file
            rows.writerow(['stage', 'step', 'time', 'name', 'value'])
        for name, value in figures.items():
            rows.writerow([stage, step, now, name, value])


def read_log(path):
    """log.csv of train.py: {(stage, name): {step: value}}, in the order of the file. Of a figure
    that was written twice, because a run was interrupted, the last one counts."""
    log = {}
    with open(path, newline='') as f:
        for row in csv.DictReader(f):
            log.setdefault((row['stage'], row['name']), {})[int(row['step'])] = float(row['value'])
    return log


def write_file(path, write):
    """Calls write(file) on a temporary file and renames it to path, which therefore holds either
    its old or its new content, never a part. UserError where the disk refuses."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.part')             # in the same folder, or no rename works
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())                        # or a crash could leave an empty file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f'cannot write {path}: {reason(e)}') from e
    except (RuntimeError, ValueError) as e:                 # of torch.save and of Pillow
        raise UserError(f'cannot write {path}: the disk may be full ({reason(e)})') from e
