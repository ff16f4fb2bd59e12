"""Folders of photos as random crops for training and fixed crops for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from aps_jax.images import load_image, to_uint8
from aps_jax.io.files import list_images

_Entry = TypeVar("_Entry")


def spread(entries: Sequence[_Entry], count: int, offset: int = 0) -> list[_Entry]:
    """`count` of the entries, spread evenly over them, moved on by `offset` (none beyond)."""
    index = np.linspace(0, max(len(entries), 1) - 1, min(count, len(entries))).astype(int) + offset
    return [entries[i] for i in index if i < len(entries)]


def load_rgb(path: Path, max_short_side: int | None = None) -> Image.Image:
    """Decodes one file as `aps_jax.images.load_image` does, in 8 bits, and shrinks what is larger.

    Raises:
      ValueError: if it is not a whole image.
    """
    image = Image.fromarray(to_uint8(load_image(path)))
    if max_short_side is not None and min(image.size) > max_short_side:
        factor = max_short_side / min(image.size)
        image = image.resize(
            [round(side * factor) for side in image.size], Image.Resampling.LANCZOS
        )
    return image


def load_photos(
    folders: Sequence[Path], *, min_side: int, max_short_side: int | None = None
) -> list[Image.Image]:
    """Decodes every photo of at least `min_side` pixels on its short side into memory."""
    photos = load_named_photos(folders, min_side=min_side, max_short_side=max_short_side)
    return [image for _, image in photos]


def load_named_photos(
    folders: Sequence[Path], *, min_side: int, max_short_side: int | None = None
) -> list[tuple[Path, Image.Image]]:
    """`load_photos` with the files that they are from."""
    paths = list_images(folders)
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda p: load_rgb(p, max_short_side), paths)
        named = zip(paths, images, strict=True)
        photos = [(path, image) for path, image in named if min(image.size) >= min_side]
    if not photos:
        raise ValueError(f"no image below {list(folders)} is at least {min_side} pixels on a side")
    return photos


def to_float(images: Sequence[Image.Image]) -> np.ndarray:
    """Equally sized images as float32 [B, H, W, 3] in [-1, 1]."""
    return np.stack([np.asarray(image, np.float32) for image in images]) / 127.5 - 1


#: Side of the blocks that `flat_share` looks at, and the range of grey levels in a flat one.
_FLAT_SIDE, _FLAT_RANGE = 8, 8

#: Places that are tried for a crop with less plain ground.
_TRIES = 8


def flat_share(picture: Image.Image) -> float:
    """Share of a picture's blocks of 8x8 pixels that hold one colour, such as plain ground."""
    pixels = np.asarray(picture, np.int16)
    rows, columns = (side // _FLAT_SIDE for side in pixels.shape[:2])
    blocks = pixels[: rows * _FLAT_SIDE, : columns * _FLAT_SIDE]
    blocks = blocks.reshape(rows, _FLAT_SIDE, columns, _FLAT_SIDE, -1)
    extent = blocks.max(axis=(1, 3)) - blocks.min(axis=(1, 3))
    return float(np.mean(extent.max(axis=-1) < _FLAT_RANGE))


def random_crop(
    rng: np.random.Generator,
    photo: Image.Image,
    size: int,
    *,
    is_whole: bool = False,
    max_flat: float = 1.0,
) -> Image.Image:
    """A square crop at a random place and scale, resized to `size`, mirrored half of the time.

    Args:
      rng: where and how large.
      photo: at least `size` pixels on a side.
      size: side of the result in pixels.
      is_whole: always the centre square, for aligned pictures such as faces.
      max_flat: crops with a larger `flat_share` are drawn again, a few times at most: a photo that
        is flat all over keeps its last crop.
    """
    crop = _random_crop(rng, photo, size, is_whole)
    for _ in range(_TRIES - 1):
        if is_whole or max_flat >= 1 or flat_share(crop) <= max_flat:
            break
        crop = _random_crop(rng, photo, size, is_whole)
    return crop


def _random_crop(
    rng: np.random.Generator, photo: Image.Image, size: int, is_whole: bool
) -> Image.Image:
    short = min(photo.size)
    side = rng.uniform(size, short) if short > size and not is_whole else short
    left, top = photo.width - side, photo.height - side
    left, top = (left / 2, top / 2) if is_whole else (rng.uniform(0, left), rng.uniform(0, top))
    if photo.size == (size, size):
        crop = photo
    else:
        box = (left, top, left + side, top + side)
        filter = Image.Resampling.LANCZOS if is_whole else Image.Resampling.BICUBIC
        crop = photo.resize((size, size), filter, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def numbered_crops(
    photos: Sequence[Image.Image],
    chosen: np.ndarray,
    first: int,
    *,
    batch_size: int,
    seed: int,
    size: int,
    **cut: Any,
) -> np.ndarray:
    """Crops number `first` and so on, uint8 [B, size, size, 3], each of its own random numbers.

    `chosen` has the photo of each crop. Past its end the last one is repeated, so that every batch
    is full: one shape, one compilation. `cut` are options of `random_crop`.
    """
    numbers = np.minimum(np.arange(first, first + batch_size), len(chosen) - 1)
    made = [
        random_crop(np.random.default_rng((seed, number)), photos[chosen[number]], size, **cut)
        for number in numbers
    ]
    return np.stack([np.asarray(crop) for crop in made])


def random_batch(
    photos: Sequence[Image.Image],
    seed: int,
    step: int,
    *,
    batch_size: int,
    size: int,
    **cut: Any,
) -> np.ndarray:
    """The batch of one training step: a function of (seed, step), so a resumed run repeats it.

    `cut` are options of `random_crop`.
    """
    rng = np.random.default_rng((seed, step))
    chosen = rng.integers(len(photos), size=batch_size)
    return to_float([random_crop(rng, photos[index], size, **cut) for index in chosen])


def prefetched_batches(
    photos: Sequence[Image.Image], seed: int, steps: range, **settings: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (step, `random_batch`), making the next batch while the current one is used."""

    def make(step: int) -> np.ndarray:
        return random_batch(photos, seed, step, **settings)

    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(make, steps.start) if len(steps) else None
        for step in steps:
            batch = upcoming.result()
            if step + 1 < steps.stop:
                upcoming = pool.submit(make, step + 1)
            yield step, batch


def _chosen(paths: Sequence[Path], count: int | None = None, offset: int = 0) -> list[Path]:
    return list(paths) if count is None else spread(paths, count, offset)


class Crops(NamedTuple):
    """Fixed evaluation images.

    Attributes:
      names: files, relative to their folder.
      positions: places of the photos among all that were asked for; unreadable ones keep theirs,
        those too small have none.
      images: float32 [B, size, size, 3] in [-1, 1].
      unreadable: what is wrong with a file, by name.
      too_small: likewise, for photos that are whole but not large enough.
    """

    names: list[str]
    positions: np.ndarray
    images: np.ndarray
    unreadable: dict[str, str]
    too_small: dict[str, str]

    @property
    def left_out(self) -> dict[str, str]:
        """Why there is no image, by name of a photo that was asked for."""
        return self.unreadable | self.too_small

    def first(self, count: int) -> Crops:
        """Only the first so many images."""
        chosen = slice(count)
        return self._replace(
            names=self.names[chosen], positions=self.positions[chosen], images=self.images[chosen]
        )


def require_own(log: Path, names: Iterable[str], crops: Crops, folder: Path) -> None:
    """Refuses results of other photos, which have nothing to tell them apart but their names.

    Args:
      log: where the results are from, for the message.
      names: their photos.
      crops: those chosen now.
      folder: where from.

    Raises:
      ValueError: if a name is not among them.
    """
    known = {*crops.names, *crops.left_out}
    others = [name for name in dict.fromkeys(names) if name not in known]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{log} holds rows of photos that are not among those chosen from {folder} "
            f"({others[0]}{more}); give --data the folder that made them, or --out another folder"
        )


def evaluation_crops(
    folder: Path,
    *,
    size: int,
    shrink: int = 1,
    count: int | None = None,
    offset: int = 0,
    without: Mapping[str, Any] | None = None,
) -> Crops:
    """The centre `size * shrink` square of each photo, shrunk to `size`.

    Args:
      folder: folder of photos; those too small are left out, and no others take their places.
      size: side of the result in pixels.
      shrink: integer factor of the antialiased (box) reduction.
      count: number of photos, spread evenly over the sorted folder; all of them if None.
      offset: takes the photos so many places further on (none beyond the last), so that settings
        are not tuned on the photos of a table.
      without: `count` and `offset` of another call, whose photos are left out first.

    Raises:
      ValueError: if the folder has no photo that can be read and is large enough.
    """
    side = size * shrink
    crops, unreadable, too_small, positions = {}, {}, {}, []
    paths = list_images([folder])
    if without is not None:
        others = _chosen(paths, **without)
        paths = [path for path in paths if path not in others]
    for path in _chosen(paths, count, offset):
        name = path.relative_to(folder).as_posix()
        try:
            photo = load_rgb(path)
        except (OSError, ValueError) as error:
            unreadable[name] = " ".join(str(error).split()) or type(error).__name__
            continue
        if min(photo.size) < side:
            too_small[name] = f"smaller than {side} pixels: {photo.width}x{photo.height}"
            continue
        left, top = (photo.width - side) // 2, (photo.height - side) // 2
        crop = photo.crop((left, top, left + side, top + side)).reduce(shrink)
        positions.append(len(crops) + len(unreadable))
        crops[name] = crop
    if not crops:
        reason = f"; {len(unreadable)} cannot be read" if unreadable else ""
        raise ValueError(f"no photo in {folder} is at least {side} pixels on a side{reason}")
    images = to_float(list(crops.values()))
    return Crops(list(crops), np.array(positions), images, unreadable, too_small)


def center_crops(folder: Path, **options: int | None) -> tuple[list[str], np.ndarray]:
    """Names and images of `evaluation_crops`.

    Raises:
      ValueError: as `evaluation_crops`, and if a photo cannot be read.
    """
    crops = evaluation_crops(folder, **options)
    for name, reason in crops.unreadable.items():
        raise ValueError(f"{name} in {folder} cannot be read: {reason}")
    return crops.names, crops.images
