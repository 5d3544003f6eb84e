"""Pictures of chapter 08: every budget is kept, tiles come back exactly, and hostile pictures are refused before a
pixel is decoded."""
import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageFile

from neural.cohort import toy_study
from neural.picture import (PICTURE_CODECS, decode_picture, decode_tiles, encode_picture, encode_tiles, jxl_shape,
                            mosaic, picture_shape, thumbnail, thumbnail_side, within_budget)
from neural.radiograph import fit_square
from neural.study import NeuralError


@pytest.fixture(scope="module")
def film(): return np.asarray(toy_study("Pleural Effusion", size=384, seed=2).image, np.float32)


def refused(call, said="."):
    "The line with which something is refused."
    with pytest.raises(NeuralError, match=said) as refusal: call()
    assert str(refusal.value) and "\n" not in str(refusal.value)
    return str(refusal.value)


def png(rows, columns, bits=8, colour=0, pixels=bytes(99)):
    "A PNG whose header claims any size."
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def saved(picture, kind, **options):
    "A picture as Pillow writes it."
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("codec", list(PICTURE_CODECS))
@pytest.mark.parametrize("budget", [450, 1000, 3000])
def test_a_thumbnail_stays_within_its_budget(film, codec, budget):
    data = thumbnail(film, budget, codec, thumbnail_side(fit_square(film, 192)[None], budget, codec))
    back = decode_picture(data, 192)
    assert 0 < len(data) <= budget and back.shape == (1, 192, 192)
    assert np.corrcoef(back.ravel(), fit_square(film, 192).ravel())[0, 1] > 0.9


def test_more_bytes_leave_less_error(film):
    wanted = fit_square(film, 192)
    error = lambda b: (
        (decode_picture(thumbnail(film, b, "webp", thumbnail_side(wanted[None], b)), 192) - wanted) ** 2).mean()
    assert error(250) > error(1000) > error(4000)


@pytest.mark.parametrize("codec", list(PICTURE_CODECS))
def test_a_budget_that_cannot_be_met_is_refused_in_one_line(film, codec):
    for attempt in (lambda: thumbnail(film, 15, codec), lambda: thumbnail_side(film[None], 15, codec)):
        with pytest.raises(NeuralError, match=f"{codec} cannot hold") as refusal: attempt()
        assert "\n" not in str(refusal.value)
    assert within_budget(fit_square(film, 32), 15, codec) is None


@pytest.mark.parametrize("codec", list(PICTURE_CODECS))
def test_damaged_pictures_are_refused(film, codec):
    data, rng = encode_picture(fit_square(film, 64), codec, 50), np.random.default_rng(0)
    for cut in (0, 1, 12, len(data) // 2):
        with pytest.raises(NeuralError): decode_picture(data[:cut], 64)
    for _ in range(60):
        noisy = bytearray(data)
        noisy[rng.integers(len(data))] ^= 1 << rng.integers(8)
        # a codec without a checksum may still read it
        try: assert decode_picture(bytes(noisy), 64).shape == (1, 64, 64)
        except NeuralError as e: assert "\n" not in str(e)


def test_foreign_and_huge_pictures_are_refused():
    for kind, size in (("PNG", (8, 8)), ("GIF", (8, 8)), ("WEBP", (3000, 8)), ("JPEG", (8, 2100))):
        out = io.BytesIO()
        Image.new("L", size).save(out, kind)
        with pytest.raises(NeuralError): decode_picture(out.getvalue(), 64)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 10])
def test_a_mosaic_holds_exactly_its_patches(k):
    film = np.arange(48 * 48, dtype=np.float32).reshape(1, 48, 48)
    patches = np.random.default_rng(k).choice(144, k, replace=False)
    made = mosaic(film, patches)
    tiles = made.reshape(made.shape[1] // 4, 4, made.shape[2] // 4, 4).transpose(0, 2, 1, 3).reshape(-1, 4, 4)
    for tile, p in zip(tiles, patches):
        assert np.array_equal(tile, film[0, p // 12 * 4 : p // 12 * 4 + 4, p % 12 * 4 : p % 12 * 4 + 4])
    assert len(tiles) - k < np.ceil(np.sqrt(k)) and (tiles[k:] == 0).all()
    with pytest.raises(NeuralError): mosaic(film[:, :47], patches)


@pytest.mark.parametrize("quality", [0, -1, 96, 100])
def test_a_quality_that_does_not_exist_is_refused(film, quality):
    refused(lambda: encode_picture(film, "webp", quality), "1 to 95")


@pytest.mark.parametrize("side", [0, 7, -64])
def test_a_side_of_nothing_is_no_default(film, side):
    refused(lambda: thumbnail(film, 500, "webp", side), f"a thumbnail of {side} pixels")


@pytest.mark.parametrize("patches", [[-1], [144], [0, 143, 9000]])
def test_a_mosaic_of_patches_that_are_not_there_is_refused(patches):
    refused(lambda: mosaic(np.zeros((1, 48, 48), np.float32), patches), "0 to 143")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_picture_that_is_to_be_turned_is_refused(kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = saved(Image.new("L", (30, 70), 9), kind, exif=exif)
    for attempt in (lambda: picture_shape(data), lambda: decode_picture(data, 32)): refused(attempt, "EXIF")
    exif[0x112] = 1
    assert picture_shape(saved(Image.new("L", (30, 70), 9), kind, exif=exif))[1:] == (70, 30)


@pytest.fixture
def nothing_decoded(monkeypatch):
    "Any attempt to read pixels fails the test."
    def never(*args, **kwargs): raise AssertionError("a pixel was decoded")
    for owner, name in ((ImageFile.ImageFile, "load"), (Image.Image, "load"), (imagecodecs, "jpegxl_decode")):
        monkeypatch.setattr(owner, name, never)


@pytest.mark.parametrize("codec", [*PICTURE_CODECS, "png"])
def test_a_header_is_all_that_is_read(film, codec, request):
    data = saved(Image.new("L", (30, 70), 9), "PNG") if codec == "png" else encode_picture(film[:, :70, :30], codec)
    request.getfixturevalue("nothing_decoded")
    assert picture_shape(data) == (codec, 70, 30) and picture_shape(data, 70)[1:] == (70, 30)
    refused(lambda: picture_shape(data, 69), "30x70 pixels; sides up to 69")


@pytest.mark.parametrize(
    "rows, columns", [(40_000, 40_000), (2**31 - 1, 2**31 - 1), (4097, 1), (1, 4097), (9500, 9500)])
def test_a_bomb_is_refused_by_its_header(nothing_decoded, rows, columns):
    bomb = png(rows, columns)
    refused(lambda: picture_shape(bomb), "sides up to 4096 are read")
    refused(lambda: decode_picture(bomb, 96), "sides up to 2048 are read")
    refused(lambda: decode_tiles(bomb, 1))


def forged(data, old, new):
    "A file with one pattern of bytes replaced."
    assert data.count(old) == 1
    return data.replace(old, new)


def test_other_codecs_that_claim_too_much_are_refused(request):
    wide = forged(saved(Image.new("L", (64, 64)), "AVIF"), b"ispe" + bytes(4) + struct.pack(">II", 64, 64),
                  b"ispe" + bytes(4) + struct.pack(">II", 30_000, 30_000))
    webp = bytearray(saved(Image.new("L", (16, 16)), "WEBP", lossless=True))
    webp[21:25] = (int.from_bytes(webp[21:25], "little") & 0xF0000000 | 16382 | 16382 << 14).to_bytes(4, "little")
    jpeg = forged(saved(Image.new("L", (64, 64)), "JPEG"), b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 64, 64),
                  b"\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 65_500, 65_500))
    request.getfixturevalue("nothing_decoded")
    for bomb in (wide, bytes(webp), jpeg): refused(lambda: picture_shape(bomb), "more than .* pixels|damaged")


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "AVIF"])
def test_animations_are_refused(kind):
    moving = saved(Image.new("L", (16, 16)), kind, save_all=True, append_images=[Image.new("L", (16, 16), 200)])
    for read in (lambda: picture_shape(moving), lambda: decode_tiles(moving, 1)): refused(read, "2 frames")
    refused(lambda: decode_picture(moving, 16))


def test_jpeg_xl_of_several_frames_is_refused():
    moving = imagecodecs.jpegxl_encode(np.zeros((3, 16, 16), np.uint8), photometric="gray", usecontainer=False)
    refused(lambda: picture_shape(moving), "several frames")
    refused(lambda: decode_picture(moving, 16), "several frames")


def test_a_jpeg_xl_header_is_read_whole_or_not_at_all():
    for shape in ((8, 8), (256, 256), (37, 100), (300, 7), (3000, 2000), (96, 128)):
        data = encode_picture(np.zeros((1, *shape), np.float32), "jxl")
        assert jxl_shape(data) == shape
        for cut in range(4): refused(lambda: picture_shape(data[:cut]))


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\xff\x0a", b"RIFF", b"RIFF\x1e\x00\x00\x00WEBPVP8L", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff",
     b"<svg/>", b"\x00\x00\x00\x0cJXL \r\n\x87\n", png(0, 0), png(0, 8), png(8, 8, bits=3)],
    ids=range(12),
)
def test_what_is_no_picture_is_refused(data):
    for read in (lambda: picture_shape(data), lambda: decode_picture(data, 16), lambda: decode_tiles(data, 1)):
        refused(read)


@pytest.mark.parametrize("codec", list(PICTURE_CODECS))
def test_every_truncation_of_a_thumbnail_is_refused_or_read(film, codec):
    data = thumbnail(film, 900, codec)
    for cut in range(0, len(data), 16):
        for read in (lambda: picture_shape(data[:cut]), lambda: decode_picture(data[:cut], 64)):
            try: read()  # a header may be whole where pixels are missing
            except NeuralError as e: assert "\n" not in str(e)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("patches", [[0], [143], [3, 17, 64, 100], list(range(0, 144, 9))], ids=str)
def test_tiles_come_back_exactly(film, patches, bits):
    back = decode_tiles(encode_tiles(film, patches, bits=bits), len(patches))
    exact = np.round(film[0].astype(np.float64) * (2**bits - 1))
    assert back.shape == (len(patches), 32, 32) and back.dtype == (np.uint8 if bits == 8 else np.uint16)
    for tile, p in zip(back, patches):
        assert np.array_equal(tile, exact[p // 12 * 32 : p // 12 * 32 + 32, p % 12 * 32 : p % 12 * 32 + 32])


@pytest.mark.parametrize("size, side", [(24, 12), (48, 1), (50, 5), (12, 12)])
def test_tiles_of_any_grid_and_of_extreme_pixels_come_back(size, side):
    film = np.random.default_rng(size).choice([0.0, 1.0, 0.5], (1, size, size))
    patches = np.unique([0, side * side // 2, side * side - 1])
    for bits in (8, 16):
        back = decode_tiles(encode_tiles(film, patches, (side, side), bits), len(patches))
        tiles = (np.round(film[0] * (2**bits - 1)) .reshape(side, size // side, side, size // side) .swapaxes(1, 2)
                 .reshape(side * side, size // side, size // side))
        assert back.shape == (len(patches), size // side, size // side) and np.array_equal(back, tiles[patches])


def test_the_smaller_lossless_format_is_kept(film):
    assert (picture_shape(encode_tiles(film, [50, 60]))[0] == "webp"
            and picture_shape(encode_tiles(film, [50, 60], bits=16))[0] == "png")
    tall = np.zeros((1, 1440, 1440), np.float32)  # 144 tiles of 120 pixels: higher than a WebP may be
    data = encode_tiles(tall, range(144))
    assert picture_shape(data, 20_000) == ("png", 144 * 120, 120) and not decode_tiles(data, 144).any()


@pytest.mark.parametrize("bits", [8, 16])
def test_truncated_tiles_are_refused(film, bits):
    data = encode_tiles(film, [5, 6, 90], bits=bits)
    for cut in range(0, len(data), 16): refused(lambda: decode_tiles(data[:cut], 3))


def test_a_flipped_bit_in_a_png_of_tiles_is_noticed(film):
    data, rng = encode_tiles(film, [5, 6, 90], bits=16), np.random.default_rng(0)
    whole = decode_tiles(data, 3)
    for _ in range(200):
        noisy = bytearray(data)
        noisy[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try: assert np.array_equal(decode_tiles(bytes(noisy), 3), whole)  # a bit that says nothing about pixels
        except NeuralError as e: assert "\n" not in str(e)


def test_strips_that_encode_tiles_would_not_write_are_refused(film):
    strip = encode_tiles(film, [5, 6, 90])
    for k in (0, -1, 1, 2, 4, 144): refused(lambda: decode_tiles(strip, k))
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for data, said in (
        (saved(grey, "JPEG"), "loses detail"), (saved(grey, "WEBP"), "loses detail"),
        (encode_picture(film, "jxl"), "loses detail"), (encode_picture(film, "avif"), "loses detail"),
        (saved(grey.convert("P"), "PNG"), "not grey"), (saved(grey.convert("RGB"), "PNG"), "not grey"),
        (saved(grey.convert("1"), "PNG"), "not grey"),
        (saved(Image.new("RGB", (8, 8), (1, 2, 3)), "WEBP", lossless=True), "not grey"),
        (saved(Image.new("RGBA", (8, 8), (5, 5, 5, 5)), "WEBP", lossless=True, exact=True), "not grey|loses detail")):
        refused(lambda: decode_tiles(data, 1), said)
    # 4 tiles of 4000 pixels: no film has so many
    refused(lambda: decode_tiles(png(16_000, 4000), 4), "sides up to 15491")


@pytest.mark.parametrize(
    "shape, side",
    [((1, 380, 380), 384), ((1, 384, 200), 384), ((384, 384), 384), ((2, 384, 384), 384), ((1, 5, 5), 12)])
def test_a_film_that_patches_do_not_divide_is_told_what_to_do(shape, side):
    refused(lambda: encode_tiles(np.zeros(shape, np.float32), [0]), rf"fit_square\(film, {side}\) makes one")


@pytest.mark.parametrize("patches", [[], [-1], [144], [3, 3], [4, 3], [[1, 2]]], ids=str)
def test_patches_of_tiles_are_ascending_and_inside(film, patches):
    refused(lambda: encode_tiles(film, patches), "ascending indices below 144")


def test_other_tiles_are_refused(film):
    for bad in (film * 2, film - 1, np.where(film > 0.5, np.nan, film)):
        refused(lambda: encode_tiles(bad, [0]), r"lies in \[0, 1\]")
    refused(lambda: encode_tiles(film, [0], (12, 6)), "as many rows as columns")
    refused(lambda: encode_tiles(film, [0], bits=12), "8 or 16 bits")
