"""Every kind of number in a picture file against what its specification says that it means.

The files are made byte by byte (`picture_files`), and so are the expected values. Each file is read
right or refused in one line; `READ` lists what must be read.
"""

import io
import itertools

import numpy as np
import picture_files as raw
import PIL
import pytest
from PIL import Image

from aps_jax import images
from aps_jax.io import color

HEIGHT, WIDTH = 9, 11
#: Half a level of 16 bits, and what float32 rounds.
EXACT = 1e-5
#: One level of 8 bits: what passes through 8-bit arithmetic.
LEVEL = 2 / 255


def numbers(channels, depth, seed=0):
    return np.random.default_rng(seed).integers(0, 2**depth, (HEIGHT, WIDTH, channels))


def loaded(folder, data, suffix):
    """The image, or the message of a refusal, which is one line and names the file."""
    path = folder / f"x{suffix}"
    path.write_bytes(data)
    try:
        return images.load_image(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 400
        return str(error)


def palette(depth, seed=1):
    return np.random.default_rng(seed).integers(0, 256, (2**depth, 3))


def plte(colours):
    return (b"PLTE", colours.astype(np.uint8).tobytes())


def big_endian(*values):
    return np.asarray(values, ">u2").tobytes()


PNG_KINDS = [(colour, depth) for colour, depths in raw.DEPTHS.items() for depth in depths]


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "adam7"])
@pytest.mark.parametrize(("colour", "depth"), PNG_KINDS)
def test_png_depths(tmp_path, colour, depth, interlaced):
    samples = numbers(raw.CHANNELS[colour], depth)
    colours = palette(depth) if colour == raw.PALETTE else None
    chunks = [plte(colours)] if colour == raw.PALETTE else []
    expected = raw.png_meaning(samples, colour, depth, palette=colours)
    for kind in range(5):
        data = raw.png(
            samples, colour, depth, chunks=chunks, interlaced=interlaced, filter_kind=kind
        )
        np.testing.assert_allclose(loaded(tmp_path, data, ".png"), expected, atol=EXACT)


@pytest.mark.parametrize(
    ("colour", "depth"), [kind for kind in PNG_KINDS if kind[0] in (raw.GREY, raw.RGB)]
)
def test_png_transparent_colour(tmp_path, colour, depth):
    """Only the very colour is transparent, not one that shares its high bytes."""
    samples = numbers(raw.CHANNELS[colour], depth)
    transparent = samples[2, 3].copy()
    samples[4, 4] = transparent
    samples[5, 5] = transparent ^ 1
    chunks = [(b"tRNS", big_endian(*transparent))]
    expected = raw.png_meaning(samples, colour, depth, transparent=transparent)
    assert (expected[4, 4] == 1).all()
    read = loaded(tmp_path, raw.png(samples, colour, depth, chunks=chunks), ".png")
    np.testing.assert_allclose(read, expected, atol=EXACT)
    # Bits above the depth do not count (third edition, 11.3.2.1).
    if depth < 16:
        chunks = [(b"tRNS", big_endian(*(transparent + 2**depth)))]
        read = loaded(tmp_path, raw.png(samples, colour, depth, chunks=chunks), ".png")
        np.testing.assert_allclose(read, expected, atol=EXACT)


@pytest.mark.parametrize("depth", raw.DEPTHS[raw.PALETTE])
@pytest.mark.parametrize("alphas", [(0,), (255, 0), (40, 200)], ids=str)
def test_png_transparent_palette(tmp_path, depth, alphas):
    samples, colours = numbers(1, depth), palette(depth)
    chunks = [plte(colours), (b"tRNS", bytes(alphas))]
    expected = raw.png_meaning(samples, raw.PALETTE, depth, palette=colours, alphas=alphas)
    read = loaded(tmp_path, raw.png(samples, raw.PALETTE, depth, chunks=chunks), ".png")
    np.testing.assert_allclose(read, expected, atol=EXACT)


def gama(gamma):
    return (b"gAMA", int(round(100000 * gamma)).to_bytes(4, "big"))


@pytest.mark.parametrize("gamma", [1.0, 0.55, 0.2])
@pytest.mark.parametrize(("colour", "depth"), PNG_KINDS)
def test_png_gamma(tmp_path, colour, depth, gamma):
    samples = numbers(raw.CHANNELS[colour], depth)
    colours = palette(depth) if colour == raw.PALETTE else None
    extra = [plte(colours)] if colour == raw.PALETTE else []
    data = raw.png(samples, colour, depth, chunks=[gama(gamma), *extra])
    expected = raw.png_meaning(samples, colour, depth, palette=colours, gamma=gamma)
    np.testing.assert_allclose(loaded(tmp_path, data, ".png"), expected, atol=EXACT)


SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
ADOBE_PRIMARIES = (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


def chrm(values):
    return (b"cHRM", b"".join(v.to_bytes(4, "big") for v in values))


PLAIN_TAGS = {
    "the gamma of sRGB": [gama(0.45455)],
    "sRGB wins over gamma": [gama(1.0), (b"sRGB", b"\0")],
    "primaries of sRGB": [gama(0.45455), chrm(SRGB_PRIMARIES)],
    "cICP of sRGB": [gama(1.0), (b"cICP", bytes((1, 13, 0, 1)))],
    "background and significant bits": [(b"sBIT", b"\5\6\5"), (b"bKGD", bytes(6))],
}


@pytest.mark.parametrize("name", PLAIN_TAGS)
def test_png_tags_that_change_nothing(tmp_path, name):
    samples = numbers(3, 8)
    read = loaded(tmp_path, raw.png(samples, raw.RGB, 8, chunks=PLAIN_TAGS[name]), ".png")
    np.testing.assert_array_equal(read, images.from_uint8(samples))


REFUSED_TAGS = {
    "other primaries": ([chrm(ADOBE_PRIMARIES)], "other primaries than sRGB"),
    "PQ": ([(b"cICP", bytes((9, 16, 0, 1)))], r"\(9, 16, 0, 1\) \(cICP\); save it as sRGB"),
    "no gamma": ([gama(0)], r"gamma of 0 \(gAMA\)"),
    "damaged profile": ([(b"iCCP", b"x\0\0" + b"junk")], "damaged colour profile"),
}


@pytest.mark.parametrize("name", REFUSED_TAGS)
def test_png_tags_that_are_refused(tmp_path, name):
    chunks, message = REFUSED_TAGS[name]
    read = loaded(tmp_path, raw.png(numbers(3, 8), raw.RGB, 8, chunks=chunks), ".png")
    assert isinstance(read, str)
    with pytest.raises(ValueError, match=message):
        raise ValueError(read)


# TIFF.


def tiff_numbers(tiff, seed=0):
    rng = np.random.default_rng(seed)
    channels = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}[tiff.photometric] + len(tiff.extra)
    shape = (HEIGHT, WIDTH, channels)
    if tiff.sample_format == raw.FLOAT:
        return rng.uniform(0, 1, shape).astype(np.float32)
    kind = np.dtype(f"u{max(1, -(-tiff.bits // 16) * 2 if tiff.bits > 8 else 1)}")
    samples = rng.integers(0, 2**tiff.bits, shape).astype(kind)
    if tiff.extra[:1] == (1,):  # Multiplied colours are not above their opacity.
        samples[..., :-1] = np.minimum(samples[..., :-1], samples[..., -1:])
    if tiff.sample_format == raw.SIGNED:
        samples = samples.view(f"i{samples.dtype.itemsize}")
    return samples


def tiff_cases():
    """Whatever a TIFF can say of its numbers, as far as 4 photometric kinds and 7 depths go."""
    for photometric, bits, sample_format, extra in itertools.product(
        (0, 1, 2, 3, 5), (1, 2, 4, 8, 12, 16, 32), (1, 2, 3), ((), (0,), (1,), (2,))
    ):
        is_float = sample_format == raw.FLOAT
        if (is_float and bits != 32) or (photometric == 3 and bits > 8):
            continue
        if sample_format == raw.SIGNED and bits in (1, 2, 4, 12):
            continue
        colour_map = ()
        if photometric == 3:
            colour_map = tuple((257 * palette(bits).T.ravel()).tolist())
        yield raw.Tiff(
            photometric=photometric, bits=bits, sample_format=sample_format, extra=extra,
            colour_map=colour_map,
        )  # fmt: skip


#: (photometric, bits, extra) that must be read in the byte order of PCs, plain and compressed.
READ = {
    *itertools.product((0, 1), (1, 2, 4, 8, 16), [()]),
    *itertools.product((3,), (1, 2, 4, 8), [()]),
    *itertools.product((2,), (8, 16), [(), (0,), (1,), (2,)]),
    *itertools.product((5,), (8, 16), [()]),
    (1, 12, ()),
    # Older ones, which the demo's libraries may ask for, refuse these two.
    *(((1, 8, (0,)), (1, 8, (1,))) if int(PIL.__version__.partition(".")[0]) >= 13 else ()),
    (1, 8, (2,)),
    (3, 8, (2,)),
}


def variants(tiff):
    """The same numbers in other byte, bit and plane orders, and compressed."""
    for order, compression, planar, fill_order in itertools.product("<>", (1, 8), (1, 2), (1, 2)):
        yield raw.dataclasses.replace(
            tiff, order=order, compression=compression, planar=planar, fill_order=fill_order
        )


@pytest.mark.parametrize(
    "tiff",
    list(tiff_cases()),
    ids=lambda t: f"{t.photometric}-{t.bits}-{t.sample_format}-{t.extra}",
)
def test_tiff_numbers(tmp_path, tiff, capfd):
    samples = tiff_numbers(tiff)
    expected = raw.tiff_meaning(samples, tiff)
    # Pillow divides multiplied colours of 8 bits in 8 bits.
    tolerance = LEVEL if tiff.extra == (1,) and tiff.bits == 8 else 4 * EXACT
    must_read = (tiff.photometric, tiff.bits, tiff.extra) in READ and tiff.sample_format == 1
    for variant in variants(tiff):
        read = loaded(tmp_path, variant.file(samples), ".tif")
        if isinstance(read, str):
            plain = variant.order == "<" and variant.planar == variant.fill_order == 1
            assert not (must_read and plain), read
            continue
        assert expected is not None, variant
        np.testing.assert_allclose(read, expected, atol=tolerance, err_msg=str(variant))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_orientation(tmp_path, orientation):
    samples = numbers(3, 16).astype(np.uint16)
    tiff = raw.Tiff(photometric=2, bits=16, orientation=orientation)
    shown = raw.tiff_meaning(samples, tiff)
    turned = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1],
        5: shown.transpose(1, 0, 2), 6: np.rot90(shown, -1),
        7: np.rot90(shown, 2).transpose(1, 0, 2), 8: np.rot90(shown),
    }[orientation]  # fmt: skip
    np.testing.assert_allclose(loaded(tmp_path, tiff.file(samples), ".tif"), turned, atol=EXACT)


def test_numbers_without_a_white_are_refused(tmp_path):
    for bits, sample_format in ((32, raw.UNSIGNED), (32, raw.SIGNED), (16, raw.SIGNED)):
        tiff = raw.Tiff(bits=bits, sample_format=sample_format)
        kind = f"{'ui'[sample_format - 1]}{bits // 8}"
        read = loaded(tmp_path, tiff.file(numbers(1, 8).astype(kind)), ".tif")
        assert "black and white are not defined" in read
    tiff = raw.Tiff(bits=8, sample_format=raw.SIGNED)
    read = loaded(tmp_path, tiff.file(numbers(1, 7).astype(np.int8)), ".tif")
    assert "signed 8-bit numbers" in read


@pytest.mark.parametrize("largest", [1, 100, 255, 1023, 65535])
def test_pgm_is_scaled_by_its_largest_value(tmp_path, largest):
    samples = np.random.default_rng(0).integers(0, largest + 1, (HEIGHT, WIDTH, 1))
    body = samples.astype(">u2" if largest > 255 else "u1").tobytes()
    data = f"P5 {WIDTH} {HEIGHT} {largest}\n".encode() + body
    expected = raw.on_white(samples / largest)
    np.testing.assert_allclose(loaded(tmp_path, data, ".pgm"), expected, atol=LEVEL / 2 + EXACT)


# Colour profiles.

#: Linear Display P3 to linear sRGB (CSS Color 4; both have the white of D65).
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])


def tagged(samples, suffix, profile, alpha=None):
    values = np.asarray(samples, np.uint8)
    if alpha is not None:
        values = np.concatenate([values, alpha], axis=-1)
    buffer = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    if suffix == ".webp":
        options = {"lossless": True}
    kind = {".jpg": "JPEG", ".tif": "TIFF", ".png": "PNG", ".webp": "WEBP"}[suffix]
    grey = values.shape[-1] == 1
    Image.fromarray(values[..., 0] if grey else values).save(
        buffer, kind, icc_profile=profile, **options
    )
    return buffer.getvalue()


def muted(channels=3):
    """Colours that sRGB holds in any of these spaces, smooth enough for a JPEG file."""
    ramp = np.linspace(90, 170, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    return np.rint(np.stack([ramp, ramp[::-1], ramp[:, ::-1]][:channels], axis=-1))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
def test_display_p3_becomes_srgb(tmp_path, suffix):
    samples = muted()
    profile = raw.icc("RGB", "sRGB", raw.P3_COLUMNS)
    linear = raw.decoded_srgb(samples / 255) @ P3_TO_SRGB.T
    expected = raw.on_white(raw.encoded_srgb(linear))
    read = loaded(tmp_path, tagged(samples, suffix, profile), suffix)
    tolerance = (3 if suffix == ".jpg" else 1) * LEVEL
    np.testing.assert_allclose(read, expected, atol=tolerance)
    assert np.abs(read - images.from_uint8(samples)).max() > 2 * tolerance


def test_deep_colours_and_opacity_pass_through_a_profile(tmp_path):
    samples = np.concatenate([257 * muted(), np.full((HEIGHT, WIDTH, 1), 20000)], axis=-1)
    samples = samples.astype(np.uint16)
    profile = raw.icc("RGB", "sRGB", raw.P3_COLUMNS)
    linear = raw.decoded_srgb(samples[..., :3] / 65535) @ P3_TO_SRGB.T
    expected = raw.on_white(raw.encoded_srgb(linear), samples[..., 3:] / 65535)
    tiff = raw.Tiff(photometric=2, bits=16, extra=(2,), profile=profile)
    np.testing.assert_allclose(loaded(tmp_path, tiff.file(samples), ".tif"), expected, atol=LEVEL)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_profile_of_srgb_changes_no_number(tmp_path, channels, depth):
    samples = numbers(channels, depth).astype(f"u{depth // 8}")
    profile = raw.icc("RGB", "sRGB", raw.SRGB_COLUMNS)
    tiff = raw.Tiff(photometric=1 if channels == 1 else 2, bits=depth, profile=profile)
    read = loaded(tmp_path, tiff.file(samples), ".tif")
    np.testing.assert_allclose(read, raw.tiff_meaning(samples, tiff), atol=EXACT)


def test_grey_profile(tmp_path):
    samples = muted(1)
    expected = raw.on_white(raw.encoded_srgb((samples / 255) ** 1.8))
    read = loaded(tmp_path, tagged(samples, ".png", raw.icc("GRAY", 1.8)), ".png")
    np.testing.assert_allclose(read, expected, atol=LEVEL)


def test_a_profile_wins_over_gamma(tmp_path):
    profile = raw.icc("RGB", "sRGB", raw.SRGB_COLUMNS)
    chunks = [gama(1.0), (b"iCCP", b"x\0\0" + raw.zlib.compress(profile))]
    samples = numbers(3, 8)
    read = loaded(tmp_path, raw.png(samples, raw.RGB, 8, chunks=chunks), ".png")
    np.testing.assert_allclose(read, images.from_uint8(samples), atol=EXACT)


@pytest.mark.parametrize("profile", [raw.icc("GRAY", 1.8), b"junk" * 50], ids=["grey", "junk"])
def test_profiles_that_do_not_fit_are_refused(tmp_path, profile):
    read = loaded(tmp_path, tagged(muted(), ".tif", profile), ".tif")
    assert "has a colour profile that cannot be used" in read and "save it as sRGB" in read


def test_written_pngs_are_tagged_and_read_back_exactly(tmp_path):
    for channels in (1, 3):
        images.save_image(tmp_path / "x.png", numbers(channels, 8).astype(np.uint8))
        assert Image.open(tmp_path / "x.png").info["srgb"] == 0
        read = images.load_image(tmp_path / "x.png")
        expected = images.from_uint8(numbers(channels, 8))
        np.testing.assert_array_equal(read, np.broadcast_to(expected, read.shape))


def test_colours_of_avif_that_pillow_does_not_convert(tmp_path):
    pytest.importorskip("PIL._avif")
    Image.fromarray(muted().astype(np.uint8)).save(tmp_path / "a.avif", quality=100)
    data = (tmp_path / "a.avif").read_bytes()
    assert not isinstance(loaded(tmp_path, data, ".avif"), str)
    start = data.index(b"colrnclx") + 8
    hdr = data[:start] + big_endian(9, 16) + data[start + 4 :]  # BT.2020, PQ.
    assert "primaries 9 and transfer curve 16" in loaded(tmp_path, hdr, ".avif")


def test_gammas_are_undone_for_every_value():
    """`_without_gamma` against the two definitions, both ends included."""
    x = np.linspace(-1, 1, 101, dtype=np.float32)[:, None, None] * np.ones((1, 1, 3), np.float32)
    read = color._without_gamma(None, x, {"gamma": 1.0})
    np.testing.assert_allclose(read, 2 * raw.encoded_srgb((x + 1) / 2) - 1, atol=EXACT)
