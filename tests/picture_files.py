"""PNG and TIFF files and ICC profiles made byte by byte, and what their numbers mean.

No function here uses Pillow, so that a mistake of Pillow's cannot hide in the expected values.
"""

import dataclasses
import struct
import zlib

import numpy as np

# PNG: colour types of the specification (RFC 2083, and its third edition).
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGBA: (8, 16),
}


def pack(samples, bits, order=">"):
    """Rows [H, width * channels] as bytes, each row padded to whole bytes, first value on top."""
    if bits < 8 or bits == 12:
        shifts = np.arange(bits - 1, -1, -1)
        single = (samples[..., None].astype(np.int64) >> shifts) & 1
        return np.packbits(single.reshape(len(samples), -1).astype(np.uint8), axis=1)
    rows = np.ascontiguousarray(samples.astype(samples.dtype.newbyteorder(order)))
    return rows.view(np.uint8).reshape(len(samples), -1)


def _filtered(rows, kind, step):
    """One PNG filter on all rows: none, sub, up, average or Paeth."""
    rows = rows.astype(np.int64)
    left = np.pad(rows, ((0, 0), (step, 0)))[:, : rows.shape[1]]
    up = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(left, ((1, 0), (0, 0)))[:-1]
    if kind == 4:
        guess = left + up - corner
        distances = [np.abs(guess - near) for near in (left, up, corner)]
        predicted = np.choose(np.argmin(distances, axis=0), [left, up, corner])
    else:
        predicted = (0, left, up, (left + up) // 2)[kind]
    return b"".join(bytes([kind]) + row.tobytes() for row in (rows - predicted).astype(np.uint8))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, colour, depth, *, chunks=(), interlaced=False, filter_kind=0):
    """A PNG file of stored numbers [H, W, C]; `chunks` are (kind, data) before the pixels."""
    height, width, channels = samples.shape
    step = max(1, depth * channels // 8)
    dtype = np.uint16 if depth == 16 else np.uint8
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row, first column, distance of rows, of columns.
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2),
                  (0, 1, 2, 2), (1, 0, 2, 1)]  # fmt: skip
    data = b""
    for top, left, down, right in passes:
        part = samples[top::down, left::right].astype(dtype)
        if part.size:
            data += _filtered(pack(part.reshape(len(part), -1), depth), filter_kind, step)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = b"".join(chunk(kind, content) for kind, content in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body
        + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )  # fmt: skip


# TIFF 6.0.
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_TYPES = {3: "H", 4: "I", 7: "B"}


@dataclasses.dataclass(frozen=True)
class Tiff:
    """What a TIFF file says of its numbers; names as in the specification."""

    photometric: int = 1
    bits: int = 8
    sample_format: int = UNSIGNED
    order: str = "<"
    extra: tuple = ()
    compression: int = 1
    planar: int = 1
    rows_per_strip: int = 3
    fill_order: int = 1
    orientation: int = 1
    colour_map: tuple = ()
    profile: bytes = b""

    def file(self, samples):
        """The file of stored numbers [H, W, C]."""
        height, width, channels = samples.shape
        planes = np.moveaxis(samples, -1, 0) if self.planar == 2 else [samples]
        strips = []
        for plane in planes:
            rows = pack(np.ascontiguousarray(plane).reshape(height, -1), self.bits, self.order)
            for top in range(0, height, self.rows_per_strip):
                strip = rows[top : top + self.rows_per_strip]
                data = zlib.compress(strip.tobytes()) if self.compression == 8 else strip.tobytes()
                if self.fill_order == 2:
                    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
                    data = np.packbits(bits).tobytes()
                strips.append(data)
        ends = np.cumsum([8, *map(len, strips)])
        tags = {
            256: (4, [width]), 257: (4, [height]), 258: (3, [self.bits] * channels),
            259: (3, [self.compression]), 262: (3, [self.photometric]),
            266: (3, [self.fill_order]), 273: (4, ends[:-1].tolist()),
            274: (3, [self.orientation]), 277: (3, [channels]),
            278: (4, [self.rows_per_strip]), 279: (4, list(map(len, strips))),
            284: (3, [self.planar]), 320: (3, self.colour_map), 338: (3, self.extra),
            339: (3, [self.sample_format] * channels), 34675: (7, self.profile),
        }  # fmt: skip
        return self._assemble(b"".join(strips), {t: v for t, v in tags.items() if len(v[1])})

    def _assemble(self, pixels, tags):
        pixels += b"\0" * (len(pixels) % 2)
        start = 8 + len(pixels)
        free = start + 2 + 12 * len(tags) + 4
        entries, values = b"", b""
        for tag, (kind, numbers) in tags.items():
            data = struct.pack(f"{self.order}{len(numbers)}{_TYPES[kind]}", *numbers)
            place = data.ljust(4, b"\0")
            if len(data) > 4:
                place = struct.pack(self.order + "I", free + len(values))
                values += data + b"\0" * (len(data) % 2)
            entries += struct.pack(self.order + "HHI", tag, kind, len(numbers)) + place
        head = {"<": b"II", ">": b"MM"}[self.order] + struct.pack(self.order + "HI", 42, start)
        count = struct.pack(self.order + "H", len(tags))
        return head + pixels + count + entries + bytes(4) + values


# ICC profiles, version 2.


def _s15(values):
    return struct.pack(f">{len(values)}i", *(round(65536 * v) for v in values))


def icc(space, gamma, columns=()):
    """A monitor profile: one power curve, for RGB with the D50 XYZ of its primaries.

    `gamma` "sRGB" stands for the curve of IEC 61966-2-1.
    """
    if gamma == "sRGB":
        table = np.rint(65535 * decoded_srgb(np.linspace(0, 1, 1024))).astype(">u2")
        curve = b"curv" + bytes(4) + struct.pack(">I", 1024) + table.tobytes()
    else:
        curve = b"curv" + bytes(4) + struct.pack(">IHH", 1, round(256 * gamma), 0)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {
        b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": b"XYZ " + bytes(4) + _s15((0.9642, 1.0, 0.8249)),
    }  # fmt: skip
    if space == "RGB":
        for name, column in zip("rgb", columns, strict=True):
            tags[name.encode() + b"XYZ"] = b"XYZ " + bytes(4) + _s15(column)
            tags[name.encode() + b"TRC"] = curve
    else:
        tags[b"kTRC"] = curve
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", place + len(body), b"test", 0x02400000, b"mntr",
                       space.encode().ljust(4), b"XYZ ")  # fmt: skip
    head += bytes(12) + b"acsp" + bytes(28) + _s15((0.9642, 1.0, 0.8249)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + body


#: XYZ of the primaries, adapted to D50 by Bradford, from the profiles of the ICC and of Apple.
SRGB_COLUMNS = (
    (0.43607, 0.22249, 0.01392),
    (0.38515, 0.71687, 0.09708),
    (0.14307, 0.06061, 0.7141),
)
P3_COLUMNS = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


# What numbers mean.


def encoded_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def decoded_srgb(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def on_white(colour, alpha=None):
    """Colours [H, W, 1 or 3] and opacity [H, W, 1] in [0, 1] to an image [H, W, 3] in [-1, 1]."""
    if alpha is not None:
        colour = alpha * colour + 1 - alpha
    return np.broadcast_to(2 * colour - 1, (*colour.shape[:2], 3))


def png_meaning(samples, colour, depth, *, palette=None, alphas=(), transparent=None, gamma=None):
    """What a viewer shows of stored numbers, on white."""
    numbers = samples.astype(np.float64)
    alpha = None
    if colour == PALETTE:
        opacity = np.full(len(palette), 255.0)
        opacity[: len(alphas)] = alphas
        alpha = opacity[samples[..., 0]][..., None] / 255
        shown = np.asarray(palette, np.float64)[samples[..., 0]] / 255
    else:
        shown = numbers / (2**depth - 1)
        if colour in (GREY_ALPHA, RGBA):
            shown, alpha = shown[..., :-1], shown[..., -1:]
        if transparent is not None:
            alpha = 1.0 - (numbers == np.asarray(transparent)).all(-1, keepdims=True)
    if gamma is not None:
        shown = encoded_srgb(shown ** (1 / gamma))
    return on_white(shown, alpha)


def tiff_meaning(samples, tiff):
    """What a viewer shows, on white; None where the specification does not say what white is."""
    if tiff.sample_format != UNSIGNED or tiff.bits > 16:
        return None
    numbers = samples.astype(np.float64) / (2**tiff.bits - 1)
    channels = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}[tiff.photometric]
    shown, alpha = numbers[..., :channels], None
    if tiff.photometric == 3:
        table = np.reshape(tiff.colour_map, (3, -1)).T / 65535
        shown = table[samples[..., 0]]
    elif tiff.photometric == 5:
        shown = (1 - shown[..., :3]) * (1 - shown[..., 3:])
    if tiff.extra and tiff.extra[0] in (1, 2):
        alpha = numbers[..., channels : channels + 1]
        if tiff.extra[0] == 1:  # Colours are stored times alpha.
            return on_white(shown + 1 - alpha)
    if tiff.photometric == 0:
        shown = 1 - shown
    return on_white(shown, alpha)
