"""What the recipes of digits leave: pictures, as PNG, and figures on how much these are digits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instep.data import Data
from instep.errors import RecordError
from instep.models.flow import FlowNet, integrate
from instep.models.gan import GANNet
from instep.models.vae import VAENet
from instep.record.files import write_atomically


def flow_samples(
    model: FlowNet, data: Data, folder: Path, *, each: int = 18, columns: int = 12, steps: int = 50
) -> Mapping[str, float]:
    """Draws `each` pictures of every class along the flow; the first `columns` of each, a row a class, to samples.png.

    Figures: "recognised", the share whose nearest training picture is of the class that was asked for; "told apart",
    how often the nearest neighbour among samples and held-out pictures tells which of the two a picture is: 0.5 where
    they are alike, 1 where they are not (Lopez-Paz and Oquab, 2017, arXiv:1610.06545); "nearest", the mean distance to
    the nearest training picture, and "nearest, held-out", that of held-out ones, below which lie copies. The pictures
    are from -1 to 1.
    """
    wanted = torch.arange(model.classes).repeat_interleave(each)
    device = next(model.parameters()).device
    labels = wanted.to(device)
    noise = torch.randn(len(wanted), 1, model.side, model.side).to(device)
    drawn = integrate(lambda x, t: model(x, t, labels), noise, steps).cpu()
    return _by_class(drawn, wanted, data, folder, columns)


def gan_samples(model: GANNet, data: Data, folder: Path, *, each: int = 18, columns: int = 12) -> Mapping[str, float]:
    """Has the generator make `each` pictures of every class, to samples.png, with the figures of `flow_samples`."""
    wanted = torch.arange(model.classes).repeat_interleave(each)
    device = next(model.parameters()).device
    noise = torch.randn(len(wanted), model.latents).to(device)
    drawn = model.generator(noise, wanted.to(device)).cpu()
    return _by_class(drawn, wanted, data, folder, columns)


def _by_class(drawn: Tensor, wanted: Tensor, data: Data, folder: Path, columns: int) -> Mapping[str, float]:
    """Pictures from -1 to 1, [N, 1, S, S], as many of each class, and which is asked for: to samples.png, figures."""
    pictures, names = _training(data)
    real = _tensors(data.held_out)[0].flatten(1)
    rows = drawn.unflatten(0, (int(wanted.max()) + 1, -1))[:, :columns]
    write_png(folder / "samples.png", grid((rows.flatten(0, 1) + 1) / 2, rows.shape[1]))
    flat = drawn.flatten(1)
    return {
        "recognised": _share(names[_nearest(flat, pictures)] == wanted),
        "told apart": told_apart(flat[: len(real)], real[: len(flat)]),
        "nearest": _distance(flat, pictures),
        "nearest, held-out": _distance(real, pictures),
    }


def vae_reconstructions(
    model: VAENet, data: Data, folder: Path, *, columns: int = 15, rows: int = 4
) -> Mapping[str, float]:
    """Held-out pictures, each above its reconstruction, to reconstructions.png, and pictures of latents drawn from the
    prior to samples.png. The pictures are from 0 to 1, and the model's are logits.

    Figures: "error", the squared error of a reconstruction by pixel, and "error of the mean", that of the mean training
    picture; "recognised", the share of reconstructions whose nearest training picture is of the original's class.
    """
    pictures, names = _training(data)
    real, wanted = _tensors(data.held_out)
    device = next(model.parameters()).device
    rebuilt = model(real.to(device))[0].sigmoid().cpu()
    shown = [part[row * columns : (row + 1) * columns] for row in range(rows) for part in (real, rebuilt)]
    write_png(folder / "reconstructions.png", grid(torch.cat(shown), columns))
    drawn = model.decode(torch.randn(columns * rows, model.latents).to(device)).sigmoid()
    write_png(folder / "samples.png", grid(drawn, columns))
    mean = pictures.mean(0)
    return {
        "error": float((rebuilt - real).square().mean()),
        "error of the mean": float((mean - real.flatten(1)).square().mean()),
        "recognised": _share(names[_nearest(rebuilt.flatten(1), pictures)] == wanted),
    }


def told_apart(drawn: Tensor, real: Tensor) -> float:
    """The share of `drawn` and `real`, [N, D] each, whose nearest other one is of their own kind."""
    together = torch.cat((drawn, real))
    distances = torch.cdist(together, together).fill_diagonal_(torch.inf)
    kind = torch.arange(len(together)) < len(drawn)
    return _share(kind[distances.argmin(1)] == kind)


def _training(data: Data) -> tuple[Tensor, Tensor]:
    pictures, names = _tensors(data.train)
    return pictures.flatten(1), names


def _tensors(pictures: Any) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = pictures.tensors
    return both


def _nearest(of: Tensor, among: Tensor) -> Tensor:
    return torch.cdist(of, among).argmin(1)


def _distance(of: Tensor, among: Tensor) -> float:
    return float(torch.cdist(of, among).amin(1).mean())


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def grid(pictures: Tensor, columns: int, *, gap: int = 1, zoom: int = 4) -> Tensor:
    """One picture, [H, W] uint8, of `pictures`, [N, h, w] or [N, 1, h, w], from 0 to 1, in rows of `columns`.

    Values beyond 0 and 1 are cut off. `gap` grey pixels lie between them; then each pixel becomes `zoom` x `zoom`.
    Raises RecordError for other shapes.
    """
    tiles = pictures.detach().float().cpu()
    if tiles.dim() == 4 and tiles.shape[1] == 1:
        tiles = tiles[:, 0]
    if tiles.dim() != 3 or not len(tiles) or columns < 1:
        raise RecordError(
            f"a grid of {columns} columns cannot be made of pictures of shape {list(pictures.shape)}; give "
            f"[count, height, width], or [count, 1, height, width]."
        )
    count, height, width = tiles.shape
    rows = -(-count // columns)
    whole = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap), 0.5)
    for place, tile in enumerate(tiles):
        top, left = (place // columns) * (height + gap) + gap, (place % columns) * (width + gap) + gap
        whole[top : top + height, left : left + width] = tile
    pixels = (whole.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def write_png(path: Path, pixels: Tensor) -> None:
    """Writes `pixels`, [H, W] uint8, as a grey PNG (ISO/IEC 15948). Raises ResourceError."""
    if pixels.dim() != 2 or pixels.dtype != torch.uint8:
        raise RecordError(f"a grey picture is [height, width] of uint8, not {list(pixels.shape)} of {pixels.dtype}.")
    height, width = pixels.shape
    lines = b"".join(b"\x00" + bytes(row) for row in pixels.cpu().numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    write_atomically(path, _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
