"""Folders of images: what becomes a class, what is for training, what for validation."""
import csv
import os
from collections import Counter

import numpy as np
from PIL import Image

from support.run import UserError, tell

LAYOUTS = ('expected are <class>/*, or train/<class>/* with or without val/<class>/*, or Tiny '
           'ImageNet or ImageNet as distributed, or images alone')
TRAIN_NAMES = ('train', 'training')
VAL_NAMES = ('val', 'valid', 'validation', 'test')              # the first one that is there
A_SINGLE_CLASS = 'images'       # a name that does not depend on where the folder lies
# Folders that systems make beside what people put there.
NO_CLASSES = ('@eaDir', '__MACOSX', '#recycle', '$RECYCLE.BIN', 'lost+found')


def subfolders(folder):
    """Names of the subfolders, sorted, without hidden ones and those of systems."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir()
                      and entry.name[0] != '.' and entry.name not in NO_CLASSES)


def is_image(name):
    """Whether a file's name is that of an image that Pillow reads, and not hidden."""
    ending = os.path.splitext(name)[1].lower()
    return name[0] != '.' and Image.registered_extensions().get(ending) in Image.OPEN


def images_in(root, folder, others):
    """Image files at folder/* and folder/images/*, sorted: names relative to root.

    As a numpy array of bytes, which takes a tenth of the memory of a list of Path objects. Other
    files are counted in `others`, {ending: number}.
    """
    names = []
    for place in (folder, os.path.join(folder, 'images')):
        if os.path.isdir(root / place):
            for entry in os.scandir(root / place):
                if is_image(entry.name):
                    names.append(os.fsencode(os.path.join(place, entry.name)))
                elif (entry.name[0] != '.' and os.path.isfile(entry.path)
                      and not entry.name.endswith('.txt')):     # words.txt and the like are read
                    others[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
    return np.array(sorted(names), dtype=np.bytes_)


def listed(others):
    """Files that are no images, {ending: number}, in words."""
    return ', '.join(f'{number} {ending}' for ending, number in others.most_common(5))


def by_class(root, folder, others):
    """{class: names of images} of the class folders of root / folder; where none has images, {'':
    the images that lie in it}; {} without images. Counts and names what is left out.

    UserError where images/ lies beside class folders: one of them could hold masks.
    """
    loose = images_in(root, folder, others)
    every = {name: images_in(root, os.path.join(folder, name), others)
             for name in subfolders(root / folder) if name != 'images'}
    found = {name: names for name, names in every.items() if len(names) > 0}
    if found and (root / folder / 'images').is_dir():
        raise UserError(f'{root / folder}: images/, and images in {min(found)}/ beside it: which '
                        'are the pictures? Give a folder that holds them alone')
    if found and len(loose) > 0:
        others['images beside the class folders'] += len(loose)
    if not found and len(loose) > 0:
        found = {'': loose}
    empty = [name for name in every if name not in found]
    if found and empty:
        tell(f'no images directly in {", ".join(empty)}: left out')
    deeper = [place for name in every for place in subfolders(root / folder / name)
              if place != 'images']
    if deeper:
        others['folders in class folders'] += len(deeper)
    if found and others:
        tell(f'left out of {root / folder}: {listed(others)}')
    return found


def find_splits(root):
    """The names of root's subfolders for training and for validation; '' where there is none.

    UserError where images lie in train/ itself and in other folders: is train a class, like bus and
    truck?
    """
    by_name = {name.lower(): name for name in subfolders(root)}
    train = [by_name[name] for name in TRAIN_NAMES if name in by_name]
    val = [by_name[name] for name in VAL_NAMES if name in by_name]
    if not train:
        return '', ''
    others = [name for low, name in by_name.items() if low not in TRAIN_NAMES + VAL_NAMES]
    if len(images_in(root, train[0], Counter())) > 0:
        for name in others:
            if len(images_in(root, name, Counter())) > 0:
                raise UserError(f'{root}: images in {train[0]}/ and in {name}/: if both are '
                                f'classes, rename {train[0]}/; else --data {root / train[0]}')
    return train[0], (val[0] if val else '')


def validation_images(root, folder, train):
    """{class: names of images} of a validation folder; {} without any, or without labels."""
    found = by_class(root, folder, Counter())
    annotations = root / folder / 'val_annotations.txt'
    if found and annotations.exists():                          # Tiny ImageNet: file, class, box
        with open(annotations, newline='', errors='replace') as f:
            class_of = {row[0]: row[1] for row in csv.reader(f, delimiter='\t') if row}
        groups = {}
        for name in np.concatenate(list(found.values())):
            label = class_of.get(os.path.basename(os.fsdecode(name)), 'unknown')
            groups.setdefault(label, []).append(name)
        return {label: np.array(names) for label, names in groups.items()}
    return {} if '' in found and '' not in train else found     # images without labels


def hold_out(groups):
    """Splits {class: names} for validation: every tenth image of a class, or the second one of a
    class with fewer than ten."""
    train, val = {}, {}
    for name, names in groups.items():
        held = np.arange(len(names)) % 10 == (9 if len(names) >= 10 else 1)
        train[name], val[name] = names[~held], names[held]
    return train, val


def labelled(groups, classes):
    """{class: names of images} -> all their names (N,), and labels (N,): indices of classes."""
    present = [name for name in classes if name in groups]
    labels = [np.full(len(groups[name]), classes.index(name), np.int64) for name in present]
    return np.concatenate([groups[name] for name in present]), np.concatenate(labels)


def read_folder(root):
    """Training set and validation set of a folder, each names of files (N,), relative to it, and
    labels (N,); and the classes. Prints what is used as what.

    See LAYOUTS for what is understood; raises UserError for anything else.
    """
    if not root.is_dir():
        what = 'a file; unpack it first' if root.is_file() else 'no such folder'
        raise UserError(f'--data {root}: {what}; {LAYOUTS}')
    train_folder, val_folder = find_splits(root)
    others = Counter()
    train = by_class(root, train_folder, others)
    if not train:
        but = f', but {listed(others)}' if others else ''
        raise UserError(f'--data {root}: no images in it{but}; {LAYOUTS}')
    used = f'{root / train_folder}: training'
    val = validation_images(root, val_folder, train) if val_folder else {}
    if val:
        used += f'; {root / val_folder}: validation'
    elif val_folder:
        used += f'; {root / val_folder}: no labelled images, not used'
    stray = sorted({*val} - {*train})
    if stray:
        raise UserError(f'{root / val_folder}: no training images of class {stray[0]}; {LAYOUTS}')
    classes = sorted(train)
    if not val:
        train, val = hold_out(train)
        used += '; every tenth image of a class is held out for validation'
    if not any(map(len, train.values())) or not any(map(len, val.values())):
        raise UserError(f'--data {root}: no class has two images; {LAYOUTS}')
    tell(used)
    sets = labelled(train, classes), labelled(val, classes)
    names = [A_SINGLE_CLASS] if classes == [''] else classes
    return *sets, names


def class_words(root, classes):
    """What words.txt or LOC_synset_mapping.txt call each class; '' where nothing is known. They
    are looked for in root and in the folders above it."""
    words = {}
    for folder in (root.resolve(), *root.resolve().parents):
        for path in (folder / 'words.txt', folder / 'LOC_synset_mapping.txt'):
            if path.is_file():
                for line in path.read_text('utf-8-sig', errors='replace').splitlines():
                    name, _, word = line.strip().partition('\t' if '\t' in line else ' ')
                    words.setdefault(name, word)
    return [words.get(name, '') for name in classes]
