"""Uploaded pictures: broken, huge and hostile ones."""

import io

from PIL import Image

from discovla.search import uploads
from tests.search.serve.fake import jpeg, picture


def upload(client, content, name="picture.jpg"):
    return client.post("/api/search", files={"image": (name, content)})


def test_broken_uploads_are_refused_with_one_line(client):
    whole = jpeg(picture("red", 0.5))
    tiff = io.BytesIO()
    Image.new("RGB", (20, 20)).save(tiff, "TIFF")
    for content in (
        b"",
        b"no picture",
        tiff.getvalue(),
        whole[: len(whole) // 2],
        b"\xff\xd8\xff" + b"\0" * 1000,
    ):
        response = upload(client, content)
        assert response.status_code in (400, 422), response.text
        assert response.json()["detail"].startswith("image: ")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(client):
    file = io.BytesIO()
    Image.new("1", (10_000, 6_000)).save(file, "PNG")
    assert len(file.getvalue()) < 100_000
    response = upload(client, file.getvalue())
    assert response.status_code == 400 and "50,000,000 pixels" in response.json()["detail"]


def test_an_upload_above_the_limit_is_refused(client):
    response = upload(client, b"\0" * (uploads.MAX_BYTES + (1 << 20)))
    assert response.status_code == 413


def test_a_path_in_the_name_of_an_upload_is_ignored(client, tmp_path):
    before = sorted(tmp_path.parent.rglob("*"))
    response = upload(client, jpeg(picture("red", 0.5)), f"../../{tmp_path}/evil.jpg")
    assert response.status_code == 200
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_decoder_that_was_killed_is_replaced():
    decoder = uploads.ImageDecoder(seconds=5)
    try:
        assert decoder(jpeg(picture("red", 0.5))).startswith(b"\x89PNG")
        decoder._sandbox._process.kill()  # type: ignore[union-attr]
        assert decoder(jpeg(picture("red", 0.5))).startswith(b"\x89PNG")
    finally:
        decoder.close()


def test_a_decoded_upload_is_upright_and_small():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (3000, 1500), "red").save(file, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(uploads.decoded_png(file.getvalue()))).size == (512, 1024)
