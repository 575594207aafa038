"""Folders of images: what becomes a class, what is for training, what for validation."""
import csv
import os
from collections import Counter
from pathlib import Path

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


BUILT_IN = ('shapes', 'cifar10')                            # what --data means by a name alone


def cifar10_path(data):
    """The archive or the folder of CIFAR-10 in binary form that a path means, or None."""
    for name in ('', 'cifar-10-batches-bin', 'cifar-10-binary.tar.gz'):
        path = Path(data) / name
        is_archive = path.is_file() and path.name.endswith('.tar.gz')
        if is_archive or (path / 'test_batch.bin').is_file():
            return path
    return None


def is_folder_of_images(data):
    """Whether --data means a folder of images: not one of BUILT_IN, nor CIFAR-10 in binary form."""
    return data not in BUILT_IN and cifar10_path(data) is None


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
                elif entry.name[0] != '.' and os.path.isfile(entry.path):
                    others[os.path.splitext(entry.name)[1].lower() or entry.name] += 1
    return np.array(sorted(names), dtype=np.bytes_)


def class_folders(root, folder, others):
    """{class: names of images} of the class folders in root / folder; some may have none."""
    return {name: images_in(root, os.path.join(folder, name), others)
            for name in subfolders(root / folder) if name != 'images'}


def images_below(folder):
    """How many images are in a folder, at any depth."""
    return sum(is_image(file) for *_, files in os.walk(folder) for file in files)


def by_class(root, folder, others):
    """class_folders that have images; or if there are none, {'': the images that lie in it}; {}
    without images. UserError where images/ lies beside class folders: one of them could hold masks.
    """
    loose = images_in(root, folder, others)
    groups = class_folders(root, folder, others)
    found = {name: names for name, names in groups.items() if len(names) > 0}
    empty = [name for name in groups if name not in found]
    for name in subfolders(root / folder):
        beside = sorted({*found} - {name})
        if name.lower() == 'images' and beside and images_below(root / folder / name):
            raise UserError(f'{root / folder}: images in {name}/ and in {beside[0]}/ beside it: '
                            'which are the pictures? Give a folder that holds them alone')
    if found and len(loose) > 0:
        others['images beside the class folders'] += len(loose)
    if found or len(loose) > 0:
        for name in groups:
            deeper = [place for place in subfolders(root / folder / name) if place != 'images']
            others['images in deeper folders'] += sum(
                images_below(root / folder / name / place) for place in deeper)
    if found and empty:
        tell(f'no images directly in {", ".join(empty)}: left out')
    return found or ({'': loose} if len(loose) > 0 else {})


def find_splits(root):
    """The names of root's subfolders for training and for validation; '' where there is none.

    Digits may follow, as in test1, if there is one such folder. A folder called train is the split
    if it holds class folders, or if splits are the only folders with images. Otherwise it is a
    class, like bus and truck.
    """
    def plain(name):
        return name.lower().rstrip('0123456789')

    names = subfolders(root)
    count = Counter(map(plain, names))
    by_name = {plain(name): name for name in names if count[plain(name)] == 1}
    by_name.update({name.lower(): name for name in names})
    train = [by_name[name] for name in TRAIN_NAMES if name in by_name]
    val = [by_name[name] for name in VAL_NAMES if name in by_name]
    if not train:
        return '', ''
    # The first class folder is enough: to list them all takes long, and is done by by_class.
    in_train = (os.path.join(train[0], name) for name in subfolders(root / train[0])
                if name != 'images')
    if not any(len(images_in(root, folder, Counter())) > 0 for folder in in_train):
        groups = class_folders(root, '', Counter())
        classes = {plain(name) for name, names in groups.items() if len(names) > 0}
        if classes - {*TRAIN_NAMES, *VAL_NAMES}:
            return '', ''
    return train[0], (val[0] if val else '')


def say_left_out(others):
    """What to say of files that are no images, {ending: number}."""
    text = ', '.join(f'{number} {ending}' for ending, number in others.most_common(5) if number)
    if {'.tar', '.gz', '.tgz', '.zip', '.parquet'} & {*others}:
        text += '; archives have to be unpacked into image files'
    if '.heic' in others:
        text += '; Pillow does not read HEIC: convert it'
    if 'data_batch_1' in others:
        text += '; for CIFAR-10, --data cifar10'
    return text


def find_root(asked):
    """The folder that --data means, its splits, and its training images {class: names}: `asked` or,
    if it has no images where they count, the nearest folder below. UserError if there are several.
    """
    level, not_images = [asked], None
    for _ in range(5):
        found = {}
        for folder in level:
            splits, others = find_splits(folder), Counter()
            train = by_class(folder, splits[0], others)
            if train:
                found[folder] = splits, train, others
            not_images = not_images or others                   # of the folder that was asked for
        if len(found) > 1:
            raise UserError(f'--data {asked}: no images in it, but in several folders below: try '
                            f'--data {min(found)}')
        if found:
            root, (splits, train, others) = found.popitem()
            if others.total():
                tell(f'left out: {say_left_out(others)}')
            return root, splits, train
        level = [folder / name for folder in level for name in subfolders(folder)]
    but = f', but {say_left_out(not_images)}' if not_images else ''
    raise UserError(f'--data {asked}: no images in it{but}; {LAYOUTS}')


def validation_images(root, folder, train):
    """{class: names of images} of a validation folder; {} without any, or without labels."""
    others = Counter()
    found = by_class(root, folder, others)
    if found and others.total():
        tell(f'left out of {root / folder}: {say_left_out(others)}')
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
    class with fewer than ten. Where every class has a single image, the same of the classes."""
    if all(len(names) == 1 for names in groups.values()):
        held = list(groups)[9::10] if len(groups) >= 10 else list(groups)[1:2]
        return ({name: groups[name] for name in groups if name not in held},
                {name: groups[name] for name in held})
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
    """Training set and validation set, each names of files (N,) and labels (N,); the classes; the
    folder that the names are relative to. Prints what is used as what.

    See LAYOUTS for what is understood; raises UserError for anything else.
    """
    asked = Path(root)
    if not asked.is_dir():
        what = 'a file; unpack it first' if asked.is_file() else 'no such folder'
        raise UserError(f'--data {asked}: {what}; {LAYOUTS}')
    root, (train_folder, val_folder), train = find_root(asked)
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
        raise UserError(f'--data {asked}: fewer than two images; {LAYOUTS}')
    tell(used)
    sets = labelled(train, classes), labelled(val, classes)
    names = [A_SINGLE_CLASS] if classes == [''] else classes
    return *sets, names, root


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
