"""Take the pictures of the search page: draw clips, index them by the drawn CLIP, open the page in Chromium.

python docs/screenshot.py [OUT]     default: docs/assets; needs chromium and the extra `dev`
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import threading
from itertools import product
from math import cos, pi, sin
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

from discovla.drawn_world.drawing import COLOURS
from discovla.search.index import Index
from discovla.search.serve import Server, listen

WIDTH, HEIGHT, RATE, SECONDS = 480, 270, 8, 4
SHAPES = {"circle": (64, 0.0), "square": (4, 0.5), "diamond": (4, 0.0), "triangle": (3, 0.5)}  # corners, turn
GROUNDS = ((38, 52, 74), (74, 52, 66), (44, 66, 58), (70, 62, 46))
QUERY = "a white triangle moves right"


def frame(colour: str, shape: str, ground: int, moment: float) -> np.ndarray:
    """Draw a shape on its way from left to right over a gradient; `moment` is 0..1."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    pixels = np.array(GROUNDS[ground]) + 34 * y[..., None] + 18 * x[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((2 * WIDTH, 2 * HEIGHT))
    centre = 2 * WIDTH * (0.3 + 0.4 * moment), HEIGHT * (1 + 0.12 * sin(2 * pi * moment))
    corners, turn = SHAPES[shape]
    angles = [2 * pi * (corner + turn) / corners + pi / 2 for corner in range(corners)]
    radius = 0.18 * 2 * HEIGHT
    points = [(centre[0] + radius * cos(angle), centre[1] + radius * sin(angle)) for angle in angles]
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    return np.asarray(image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))


def draw(folder: Path) -> None:
    """Draw a clip of each colour and shape."""
    for i, (colour, shape) in enumerate(product(COLOURS, SHAPES)):
        with av.open(str(folder / f"{colour} {shape}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for moment in np.linspace(0, 1, RATE * SECONDS):
                picture = frame(colour, shape, i % len(GROUNDS), float(moment))
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def shoot(page: Page, file: Path) -> None:
    """Write what the page shows as a JPEG."""
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(file, "JPEG", quality=82, optimize=True)
    print(f"wrote {file} ({file.stat().st_size / 1000:.0f} kB)")


def shoot_page(address: str, out: Path) -> None:
    """Search, and take pictures of the hits and of the player."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 740})
        page.goto(address)
        page.fill("#query", QUERY)
        page.press("#query", "Enter")
        page.wait_for_selector(".hit")
        page.wait_for_function("() => [...document.images].every(image => image.complete)")
        page.evaluate("document.activeElement.blur()")
        shoot(page, out / "search.jpg")
        page.click(".hit")
        page.wait_for_selector("#strip rect.best")
        page.wait_for_function("() => document.querySelector('#video').currentTime > 1")
        page.keyboard.press("Space")
        shoot(page, out / "search_player.jpg")
        chromium.close()


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "assets")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        videos.mkdir()
        draw(videos)
        with Index.create(Path(folder) / "index", "clip:drawn") as index:
            index.add([videos])
            server = Server(index, "127.0.0.1")
            with listen("127.0.0.1", 0) as listener:
                thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
                thread.start()
                shoot_page(f"http://127.0.0.1:{listener.getsockname()[1]}", out)
                server.should_exit = True
                thread.join()


if __name__ == "__main__":
    main()
