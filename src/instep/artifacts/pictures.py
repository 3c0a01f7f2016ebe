"""Pictures as PNG files, by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from instep.errors import RecordError
from instep.record.files import write_atomically

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
