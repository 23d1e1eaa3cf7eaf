"""Two photographs, segmented by colour: pixels in a zarr store, a mixture of six colours, a picture of the labels.

Shows the whole way from a store to a result for every row: the pixels of scikit-learn's two sample photographs are
written to a zarr array chunk by chunk, a mixture is fitted from the path of the store, labels are predicted lazily and
written beside the pixels, and each photograph is painted anew, every pixel in the mean colour of its component.

    python examples/photographs.py DIRECTORY

Writes pixels.zarr, labels.zarr, china.png and flower.png into DIRECTORY. Needs pillow. Takes a few seconds.
"""

import sys
from pathlib import Path

import numpy as np
import zarr
from PIL import Image
from sklearn.datasets import load_sample_images

from streamgmm import GaussianMixture

N_COMPONENTS = 6

#: Lines of a photograph in one chunk; both have 427 = 7 x 61 lines.
CHUNK_LINES = 61


def write_pixels(path, photographs):
    """Write the pixels (rows, 3) of all photographs to one zarr array of uint8, a chunk at a time."""
    n_lines, width, n_channels = photographs[0].shape
    chunk_rows = CHUNK_LINES * width
    shape = (len(photographs) * n_lines * width, n_channels)
    pixels = zarr.create_array(path, shape=shape, chunks=(chunk_rows, n_channels), dtype="uint8", overwrite=True)
    row = 0
    for photograph in photographs:
        for line in range(0, n_lines, CHUNK_LINES):
            pixels[row : row + chunk_rows] = photograph[line : line + CHUNK_LINES].reshape(-1, n_channels)
            row += chunk_rows
    return pixels


def print_components(model):
    """A line for each component, the most frequent first."""
    print("component  share of pixels  mean colour (red, green, blue)")
    for k in np.argsort(-model.weights_):
        red, green, blue = model.means_[k]
        print(f"{k:9}  {model.weights_[k]:15.1%}  {red:6.1f} {green:6.1f} {blue:6.1f}")


def paint(path, labels, shape, colours):
    """Write a picture of ``shape`` (lines, width) with every pixel in the colour of its label."""
    Image.fromarray(colours[labels].reshape(*shape, 3)).save(path)


def main(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    images = load_sample_images()
    names = [Path(name).stem for name in images.filenames]
    pixels = write_pixels(directory / "pixels.zarr", images.images)
    print(f"{pixels.shape[0]:,} pixels in {pixels.nchunks} chunks, {pixels.dtype}")

    model = GaussianMixture(N_COMPONENTS, random_state=0).fit(directory / "pixels.zarr")
    print(f"{model.n_passes_} reads of the store, converged: {model.converged_}")
    print_components(model)

    lazy = model.predict(directory / "pixels.zarr").astype("uint8")  # nothing is read yet
    lazy.to_zarr(directory / "labels.zarr", overwrite=True)

    labels = zarr.open_array(directory / "labels.zarr", mode="r")
    colours = np.rint(model.means_).astype("uint8")
    n_lines, width, _ = images.images[0].shape
    for i, name in enumerate(names):
        size = n_lines * width
        paint(directory / f"{name}.png", labels[i * size : (i + 1) * size], (n_lines, width), colours)
        print(f"wrote {name}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where to write: python examples/photographs.py DIRECTORY")
    main(sys.argv[1])
