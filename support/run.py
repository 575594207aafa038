"""What the commands share: errors, devices, precision, processes, the log, files and folders."""
import csv
import os
import sqlite3
import sys
import time
from contextlib import closing, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ---- Errors ----


class UserError(Exception):
    """One line that says what is wrong and what to do. The commands print it and exit with 2."""


def reason(e):
    """The words of an exception, in one line."""
    lines = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).split('\n')
    return ' '.join(line.strip() for line in lines[:2]).strip(' .:')


def is_out_of_memory(e):
    """Whether an exception of CUDA or its libraries, of torch on the CPU or of numpy says so."""
    signs = ('out of memory', 'alloc_failed', 'allocate memory', 'enough memory', 'memoryerror')
    text = f'{type(e).__name__} {e}'.lower()
    return any(sign in text for sign in signs)


def run(main):
    """Runs a command. A UserError or an OSError ends in one line and status 2, Ctrl-C in one line
    and 130. Any other exception is a fault of the program, and keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):                      # a notebook's has no encoding
            stream.reconfigure(errors='backslashreplace')       # names that a terminal cannot show
    status, message = 0, ''
    try:
        main()
        wait_for_all()                          # until the first process has written its files
    except KeyboardInterrupt:
        status, message = 130, 'stopped'                        # as shells have it: 128 + SIGINT
    except (UserError, OSError) as e:
        status, message = 2, f'error: {e}'
    except (RuntimeError, MemoryError) as e:
        status = 2
        if is_out_of_memory(e):
            message = ('error: out of memory: try a smaller --tokenizer-batch in stage 1, a '
                       'smaller --micro-batch or --depth in stage 2, a smaller --batch in sample.py'
                       )
        elif 'exited unexpectedly' in str(e) or 'killed by signal' in str(e):
            message = ('error: a process that reads images was killed, as happens when memory '
                       'ends: try a smaller --workers')
        else:
            raise
    if message:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        # While Python shuts down, a thread of gloo can abort the process: os._exit skips that.
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# ---- Devices and precision ----


def pick_device(name=None):
    """The named device, or cuda where there is one, else cpu. UserError if it cannot be used.

    Under torchrun it also joins the process group; each process takes the GPU of its local rank.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        if name == 'cuda':
            name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
        device = torch.device(name)
        torch.zeros(1, device=device)                           # only use shows whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f'--device {name}: {reason(e)}') from e
    if device.type == 'cuda':
        torch.cuda.set_device(device)                           # for the collectives
    if world > 1 and not dist.is_initialized():
        # The others wait while one downloads or evaluates: longer than the default of ten minutes.
        on_gpu = device.type == 'cuda'
        try:
            dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=timedelta(hours=2),
                                    device_id=device if on_gpu else None)
        except (ValueError, RuntimeError) as e:
            raise UserError(f'WORLD_SIZE={world} in the environment asks for several processes: '
                            f'start by torchrun, or unset it ({reason(e)})') from e
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


def try_compiler(device):
    """UserError where torch.compile does not work: it needs a C++ compiler, or Triton."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as e:                      # the compiler can raise anything
        raise UserError(f'--compile does not work here: {reason(e)}') from e


# ---- Processes ----


def rank_and_world():
    """The rank of this process and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def add_up(tensors):
    """Replaces tensors of the same shapes in all processes by their sums, in one transfer."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def gather(x):
    """In the first process a list of every process's x, a picklable object; None in the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [x]
    parts = [None] * world if rank == 0 else None
    dist.gather_object(x, parts)
    return parts


# ---- Random numbers ----


def seed_of(*numbers):
    """One seed, from 0 to 2^63 - 1, that depends on all the numbers."""
    first, *others = numbers
    sequence = np.random.SeedSequence(first, spawn_key=others)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


# ---- The log, files and folders ----


def tell(text, end='\n'):
    """Prints a text, in the first process alone."""
    if rank_and_world()[0] == 0:
        print(text, end=end, flush=True)


SHOWN = ('loss', 'PSNR', 'codebook usage', 'error', 'images/s')     # log.csv has all figures


def show(title, figures, more=''):
    """Prints the most important figures, in the first process alone."""
    parts = [f'{name} {figures[name]:.4g}' for name in SHOWN if name in figures]
    tell('  '.join([title, *parts, more]))


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


@contextmanager
def alone_in(folder):
    """Makes a folder, and keeps other runs out of it while the block lasts. UserError if one is at
    work there. The system releases the lock when a process ends, however it ends.

    SQLite is here for its lock of a file, which it has on every system.
    """
    if rank_and_world()[0] > 0:                             # the first process locks for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '.lock').touch()                              # OSError where nothing can be written
    lock = sqlite3.connect(folder / '.lock', timeout=0)
    try:
        lock.execute('BEGIN EXCLUSIVE')
    except sqlite3.OperationalError as e:
        if 'locked' in str(e):
            raise UserError(f'--out {folder}: another run is at work there, or its disk has no '
                            'locks: choose another') from e
        print(f'--out {folder}: no file can be locked there ({e}): start no second run in it')
    with closing(lock):
        yield


def move_aside(folder, names):
    """Moves those names that a folder has to previous-1 in it, or the next free number."""
    names = [name for name in names if (folder / name).exists()]
    number = 1
    while (folder / f'previous-{number}').exists():
        number += 1
    if names:
        (folder / f'previous-{number}').mkdir()
        for name in names:
            os.replace(folder / name, folder / f'previous-{number}' / name)
        print(f'moved {", ".join(names)} of an earlier run to {folder / f"previous-{number}"}')
