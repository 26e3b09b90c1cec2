"""Real photographs to ask about, which come inside two packages of the extra ``photos``: nothing is downloaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from laconic.errors import LaconicError, quote

PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}  # by the folder that each installs
PHOTOS = {
    "astronaut": "skimage/data/astronaut.png",
    "camera": "skimage/data/camera.png",
    "cat": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "page": "skimage/data/page.png",
    "rocket": "skimage/data/rocket.jpg",
}


def photo_path(name: str) -> Path:
    """Where the photograph ``name`` lies; the package that it comes with is found, not imported."""
    if name not in PHOTOS:
        raise LaconicError(f"There is no photo {quote(name)}: choose one of {', '.join(PHOTOS)}.")
    folder, _, rest = PHOTOS[name].partition("/")
    spec = find_spec(folder)
    path = Path(spec.submodule_search_locations[0], rest) if spec is not None else None
    if path is None or not path.is_file():
        raise LaconicError(
            f"The photo {name} comes with {PACKAGES[folder]}: install the extra with pip install 'laconic[photos]'."
        )
    return path
